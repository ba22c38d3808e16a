"""The scan on CUDA, as torch calls it: a plan, and the kernels of csrc/cuda."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast import table
from rnnfast.backends import gpu_scan, products
from rnnfast.backends.gpu_scan import ScanShape
from rnnfast.table import KERNELS, compute_type_of

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
    return _plan(*_problem(h_0, cell, backward), table.of(_device(h_0)).table) if used is None else used


def plans(h_0: Tensor, cell: str, backward: bool) -> list[Plan]:
    """Returns the best plan of each kernel, by the model, for clusters of each size; the fastest first."""
    *problem, device = _problem(h_0, cell, backward)
    return _parse(_ops().plans(*problem, _limits(device)))


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
    return cell, hidden, batch, lanes, compute_type_of(h_0.dtype), backward, _device(h_0)


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
    compute_type: str,
    backward: bool,
    device: int,
    measured: table.Table | None,
) -> Plan:
    problem = (cell, hidden, batch, lanes, compute_type, backward, _limits(device))
    point = None if measured is None else measured.nearest(cell, compute_type, hidden, batch * lanes)
    team = None if point is None else point.teams.get("backward" if backward else "forward")
    if team is not None:
        made = Plan(*team)
        if made.kernel == "steps" or not _ops().check(*problem, made.team):
            return made
    return _parse(_ops().plans(*problem))[0]


@cache
def _limits(device: int) -> list[int]:
    with torch.cuda.device(device):  # how many clusters it runs at once is asked of the current one
        return list(_ops().limits(device))


def _ops() -> Any:
    return getattr(torch.ops, NAMESPACE)


def _forward(
    cell: str,
    shape: ScanShape,
    gx: Tensor,
    ids: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    output: Tensor,
    tape: Tensor | None,
    h_n: Tensor,
    c_n: Tensor | None,
) -> None:
    how = plan(h_0, cell, backward=False)
    common = (cell, compute_type_of(h_0.dtype), bool(shape.bidirectional), shape.steps)
    if how.kernel != "steps":
        states = (h_0, c_0, shape.offsets, output, h_n, c_n, tape)
        _ops().scan_forward(gx, ids, w_hh, b_hh, *states, *common, how.team)
        return
    h_state, c_state = _state(h_0), None if c_0 is None else _state(c_0)
    operand, product = h_0.clone(), h_state.new_empty(shape.lanes, shape.batch, w_hh.shape[1])
    for step in range(shape.steps):
        products.recurrent_product(operand, w_hh.mT, product)
        inputs = (gx, ids, b_hh, h_0, c_0, shape.offsets, output, tape, *common, step, product)
        _ops().step_forward(*inputs, h_state, c_state, operand)
    h_n.copy_(h_state)
    if c_n is not None and c_state is not None:
        c_n.copy_(c_state)


def _backward(
    cell: str,
    shape: ScanShape,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    w_hh: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    output: Tensor,
    tape: Tensor | None,
    d_gx: Tensor,
    d_g_last: Tensor | None,
    d_h_0: Tensor,
    d_c_0: Tensor | None,
) -> None:
    how = plan(h_0, cell, backward=True)
    common = (cell, compute_type_of(h_0.dtype), bool(shape.bidirectional), shape.steps)
    inputs: tuple[Any, ...]  # of an operator, as they come
    if how.kernel != "steps":
        inputs = (d_output, d_h_n, d_c_n, w_hh.mT.contiguous(), h_0, c_0, shape.offsets, output, tape)
        _ops().scan_backward(*inputs, d_gx, d_g_last, d_h_0, d_c_0, *common, how.team)
        return
    d_h_state = _state(torch.zeros_like(h_0) if d_h_n is None else d_h_n)
    d_c_state = None if c_0 is None else _state(torch.zeros_like(c_0) if d_c_n is None else d_c_n)
    operand, product = h_0.new_empty(shape.lanes, shape.batch, w_hh.shape[1]), torch.empty_like(d_h_state)
    for step in range(shape.steps):
        inputs = (d_output, h_0, c_0, shape.offsets, output, tape, d_gx, d_g_last, *common, step)
        _ops().step_backward(*inputs, product if step else None, d_h_state, d_c_state, operand)
        products.recurrent_product(operand, w_hh, product)
    d_h_0.copy_(d_h_state.add_(product))
    if d_c_0 is not None and d_c_state is not None:
        d_c_0.copy_(d_c_state)


def _state(tensor: Tensor) -> Tensor:
    """A copy in the type that is accumulated in."""
    return tensor.to(torch.float64 if tensor.dtype is torch.float64 else torch.float32, copy=True)


forward = partial(gpu_scan.forward, "cuda", DTYPES, _forward)
backward = partial(gpu_scan.backward, "cuda", DTYPES, _backward)
