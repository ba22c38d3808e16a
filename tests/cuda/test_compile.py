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


# Of an LSTM's steps, for two pairs of a row and a unit: the four gates' inputs and the next step's token ids; or d_output, the
# tape and c before.
FETCHED = {"forward": {"LDG.E ": 8, "LDG.E.64 ": 2}, "backward": {"LDG.E.U16 ": 14}}


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, which Triton's package brings")
def test_a_step_waits_for_nothing_from_memory_before_its_product():
    """Instructions are done in order, so the first use of what a load brings is where a warp waits for it."""
    for kernel in compile_instance("bfloat16_cluster", "90a", disassemble=True):
        cell, way = kernel.name.split()[1:]
        if cell != "lstm":
            continue
        before, product, after = loop(kernel.code, "HMMA")
        for load, count in FETCHED[way].items():
            fetched = set()
            for line in [*after, *before]:
                _, *operands = re.split(r"[ ,]+(?=R\d|desc|\[)", line)
                fetched -= set(re.findall(r"\bR\d+\b", " ".join(operands[1:])))
                if load in line:
                    fetched.add(operands[0].strip())
            assert len(fetched) == count, f"{kernel.name}: {load}{sorted(fetched)}"


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, which Triton's package brings")
def test_peers_are_sent_to_before_anything_is_stored():
    for kernel in compile_instance("bfloat16_cluster", "90a", disassemble=True):
        _, _, after = loop(kernel.code, "HMMA")
        sent = [i for i, line in enumerate(after) if "STAS" in line]
        stored = [i for i, line in enumerate(after) if "STG" in line]
        assert stored
        if sent:  # where sums are scattered, they leave from the product itself
            assert max(sent) < min(stored), kernel.name


def loop(code, product):
    """The outermost loop around the first instruction with this name: what is before it, it, what is behind it."""
    first = next(i for i, line in enumerate(code) if product in line)
    jumps = [(int(found[1], 16) // 16, i) for i, line in enumerate(code) if (found := re.search(r"BRA (0x\w+)", line))]
    start, end = min((to, i) for to, i in jumps if to <= first <= i < code_end(code))
    return code[start:first], code[first], code[first + 1 : end]


def code_end(code):
    """Where the code ends that is in order: behind it are the rare ways of what is done by whole warps."""
    return next(i for i, line in enumerate(code) if line.strip() == "EXIT")
