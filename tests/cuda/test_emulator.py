"""The emulator finds what a GPU would get wrong: a missing barrier, a missing wait, a peer that never comes."""

import ctypes

import pytest
import torch

from benchmarks import gpu_parts
from rnnfast.table import KERNELS

SCHEDULES = range(8)


def _run(emulated: ctypes.CDLL, kernel: str, seed: int) -> tuple[list[int], str]:
    out = (ctypes.c_int * 64)()
    emulated.rnnfast_set_schedule(seed)
    message = emulated.rnnfast_run_fault(kernel.encode(), out).decode()
    return list(out), message


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("neighbours", [(i + 1) % 64 for i in range(64)]),
        ("broadcast", [0, 1, 2, 3] * 4 + [0] * 48),
        ("copy", [*range(32)] + [0] * 32),
    ],
)
def test_a_right_kernel_is_right_under_every_schedule(emulated, kernel, expected):
    for seed in SCHEDULES:
        assert _run(emulated, kernel, seed) == (expected, "")


@pytest.mark.parametrize("kernel", ["neighbours without a barrier", "broadcast without a wait", "copy without a wait"])
def test_a_missing_barrier_shows_as_a_wrong_number(emulated, kernel):
    right = _run(emulated, kernel.split(" without")[0], 0)
    assert any(_run(emulated, kernel, seed) != right for seed in SCHEDULES)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("broadcast of what is not published", "a remote store to a block that has published no mbarrier"),
        ("broadcast beyond the memory", "a remote store beyond the shared memory: 72"),
        ("broadcast of too much", "an mbarrier is to wait for more bytes than it can count"),
        ("different instructions", "the lanes of a warp are at different warp-wide instructions"),
    ],
)
def test_what_the_hardware_does_not_define_is_an_error(emulated, kernel, message):
    assert message in _run(emulated, kernel, 0)[1]


def test_a_barrier_that_not_all_reach_is_an_error(emulated):
    assert "deadlock" in _run(emulated, "half a barrier", 0)[1]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("absent peer", "a block of the grid scan did not arrive"),
        ("peer gone", "a block of the grid scan did not arrive"),
        ("absent bytes", "what the cluster's blocks send did not arrive for step: 1"),
    ],
)
def test_the_watchdog_says_what_is_missing(emulated, kernel, message):
    assert message in _run(emulated, kernel, 0)[1]


@pytest.mark.parametrize("kernel", ["peer a step ahead", "late peer", "clock behind"])
def test_the_watchdog_ends_no_kernel_that_goes_on(emulated, kernel):
    assert _run(emulated, kernel, 0)[1] == ""


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_sanitizer_watches_can_be_run(schedule, monkeypatch, kernel):
    monkeypatch.setattr(gpu_parts, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_parts, "COMPUTE_TYPES", {"float32": torch.float32, "bfloat16": torch.bfloat16})
    monkeypatch.setattr(gpu_parts.cuda, "load", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu_parts.small_layers(kernel)
