"""A streaming step on the cpu backend that goes past torch's dispatcher, whose way takes longer than a small step.

The first step of a layer goes the general way and leaves a plan: the packed weights, and what must not have changed for
them to be good. Later steps that ask for nothing special (no gradient, no compiler, plain contiguous tensors) are one
call of a C function.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from rnnfast.backends import native
from rnnfast.cells import CELLS

_version_of = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]


@dataclass(slots=True)
class _Plan:
    address: int  # of `kept`
    asked: str
    names: list[str]  # of all parameters; pruning the last would change nothing but its name
    weights: list[Tensor]
    versions: list[int]
    addresses: list[int]
    width: tuple[int, ...]  # of a row of input: (I,), or () for token ids
    input_dtype: torch.dtype
    dtype: torch.dtype
    layers: int
    state_size: int
    hidden_size: int
    has_cell_state: bool
    outputs: dict[int, Tensor]  # for each batch size one to make others like it, which is quicker than by its sizes
    kept: tuple[Tensor, ...]


_plans: dict[int, _Plan] = {}


def run(layer: Any, input: Tensor, hx: Any, asked: str) -> tuple[Tensor, Any] | None:
    """Returns what `layer.step(input, hx)` does, or None where the general way must be taken.

    Args:
        asked: the backend's name, or "auto"; what it was when `prepare` was called, for then it meant this one.
    """
    plan = _plans.get(id(layer))
    if plan is None or plan.asked != asked:
        return None
    h_0, c_0 = hx if isinstance(hx, tuple) else (hx, None)
    batch, dtype, weights = input.shape[0] if input.dim() else 0, plan.dtype, plan.weights
    if not (
        type(input) is Tensor
        and type(h_0) is Tensor
        and input.dtype is plan.input_dtype
        and h_0.dtype is dtype
        and input.is_cpu
        and h_0.is_cpu
        and input.is_contiguous()
        and h_0.is_contiguous()
        and input.shape == (batch, *plan.width)
        and h_0.shape == (plan.layers, batch, plan.state_size)
        and (_is_plain(c_0, dtype, (plan.layers, batch, plan.hidden_size)) if plan.has_cell_state else c_0 is None)
        and list(layer._parameters) == plan.names
        and all(map(is_, layer._parameters.values(), weights))
        and list(map(_version_of, weights)) == plan.versions
        and list(map(Tensor.data_ptr, weights)) == plan.addresses
        and not _is_observed()
    ):
        return None
    # No mode is on, so this is memory of the CPU, whatever the default device.
    like = plan.outputs.get(batch)
    if like is None:
        like = plan.outputs[batch] = torch.empty((batch, plan.state_size), dtype=dtype)
    output, h_n = torch.empty_like(like), torch.empty_like(h_0)
    args: tuple[int | None, ...]
    if c_0 is None:
        args = (plan.address, input.data_ptr(), h_0.data_ptr(), None, output.data_ptr(), h_n.data_ptr(), None, batch)
        result: Any = h_n
    else:
        c_n = torch.empty_like(c_0)
        pointers = h_0.data_ptr(), c_0.data_ptr(), output.data_ptr(), h_n.data_ptr(), c_n.data_ptr()
        args = (plan.address, input.data_ptr(), *pointers, batch)
        result = h_n, c_n
    if native.step_function(*args):
        del _plans[id(layer)]
        return None
    return output, result


def prepare(layer: Any, lanes: list[Any], cell: str, ids: bool, asked: str) -> None:
    """Leaves a plan for the steps to come, if the layer is one that `run` can do; it has just done a general one.

    Args:
        layer: a one-directional RNN, LSTM or GRU that the cpu backend runs.
        lanes: for each of its layers the parameters, as `native.packed_weights` takes them.
    """
    weights = [weight for lane in lanes for weight in lane if weight is not None]
    plain = all(type(w) in (Tensor, torch.nn.Parameter) and w.is_contiguous() and not w.is_inference() for w in weights)
    if not plain or _is_observed() or list(map(id, weights)) != list(map(id, layer._parameters.values())):
        return
    w_ih, w_hh, *_ = lanes[0]
    if id(layer) not in _plans:
        weakref.finalize(layer, _plans.pop, id(layer), None)
    packed = [native.packed_weights([lane], cell, ids and index == 0) for index, lane in enumerate(lanes)]
    kept = torch.ops.rnnfast.step_plan_cpu(packed, [weight.detach() for weight in weights])
    _plans[id(layer)] = _Plan(
        kept.data_ptr(),
        asked,
        list(layer._parameters),
        weights,
        [weight._version for weight in weights],
        [weight.data_ptr() for weight in weights],
        () if ids else (w_ih.shape[1],),
        torch.int64 if ids else w_ih.dtype,
        w_ih.dtype,
        len(lanes),
        w_hh.shape[1],
        layer.hidden_size,
        CELLS[cell].has_cell_state,
        {},
        (kept, *packed),
    )


def _is_plain(tensor: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return bool(
        type(tensor) is Tensor
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.shape == shape
    )


def _is_observed() -> bool:
    """Whether a gradient is wanted, or something (autocast, a mode, a transform) must see the operations themselves."""
    return (
        is_grad_enabled()
        or is_autocast_enabled("cpu")
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )
