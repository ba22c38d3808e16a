"""nvcc compiles the kernels for GPUs that are not here, within a budget of registers and without spills.

Ordinarily two files, for time's sake; RNNFAST_COMPILE_ALL=1 compiles every file for every architecture.
"""

import os
import re

import pytest

from rnnfast.backends.cuda import build

from .compile_report import compile_instance, disassembler, instances

pytestmark = pytest.mark.skipif(build.nvcc() is None, reason="needs nvcc, the CUDA compiler")

REPRESENTATIVE = [("float32_cluster", "90a"), ("bfloat16_grid", "80")]
ALL = [(stem, architecture) for stem in instances() for architecture in build.DEFAULT_ARCHITECTURES]
# 512 threads a block leave each 128 registers. What spills (stores and loads together) goes to the L1 cache: that is
# let pass in float64, which no goal is set for.
REGISTERS = 128
SPILLED_BYTES = {"float64": 512}


@pytest.mark.parametrize(("stem", "architecture"), ALL if os.environ.get("RNNFAST_COMPILE_ALL") else REPRESENTATIVE)
def test_compiles_within_the_budget(stem, architecture):
    kernels = compile_instance(stem, architecture)
    assert len(kernels) == (24 if stem == "steps" else 6)
    for kernel in kernels:
        assert kernel.registers <= REGISTERS, kernel
        assert kernel.spilled_bytes <= SPILLED_BYTES.get(stem.split("_")[0], 0), kernel


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, which Triton's package brings")
@pytest.mark.parametrize(("stem", "of_a_step"), [("bfloat16_cluster", {"forward": 8, "backward": 14})])
def test_what_is_fetched_for_a_step_is_not_waited_for_before_the_product(stem, of_a_step):
    """Instructions are done in order, so the first use of what a load brings is where a warp waits for it.

    Of an LSTM's steps: of two pairs of a row and a unit the four gates' inputs; or d_output, the tape and c before.
    """
    for kernel in compile_instance(stem, "90a", disassemble=True):
        cell, way = kernel.name.split()[1:]
        if cell != "lstm":
            continue
        begin = next(i for i, line in enumerate(kernel.code) if "UCGABAR_WAIT" in line)
        product = next(i for i, line in enumerate(kernel.code) if i > begin and "HMMA" in line)
        fetched, floating = set(), "LDG.E.U16 " if way == "backward" else "LDG.E "
        for line in kernel.code[begin:product]:
            _, *operands = re.split(r"[ ,]+(?=R\d|desc|\[)", line)
            read = set(re.findall(r"\bR\d+\b", " ".join(operands[1:])))
            fetched -= read
            if floating in line:
                fetched.add(operands[0].strip())
        assert len(fetched) == of_a_step[way], f"{kernel.name}: {sorted(fetched)}"
