"""The scan on CUDA, as torch calls it: a plan, the kernels of csrc/cuda, and torch's GEMMs around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast import table
from rnnfast.backends import products
from rnnfast.backends.products import numbers, on_device_of, steps_of
from rnnfast.cells import CELLS
from rnnfast.table import KERNELS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

NAMESPACE = "rnnfast_cuda"


class Plan(NamedTuple):
    """Which kernel runs a scan, on teams of how many blocks, rows and warps; see csrc/cuda/plan.h.

    `shared_bytes` a block; `nanoseconds` a step takes by the plan's model, which no GPU has confirmed yet.
    """

    kernel: str
    blocks: int
    rows: int
    warps: int
    shared_bytes: int = 0
    nanoseconds: int = 0

    @property
    def team(self) -> list[int]:
        return [KERNELS.index(self.kernel), self.blocks, self.rows, self.warps]


def plan(h_0: Tensor, cell: str, backward: bool) -> Plan:
    """Returns the plan for a layer whose initial state is h_0 (D, B, H). It depends on sizes only.

    It is the team that was measured fastest on the card, where `rnnfast tune` has measured, else the model's first.
    """
    used = _used[backward]
    return _plan(*_problem(h_0, cell, backward), table.of(_device(h_0)).table, NAMESPACE) if used is None else used


def plans(h_0: Tensor, cell: str, backward: bool) -> list[Plan]:
    """Returns the best plan of each kernel, by the model, for clusters of each size; the fastest first."""
    *problem, device = _problem(h_0, cell, backward)
    return _parse(_ops().plans(*problem, _limits(device, NAMESPACE)))


@contextmanager
def use_plans(forward: Plan | None = None, backward: Plan | None = None) -> Iterator[None]:
    """Has every scan run on the plans given, in place of its own. For measurements: it is not a thread's alone."""
    before = tuple(_used)
    _used[:] = [forward, backward]
    try:
        yield
    finally:
        _used[:] = before


_used: list[Plan | None] = [None, None]  # forward, backward


def _problem(h_0: Tensor, cell: str, backward: bool) -> tuple[Any, ...]:
    lanes, batch, hidden = h_0.shape
    return cell, hidden, batch, lanes, numbers(h_0.dtype), backward, _device(h_0)


def _device(h_0: Tensor) -> int:
    return -1 if h_0.device.index is None else h_0.device.index


def _parse(plans: list[int]) -> list[Plan]:
    """Plans as the operator gives them, one after another."""
    width = len(Plan._fields)
    return [Plan(KERNELS[plans[i]], *plans[i + 1 : i + width]) for i in range(0, len(plans), width)]


@cache
def _plan(
    cell: str,
    hidden: int,
    batch: int,
    lanes: int,
    numbers: str,
    backward: bool,
    device: int,
    measured: table.Table | None,
    namespace: str,
) -> Plan:
    problem = (cell, hidden, batch, lanes, numbers, backward, _limits(device, namespace))
    point = None if measured is None else measured.nearest(cell, numbers, hidden, batch * lanes)
    team = None if point is None else point.teams.get("backward" if backward else "forward")
    if team is not None:
        made = Plan(*team)
        if made.kernel == "steps" or not _ops().check(*problem, made.team):
            return made
    return _parse(_ops().plans(*problem))[0]


@cache
def _limits(device: int, _: str) -> list[int]:
    with torch.cuda.device(device):  # how many clusters it runs at once is asked of the current one
        return list(_ops().limits(device))


def _ops() -> Any:
    return getattr(torch.ops, NAMESPACE)


