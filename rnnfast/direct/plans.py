"""The plan of a layer or a cell: what must be as it was for its first call's checks to hold, and who may follow it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks, _has_any_global_hook

from rnnfast import dispatch, functional, scan
from rnnfast.backends import cpu
from rnnfast.backends.cpu import packing
from rnnfast.cells import CELLS
from rnnfast.inputs import has_own_checks

_base: Any = torch._C.TensorBase
address_of = _base.data_ptr
requires_grad_of = _base.requires_grad.__get__
_shape_of, _dtype_of, _is_on_cpu = _base.shape.__get__, _base.dtype.__get__, _base.is_cpu.__get__


@dataclass(slots=True, eq=False)
class Packed:
    """Weights packed for `cpu.infer` and `cpu.forward`, good while the stamp, of versions and addresses, is this.

    The weights' memory is kept with them: new weights might else come to lie where the old ones were.
    """

    stamp: bytes
    address: int  # of the first of `kept`
    kept: tuple[Tensor, ...]


@dataclass(slots=True)
class Layer:
    """One layer of one direction, or a cell, as the autograd function takes it."""

    index: int  # in the plan
    weights: scan.Weights
    has_weight: tuple[bool, ...]
    cell: str
    dtype: torch.dtype
    ids: bool
    state_size: int
    hidden_size: int
    tape_size: int  # of a row
    has_cell_state: bool
    row_bytes: tuple[int, int, int]  # of what a gradient of weights is made of: gradients of the gates, input, state
    address: int  # of `kept`
    kept: Tensor
    # The weights' memory as it is now: a parameter itself would follow what is assigned to its `.data` before backward.
    memory: tuple[Any, ...]  # tensors, or None where the layer has none
    memory_addresses: list[int]


@dataclass(eq=False)
class Plan:
    """What the calls of a layer or a cell have in common.

    It is an attribute of the module, and ends with it, even where a hook of a weight refers to the module. A copy or a
    pickle of the module has None instead. Dictionaries have an entry for token ids, and one for floating input.
    """

    conditions: tuple[Condition, ...]
    holds: Callable[[Any], bool]  # whether they do for the module
    may_step: Callable[[Any], bool]  # whether those of steps do
    stamp: Callable[[], bytes]  # of the weights now
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
    lead: tuple[int, ...]  # a state's first dimensions: (L*D,) of a layer, () of a cell
    packed: dict[bool, Packed] = field(default_factory=dict)
    last_stamp: bytes = b""  # of the last short call with gradients
    loops: dict[bool, Any] = field(default_factory=dict)  # weak references to those that such calls are in
    layers: dict[bool, list[Layer]] = field(default_factory=dict)  # while the weights have the addresses `described`
    described: list[int] = field(default_factory=list)

    def __reduce__(self) -> Any:
        return type(None), ()

    def has_shapes(self) -> bool:
        """Whether all weights have the layout they had: a view that is assigned to `.data` keeps address and version.

        A layer's step, which is half as long, does not look so closely.
        """
        return list(map(_shape_of, self.weights)) == self.signature[0] and all(map(Tensor.is_contiguous, self.weights))

    def packed_for_loop(self, ids: bool) -> Packed | None:
        """What one of a loop of short calls with gradients needs, but for the first one with these weights.

        Nor for any with weights in shared memory, which another process may be about to change.
        """
        stamp, packed = self.stamp(), self.packed.get(ids)
        is_first = stamp != self.last_stamp
        if is_first:  # the loops have views of what the weights were, whoever has packed the new ones since
            self.loops.clear()
            self.last_stamp = stamp
        if packed is not None and packed.stamp == stamp:
            return packed
        self.packed.pop(ids, None)
        if is_first or (ids and self.input_size > _LARGEST_TABLE):
            return None
        if any(weight.is_shared() for weight in self.weights):
            self.loops.clear()
            return None
        return self.pack(ids)

    def pack(self, ids: bool) -> Packed:
        """What calls without gradients need; the versions are read first, so that a write meanwhile is seen later."""
        stamp = self.stamp()
        layers = [self.lanes[first : first + self.directions] for first in range(0, len(self.lanes), self.directions)]
        memory = [weight.detach() for weight in self.weights]
        samples = packing.weight_samples(memory, self.hidden_size)
        packed = [packing.packed_weights(lanes, self.cell, ids and not index) for index, lanes in enumerate(layers)]
        kept = torch.ops.rnnfast.direct_plan_cpu(packed, samples)
        self.packed[ids] = found = Packed(stamp, kept.data_ptr(), (kept, samples, *packed, *memory))
        return found

    def describe(self, ids: bool) -> list[Layer]:
        """What calls with gradients need."""
        cell, layers = CELLS[self.cell], []
        self.described = [*map(address_of, self.weights)]
        for index, lane in enumerate(self.lanes):
            memory: tuple[Any, ...] = tuple(w if w is None else w.detach() for w in lane)
            w_ih, w_hh, *_, w_hr = (w if w is None else w.unsqueeze(0) for w in memory)
            first_ids = ids and not index
            kept = torch.ops.rnnfast.direct_layer_cpu(w_ih, w_hh, w_hr, self.cell, first_ids)
            form = index, lane, tuple(w is not None for w in lane), self.cell, self.dtype, first_ids
            tape_size = cell.tape * self.hidden_size
            item, address = self.dtype.itemsize, kept.data_ptr()
            input_bytes = 8 if first_ids else memory[0].shape[1] * item
            row_bytes = cpu.gates_bytes(address), input_bytes, self.state_size * item
            sizes = self.state_size, self.hidden_size, tape_size, cell.has_cell_state, row_bytes
            layers.append(Layer(*form, *sizes, address, kept, memory, addresses(memory)))
        self.layers[ids] = layers
        return layers


_ATTRIBUTE = "_rnnfast_plan"
_LARGEST_TABLE = 4096  # of token ids: packed weights have a row for each, and a loop uses few
_plans: weakref.WeakSet[Plan] = weakref.WeakSet()


def all_plans() -> list[Plan]:
    return list(_plans)


def kept_plan(module: Any) -> Plan | None:
    """The module's plan, whether or not it may be followed."""
    plan: Plan | None = module.__dict__.get(_ATTRIBUTE)
    return plan


