"""Calls of the cpu backend past torch's dispatcher and most Python around it, which take longer than a small scan.

A layer's first call goes the general way and leaves a plan: what must not have changed for that call's checks of the
weights to hold. Later calls that ask for nothing special (no compiler, no transform, plain tensors) follow it. Without
gradients they are one call of a C function for all layers, with packed weights; in training each layer is one autograd
function whose forward and backward are a call each. Their results have the bits of the general way.

Whatever is unusual, mistakes included, is not done here: the functions return None, and the general way does it or says
what is wrong.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from operator import is_
from struct import Struct
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled, _top_saved_tensors_default_hooks
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from rnnfast import derivatives, dispatch, functional, scan
from rnnfast.backends import native
from rnnfast.cells import CELLS

# Of csrc/cpu/direct.h: what its functions return, and the structures they take.
_DONE, _STALE = 0, 1
_infer_call, _forward_call, _backward_call = (Struct(f"{fields}q").pack for fields in (9, 15, 24))
_KEPT = 128 << 10  # WORTH_KEEPING of csrc/cpu/memory.h, in bytes

_base: Any = torch._C.TensorBase
_version_of, _shape_of, _dtype_of = _base._version.__get__, _base.shape.__get__, _base.dtype.__get__
_is_on_cpu, _requires_grad, _address_of = _base.is_cpu.__get__, _base.requires_grad.__get__, _base.data_ptr


@dataclass(slots=True)
class _Packed:
    """A stack's weights packed for `native.infer`, good while the stamp, of versions and addresses, is this."""

    stamp: list[int]
    address: int  # of the first of `kept`
    kept: tuple[Tensor, ...]


@dataclass(slots=True)
class _Layer:
    """One layer of one direction, as the autograd function takes it."""

    weights: scan.Weights
    has_weight: tuple[bool, ...]
    cell: str
    dtype: torch.dtype
    ids: bool
    state_size: int
    hidden_size: int
    tape_size: int  # of a row
    has_cell_state: bool
    address: int  # of `kept`
    kept: Tensor
    # The weights' memory as it is now: a parameter itself would follow what is assigned to its `.data` before backward.
    memory: tuple[Any, ...]  # tensors, or None where the layer has none
    memory_addresses: list[int]


@dataclass(slots=True)
class _Plan:
    """What a layer's calls have in common. Dictionaries have an entry for token ids, and one for floating input."""

    asked: str
    names: tuple[str, ...]
    weights: list[Tensor]
    signature: tuple[list[Any], ...]
    lanes: Sequence[scan.Weights]
    cell: str
    dtype: torch.dtype
    input_size: int
    state_size: int
    hidden_size: int
    directions: int
    has_cell_state: bool
    packed: dict[bool, _Packed]
    layers: dict[bool, list[_Layer]]  # good while the weights have the addresses `described`
    described: list[int]
    step_output: Tensor  # of the last step: one to make others like it, quicker than by its sizes

    def has_shapes(self) -> bool:
        """No weight is a view of what it was, as `.data` can make it: the address and the version are the same then.

        A step, which is half as long, does not look so closely.
        """
        return list(map(_shape_of, self.weights)) == self.signature[0] and all(map(Tensor.is_contiguous, self.weights))

    def pack(self, ids: bool) -> _Packed:
        """What calls without gradients need; the versions are read first, so that a write meanwhile is seen later."""
        stamp = [native.fused_steps, *map(_version_of, self.weights), *map(_address_of, self.weights)]
        layers = [self.lanes[first : first + self.directions] for first in range(0, len(self.lanes), self.directions)]
        samples = native.weight_samples(self.weights, self.hidden_size)
        packed = [native.packed_weights(lanes, self.cell, ids and not index) for index, lanes in enumerate(layers)]
        kept = torch.ops.rnnfast.direct_plan_cpu(packed, samples)
        self.packed[ids] = found = _Packed(stamp, kept.data_ptr(), (kept, samples, *packed))
        return found

    def describe(self, ids: bool) -> list[_Layer]:
        """What calls with gradients need."""
        cell, layers = CELLS[self.cell], []
        self.described = [*map(_address_of, self.weights)]
        for index, lane in enumerate(self.lanes):
            memory: tuple[Any, ...] = tuple(w if w is None else w.detach() for w in lane)
            w_ih, w_hh, *_, w_hr = (w if w is None else w.unsqueeze(0) for w in memory)
            first_ids = ids and not index
            kept = torch.ops.rnnfast.direct_layer_cpu(w_ih, w_hh, w_hr, self.cell, first_ids)
            form = lane, tuple(w is not None for w in lane), self.cell, self.dtype, first_ids
            tape_size = cell.tape * self.hidden_size
            sizes = self.state_size, self.hidden_size, tape_size, cell.has_cell_state
            layers.append(_Layer(*form, *sizes, kept.data_ptr(), kept, memory, _addresses(memory)))
        self.layers[ids] = layers
        return layers


