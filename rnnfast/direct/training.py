"""Calls with gradients: an autograd function for each layer, whose forward and backward are one call of C++ each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch._C._autograd import _top_saved_tensors_default_hooks

from rnnfast import derivatives, scan
from rnnfast.backends import cpu
from rnnfast.backends.cpu import DONE
from rnnfast.direct.loops import Loop, SharedWeights, loop_of
from rnnfast.direct.plans import Layer, Packed, Plan, address_of, is_observed, signature_of

_NO_TENSORS = (None,) * 6  # the arguments of `_Scan` before the input
_NO_WEIGHT, _NOTHING_SHARED = (False,) * 5, (0,) * 5
_SHORT = 128  # rows of a call in which packing the weights takes a good part of the time


def run(
    plan: Plan,
    ids: bool,
    rows: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    steps: int,
    batch: Sequence[int],
    dropout: float,
) -> tuple[Tensor, Any] | None:
    """Layer after layer, of one direction: output and final state, or None where the general way must be taken."""
    layers = None if plan.directions == 2 else _layers(plan, ids)
    if layers is None:
        return None
    of_loop = _of_loop(plan, ids, steps, batch, layers)
    finals = []
    for index, layer in enumerate(layers):
        # One layer's state is not sliced: that is an operation to be differentiated.
        h, c = (h_0, c_0) if len(layers) == 1 else (t if t is None else t[index : index + 1] for t in (h_0, c_0))
        rows, *states = _scan(layer, of_loop, steps, batch, rows, h, c)
        if rows is None:
            plan.packed.pop(ids, None)  # it may be stale
            return None
        finals.append(states)
        if dropout > 0 and index + 1 < len(layers):
            rows = F.dropout(rows, dropout)
    h_n, *c_n = finals[0] if len(layers) == 1 else map(torch.cat, zip(*finals, strict=True))
    return rows, (h_n, *c_n) if c_n else h_n


def run_cell(
    plan: Plan, ids: bool, input: Tensor, h: Tensor | None, c: Tensor | None, batch: Sequence[int]
) -> Any | None:
    """The next state, in a cell's form, or None."""
    layers = _layers(plan, ids)
    if layers is None:
        return None
    next_h, _, *next_c = _scan(layers[0], _of_loop(plan, ids, 1, batch, layers), None, batch, input, h, c)
    if next_h is None:
        plan.packed.pop(ids, None)
    return (next_h, *next_c) if next_c and next_h is not None else next_h


def _layers(plan: Plan, ids: bool) -> list[Layer] | None:
    # Hooks on saved tensors see which there are: torch's checkpointing runs a call again and compares. The second call
    # would come here where the first has gone the general way.
    if plan.signature != signature_of(plan.weights) or _top_saved_tensors_default_hooks(True):
        return None
    now = [*map(address_of, plan.weights)]
    if plan.described != now:
        plan.layers.clear()
    if 0 in now:  # a weight's storage has been freed, which the general way says
        return None
    return plan.layers.get(ids) or plan.describe(ids)


_OfLoop = tuple[Packed | None, Loop | None, list[SharedWeights] | None]


def _of_loop(plan: Plan, ids: bool, steps: int, batch: Sequence[int], layers: Sequence[Layer]) -> _OfLoop:
    """What a call has in common with those before it, if it is short: packed weights, the loop, and its weights."""
    if steps * prod(batch) > _SHORT:
        return None, None, None
    packed = plan.packed_for_loop(ids)  # finds out whether the weights are still the same
    return packed, *loop_of(plan, ids, layers, steps * prod(batch))


def _scan(
    layer: Layer,
    of_loop: _OfLoop,
    steps: int | None,
    batch: Sequence[int],
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
) -> Any:
    packed, loop, of_layers = of_loop
    shared = None if of_layers is None else of_layers[layer.index]
    weights = layer.weights if shared is None else shared.weights
    return _Scan.apply(layer, packed, loop, shared, steps, batch, input, h_0, c_0, *weights)


