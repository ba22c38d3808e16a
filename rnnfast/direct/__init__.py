"""Calls of the cpu backend past torch's dispatcher and most Python around it, which take longer than a small scan.

The first call of a layer or a cell goes the general way and leaves a plan: what must not have changed for that call's
checks of the weights to hold. Later calls that ask for nothing special (no compiler, no transform, plain tensors)
follow it. Without gradients they are one call of a C function for all layers, with packed weights; in training each
layer is one autograd function whose forward and backward are a call each. A loop of short calls in training packs its
weights once and makes their gradients at once (`loops`), and a stream keeps its state in places of its own (`streams`).
Other results have the bits of the general way.

Whatever is unusual, mistakes included, is not done here: the functions return None, and the general way does it or says
what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled

from rnnfast.backends import cpu
from rnnfast.backends.cpu import DONE, STALE, packing
from rnnfast.direct import training
from rnnfast.direct.plans import (
    Plan,
    all_plans,
    contiguous,
    plan_of,
    plan_of_step,
    prepare,
    requires_grad_of,
    signature_of,
)
from rnnfast.direct.streams import Steps, steps_after

__all__ = ["Steps", "cell", "forget_packed_weights", "prepare", "run", "step", "steps_after"]


def run(layer: Any, input: Any, hx: Any, batch_first: bool) -> tuple[Tensor, Any] | None:
    """Returns what `layer(input, hx)` does, or None where the general way must be taken.

    Args:
        layer: an RNN, LSTM or GRU.
        input, hx: whatever `layer.forward` was given.
        batch_first: how the input is laid out, if it is batched.
    """
    plan = plan_of(layer)
    if plan is None or type(input) is not Tensor or input.is_nested:
        return None
    ids = input.dtype is torch.int64
    dims = input.dim() + ids
    transposed = dims == 3 and batch_first
    if transposed:
        input = input.transpose(0, 1)
    if dims not in (2, 3):
        return None
    shape = input.shape
    steps, batch = shape[0], shape[1 : dims - 1]  # batch: (B,), or () if unbatched
    tensors = contiguous(plan, ids, input, shape, hx, batch)
    if tensors is None:
        return None
    dropout = layer.dropout if layer.training and len(plan.lanes) > plan.directions else 0.0
    if _needs_gradients(plan, tensors):
        result = training.run(plan, ids, *tensors, steps, batch, dropout)
    elif dropout > 0 or not plan.has_shapes():
        return None
    else:
        output = cpu.empty(plan.weights[0], steps, *batch, plan.state_size * plan.directions)
        result = _infer(plan, ids, *tensors, steps, batch, output)
    return result if result is None or not transposed else (result[0].transpose(0, 1), result[1])


def step(layer: Any, input: Any, hx: Any) -> tuple[Tensor, Any] | None:
    """Returns what `layer.step(input, hx)` does, or None where the general way must be taken: always with gradients."""
    plan = plan_of_step(layer)
    if plan is None or type(input) is not Tensor or input.is_nested:
        return None
    ids = input.dtype is torch.int64
    shape = input.shape
    if len(shape) + ids != 2:
        return None
    batch = (shape[0],)
    tensors = contiguous(plan, ids, input, shape, hx, batch)
    if tensors is None:
        return None
    return _infer(plan, ids, *tensors, 1, batch, cpu.empty(plan.weights[0], *batch, plan.state_size))


def cell(module: Any, input: Any, hx: Any) -> Any | None:
    """Returns what `module(input, hx)` does, the next state, or None where the general way must be taken.

    Args:
        module: an RNNCell, LSTMCell or GRUCell.
        input, hx: whatever its `forward` was given.
    """
    plan = plan_of(module)
    if plan is None or type(input) is not Tensor or input.is_nested:
        return None
    ids = input.dtype is torch.int64
    shape = input.shape
    dims = len(shape) + ids
    if dims not in (1, 2):
        return None
    batch = shape[: dims - 1]  # (B,), or () if unbatched
    tensors = contiguous(plan, ids, input, shape, hx, batch)
    if tensors is None:
        return None
    if _needs_gradients(plan, tensors):
        return training.run_cell(plan, ids, *tensors, batch)
    if not plan.has_shapes():
        return None
    result = _infer(plan, ids, *tensors, 1, batch, cpu.empty(plan.weights[0], *batch, plan.state_size))
    return None if result is None else result[1]


def forget_packed_weights() -> None:
    """Makes every layer and cell pack its weights again, at its next call on the cpu backend.

    Packed weights are kept for calls without gradients, and for loops of short calls with gradients.

    Changes to the weights are noticed, with one exception: a write that torch does not count (through `.data`,
    `.numpy()` or a flat vector that the weights are views of) and that changes only a few elements of a matrix. A
    change of a whole column, a whole gate or a unit in all its gates, of any element of a bias or of a matrix of 4 KB
    or less, and of any weights in shared memory is noticed. Call this after such a write, or write under
    `torch.no_grad()` instead.
    """
    packing.forget()
    for plan in all_plans():
        plan.packed.clear()
        plan.last_stamp = b""
        plan.loops.clear()
        plan.layers.clear()


def _needs_gradients(plan: Plan, tensors: Sequence[Tensor | None]) -> bool:
    needed = is_grad_enabled() and (
        True in map(requires_grad_of, plan.weights) or any(t is not None and t.requires_grad for t in tensors)
    )
    return needed and not is_inference_mode_enabled()


def _infer(
    plan: Plan,
    ids: bool,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    steps: int,
    batch: Sequence[int],
    output: Tensor,
) -> tuple[Tensor, Any] | None:
    """All layers, into `output`; returns it and the final state."""
    packed = plan.packed.get(ids)
    if packed is None or plan.stamp() != packed.stamp:
        if plan.signature != signature_of(plan.weights):
            return None
        packed = plan.pack(ids)
    h_n = cpu.empty(output, *plan.lead, *batch, plan.state_size)
    c_n = cpu.empty(output, *plan.lead, *batch, plan.hidden_size) if plan.has_cell_state else None
    sizes = steps, batch[0] if batch else 1
    status = cpu.infer(packed.address, *sizes, input, h_0, c_0, output, h_n, c_n)
    if status == DONE:
        return output, h_n if c_n is None else (h_n, c_n)
    if status == STALE:
        plan.packed.pop(ids, None)  # another thread may have found it as well
    return None