_plans: dict[int, _Plan] = {}


def run(layer: Any, input: Any, hx: Any) -> tuple[Tensor, Any] | None:
    """Returns what `layer(input, hx)` does, or None where the general way must be taken.

    Args:
        layer: an RNN, LSTM or GRU.
        input, hx: whatever `layer.forward` was given.
    """
    plan = _plan_of(layer)
    if plan is None or type(input) is not Tensor or input.is_nested:
        return None
    ids = input.dtype is torch.int64
    dims = input.dim() + ids
    transposed = dims == 3 and layer.batch_first
    if transposed:
        input = input.transpose(0, 1)
    if dims not in (2, 3):
        return None
    shape = input.shape
    steps, batch = shape[0], shape[1 : dims - 1]  # batch: (B,), or () if unbatched
    tensors = _contiguous(plan, ids, input, shape, hx, batch)
    if tensors is None:
        return None
    dropout = layer.dropout if layer.training and len(plan.lanes) > plan.directions else 0.0
    if is_grad_enabled() and (
        True in map(_requires_grad, plan.weights) or any(t is not None and t.requires_grad for t in tensors)
    ):
        result = _train(plan, ids, *tensors, steps, batch, dropout)
    elif dropout > 0 or not plan.has_shapes():
        return None
    else:
        output = _empty(plan.weights[0], steps, *batch, plan.state_size * plan.directions)
        result = _infer(plan, ids, *tensors, steps, batch, output)
    return result if result is None or not transposed else (result[0].transpose(0, 1), result[1])


def step(layer: Any, input: Any, hx: Any) -> tuple[Tensor, Any] | None:
    """Returns what `layer.step(input, hx)` does, or None where the general way must be taken: always with gradients."""
    plan = _plan_of(layer)
    if plan is None or plan.directions == 2 or type(input) is not Tensor or input.is_nested or is_grad_enabled():
        return None
    ids = input.dtype is torch.int64
    shape = input.shape
    if len(shape) + ids != 2 or (layer.training and layer.dropout > 0 and len(plan.lanes) > 1):
        return None
    batch = (shape[0],)
    tensors = _contiguous(plan, ids, input, shape, hx, batch)
    if tensors is None:
        return None
    like = plan.step_output
    if len(like) != batch[0]:
        like = plan.step_output = torch.empty(*batch, plan.state_size, dtype=plan.dtype)
    return _infer(plan, ids, *tensors, 1, batch, torch.empty_like(like))