def forget_plan(module: Any) -> None:
    module.__dict__.pop(_ATTRIBUTE, None)


Condition = tuple[Any, ...]
"""Something that must be as it was: one of these numbers, and what csrc/cpu/python.cpp says to follow it."""
RETURNS, HAS, HAS_ITEMS, IS_EMPTY = range(4)

# Of what has to see the operations themselves, nothing is at work.
_UNOBSERVED: tuple[Condition, ...] = (
    (RETURNS, is_autocast_enabled, ("cpu",), False),
    (RETURNS, _len_torch_dispatch_stack, (), 0),
    (RETURNS, _len_torch_function_stack, (), 0),
    (RETURNS, maybe_current_level, (), None),
    (RETURNS, attrgetter("_current_level"), (forward_ad,), -1),
    (RETURNS, _get_tracing_state, (), None),
    (RETURNS, _profiler_enabled, (), False),
)
_UNOBSERVED_VALUES = [value for *_, value in _UNOBSERVED]
# No gradients; and `is_hooked`, of hooks that run without them and without a call.
_OF_STEPS: tuple[Condition, ...] = (
    (RETURNS, is_grad_enabled, (), False),
    (IS_EMPTY, "_forward_pre_hooks"),
    (IS_EMPTY, "_forward_hooks"),
    (RETURNS, len, (_global_forward_pre_hooks,), 0),
    (RETURNS, len, (_global_forward_hooks,), 0),
)


def plan_of(module: Any) -> Plan | None:
    """The module's plan, if the call may follow it: it has the weights that it had, and nobody looks on."""
    plan: Plan | None = module.__dict__.get(_ATTRIBUTE)
    return plan if plan is not None and plan.holds(module) else None


def _conditions_of(module: Any, names: Sequence[str], weights: Sequence[Tensor]) -> tuple[Condition, ...]:
    """What has to be for a call to follow a plan, which the module's last call fulfilled."""
    parameters, nonlinearity = module._parameters, "mode" if isinstance(module, nn.RNNBase) else "nonlinearity"
    conditions: list[Condition] = [
        (HAS, "backend", module.backend),
        (HAS_ITEMS, "_parameters", tuple(names), tuple(weights), len(parameters)),
        *_UNOBSERVED,
    ]
    if module.backend == dispatch.AUTO:
        conditions.append((RETURNS, attrgetter("backend"), (dispatch.context,), dispatch.context.backend))
    if isinstance(module, nn.RNNBase):  # some assign to it
        conditions.append((HAS_ITEMS, "_flat_weights", tuple(range(len(weights))), tuple(weights), len(weights)))
    if hasattr(module, nonlinearity):  # an RNN's may be assigned
        conditions.append((HAS, nonlinearity, getattr(module, nonlinearity)))
    return tuple(conditions)


def plan_of_step(layer: Any) -> Plan | None:
    """The layer's plan, if a step of it may follow it: without gradients, hooks and dropout, and in one direction."""
    plan = plan_of(layer)
    if (
        plan is None
        or plan.directions == 2
        or not plan.may_step(layer)
        or (layer.training and layer.dropout > 0 and len(plan.lanes) > 1)
    ):
        return None
    return plan


