"""Rows and lanes past 2^31 values: the kernels address them in 64 bits.

Memory is only reserved, and what lies far behind each tensor's start is all that is ever touched.
"""

import mmap
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rnnfast.backends.gpu_scan import ScanShape
from rnnfast.backends.triton.plan import Plan
from tests.scans import random_layer

from .test_parity import KERNELS

HIDDEN, BATCH, LANES, GATES, TAPE = 16, 2, 2, 3, 4
FIRST_ROW = 2**31 // (LANES * HIDDEN) + 3
ROWS = FIRST_ROW + 3  # a step of two rows and one of one
PART = 2**36  # bytes: more than any tensor here, on either side of its start


class Far(NamedTuple):
    """A tensor's first value, and the rows that a test puts or finds far behind it: (lanes, rows, values)."""

    start: Tensor
    lanes: list[Tensor]

    def filled(self, rows: Tensor) -> Tensor:
        for lane, values in zip(self.lanes, rows, strict=True):
            lane.copy_(values)
        return self.start

    def rows(self) -> Tensor:
        return torch.stack(self.lanes)


def near(lanes: int, rows: int, width: int) -> Far:
    """The same for an ordinary tensor of these rows alone."""
    tensor = torch.zeros(lanes, rows, width)
    return Far(tensor, list(tensor))


class Memory:
    """Reserved, not allocated; every tensor has a part to itself, so that no wrapped address is another's."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        try:
            self._map = mmap.mmap(-1, 20 * PART, flags=flags)
        except OSError as error:
            pytest.skip(f"the system reserves no {20 * PART >> 40} TB of addresses: {error}")
        self._used = 0

    def tensor(self, lanes: int, rows: int, width: int) -> Far:
        """`rows` rows from FIRST_ROW on of a (lanes, ROWS, width) tensor of float32."""
        start = self._used + PART // 2
        self._used += PART

        def at(value: int, count: int) -> Tensor:
            return torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=start + 4 * value)

        far = [at((lane * ROWS + FIRST_ROW) * width, rows * width).view(rows, width) for lane in range(lanes)]
        return Far(at(0, 1), far)

    def lane(self, lane: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first lane of a tensor with `count` values for each lane, and the one asked for."""
        start = self._used + PART // 2
        self._used += PART
        offsets = (start, start + lane * count * dtype.itemsize)
        first, own = (torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset) for offset in offsets)
        return first, own


@pytest.mark.parametrize("kernel", KERNELS)
def test_far_rows(device, kernel, monkeypatch):
    """The same three rows at the start of their tensors and far behind it give the same results, bit for bit."""
    if device.type == "cuda":
        pytest.skip("memory that is only reserved is the interpreter's; a GPU has test_gpu.py's long sequence")
    from rnnfast.backends.triton import launch

    monkeypatch.setattr(launch, "plan", lambda *_: KERNELS[kernel](HIDDEN))
    layer = random_layer("gru", HIDDEN, BATCH, 2, torch.float32, lanes=LANES)
    w_hh, b_hh, h_0 = layer[2], layer[4], layer[6]
    gx, d_output = torch.randn(1, 3, LANES * GATES * HIDDEN), torch.randn(1, 3, LANES * HIDDEN)

    def shape(first: int) -> ScanShape:
        return ScanShape(2, BATCH, LANES, first + 3, HIDDEN, 1, first + torch.tensor([0, 2, 3]))

    def results(first: int, tensor: Callable[[int, int, int], Far]) -> list[Tensor]:
        output, tape = tensor(1, 3, LANES * HIDDEN), tensor(LANES, 3, TAPE * HIDDEN)
        d_gx, d_g_last = tensor(1, 3, LANES * GATES * HIDDEN), tensor(1, 3, LANES * HIDDEN)
        h_n, d_h_0 = torch.empty_like(h_0), torch.empty_like(h_0)
        read: tuple[Tensor | None, ...] = (tensor(*gx.shape).filled(gx), None, w_hh, b_hh, h_0, None)
        launch.scan_forward("gru", shape(first), *read, output.start, tape.start, h_n, None)
        read = (tensor(*d_output.shape).filled(d_output), h_n, None, w_hh, h_0, None, output.start, tape.start)
        launch.scan_backward("gru", shape(first), *read, d_gx.start, d_g_last.start, d_h_0, None)
        return [h_n, d_h_0, *(x.rows() for x in (output, tape, d_gx, d_g_last))]

    for far, expected in zip(results(FIRST_ROW, Memory().tensor), results(0, near), strict=True):
        assert expected.any()
        assert torch.equal(far, expected)


def test_a_far_lane(device, monkeypatch):
    """Of an ensemble: a lane whose weights lie behind 2^31 values gives what the first lane gives, bit for bit."""
    if device.type == "cuda":
        pytest.skip("memory that is only reserved is the interpreter's")
    from triton.runtime.interpreter import interpreter_builder

    from rnnfast.backends.triton import launch

    hidden, dtype = 256, torch.bfloat16
    monkeypatch.setattr(launch, "plan", lambda *_: Plan("shared", 16, 256, 16))
    layer = random_layer("rnn_tanh", hidden, 1, 1, dtype)
    w_hh, b_hh, h_0 = layer[2], layer[4], layer[6]
    gx, d_output, d_h_n = torch.randn(1, hidden), torch.randn(1, hidden).to(dtype), torch.randn_like(h_0)
    shape = ScanShape(1, 1, 1, 1, hidden, 0, None)
    set_grid_dim, set_grid_idx = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def results(lane: int) -> list[Tensor]:
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda x, y, z: set_grid_dim(x, y + lane, z))
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: set_grid_idx(x, y + lane, z))
        memory = Memory()

        def place(values: Tensor) -> tuple[Tensor, Tensor]:
            """The start of a tensor of all lanes, and its lane in question, which takes the values."""
            start, own = memory.lane(lane, values.numel(), values.dtype)
            own.copy_(values.flatten())
            return start.view_as(values), own

        read = [place(x)[0] for x in (gx, w_hh, b_hh, h_0)]
        output, h_n, d_gx, d_h_0 = (place(torch.zeros_like(x)) for x in (d_output, h_0, d_output, h_0))
        launch.scan_forward("rnn_tanh", shape, read[0], None, *read[1:], None, output[0], None, h_n[0], None)
        given = (place(d_output)[0], place(d_h_n)[0], None, read[1], read[3], None, output[0], None)
        launch.scan_backward("rnn_tanh", shape, *given, d_gx[0], None, d_h_0[0], None)
        return [own for _, own in (output, h_n, d_gx, d_h_0)]

    for far, expected in zip(results(2**31 // hidden**2), results(0), strict=True):
        assert expected.any()
        assert torch.equal(far, expected)
