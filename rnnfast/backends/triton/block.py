"""The block scan: one program walks all steps of a tile of batch rows of one lane, with W_hh resident.

The state never leaves the program; the only traffic a step is gx in and the output (and tape) out. Units are padded to
a power of two; `w_hh` comes padded with zeros, (D, G, UNITS, UNITS), so padded units never reach a real one.

What a step takes is latency: that of the exchange of the state between warps, of the sums, and of the gates' math, one
after the other. So warps exchange all they can at once, since they wait for one another each time; what is loaded is
asked for a step before it is used, and what is stored goes while the exchanged state is under way.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton concatenates tuples, and cannot unpack them)

import triton
import triton.language as tl

from rnnfast.backends.triton.access import SLICES, gx_rows, load_gates, load_step, step_rows, store_tape, three_steps


@triton.jit
def operands(values, DOT: tl.constexpr):
    """Values (rows, K) as they are multiplied by w (K, units): with `tl.dot` as they are, else (rows, K, 1) each.

    Without `tl.dot` warps exchange them here: four of them at once, three in two turns.
    """
    if DOT:
        return values
    elif len(values) == 4:
        pairs = tl.join(tl.join(values[0], values[1]), tl.join(values[2], values[3]))
        pair_0, pair_1 = tl.split(pairs[:, :, None, :, :])
        value_0, value_1 = tl.split(pair_0)
        value_2, value_3 = tl.split(pair_1)
        return value_0, value_1, value_2, value_3
    elif len(values) == 3:
        value_0, value_1 = tl.split(tl.join(values[0], values[1])[:, :, None, :])
        return value_0, value_1, values[2][:, :, None]
    else:
        return (values[0][:, :, None],)


@triton.jit
def add_3(a_0, a_1, a_2, b_0, b_1, b_2):
    return a_0 + b_0, a_1 + b_1, a_2 + b_2


@triton.jit
def add_4(a_0, a_1, a_2, a_3, b_0, b_1, b_2, b_3):
    return a_0 + b_0, a_1 + b_1, a_2 + b_2, a_3 + b_3


@triton.jit
def sum_in_halves(terms):
    """The sum of (rows, K, units) over K, in two chains of additions, each of which waits for the one before."""
    count: tl.constexpr = min(2, terms.shape[1])
    halves = tl.reshape(terms, (terms.shape[0], count, terms.shape[1] // count, terms.shape[2]))
    return tl.sum(tl.sum(halves, axis=2), axis=1)


@triton.jit
def products(a, w, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Returns an operand times each gate's w (K, units), accumulated in float32: by `tl.dot`, or multiplied and summed.

    `tl.dot` pads rows to 16 and needs tensor cores to pay; for float32 as such the sum keeps w in registers.
    """
    p = ()
    for g in tl.static_range(len(w)):
        if DOT:
            p = p + (tl.dot(a.to(w[g].dtype), w[g], input_precision=PRECISION),)
        else:
            p = p + (a * w[g][None, :, :].to(tl.float32),)
    if DOT:
        return p
    elif len(w) == 4:
        return tl.reduce(p, 1, add_4)
    elif len(w) == 3:
        return tl.reduce(p, 1, add_3)
    else:
        return (sum_in_halves(p[0]),)


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

    direction = tl.cast(1 - 2 * backwards, tl.int64)
    first = tl.cast(backwards * (T - 1), tl.int64)
    # A step ends with the product for the next one, so an empty step comes first, for the product of h_0.
    now, then, later = three_steps(first - direction, direction, T, B, offsets)
    rows_next = gx_rows(then[0] + row, row < then[1], ids)
    x = ()
    a = ()
    for _ in tl.static_range(GATES):
        x = x + (tl.zeros_like(h),)
        a = a + (tl.zeros_like(h),)
    for i in range(-1, T):
        t = first + i * direction
        if offsets is None:
            now, then, later = three_steps(t, direction, T, B, offsets)
        start, size = now
        x_next = load_gates(gx, rows_next, row < then[1], None, gx_stride, unit, H, GATES)

        h_new, c_new, saved = CELL(x, a, h, c)
        valid = (row < size)[:, None] & in_units[None, :]
        h = tl.where(valid, h_new, h)
        c = tl.where(valid, c_new, c)
        operand = operands((h,), DOT)[0]

        at_row = (start + row)[:, None]
        tl.store(output + at_row * D * H + unit[None, :], h.to(output.dtype.element_ty), mask=valid)
        if tape is not None:
            store_tape(tape, saved, at_row, unit, valid, H, TAPE)
        rows_next = gx_rows(later[0] + row, row < later[1], ids)
        now = then
        then = later
        later = step_rows(t + 3 * direction, T, B, offsets)

        p = products(operand, w, DOT, PRECISION)
        a = ()
        for g in tl.static_range(GATES):
            a = a + (p[g] + b[g][None, :] if b_hh is not None else p[g],)
        x = x_next

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

    direction = tl.cast(2 * backwards - 1, tl.int64)
    first = tl.cast((1 - backwards) * (T - 1), tl.int64)
    now, then, later = three_steps(first, direction, T, B, offsets)
    read = load_step(tape, output, d_output, row, unit, *now, *then, h_first, c_first, H, stride, TAPE)
    for i in range(T):
        t = first + i * direction
        if offsets is None:
            now, then, later = three_steps(t, direction, T, B, offsets)
        start, size = now
        latest = step_rows(t + 3 * direction, T, B, offsets)
        read_next = load_step(tape, output, d_output, row, unit, *then, *later, h_first, c_first, H, stride, TAPE)

        saved, h_after, d_out, h_before, c_before = read
        d_x, d_g, d_direct, d_c_before = CELL(d_h + d_out, d_c, saved, h_after, h_before, c_before)
        operand = operands(d_g, DOT)

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
                d_direct = tl.dot(operand[g].to(w[g].dtype), w[g], acc=d_direct, input_precision=PRECISION)
        else:
            terms = operand[0] * w[0][None, :, :].to(tl.float32)
            for g in tl.static_range(1, GATES):
                terms += operand[g] * w[g][None, :, :].to(tl.float32)
            d_direct += sum_in_halves(terms) if GATES == 1 else tl.sum(terms, axis=1)
        d_h = tl.where(valid, d_direct, d_h)
        d_c = tl.where(valid, d_c_before, d_c)
        read = read_next
        now = then
        then = later
        later = latest

    tl.store(d_h_0 + state, d_h.to(d_h_0.dtype.element_ty), mask=in_batch)
    if c_0 is not None:
        tl.store(d_c_0 + state, d_c.to(d_c_0.dtype.element_ty), mask=in_batch)
