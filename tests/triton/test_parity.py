"""The Triton kernels against the reference in float64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from rnnfast.backends import reference
from rnnfast.backends.triton.plan import Plan
from rnnfast.cells import CELLS
from rnnfast.scan import scan

from .layers import assert_near, random_gradients, random_layer, widened

# One plan for every kernel, with tiles small enough that little layers take several of them.
KERNELS = {
    "registers": lambda hidden: Plan("block", 1, _power_of_two(hidden), 4, dot=False),
    "tensor cores": lambda hidden: Plan("block", 16, _power_of_two(hidden), 4),
    "step": lambda hidden: Plan("step", 16, 16, 4, depth=16, stages=2),
}
SHAPES = {
    "one unit": {"hidden": 1, "batch": 4, "steps": 3, "seed": 1},
    "odd sizes": {"hidden": 17, "batch": 3, "steps": 2, "lanes": 2, "bias": False},
    "ragged": {"hidden": 9, "batch": 3, "steps": 4, "lanes": 2, "ragged": True},
    "ragged token ids": {"hidden": 5, "batch": 2, "steps": 3, "lanes": 2, "ragged": True, "token_ids": True},
    "two row tiles": {"hidden": 18, "batch": 17, "steps": 2, "token_ids": True, "inputs": 40},
}
HALF_TYPES = [
    ("odd sizes", torch.float16),
    ("ragged", torch.bfloat16),
    ("ragged token ids", torch.float16),
    ("two row tiles", torch.bfloat16),
]
CASES = [(cell, shape, torch.float32) for cell in CELLS for shape in SHAPES]
CASES += [(cell, shape, dtype) for cell in ("rnn_tanh", "lstm", "gru") for shape, dtype in HALF_TYPES]
GRADIENTS = ("d_input", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh", "d_w_hr", "d_h_0", "d_c_0")
# Roundings of half an eps, RMS: a result rounded once stays below 1. In half types 1.28 is DESIGN's bound of 0.005 for
# bfloat16; a gradient passes through rounded gate gradients on its way.
FORWARD_ROUNDINGS = {torch.float32: 6.0, torch.bfloat16: 1.28, torch.float16: 1.28}
BACKWARD_ROUNDINGS = {torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def _power_of_two(hidden: int) -> int:
    return max(16, 1 << (hidden - 1).bit_length())


@pytest.fixture
def launch(device: torch.device):
    from rnnfast.backends.triton import launch

    return launch


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("cell", "shape", "dtype"), CASES)
def test_matches_the_reference(launch, monkeypatch, device, cell, kernel, shape, dtype):
    """Forward and all gradients, each side reading its own tape and the other's."""
    monkeypatch.setattr(launch, "plan", lambda cell, hidden, dtype, tf32: KERNELS[kernel](hidden))
    layer = random_layer(cell, **SHAPES[shape], dtype=dtype, device=device)
    wide = widened(layer)
    truth = reference.forward(*wide, True)
    ours = launch.forward(*layer, True)
    for name, a, t in zip(("output", "h_n", "c_n", "tape"), ours, truth, strict=True):
        assert_near(name, a, t, dtype, FORWARD_ROUNDINGS[dtype])

    gradients = random_gradients(ours)
    theirs = reference.forward(*layer, True)
    for way, backward, run in (
        ("ours after ours", launch.backward, ours),
        ("ours after the reference", launch.backward, theirs),
        ("the reference after ours", reference.backward, ours),
    ):
        results = backward(*gradients, *layer, run[0], run[3], True, True)
        truth = reference.backward(*widened(gradients), *wide, *widened([run[0], run[3]]), True, True)
        for name, a, t in zip(GRADIENTS, results, truth, strict=True):
            assert_near(f"{way}: {name}", a, t, dtype, BACKWARD_ROUNDINGS[dtype])
