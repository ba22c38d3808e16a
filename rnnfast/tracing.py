"""Whether a tracer, compiler, exporter or transform looks at what runs now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """A decorator: torch.compile calls the function as it is while it traces, and keeps what that returns.

    So its arguments and result are plain values. This is what torch.compiler.assume_constant_result does, without
    importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_jit_traced() -> bool:
    """torch.jit.trace looks on. (A compiler cannot ask, and need not.)"""
    return not torch.compiler.is_compiling() and _C._get_tracing_state() is not None


def is_traced_for_onnx() -> bool:
    """The older of torch's ONNX exporters (dynamo=False) looks on, which knows no operators but torch's."""
    return is_jit_traced() and torch.onnx.is_in_onnx_export()


def is_traced() -> bool:
    """A compiler, exporter or tracer, a torch.func transform or forward-mode AD looks on."""
    return bool(torch.compiler.is_compiling() or is_transformed() or _C._get_tracing_state() is not None)


@constant_in_graphs  # it is traced inside the same transforms
def is_transformed() -> bool:
    """A torch.func transform or forward-mode AD looks on; while a compiler traces, at what it traces."""
    return bool(_C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0)


def is_mapped(tensor: Tensor | None) -> bool:
    """Whether vmap maps over it, be it inside another transform of torch.func."""
    while tensor is not None and _C._functorch.is_functorch_wrapped_tensor(tensor):
        if _C._functorch.is_batchedtensor(tensor):
            return True
        tensor = _C._functorch.get_unwrapped(tensor)
    return False
