"""The gates of one step, where the recurrent product is torch's GEMM: elementwise, one launch a step.

A CUDA graph repeats its launches with the arguments they had when it was captured. What changes from one call to the
next is therefore read from a table in device memory, which `begin` fills: entry 0 counts the steps of the graph's
earlier replays, entries 1 and 2 are T and N, and the others are addresses.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton concatenates tuples, and cannot unpack them)

import triton
import triton.language as tl

from rnnfast.backends.triton.access import load_gates, load_step, step_rows, store_tape

FIRST_ADDRESS = tl.constexpr(3)
ADDRESSES = 8


@triton.jit(do_not_specialize=range(1, 11))  # all but the table
def begin(
    table,
    T: tl.int64,
    N: tl.int64,
    address_0: tl.int64,
    address_1: tl.int64,
    address_2: tl.int64,
    address_3: tl.int64,
    address_4: tl.int64,
    address_5: tl.int64,
    address_6: tl.int64,
    address_7: tl.int64,
):
    """Fills the table for a scan; the addresses are those that `step_forward` or `step_backward` reads, in order.

    They come as numbers, and one by one, so that no tensor's type, alignment or absence makes a variant of the kernel.
    """
    values = (0, T, N, address_0, address_1, address_2, address_3, address_4, address_5, address_6, address_7)
    for i in tl.static_range(len(values)):
        tl.store(table + i, values[i])


@triton.jit
def address(table, index: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """One of the addresses given to `begin`, as a pointer.

    ALIGNED, to 16 bytes: asked of what is read or written row by row. Initial states are slices of all layers' states,
    so that their alignment depends on the batch, which shall make no variant.
    """
    pointer = tl.load(table + FIRST_ADDRESS + index).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["i", "B", "D"])
def step_forward(
    table,
    product,
    h_state,
    c_state,
    operand,
    i,
    B,
    D,
    H,
    bidirectional,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    TAPE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    IDS: tl.constexpr,
    BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Step i, forwards: `product` (D, B, G*H) is w_hh h, h_state and c_state (D, B, H) are advanced in place.

    `operand` takes the new h, rounded for the next product; its type is the layer's.
    """
    lane = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    lane64 = lane.to(tl.int64)
    backwards = bidirectional & (lane % 2)
    dtype: tl.constexpr = operand.dtype.element_ty

    i += tl.load(table)
    T = tl.load(table + 1)
    N = tl.load(table + 2)
    gx = address(table, 0, tl.float32, ALIGNED)
    output = address(table, 1, dtype, ALIGNED)
    ids = None
    if IDS:
        ids = address(table, 2, tl.int64)
    b_hh = None
    if BIAS:
        b_hh = address(table, 3, dtype, ALIGNED)
    offsets = None
    if RAGGED:
        offsets = address(table, 4, tl.int64)

    t = backwards * (T - 1) + i * (1 - 2 * backwards)
    start, size = step_rows(t, T, B, offsets)
    x = load_gates(gx + lane64 * GATES * H, start + row, row < size, ids, D.to(tl.int64) * GATES * H, unit, H, GATES)

    in_units = (unit < H)[None, :]
    valid = (row < size)[:, None] & in_units
    batch_row = (lane64 * B + row)[:, None]
    state = batch_row * H + unit[None, :]
    a = ()
    for g in tl.static_range(GATES):
        p = tl.load(product + batch_row * GATES * H + (g * H + unit)[None, :], mask=valid, other=0.0)
        if b_hh is not None:
            b = tl.load(b_hh + (lane64 * GATES + g) * H + unit, mask=unit < H, other=0.0)
            p += b.to(tl.float32)[None, :]
        a = a + (p,)
    h = tl.load(h_state + state, mask=valid, other=0.0)
    c = h
    if c_state is not None:
        c = tl.load(c_state + state, mask=valid, other=0.0)

    h, c, saved = CELL(x, a, h, c)
    tl.store(h_state + state, h, mask=valid)
    if dtype != tl.float32:  # elsewhere the operand is the state itself
        tl.store(operand + state, h.to(dtype), mask=valid)
    if c_state is not None:
        tl.store(c_state + state, c, mask=valid)
    at_row = (start + row)[:, None]
    tl.store(output + lane64 * H + at_row * D * H + unit[None, :], h.to(dtype), mask=valid)
    if SAVE:
        tape = address(table, 5, dtype, ALIGNED) + lane64 * N * TAPE * H
        store_tape(tape, saved, at_row, unit, valid, H, TAPE)


