"""The scan on Triton, as torch calls it: all that is parallel in time in torch, and the launch of the scan's kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from rnnfast.backends import products
from rnnfast.backends.products import numbers, on_device_of, steps_of
from rnnfast.backends.triton import block, cells, loop, step
from rnnfast.backends.triton.plan import DTYPES, MOST_BLOCKS, Plan, Walk, card, plan, programs
from rnnfast.cells import CELLS


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
    """Implements `rnnfast::scan_triton`; shapes are those of `rnnfast.scan.scan`."""
    products.require_supported("triton", h_0.dtype, w_hr, DTYPES)
    products.require_contiguous(input=input, w_hh=w_hh, b_hh=b_hh, h_0=h_0, c_0=c_0)
    lanes, _, hidden = h_0.shape
    rows, values = input.shape[0], CELLS[cell].tape
    output = h_0.new_empty(rows, lanes * hidden)
    h_n = torch.empty_like(h_0)
    c_n = None if c_0 is None else torch.empty_like(c_0)
    tape = h_0.new_empty(lanes, rows, values * hidden) if save_tape else None
    if rows == 0:
        h_n.copy_(h_0)
        if c_0 is not None and c_n is not None:
            c_n.copy_(c_0)
    else:
        gx, ids = products.gate_inputs(input, w_ih, b_ih)
        if ids is not None:
            gx[:, 0].index_select(0, ids)  # an error for an id outside the table, beyond which kernels would read
        walk = _walk(h_0, rows, batch_sizes, bidirectional)
        written = (output, tape if values else None, h_n, c_n)
        scan_forward(cell, _plan(cell, h_0), walk, gx, ids, w_hh, b_hh, h_0, c_0, *written)
    return output, h_n, h_0.new_empty(0) if c_n is None else c_n, h_0.new_empty(0) if tape is None else tape


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
    """Implements `rnnfast::scan_triton_backward`: what is absent or not needed is returned empty."""
    products.require_supported("triton", h_0.dtype, w_hr, DTYPES)
    products.require_contiguous(input=input, w_hh=w_hh, b_hh=b_hh, h_0=h_0, c_0=c_0)
    products.require_contiguous(d_output=d_output, d_h_n=d_h_n, d_c_n=d_c_n, output=output, tape=tape)
    lanes, _, hidden = h_0.shape
    rows, gates = input.shape[0], CELLS[cell].gates
    d_gx = h_0.new_empty(rows, lanes * gates * hidden)
    # The GRU's reset gate comes between n and its recurrent product, whose gradient therefore differs.
    d_g_last = h_0.new_empty(rows, lanes * hidden) if cell == "gru" else None
    d_h_n = torch.zeros_like(h_0) if d_h_n is None else d_h_n
    d_h_0 = torch.empty_like(h_0)
    d_c_0 = None
    if c_0 is not None:
        d_c_n = torch.zeros_like(c_0) if d_c_n is None else d_c_n
        d_c_0 = torch.empty_like(c_0)

    if rows == 0:
        d_h_0.copy_(d_h_n)
        if d_c_0 is not None and d_c_n is not None:
            d_c_0.copy_(d_c_n)
    else:
        walk = _walk(h_0, rows, batch_sizes, bidirectional)
        read = (d_output, d_h_n, d_c_n, w_hh, h_0, c_0, output, tape if CELLS[cell].tape else None)
        scan_backward(cell, _plan(cell, h_0), walk, *read, d_gx, d_g_last, d_h_0, d_c_0)

    gradients = [h_0.new_empty(0) for _ in range(6)]  # an operator's outputs share no memory
    if need_input and input.is_floating_point():
        gradients[0] = products.input_gradient(d_gx, w_ih)
    if need_weights:
        found = products.weight_gradients(
            d_gx, d_g_last, input, w_ih, b_ih is not None, output, h_0, batch_sizes, bidirectional
        )
        for index, gradient in enumerate(found, start=1):
            if gradient is not None:
                gradients[index] = gradient
    return (*gradients, d_h_0, h_0.new_empty(0) if d_c_0 is None else d_c_0)


# ---- before the scan -----------------------------------------------------------------------------------------------


def _walk(h_0: Tensor, rows: int, batch_sizes: Tensor | None, bidirectional: bool) -> Walk:
    lanes, batch, hidden = h_0.shape
    steps, offsets = steps_of(rows, h_0, batch_sizes)
    return Walk(steps, batch, lanes, rows, hidden, int(bidirectional), offsets)


def _plan(cell: str, h_0: Tensor) -> Plan:
    lanes, batch, hidden = h_0.shape
    if lanes > MOST_BLOCKS:
        raise RuntimeError(
            f"the triton backend runs at most {MOST_BLOCKS:,} layers at once, each direction counted, not {lanes:,}: "
            'use smaller chunks (torch.vmap\'s chunk_size) or backend="torch"'
        )
    return plan(cell, hidden, batch, lanes, numbers(h_0.dtype), card(h_0.device))


# ---- the scan ------------------------------------------------------------------------------------------------------


def scan_forward(
    cell: str,
    how: Plan,
    walk: Walk,
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
    with on_device_of(h_0):
        if how.kernel == "gates":
            loop.forward(cell, how, walk, gx, ids, w_hh, b_hh, h_0, c_0, output, tape, h_n, c_n)
            return
        w = _weights(w_hh, how)
        constants = {"CELL": cells.FORWARD[cell], **_constants(cell, h_0.dtype, how)}
        if constants.get("FMA"):
            w = w.mT.contiguous()
        tensors = (gx, ids, w, b_hh, h_0, c_0, walk.offsets, output, h_n, c_n, tape)
        if how.kernel in ("registers", "shared"):
            _launch_block(block.scan_forward, how, walk, tensors, constants)
        else:
            h_state = h_0.new_zeros(2, walk.lanes, walk.batch, how.padded(walk.hidden), dtype=torch.float32)
            h_state[0, ..., : walk.hidden] = h_0
            c_state = None if c_0 is None else c_0.to(torch.float32, copy=True)
            states = (h_state, c_state)
            _launch_steps(step.scan_forward, h_0.device, how, walk, walk.steps, (*tensors, *states), constants)


def scan_backward(
    cell: str,
    how: Plan,
    walk: Walk,
    d_output: Tensor | None,
    d_h_n: Tensor,
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
    with on_device_of(h_0):
        if how.kernel == "gates":
            written = (d_gx, d_g_last, d_h_0, d_c_0)
            loop.backward(cell, how, walk, d_output, d_h_n, d_c_n, w_hh, h_0, c_0, output, tape, *written)
            return
        w = _weights(w_hh, how)
        tensors = (d_output, d_h_n, d_c_n, w, h_0, c_0, walk.offsets, output, tape, d_gx, d_g_last, d_h_0, d_c_0)
        constants = {"CELL": cells.BACKWARD[cell], **_constants(cell, h_0.dtype, how)}
        if how.kernel in ("registers", "shared"):
            _launch_block(block.scan_backward, how, walk, tensors, constants)
        else:
            d_h_state = d_h_n.to(torch.float32, copy=True)
            d_c_state = None if d_c_n is None else d_c_n.to(torch.float32, copy=True)
            states = (d_h_state, d_c_state)
            _launch_steps(step.scan_backward, h_0.device, how, walk, walk.steps + 1, (*tensors, *states), constants)


def _weights(w_hh: Tensor, how: Plan) -> Tensor:
    """Returns w_hh as the kernel reads it, (D, G, padded, padded), with zeros around."""
    hidden = w_hh.shape[2]
    more = how.padded(hidden) - hidden
    w_hh = w_hh.unflatten(1, (-1, hidden))
    if more:
        w_hh = torch.nn.functional.pad(w_hh, (0, more, 0, more))
    is_tf32 = how.kernel in ("resident", "step") and numbers(w_hh.dtype) == "tf32"
    return _rounded_to_tf32(w_hh) if is_tf32 else w_hh


def _rounded_to_tf32(w: Tensor) -> Tensor:
    """As `step.round_to_tf32` does: each step reads the weights again, which it would have to round again."""
    bits = w.view(torch.int32)
    return torch.where(w.isnan(), w, ((bits + 0x1000) & -0x2000).view(torch.float32))


def _constants(cell: str, dtype: torch.dtype, how: Plan) -> dict[str, Any]:
    constants = {
        "PRECISION": "tf32" if numbers(dtype) == "tf32" else "ieee",
        "num_stages": how.stages,
        **how.constants(cell),
    }
    if how.kernel in ("resident", "step"):
        constants["FMA"] = numbers(dtype) == "float32"
    return constants


def _launch_block(kernel: Any, how: Plan, walk: Walk, tensors: Any, constants: dict[str, Any]) -> None:
    grid = (triton.cdiv(walk.batch, how.rows), walk.lanes)
    kernel[grid](*tensors, *walk.sizes, walk.bidirectional, **constants)


def _launch_steps(
    kernel: Any, device: torch.device, how: Plan, walk: Walk, steps: int, tensors: Any, constants: dict[str, Any]
) -> None:
    """One cooperative launch where all programs fit the device at once, else a launch for each step."""
    grid = (triton.cdiv(walk.hidden, how.units), triton.cdiv(walk.batch, how.rows), walk.lanes)
    sizes = (*walk.sizes, how.padded(walk.hidden), walk.bidirectional)
    if _run_at_once(how, walk, device):
        # One counter for each row tile of a lane, a cache line apart.
        arrivals = torch.zeros(grid[1] * grid[2], 16, dtype=torch.int64, device=device)
        at_once = {"SYNCHRONISE": True, "launch_cooperative_grid": True}
        kernel[grid](*tensors, arrivals, 0, steps, *sizes, **constants, **at_once)
        return
    for i in range(steps):
        kernel[grid](*tensors, None, i, i + 1, *sizes, **constants, SYNCHRONISE=False)


def _run_at_once(how: Plan, walk: Walk, device: torch.device) -> bool:
    """Whether all programs surely run at the same time: one on each multiprocessor. The interpreter's take turns."""
    count = programs(how, walk.hidden, walk.batch, walk.lanes)
    return device.type == "cuda" and count <= card(device).multiprocessors
