"""Lengths and resets: turns a padded batch of sequences that end early or restart into ragged rows for the scan.

A sequence whose state is reset is several sequences, one after the other. So a padded batch with lengths and resets
is a larger batch of *segments*, each cut where its sequence is reset or ends. Sorted by length and laid out time-major,
they are the data of a PackedSequence. One ragged scan runs them all, so every cell and backend supports resets, and
more resets mean more parallel rows and fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import _C, Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast.batching import or_no_members
from rnnfast.imports import after_import
from rnnfast.tracing import is_jit_traced, is_mapped

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np

__all__ = ["Segments", "cut"]


class Segments(NamedTuple):
    """Maps the rows and states of a padded batch (T, B) to its ragged batch of S segments, and back; made by `cut`.

    The longest segment comes first; an empty column has none. All but `batch_sizes` are int64 on the device of the
    batch:

    shape: (T, B).
    rows: (N,), the place t*B + b of each ragged row in the padded batch.
    batch_sizes: (longest,) int64 on the CPU, non-increasing: the segments that have a k-th step; [0] if there is none.
    columns: (S,), the column each segment was cut from.
    sources: (2, S), for forward lanes and for backward ones: where each segment's initial state lies among the columns'
        states, 0 to B - 1, followed by those they are reset to, B to 2B - 1.
    ends: (2, B), for forward lanes and for backward ones: where each column's final state lies among the segments',
        0 to S - 1, followed by the columns' initial ones, which an empty column keeps.
    """

    shape: tuple[int, int]
    rows: Tensor
    batch_sizes: Tensor
    columns: Tensor
    sources: Tensor
    ends: Tensor

    def gather(self, input: Tensor) -> Tensor:
        """From (T, B, I) or (T, B) to ragged rows (N, I) or (N,). The padding is never read."""
        return input.flatten(0, 1).index_select(0, self.rows)

    def scatter(self, rows: Tensor) -> Tensor:
        """From ragged rows (N, P) to (T, B, P), with zeros in the padding."""
        steps, batch = self.shape
        padded = rows.new_zeros(steps * batch, rows.shape[1]).index_copy(0, self.rows, rows)
        return padded.view(steps, batch, rows.shape[1])

    def initial(self, state: Tensor, reset_to: Tensor, bidirectional: bool) -> Tensor:
        """The segments' initial states (L*D, S, P): the column's own for the one entered first, otherwise `reset_to`.

        A backward lane enters a sequence at its last segment, and leaves it at its first.

        `state` and `reset_to` are (L*D, B, P).
        """
        return _select(state, checked_reset(state, reset_to), self.sources, bidirectional)

    def final(self, state: Tensor, initial: Tensor, bidirectional: bool) -> Tensor:
        """The columns' final states (L*D, B, P), from the segments' (L*D, S, P); an empty column keeps its initial."""
        return _select(state, initial.to(state.dtype), self.ends, bidirectional)


def _select(states: Tensor, others: Tensor, index: Tensor, bidirectional: bool) -> Tensor:
    """From `states` (L*D, ., P) followed by `others`, those at the index of each lane's direction."""
    both = torch.cat((states, others), 1)
    if not bidirectional:
        return both.index_select(1, index[0])
    return torch.stack((both[0::2].index_select(1, index[0]), both[1::2].index_select(1, index[1])), 1).flatten(0, 1)


