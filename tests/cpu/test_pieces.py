"""Gradients of weights in float32, on the matrix unit where there is one: numbers of any size, infinities and NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rnnfast.cells import CELLS
from tests.cpu.harness import Case, assert_same, build, cpu, gradients_like, run
from tests.cpu.test_parity import check
from tests.cpu.test_threads import with_threads
from tests.scans import widened

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

UNITS = 200  # 13 groups of 16 columns, of which the last is half full
GROUP = 16


def one_step(batch: int, sizes: list[float], state: float) -> tuple[list, list]:
    """A relu's step of that many rows, whose output's gradients are of a size of its own for each 16 units in turn."""
    arguments = build(Case("rnn_relu", steps=1, batch=batch, inputs=3, hidden=UNITS), torch.float32)
    arguments[6] *= state
    d_outputs = gradients_like(arguments, torch.float32)
    of_unit = torch.tensor([sizes[unit // GROUP % len(sizes)] for unit in range(UNITS)])
    return arguments, [d_outputs[0] * of_unit, torch.zeros_like(d_outputs[1]), None]


def gradients_of(backend: str, arguments: list, d_outputs: list) -> dict[str, Tensor]:
    cpu.load()
    return run(backend, arguments, d_outputs)[1]


@pytest.mark.parametrize("batch", [64, 101, 130])
@pytest.mark.parametrize(
    ("state", "sizes"),
    [
        (2.0**-120, [1.0, 2.0**100, 2.0**60, 2.0**40]),
        (2.0**-52, [1.0, 2.0**-60, 2.0**100]),
        (1.0, [1.0, 2.0**-120, 2.0**-52, 2.0**-48, 0.0, 2.0**59, 2.0**62, 2.0**110]),
        (2.0**62, [1.0, 2.0**-120, 2.0**40]),
    ],
)
def test_numbers_of_any_size(state: float, sizes: list[float], batch: int) -> None:
    """Each 16 units' gradients are right beside their own size, not only beside the largest."""
    torch.manual_seed(batch)
    arguments, d_outputs = one_step(batch, sizes, state)
    found = gradients_of("cpu", arguments, d_outputs)
    truth = gradients_of("reference", widened(arguments), widened(d_outputs))
    for name in ("d_w_hh", "d_b_hh"):
        for first in range(0, UNITS, GROUP):
            got, expected = (g[name][0, first : first + GROUP].double() for g in (found, truth))
            assert (got - expected).norm() <= 5e-7 * expected.norm(), f"{name} of units {first}.."


def test_numbers_that_are_none_stay_with_their_unit() -> None:
    torch.manual_seed(0)
    arguments, d_outputs = one_step(70, [1.0], 1.0)
    arguments[3] += 10  # no unit's relu is off
    d_outputs[0][5, 3], d_outputs[0][6, 40], d_outputs[0][69, 199] = float("inf"), float("nan"), -float("inf")
    found, expected = (gradients_of(backend, arguments, d_outputs) for backend in ("cpu", "reference"))
    for name in ("d_w_ih", "d_w_hh", "d_b_ih"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, equal_nan=True)
        assert found[name][0].reshape(UNITS, -1).isfinite().all(1).sum() == UNITS - 3
    arguments[6][0, 2, 7] = float("inf")  # what is multiplied with all of them
    d_outputs[0].nan_to_num_(posinf=1.0, neginf=1.0, nan=1.0)
    found, expected = (gradients_of(backend, arguments, d_outputs)["d_w_hh"] for backend in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert found[0].isfinite().all(0).sum() == UNITS - 1


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [200, 196])  # 196: the parts of a GRU's gradients do not begin with 16 units
def test_parity(hidden: int, cell: str) -> None:
    check(Case(cell, 2, 3, 33, 200, hidden, ragged=True), torch.float32)
    if cell == "lstm":
        check(Case(cell, 1, 3, 33, 5, hidden, 99), torch.float32)


@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("hidden", [200, 196])
def test_thread_counts_agree_bitwise(hidden: int, cell: str) -> None:
    """Numbers of all sizes in gates that other threads than before compute."""
    torch.manual_seed(hidden)
    arguments = build(Case(cell, 2, 3, 70, 200, hidden, ragged=True), torch.float32)
    d_outputs = gradients_like(arguments, torch.float32)
    d_outputs[0] *= (
        2.0 ** torch.randint(-120, 60, (d_outputs[0].shape[1] // 8 + 1,)).repeat_interleave(8)[: d_outputs[0].shape[1]]
    )
    d_outputs[1] *= 0
    _, expected = with_threads(1, arguments, d_outputs)
    for threads in (2, 3, 5, 7):
        assert_same(with_threads(threads, arguments, d_outputs)[1], expected)