def conditions_of_step(layer: Any, plan: Plan, packed: Packed, dtype: torch.dtype) -> tuple[Condition, ...]:
    """Those of `plan_of_step`, and that the plan with its packed weights for an input of this dtype is still there."""
    return (
        *plan.conditions,
        (HAS, _ATTRIBUTE, plan),
        (RETURNS, plan.packed.get, (dtype is torch.int64,), packed),
        *_OF_STEPS,
        (HAS, "training", layer.training),
        (HAS, "dropout", layer.dropout),
    )


def prepare(module: Any, input: Tensor) -> None:
    """Leaves a plan for the calls to come, if there is none and the module, an RNN, LSTM, GRU or cell, can have one.

    It has just done a general call, which has checked its weights.
    """
    plan = kept_plan(module)
    if plan is not None and plan.signature != signature_of(plan.weights):
        forget_plan(module)  # it would hold the memory that the weights had
        plan = None
    asked = dispatch.asked(module.backend)
    if asked not in (dispatch.AUTO, "cpu") or is_observed() or has_own_checks(type(module)):
        return
    if plan is not None and plan is plan_of(module):
        return
    is_cell = isinstance(module, nn.RNNCellBase)
    names = tuple(_names_of_cell(module) if is_cell else module._flat_weights_names)
    weights = [module._parameters.get(name) for name in names]
    if plan is not None and any(w is not None and not w.is_cpu for w in weights):
        forget_plan(module)
    # torch.func.functional_call puts other tensors there for a while, perhaps with a graph, which must not be kept.
    if not all(type(w) is nn.Parameter and w.is_cpu and w.layout is torch.strided for w in weights):
        return
    if not all(w.is_contiguous() and not w.is_inference() and not w.is_neg() for w in weights):
        return
    lanes = [functional.weights_of_cell(module)] if is_cell else functional.lane_weights(module)
    if [id(w) for lane in lanes for w in lane if w is not None] != [*map(id, weights)]:
        return
    if dispatch.explain(module, input).backend != "cpu":
        return
    cell = dispatch.cell_of(module)
    directions, lead = (1, ()) if is_cell else (2 if module.bidirectional else 1, (len(lanes),))
    w_ih, w_hh, *_ = lanes[0]
    sizes = w_ih.shape[1], w_hh.shape[1], w_hh.shape[0] // CELLS[cell].gates, directions, CELLS[cell].has_cell_state
    conditions = _conditions_of(module, names, weights)
    asks = cpu.built_in("holds", conditions), cpu.built_in("holds", _OF_STEPS)
    stamp = cpu.built_in("stamp", (packing, tuple(weights)))
    given = conditions, *asks, stamp, weights, signature_of(weights), lanes, cell, w_hh.dtype
    module.__dict__[_ATTRIBUTE] = plan = Plan(*given, *sizes, lead)
    _plans.add(plan)


def _names_of_cell(cell: Any) -> list[str]:
    return [name for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if cell._parameters.get(name) is not None]


def is_observed() -> bool:
    """Whether something (autocast, a mode, a transform, a tracer, a profiler) must see the operations themselves.

    Where nothing does, a new tensor is memory of the CPU, whatever the default device.
    """
    return [function(*arguments) for _, function, arguments, _ in _UNOBSERVED] != _UNOBSERVED_VALUES


def is_hooked(module: nn.Module) -> bool:
    """Whether a call runs hooks. Some make the weights anew, as those of pruning, weight_norm and spectral_norm do."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _has_any_global_hook()
    )


def signature_of(weights: list[Any]) -> tuple[list[Any], ...]:
    """What the general way checks of the weights. Writing to `.data` and torch.utils.swap_tensors change any of it."""
    return (
        list(map(_shape_of, weights)),
        list(map(type, weights)),
        list(map(_dtype_of, weights)),
        list(map(_is_on_cpu, weights)),
        list(map(Tensor.is_contiguous, weights)),
    )


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def contiguous(
    plan: Plan, ids: bool, input: Tensor, shape: torch.Size, hx: Any, batch: Sequence[int]
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Input, h_0 and c_0 as the kernels read them, absent states None; or None where one is not as it should be."""
    dtype = plan.dtype
    if not cpu.is_plain(input, torch.int64 if ids else dtype) or not (ids or shape[-1] == plan.input_size):
        return None
    if hx is None:
        return input.contiguous(), None, None
    h_0, c_0 = hx, None
    if plan.has_cell_state:
        if not isinstance(hx, tuple | list) or len(hx) != 2:
            return None
        h_0, c_0 = hx
        if not cpu.is_plain(c_0, dtype) or c_0.shape != (*plan.lead, *batch, plan.hidden_size):
            return None
        c_0 = c_0.contiguous()
    if not cpu.is_plain(h_0, dtype) or h_0.shape != (*plan.lead, *batch, plan.state_size):
        return None
    return input.contiguous(), h_0.contiguous(), c_0
