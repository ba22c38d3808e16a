"""How the scan is differentiated: the forward scan by the backward one, and that by the reference.

The functions here run at the operator's Autograd key, so torch's autograd, torch.func's transforms and AOTAutograd all
come by them, each at its own level. That is what `_SingleLevelFunction` is: torch's autograd.Function itself sits above
the dispatcher and hands transforms on.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from rnnfast.cells import CELLS


def needs_gradient(tensors: Iterable[Any]) -> bool:
    """Whether autograd records what is computed from these; what is not a tensor is ignored.

    Inference mode records no graph, even if gradients are enabled in it. (A compiler cannot ask, and need not.)
    """
    needed = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
    return needed and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())


class Function(_SingleLevelFunction):
    """torch's autograd.Function, but for the level it runs at."""

    apply: Any

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[int]:
        return (ctx._autograd_function_id,)


class _Hooks(OrderedDict[int, Callable[[Tensor], Any]]):
    """A tensor's hooks, which are not called where there is no gradient.

    But for those of `register_multi_grad_hook`, which count the calls that autograd makes, with None as with gradients.
    """

    def __setitem__(self, key: int, hook: Callable[[Tensor], Any]) -> None:
        @functools.wraps(hook)
        def called(gradient: Tensor | None) -> Any:
            return None if gradient is None else hook(gradient)

        counts = getattr(hook, "__module__", None) == torch.autograd.graph.__name__
        super().__setitem__(key, hook if counts else called)


def hooks_skip_unused_results(function: type[Function]) -> type[Function]:
    """A decorator: hooks on a result, where only others are used, are not called, rather than with None.

    `Tensor.register_hook` asks the result's node to take the dict that its hooks are in.
    """
    node: Any = function._backward_cls
    take = node._register_hook_dict

    def register(self: Any, result: Tensor) -> None:
        result._backward_hooks = _Hooks(result._backward_hooks or {})
        take(self, result)

    node._register_hook_dict = register
    return function


@dataclass(frozen=True, eq=False)
class Formula:
    """How a scan is differentiated.

    op(*tensors, *options, save_tape) returns three results and the tape; the options end with cell and bidirectional.
    backward_op(*gradients of the results, *tensors, *options, first result, tape, need_input, need_weights) returns the
    gradients of the first `leaves` of all `tensors`; `weights` are those of them that need_weights is about.
    definition(*tensors, *options) returns the three results by operations that are differentiable.
    """

    op: Any
    backward_op: Any
    definition: Callable[..., tuple[Tensor, ...]]
    tensors: int
    leaves: int
    weights: tuple[int, ...]


