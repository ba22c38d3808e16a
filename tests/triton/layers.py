"""The comparison of two results."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}
# Past this relative error of float32 it is no rounding error, but TF32's, say, and no measure of a kernel.
LARGEST_EXPECTED = 1e-5


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
