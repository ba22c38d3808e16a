"""Masks of dropout, weight drop and zoneout.

Masks are drawn in float32 on the generator's device and then moved, so that a seed gives the same masks for every
dtype, layout and backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast.sequences import Segments

__all__ = ["dropout_mask", "variational_dropout"]


def _chance(p: float, shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A bool tensor, each element True with probability p."""
    source = {"device": device} if generator is None else {"device": generator.device, "generator": generator}
    return (torch.rand(*shape, dtype=torch.float32, **source) < p).to(device)


def dropout_mask(p: float, shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A mask that zeroes with probability p and scales the rest by 1 / (1 - p), of the dtype and device of `like`."""
    return (~_chance(p, shape, like.device, generator)).to(like.dtype) / (1 - p)


class Masks(NamedTuple):
    """Draws the masks of a call for B sequences of T steps, and lays them out as its rows lie.

    shape: (T, B).
    segments: the plan of a ragged batch, None for a padded one.
    generator: what is drawn from; torch's default generator if None.
    """

    shape: tuple[int, int]
    segments: Segments | None
    generator: torch.Generator | None

    def of_input(self, p: float, rows: Tensor) -> Tensor:
        """Dropout of rows, one mask a sequence: (B, F) for padded rows (T, B, F), (N, F) for ragged ones."""
        mask = dropout_mask(p, (self.shape[1], rows.shape[-1]), rows, self.generator)
        return mask if self.segments is None else mask.index_select(0, self.segments.rows % self.shape[1])

    def of_state(self, p: float, h: Tensor) -> Tensor:
        """Dropout of a lane's states h (B, H), or (S, H) of S segments; those of one sequence share a mask."""
        mask = dropout_mask(p, (self.shape[1], h.shape[-1]), h, self.generator)
        return mask if self.segments is None else mask.index_select(0, self.segments.columns)

    def of_steps(self, p: float, h: Tensor) -> Tensor:
        """Where a lane's states h stay what they were: bool (N, H), drawn anew for every step."""
        stays = _chance(p, (*self.shape, h.shape[-1]), h.device, self.generator)
        return stays.flatten(0, 1) if self.segments is None else self.segments.gather(stays)


def variational_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    batch_first: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dropout with one mask per sequence, the same at every step (Gal & Ghahramani 2016; "locked dropout" elsewhere).

    Args:
        input: (T, B, F), or (B, T, F) with batch_first.
        p: the probability of zeroing a feature of a sequence, in [0, 1); the rest is scaled by 1 / (1 - p).
        training: False returns the input.
        batch_first: as in the layers.
        generator: the source of the mask; torch's default generator if None.

    Raises:
        ValueError: p outside [0, 1), or an input that does not have three dimensions.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability has to be in [0, 1), got {p}")
    if input.dim() != 3:
        raise ValueError(f"variational dropout takes (T, B, F) or, with batch_first, (B, T, F), got {input.dim()}D")
    if not training or p == 0:
        return input
    mask = dropout_mask(p, (input.shape[0 if batch_first else 1], input.shape[2]), input, generator)
    return input * mask.unsqueeze(1 if batch_first else 0)
