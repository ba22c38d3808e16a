"""The scan on Triton, as torch calls it: a plan, and the launch of its kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from rnnfast.backends import gpu_scan
from rnnfast.backends.gpu_scan import ScanShape
from rnnfast.backends.triton import block, cells, loop, step
from rnnfast.backends.triton.plan import DTYPES, MOST_BLOCKS, Plan, card, plan, programs
from rnnfast.table import compute_type_of


def _plan(cell: str, h_0: Tensor) -> Plan:
    lanes, batch, hidden = h_0.shape
    if lanes > MOST_BLOCKS:
        raise RuntimeError(
            f"the triton backend runs at most {MOST_BLOCKS:,} layers at once, each direction counted, not {lanes:,}: "
            'use smaller chunks (torch.vmap\'s chunk_size) or backend="torch"'
        )
    return plan(cell, hidden, batch, lanes, compute_type_of(h_0.dtype), card(h_0.device))


def scan_forward(
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
    """Fills output, tape, h_n and c_n; gx and ids are those of `products.gate_inputs`."""
    how = _plan(cell, h_0)
    if ids is not None:
        gx[:, 0].index_select(0, ids)  # an error for an id outside the table, beyond which kernels would read
    if how.kernel == "gates":
        loop.forward(cell, how, shape, gx, ids, w_hh, b_hh, h_0, c_0, output, tape, h_n, c_n)
        return
    w = _weights(w_hh, how)
    constants = {"CELL": cells.FORWARD[cell], **_constants(cell, h_0.dtype, how)}
    if constants.get("FMA"):
        w = w.mT.contiguous()
    first, last = (gx, ids, w, b_hh), (shape.offsets, output, h_n, c_n, tape)
    if how.kernel in ("registers", "shared"):
        _launch_block(block.scan_forward, how, shape, (*first, h_0, c_0, *last), constants)
    else:
        operand = h_0.new_zeros(2, shape.lanes, shape.batch, how.padded(shape.hidden))
        operand[0, ..., : shape.hidden] = h_0
        h_state, c_state = (None if state is None else state.to(torch.float32, copy=True) for state in (h_0, c_0))
        tensors = (*first, *last, operand, h_state, c_state)
        _launch_steps(step.scan_forward, h_0.device, how, shape, shape.steps, tensors, constants)


def scan_backward(
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
    """Fills d_gx (N, D*G*H), d_g_last (N, D*H), d_h_0 and d_c_0."""
    how = _plan(cell, h_0)
    d_h_n = torch.zeros_like(h_0) if d_h_n is None else d_h_n
    d_c_n = torch.zeros_like(c_0) if d_c_n is None and c_0 is not None else d_c_n
    if how.kernel == "gates":
        written = (d_gx, d_g_last, d_h_0, d_c_0)
        loop.backward(cell, how, shape, d_output, d_h_n, d_c_n, w_hh, h_0, c_0, output, tape, *written)
        return
    w = _weights(w_hh, how)
    rest = (w, h_0, c_0, shape.offsets, output, tape, d_gx, d_g_last, d_h_0, d_c_0)
    constants = {"CELL": cells.BACKWARD[cell], **_constants(cell, h_0.dtype, how)}
    if how.kernel in ("registers", "shared"):
        _launch_block(block.scan_backward, how, shape, (d_output, d_h_n, d_c_n, *rest), constants)
    else:
        d_h_state = d_h_n.to(torch.float32, copy=True)
        d_c_state = None if d_c_n is None else d_c_n.to(torch.float32, copy=True)
        tensors = (d_output, *rest, d_h_state, d_c_state)
        _launch_steps(step.scan_backward, h_0.device, how, shape, shape.steps + 1, tensors, constants)


def _weights(w_hh: Tensor, how: Plan) -> Tensor:
    """Returns w_hh as the kernel reads it, (D, G, padded, padded), with zeros around."""
    hidden = w_hh.shape[2]
    more = how.padded(hidden) - hidden
    w_hh = w_hh.unflatten(1, (-1, hidden))
    if more:
        w_hh = torch.nn.functional.pad(w_hh, (0, more, 0, more))
    is_tf32 = how.kernel in ("resident", "step") and compute_type_of(w_hh.dtype) == "tf32"
    return _rounded_to_tf32(w_hh) if is_tf32 else w_hh


def _rounded_to_tf32(w: Tensor) -> Tensor:
    """As `step.round_to_tf32` does: each step reads the weights again, which it would have to round again."""
    bits = w.view(torch.int32)
    return torch.where(w.isnan(), w, ((bits + 0x1000) & -0x2000).view(torch.float32))


def _constants(cell: str, dtype: torch.dtype, how: Plan) -> dict[str, Any]:
    constants = {
        "PRECISION": "tf32" if compute_type_of(dtype) == "tf32" else "ieee",
        "num_stages": how.stages,
        **how.constants(cell),
    }
    if how.kernel in ("resident", "step"):
        constants["FMA"] = compute_type_of(dtype) == "float32"
    return constants


def _launch_block(kernel: Any, how: Plan, shape: ScanShape, tensors: Any, constants: dict[str, Any]) -> None:
    grid = (triton.cdiv(shape.batch, how.rows), shape.lanes)
    kernel[grid](*tensors, *shape.sizes, shape.bidirectional, **constants)


def _launch_steps(
    kernel: Any, device: torch.device, how: Plan, shape: ScanShape, steps: int, tensors: Any, constants: dict[str, Any]
) -> None:
    """One cooperative launch where all programs fit the device at once, else a launch for each step."""
    grid = (triton.cdiv(shape.hidden, how.units), triton.cdiv(shape.batch, how.rows), shape.lanes)
    sizes = (*shape.sizes, how.padded(shape.hidden), shape.bidirectional)
    if _run_at_once(how, shape, device):
        # One counter for each row tile of a lane, a cache line apart.
        arrivals = torch.zeros(grid[1] * grid[2], 16, dtype=torch.int64, device=device)
        at_once = {"SYNCHRONISE": True, "launch_cooperative_grid": True}
        kernel[grid](*tensors, arrivals, 0, steps, *sizes, **constants, **at_once)
        return
    for i in range(steps):
        kernel[grid](*tensors, None, i, i + 1, *sizes, **constants, SYNCHRONISE=False)


def _run_at_once(how: Plan, shape: ScanShape, device: torch.device) -> bool:
    """Whether all programs surely run at the same time: one on each multiprocessor. The interpreter's take turns.

    Not on AMD: there a barrier waits for no stores, and a release, one thread's, for those of its own wave alone.
    """
    count = programs(how, shape.hidden, shape.batch, shape.lanes)
    return device.type == "cuda" and torch.version.hip is None and count <= card(device).multiprocessors


forward = partial(gpu_scan.forward, "triton", DTYPES, scan_forward)
backward = partial(gpu_scan.backward, "triton", DTYPES, scan_backward)
