"""A kernel that evaluates one of the cells' functions on a vector."""

import triton
import triton.language as tl

from rnnfast.backends.triton.cells import sigmoid, tanh
from rnnfast.backends.triton.step import opaque, round_to_tf32

__all__ = ["evaluate", "opaque", "round_to_tf32", "sigmoid", "tanh"]


@triton.jit
def evaluate(x, y, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, FUNCTION(tl.load(x + at, mask=at < n)), mask=at < n)
