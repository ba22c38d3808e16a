"""Which kernel runs a layer, and in what tiles: a table by cell, hidden size and dtype.

The batch size takes no part, so a row's result does not depend on the batch around it. The limits of the block scan
are the sizes that compile without a spill for sm_80 and sm_90 (tests/triton/test_compile.py holds them to it); speed
has not been measured on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Plan(NamedTuple):
    """A kernel and its tiles.

    `rows` and `units` of a program's tile, `warps` it runs on; `dot`: tl.dot (else multiply and sum, block scan only);
    `depth`: how much of the inner dimension the step scan takes at a time; `resident`: all of it, with the program's
    share of W_hh kept in shared memory from step to step; `stages` of its load pipeline elsewhere.
    """

    kernel: str
    rows: int
    units: int
    warps: int
    dot: bool = True
    depth: int = 0
    resident: bool = False
    stages: int = 1

    @property
    def tiles(self) -> dict[str, int | bool]:
        tiles: dict[str, int | bool] = {"ROWS": self.rows, "UNITS": self.units}
        if self.kernel == "block":
            return {**tiles, "DOT": self.dot}
        return {**tiles, "DEPTH": self.depth, "RESIDENT": self.resident}

    def padded(self, hidden: int) -> int:
        """How many units the kernel expects in w_hh."""
        return self.units if self.kernel == "block" else -(-hidden // self.depth) * self.depth


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(dtype: torch.dtype, projected: bool) -> str | None:
    """Returns None for what this backend computes, else why not."""
    if projected:
        return "has no LSTM projection (proj_size)"
    if dtype not in DTYPES:
        return f"computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


# The block scan's sizes: H padded to a power of two, and the warps that run a program. In registers W_hh is float32, a
# program has one batch row and the product is multiply and sum; the fewest warps that hold it exchange least. In shared
# memory (half types only) it has 16 rows and the product runs on tensor cores.
IN_REGISTERS = {
    "rnn_tanh": {16: 1, 32: 1, 64: 2, 128: 4},
    "rnn_relu": {16: 1, 32: 1, 64: 2, 128: 4},
    "lstm": {16: 1, 32: 2, 64: 8},
    "gru": {16: 1, 32: 1, 64: 4},
}
IN_SHARED_MEMORY = {"rnn_tanh": {256: 16}, "rnn_relu": {256: 16}, "lstm": {128: 8}, "gru": {128: 16}}
# The largest padded H for which a program of the step scan keeps its units' share of W_hh (160 KB with its operand).
RESIDENT = {"rnn_tanh": 1024, "rnn_relu": 1024, "lstm": 512, "gru": 512}
# Shared memory of a program that these last two ask for: that of sm_80, which sm_90 and sm_100 exceed.
AMPLE_SHARED_BYTES = 163 * 1024


def plan(cell: str, hidden: int, dtype: torch.dtype, allow_tf32: bool, shared_bytes: int) -> Plan:
    """Returns the kernel and tiles for a layer of `hidden` units, a program having `shared_bytes` of shared memory."""
    half = dtype is not torch.float32
    ample = shared_bytes >= AMPLE_SHARED_BYTES
    units = max(16, 1 << (hidden - 1).bit_length())
    if units in IN_REGISTERS[cell]:
        return Plan("block", rows=1, units=units, warps=IN_REGISTERS[cell][units], dot=False)
    # An H that is no multiple of 16 costs addresses, one for each value, which these kernels have no registers for.
    if ample and half and units in IN_SHARED_MEMORY[cell] and hidden % 16 == 0:
        return Plan("block", rows=16, units=units, warps=IN_SHARED_MEMORY[cell][units])
    if ample and units <= RESIDENT[cell] and (half or not allow_tf32):
        return Plan("step", rows=16, units=32 if half else 16, warps=8, depth=units, resident=True)
    if half:
        return Plan("step", rows=16, units=32, warps=4, depth=64, stages=2)
    return Plan("step", rows=16, units=32 if allow_tf32 else 16, warps=4, depth=32 if allow_tf32 else 64, stages=2)