@triton.jit(do_not_specialize=["i", "B", "D"])
def step_backward(
    table,
    product,
    d_h_state,
    d_c_state,
    operand,
    i,
    B,
    D,
    H,
    bidirectional,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    TAPE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    D_OUTPUT: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Step i, backwards: `product` (D, B, H) is what the step before sent back through W_hh.

    `operand` (D, B, G*H) takes this step's gate gradients for the next product, zero where a row has no such step.
    SPLIT: the last gate's recurrent gradient differs from the input's (the GRU's n).
    """
    lane = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    lane64 = lane.to(tl.int64)
    backwards = bidirectional & (lane % 2)
    dtype: tl.constexpr = operand.dtype.element_ty

    i += tl.load(table)
    T = tl.load(table + 1)
    N = tl.load(table + 2)
    h_0 = address(table, 0, dtype)
    output = address(table, 1, dtype, ALIGNED) + lane64 * H
    d_gx = address(table, 2, dtype, ALIGNED) + lane64 * GATES * H
    d_output = None
    if D_OUTPUT:
        d_output = address(table, 3, dtype, ALIGNED) + lane64 * H
    tape = None
    if TAPE:
        tape = address(table, 4, dtype, ALIGNED) + lane64 * N * TAPE * H
    offsets = None
    if RAGGED:
        offsets = address(table, 5, tl.int64)

    direction = 1 - 2 * backwards
    t = (1 - backwards) * (T - 1) - i * direction
    start, size = step_rows(t, T, B, offsets)
    start_before, size_before = step_rows(t - direction, T, B, offsets)

    in_units = (unit < H)[None, :]
    in_batch = (row < B)[:, None] & in_units
    batch_row = (lane64 * B + row)[:, None]
    state = batch_row * H + unit[None, :]
    begins = in_batch & (row >= size_before)[:, None]
    h_first = tl.load(h_0 + state, mask=begins, other=0.0).to(tl.float32)
    c_first = None
    if d_c_state is not None:
        c_0 = address(table, 6, dtype)
        c_first = tl.load(c_0 + state, mask=begins, other=0.0).to(tl.float32)
    stride = D.to(tl.int64) * H
    saved, h_after, d_out, h_before, c_before = load_step(
        tape, output, d_output, row, unit, start, size, start_before, size_before, h_first, c_first, H, stride, TAPE
    )

    d_h = tl.load(d_h_state + state, mask=in_batch, other=0.0) + tl.load(product + state, mask=in_batch, other=0.0)
    d_c = d_h
    if d_c_state is not None:
        d_c = tl.load(d_c_state + state, mask=in_batch, other=0.0)
    d_x, d_g, d_direct, d_c_before = CELL(d_h + d_out, d_c, saved, h_after, h_before, c_before)

    valid = (row < size)[:, None] & in_units
    tl.store(d_h_state + state, tl.where(valid, d_direct, d_h), mask=in_batch)
    if d_c_state is not None:
        tl.store(d_c_state + state, d_c_before, mask=valid)
    at_row = (start + row)[:, None]
    for g in tl.static_range(GATES):
        tl.store(d_gx + at_row * stride * GATES + (g * H + unit)[None, :], d_x[g].to(dtype), mask=valid)
        operand_at = operand + batch_row * GATES * H + (g * H + unit)[None, :]
        tl.store(operand_at, tl.where(valid, d_g[g], 0.0).to(dtype), mask=in_batch)
    if SPLIT:
        d_g_last = address(table, 7, dtype, ALIGNED)
        d_last_at = d_g_last + lane64 * H + at_row * stride + unit[None, :]
        tl.store(d_last_at, d_g[GATES - 1].to(dtype), mask=valid)
