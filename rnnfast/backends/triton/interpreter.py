"""What Triton's own interpreter (TRITON_INTERPRET=1) needs before it runs our kernels; nothing here reaches a GPU.

Four things in Triton 3.6 differ from the device, and are set right here so that no kernel need know of them:

- `range(n)` refuses a kernel's integer argument (kept as an array of one element, which NumPy 2.4 turns into no int);
- float32 becomes bfloat16 by cutting bits off, where the device rounds to nearest, ties to even;
- `tl.dot` multiplies the bit patterns of bfloat16 operands as integers;
- inline assembly is refused, also where it leaves its operand as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_original_patch = interpreter._patch_lang_tensor
_original_convert = interpreter._convert_float
_original_dot = interpreter.InterpreterBuilder.create_dot


def repair() -> None:
    """Sets the interpreter right for this process; calling it again changes nothing."""
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.create_inline_asm = _create_inline_asm


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.bfloat16 and target == tl.float32:
        return _from_bfloat16(values)
    if source == tl.float32 and target == tl.bfloat16:
        return _to_bfloat16(values)
    return _original_convert(values, source, target, rounding)


def _from_bfloat16(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: Any) -> Any:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    a, b = (
        interpreter.TensorHandle(_from_bfloat16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    )
    return _original_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


class _Unchanged:
    def __init__(self, values: Any) -> None:
        self.get_result = values.__getitem__


def _create_inline_asm(self: Any, asm: str, constraints: str, values: Any, *_: Any) -> Any:
    if (asm, constraints) != ("// $0", "=r,0"):
        raise NotImplementedError(f"the interpreter knows no assembly: {asm}")
    return _Unchanged(values)
