"""Whatever order threads run in, barriers, flags and mbarriers order all that they do to the memory they share."""

import ctypes

import pytest

from rnnfast.backends.cuda import launch
from rnnfast.cells import CELLS
from tests.scans import random_gradients, random_layer

from .conftest import WATCHED, use_operators
from .layers import DTYPES
from .test_scan import TEAMS, use

SCHEDULES = range(4)
SHAPES = {
    "both directions": {"hidden": 17, "batch": 2, "steps": 4, "lanes": 2, "bias": False},
    "ragged token ids": {"hidden": 20, "batch": 4, "steps": 4, "ragged": True, "token_ids": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compute_type", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["block", "cluster", "grid"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_scan_has_no_race(watched, monkeypatch, cell, kernel, compute_type, shape):
    use_operators(monkeypatch, WATCHED)
    use(monkeypatch, TEAMS[kernel][compute_type == "bfloat16"], compute_type)
    layer = random_layer(cell, **SHAPES[shape], dtype=DTYPES[compute_type])
    # One schedule each: what is ordered hardly depends on it.
    watched.rnnfast_set_schedule(len(cell + kernel + compute_type + shape))
    watched.rnnfast_checked_accesses()
    outputs = launch.forward(*layer, True)
    assert watched.rnnfast_checked_accesses() > 0
    launch.backward(*random_gradients(outputs), *layer, outputs[0], outputs[3], True, True)
    assert watched.rnnfast_checked_accesses() > 0


def _run(watched: ctypes.CDLL, kernel: str, seed: int) -> str:
    watched.rnnfast_set_schedule(seed)
    return watched.rnnfast_run_fault(kernel.encode(), (ctypes.c_int * 64)()).decode()


@pytest.mark.parametrize("kernel", ["neighbours", "lanes", "broadcast", "relay"])
def test_a_right_kernel_has_no_race(watched, kernel):
    for seed in SCHEDULES:
        assert _run(watched, kernel, seed) == ""
        assert watched.rnnfast_checked_accesses() > 0


@pytest.mark.parametrize(
    ("kernel", "race"),
    [
        ("neighbours without a barrier", "of shared memory"),
        ("lanes without a barrier", "of shared memory"),
        ("broadcast without a start", "of shared memory"),
        ("broadcast without a wait", "remote store by thread"),
        ("broadcast without all bytes", "remote store by thread"),
        ("relay without a barrier", "of global memory"),
        ("relay without a wait", "of global memory"),
    ],
)
def test_missing_synchronisation_is_a_race_under_every_schedule(watched, kernel, race):
    for seed in SCHEDULES:
        message = _run(watched, kernel, seed)
        assert message.startswith("race: ")
        assert race in message
