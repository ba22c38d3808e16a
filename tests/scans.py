"""Random layers as the scan operators take them, and the names of what these return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnfast.cells import CELLS

OUTPUTS = ("output", "h_n", "c_n", "tape")
GRADIENTS = ("d_input", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh", "d_w_hr", "d_h_0", "d_c_0")


def random_layer(
    cell: str,
    hidden: int,
    batch: int,
    steps: int,
    dtype: torch.dtype,
    *,
    lanes: int = 1,
    inputs: int = 3,
    token_ids: bool = False,
    ragged: bool = False,
    bias: bool = True,
    seed: int | None = None,
    device: str | torch.device = "cpu",
) -> list[Any]:
    """The arguments of a forward scan but `save_tape`: two lanes are the two directions of a layer."""
    generator = torch.Generator().manual_seed(hidden + 7 * batch if seed is None else seed)

    def uniform(*shape: int, scale: float = 1.0) -> Tensor:
        return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale).to(device, dtype)

    rows, batch_sizes = steps * batch, None
    if ragged:
        lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
        lengths[0] = steps
        batch_sizes = (lengths[None, :] > torch.arange(steps)[:, None]).sum(1)
        rows = int(batch_sizes.sum())
    input = torch.randint(inputs, (rows,), generator=generator).to(device) if token_ids else uniform(rows, inputs)
    scale, gate_rows = hidden**-0.5, CELLS[cell].gates * hidden
    biases = [uniform(lanes, gate_rows, scale=scale) if bias else None for _ in range(2)]
    w_ih, w_hh = uniform(lanes, gate_rows, inputs, scale=scale), uniform(lanes, gate_rows, hidden, scale=scale)
    h_0 = uniform(lanes, batch, hidden)
    c_0 = uniform(lanes, batch, hidden) if CELLS[cell].has_cell_state else None
    return [input, w_ih, w_hh, *biases, None, h_0, c_0, batch_sizes, cell, lanes > 1]


def random_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients of output, h_n and (where the cell has one) c_n."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(o) if o.numel() else None for o in outputs[:3]]


def widened(arguments: Sequence[Any]) -> list[Any]:
    """The same values in float64."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
