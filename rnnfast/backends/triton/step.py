"""The step-fused scan, for W_hh too large to stay in one program: recurrent product and gate math in one kernel.

A program owns a block of units of a tile of batch rows, all gates, and runs the steps `first_step`..`last_step` - 1.
The same kernel is launched in one of two ways:

- once for all steps (SYNCHRONISE), where all programs fit the device at once (a cooperative launch): programs that
  share a row tile wait for one another after each step, through a counter in global memory;
- once a step, anywhere else: the launch order is the barrier. Triton's interpreter runs programs one after another, so
  there this is the only way.

The state passes between programs through global memory, as the product takes it, in the type of `w_hh`. That comes
padded with zeros to `padded` units, a multiple of all tiles, (D, G, padded, padded); a program reads its share of it
once (RESIDENT: DEPTH = padded) or again at each step.

FMA: products are float32 without TF32, chains of multiply-adds and not tensor cores'. Their rounding errors grow with
the chain, so each CHAIN of k has a sum of its own. The forward then takes each gate's `w_hh` transposed, because tiles
read along k would lie in shared memory so that 16 threads wait for the same bank.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton concatenates tuples, and cannot unpack them)

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from rnnfast.backends.triton.access import SLICES, load_gates, load_step, step_rows, store_tape

CHAIN = tl.constexpr(64)


@triton.jit
def arrive(arrivals):
    """The first half of a barrier among the programs that share `arrivals`: others may read what was written before."""
    tl.debug_barrier()
    tl.atomic_add(arrivals, 1, sem="release")


@triton.jit
def wait_for_peers(arrivals, expected):
    """The second half: `arrivals`, which only grows, reaches `expected`. What comes between them hides latency."""
    seen = tl.atomic_add(arrivals, 0, sem="acquire")
    while seen < expected:
        seen = tl.atomic_add(arrivals, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def load_weights(w_hh, g, k, unit, padded, ALONG_UNITS: tl.constexpr):
    """A tile (k, units) of gate g, whose matrix lies with k (ALONG_UNITS) or with the units as its rows."""
    if ALONG_UNITS:
        at = (g * padded + k)[:, None] * padded + unit[None, :]
    else:
        at = (g * padded + unit)[None, :] * padded + k[:, None]
    return tl.load(w_hh + at)


@triton.jit
def load_states(states, in_batch, k, PIECES: tl.constexpr):
    """Pieces of rows of h, of the units k and as many after them, and so on: asked for all at once.

    They are read past the first-level cache, which other programs' writes do not reach.
    """
    h = ()
    for j in tl.static_range(PIECES):
        at = states + (k + j * k.shape[0])[None, :]
        h = h + (tl.load(at, mask=in_batch[:, None], other=0.0, cache_modifier=".cg"),)
    return h


@triton.jit
def opaque(x):
    """Returns the float32 x, by an instruction of NVIDIA's cards that does nothing, which LLVM cannot look into.

    Where it sees products and the additions behind them, Triton 3.9 lets it merge those of neighbouring elements into
    vectors, and then spills registers by the kilobyte.
    """
    return tl.inline_asm_elementwise("// $0", "=r,0", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def round_to_tf32(x):
    """Returns the float32 x rounded to TF32's 10 bits, ties away from zero; tensor cores would cut the others off.

    NaN stays what it is: in NVIDIA's own, all bits are set, and adding to them would make a zero of it.
    """
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def add_product(total, a, w, FMA: tl.constexpr, PRECISION: tl.constexpr):
    """Returns total + a w; for TF32, w is rounded already."""
    if FMA:
        # Told of no limit, the compiler makes the total the start of the product's own chain.
        product = tl.dot(a, w, input_precision=PRECISION, max_num_imprecise_acc=CHAIN)
        if is_cuda():
            product = opaque(product)
        return total + product
    else:
        a = round_to_tf32(a) if PRECISION == "tf32" else a.to(w.dtype)
        return tl.dot(a, w, acc=total, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=["first_step", "last_step", "T", "B", "D", "N"],
    do_not_specialize_on_alignment=SLICES,
)
def scan_forward(
    gx,
    ids,
    w_hh,
    b_hh,
    offsets,
    output,
    h_n,
    c_n,
    tape,
    operand,
    h_state,
    c_state,
    arrivals,
    first_step,
    last_step,
    T,
    B,
    D,
    N,
    H,
    padded,
    bidirectional,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    TAPE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    FMA: tl.constexpr,
    SYNCHRONISE: tl.constexpr,
):
    """`operand` (2, D, B, padded) holds h before even and odd steps, as it is multiplied; h_state and c_state (D, B, H)
    the states from one launch to the next: within a launch a program keeps what is only its own.
    """
    lane = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    in_units = unit < H
    lane64 = lane.to(tl.int64)
    backwards = bidirectional & (lane % 2)

    state = (lane64 * B + row)[:, None] * H + unit[None, :]
    in_batch = (row < B)[:, None] & in_units[None, :]
    h_row = (lane64 * B + row)[:, None] * padded
    h_size = D.to(tl.int64) * B * padded
    w_hh += lane64 * GATES * padded * padded
    gx += lane * GATES * H
    gx_stride = D.to(tl.int64) * GATES * H
    output += lane * H
    if tape is not None:
        tape += lane64 * N * TAPE * H

    PIECE: tl.constexpr = CHAIN if FMA and DEPTH > CHAIN else DEPTH
    k = tl.arange(0, PIECE)
    w = ()
    if RESIDENT:
        for j in tl.static_range(DEPTH // PIECE):
            for g in tl.static_range(GATES):
                w = w + (load_weights(w_hh, g, k + j * PIECE, unit, padded, ALONG_UNITS=FMA),)

    b = ()
    if b_hh is not None:
        for g in tl.static_range(GATES):
            b = b + (tl.load(b_hh + (lane * GATES + g) * H + unit, mask=in_units, other=0.0).to(tl.float32),)

    direction = 1 - 2 * backwards
    first = backwards * (T - 1)
    if SYNCHRONISE:
        arrivals += (lane * tl.num_programs(1) + tl.program_id(1)) * 16
    start, size = step_rows(first + first_step * direction, T, B, offsets)
    x = load_gates(gx, start + row, row < size, ids, gx_stride, unit, H, GATES)
    h = tl.load(h_state + state, mask=in_batch, other=0.0)
    c = h
    if c_state is not None:
        c = tl.load(c_state + state, mask=in_batch, other=0.0)
    # Asked for as soon as peers have written it, before x moves to where the product's result lies; in float32 its
    # registers are missing elsewhere.
    EARLY: tl.constexpr = RESIDENT and not FMA
    if EARLY:
        h_k = load_states(operand + (first_step % 2) * h_size + h_row, row < B, k, DEPTH // PIECE)
    for i in range(first_step, last_step):
        h_read = operand + (i % 2) * h_size + h_row
        a = ()
        for _ in tl.static_range(GATES):
            a = a + (tl.zeros((ROWS, UNITS), tl.float32),)
        if RESIDENT:
            if not EARLY:
                h_k = load_states(h_read, row < B, k, DEPTH // PIECE)
            for j in tl.static_range(DEPTH // PIECE):
                sums = ()
                for g in tl.static_range(GATES):
                    sums = sums + (add_product(a[g], h_k[j], w[j * GATES + g], FMA, PRECISION),)
                a = sums
        else:
            for k_first in range(0, H, DEPTH):
                h_part = load_states(h_read, row < B, k_first + k, 1)[0]
                sums = ()
                for g in tl.static_range(GATES):
                    w_k = load_weights(w_hh, g, k_first + k, unit, padded, ALONG_UNITS=FMA)
                    sums = sums + (add_product(a[g], h_part, w_k, FMA, PRECISION),)
                a = sums
        if b_hh is not None:
            sums = ()
            for g in tl.static_range(GATES):
                sums = sums + (a[g] + b[g][None, :],)
            a = sums

        h_new, c_new, saved = CELL(x, a, h, c)
        valid = (row < size)[:, None] & in_units[None, :]
        h = tl.where(valid, h_new, h)
        c = tl.where(valid, c_new, c)
        h_at = operand + ((i + 1) % 2) * h_size + h_row + unit[None, :]
        tl.store(h_at, h.to(operand.dtype.element_ty), mask=in_batch)
        if SYNCHRONISE:
            arrive(arrivals)
        else:
            tl.store(h_state + state, h, mask=in_batch)
            if c_state is not None:
                tl.store(c_state + state, c, mask=in_batch)
        at_row = (start + row)[:, None]
        tl.store(output + at_row * D * H + unit[None, :], h.to(output.dtype.element_ty), mask=valid)
        if tape is not None:
            store_tape(tape, saved, at_row, unit, valid, H, TAPE)

        if i == T - 1:
            tl.store(h_n + state, h.to(h_n.dtype.element_ty), mask=in_batch)
            if c_state is not None:
                tl.store(c_n + state, c.to(c_n.dtype.element_ty), mask=in_batch)
        if SYNCHRONISE:
            start, size = step_rows(first + (i + 1) * direction, T, B, offsets)
            x = load_gates(gx, start + row, row < size, ids, gx_stride, unit, H, GATES)
            wait_for_peers(arrivals, (i + 1 - first_step).to(tl.int64) * tl.num_programs(0))
            if EARLY:
                h_k = load_states(operand + ((i + 1) % 2) * h_size + h_row, row < B, k, DEPTH // PIECE)


@triton.jit(
    do_not_specialize=["first_step", "last_step", "T", "B", "D", "N"],
    do_not_specialize_on_alignment=SLICES,
)
def scan_backward(
    d_output,
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
    d_h_state,
    d_c_state,
    arrivals,
    first_step,
    last_step,
    T,
    B,
    D,
    N,
    H,
    padded,
    bidirectional,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    TAPE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    FMA: tl.constexpr,
    SYNCHRONISE: tl.constexpr,
):
    """Steps 0..T: step i adds to d_h what step i - 1's gates send back through W_hh, then runs the cell's backward.

    Step T has no rows of its own and so leaves the gradient of the initial state. d_h_state (D, B, H) holds the part
    of the gradient that does not pass through W_hh, d_c_state that of the cell state, from one launch to the next.
    """
    lane = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    in_units = unit < H
    lane64 = lane.to(tl.int64)
    backwards = bidirectional & (lane % 2)

    state = (lane64 * B + row)[:, None] * H + unit[None, :]
    in_batch = (row < B)[:, None] & in_units[None, :]
    h_first = tl.load(h_0 + state, mask=in_batch, other=0.0).to(tl.float32)
    c_first = None
    if c_0 is not None:
        c_first = tl.load(c_0 + state, mask=in_batch, other=0.0).to(tl.float32)

    stride = D.to(tl.int64) * H
    output += lane * H
    if d_output is not None:
        d_output += lane * H
    d_gx += lane * GATES * H
    if d_g_last is not None:
        d_g_last += lane * H
    if tape is not None:
        tape += lane64 * N * TAPE * H
    w_hh += lane64 * GATES * padded * padded

    PIECE: tl.constexpr = CHAIN if FMA and DEPTH > CHAIN else DEPTH
    k = tl.arange(0, PIECE)
    w = ()
    if RESIDENT:
        for j in tl.static_range(DEPTH // PIECE):
            for g in tl.static_range(GATES):
                w = w + (load_weights(w_hh, g, k + j * PIECE, unit, padded, ALONG_UNITS=True),)

    if SYNCHRONISE:
        arrivals += (lane * tl.num_programs(1) + tl.program_id(1)) * 16
    d_h = tl.load(d_h_state + state, mask=in_batch, other=0.0)
    d_c = d_h
    if c_0 is not None:
        d_c = tl.load(d_c_state + state, mask=in_batch, other=0.0)
    direction = 1 - 2 * backwards
    first = (1 - backwards) * (T - 1)
    start, size = step_rows(first - first_step * direction, T, B, offsets)
    start_before, size_before = step_rows(first - (first_step + 1) * direction, T, B, offsets)
    saved, h_after, d_out, h_before, c_before = load_step(
        tape, output, d_output, row, unit, start, size, start_before, size_before, h_first, c_first, H, stride, TAPE
    )
    for i in range(first_step, last_step):
        t = first - i * direction
        start_done, size_done = step_rows(t + direction, T, B, offsets)
        d_back = tl.zeros((ROWS, UNITS), tl.float32)
        for g in tl.static_range(GATES):
            if g == GATES - 1 and d_g_last is not None:
                d_done = d_g_last + (start_done + row)[:, None] * stride
            else:
                d_done = d_gx + (start_done + row)[:, None] * stride * GATES + g * H
            if RESIDENT:
                d_k = ()
                for j in tl.static_range(DEPTH // PIECE):
                    d_mask = (row < size_done)[:, None] & (k + j * PIECE < H)[None, :]
                    d_at = d_done + (k + j * PIECE)[None, :]
                    d_k = d_k + (tl.load(d_at, mask=d_mask, other=0.0, cache_modifier=".cg"),)
                for j in tl.static_range(DEPTH // PIECE):
                    d_back = add_product(d_back, d_k[j], w[j * GATES + g], FMA, PRECISION)
            else:
                for k_first in range(0, H, DEPTH):
                    d_mask = (row < size_done)[:, None] & (k_first + k < H)[None, :]
                    d_k = tl.load(d_done + (k_first + k)[None, :], mask=d_mask, other=0.0, cache_modifier=".cg")
                    w_k = load_weights(w_hh, g, k_first + k, unit, padded, ALONG_UNITS=True)
                    d_back = add_product(d_back, d_k, w_k, FMA, PRECISION)

        # Added last, so that its size adds nothing to the rounding errors of the sum.
        d_h += d_back
        d_x, d_g, d_direct, d_c_before = CELL(d_h + d_out, d_c, saved, h_after, h_before, c_before)
        valid = (row < size)[:, None] & in_units[None, :]
        at_row = (start + row)[:, None]
        for g in tl.static_range(GATES):
            d_at = d_gx + at_row * stride * GATES + (g * H + unit)[None, :]
            tl.store(d_at, d_x[g].to(d_gx.dtype.element_ty), mask=valid)
        if d_g_last is not None:
            d_last_at = d_g_last + at_row * stride + unit[None, :]
            tl.store(d_last_at, d_g[GATES - 1].to(d_gx.dtype.element_ty), mask=valid)
        if SYNCHRONISE:
            arrive(arrivals)
        d_h = tl.where(valid, d_direct, d_h)
        d_c = tl.where(valid, d_c_before, d_c)
        if not SYNCHRONISE:
            tl.store(d_h_state + state, d_h, mask=in_batch)
            if c_0 is not None:
                tl.store(d_c_state + state, d_c, mask=in_batch)

        if i == T:
            tl.store(d_h_0 + state, d_h.to(d_h_0.dtype.element_ty), mask=in_batch)
            if c_0 is not None:
                tl.store(d_c_0 + state, d_c.to(d_c_0.dtype.element_ty), mask=in_batch)
        if SYNCHRONISE:
            start, size = start_before, size_before
            start_before, size_before = step_rows(t - 2 * direction, T, B, offsets)
            saved, h_after, d_out, h_before, c_before = load_step(
                tape, output, d_output, row, unit, start, size, start_before, size_before, h_first, c_first, H, stride,
                TAPE,
            )  # fmt: skip
            wait_for_peers(arrivals, (i + 1 - first_step).to(tl.int64) * tl.num_programs(0))
