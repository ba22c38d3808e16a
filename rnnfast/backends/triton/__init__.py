"""The Triton backend: portable GPU kernels. Importing this package imports no Triton; `load()` does.

Not yet run on a GPU: its kernels are checked in Triton's interpreter and compiled for sm_80 and sm_90 only.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from rnnfast.autocast import without_autocast
from rnnfast.backends import gpu_scan
from rnnfast.backends.triton.plan import DTYPES

if TYPE_CHECKING:
    from rnnfast.dispatch import Request

_library: torch.library.Library | None = None


def interpreted() -> bool:
    """True where Triton's interpreter is asked for: kernels then run on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


def why_not() -> str | None:
    """Returns None where the backend can run, else the reason in one line."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; Linux only)"
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA or ROCm device is visible to PyTorch"
    return None


def declines(request: Request) -> str | None:
    """Returns why this backend cannot run a `rnnfast.dispatch.Request`, or None."""
    if request.device == "cpu" and not interpreted():
        return "it runs on a GPU, the input is on the CPU"
    reason = gpu_scan.unsupported(request.dtype, request.projected, DTYPES)
    return None if reason is None else f"it {reason}"


def load() -> None:
    """Registers the implementations of `rnnfast::scan_triton` and its backward; once is enough.

    Raises RuntimeError where the backend cannot run.
    """
    global _library
    if _library is not None:
        return
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the triton backend is not available: {reason}")
    from rnnfast.backends.triton import launch

    if interpreted():
        from rnnfast.backends.triton import interpreter

        interpreter.repair()
    library = torch.library.Library("rnnfast", "IMPL")
    for key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
        library.impl("scan_triton", without_autocast(launch.forward), key)
        library.impl("scan_triton_backward", without_autocast(launch.backward), key)
    _library = library
