"""Batches of sequences that end early or start anew on the way, as the ragged rows that the scan runs anyway.

A sequence whose state is reset is several sequences, one after the other. So a padded batch with lengths and resets
is a larger batch of *segments*, each cut where its sequence is reset or ends; sorted by length and laid out time-major
they are the data of a PackedSequence. One ragged scan runs them all: every cell and backend has resets, and more of
them make for more parallel rows and fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Segments(NamedTuple):
    """Where the rows and states of a padded batch (T, B) lie in its ragged batch of S segments; made by `cut`.

    The longest segment comes first. C of the B columns hold a sequence; an empty one has no segment. All but
    `batch_sizes` are int64 on the device of the batch:

    shape: (T, B).
    rows: (N,), for each ragged row its place t*B + b in the padded batch.
    batch_sizes: (longest,) int64 on the CPU, non-increasing: the segments that have a k-th step.
    columns: (S,), the column each segment was cut from.
    filled: (C,), the columns that are not empty; first and last: (C,), the segments they begin and end with.
    entering: the columns whose state enters their first segment, those that are not reset before their first step;
    entered: their first segments.
    """

    shape: tuple[int, int]
    rows: Tensor
    batch_sizes: Tensor
    columns: Tensor
    filled: Tensor
    first: Tensor
    last: Tensor
    entering: Tensor
    entered: Tensor

    def gather(self, input: Tensor) -> Tensor:
        """(T, B, I) or (T, B) to ragged rows (N, I) or (N,). What lies in the padding is never read."""
        return input.flatten(0, 1).index_select(0, self.rows)

    def scatter(self, rows: Tensor) -> Tensor:
        """Ragged rows (N, P) to (T, B, P), zeros in the padding."""
        steps, batch = self.shape
        padded = rows.new_zeros(steps * batch, rows.shape[1]).index_copy(0, self.rows, rows)
        return padded.view(steps, batch, rows.shape[1])

    def initial(self, state: Tensor, reset_to: Tensor, bidirectional: bool) -> Tensor:
        """The segments' initial states (L*D, S, P): a column's own for the segment it enters by, else `reset_to`.

        A backward lane enters a sequence at its last segment, and leaves it at its first.

        `state` and `reset_to` are (L*D, B, P).
        """
        if reset_to.dtype != state.dtype:
            raise RuntimeError(f"reset_to has dtype {reset_to.dtype}, the state has {state.dtype}; convert one of them")
        result = reset_to.index_select(1, self.columns)
        if not bidirectional:
            return result.index_copy(1, self.entered, state.index_select(1, self.entering))
        forward = result[0::2].index_copy(1, self.entered, state[0::2].index_select(1, self.entering))
        backward = result[1::2].index_copy(1, self.last, state[1::2].index_select(1, self.filled))
        return torch.stack((forward, backward), 1).flatten(0, 1)

    def final(self, state: Tensor, initial: Tensor, bidirectional: bool) -> Tensor:
        """The columns' final states (L*D, B, P), from the segments' (L*D, S, P); of an empty column its initial one."""
        initial = initial.to(state.dtype)
        if not bidirectional:
            return initial.index_copy(1, self.filled, state.index_select(1, self.last))
        forward = initial[0::2].index_copy(1, self.filled, state[0::2].index_select(1, self.last))
        backward = initial[1::2].index_copy(1, self.filled, state[1::2].index_select(1, self.first))
        return torch.stack((forward, backward), 1).flatten(0, 1)


def cut(
    steps: int,
    batch: int,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Segments:
    """Cuts a padded batch of B sequences of T steps into segments.

    The plan is made on the CPU, so lengths or resets that lie on a GPU are waited for, once.

    Args:
        steps, batch: T and B.
        lengths: (B,) integers in [0, T], in any order and on any device, or a list. None: all are T.
        reset: (T, B) bool on any device: True where the state is reset before that step. None: nowhere.
        device: where the batch lies.

    Raises:
        ValueError, TypeError: lengths or resets of the wrong shape, type or range.
    """
    ends = _check_lengths(steps, batch, lengths)
    starts = (
        torch.zeros(batch, steps, dtype=torch.bool) if reset is None else _check_reset(steps, batch, reset).t().cpu()
    )
    enters = ~starts[:, :1].squeeze(1)
    starts = torch.cat((torch.ones(batch, 1, dtype=torch.bool), starts[:, 1:]), 1)

    # The valid rows, column after column; a start among them begins a segment.
    valid = torch.arange(steps) < ends.unsqueeze(1)
    column, step = valid.nonzero(as_tuple=True)
    begins = starts[valid]
    begin = begins.nonzero().squeeze(1)
    segment = begins.cumsum(0) - 1
    within = torch.arange(column.numel()) - begin[segment]

    sizes = torch.diff(begin, append=torch.tensor([column.numel()]))
    order = sizes.argsort(descending=True, stable=True)
    rank = _inverse(order)
    batch_sizes = torch.bincount(within)
    place = (batch_sizes.cumsum(0) - batch_sizes)[within] + rank[segment]
    rows = (step * batch + column)[_inverse(place)]

    columns = column[begin]
    filled, count = columns.unique_consecutive(return_counts=True)
    last = count.cumsum(0) - 1
    first = last - count + 1
    enters = enters[filled]
    tensors = (rows, columns[order], filled, rank[first], rank[last], filled[enters], rank[first[enters]])
    rows, columns, filled, first, last, entering, entered = (tensor.to(device) for tensor in tensors)
    return Segments((steps, batch), rows, batch_sizes, columns, filled, first, last, entering, entered)


def check_reset_shape(reset: Tensor | None, input: Tensor, steps_and_batch: int) -> None:
    """Raises ValueError unless a mask has the first dimensions of the input it came with."""
    if reset is not None and reset.shape != input.shape[:steps_and_batch]:
        expected, given = tuple(input.shape[:steps_and_batch]), tuple(reset.shape)
        raise ValueError(f"reset must have the input's shape without features, {expected}, got {given}")


def of_packed(packed: PackedSequence) -> Segments:
    """The plan of a PackedSequence, whose data are its ragged rows: a segment for each sequence."""
    batch_sizes, device = packed.batch_sizes, packed.data.device
    steps, batch = len(batch_sizes), int(batch_sizes[0])
    everything = torch.arange(batch, device=device)
    columns = everything if packed.sorted_indices is None else packed.sorted_indices
    segments = _inverse(columns)
    step = torch.repeat_interleave(torch.arange(steps), batch_sizes)
    segment = torch.arange(len(step)) - (batch_sizes.cumsum(0) - batch_sizes)[step]
    rows = step.to(device) * batch + columns[segment.to(device)]
    return Segments((steps, batch), rows, batch_sizes, columns, everything, segments, segments, everything, segments)


def _inverse(permutation: Tensor) -> Tensor:
    return torch.empty_like(permutation).scatter_(
        0, permutation, torch.arange(permutation.numel(), device=permutation.device)
    )


def _check_lengths(steps: int, batch: int, lengths: Tensor | Sequence[int] | None) -> Tensor:
    if lengths is None:
        return torch.full((batch,), steps)
    ends = torch.as_tensor(lengths)
    if ends.numel() and (ends.is_floating_point() or ends.is_complex() or ends.dtype == torch.bool):
        raise TypeError(f"lengths must be integers, got {ends.dtype}")
    if ends.shape != (batch,):
        raise ValueError(f"lengths must hold one length for each of the {batch} sequences, got {tuple(ends.shape)}")
    ends = ends.to("cpu", torch.int64)
    if batch and (int(ends.min()) < 0 or int(ends.max()) > steps):
        raise ValueError(f"lengths must be in [0, {steps}], the steps of the input, got {ends.tolist()}")
    return ends


def _check_reset(steps: int, batch: int, reset: Tensor) -> Tensor:
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be a bool tensor, got {reset.dtype}; use reset.bool() if nonzero means a reset")
    if reset.shape != (steps, batch):
        raise ValueError(f"reset must have the shape {(steps, batch)}, got {tuple(reset.shape)}")
    return reset