def forward(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    bidirectional: bool,
    save_tape: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements `rnnfast::scan_cuda`; shapes are those of `rnnfast.scan.scan`."""
    products.require_supported("cuda", h_0.dtype, w_hr, DTYPES)
    products.require_contiguous(input=input, w_hh=w_hh, b_hh=b_hh, h_0=h_0, c_0=c_0)
    lanes, batch, hidden = h_0.shape
    rows, tape_width = input.shape[0], CELLS[cell].tape * hidden
    output = h_0.new_empty(rows, lanes * hidden)
    tape = h_0.new_empty(lanes, rows, tape_width) if save_tape else h_0.new_empty(0)
    if rows == 0:
        return output, h_0.clone(), h_0.new_empty(0) if c_0 is None else c_0.clone(), tape

    gx, ids = products.gate_inputs(input, w_ih, b_ih)
    steps, offsets = steps_of(rows, h_0, batch_sizes)
    saved = tape if tape.numel() else None
    how = plan(h_0, cell, backward=False)
    common = (cell, numbers(h_0.dtype), bidirectional, steps)
    c_n: Tensor | None
    with on_device_of(h_0):
        if how.kernel != "steps":
            h_n = torch.empty_like(h_0)
            c_n = None if c_0 is None else torch.empty_like(c_0)
            _ops().scan_forward(gx, ids, w_hh, b_hh, h_0, c_0, offsets, output, h_n, c_n, saved, *common, how.team)
        else:
            h_state, c_state = _state(h_0), None if c_0 is None else _state(c_0)
            operand, product = h_0.clone(), h_state.new_empty(lanes, batch, w_hh.shape[1])
            for step in range(steps):
                products.recurrent_product(operand, w_hh.mT, product)
                inputs = (gx, ids, b_hh, h_0, c_0, offsets, output, saved, *common, step, product)
                _ops().step_forward(*inputs, h_state, c_state, operand)
            h_n, c_n = h_state.to(h_0.dtype), None if c_state is None else c_state.to(h_0.dtype)
    return output, h_n, h_0.new_empty(0) if c_n is None else c_n, tape


def backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    bidirectional: bool,
    output: Tensor,
    tape: Tensor,
    need_input: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    """Implements `rnnfast::scan_cuda_backward`: what is absent or not needed is returned empty."""
    products.require_supported("cuda", h_0.dtype, w_hr, DTYPES)
    products.require_contiguous(input=input, w_hh=w_hh, b_hh=b_hh, h_0=h_0, c_0=c_0)
    products.require_contiguous(d_output=d_output, d_h_n=d_h_n, d_c_n=d_c_n, output=output, tape=tape)
    lanes, batch, hidden = h_0.shape
    rows, gates = input.shape[0], CELLS[cell].gates
    d_gx = h_0.new_empty(rows, lanes * gates * hidden)
    d_g_last = h_0.new_empty(rows, lanes * hidden) if cell == "gru" else None
    inputs: tuple[Any, ...]  # of an operator, as they come
    d_c_0: Tensor | None
    if rows == 0:
        d_h_0 = torch.zeros_like(h_0) if d_h_n is None else d_h_n.clone()
        d_c_0 = None if c_0 is None else torch.zeros_like(c_0) if d_c_n is None else d_c_n.clone()
    else:
        steps, offsets = steps_of(rows, h_0, batch_sizes)
        saved = tape if tape.numel() else None
        how = plan(h_0, cell, backward=True)
        common = (cell, numbers(h_0.dtype), bidirectional, steps)
        with on_device_of(h_0):
            if how.kernel != "steps":
                d_h_0 = torch.empty_like(h_0)
                d_c_0 = None if c_0 is None else torch.empty_like(c_0)
                w_hh_t = w_hh.mT.contiguous()
                inputs = (d_output, d_h_n, d_c_n, w_hh_t, h_0, c_0, offsets, output, saved)
                _ops().scan_backward(*inputs, d_gx, d_g_last, d_h_0, d_c_0, *common, how.team)
            else:
                d_h_state = _state(torch.zeros_like(h_0) if d_h_n is None else d_h_n)
                d_c_state = None if c_0 is None else _state(torch.zeros_like(c_0) if d_c_n is None else d_c_n)
                operand, product = h_0.new_empty(lanes, batch, w_hh.shape[1]), torch.empty_like(d_h_state)
                for step in range(steps):
                    inputs = (d_output, h_0, c_0, offsets, output, saved, d_gx, d_g_last, *common, step)
                    _ops().step_backward(*inputs, product if step else None, d_h_state, d_c_state, operand)
                    products.recurrent_product(operand, w_hh, product)
                d_h_state += product
                d_h_0, d_c_0 = d_h_state.to(h_0.dtype), None if d_c_state is None else d_c_state.to(h_0.dtype)

    empty = h_0.new_empty(0)
    gradients: list[Tensor | None] = [None] * 6
    if need_input and input.is_floating_point():
        gradients[0] = products.input_gradient(d_gx, w_ih)
    if need_weights:
        gradients[1:5] = products.weight_gradients(
            d_gx, d_g_last, input, w_ih, b_ih is not None, output, h_0, batch_sizes, bidirectional
        )
    return tuple(empty if g is None else g for g in (*gradients, d_h_0, d_c_0))


def _state(tensor: Tensor) -> Tensor:
    """A copy in the type that is accumulated in."""
    return tensor.to(torch.float64 if tensor.dtype is torch.float64 else torch.float32, copy=True)
