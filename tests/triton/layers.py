"""Random layers as the scan operators take them, and the comparison of two results."""

from __future__ import annotations

import torch
from torch import Tensor

from rnnfast.cells import CELLS

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}
# Past this relative error of float32 it is no rounding error, but TF32's, say, and no measure of a kernel.
LARGEST_EXPECTED = 1e-5


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
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[object]:
    """The arguments of a forward scan but `save_tape`: two lanes are the two directions of a layer."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, scale: float = 1.0) -> Tensor:
        return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale).to(device, dtype)

    rows, batch_sizes = steps * batch, None
    if ragged:
        lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
        lengths[0] = steps
        batch_sizes = (lengths[None, :] > torch.arange(steps)[:, None]).sum(1)
        rows = int(batch_sizes.sum())
    ids = torch.randint(inputs, (rows,), generator=generator).to(device)
    input = ids if token_ids else uniform(rows, inputs)
    scale, gate_rows = hidden**-0.5, CELLS[cell].gates * hidden
    biases = [uniform(lanes, gate_rows, scale=scale) if bias else None for _ in range(2)]
    w_ih, w_hh = uniform(lanes, gate_rows, inputs, scale=scale), uniform(lanes, gate_rows, hidden, scale=scale)
    h_0 = uniform(lanes, batch, hidden)
    c_0 = uniform(lanes, batch, hidden) if CELLS[cell].has_cell_state else None
    return [input, w_ih, w_hh, *biases, None, h_0, c_0, batch_sizes, cell, lanes > 1]


def widened(layer: list[object]) -> list[object]:
    """The same layer, its values unchanged, in float64."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in layer]


def random_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients of output, h_n and (where the cell has one) c_n."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) if o.numel() else None for o in outputs[:3]]


def assert_near(
    name: str, actual: Tensor, truth: Tensor, dtype: torch.dtype, factor: float, plain: Tensor | None = None
) -> None:
    """The error's RMS over the truth's RMS is at most `factor` roundings of the dtype (half an eps each).

    Errors of float32 sums grow with their length: where `plain`, the reference's own result in float32, is not as exact
    as that, the error is at most twice its error.
    """
    assert actual.shape == truth.shape, f"{name}: {tuple(actual.shape)} where {tuple(truth.shape)} is right"
    assert actual.dtype == dtype, f"{name} is {actual.dtype}"
    if truth.numel() == 0:
        return
    error, scale = _rms_error(actual, truth), _rms_error(torch.zeros_like(truth), truth)
    allowed = factor * EPS[dtype] / 2 * scale
    if plain is not None:
        expected = _rms_error(plain, truth)
        assert expected <= LARGEST_EXPECTED * scale, f"{name}: the reference itself is off by {expected / scale:.2e}"
        allowed = max(allowed, 2 * expected)
    assert error <= allowed, f"{name}: relative RMS error {error / scale:.2e}, allowed {allowed / scale:.2e}"


def _rms_error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.cpu().double() - truth.cpu().double()).square().mean().sqrt())
