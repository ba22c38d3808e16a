"""The CUDA backend: kernels that keep the recurrent weights on the chip for all steps (csrc/cuda).

Importing this package compiles and loads nothing. Not yet run on a GPU: its kernels are run on the CPU by an emulator
of the hardware, and compiled for sm_80 and sm_90a.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rnnfast.autocast import without_autocast
from rnnfast.backends import gpu_scan
from rnnfast.backends.cuda import build, launch

if TYPE_CHECKING:
    from rnnfast.dispatch import Request

_library: torch.library.Library | None = None
_failure: str | None = None


def why_not() -> str | None:
    """Returns None where the backend can run, else the reason in one line. Compiles and loads nothing."""
    if _failure is not None:
        return _failure
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to PyTorch"
    oldest = min(torch.cuda.get_device_capability(d) for d in range(torch.cuda.device_count()))
    if oldest < (8, 0):
        return f"it needs compute capability 8.0, this device has {oldest[0]}.{oldest[1]}"
    return build.why_not()


def declines(request: Request) -> str | None:
    """Returns why this backend cannot run a `rnnfast.dispatch.Request`, or None."""
    reason = gpu_scan.unsupported(request.dtype, request.projected, launch.DTYPES)
    return None if reason is None else f"it {reason}"


def load() -> None:
    """Registers the implementations of `rnnfast::scan_cuda` and its backward, compiling the kernels at the first use.

    Raises:
        RuntimeError: the backend cannot run here, or its kernels do not compile; the message says why.
    """
    global _library, _failure
    if _library is not None:
        return
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the cuda backend is not available: {reason}")
    try:
        torch.ops.load_library(str(build.library()))
    except (OSError, RuntimeError) as error:
        _failure = f"its kernels failed to compile or load: {error}"
        raise RuntimeError(f"the cuda backend is not available: {_failure}") from error
    _library = register("CUDA")


def register(key: str) -> torch.library.Library:
    """Registers the operators' implementations for a dispatch key; they last as long as the library returned."""
    library = torch.library.Library("rnnfast", "IMPL")
    library.impl("scan_cuda", without_autocast(launch.forward), key)
    library.impl("scan_cuda_backward", without_autocast(launch.backward), key)
    return library
