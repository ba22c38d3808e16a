"""Stateless recurrent layers: layers x directions over the scan, with dropout between layers.

All take time-major input: (T, B, I) floating, (T, B) integer token ids, or, with `batch_sizes`, the (N, I) or (N,) data
of a PackedSequence.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnfast import dispatch
from rnnfast.backends import torch_nn
from rnnfast.cells import CELLS
from rnnfast.derivatives import needs_gradient
from rnnfast.inputs import checked_pair
from rnnfast.scan import Weights, lstm_states, scan_layer, stack_lanes
from rnnfast.sequences import is_known
from rnnfast.tracing import is_jit_traced, is_traced, is_transformed

__all__ = ["Weights", "gru", "lane_weights", "lstm", "rnn", "states", "step"]


def rnn(
    input: Tensor,
    h_0: Tensor,
    weights: Sequence[Weights],
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = dispatch.AUTO,
) -> tuple[Tensor, Tensor]:
    """Elman RNN (Elman 1990): h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu in place of tanh.

    With L layers of D directions, T steps and B sequences of I inputs and H hidden units:

    Args:
        input: (T, B, I) of the weights' dtype, or (T, B) integer token ids below I, which stand for one-hot vectors.
            With `batch_sizes`, the rows of all steps one after the other: (N, I) or (N,).
        h_0: (L*D, B, H), layer by layer, directions side by side.
        weights: L*D of them, in the order of `h_0`.
        nonlinearity: "tanh" or "relu".
        batch_sizes: (T,) int64 on the CPU, non-increasing, as in `PackedSequence`; B is its first entry.
        bidirectional: D is 2 rather than 1; the second direction walks time backwards.
        dropout: probability of zeroing an output between layers, while `training`.
        backend: "auto", or one of `rnnfast.backends()` by name.

    Returns:
        output (T, B, D*H), or (N, D*H) with `batch_sizes`, and h_n (L*D, B, H).

    Raises:
        ValueError: an unknown nonlinearity or backend, or a number of weights that does not fit.
        IndexError: a token id outside [0, I).
        RuntimeError: shapes, dtypes or devices that do not fit, or a backend that is not available.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    output, h_n, _ = run(
        f"rnn_{nonlinearity}", input, h_0, None, weights, batch_sizes, bidirectional, dropout, training, backend
    )
    return output, h_n


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Weights],
    *,
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = dispatch.AUTO,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LSTM with forget gates (Hochreiter & Schmidhuber 1997; Gers et al. 2000), and projections (Sak et al. 2014).

    Arguments, shapes and errors are those of `rnn`, except for `hx` = (h_0 (L*D, B, P), c_0 (L*D, B, H)).
    Returns output (T, B, D*P) and (h_n, c_n).
    """
    h_0, c_0 = checked_pair(hx)
    output, h_n, c_n = run("lstm", input, h_0, c_0, weights, batch_sizes, bidirectional, dropout, training, backend)
    return output, (h_n, c_n)


def gru(
    input: Tensor,
    h_0: Tensor,
    weights: Sequence[Weights],
    *,
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = dispatch.AUTO,
) -> tuple[Tensor, Tensor]:
    """GRU (Cho et al. 2014) in torch.nn's form, with the reset gate applied after the recurrent product.

    Arguments, shapes, results and errors are those of `rnn`.
    """
    output, h_n, _ = run("gru", input, h_0, None, weights, batch_sizes, bidirectional, dropout, training, backend)
    return output, h_n


def lane_weights(layer: Any) -> list[Weights]:
    """The parameters of an RNN, LSTM or GRU, torch.nn's or ours, in the form that these functions take."""
    if is_traced():
        # Tensors of a transform or a compiler, which the module must not keep.
        flat: Any = iter([getattr(layer, name) for name in layer._flat_weights_names])
    else:
        parameters = layer._parameters
        names_and_weights = zip(layer._flat_weights_names, layer._flat_weights, strict=True)
        if not all(parameters.get(name) is weight for name, weight in names_and_weights):
            layer._update_flat_weights()  # torch.nn's own way, which takes longer to find that nothing has changed
        flat = iter(layer._flat_weights)
    lanes = []
    for _ in layer._all_weights:
        w_ih, w_hh = next(flat), next(flat)
        b_ih, b_hh = (next(flat), next(flat)) if layer.bias else (None, None)
        lanes.append(Weights(w_ih, w_hh, b_ih, b_hh, next(flat) if layer.proj_size > 0 else None))
    return lanes


