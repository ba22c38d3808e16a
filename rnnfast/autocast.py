"""What torch's autocast has to do with recurrent layers: modules convert what they are given, operators never do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from rnnfast.tracing import constant_in_graphs

Result = TypeVar("Result")


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast computes in on this kind of device; None where it is off, or unknown as on "meta"."""
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def dtype_of_products(weight: Tensor) -> torch.dtype:
    """The type of a layer's products: that of its weights, or autocast's, which leaves float64 alone."""
    autocast = autocast_dtype(weight.device.type)
    return weight.dtype if autocast is None or weight.dtype == torch.float64 else autocast


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """A tensor, if there is one, as autocast casts: floating ones, but for float64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def without_autocast(implementation: Callable[..., Result]) -> Callable[..., Result]:
    """The implementation of an operator, so that it computes in the dtypes of its arguments.

    Autocast lets an operator that it does not know pass, and then changes the products within.
    """

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Result:
        device = next(argument.device.type for argument in arguments if isinstance(argument, Tensor))
        if autocast_dtype(device) is None:
            return implementation(*arguments)
        with torch.autocast(device, enabled=False):
            return implementation(*arguments)

    return run


@constant_in_graphs  # torch 2.11 and before cannot trace it
def _has_autocast(device: str) -> bool:
    return bool(torch.amp.is_autocast_available(device))
