"""The loss of a language model as one operator: against torch in float64, and when it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rnnfast
from rnnfast.backends import cpu
from rnnfast.lm.loss import cross_entropy
from tests.cpu.harness import rms

# Tokens, hidden units, vocabulary: one of each, edges of vectors and tiles, more than one block of rows or of classes.
SHAPES = [(1, 1, 1), (3, 5, 2), (49, 33, 16), (130, 64, 28), (129, 100, 300), (257, 1, 17), (48, 300, 520)]
pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

FLOOR = 1e-6  # a few roundings, granted on top of twice torch's own error


def build(rows: int, hidden: int, classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states, weight, bias and targets."""
    tensors = [torch.randn(rows, hidden), torch.randn(classes, hidden), torch.randn(classes)]
    return [*(t.to(dtype).requires_grad_() for t in tensors), torch.randint(classes, (rows,))]


def by_torch(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), targets)


def results(function: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss, and the gradients of 1.7 times the loss."""
    loss = function(hidden, weight, bias, targets)
    return [loss.detach(), *torch.autograd.grad(1.7 * loss, [hidden, weight, bias])]


def widen(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]


def is_native(loss: Tensor) -> bool:
    return "LinearCrossEntropy" in type(loss.grad_fn).__name__


def check(shape: tuple[int, int, int]) -> None:
    tensors = build(*shape)
    assert is_native(cross_entropy(*tensors))
    truth = results(by_torch, *widen(tensors))
    eager = results(by_torch, *tensors)
    for found, theirs, true in zip(results(cross_entropy, *tensors), eager, truth, strict=True):
        assert found.shape == true.shape
        assert rms(found - true) <= FLOOR * max(rms(true), 0.25) + 2 * rms(theirs - true)


def check_an_instruction_set() -> None:
    """For tests/cpu/test_parity.py, in a process of its own."""
    for shape in SHAPES:
        check(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(shape: tuple[int, int, int]) -> None:
    check(shape)


def test_error_of_the_biass_gradient_over_many_rows_is_at_most_twice_that_of_torch() -> None:
    torch.manual_seed(0)
    tensors = build(50_000, 4, 28)
    tensors[3] %= 14  # half of the classes never occur: sums of one sign, which grow with every row
    mine, theirs, true = (
        results(function, *given)[3]
        for function, given in ((cross_entropy, tensors), (by_torch, tensors), (by_torch, widen(tensors)))
    )
    assert rms(mine - true) <= 2 * rms(theirs - true) + torch.finfo(torch.float32).eps / 4 * rms(true)


def test_large_and_infinite_logits() -> None:
    tensors = build(20, 8, 30)
    with torch.no_grad():
        tensors[2][3], tensors[2][4], tensors[2][5] = 1e4, -1e4, -torch.inf
    tensors[3].clamp_(6)  # a target of no probability costs infinitely much, in torch as well
    torch.testing.assert_close(results(cross_entropy, *tensors), results(by_torch, *tensors))
    tensors[3][0] = 5
    assert cross_entropy(*tensors) == torch.inf
    with torch.no_grad():
        tensors[0][7, 2] = torch.nan
    assert cross_entropy(*tensors).isnan()


@pytest.mark.parametrize("largest", range(0, 40, 13))
def test_the_largest_logit_of_any_class(largest: int) -> None:
    tensors = build(20, 8, 40)
    with torch.no_grad():
        tensors[2][largest] = 1e4
    tensors[3].fill_(largest)
    torch.testing.assert_close(results(cross_entropy, *tensors), results(by_torch, *tensors))


def test_a_row_that_is_no_number_leaves_the_others_alone() -> None:
    """Rows are taken a vector at a time."""
    tensors = build(21, 8, 30)
    _, before, *_ = results(cross_entropy, *tensors)
    with torch.no_grad():
        tensors[0][7, 2] = torch.nan
    _, after, *_ = results(cross_entropy, *tensors)
    assert after[7].isnan().all()
    others = torch.arange(21) != 7
    assert torch.equal(after[others], before[others])


def test_bits_do_not_depend_on_threads() -> None:
    tensors = build(600, 130, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(cross_entropy, *tensors)
        torch.set_num_threads(2)
        together = results(cross_entropy, *tensors)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_shapes_and_layouts_of_a_model() -> None:
    hidden, weight, bias, targets = build(35 * 4, 12, 28)
    loss = cross_entropy(hidden, weight, bias, targets)
    as_sequences = hidden.view(4, 35, 12).transpose(0, 1)  # not contiguous
    torch.testing.assert_close(cross_entropy(as_sequences, weight, bias, targets.view(4, 35).t()), loss)
    scratch = weight.detach().t().contiguous().t().requires_grad_()
    assert torch.equal(cross_entropy(hidden, scratch, bias, targets), loss)


def test_a_second_backward_has_gradients_of_its_own() -> None:
    *tensors, targets = build(70, 12, 28)
    loss = cross_entropy(*tensors, targets)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(2 * loss, tensors)
    for found, right in zip(second, expected, strict=True):
        assert torch.equal(found, 2 * right)


def test_without_gradients_the_loss_is_the_same() -> None:
    *tensors, targets = build(70, 12, 28)
    loss = cross_entropy(*tensors, targets)
    with torch.no_grad():
        assert torch.equal(cross_entropy(*tensors, targets), loss)
    frozen = cross_entropy(*(t.detach() for t in tensors), targets)
    assert torch.equal(frozen, loss)
    assert not frozen.requires_grad
    head = torch.autograd.grad(cross_entropy(tensors[0].detach(), *tensors[1:], targets), tensors[1:])
    assert torch.equal(head[0], torch.autograd.grad(loss, tensors[1])[0])


def test_what_is_left_to_torch() -> None:
    tensors = build(6, 5, 4)
    assert not is_native(cross_entropy(*tensors, backend="reference"))
    with rnnfast.use_backend("reference"):
        assert not is_native(cross_entropy(*tensors))
    assert not is_native(cross_entropy(*build(6, 5, 4, torch.float64)))
    with torch.autocast("cpu", torch.bfloat16):
        halves = cross_entropy(*tensors)
    assert not is_native(halves)
    assert halves.dtype is torch.float32
    torch.testing.assert_close(halves, cross_entropy(*tensors), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("target", [-1, 4])
def test_a_target_outside_the_vocabulary(target: int) -> None:
    *tensors, targets = build(6, 5, 4)
    targets[3] = target
    with pytest.raises(RuntimeError, match=rf"target {target} in row 3 is outside \[0, 4\)"):
        cross_entropy(*tensors, targets)


def test_mistakes_of_the_operator() -> None:
    cpu.load()
    hidden, weight, bias, targets = (t.detach() for t in build(6, 5, 4))
    operator = torch.ops.rnnfast.linear_cross_entropy_cpu
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        operator(hidden, weight[:, :3].contiguous(), bias, targets, True)
    with pytest.raises(RuntimeError, match="targets must be contiguous"):
        operator(hidden, weight, bias, targets[:5], True)
    with pytest.raises(RuntimeError, match="bias must be contiguous"):
        operator(hidden, weight, bias[:3], targets, True)
    with pytest.raises(RuntimeError, match="targets must be contiguous int64"):
        operator(hidden, weight, bias, targets.int(), True)
    with pytest.raises(RuntimeError, match="float32"):
        operator(hidden.double(), weight, bias, targets, True)
    with pytest.raises(RuntimeError, match=r"hidden must be .* got strided float32"):
        operator(hidden.t().contiguous().t(), weight, bias, targets, True)
    with pytest.raises(RuntimeError, match="bias must be contiguous float32"):
        operator(hidden, weight, bias.double(), targets, True)
    with pytest.raises(RuntimeError, match="2 dimensions, and not be empty"):
        operator(hidden[:0], weight, bias, targets[:0], True)
    without = operator(hidden, weight, None, targets, True)
    for found, expected in zip(without, operator(hidden, weight, torch.zeros(4), targets, True), strict=True):
        assert torch.equal(found, expected)
    assert [t.shape for t in operator(hidden, weight, bias, targets, False)] == [(), (0,), (0,), (0,)]
