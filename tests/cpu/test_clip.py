"""Clipping of gradients as one operator: against torch in float64, and when it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rnnfast.backends import cpu
from rnnfast.lm.trainer import clip_gradients

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

# One element, edges of vectors and blocks, none at all, more than one thread's worth.
SHAPES = [[(1,)], [(5, 3), (33,), (0, 4)], [(4096,), (4097,), (31,)], [(300, 300), (300,), (28, 300)]]


def build(shapes: list[tuple[int, ...]], scale: float) -> list[Tensor]:
    return [torch.randn(shape) * scale for shape in shapes]


def clipped_by_torch(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """In float64."""
    wide = [gradient.double() for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in wide]))
    return [gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0) for gradient in wide]


class Operators(TorchDispatchMode):
    """The names of those that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def is_native(gradients: list[Tensor], max_norm: float, backend: str = "auto") -> bool:
    with Operators() as operators:
        clip_gradients(gradients, max_norm, backend)
    return "rnnfast::clip_gradients_cpu" in operators.names


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_against_float64(shapes: list[tuple[int, ...]], scale: float) -> None:
    gradients = build(shapes, scale)
    truth = clipped_by_torch(gradients, 0.5)
    clip_gradients(gradients, 0.5)
    for gradient, right in zip(gradients, truth, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=3e-7, atol=0)


def test_a_gradient_below_the_norm_keeps_its_bits() -> None:
    gradients = build([(100, 70)], 1.0)
    before = gradients[0].clone()
    clip_gradients(gradients, 1e4)
    assert torch.equal(gradients[0], before)


def test_a_largest_norm_of_zero_leaves_nothing_and_an_infinite_one_everything() -> None:
    gradients = build([(100, 70), (3,)], 1.0)
    before = [gradient.clone() for gradient in gradients]
    clip_gradients(gradients, float("inf"))
    assert all(map(torch.equal, gradients, before))
    clip_gradients(gradients, 0.0)
    clip_gradients(before, 0.0, "reference")
    assert all(map(torch.equal, gradients, before))
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_infinite_largest_norm_looks_at_no_number(value: float) -> None:
    """Of no clipping: a number that is not finite stays alone, as without it."""
    gradients = build([(5000,), (3,)], 1.0)
    gradients[1][1] = value
    before = [gradient.clone() for gradient in gradients]
    clip_gradients(gradients, float("inf"))
    torch.testing.assert_close(gradients, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_norm_that_is_no_finite_number(value: float) -> None:
    gradients = build([(5000,), (3,)], 1.0)
    gradients[1][1] = value
    truth = clipped_by_torch(gradients, 1.0)
    clip_gradients(gradients, 1.0)
    torch.testing.assert_close([g.double() for g in gradients], truth, equal_nan=True)


def test_bits_do_not_depend_on_threads() -> None:
    gradients, threads = build(SHAPES[-1], 1.0), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([gradient.clone() for gradient in gradients])
            clip_gradients(results[-1], 0.1)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_what_is_left_to_torch() -> None:
    assert is_native(build([(8, 3)], 1.0), 1.0)
    for gradients, backend in (
        (build([(8, 3)], 1.0), "reference"),
        ([torch.randn(8, 3).double()], "auto"),
        ([torch.randn(8, 3).t()], "auto"),  # not contiguous
    ):
        truth = clipped_by_torch(gradients, 0.5)
        assert not is_native(gradients, 0.5, backend)
        torch.testing.assert_close([g.double() for g in gradients], truth)


def test_mistakes_of_the_operator() -> None:
    cpu.load()
    for gradient in (torch.randn(3).double(), torch.randn(4, 4).t()):
        with pytest.raises(RuntimeError, match="float32, contiguous"):
            torch.ops.rnnfast.clip_gradients_cpu([gradient], 1.0)