def prepare(layer: Any, input: Tensor) -> None:
    """Leaves a plan for the calls to come, if there is none and the layer can have one.

    It has just done a general call, which has checked its weights.
    """
    asked = dispatch.asked(layer.backend)
    if asked not in (dispatch.AUTO, "cpu") or _is_observed():
        return
    plan = _plans.get(id(layer))
    if plan is not None and plan is _plan_of(layer) and plan.signature == _signature(plan.weights):
        return
    names = tuple(layer._flat_weights_names)
    weights = [layer._parameters.get(name) for name in names]
    if plan is not None and any(w is not None and not w.is_cpu for w in weights):
        del _plans[id(layer)]  # it would hold the memory that they had here
    # torch.func.functional_call puts other tensors there for a while, perhaps with a graph, which must not be kept.
    if not all(type(w) is torch.nn.Parameter and w.is_cpu and w.layout is torch.strided for w in weights):
        return
    if not all(w.is_contiguous() and not w.is_inference() and not w.is_neg() for w in weights):
        return
    lanes = functional.lane_weights(layer)
    if [id(w) for lane in lanes for w in lane if w is not None] != [*map(id, weights)]:
        return
    if dispatch.explain(layer, input).backend != "cpu":
        return
    if id(layer) not in _plans:
        weakref.finalize(layer, _plans.pop, id(layer), None)
    cell, directions = layer.mode.lower(), 2 if layer.bidirectional else 1
    w_ih, w_hh, *_ = lanes[0]
    sizes = w_ih.shape[1], w_hh.shape[1], w_hh.shape[0] // CELLS[cell].gates, directions, CELLS[cell].has_cell_state
    form = asked, names, weights, _signature(weights), lanes, cell, w_hh.dtype, *sizes
    _plans[id(layer)] = _Plan(*form, packed={}, layers={}, described=[], step_output=torch.empty(0))


def forget_packed_weights() -> None:
    """Has every layer and cell pack its weights again, at its next call without gradients on the cpu backend.

    Changed weights are noticed, except for one case: a write that torch does not count, as through `.data`, `.numpy()`
    or a flat vector that the weights are views of, to a few elements of a matrix. (All of a column, of a gate or of a
    unit in all its gates, any element of a bias, and any of a matrix of 4 KB or less is noticed.) Call this after such
    a write, or write under `torch.no_grad()` instead.
    """
    native.forget()
    for plan in list(_plans.values()):
        plan.packed.clear()
        plan.layers.clear()


# ---- may it be done here? ------------------------------------------------------------------------------------------


def _plan_of(layer: Any) -> _Plan | None:
    """The layer's plan, if the call may follow it: the layer has the weights that it had, and nobody looks on."""
    plan = _plans.get(id(layer))
    if (
        plan is None
        or plan.asked != dispatch.asked(layer.backend)
        or not all(map(is_, map(layer._parameters.get, plan.names), plan.weights))
        or _is_observed()
    ):
        return None
    return plan


