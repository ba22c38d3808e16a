"""How the scan kernels address memory: the rows of a step, the gates' inputs, the tape, and what the backward reads.

Rows are time-major, as in `PackedSequence.data`; row numbers are 64-bit. Optional pointers are None, which a kernel
sees while it is compiled.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton concatenates tuples, and cannot unpack them)

import triton
import triton.language as tl

# Arguments that are slices, such as a layer's part of all layers' states: their alignment depends on the batch, and is
# not worth a variant of a kernel, because they are read once or one value at a time.
SLICES = ("ids", "h_0", "c_0", "d_h_n", "d_c_n")


@triton.jit
def step_rows(t, T, B, offsets):
    """First row and number of rows of step t; a step outside 0..T-1 has none."""
    inside = (t >= 0) & (t < T)
    if offsets is not None:
        start = tl.load(offsets + t, mask=inside, other=0)
        end = tl.load(offsets + t + 1, mask=inside, other=0)
        return start, (end - start).to(tl.int32)
    else:
        return t.to(tl.int64) * B, tl.where(inside, B, 0)


@triton.jit
def three_steps(t, direction, T, B, offsets):
    """`step_rows` of step t and of the two after it in a direction.

    Who loops over steps keeps those of packed sequences, loaded ahead, and otherwise asks for them at each step: what
    is linear in t is then added up from step to step, without a multiplication.
    """
    return (
        step_rows(t, T, B, offsets),
        step_rows(t + direction, T, B, offsets),
        step_rows(t + 2 * direction, T, B, offsets),
    )


@triton.jit
def gx_rows(rows, valid, ids):
    """Which rows of gx are some rows' input: the same, or for token ids rows of the table w_ih^T + b_ih."""
    if ids is not None:
        rows = tl.load(ids + rows, mask=valid, other=0)
    return rows


@triton.jit
def load_gates(base, rows, valid, ids, stride, unit, H, GATES: tl.constexpr):
    """The gates' input pre-activations of some rows; `ids` is None for rows that come from `gx_rows`."""
    rows = gx_rows(rows, valid, ids)
    x = ()
    for g in tl.static_range(GATES):
        at = base + (rows * stride)[:, None] + (g * H + unit)[None, :]
        x = x + (tl.load(at, mask=valid[:, None] & (unit < H)[None, :], other=0.0).to(tl.float32),)
    return x


@triton.jit
def store_tape(tape, saved, at_row, unit, valid, H, TAPE: tl.constexpr):
    """Stores what the backward reads of one step, whose rows are `at_row`, (rows, 1)."""
    for s in tl.static_range(TAPE):
        at = tape + at_row * TAPE * H + (s * H + unit)[None, :]
        tl.store(at, saved[s].to(tape.dtype.element_ty), mask=valid)


@triton.jit
def load_step(
    tape,
    output,
    d_output,
    row,
    unit,
    start,
    size,
    start_before,
    size_before,
    h_first,
    c_first,
    H,
    output_stride,
    TAPE: tl.constexpr,
):
    """What the backward of one step reads: tape, output, its gradient, and the states before, all in float32."""
    in_units = (unit < H)[None, :]
    valid = (row < size)[:, None] & in_units
    at = (start + row)[:, None]
    saved = ()
    for s in tl.static_range(TAPE):
        saved_at = tape + at * TAPE * H + (s * H + unit)[None, :]
        saved = saved + (tl.load(saved_at, mask=valid, other=0.0).to(tl.float32),)
    h_after = tl.load(output + at * output_stride + unit[None, :], mask=valid, other=0.0).to(tl.float32)
    d_h = tl.zeros_like(h_after)
    if d_output is not None:
        d_h = tl.load(d_output + at * output_stride + unit[None, :], mask=valid, other=0.0).to(tl.float32)

    # A row whose sequence begins at this step was preceded by its initial state.
    continued = (row < size_before)[:, None] & in_units
    at_before = (start_before + row)[:, None]
    h_before = tl.load(output + at_before * output_stride + unit[None, :], mask=continued, other=0.0).to(tl.float32)
    h_before = tl.where(continued, h_before, h_first)
    c_before = h_before
    if c_first is not None:
        # The cell state is the tape's last value.
        c_at = tape + at_before * TAPE * H + ((TAPE - 1) * H + unit)[None, :]
        c_before = tl.load(c_at, mask=continued, other=0.0).to(tl.float32)
        c_before = tl.where(continued, c_before, c_first)
    return saved, h_after, d_h, h_before, c_before
