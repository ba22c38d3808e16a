"""What a scan on a GPU does around its kernels, which are a backend's own: checks, allocations, and, by torch's GEMMs,
all that is parallel in time.

D lanes, N rows, B rows of the first step, T steps, H hidden units, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast.backends import products
from rnnfast.cells import CELLS


class ScanShape(NamedTuple):
    """The extent of a scan, as kernels take it. `offsets`: the first row of every step, where batch sizes differ."""

    steps: int
    batch: int
    lanes: int
    rows: int
    hidden: int
    bidirectional: int
    offsets: Tensor | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """T, B, D, N, H."""
        return (self.steps, self.batch, self.lanes, self.rows, self.hidden)


def forward(
    backend: str,
    dtypes: Sequence[torch.dtype],
    scan: Callable[..., None],
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
    """Implements `rnnfast::scan_<backend>`; shapes are those of `rnnfast.scan.scan`.

    `scan(cell, shape, gx, ids, w_hh, b_hh, h_0, c_0, output, tape, h_n, c_n)` fills the last four; gx and ids are those
    of `products.gate_inputs`.
    """
    _require_supported(backend, h_0.dtype, w_hr, dtypes)
    _require_contiguous(input=input, w_hh=w_hh, b_hh=b_hh, h_0=h_0, c_0=c_0)
    lanes, _, hidden = h_0.shape
    rows = input.shape[0]
    output = h_0.new_empty(rows, lanes * hidden)
    tape = h_0.new_empty(lanes, rows, CELLS[cell].tape * hidden) if save_tape else h_0.new_empty(0)
    h_n, c_n = torch.empty_like(h_0), h_0.new_empty(0) if c_0 is None else torch.empty_like(c_0)
    if rows == 0:
        h_n.copy_(h_0)
        if c_0 is not None:
            c_n.copy_(c_0)
    else:
        gx, ids = products.gate_inputs(input, w_ih, b_ih)
        shape = _shape(h_0, rows, batch_sizes, bidirectional)
        written = (output, tape if tape.numel() else None, h_n, None if c_0 is None else c_n)
        with _on_device_of(h_0):
            scan(cell, shape, gx, ids, w_hh, b_hh, h_0, c_0, *written)
    return output, h_n, c_n, tape


def backward(
    backend: str,
    dtypes: Sequence[torch.dtype],
    scan: Callable[..., None],
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
    """Implements `rnnfast::scan_<backend>_backward`: what is absent or not needed is returned empty.

    `scan(cell, shape, d_output, d_h_n, d_c_n, w_hh, h_0, c_0, output, tape, d_gx, d_g_last, d_h_0, d_c_0)` fills the
    last four: d_gx (N, D*G*H), d_g_last (N, D*H) and the gradients of the states.
    """
    _require_supported(backend, h_0.dtype, w_hr, dtypes)
    _require_contiguous(input=input, w_hh=w_hh, b_hh=b_hh, h_0=h_0, c_0=c_0)
    _require_contiguous(d_output=d_output, d_h_n=d_h_n, d_c_n=d_c_n, output=output, tape=tape)
    lanes, _, hidden = h_0.shape
    rows = input.shape[0]
    d_gx = h_0.new_empty(rows, lanes * CELLS[cell].gates * hidden)
    # The GRU's reset gate comes between n and its recurrent product, whose gradient therefore differs.
    d_g_last = h_0.new_empty(rows, lanes * hidden) if cell == "gru" else None
    d_h_0, d_c_0 = torch.empty_like(h_0), None if c_0 is None else torch.empty_like(c_0)
    if rows == 0:
        for d_initial, d_final in ((d_h_0, d_h_n), (d_c_0, d_c_n)):
            if d_initial is not None:
                _ = d_initial.zero_() if d_final is None else d_initial.copy_(d_final)
    else:
        shape = _shape(h_0, rows, batch_sizes, bidirectional)
        read = (d_output, d_h_n, d_c_n, w_hh, h_0, c_0, output, tape if tape.numel() else None)
        with _on_device_of(h_0):
            scan(cell, shape, *read, d_gx, d_g_last, d_h_0, d_c_0)

    gradients: list[Tensor | None] = [None] * 6
    if need_input and input.is_floating_point():
        gradients[0] = products.input_gradient(d_gx, w_ih)
    if need_weights:
        gradients[1:5] = products.weight_gradients(
            d_gx, d_g_last, input, w_ih, b_ih is not None, output, h_0, batch_sizes, bidirectional
        )
    # An operator's outputs share no memory.
    return tuple(h_0.new_empty(0) if gradient is None else gradient for gradient in (*gradients, d_h_0, d_c_0))


def unsupported(dtype: torch.dtype, projected: bool, dtypes: Sequence[torch.dtype]) -> str | None:
    """Returns why a backend that computes in these dtypes cannot run a layer, or None."""
    if projected:
        return "has no LSTM projection (proj_size)"
    if dtype not in dtypes:
        *names, last, given = (str(each).removeprefix("torch.") for each in (*dtypes, dtype))
        return f"computes {', '.join(names)} and {last}, not {given}"
    return None


def _require_supported(backend: str, dtype: torch.dtype, w_hr: Tensor | None, dtypes: Sequence[torch.dtype]) -> None:
    """Raises NotImplementedError where `unsupported` has a reason."""
    reason = unsupported(dtype, w_hr is not None, dtypes)
    if reason is not None:
        raise NotImplementedError(f"the {backend} backend {reason}; choose another backend")


def _require_contiguous(**tensors: Tensor | None) -> None:
    """Raises RuntimeError for a strided tensor, which an exported program may pass: kernels read by address."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous")


def _shape(h_0: Tensor, rows: int, batch_sizes: Tensor | None, bidirectional: bool) -> ScanShape:
    """Raises RuntimeError for batch sizes that are not those of so many rows."""
    lanes, batch, hidden = h_0.shape
    if batch_sizes is None:
        return ScanShape(rows // batch, batch, lanes, rows, hidden, int(bidirectional), None)
    products.check_batch_sizes(batch_sizes, batch, rows)
    offsets = products.copy_to(h_0.device, products.first_rows(batch_sizes))
    return ScanShape(len(batch_sizes), batch, lanes, rows, hidden, int(bidirectional), offsets)


def _on_device_of(tensor: Tensor) -> torch.cuda.device:
    """Makes a tensor's GPU the current one; nothing for a tensor on the CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