def weights_of_cell(cell: Any) -> Weights:
    """Those of an RNNCell, LSTMCell or GRUCell, torch.nn's or ours."""
    b_ih, b_hh = cell.bias_ih, cell.bias_hh
    if (b_ih is None) != (b_hh is None):  # as torch.nn's allow
        b_ih, b_hh = (torch.zeros_like(b_hh), b_hh) if b_ih is None else (b_ih, torch.zeros_like(b_ih))
    return Weights(cell.weight_ih, cell.weight_hh, b_ih, b_hh)


def run(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    dropout: float,
    training: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `rnn`, `lstm` and `gru` do, for any key of `rnnfast.cells.CELLS`; c_n is empty but for the LSTM."""
    directions = 2 if bidirectional else 1
    check(cell, input, h_0, c_0, weights, batch_sizes, directions)
    batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()  # as kernels read it, even torch's
    token_ids = not input.is_floating_point()
    steps = input.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    differentiable = chain((input, h_0, c_0), *weights)
    chosen = _choose(backend, cell, weights[0], token_ids, h_0.shape[1] * directions, steps, differentiable)
    if chosen == "torch" and not torch.compiler.is_compiling():
        return torch_nn.layers(cell, input, h_0, c_0, weights, batch_sizes, bidirectional, dropout, training)

    rows = input.long() if token_ids else input
    if batch_sizes is None:
        rows = rows.flatten(0, 1)
    rows, h_n, c_n = _run_layers(
        chosen, cell, rows, h_0, c_0, weights, batch_sizes, bidirectional, dropout if training else 0.0
    )
    output = rows if batch_sizes is not None else rows.view(*input.shape[:2], rows.shape[-1])
    return output, h_n, c_n


def step(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Weights],
    *,
    dropout: float = 0.0,
    backend: str = dispatch.AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """One time step through L layers, with little overhead.

    Args:
        cell: a key of `rnnfast.cells.CELLS`.
        input: (B, I) of the weights' dtype, or (B,) integer token ids.
        h_0, c_0: (L, B, P) and, for the LSTM, (L, B, H).
        weights: one for each layer.
        dropout: probability of zeroing an output between layers.

    Returns:
        output (B, P), h_n and c_n; c_n is empty except for the LSTM.

    Raises:
        RuntimeError, IndexError: as `rnn`.
    """
    token_ids = not input.is_floating_point()
    check(cell, input.unsqueeze(0), h_0, c_0, weights, None, 1)
    differentiable = chain((input, h_0, c_0), *weights)
    chosen = _choose(backend, cell, weights[0], token_ids, input.shape[0], 1, differentiable)
    if chosen == "torch" and not torch.compiler.is_compiling():
        rows = input.unsqueeze(0)
        output, h_n, c_n = torch_nn.layers(cell, rows, h_0, c_0, weights, None, False, dropout, dropout > 0)
        return output.squeeze(0), h_n, c_n
    return _run_layers(chosen, cell, input.long() if token_ids else input, h_0, c_0, weights, None, False, dropout)


def _choose(
    backend: str,
    cell: str,
    weights: Weights,
    token_ids: bool,
    rows: int,
    steps: int,
    differentiable: Iterable[Tensor | None],
) -> str:
    """The backend's name for a call of so many rows (of the batch, times the directions) and steps."""
    w_hh, size = weights.w_hh, None
    if w_hh.device.type in dispatch.TABLED:
        size = dispatch.size_of(cell, w_hh, rows, steps, differentiable)
    request = (cell, w_hh.device.type, w_hh.dtype, token_ids, weights.w_hr is not None, is_transformed())
    return dispatch.choose_name(dispatch.asked(backend), None if size is None else tuple(size), *request)


def states(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Weights],
    *,
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    backend: str = dispatch.AUTO,
) -> tuple[Tensor, Tensor]:
    """The states of an LSTM after every step, h (N, L*D, P) and c (N, L*D, H), of all rows one after the other.

    Arguments and errors are those of `lstm`; there is no dropout. If gradients are enabled and an argument needs them,
    it runs on the cpu backend or the reference, which give c gradients; otherwise on any but torch, whose tape lacks c.
    """
    directions = 2 if bidirectional else 1
    check("lstm", input, *checked_pair(hx), weights, batch_sizes, directions)
    batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
    w_hh, token_ids, mapped = weights[0].w_hh, not input.is_floating_point(), is_transformed()
    tensors = [input, *hx, *(parameter for lane in weights for parameter in lane if parameter is not None)]
    # A transform of torch.func may want gradients of tensors that say nothing of them.
    differentiable = needs_gradient(tensors) or (mapped and torch.is_grad_enabled())
    extensions = (dispatch.CELL_STATE_GRADIENTS,) if differentiable else (dispatch.CELL_STATES,)
    projected = weights[0].w_hr is not None
    request = ("lstm", w_hh.device.type, w_hh.dtype, token_ids, projected, mapped, None, extensions)
    chosen = dispatch.choose_name(dispatch.asked(backend), None, *request)
    rows = input.long() if token_ids else input
    rows = rows if batch_sizes is not None else rows.flatten(0, 1)
    h: list[Tensor] = []
    c: list[Tensor] = []
    for start in range(0, len(weights), directions):
        lanes = slice(start, start + directions)
        stacked, h_0, c_0 = stack_lanes(weights[lanes]), hx[0][lanes], hx[1][lanes]
        rows, cells = lstm_states(chosen, rows, stacked, h_0, c_0, batch_sizes, bidirectional)
        h += rows.chunk(directions, dim=1)
        c += cells.unbind()
    return torch.stack(h, 1), torch.stack(c, 1)