@derivatives.hooks_skip_unused_results
class _Scan(derivatives.Function):
    """One layer of one direction: `derivatives.Scan` of the cpu backend, but a call each forward and backward.

    apply(layer, its packed weights or None, the loop or None, what it shares or None, T, [B] or [] if unbatched, input
    (T, B, I) or ids (T, B), h_0 and c_0 (1, B, P) or None for zeros, the five of `scan.Weights`, those of the loop if
    there are any) returns output (T, B, P), h_n and, of an LSTM, c_n; or None, None where the kernel fails. A cell has
    no T: nor have its input and output, and its states lack the 1; in the place of h_n is None. The backward of an
    LSTM's or GRU's needs no output, which may therefore be changed in place, as torch.nn's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        packed: Packed | None,
        loop: Loop | None,
        shared: SharedWeights | None,
        steps: int | None,
        batch: Sequence[int],
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor | None,
    ) -> Any:
        time, lane = ((), ()) if steps is None else ((steps,), (1,))
        rows, empty, like = batch[0] if batch else 1, cpu.empty, layer.memory[1]
        sizes = (steps or 1, rows)
        output = empty(like, *time, *batch, layer.state_size)
        tape = empty(like, 1, prod(sizes), layer.tape_size) if layer.tape_size else None
        h_n = empty(like, *lane, *batch, layer.state_size) if time else None  # a cell's is its output
        c_n = empty(like, *lane, *batch, layer.hidden_size) if layer.has_cell_state else None
        given = (input, h_0, c_0)
        places = *given, *layer.memory_addresses, output, tape, h_n, c_n
        plan = 0 if packed is None else packed.address
        if cpu.forward(layer.address, plan, layer.index, *sizes, *places) != DONE:
            return None, None
        ctx.layer, ctx.sizes, ctx.loop, ctx.shared = layer, sizes, loop, shared
        # The tensors themselves for derivatives of the gradients, and what they hold now for the gradients.
        memory = [None if tensor is None else tensor.detach() for tensor in given]
        kept = None if steps is None and tape is not None else output
        ctx.save_for_backward(*given, *weights, kept, tape, *memory)
        ctx.set_materialize_grads(False)
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None = None) -> Any:
        if d_output is None and d_h_n is None and d_c_n is None:
            return (None,) * 14
        layer, saved, needs, given = ctx.layer, ctx.saved_tensors, ctx.needs_input_grad[6:], (d_output, d_h_n, d_c_n)
        if ctx.loop is not None:
            ctx.loop.is_over = True
        # Compiled autograd has no passes of torch's engine, and none that could look on.
        is_compiled = torch.compiler.is_compiling()
        shared = None if is_compiled else ctx.shared
        if shared is not None and not shared.are_wanted():
            needs = needs[:3] + _NO_WEIGHT
        need_weights = True in needs[3:]
        memory = (*saved[10:], *layer.memory, *saved[8:10])
        # Not where it is itself to be differentiated, or somebody looks on.
        is_seen = is_compiled or is_grad_enabled() or is_observed()
        if not is_seen and all(d is None or cpu.is_plain(d, layer.dtype) for d in given):
            d_results = [d if d is None else d.contiguous() for d in given]
            rows = shared.rows_of_pass(layer, ctx.loop) if shared is not None and need_weights else None
            wanted = needs[:3] + (layer.has_weight if need_weights and rows is None else _NO_WEIGHT)
            pairs = zip(memory, wanted, strict=False)
            found = [cpu.empty(tensor, *tensor.shape) if want else None for tensor, want in pairs]
            places = *d_results, *memory, *found
            count = prod(ctx.sizes)
            in_common = _NOTHING_SHARED if rows is None else (*rows.places(count), *rows.packed(ctx.sizes, needs[0]))
            if cpu.backward(layer.address, *ctx.sizes, *places, *in_common) == DONE:
                if rows is not None:
                    rows.left(count)
                return (*_NO_TENSORS, *found)
        # What needed no gradient in the call gets none from this one, whatever it has become since.
        pairs = zip(saved, ctx.needs_input_grad[6:], strict=False)
        leaves = [tensor if tensor is None or need else tensor.detach() for tensor, need in pairs]
        kept = (*leaves, *saved[8:10]) if is_grad_enabled() else memory
        return (*_NO_TENSORS, *_through_the_operator(ctx, given, kept, needs, need_weights))


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
    layer, (steps, batch) = ctx.layer, ctx.sizes
    if output is None:  # which the backward of one step does not read
        output = layer.memory[1].new_zeros(batch, layer.state_size)

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
