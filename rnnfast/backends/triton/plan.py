"""Which kernel runs a layer, and in what tiles: by cell, hidden size, dtype and, beyond the block scan, batch rows.

The limits of the block scan are the sizes that compile without a spill for sm_80 and sm_90
(tests/triton/test_compile.py holds them to it). Which of the other kernels comes first is a design estimate: speed has
not been measured on a GPU yet.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from rnnfast.cells import CELLS


class Plan(NamedTuple):
    """A kernel and its tiles.

    `kernel`: "registers" or "shared" (the block scan, by where it keeps W_hh), "resident" or "step" (the step scan,
    with W_hh kept in shared memory from step to step or read again), or "gates" (torch's GEMM and the gates' kernel).
    `rows` and `units` of a program's tile, `warps` it runs on; `depth`: how much of the inner dimension the step scan
    takes at a time; `stages` of its load pipeline.
    """

    kernel: str
    rows: int
    units: int
    warps: int
    depth: int = 0
    stages: int = 1

    def constants(self, cell: str) -> dict[str, int | bool]:
        """What the kernel is compiled for: the cell's sizes, these tiles, and the warps."""
        sizes = {"GATES": CELLS[cell].gates, "TAPE": CELLS[cell].tape, "ROWS": self.rows, "UNITS": self.units}
        # Triton 3.9 warns where this is left to its default, which 3.10 changes: a multiplication and an addition each.
        constants: dict[str, int | bool] = {**sizes, "num_warps": self.warps, "enable_fp_fusion": True}
        if self.kernel in ("registers", "shared"):
            constants["DOT"] = self.kernel == "shared"
            if torch.version.hip is None:
                # A program may have all registers of a multiprocessor. By itself, ptxas leaves half of them to others,
                # and for that spills, or waits for each value it reads before it asks for the next.
                constants["maxnreg"] = min(MOST_REGISTERS, REGISTERS // (32 * self.warps))
            return constants
        if self.kernel in ("resident", "step"):
            return {**constants, "DEPTH": self.depth, "RESIDENT": self.kernel == "resident"}
        return constants

    def padded(self, hidden: int) -> int:
        """How many units the kernel expects in w_hh."""
        if self.kernel in ("registers", "shared"):
            return self.units
        return -(-hidden // self.depth) * self.depth if self.depth else hidden


class Card(NamedTuple):
    """What of a GPU decides: shared memory that a program may have, and how many programs run at once."""

    shared_bytes: int
    multiprocessors: int


H100 = Card(227 * 1024, 132)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def card(device: torch.device) -> Card:
    """What `plan` asks of a device. Where kernels are interpreted, plans are those of an H100."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    return Card(getattr(properties, "shared_memory_per_block_optin", 0), properties.multi_processor_count)


# The block scan's sizes: H padded to a power of two, and the warps that run a program. In registers W_hh is float32, a
# program has one batch row and the product is multiply and sum; the fewest warps that hold it exchange least. In shared
# memory (half types only) it has 16 rows and the product runs on tensor cores; more than 8 warps read more of it.
IN_REGISTERS = {
    "rnn_tanh": {16: 1, 32: 1, 64: 2, 128: 4},
    "rnn_relu": {16: 1, 32: 1, 64: 2, 128: 4},
    "lstm": {16: 1, 32: 2, 64: 4},
    "gru": {16: 1, 32: 1, 64: 4},
}
IN_SHARED_MEMORY = {"rnn_tanh": {256: 8}, "rnn_relu": {256: 8}, "lstm": {128: 8}, "gru": {128: 8}}
# The largest padded H for which a program of the step scan keeps its units' share of W_hh (160 KB with its operand).
RESIDENT = {"rnn_tanh": 1024, "rnn_relu": 1024, "lstm": 512, "gru": 512}
# Shared memory of a program that these last two ask for: that of sm_80, which sm_90 and sm_100 exceed.
AMPLE_SHARED_BYTES = 163 * 1024
REGISTERS, MOST_REGISTERS = 65536, 255  # of a multiprocessor, from sm_80 on, and the most of a thread
# The most values of one lane's padded w_hh that the step scan addresses in 32 bits.
ADDRESSED_WEIGHTS = 1 << 31
MOST_BLOCKS = 65_535  # of a launch along y or z
GATES = Plan("gates", rows=4, units=128, warps=4)


def plan(cell: str, hidden: int, batch: int, lanes: int, compute_type: str, card: Card) -> Plan:
    """Returns the kernel and tiles for a layer: the first candidate."""
    return candidates(cell, hidden, batch, lanes, compute_type, card)[0]


def kernel_on(device: torch.device, cell: str, hidden: int, batch: int, lanes: int, compute_type: str) -> str:
    """Returns the name of the kernel that runs a layer on a device."""
    return plan(cell, hidden, batch, lanes, compute_type, card(device)).kernel


@cache
def candidates(cell: str, hidden: int, batch: int, lanes: int, compute_type: str, card: Card) -> tuple[Plan, ...]:
    """Returns every plan that can run a layer, likely the fastest first.

    compute_type: "float32", "tf32", "bfloat16" or "float16", what products are computed in.

    The block scan comes first where it can be: nothing leaves the program. Then the step scan where all its programs
    fit the card at once, so that one launch runs all steps. Beyond that it would be launched for each step and read
    W_hh once for each 16 batch rows, and torch's GEMM comes first.
    """
    half = compute_type in ("bfloat16", "float16")
    ample = card.shared_bytes >= AMPLE_SHARED_BYTES
    units = max(16, _power_of_two(hidden))
    block = []
    if units in IN_REGISTERS[cell]:
        block.append(Plan("registers", rows=1, units=units, warps=IN_REGISTERS[cell][units]))
    # An H that is no multiple of 16 costs addresses, one for each value, which these kernels have no registers for.
    if ample and half and units in IN_SHARED_MEMORY[cell] and hidden % 16 == 0:
        block.append(Plan("shared", rows=16, units=units, warps=IN_SHARED_MEMORY[cell][units]))
    step = []
    if ample and units <= RESIDENT[cell] and compute_type != "tf32":
        # Tensor cores give a tile of 32 units work for 4 warps, whose registers hold no odd H's addresses besides.
        warps = 4 if half and hidden % 16 == 0 else 8
        step.append(Plan("resident", rows=16, units=min(32, units) if half else 16, warps=warps, depth=units))
    step.append(
        Plan(
            "step",
            rows=16,
            units=16 if compute_type == "float32" else 32,
            warps=4,
            depth=32 if compute_type == "tf32" else 64,
            stages=2,
        )
    )
    step = [
        how
        for how in step
        if CELLS[cell].gates * how.padded(hidden) ** 2 < ADDRESSED_WEIGHTS and batch <= how.rows * MOST_BLOCKS
    ]
    if step and programs(step[0], hidden, batch, lanes) <= card.multiprocessors:
        return (*block, *step, GATES)
    return (*block, GATES, *step)


def programs(how: Plan, hidden: int, batch: int, lanes: int) -> int:
    """How many programs the step scan has."""
    return -(-hidden // how.units) * -(-batch // how.rows) * lanes


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count > 0 else 1