def _run_layers(
    backend: str,
    cell: str,
    rows: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    directions = 2 if bidirectional else 1
    if len(weights) == directions:
        return scan_layer(backend, rows, weights, h_0, c_0, batch_sizes, cell, bidirectional)
    h_n, c_n = [], []
    for start in range(0, len(weights), directions):
        lanes = slice(start, start + directions)
        c = None if c_0 is None else c_0[lanes]
        rows, h, c = scan_layer(backend, rows, weights[lanes], h_0[lanes], c, batch_sizes, cell, bidirectional)
        h_n.append(h)
        c_n.append(c)
        if dropout > 0 and start + directions < len(weights):
            rows = F.dropout(rows, dropout)
    return rows, torch.cat(h_n), torch.cat(c_n)


def _quiet_in_jit_trace(check: Callable[..., None]) -> Callable[..., None]:
    """A decorator: no warnings of torch.jit.trace, which has one for every size that is compared."""

    @functools.wraps(check)
    def run(*arguments: Any) -> None:
        if not is_jit_traced():
            return check(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            return check(*arguments)

    return run


@_quiet_in_jit_trace
def check(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None,
    directions: int,
) -> None:
    """Raises the one clear error that a mistaken call deserves, before any kernel reads a wrong address."""
    if cell not in CELLS:
        raise ValueError(f"unknown cell '{cell}'; choose from {', '.join(CELLS)}")
    for name, tensor in (("input", input), ("h_0", h_0)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    _check_weights(cell, weights, directions)
    w_ih, w_hh, *_ = weights[0]
    if input.device != w_hh.device:
        raise RuntimeError(f"input is on {input.device}, the weights are on {w_hh.device}; move one of them")
    token_ids = not input.is_floating_point()
    if token_ids and (input.is_complex() or input.dtype == torch.bool):
        raise RuntimeError(f"input must be floating, or integer token ids, got {input.dtype}")
    dims = 3 - token_ids - (batch_sizes is not None)
    if input.dim() != dims:
        raise RuntimeError(f"{'token ids' if token_ids else 'input'} must have {dims} dimensions, got {input.dim()}")
    if batch_sizes is not None:
        is_tensor = isinstance(batch_sizes, Tensor)
        if not is_tensor or (batch_sizes.dtype, batch_sizes.device.type) != (torch.int64, "cpu"):
            given = f"{batch_sizes.dtype} on {batch_sizes.device}" if is_tensor else type(batch_sizes).__name__
            raise RuntimeError(f"batch_sizes must be an int64 tensor on the CPU, as in PackedSequence, got {given}")
    if (input if batch_sizes is None else batch_sizes).shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    batch = input.shape[1] if batch_sizes is None else h_0.shape[1]
    if batch_sizes is not None and is_known(batch_sizes):  # else the operator looks when it runs
        batch = int(batch_sizes[0])
    _check_state("h_0", h_0, w_hh, (len(weights), batch, w_hh.shape[1]))
    if (c_0 is not None) != CELLS[cell].has_cell_state:
        takes = "a pair (h_0, c_0)" if CELLS[cell].has_cell_state else "one tensor h_0"
        raise RuntimeError(f"{cell} takes {takes} as its state, got {'a pair' if c_0 is not None else 'one tensor'}")
    if c_0 is not None:
        _check_state("c_0", c_0, w_hh, (len(weights), batch, w_hh.shape[0] // CELLS[cell].gates))
    if not token_ids:
        if input.dtype != w_ih.dtype:
            raise RuntimeError(f"input has dtype {input.dtype}, the weights have {w_ih.dtype}; convert one of them")
        if input.shape[-1] != w_ih.shape[1]:
            raise RuntimeError(f"input has {input.shape[-1]} features, w_ih takes {w_ih.shape[1]}")
    elif input.device.type == "cpu" and not is_traced() and input.numel():
        low, high = (int(bound) for bound in input.long().aminmax())
        if low < 0 or high >= w_ih.shape[1]:
            raise IndexError(f"token ids must be in [0, {w_ih.shape[1]}), got {low if low < 0 else high}")


def _check_weights(cell: str, weights: Sequence[Weights], directions: int) -> None:
    if not weights or len(weights) % directions:
        raise ValueError(f"weights must hold one entry per layer and direction, got {len(weights)}")
    if not all(isinstance(lane, Weights) for lane in weights):
        raise TypeError("weights must be a list of rnnfast.functional.Weights, one per layer and direction")
    (rows, state), inputs = weights[0].w_hh.shape, weights[0].w_ih.shape[-1]
    hidden, dtype, device = rows // CELLS[cell].gates, weights[0].w_hh.dtype, weights[0].w_hh.device
    projected, biased = weights[0].w_hr is not None, weights[0].b_ih is not None
    if projected and cell != "lstm":
        raise RuntimeError(f"w_hr projects the state of an lstm, {cell} has none")
    if hidden * CELLS[cell].gates != rows or (state != hidden and not projected):
        raise RuntimeError(f"w_hh of {cell} must have shape ({CELLS[cell].gates} H, H), got {(rows, state)}")
    for index, lane in enumerate(weights):
        shapes = (
            (rows, inputs if index < directions else directions * state),
            (rows, state),
            (rows,) if biased else None,
            (rows,) if biased else None,
            (state, hidden) if projected else None,
        )
        for name, weight, shape in zip(Weights._fields, lane, shapes, strict=True):
            if (weight is None) != (shape is None) or (weight is not None and weight.shape != shape):
                given = None if weight is None else tuple(weight.shape)
                raise RuntimeError(f"{name} of weights[{index}] must have shape {shape}, got {given}")
            if weight is not None and (weight.dtype != dtype or weight.device != device):
                raise RuntimeError(
                    f"{name} of weights[{index}] is {weight.dtype} on {weight.device}, w_hh of the first is {dtype} on "
                    f"{device}; convert one of them"
                )


def _check_state(name: str, state: Tensor, w_hh: Tensor, shape: tuple[int, int, int]) -> None:
    if state.shape != shape:
        raise RuntimeError(f"{name} must have shape {shape}, got {tuple(state.shape)}")
    if state.dtype != w_hh.dtype:
        raise RuntimeError(f"{name} has dtype {state.dtype}, the weights have {w_hh.dtype}; convert one of them")
    if state.device != w_hh.device:
        raise RuntimeError(f"{name} is on {state.device}, the weights are on {w_hh.device}; move one of them")
