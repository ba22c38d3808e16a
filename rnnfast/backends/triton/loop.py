"""The time loop of torch's GEMM and the gates' kernel (gates.py), and the CUDA graphs that repeat it.

A step is two launches, which may take the host longer than the GPU. A loop that comes a second time is therefore kept,
with GRAPH_STEPS of its steps captured as one CUDA graph. It is replayed as often as it goes into T, so the same graph
serves any T, and any addresses (see gates.py); the few steps left over are launched one by one.

A graph holds the addresses of its loop's own buffers, so kept loops cost memory: a copy of W_hh and some batches of
states each, KEPT of them at most, the longest unused going first. They belong to one stream, on which their uses follow
one another and their memory is handed back in order.
"""

from __future__ import annotations

import atexit
import threading
import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rnnfast.backends import products
from rnnfast.backends.gpu_scan import ScanShape
from rnnfast.backends.triton import cells, gates
from rnnfast.backends.triton.plan import Plan
from rnnfast.cells import CELLS

GRAPH_STEPS = 8
KEPT = 8


class Scan(NamedTuple):
    """All that a loop's buffers and launches depend on. `flags` are the kernel's: which optional tensors there are."""

    forward: bool
    cell: str
    dtype: torch.dtype
    device: torch.device
    lanes: int
    batch: int
    hidden: int
    bidirectional: int
    how: Plan
    flags: tuple[tuple[str, bool], ...]


def forward(
    cell: str,
    how: Plan,
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
    addresses = (gx, output, ids, b_hh, shape.offsets, tape)
    flags = {
        "IDS": ids is not None,
        "BIAS": b_hh is not None,
        "RAGGED": shape.offsets is not None,
        "SAVE": tape is not None,
    }
    loop = _loop_for(_scan(True, cell, how, shape, h_0, (gx, output, b_hh, tape), flags), shape.steps)
    with loop.lock:
        loop.begin(shape, addresses, w_hh, h_0, c_0)
        if loop.operand is not loop.h:
            loop.operand.copy_(h_0)
        loop.run(shape.steps)
        h_n.copy_(loop.h)
        if c_n is not None:
            c_n.copy_(loop.c)


def backward(
    cell: str,
    how: Plan,
    shape: ScanShape,
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
    addresses = (h_0, output, d_gx, d_output, tape, shape.offsets, c_0, d_g_last)
    flags = {
        "D_OUTPUT": d_output is not None,
        "RAGGED": shape.offsets is not None,
        "SPLIT": d_g_last is not None,
    }
    by_row = (output, d_gx, d_output, tape, d_g_last)
    loop = _loop_for(_scan(False, cell, how, shape, h_0, by_row, flags), shape.steps)
    with loop.lock:
        loop.begin(shape, addresses, w_hh, d_h_n, d_c_n)
        loop.product.zero_()
        loop.run(shape.steps)
        d_h_0.copy_(loop.h.add_(loop.product))
        if d_c_0 is not None:
            d_c_0.copy_(loop.c)


def _scan(
    forward: bool, cell: str, how: Plan, shape: ScanShape, h_0: Tensor, by_row: Any, flags: dict[str, bool]
) -> Scan:
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in by_row if tensor is not None)
    return Scan(
        forward,
        cell,
        h_0.dtype,
        h_0.device,
        shape.lanes,
        shape.batch,
        shape.hidden,
        shape.bidirectional,
        how,
        tuple({**flags, "ALIGNED": aligned}.items()),
    )


class Loop:
    """The buffers that the steps of a scan share, and their launches; `graph` repeats GRAPH_STEPS of them."""

    def __init__(self, scan: Scan, own_weights: bool = False) -> None:
        cell = CELLS[scan.cell]
        state = (scan.lanes, scan.batch, scan.hidden)
        by_gate = (scan.lanes, scan.batch, cell.gates * scan.hidden)

        def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=scan.device)

        self.scan = scan
        self.lock = threading.Lock()
        self.graph: Any = None
        self.table = empty((16,), torch.int64)
        self.w_hh: Any = None
        if own_weights:
            self.w_hh = empty((scan.lanes, cell.gates * scan.hidden, scan.hidden), scan.dtype)
        self.h = empty(state)
        self.c: Any = empty(state) if cell.has_cell_state else None
        self.product = empty(by_gate if scan.forward else state)
        if scan.forward and scan.dtype is torch.float32:
            self.operand = self.h
        else:
            self.operand = empty(state if scan.forward else by_gate, scan.dtype)
        self._kernel = gates.step_forward if scan.forward else gates.step_backward
        self._grid = (triton.cdiv(scan.batch, scan.how.rows), triton.cdiv(scan.hidden, scan.how.units), scan.lanes)
        self._constants = {
            "CELL": (cells.FORWARD if scan.forward else cells.BACKWARD)[scan.cell],
            **scan.how.constants(scan.cell),
            **dict(scan.flags),
        }

    def begin(self, shape: ScanShape, addresses: Any, w_hh: Tensor, h: Tensor, c: Tensor | None) -> None:
        """Makes the buffers ready for a scan that starts from h and c."""
        numbers = [0 if tensor is None else tensor.data_ptr() for tensor in addresses]
        numbers += [0] * (gates.ADDRESSES - len(numbers))
        gates.begin[(1,)](self.table, shape.steps, shape.rows, *numbers, num_warps=1, enable_fp_fusion=True)
        if self.graph is None:
            self.w_hh = w_hh
        else:
            self.w_hh.copy_(w_hh)
        self.h.copy_(h)
        if c is not None:
            self.c.copy_(c)

    def run(self, steps: int) -> None:
        """Runs all steps of a scan."""
        replays = 0 if self.graph is None else steps // GRAPH_STEPS
        for _ in range(replays):
            self.graph.replay()
        for i in range(steps - replays * GRAPH_STEPS):
            self._step(i)

    def graph_steps(self) -> None:
        """What the graph repeats."""
        for i in range(GRAPH_STEPS):
            self._step(i)
        self.table[:1].add_(GRAPH_STEPS)

    def _step(self, i: int) -> None:
        if self.scan.forward:
            products.recurrent_product(self.operand, self.w_hh.mT, self.product)
        sizes = (self.scan.batch, self.scan.lanes, self.scan.hidden, self.scan.bidirectional)
        self._kernel[self._grid](self.table, self.product, self.h, self.c, self.operand, i, *sizes, **self._constants)
        if not self.scan.forward:
            products.recurrent_product(self.operand, self.w_hh, self.product)


