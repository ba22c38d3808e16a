"""Which kernel a layer gets."""

import pytest
import torch

from rnnfast.backends.triton import launch, plan
from rnnfast.backends.triton.plan import H100, Card, candidates
from rnnfast.cells import CELLS
from rnnfast.table import compute_type_of

COMPUTE_TYPES = ("float32", "tf32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("cell", "hidden", "batch", "lanes", "compute_type", "kernel"),
    [
        ("lstm", 64, 512, 2, "float32", "registers"),
        ("lstm", 128, 512, 2, "bfloat16", "shared"),
        ("lstm", 100, 32, 1, "bfloat16", "resident"),  # no multiple of 16
        ("lstm", 512, 64, 1, "float32", "resident"),  # 32 programs for each 16 rows
        ("lstm", 512, 80, 1, "float32", "gates"),
        ("lstm", 512, 64, 2, "float32", "gates"),
        ("lstm", 512, 128, 1, "bfloat16", "resident"),  # 16 programs for each 16 rows
        ("lstm", 512, 144, 1, "bfloat16", "gates"),
        ("gru", 512, 128, 1, "tf32", "step"),
        ("gru", 1024, 32, 1, "float32", "step"),
        ("gru", 2048, 32, 1, "float32", "gates"),
        ("rnn_tanh", 1024, 64, 1, "float16", "resident"),
        ("rnn_tanh", 40_000, 1, 1, "float32", "gates"),  # W_hh past 32-bit addresses
    ],
)
def test_kernel_for(cell, hidden, batch, lanes, compute_type, kernel):
    assert plan.plan(cell, hidden, batch, lanes, compute_type, H100).kernel == kernel


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_candidates(cell, compute_type):
    """The gates' kernel runs every size, and each kernel is listed once."""
    for hidden in (1, 17, 64, 130, 512, 3000, 50_000):
        for batch in (0, 1, 32, 100_000):
            kernels = [how.kernel for how in candidates(cell, hidden, batch, 2, compute_type, H100)]
            assert "gates" in kernels
            assert len(set(kernels)) == len(kernels)


def test_a_launch_of_the_step_scan_has_a_limited_number_of_blocks():
    """Along y, where a block is 16 batch rows."""
    able = [candidates("gru", 512, batch, 1, "tf32", H100) for batch in (1_048_560, 1_048_561)]
    assert [{how.kernel for how in hows} for hows in able] == [{"step", "gates"}, {"gates"}]


def test_more_lanes_than_a_launch_has_blocks_are_refused():
    h_0 = torch.zeros(65_536, 1, 1)
    rest = (None, None, None, h_0, None, None, "rnn_tanh", False, False)
    with pytest.raises(RuntimeError, match=r"at most 65,535 layers at once.*not 65,536"):
        launch.forward(torch.zeros(1, 1), torch.zeros(65_536, 1, 1), h_0, *rest)


@pytest.mark.parametrize("cell", CELLS)
def test_a_card_with_little_shared_memory(cell):
    """It gets the kernels that need little: consumer cards have 99 KB, which the large tiles exceed."""
    for hidden in (128, 256, 512):
        for compute_type in COMPUTE_TYPES:
            able = candidates(cell, hidden, 32, 1, compute_type, Card(99 * 1024, 24))
            assert not {how.kernel for how in able} & {"shared", "resident"}


def test_compute_types():
    assert compute_type_of(torch.float32) == "float32"
    assert compute_type_of(torch.bfloat16) == "bfloat16"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert compute_type_of(torch.float32) == "tf32"
        assert compute_type_of(torch.float16) == "float16"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