def _is_observed() -> bool:
    """Whether something (autocast, a mode, a transform, a tracer, a profiler) must see the operations themselves.

    Where nothing does, a new tensor is memory of the CPU, whatever the default device.
    """
    return (
        is_autocast_enabled("cpu")
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def _signature(weights: list[Tensor]) -> tuple[list[Any], ...]:
    """What the general way checks of the weights. Writing to `.data` and torch.utils.swap_tensors change any of it."""
    return (
        list(map(_shape_of, weights)),
        list(map(type, weights)),
        list(map(_dtype_of, weights)),
        list(map(_is_on_cpu, weights)),
        list(map(Tensor.is_contiguous, weights)),
    )


def _is_plain(tensor: Any, dtype: torch.dtype) -> bool:
    """Its elements lie in memory as they are, if perhaps in another order, and there are some."""
    if type(tensor) is not Tensor or tensor.dtype is not dtype or not tensor.is_cpu or tensor.is_neg():
        return False
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        # A sparse tensor has no memory, nor has one of torch's older vmap, which is_grads_batched= uses.
        return False


def _contiguous(
    plan: _Plan, ids: bool, input: Tensor, shape: torch.Size, hx: Any, batch: Sequence[int]
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Input, h_0 and c_0 as the kernels read them, absent states None; or None where one is not as it should be."""
    dtype = plan.dtype
    if not _is_plain(input, torch.int64 if ids else dtype) or not (ids or shape[-1] == plan.input_size):
        return None
    if hx is None:
        return input.contiguous(), None, None
    h_0, c_0 = hx, None
    if plan.has_cell_state:
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            return None
        h_0, c_0 = hx
        if not _is_plain(c_0, dtype) or c_0.shape != (len(plan.lanes), *batch, plan.hidden_size):
            return None
        c_0 = c_0.contiguous()
    if not _is_plain(h_0, dtype) or h_0.shape != (len(plan.lanes), *batch, plan.state_size):
        return None
    return input.contiguous(), h_0.contiguous(), c_0


# ---- without gradients ---------------------------------------------------------------------------------------------


def _infer(
    plan: _Plan,
    ids: bool,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    steps: int,
    batch: Sequence[int],
    output: Tensor,
) -> tuple[Tensor, Any] | None:
    """All layers, into `output`."""
    packed, weights, dtype = plan.packed.get(ids), plan.weights, plan.dtype
    stamp = [native.fused_steps, *map(_version_of, weights), *map(_address_of, weights)]
    if packed is None or stamp != packed.stamp:
        if plan.signature != _signature(weights):
            return None
        packed = plan.pack(ids)
    c_n = None
    if h_0 is None:
        h_n = torch.empty(len(plan.lanes), *batch, plan.state_size, dtype=dtype)
        if plan.has_cell_state:
            c_n = torch.empty(len(plan.lanes), *batch, plan.hidden_size, dtype=dtype)
    else:  # quicker than by their sizes
        h_n, c_n = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    call = _infer_call(
        packed.address,
        steps,
        batch[0] if batch else 1,
        input.data_ptr(),
        0 if h_0 is None else h_0.data_ptr(),
        0 if c_0 is None else c_0.data_ptr(),
        output.data_ptr(),
        h_n.data_ptr(),
        0 if c_n is None else c_n.data_ptr(),
    )
    status = native.infer(call)
    if status == _DONE:
        return output, h_n if c_n is None else (h_n, c_n)
    if status == _STALE:
        plan.packed.pop(ids, None)  # another thread may have found it as well
    return None


# ---- with gradients ------------------------------------------------------------------------------------------------


def _train(
    plan: _Plan,
    ids: bool,
    rows: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    steps: int,
    batch: Sequence[int],
    dropout: float,
) -> tuple[Tensor, Any] | None:
    """Layer after layer, of one direction."""
    # Hooks on saved tensors see which there are: torch's checkpointing runs a call again and compares. The second call
    # would come here where the first has gone the general way.
    if plan.directions == 2 or plan.signature != _signature(plan.weights) or _top_saved_tensors_default_hooks(True):
        return None
    if plan.described != [*map(_address_of, plan.weights)]:
        plan.layers.clear()
    layers = plan.layers.get(ids) or plan.describe(ids)
    finals = []
    for index, layer in enumerate(layers):
        # One layer's state is not sliced: that is an operation to be differentiated.
        h, c = (h_0, c_0) if len(layers) == 1 else (t if t is None else t[index : index + 1] for t in (h_0, c_0))
        rows, *states = _Scan.apply(layer, steps, batch, rows, h, c, *layer.weights)
        if rows is None:
            return None
        finals.append(states)
        if dropout > 0 and index + 1 < len(layers):
            rows = F.dropout(rows, dropout)
    h_n, *c_n = finals[0] if len(layers) == 1 else map(torch.cat, zip(*finals, strict=True))
    return rows, (h_n, *c_n) if c_n else h_n


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _empty(like: Tensor, *sizes: int) -> Tensor:
    """The library keeps the memory of a large one from call to call; a small one is not worth the operator."""
    if prod(sizes) * like.itemsize < _KEPT:
        return torch.empty(sizes, dtype=like.dtype)
    return cast("Tensor", torch.ops.rnnfast.direct_empty_cpu.default(like, sizes))


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor) if tensor.numel() * tensor.itemsize < _KEPT else _empty(tensor, *tensor.shape)


_NO_WEIGHT = (False,) * 5


class _Scan(derivatives.Function):
    """One layer of one direction: `derivatives.Scan` of the cpu backend, but a call each forward and backward.

    apply(layer, T, [B] or [] if unbatched, input (T, B, I) or ids (T, B), h_0 and c_0 (1, B, P) or None for zeros, the
    five of `scan.Weights`) returns output (T, B, P), h_n and, of an LSTM, c_n; or None, None where the kernel fails.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: _Layer,
        steps: int,
        batch: Sequence[int],
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor | None,
    ) -> Any:
        rows, dtype, like = batch[0] if batch else 1, layer.dtype, layer.memory[1]
        output = _empty(like, steps, *batch, layer.state_size)
        tape = _empty(like, 1, steps * rows, layer.tape_size) if layer.tape_size else None
        h_n = torch.empty(1, *batch, layer.state_size, dtype=dtype)
        c_n = torch.empty(1, *batch, layer.hidden_size, dtype=dtype) if layer.has_cell_state else None
        given = (input, h_0, c_0)
        addresses = *_addresses(given), *layer.memory_addresses, *_addresses((output, tape, h_n, c_n))
        if native.forward(_forward_call(layer.address, steps, rows, *addresses)) != _DONE:
            return None, None
        ctx.layer, ctx.sizes = layer, (steps, rows)
        # The tensors themselves for derivatives of the gradients, and what they hold now for the gradients.
        memory = [None if tensor is None else tensor.detach() for tensor in given]
        ctx.save_for_backward(*given, *weights, output, tape, *memory)
        ctx.set_materialize_grads(False)
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None = None) -> Any:
        if d_output is None and d_h_n is None and d_c_n is None:
            return (None,) * 11
        layer, saved, needs, given = ctx.layer, ctx.saved_tensors, ctx.needs_input_grad[3:], (d_output, d_h_n, d_c_n)
        need_weights = True in needs[3:]
        memory = (*saved[10:], *layer.memory, *saved[8:10])
        # Not where it is itself to be differentiated, or somebody looks on.
        if not is_grad_enabled() and not _is_observed() and all(d is None or _is_plain(d, layer.dtype) for d in given):
            d_results = [d if d is None else d.contiguous() for d in given]
            wanted = needs[:3] + (layer.has_weight if need_weights else _NO_WEIGHT)
            found = [_empty_like(tensor) if want else None for tensor, want in zip(memory, wanted, strict=False)]
            addresses = _addresses((*d_results, *memory, *found))
            if native.backward(_backward_call(layer.address, *ctx.sizes, *addresses)) == _DONE:
                return (None, None, None, *found)
        kept = saved[:10] if is_grad_enabled() else memory
        return (None, None, None, *_through_the_operator(ctx, given, kept, needs, need_weights))


