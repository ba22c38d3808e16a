"""The steps of one stream: its states alternate between two places, so that a step makes no tensor but its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast.backends import cpu
from rnnfast.backends.cpu import packing
from rnnfast.direct.plans import Packed, Plan, address_of, conditions_of_step, contiguous, plan_of_step
from rnnfast.inputs import map_state

_Place = tuple[Any, int, int]
"""A state, as `layer.step` takes it, the address of h and that of c, or 0."""


class Steps:
    """The steps that follow a state, without gradients, all of the same size.

    They write to states of their own. `state` is the last one, with which they end: it is the taker's.
    """

    __slots__ = ("_places", "next")

    def __init__(self, layer: Any, plan: Plan, packed: Packed, input: Tensor, state: Any) -> None:
        # The state may be gone on from with gradients, which one made in inference mode does not allow.
        with torch.inference_mode(False):
            self._places = [_place(state), *(_place(map_state(state, torch.empty_like)) for _ in range(2))]
        batch, conditions = len(input), conditions_of_step(layer, plan, packed, input.dtype)
        kept = conditions, layer, packing, tuple(plan.weights), packed.stamp
        output = (batch, plan.state_size), (plan.state_size, 1), plan.dtype
        form = Tensor, input.dtype, input.shape, cpu.empty_strided, output
        self.next = cpu.built_in("step", (*kept, *form, packed.address, batch, self._places))

    @property
    def state(self) -> Any:
        return self._places[0][0]


def steps_after(layer: Any, input: Tensor, state: Any) -> Steps | None:
    """Returns the steps that may follow the one that took this input and left this state, if they can be direct."""
    plan = plan_of_step(layer)
    if plan is None:
        return None
    ids = input.dtype is torch.int64
    packed, shape = plan.packed.get(ids), input.shape
    tensors = None if packed is None else contiguous(plan, ids, input, shape, state, (shape[0],))
    if packed is None or tensors is None:
        return None
    _, h, c = tensors
    return Steps(layer, plan, packed, input, h if c is None else (h, c))


def _place(state: Any) -> _Place:
    h, c = state if isinstance(state, tuple) else (state, None)
    return state, address_of(h), 0 if c is None else address_of(c)
