"""The steps of one stream: its states alternate between two places, so that a step makes no tensor but its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast.backends import cpu
from rnnfast.backends.cpu import DONE, infer_call
from rnnfast.direct.plans import Packed, Plan, address_of, contiguous, is_plain, plan_of_step
from rnnfast.inputs import map_state

_Place = tuple[Any, int, int]
"""A state, as `layer.step` takes it, the address of h and that of c, or 0."""


class Steps:
    """The steps that follow a state, without gradients, all of the same size.

    They write to states of their own. `state` is the last one, with which they end: it is the taker's.
    """

    __slots__ = ("_after", "_batch", "_ids", "_layer", "_next", "_now", "_output", "_packed", "_plan", "_shape")

    def __init__(self, layer: Any, plan: Plan, packed: Packed, input: Tensor, state: Any) -> None:
        self._layer, self._plan, self._packed = layer, plan, packed
        self._ids, self._shape, self._batch = input.dtype is torch.int64, input.shape, len(input)
        self._now = _place(state)
        # The state may be gone on from with gradients, which one made in inference mode does not allow.
        with torch.inference_mode(False):
            self._next, self._after = (_place(map_state(state, torch.empty_like)) for _ in range(2))
            self._output = torch.empty(self._batch, plan.state_size, dtype=plan.dtype)

    def __call__(self, input: Any) -> Tensor | None:
        """Returns the output of the next step, or None where the general way must be taken, from `state`."""
        layer, plan, packed, ids = self._layer, self._plan, self._packed, self._ids
        if (
            plan_of_step(layer) is not plan
            or plan.packed.get(ids) is not packed
            or plan.stamp() != packed.stamp
            or not is_plain(input, torch.int64 if ids else plan.dtype)
            or input.is_nested
            or input.shape != self._shape
        ):
            return None
        input, output = input.contiguous(), torch.empty_like(self._output)
        (_, h_0, c_0), (_, h_n, c_n) = self._now, self._next
        steps, batch = 1, self._batch
        call = infer_call(packed.address, steps, batch, address_of(input), h_0, c_0, address_of(output), h_n, c_n)
        if cpu.infer(call) != DONE:
            return None
        self._now, self._next, self._after = self._next, self._after, self._next
        return output

    @property
    def state(self) -> Any:
        return self._now[0]


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
