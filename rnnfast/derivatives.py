"""How the scan is differentiated: the forward scan by the backward one, and that by the reference.

The functions here run at the operator's Autograd key, so torch's autograd, torch.func's transforms and AOTAutograd all
come by them, each at its own level. That is what `_SingleLevelFunction` is: torch's autograd.Function itself sits above
the dispatcher and hands transforms on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from rnnfast.backends import reference
from rnnfast.cells import CELLS


def needs_gradient(tensors: Sequence[Any]) -> bool:
    """What is computed from these tensors, and from what else is among them, may be differentiated."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


class _Function(_SingleLevelFunction):
    apply: Any


class Scan(_Function):
    """A forward scan: apply(operator, its backward operator, the operator's arguments...)."""

    @staticmethod
    def forward(op: Any, backward_op: Any, *arguments: Any) -> Any:
        return _below_autograd(op, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.op, *tensors, cell, bidirectional, save_tape = inputs
        out, _, c_n, tape = output
        ctx.save_for_backward(*tensors, out, tape)
        ctx.cell, ctx.bidirectional, ctx.save_tape = cell, bidirectional, save_tape
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([tape] if CELLS[cell].has_cell_state else [tape, c_n]))

    @staticmethod
    def backward(ctx: Any, d_output: Any, d_h_n: Any, d_c_n: Any, _: None) -> tuple[Any, ...]:
        *layer, output, tape = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:10]
        d_outputs = (d_output, d_h_n, d_c_n)
        if all(d is None for d in d_outputs):
            return (None,) * 14
        if not ctx.save_tape:
            raise RuntimeError("the scan was run with save_tape=False, so it has no backward; pass save_tape=True")
        gradients = ctx.op(
            *(None if d is None else d.contiguous() for d in d_outputs),
            *layer,
            ctx.cell,
            ctx.bidirectional,
            output,
            tape,
            needs[0],
            any(needs[1:6]),
        )
        return (None, None, *(d if need else None for d, need in zip(gradients, needs, strict=True)), *[None] * 4)


class ScanBackward(_Function):
    """A backward scan: apply(operator, the operator's arguments...).

    Its derivative is the reference's forward scan, differentiated twice by torch. That is made of differentiable
    operations, so there are derivatives of any order from any backend, at the reference's speed. The arguments output
    and tape get no gradient: they are functions of the others, and the reference computes them again.
    """

    @staticmethod
    def forward(op: Any, *arguments: Any) -> Any:
        return _below_autograd(op, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *tensors, ctx.cell, ctx.bidirectional, _output, _tape, _need_input, _need_weights = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *d_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, batch_sizes = ctx.saved_tensors
        wanted = [i for i, d in enumerate(d_gradients) if d is not None]
        if not wanted:
            return (None,) * 19
        places = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]
        d_places, layer_places = [i for i in places if i < 3], [i for i in places if i >= 3]

        def outputs(*layer: Tensor) -> tuple[Tensor, ...]:
            arguments: list[Any] = [*tensors[3:], batch_sizes, ctx.cell, ctx.bidirectional, False]
            for place, tensor in zip(layer_places, layer, strict=True):
                arguments[place - 3] = tensor
            results = reference.forward(*arguments)
            return tuple(results[i] for i in d_places)

        def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
            d_outputs, layer = primals[: len(d_places)], primals[len(d_places) :]
            found = dict(zip(layer_places, torch.func.vjp(outputs, *layer)[1](d_outputs), strict=True))
            return tuple(found[3 + i] for i in wanted)

        pull_back = torch.func.vjp(gradients, *(tensors[i] for i in places))[1]
        found = dict(zip(places, pull_back(tuple(d_gradients[i] for i in wanted)), strict=True))
        needs = ctx.needs_input_grad[1:]
        return (None, *(found.get(i) if needs[i] else None for i in range(len(tensors))), *[None] * 7)


def _below_autograd(op: Any, arguments: Sequence[Any]) -> Any:
    with _C._AutoDispatchBelowAutograd():
        if _C._functorch.maybe_current_level() is None:
            return op(*arguments)
        # torch turns gradients off around a function's forward; the transforms further out must see them on.
        with torch.enable_grad():
            return op(*arguments)


def kernel(function: Any, *ops: Any) -> Callable[..., Any]:
    """The implementation at the Autograd key of the first of `ops`."""

    def apply(*arguments: Any) -> Any:
        if needs_gradient(arguments):
            with enable_single_level_autograd_function():
                return function.apply(*ops, *arguments)
        with _C._AutoDispatchBelowAutograd():
            return ops[0](*arguments)

    return apply
