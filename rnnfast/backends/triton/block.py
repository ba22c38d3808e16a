"""The block scan: one program walks all steps of a tile of batch rows of one lane, with W_hh resident.

The state never leaves the program; the only traffic a step is gx in and the output (and tape) out. Units are padded to
a power of two; `w_hh` comes padded with zeros, (D, G, UNITS, UNITS), so padded units never reach a real one.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton concatenates tuples, and cannot unpack them)

import triton
import triton.language as tl

from rnnfast.backends.triton.access import SLICES, load_gates, load_step, step_rows


@triton.jit
def product(a, w, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Returns a (rows, K) times w (K, units), accumulated in float32, by `tl.dot` or as multiplications and a sum.

    `tl.dot` pads rows to 16 and needs tensor cores to pay; for float32 as such the sum keeps w in registers.
    """
    if DOT:
        return tl.dot(a.to(w.dtype), w, input_precision=PRECISION)
    else:
        return tl.sum(a[:, :, None] * w[None, :, :].to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["T", "B", "D", "N"], do_not_specialize_on_alignment=SLICES)
def scan_forward(
    gx,
    ids,
    w_hh,
    b_hh,
    h_0,
    c_0,
    offsets,
    output,
    h_n,
    c_n,
    tape,
    T,
    B,
    D,
    N,
    H,
    bidirectional,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    TAPE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    lane = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.arange(0, UNITS)
    k = tl.arange(0, UNITS)
    in_units = unit < H
    lane64 = lane.to(tl.int64)
    backwards = bidirectional & (lane % 2)

    w = ()
    b = ()
    for g in tl.static_range(GATES):
        at = w_hh + (lane64 * GATES + g) * UNITS * UNITS + k[:, None] + unit[None, :] * UNITS
        w = w + (tl.load(at),)
        if b_hh is not None:
            b = b + (tl.load(b_hh + (lane * GATES + g) * H + unit, mask=in_units, other=0.0).to(tl.float32),)

    state = (lane64 * B + row)[:, None] * H + unit[None, :]
    in_batch = (row < B)[:, None] & in_units[None, :]
    h = tl.load(h_0 + state, mask=in_batch, other=0.0).to(tl.float32)
    c = h
    if c_0 is not None:
        c = tl.load(c_0 + state, mask=in_batch, other=0.0).to(tl.float32)

    gx += lane * GATES * H
    gx_stride = D.to(tl.int64) * GATES * H
    output += lane * H
    if tape is not None:
        tape += lane64 * N * TAPE * H

    first = backwards * (T - 1)
    start, size = step_rows(first, T, B, offsets)
    x = load_gates(gx, start + row, row < size, ids, gx_stride, unit, H, GATES)
    for i in range(T):
        # The next step's rows are asked for before this step's arithmetic, which hides their latency.
        t_next = first + (i + 1) * (1 - 2 * backwards)
        start_next, size_next = step_rows(t_next, T, B, offsets)
        x_next = load_gates(gx, start_next + row, row < size_next, ids, gx_stride, unit, H, GATES)

        a = ()
        for g in tl.static_range(GATES):
            p = product(h, w[g], DOT, PRECISION)
            if b_hh is not None:
                p += b[g][None, :]
            a = a + (p,)
        h_new, c_new, saved = CELL(x, a, h, c)
        valid = (row < size)[:, None] & in_units[None, :]
        h = tl.where(valid, h_new, h)
        c = tl.where(valid, c_new, c)

        at_row = (start + row)[:, None]
        tl.store(output + at_row * D * H + unit[None, :], h.to(output.dtype.element_ty), mask=valid)
        if tape is not None:
            for s in tl.static_range(TAPE):
                saved_at = tape + at_row * TAPE * H + (s * H + unit)[None, :]
                tl.store(saved_at, saved[s].to(tape.dtype.element_ty), mask=valid)
        x = x_next
        start = start_next
        size = size_next

    tl.store(h_n + state, h.to(h_n.dtype.element_ty), mask=in_batch)
    if c_0 is not None:
        tl.store(c_n + state, c.to(c_n.dtype.element_ty), mask=in_batch)


@triton.jit(do_not_specialize=["T", "B", "D", "N"], do_not_specialize_on_alignment=SLICES)
def scan_backward(
    d_output,
    d_h_n,
    d_c_n,
    w_hh,
    h_0,
    c_0,
    offsets,
    output,
    tape,
    d_gx,
    d_g_last,
    d_h_0,
    d_c_0,
    T,
    B,
    D,
    N,
    H,
    bidirectional,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    TAPE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walks the steps in the opposite order and writes the gradient of each row's gate pre-activations.

    `d_g_last` takes the recurrent gradient of the last gate where it differs from the input's (the GRU's n).
    """
    lane = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.arange(0, UNITS)
    k = tl.arange(0, UNITS)
    in_units = unit < H
    lane64 = lane.to(tl.int64)
    backwards = bidirectional & (lane % 2)

    w = ()
    for g in tl.static_range(GATES):
        at = w_hh + (lane64 * GATES + g) * UNITS * UNITS + k[:, None] * UNITS + unit[None, :]
        w = w + (tl.load(at),)

    state = (lane64 * B + row)[:, None] * H + unit[None, :]
    in_batch = (row < B)[:, None] & in_units[None, :]
    h_first = tl.load(h_0 + state, mask=in_batch, other=0.0).to(tl.float32)
    c_first = None
    d_h = tl.load(d_h_n + state, mask=in_batch, other=0.0).to(tl.float32)
    d_c = tl.zeros_like(d_h)
    if c_0 is not None:
        c_first = tl.load(c_0 + state, mask=in_batch, other=0.0).to(tl.float32)
        d_c = tl.load(d_c_n + state, mask=in_batch, other=0.0).to(tl.float32)

    stride = D.to(tl.int64) * H
    output += lane * H
    if d_output is not None:
        d_output += lane * H
    d_gx += lane * GATES * H
    if d_g_last is not None:
        d_g_last += lane * H
    if tape is not None:
        tape += lane64 * N * TAPE * H

    direction = 1 - 2 * backwards
    first = (1 - backwards) * (T - 1)
    start, size = step_rows(first, T, B, offsets)
    start_before, size_before = step_rows(first - direction, T, B, offsets)
    read = load_step(
        tape, output, d_output, row, unit, start, size, start_before, size_before, h_first, c_first, H, stride,
        TAPE,
    )  # fmt: skip
    for i in range(T):
        start_next, size_next = step_rows(first - (i + 2) * direction, T, B, offsets)
        read_next = load_step(
            tape, output, d_output, row, unit, start_before, size_before, start_next, size_next, h_first, c_first,
            H, stride, TAPE,
        )  # fmt: skip

        saved, h_after, d_out, h_before, c_before = read
        d_x, d_g, d_direct, d_c_before = CELL(d_h + d_out, d_c, saved, h_after, h_before, c_before)
        valid = (row < size)[:, None] & in_units[None, :]
        at_row = (start + row)[:, None]
        for g in tl.static_range(GATES):
            d_at = d_gx + at_row * stride * GATES + (g * H + unit)[None, :]
            tl.store(d_at, d_x[g].to(d_gx.dtype.element_ty), mask=valid)
        if d_g_last is not None:
            d_at = d_g_last + at_row * stride + unit[None, :]
            tl.store(d_at, d_g[GATES - 1].to(d_gx.dtype.element_ty), mask=valid)

        if DOT:
            for g in tl.static_range(GATES):
                d_direct = tl.dot(d_g[g].to(w[g].dtype), w[g], acc=d_direct, input_precision=PRECISION)
        else:
            terms = d_g[0][:, :, None] * w[0][None, :, :].to(tl.float32)
            for g in tl.static_range(1, GATES):
                terms += d_g[g][:, :, None] * w[g][None, :, :].to(tl.float32)
            d_direct += tl.sum(terms, axis=1)
        d_h = tl.where(valid, d_direct, d_h)
        d_c = tl.where(valid, d_c_before, d_c)
        read = read_next
        start = start_before
        size = size_before
        start_before = start_next
        size_before = size_next

    tl.store(d_h_0 + state, d_h.to(d_h_0.dtype.element_ty), mask=in_batch)
    if c_0 is not None:
        tl.store(d_c_0 + state, d_c.to(d_c_0.dtype.element_ty), mask=in_batch)
