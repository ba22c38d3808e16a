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
    """A state that a call with gradients can go on from, as from one made in inference mode it cannot."""

    def copied(part: Any) -> Any:
        if torch.compiler.is_compiling() or not isinstance(part, Tensor) or not part.is_inference():
            return part
        with torch.inference_mode(False):
            return part.clone()

    return map_state(state, copied)


def batch_of(state: Any) -> int:
    while isinstance(state, tuple | list):
        state = state[0]
    return int(state.shape[1])


def mask_of(rows: Any, batch: int) -> Tensor:
    """Of the rows, (B,), on the CPU."""
    if not isinstance(rows, Tensor):
        # Of floats, which may be a mask's, indexing would make integers. An empty list is float, too, and means no row.
        rows = torch.as_tensor(rows)
        rows = rows if rows.numel() else rows.long()
    if rows.is_floating_point() or rows.dtype == torch.uint8:
        raise TypeError(f"rows are integer indices or a bool mask, got {rows.dtype}; of a mask make rows.bool()")
    mask = torch.zeros(batch, dtype=torch.bool)
    try:
        mask[rows.cpu()] = True
    except IndexError as error:
        got = f"a mask {tuple(rows.shape)}" if rows.dtype == torch.bool else rows.tolist()
        raise IndexError(
            f"rows are indices below {batch}, the batch's, or a bool mask ({batch},), got {got}"
        ) from error
    return mask


def indices_of(rows: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Rows to select, and which of them are new ones, whose index means nothing."""
    if isinstance(rows, Tensor):
        rows = rows.tolist()
    if rows and all(isinstance(row, bool) for row in rows):
        rows = mask_of(rows, batch).nonzero().flatten().tolist()
    new = [row is None for row in rows]
    mask_of([row for row in rows if row is not None], batch)  # checks them
    if not batch and any(new):
        raise RuntimeError("a batch without rows cannot be added to: reset() lets the stream begin with another one")
    index = [0 if row is None else row % batch for row in rows]
    return torch.tensor(index, dtype=torch.long), torch.tensor(new, dtype=torch.bool)


def cleared(state: Any, mask: Tensor) -> Any:
    """A state with zeros in some rows."""
    zeros = map_state(state, torch.zeros_like)
    return kept(map_state(state, partial(with_rows_of, rows=mask), zeros))


def with_rows_of(part: Tensor, other: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows.to(part.device)[:, None], other.to(part.dtype), part)
