"""Packed weights, which calls without gradients use again as long as the weights have not changed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from rnnfast.backends import cpu
from rnnfast.cells import CELLS

Key = tuple[str, bool, bool, tuple[int, ...]]  # cell, ids and extended of `packed_weights`, and the weights' ids


class _Packed(NamedTuple):
    stamp: tuple[Any, ...]
    samples: Tensor  # of `weight_samples`
    weights: Tensor
    memory: list[Tensor]  # of the tensors: new ones might else come to lie where they were


class _Kept(NamedTuple):
    """A weight of which packed weights are kept."""

    end: weakref.finalize[..., Any]  # forgets them
    keys: set[Key]  # of `packings`


packings: dict[Key, _Packed] = {}  # what `packed_weights` keeps
_kept: dict[int, _Kept] = {}  # the weights that it was made of, by id
fused_steps = 0  # of optimizers with fused=True, whose writes torch does not count


def packed_weights(lanes: Sequence[Sequence[Any]], cell: str, ids: bool, extended: bool = False) -> Tensor:
    """Returns a layer's weights packed for `scan_packed`, from the last call's while they have not changed.

    A change is seen by the tensors' version counters and addresses, and by the steps of fused optimizers. Other writes
    that count no version, as those through `.data`, are seen by a sample of each weight, which has all of a bias and of
    a small matrix, and of a large one elements of every unit, gate and column; only one that leaves those as they were
    needs `forget`. Weights in shared memory are compared whole. What is kept goes when a weight does.

    Args:
        lanes: for each direction its w_ih (G*H, I), w_hh (G*H, P), b_ih, b_hh (G*H,) or None, w_hr (P, H) or None.
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        ids: the input will be token ids.
        extended: packs w_ih, w_hh and w_hr for `rnnfast::scan_extended_cpu` instead.
    """
    lanes = [(*lane[:2], None, None, *lane[4:]) for lane in lanes] if extended else lanes
    tensors = [tensor for lane in lanes for tensor in lane if tensor is not None]
    key = (cell, ids, extended, tuple(map(id, tensors)))
    found = packings.get(key)
    if (
        found is not None
        and found.stamp == (fused_steps, *[(tensor._version, tensor.data_ptr()) for tensor in tensors])
        and all(tensor.is_contiguous() for tensor in tensors)  # and not now a transpose of the same memory
        and cpu.are_as_they_were(found.samples.data_ptr())
    ):
        return found.weights
    return _pack(lanes, cell, ids, extended, key, tensors)


def _pack(
    lanes: Sequence[Sequence[Any]], cell: str, ids: bool, extended: bool, key: Key, tensors: list[Tensor]
) -> Tensor:
    cpu.load()
    _watch_fused_optimizers()
    # A tensor made in inference mode has no version, one that is not contiguous no samples: packed again every time.
    is_kept = all(tensor.is_contiguous() and not tensor.is_inference() for tensor in tensors)
    # All of this is read before the weights are packed, so that a write meanwhile is seen later.
    stamp = (fused_steps, *((tensor._version, tensor.data_ptr()) for tensor in tensors)) if is_kept else ()
    units = lanes[0][1].shape[0] // CELLS[cell].gates
    samples = weight_samples(tensors, units) if is_kept else None
    packed: Tensor
    with torch.no_grad():
        weights = [None if column[0] is None else _stack(column) for column in zip(*lanes, strict=True)]
        if extended:
            w_ih, w_hh, _, _, w_hr = weights
            packed = torch.ops.rnnfast.scan_extended_cpu_pack(w_ih, w_hh, w_hr, cell, ids)
        else:
            packed = torch.ops.rnnfast.scan_cpu_pack(*weights, cell, ids)
    if samples is None:
        return packed
    for tensor in tensors:
        if id(tensor) not in _kept:
            _kept[id(tensor)] = _Kept(weakref.finalize(tensor, _forget_weight, id(tensor)), set())
        _kept[id(tensor)].keys.add(key)
    packings[key] = _Packed(stamp, samples, packed, [tensor.detach() for tensor in tensors])
    return packed


def _stack(weights: Sequence[Tensor]) -> Tensor:
    """The weights of all lanes; those of one are not copied."""
    return weights[0].contiguous().unsqueeze(0) if len(weights) == 1 else torch.stack([*weights])


def count_fused_step(optimizer: Optimizer, *_: Any) -> None:
    """A hook of all optimizers, from the first packing on."""
    global fused_steps
    if not torch.compiler.is_compiling() and any(group.get("fused") for group in optimizer.param_groups):
        fused_steps += 1


@cache
def _watch_fused_optimizers() -> None:
    register_optimizer_step_post_hook(count_fused_step)


def _forget_weight(weight: int) -> None:
    """Drops all packings made from the weight of that id, which is gone; other weights of the layer may live on."""
    kept = _kept.pop(weight, None)
    for key in tuple(kept.keys) if kept else ():  # another thread may be packing
        packings.pop(key, None)
        for other in key[-1]:
            if other in _kept:
                _kept[other].keys.discard(key)


def forget() -> None:
    """Has all weights packed again when they are needed next; no weak reference to any is left."""
    for weight in list(_kept.values()):
        weight.end.detach()
    _kept.clear()
    packings.clear()


def weight_samples(weights: Sequence[Tensor], units: int) -> Tensor:
    """What tells whether contiguous weights of so many units hold what they do now, while they are where they are."""
    cpu.load()
    # Another process that writes to shared weights counts no version here, be it under `torch.no_grad()`.
    is_shared = any(weight.is_shared() for weight in weights)
    samples: Tensor = torch.ops.rnnfast.weight_samples_cpu([weight.detach() for weight in weights], units, is_shared)
    return samples


def scan_packed(
    input: Tensor,
    packed: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan without gradients, with weights from `packed_weights`; bitwise equal to `rnnfast.scan.scan`.

    A call costs about five microseconds beyond its arithmetic. Arguments and results are those of `rnnfast.scan.scan`,
    contiguous; input (N, I) or (N,) ids, h_0 (D, B, P), c_0 (D, B, H) or None.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.rnnfast.scan_cpu_packed.default(
        input, packed, h_0, c_0, batch_sizes, bidirectional
    )
    return result
