"""The native scan against the reference in float64: every cell, shape, type and instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnfast
from rnnfast import building
from rnnfast.backends import cpu
from rnnfast.backends.cpu import build
from rnnfast.cells import CELLS
from tests.cpu import test_cross_entropy, test_extended
from tests.cpu.harness import Case, compare

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

SHAPES = [
    # lanes, steps, batch, inputs, hidden
    (1, 1, 1, 1, 1),
    (1, 4, 2, 3, 3),
    (2, 5, 3, 17, 33),
    (1, 2, 33, 64, 64),
    (2, 7, 17, 5, 130),
    (4, 3, 4, 33, 16),
    (1, 35, 32, 28, 64),
    (1, 9, 1, 130, 200),
    (1, 5, 30, 20, 200),
]
# Of the RMS of the truth: the rounding of a few operations, granted on top of twice the eager error. In bfloat16
# the operands of the products are rounded as well, so that its bounds hold alone; one rounding is 0.0011 to 0.0023.
FLOOR = {torch.float64: (1e-15, 2e-15), torch.float32: (5e-7, 1e-6), torch.bfloat16: (0.005, 0.012)}
# Small tensors can cancel to almost nothing; their errors are measured against this at least.
LEAST_RMS = 0.25


def grid(shapes: list[tuple[int, ...]]) -> list[Case]:
    cases = []
    for cell in CELLS:
        for number, (lanes, steps, batch, inputs, hidden) in enumerate(shapes):
            for ids in (False, True):
                ragged = (number % 2 == 0) == ids
                bias = (number + ids) % 3 != 0
                case = Case(cell, lanes, steps, batch, inputs, hidden, 0, ids, ragged, bias)
                cases.append(case)
                if cell == "lstm":
                    cases.append(case._replace(projected=max(1, hidden // 2)))
    return cases


def check(case: Case, dtype: torch.dtype) -> None:
    for name, error in compare(case, dtype).items():
        assert math.isfinite(error.truth), f"{name} of {case}: the reference is not finite"
        floor = FLOOR[dtype][name.startswith("d_")] * max(error.truth, LEAST_RMS)
        bound = floor if dtype is torch.bfloat16 else floor + 2 * error.reference
        assert error.native <= bound, f"{name} of {case} in {dtype}: {error}"


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", grid(SHAPES), ids=str)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_more_gates_than_a_block_of_the_backward_product(ragged: bool, dtype: torch.dtype) -> None:
    check(Case("lstm", 2, 3, 9, 5, 520, 0, False, ragged, True), dtype)
    check(Case("gru", 1, 3, 13, 5, 700, 0, True, ragged, True), dtype)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize(("steps", "batch"), [(2, 1024), (3, 683), (2, 2048)])  # one group of 2048, one row more, two
def test_rows_at_the_edges_of_a_group_of_sums(steps: int, batch: int, dtype: torch.dtype) -> None:
    check(Case("gru", 1, steps, batch, 3, 5), dtype)
    check(Case("rnn_tanh", 1, steps, batch, 3, 193), dtype)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_vocabulary_too_large_for_a_table(cell: str, dtype: torch.dtype) -> None:
    """Above 4096 ids one call looks its rows up in w_ih itself."""
    check(Case(cell, 2, 5, 3, 4100, 35, 0, True, True, True), dtype)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    ("steps", "batch", "hidden"), [(8, 16, 8), (400, 64, 8), (32, 16, 200)]
)  # a block of rows, and many
def test_float32_error_of_sums_over_rows_is_at_most_twice_that_of_torch(
    steps: int, batch: int, hidden: int, layer: str, ids: bool
) -> None:
    inputs = 2
    squares: dict[str, Tensor] = {}
    for seed in range(3):  # one draw may be a lucky one
        torch.manual_seed(seed)
        ours = getattr(rnnfast, layer)(inputs, hidden, backend="cpu")
        numbers = torch.randint(inputs, (steps, batch))
        vectors = nn.functional.one_hot(numbers, inputs).float() if ids else torch.randn(steps, batch, inputs)
        weights = torch.rand(steps, batch, hidden)  # of one sign: the sums grow with every row

        def gradients(module: Any, input: Tensor, weights: Tensor = weights) -> tuple[Tensor, ...]:
            output = module(input)[0]
            return torch.autograd.grad((output * weights.to(output.dtype)).sum(), list(module.parameters()))

        theirs, wide = getattr(nn, layer)(inputs, hidden), getattr(nn, layer)(inputs, hidden, dtype=torch.float64)
        for module in (theirs, wide):
            module.load_state_dict(ours.state_dict())
        inputs_of = (ours, numbers if ids else vectors), (theirs, vectors), (wide, vectors.double())
        found = [gradients(module, input) for module, input in inputs_of]
        for (name, _), mine, their, true in zip(ours.named_parameters(), *found, strict=True):
            errors = torch.stack([((of - true).norm() / true.norm()).square() for of in (mine, their)])
            squares[name] = squares.get(name, 0) + errors / 3
    for name, sums in squares.items():
        error, torchs = sums.sqrt().tolist()
        of_ids = ids and layer == "GRU" and name == "bias_ih_l0"  # of the sums of two ids' rows
        allowed = 2 * torchs + (2 if of_ids else 0.25) * torch.finfo(torch.float32).eps
        assert error <= allowed, f"{name}: relative error {error:.2e}, torch.nn's {torchs:.2e}"


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    """As torch rounds: what is stored of a relu is the very sum of a weight's column and a bias."""
    cpu.load()
    mantissa = torch.arange(128) / 128
    weight = torch.cat([(1 + mantissa) * 2.0**e for e in (-30, 0, 100)]).bfloat16()
    for part in (0.25, 0.5, 0.75):  # of the weight's last bit's value
        bias = (2.0 ** weight.float().log2().floor() * 2**-7 * part).bfloat16()
        layer = [torch.tensor([0]), weight[None, :, None], torch.zeros(1, len(weight), len(weight)).bfloat16()]
        layer += [bias[None], torch.zeros_like(bias)[None], None, torch.zeros(1, 1, len(weight)).bfloat16(), None, None]
        output, h_n, *_ = torch.ops.rnnfast.scan_cpu(*layer, "rnn_relu", False, False)
        expected = (weight.float() + bias.float()).bfloat16()
        assert torch.equal(output[0], expected)
        assert torch.equal(h_n[0, 0], expected)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx"])
def test_parity_of_each_instruction_set(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.cpu.test_parity"],
        env=os.environ | {"RNNFAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    compiled_here = build._of_this_processor(building.compiler()) if building.compiler() else build.ALL
    if "this processor does not have it" in done.stderr:
        assert isa in build._NEWER or isa not in compiled_here  # the system may withhold the newer ones
        pytest.skip(f"this processor has no {isa}")
    optional = isa in build._NEWER or isa not in build._INSTRUCTION_SETS  # for some compilers, or for this processor
    if optional and "not an instruction set of this build" in done.stderr:
        pytest.skip(f"this library was compiled without {isa}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert build.ALL.index(isa) <= max(map(build.ALL.index, compiled_here))


def test_unknown_instruction_set() -> None:
    code = "from tests.cpu.harness import *; compare(Case('gru'), torch.float32)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RNNFAST_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RNNFAST_CPU_ISA=mmx: not an instruction set of this build" in done.stderr


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in FLOOR:
        for case in grid([SHAPES[2], SHAPES[4], SHAPES[6], SHAPES[8]]):
            check(case, dtype)
    test_extended.check_an_instruction_set()
    test_cross_entropy.check_an_instruction_set()
    test_bfloat16_is_rounded_to_nearest_even()