def _through_the_operator(
    ctx: Any,
    d_results: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    needs: Sequence[bool],
    need_weights: bool,
) -> list[Tensor | None]:
    """What `_Scan.backward` returns, from the operator, which has derivatives and a rule for vmap."""
    input, h_0, c_0, *weights, output, tape = kept
    assert input is not None
    assert output is not None
    layer, (steps, batch) = ctx.layer, ctx.sizes

    def rows(tensor: Tensor | None, *size: int) -> Any:
        return None if tensor is None else tensor.reshape(steps * batch, *size).contiguous()

    def state(tensor: Tensor | None, size: int) -> Any:
        return None if tensor is None else tensor.reshape(1, batch, size).contiguous()

    zeros = [output.new_zeros(1, batch, size) for size in (layer.state_size, layer.hidden_size)]
    d_input, *d_weights, d_h_0, d_c_0 = scan.FORMULAS["cpu"].backward_op(
        rows(d_results[0], layer.state_size),
        state(d_results[1], layer.state_size),
        state(d_results[2], layer.hidden_size),
        rows(input, *(() if layer.ids else input.shape[-1:])),
        *(None if weight is None else weight.unsqueeze(0) for weight in weights),
        zeros[0] if h_0 is None else state(h_0, layer.state_size),
        None if not layer.has_cell_state else zeros[1] if c_0 is None else state(c_0, layer.hidden_size),
        None,
        layer.cell,
        False,
        rows(output, layer.state_size),
        output.new_empty(1, steps * batch, 0) if tape is None else tape,
        needs[0],
        need_weights,
    )
    gradients = zip((d_input, d_h_0, d_c_0, *d_weights), kept, needs, strict=False)
    return [d.reshape(tensor.shape) if need and tensor is not None else None for d, tensor, need in gradients]
