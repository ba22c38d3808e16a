"""Rows of states, (L, B, H) or (h, c) of such: which are meant, cleared, or taken from others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnfast.inputs import map_state

Rows = Tensor | Sequence[int]
Selected = Tensor | Sequence[int | None]


def kept(state: Any) -> Any:
    """The state itself, or a copy if it was made in inference mode, which a call with gradients cannot use."""
    if torch.compiler.is_compiling() or not _is_inference(state):
        return state
    with torch.inference_mode(False):
        return map_state(state, lambda part: part.clone())


def _is_inference(state: Any) -> bool:
    if isinstance(state, tuple | list):
        return any(map(_is_inference, state))
    return isinstance(state, Tensor) and state.is_inference()


def batch_of(state: Any) -> int:
    while isinstance(state, tuple | list):
        state = state[0]
    return int(state.shape[1])


def mask_of(rows: Any, batch: int) -> Tensor:
    """Of the rows, (B,), on the CPU."""
    rows, mask = _tensor_of(rows), torch.zeros(batch, dtype=torch.bool, device="cpu")
    try:
        mask[rows] = True
    except IndexError as error:
        got = f"a mask {tuple(rows.shape)}" if rows.dtype == torch.bool else rows.tolist()
        raise IndexError(
            f"rows are indices below {batch}, the batch's, or a bool mask ({batch},), got {got}"
        ) from error
    return mask


def indices_of(rows: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Rows to select, and which of them are new ones, whose index means nothing."""
    try:
        rows = rows if isinstance(rows, Tensor) else [*rows]
    except TypeError:
        raise TypeError(f"rows to select are a list of indices or a mask, got {rows!r}: give [{rows!r}]") from None
    is_new = [False] * rows.numel() if isinstance(rows, Tensor) else [row is None for row in rows]
    new = torch.tensor(is_new, dtype=torch.bool, device="cpu")
    old = _tensor_of([row for row in rows if row is not None] if new.any() else rows)
    if old.dim() != 1:
        raise IndexError(f"rows to select have one dimension, got {tuple(old.shape)}")
    if old.dtype == torch.bool and new.any():
        raise TypeError("a mask adds no rows: give a list of indices, with None for a new row")
    mask = mask_of(old, batch)  # checks them
    if old.dtype == torch.bool:
        old, new = mask.nonzero().flatten(), new[mask]
    if not batch and new.any():
        raise RuntimeError("a batch without rows cannot be added to: reset() lets the stream begin with another one")
    index = torch.zeros(len(new), dtype=torch.long, device="cpu")
    index[~new] = torch.where(old < 0, old + batch, old)
    return index, new


def _tensor_of(rows: Any) -> Tensor:
    """Indices or a mask, on the CPU."""
    try:
        indices = rows if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"rows are integer indices or a bool mask, got {rows!r}") from None
    if not indices.numel() and indices.is_floating_point():
        indices = indices.long()  # of an empty list, which is float and means no row
    # Of floats, which may be a mask's, indexing would make integers.
    if indices.is_floating_point() or indices.dtype == torch.uint8:
        raise TypeError(f"rows are integer indices or a bool mask, got {indices.dtype}; of a mask make rows.bool()")
    return (indices if indices.dtype == torch.bool else indices.long()).cpu()


def cleared(state: Any, mask: Tensor) -> Any:
    """A state with zeros in some rows."""
    zeros = map_state(state, torch.zeros_like)
    return kept(map_state(state, partial(with_rows_of, rows=mask), zeros))


def with_rows_of(part: Tensor, other: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows.to(part.device)[:, None], other.to(part.dtype), part)