# ---- loops that are kept -------------------------------------------------------------------------------------------

# The newest last; None for a scan that has come once.
_kept: OrderedDict[Any, Loop | None] = OrderedDict()
_not_captured: set[Any] = set()  # those of which a graph could not be made
_lock = threading.Lock()
# Where the graphs of a stream are captured: another stream, and the memory that torch's GEMMs need on it.
_places: dict[torch.cuda.Stream, tuple[torch.cuda.Stream, torch.cuda.MemPool]] = {}


@atexit.register
def _release() -> None:
    """Lets go of the graphs and then of the pools, which must outlive them, while CUDA is still there."""
    _kept.clear()
    _places.clear()


def _loop_for(scan: Scan, steps: int) -> Loop:
    stream = _stream_to_keep_for(scan.device) if steps >= GRAPH_STEPS else None
    if stream is None:
        return Loop(scan)
    matmul = torch.backends.cuda.matmul
    key = (
        scan,
        stream,
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
    with _lock:
        if key in _not_captured:
            return Loop(scan)
        seen = key in _kept
        loop = _kept.pop(key, None)
        if seen and loop is None:
            try:
                loop = _keep(scan, stream)
            except Exception as error:  # no memory, say, or an allocator that has no pools: a graph is not needed
                _not_captured.add(key)
                warnings.warn(
                    f"no CUDA graph can be made of this scan's steps, each is launched: {error}", stacklevel=2
                )
                return Loop(scan)
        _kept[key] = loop
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    return Loop(scan) if loop is None else loop


def _stream_to_keep_for(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream, or None where it takes no graph: without a GPU, and in a capture of the caller's own."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device)


def _keep(scan: Scan, stream: torch.cuda.Stream) -> Loop:
    """A loop with its graph, made in a thread of its own.

    What holds for the caller's thread only (a memory pool in use, such as that of torch.compile's CUDA graphs while
    they warm up; inference mode) must not hold for buffers that stay.
    """
    made: list[Any] = []

    def make() -> None:
        try:
            made.append(_capture(scan, stream))
        except Exception as error:  # raised again in the caller's thread
            made.append(error)

    # Not an executor, which takes no work once the interpreter has begun to end.
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], Exception):
        raise made[0]
    loop: Loop = made[0]
    return loop


def _capture(scan: Scan, stream: torch.cuda.Stream) -> Loop:
    with torch.cuda.device(scan.device), torch.cuda.stream(stream):
        loop = Loop(scan, own_weights=True)
        if stream not in _places:
            # Of high priority, as few programs' own are: torch hands out the same 32 streams of each in turn.
            aside = torch.cuda.Stream(priority=-1)
            if aside == stream:
                aside = torch.cuda.Stream(priority=-1)
            _places[stream] = (aside, torch.cuda.MemPool())
        aside, pool = _places[stream]
        # cuBLAS cannot be set up in a capture. Its workspace, on the other hand, must come from the graphs' own pool,
        # and so be asked for in a capture, because torch may free the one of a stream while a graph still uses it.
        torch.cuda.current_blas_handle()
        loop.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            # Other threads may go on allocating.
            loop.graph.capture_begin(pool=pool.id, capture_error_mode="thread_local")
            try:
                loop.graph_steps()
            finally:
                loop.graph.capture_end()
    return loop
