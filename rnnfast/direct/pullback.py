"""A layer's gradients without autograd: for a training step that knows what stands before and behind the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from rnnfast.direct import training
from rnnfast.direct.plans import Layer, Plan, contiguous, is_plain, plan_of, requires_grad_of

Pullback = Callable[[Tensor], list[tuple[Tensor, Tensor]] | None]


def vjp(module: Any, input: Tensor, hx: Any) -> tuple[Tensor, Any, Pullback] | None:
    """As `torch.func.vjp`: results, and a function from the output's gradient to weights and their gradients.

    Output and final state of an RNN, LSTM or GRU have no graph. The gradients have the bits of autograd's; there are
    none of the input and the state.

    Args:
        module: time comes first in its input.
        input: (T, B, I), or token ids (T, B), of which no gradient is wanted.
        hx: the initial state, likewise; None for zeros.

    Returns:
        None if the call must go another way, as the function does if its kernel fails.
    """
    plan = plan_of(module)
    if plan is None or plan.directions == 2 or not is_grad_enabled() or torch.is_anomaly_enabled():
        return None
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return None
    if (module.training and module.dropout > 0) or not all(map(is_plain_leaf, plan.weights)):
        return None
    ids = input.dtype is torch.int64
    if input.dim() + ids != 3 or input.requires_grad:
        return None
    batch = (input.shape[1],)
    given = contiguous(plan, ids, input, input.shape, hx, batch)
    layers = training._layers(plan, ids)
    if given is None or layers is None or any(t is not None and t.requires_grad for t in given):
        return None
    rows, h_0, c_0 = given
    steps, passes, finals = len(input), [], []
    for index, layer in enumerate(layers):
        h, c = (None if state is None else state[index : index + 1] for state in (h_0, c_0))
        made = training.forward(layer, None, steps, batch, rows, h, c)
        if made is None:
            return None
        output, tape, *final = made
        passes.append((layer, (rows, h, c, *layer.memory, output, tape)))
        finals.append([state for state in final if state is not None])
        rows = output
    states = [torch.cat(layer_states) for layer_states in zip(*finals, strict=True)] if len(layers) > 1 else finals[0]
    return rows, tuple(states) if plan.has_cell_state else states[0], _pullback(passes, (steps, *batch), plan)


def is_plain_leaf(weight: Tensor) -> bool:
    """Whether nobody would notice that autograd has not made the gradient of this parameter."""
    return (
        requires_grad_of(weight)
        and weight.is_leaf
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )


def _pullback(passes: Sequence[tuple[Layer, tuple[Any, ...]]], sizes: tuple[int, int], plan: Plan) -> Pullback:
    def pull(d_output: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        if not is_plain(d_output, plan.dtype):
            return None
        d_rows: Tensor | None = d_output.contiguous()
        gradients: list[Tensor] = []
        for layer, memory in reversed(passes):
            wanted = (layer is not passes[0][0], False, False, *layer.has_weight)
            found = training.backward(layer, sizes, (d_rows, None, None), memory, wanted)
            if found is None:
                return None
            d_rows = found[0]
            gradients = [gradient for gradient in found[3:] if gradient is not None] + gradients
        return list(zip(plan.weights, gradients, strict=True))

    return pull