@hooks_skip_unused_results
class Scan(Function):
    """A forward scan: apply(formula, the operator's arguments...)."""

    @staticmethod
    def forward(formula: Formula, *arguments: Any) -> Any:
        return _below_autograd(formula.op, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.formula, *arguments, ctx.save_tape = inputs
        out, _, c_n, tape = output
        ctx.options = arguments[ctx.formula.tensors :]
        ctx.save_for_backward(*arguments[: ctx.formula.tensors], out, tape)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([tape] if CELLS[ctx.options[-2]].has_cell_state else [tape, c_n]))

    @staticmethod
    def backward(ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
        *layer, output, tape = ctx.saved_tensors
        formula, options = ctx.formula, ctx.options
        needs = ctx.needs_input_grad[1 : 1 + formula.leaves]
        rest = [None] * (formula.tensors - formula.leaves + len(options) + 1)
        d_outputs = d_outputs[:3]
        if all(d is None for d in d_outputs):
            return (None, *[None] * formula.leaves, *rest)
        if not ctx.save_tape:
            raise RuntimeError(
                "this scan was run or exported without gradients (save_tape=False), so it has no backward: run or "
                "export it with gradients enabled"
            )
        gradients = formula.backward_op(
            *(None if d is None else d.contiguous() for d in d_outputs),
            *layer,
            *options,
            output,
            tape,
            needs[0],
            any(needs[i] for i in formula.weights),
        )
        return (None, *(d if need else None for d, need in zip(gradients, needs, strict=True)), *rest)


@hooks_skip_unused_results
class ScanBackward(Function):
    """A backward scan: apply(formula, the operator's arguments...).

    Its derivative is the definition's forward scan, differentiated twice by torch. That is made of differentiable
    operations, so there are derivatives of any order from any backend, at the reference's speed. The arguments output
    and tape get no gradient: they are functions of the others, and the reference computes them again.
    """

    @staticmethod
    def forward(formula: Formula, *arguments: Any) -> Any:
        return _below_autograd(formula.backward_op, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.formula, *arguments = inputs
        end = 3 + ctx.formula.tensors
        *ctx.options, _output, _tape, _need_input, _need_weights = arguments[end:]
        ctx.save_for_backward(*arguments[:end])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *d_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, leaves = ctx.saved_tensors, 3 + ctx.formula.leaves
        rest = [None] * (len(tensors) - leaves + len(ctx.options) + 4)

        def definition(*layer: Tensor) -> tuple[Tensor, ...]:
            results: tuple[Tensor, ...] = ctx.formula.definition(*layer, *tensors[leaves:], *ctx.options)
            return results

        found = _differentiate_twice(definition, tensors[:3], tensors[3:leaves], d_gradients)
        needs = ctx.needs_input_grad[1 : 1 + leaves]
        return (None, *(d if need else None for d, need in zip(found, needs, strict=True)), *rest)


def gradients_below_autograd(
    definition: Callable[..., tuple[Tensor, ...]],
    d_outputs: Sequence[Tensor | None],
    layer: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the tensors of `layer` that are needed, by the definition run once more.

    For an operator's implementation, which runs below autograd, out of its sight.
    """
    excluded = _C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(_C.DispatchKey, key))
    with _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        wants = [need and t is not None and t.is_floating_point() for t, need in zip(layer, needed, strict=True)]
        leaves = [
            t.detach().requires_grad_() if t is not None and want else t for t, want in zip(layer, wants, strict=True)
        ]
        given = [(r, d) for r, d in zip(definition(*leaves), d_outputs, strict=True) if d is not None]
        given = [(r, d) for r, d in given if r.requires_grad]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in given],
                [t for t, want in zip(leaves, wants, strict=True) if t is not None and want],
                [d for _, d in given],
                materialize_grads=True,
            )
        )
    # Results of an operator share no memory, with one another or with what it is given.
    return [next(found).clone() if want else None for want in wants]


def _pull_back(
    definition: Callable[..., tuple[Tensor, ...]], d_outputs: Sequence[Tensor | None], layer: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of what floats in `layer`, from those of the definition's results, None where there is none."""
    kept = [i for i, d in enumerate(d_outputs) if d is not None]
    places = [i for i, t in enumerate(layer) if t is not None and t.is_floating_point()]

    def outputs(*floating: Tensor) -> tuple[Tensor, ...]:
        arguments = list(layer)
        for place, tensor in zip(places, floating, strict=True):
            arguments[place] = tensor
        results = definition(*arguments)
        return tuple(results[i] for i in kept)

    gradients: list[Tensor | None] = [None] * len(layer)
    found = torch.func.vjp(outputs, *(layer[i] for i in places))[1](tuple(d_outputs[i] for i in kept))
    for place, gradient in zip(places, found, strict=True):
        gradients[place] = gradient
    return gradients


def _differentiate_twice(
    definition: Callable[..., tuple[Tensor, ...]],
    d_outputs: Sequence[Tensor | None],
    layer: Sequence[Tensor | None],
    d_gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of d_outputs and layer, from those of what `_pull_back` makes of them."""
    if all(d is None for d in d_gradients):
        return [None] * (len(d_outputs) + len(layer))

    def gradients(*tensors: Tensor | None) -> tuple[Any, ...]:
        return tuple(_pull_back(definition, tensors[: len(d_outputs)], tensors[len(d_outputs) :]))

    return _pull_back(gradients, d_gradients, [*d_outputs, *layer])


def _below_autograd(op: Any, arguments: Sequence[Any]) -> Any:
    with _C._AutoDispatchBelowAutograd():
        if _C._functorch.maybe_current_level() is None:
            return op(*arguments)
        # torch turns gradients off around a function's forward; the transforms further out must see them on.
        with torch.enable_grad():
            return op(*arguments)


def kernel(function: Any, formula: Formula, op: Any) -> Callable[..., Any]:
    """The implementation at the Autograd key of `op`, which is the formula's operator or its backward one."""

    def apply(*arguments: Any) -> Any:
        if needs_gradient(arguments):
            with enable_single_level_autograd_function():
                return function.apply(formula, *arguments)
        with _C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return apply
