"""The cpu backend: the native library of csrc/cpu, loaded, and its C functions.

Nothing is compiled or loaded at import.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnnfast import files
from rnnfast.backends.cpu import build
from rnnfast.errors import note

if TYPE_CHECKING:
    from rnnfast.dispatch import Request

# Operators of this backend alone: weights packed once for many calls without gradients, and what is done with them.
_SCHEMAS = (
    "scan_cpu_pack(Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, str cell, bool ids) -> Tensor",
    "scan_extended_cpu_pack(Tensor w_ih, Tensor w_hh, Tensor? w_hr, str cell, bool ids) -> Tensor",
    "scan_cpu_packed(Tensor input, Tensor packed, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, bool bidirectional)"
    " -> (Tensor output, Tensor h_n, Tensor c_n)",
    "weight_samples_cpu(Tensor[] weights, int units, bool whole) -> Tensor",
    "direct_plan_cpu(Tensor[] packed, Tensor weight_samples) -> Tensor",
    "direct_layer_cpu(Tensor w_ih, Tensor w_hh, Tensor? w_hr, str cell, bool ids) -> Tensor",
    "direct_empty_cpu(Tensor like, int[] sizes) -> Tensor",
)
_library: Any = None
_function: Any = None
# The functions of csrc/cpu/direct.h, once the library is loaded. Each takes the fields of its structure, and returns
# whether it is done, or the weights are stale, or something else is wrong.
infer: Any = None
forward: Any = None
backward: Any = None
weight_gradients: Any = None
pack_backward: Any = None  # returns a number of bytes
DONE, STALE = 0, 1
is_plain: Any = None  # these two are of csrc/cpu/python.cpp
empty: Any = None  # keeps the memory of a large tensor from call to call
gates_bytes: Any = None  # takes the address of a layer
are_as_they_were: Any = None  # of csrc/cpu/weight_samples.h; takes their address
is_stalled: Any = None  # takes nothing; whether this thread's scans lately lost more by a team than they gained
# Of sizes, strides and a dtype; what torch's compiler calls, in half of the time of `torch.empty`.
empty_strided: Any = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
_loaded = False
_failure: str | None = None


def load() -> None:
    """Loads the native library, compiling it first if need be (about a minute on two cores, once).

    Of several threads that ask for a backend, `dispatch` lets one load it.

    Raises:
        RuntimeError: there is no library and it cannot be compiled; the message says why.
    """
    global _loaded, _failure, _library
    global infer, forward, backward, weight_gradients, pack_backward, gates_bytes, are_as_they_were, is_stalled
    global is_plain, empty, _function
    if _loaded:
        return
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    try:
        path = build.library()
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise RuntimeError(f"{error}; if it is damaged, delete that file") from error
        _library = torch.library.Library("rnnfast", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)
        torch.library.register_fake("rnnfast::direct_empty_cpu", _empty, lib=_library)
        functions = ctypes.CDLL(str(path))
        _function = ctypes.PyDLL(str(path)).rnnfast_function  # with Python's lock, unlike the others
        _function.argtypes, _function.restype = [ctypes.c_char_p, ctypes.py_object], ctypes.py_object
        names = ("infer", "forward", "backward", "weight_gradients", "pack_backward")
        infer, forward, backward, weight_gradients, pack_backward = (built_in(name, None) for name in names)
        is_plain = built_in("is_plain", Tensor)
        empty = built_in("empty", (empty_strided, torch.ops.rnnfast.direct_empty_cpu.default))
        gates_bytes, are_as_they_were = functions.rnnfast_gates_bytes_cpu, functions.rnnfast_are_as_they_were_cpu
        gates_bytes.argtypes = are_as_they_were.argtypes = [ctypes.c_void_p]
        is_stalled = functions.rnnfast_is_stalled_cpu
    except (OSError, RuntimeError, ValueError) as error:
        _failure = f"the native library failed to compile or load: {error}"
        if isinstance(error, OSError) and str(error.filename).startswith(str(files.cache_folder())):
            _failure += "; set RNNFAST_CACHE to a folder that can be written"
        # `auto` goes on without it, and slower, as `explain` tells those who ask.
        note(_failure)
        raise RuntimeError(_failure) from error
    _loaded = True


def built_in(name: str, of: Any) -> Callable[..., Any]:
    """A function of csrc/cpu/python.cpp that keeps `of`, which is said there."""
    function: Callable[..., Any] = _function(name.encode(), of)
    return function


def _empty(like: Tensor, sizes: list[int]) -> Tensor:
    """`direct_empty_cpu` without memory, for torch's compiler, which compiled autograd shows this function."""
    return like.new_empty(sizes)


def why_not() -> str | None:
    """Returns why the native library is not available and cannot be compiled, or None. Compiles and loads nothing."""
    return None if _loaded else _failure or build.why_not()


def declines(request: Request) -> str | None:
    """Returns why this backend cannot run a `rnnfast.dispatch.Request`, or None."""
    if request.dtype in (torch.float32, torch.float64, torch.bfloat16):
        return None
    return f"it computes in float32, float64 and bfloat16, this call in {request.dtype}"