def cut(
    steps: int,
    batch: int,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Segments:
    """Cuts a padded batch of B sequences of T steps into segments.

    The plan is made on the CPU, so lengths or resets on a GPU cost one synchronization.

    Args:
        steps, batch: T and B.
        lengths: (B,) integers in [0, T], in any order and on any device, or a list. None: all are T.
        reset: (T, B) bool on any device: True where the state is reset before that step. None: nowhere.
        device: where the batch lies.

    Raises:
        ValueError, TypeError: lengths or resets of the wrong shape, type or range.
        RuntimeError: T is 0; or torch.jit.trace looks on.
    """
    _refuse_jit_trace()
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    lengths = _check_lengths(steps, batch, lengths)
    check_reset(reset, (steps, batch))
    arguments = lengths, reset, steps, batch, torch.device(device)
    if torch.compiler.is_compiling():
        return Segments((steps, batch), *_traced_plan(*arguments))
    if is_mapped(lengths) or is_mapped(reset):
        return _MappedSegments((steps, batch), *_mapped_plan(*arguments))
    return Segments((steps, batch), *_plan(*arguments))


def on_cpu(values: Any) -> Any:
    """Lengths or resets that lie on a GPU, waited for once; others as they are, and those that torch.vmap maps over."""
    stay = not isinstance(values, Tensor) or torch.compiler.is_compiling() or values.is_cpu or is_mapped(values)
    return values if stay else values.cpu()


def are_whole(steps: int, batch: int, lengths: Tensor | Sequence[int] | None, reset: Tensor | None) -> bool:
    """Whether no sequence ends early or is reset on the way, as far as lengths and resets can be looked at."""
    _refuse_jit_trace()
    if steps == 0 or torch.compiler.is_compiling() or is_mapped(reset):
        return False
    lengths = _check_lengths(steps, batch, lengths)
    # As int64: torch would make the number of steps one of their type, which may not hold it.
    return not is_mapped(lengths) and bool((lengths.long() == steps).all()) and (reset is None or not reset.any())


def _refuse_jit_trace() -> None:
    """It would make constants of what is decided by lengths and resets."""
    if is_jit_traced():
        raise RuntimeError(
            "torch.jit.trace cannot record lengths= and reset=, whose values decide what is computed: use "
            "torch.export, or a PackedSequence"
        )


def checked_reset(state: Tensor, reset_to: Tensor) -> Tensor:
    """`reset_to`; raises RuntimeError if it cannot take the place of the state."""
    if reset_to.dtype != state.dtype:
        raise RuntimeError(f"reset_to has dtype {reset_to.dtype}, the state has {state.dtype}; convert one of them")
    if reset_to.device != state.device:
        raise RuntimeError(f"reset_to is on {reset_to.device}, the state is on {state.device}; move one of them")
    return reset_to


def _plan(lengths: Tensor, reset: Tensor | None, steps: int, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """The tensors of `Segments`, in its order. Made by NumPy, whose small operations cost a quarter of torch's."""
    import numpy as np  # here alone: layers without lengths and resets need nothing but torch

    ends_at = _values(lengths).astype(np.int64)
    if batch and (ends_at.min() < 0 or ends_at.max() > steps):
        raise ValueError(f"lengths must be in [0, {steps}], the steps of the input, got {ends_at.tolist()}")
    resets = np.zeros((batch, steps), bool) if reset is None else _values(reset).T
    starts = np.concatenate((np.ones((batch, 1), bool), resets[:, 1:]), 1)

    # The valid rows, column after column; a start among them begins a segment.
    valid = np.arange(steps) < ends_at[:, None]
    column, step = valid.nonzero()
    begins = starts[valid]
    begin = begins.nonzero()[0]
    segment = begins.cumsum() - 1
    within = np.arange(len(column)) - begin[segment]

    order = np.argsort(-np.diff(begin, append=len(column)), kind="stable")
    rank, rows = np.empty_like(order), np.empty_like(column)
    rank[order] = np.arange(len(order))
    batch_sizes = np.bincount(within, minlength=1)
    rows[(batch_sizes.cumsum() - batch_sizes)[within] + rank[segment]] = step * batch + column

    columns = column[begin]
    first = np.diff(columns, prepend=-1).nonzero()[0]
    filled, last = columns[first], np.append(first, len(columns))[1:] - 1
    # The segments that a lane enters a column by take the column's state, unless it is reset before the first step.
    sources = np.stack((columns + batch, columns + batch))
    sources[0, first] = filled + batch * resets[filled, 0]
    sources[1, last] = filled
    ends = np.tile(np.arange(batch), (2, 1)) + len(columns)
    ends[:, filled] = rank[last], rank[first]
    plan = [torch.from_numpy(part).to(device) for part in (rows, columns[order], sources.take(order, 1), ends)]
    return plan[0], torch.from_numpy(batch_sizes), *plan[1:]


def _keep_dynamo_out(dynamo: ModuleType) -> None:
    """Where a graph breaks at the plan, Dynamo would compile its NumPy to torch's operations, which lack some types."""
    global _plan
    _plan = dynamo.disable(_plan)


after_import("torch._dynamo", _keep_dynamo_out)


def _values(tensor: Tensor) -> np.ndarray[Any, Any]:
    """What a tensor on any device holds, be it inside a transform of torch.func that does not map over it."""
    while _C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _C._functorch.get_unwrapped(tensor)
    with _C._DisableFuncTorch():  # which would wrap what an operation returns
        return tensor.cpu().numpy()


# ---- the plan in a graph: one operator, whose results have sizes that are known beforehand --------------------------


def _traced_plan(
    lengths: Tensor, reset: Tensor | None, steps: int, batch: int, device: torch.device
) -> tuple[Tensor, ...]:
    """`_plan` as a compiler sees it: what is used of the operator's results has sizes that come with its values."""
    padded = torch.ops.rnnfast.cut.default(lengths, reset, steps, batch, device)
    rows, batch_sizes, columns, sources, ends, counts = padded
    used, longest, segments = (count.item() for count in counts.unbind())
    for count, least, bound in ((used, 0, rows), (longest, 1, batch_sizes), (segments, 0, columns)):
        torch._check(count >= least)
        torch._check(count <= bound.shape[0])
    return rows[:used], batch_sizes[:longest], columns[:segments], sources[:, :segments], ends


# ---- the plans of torch.vmap's members, each with lengths or resets of its own --------------------------------------


class _MappedSegments(Segments):
    """Plans of one size: the last rows and segments of some are not used, and have the place after the batch."""

    def gather(self, input: Tensor) -> Tensor:
        rows = input.flatten(0, 1)
        return rows.index_select(0, self.rows.clamp(max=rows.shape[0] - 1))

    def scatter(self, rows: Tensor) -> Tensor:
        steps, batch = self.shape
        padded = rows.new_zeros(steps * batch + 1, rows.shape[1]).index_copy(0, self.rows, rows)
        return padded[:-1].view(steps, batch, rows.shape[1])


def _mapped_plan(
    lengths: Tensor, reset: Tensor | None, steps: int, batch: int, device: torch.device
) -> tuple[Tensor, ...]:
    *plan, ends, counts = torch.ops.rnnfast.cut.default(lengths, reset, steps, batch, device)
    # What follows the segments' states follows all of them, used or not.
    segments = counts[2:].to(device)  # (1,): torch cannot map a number over no members
    return *plan, torch.where(ends < segments, ends, ends - segments + plan[2].shape[-1])


def _map_plan(info: Any, in_dims: Any, lengths: Tensor, reset: Tensor | None, *others: Any) -> tuple[Any, Any]:
    """torch.vmap's rule of the operator: a plan for each member."""

    def own(tensor: Any, dim: int | None, m: int) -> Any:
        return tensor if dim is None else tensor.select(dim, m)

    members = range(info.batch_size)
    plans = [
        torch.ops.rnnfast.cut.default(own(lengths, in_dims[0], m), own(reset, in_dims[1], m), *others) for m in members
    ]
    return tuple(torch.stack(parts) for parts in zip(*plans, strict=True)), (0,) * 6


def is_known(batch_sizes: Tensor) -> bool:
    """Whether what it holds can be looked at: not in a graph, nor for all members of torch.vmap at once."""
    return not torch.compiler.is_compiling() and not is_mapped(batch_sizes)


# ---- the operator ---------------------------------------------------------------------------------------------------


def _padded_plan(
    lengths: Tensor, reset: Tensor | None, steps: int, batch: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The operator: `_plan` with padding after it, and (3,) int64 on the CPU, how much of it is used."""
    rows, batch_sizes, columns, sources, ends = _plan(lengths, reset, steps, batch, device)
    counts = torch.tensor([len(rows), len(batch_sizes), len(columns)], device="cpu")
    most, places = batch if reset is None else steps * batch, steps * batch
    padded = (
        F.pad(tensor, (0, size - tensor.shape[-1]), value=filling)
        for tensor, size, filling in (
            (rows, places, places),
            (batch_sizes, steps, 0),
            (columns, most, 0),
            (sources, most, 0),
        )
    )
    return *padded, ends, counts


def _fake_padded_plan(
    lengths: Tensor, reset: Tensor | None, steps: int, batch: int, device: torch.device
) -> tuple[Tensor, ...]:
    def empty(*size: int, where: torch.device | str = device) -> Tensor:
        return torch.empty(size, dtype=torch.int64, device=where)

    most = batch if reset is None else steps * batch
    rows, batch_sizes = empty(steps * batch), empty(steps, where="cpu")
    return rows, batch_sizes, empty(most), empty(2, most), empty(2, batch), empty(3, where="cpu")


_library = torch.library.Library("rnnfast", "FRAGMENT")
_library.define(
    "cut(Tensor lengths, Tensor? reset, SymInt steps, SymInt batch, Device device) "
    "-> (Tensor rows, Tensor batch_sizes, Tensor columns, Tensor sources, Tensor ends, Tensor counts)"
)
_library.impl("cut", _padded_plan, "CompositeExplicitAutograd")
torch.library.register_fake("rnnfast::cut", _fake_padded_plan, lib=_library)
torch.library.register_vmap("rnnfast::cut", or_no_members(_map_plan), lib=_library)


def check_reset(reset: Any, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless it is None, or a mask of this shape, the input's without features."""
    if reset is None:
        return
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a bool tensor, got {type(reset).__name__}; use torch.as_tensor")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be a bool tensor, got {reset.dtype}; use reset.bool() if nonzero means a reset")
    if reset.shape != shape:
        expected, given = tuple(shape), tuple(reset.shape)
        raise ValueError(f"reset must have the input's shape without features, {expected}, got {given}")


def of_packed(packed: PackedSequence) -> Segments:
    """The plan of a PackedSequence, whose data are its ragged rows: a segment for each sequence."""
    data, batch_sizes, columns, ends = packed
    batch_sizes = batch_sizes.contiguous()  # as the kernels read them
    if columns is None:
        columns = ends = torch.arange(batch_sizes[0].item(), device=data.device)
    assert ends is not None  # PackedSequence makes it of the sorted indices
    steps, batch = batch_sizes.numel(), columns.numel()
    # The default device may be another than the CPU.
    step = torch.repeat_interleave(torch.arange(steps, device="cpu"), batch_sizes, output_size=data.shape[0])
    segment = torch.arange(data.shape[0], device="cpu") - (batch_sizes.cumsum(0) - batch_sizes)[step]
    rows = step.to(data.device) * batch + columns[segment.to(data.device)]
    return Segments((steps, batch), rows, batch_sizes, columns, columns.expand(2, -1), ends.expand(2, -1))


def _check_lengths(steps: int, batch: int, lengths: Tensor | Sequence[int] | None) -> Tensor:
    if lengths is None:
        return torch.full((batch,), steps, device="cpu")
    if not isinstance(lengths, Tensor):
        try:
            # Of an empty list torch would make floating numbers.
            lengths = torch.as_tensor(lengths, dtype=None if len(lengths) else torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"lengths must be a tensor or a list, one for each sequence, got {lengths!r}") from None
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must hold one length for each of the {batch} sequences, got {tuple(lengths.shape)}")
    return lengths
