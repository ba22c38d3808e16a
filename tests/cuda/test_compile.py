"""nvcc compiles the kernels for GPUs that are not here, within a budget of registers and without spills.

Ordinarily two files, for time's sake; RNNFAST_COMPILE_ALL=1 compiles every file for every architecture.
"""

import os
import re

import pytest

from rnnfast.backends.cuda import build

from .compile_report import compile_instance, disassembler, instances, nvcc_version

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
    on_tensor_cores = stem.startswith(("tf32", "bfloat16", "float16"))
    assert len(kernels) == (24 if stem == "steps" else 12 if on_tensor_cores else 6)
    for kernel in kernels:
        assert kernel.registers <= REGISTERS, kernel
        assert kernel.spilled_bytes <= SPILLED_BYTES.get(stem.split("_")[0], 0), kernel


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, which Triton's package brings")
def test_what_a_backward_step_fetches_is_not_waited_for_before_the_product():
    """Instructions are done in order, so the first use of what a load brings is where a warp waits for it."""
    for kernel in compile_instance("bfloat16_cluster", "90a", disassemble=True):
        cell, way, pairs = kernel.name.split()[1:]
        if (cell, way) != ("lstm", "backward"):
            continue
        until_product, behind_product = loop_of_steps(kernel.code)
        fetched = set()
        for line in behind_product + until_product:
            _, *operands = re.split(r"[ ,]+(?=R\d|desc|\[)", line)
            fetched -= set(re.findall(r"\bR\d+\b", " ".join(operands[1:])))
            if "LDG.E.U16 " in line:
                fetched.add(operands[0].strip())
        # For each pair of a row and a unit: d_output, four gates, c and the c before it.
        assert len(fetched) == 7 * int(pairs), f"{kernel.name}: {sorted(fetched)}"


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, which Triton's package brings")
def test_a_forward_step_waits_for_its_input_behind_the_product_and_holds_no_register_for_it():
    for kernel in compile_instance("bfloat16_cluster", "90a", disassemble=True):
        cell, way, pairs = kernel.name.split()[1:]
        if way != "forward":
            continue
        until_product, behind_product = loop_of_steps(kernel.code)
        gates = {"rnn": 1, "lstm": 4, "gru": 3}[cell]
        # A number for each gate, and a token id. What goes to registers are the first rows of steps, two numbers.
        assert sum("LDGSTS" in line for line in behind_product) == (gates + 1) * int(pairs), kernel.name
        assert sum("LDG.E" in line for line in behind_product) == 2 * int(pairs), kernel.name
        assert not any("LDG" in line or "DEPBAR" in line for line in until_product), kernel.name
        waited = next(i for i, line in enumerate(behind_product) if "DEPBAR.LE" in line)
        assert waited > max(i for i, line in enumerate(behind_product) if "HMMA" in line), kernel.name


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, which Triton's package brings")
def test_peers_are_sent_to_before_anything_is_stored():
    for kernel in compile_instance("bfloat16_cluster", "90a", disassemble=True):
        _, behind_product = loop_of_steps(kernel.code)
        sent = [i for i, line in enumerate(behind_product) if "STAS" in line]
        stored = [i for i, line in enumerate(behind_product) if "STG" in line]
        assert stored, kernel.name
        assert not sent or max(sent) < min(stored), kernel.name  # sums that are scattered leave from the product itself


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, which Triton's package brings")
def test_chunks_are_asked_for_before_the_first_of_them_is_multiplied():
    """A load that is behind the mma before it waits for shared memory alone, and a step is a row of such waits."""
    for kernel in compile_instance("bfloat16_cluster", "90a", disassemble=True):
        products = [i for i, line in enumerate(kernel.code) if "HMMA" in line]
        blocks = "\n".join(kernel.code[products[0] - 20 : products[-1] + 1]).split("BRA 0x")
        *in_registers, in_shared_memory = [block for block in blocks if "LDS.128" in block]
        # Two fours, with a predicate for each chunk, and eight at once.
        assert sorted(block.count("LDS.128") for block in in_registers) == [4, 4, 8], kernel.name
        for block in in_registers:
            order = re.findall(r"LDS\.128|HMMA", block)
            ahead = 3 if order.count("LDS.128") == 8 else 2
            assert order[:ahead] == ["LDS.128"] * ahead, kernel.name
            # From that register the place of shared memory would be computed anew before each load.
            assert "SR_CgaCtaId" not in block[block.index("LDS.128") : block.rindex("HMMA")], kernel.name
        assert re.findall(r"LDS\.128|HMMA", in_shared_memory) == ["LDS.128"] * 3 + ["HMMA"] * 2, kernel.name


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, which Triton's package brings")
@pytest.mark.skipif(build.nvcc() is not None and nvcc_version() < (12, 8), reason="needs PTX 8.6")
def test_a_step_of_a_cluster_leaves_the_l1_as_it_is():
    for kernel in compile_instance("bfloat16_cluster", "90a", disassemble=True):
        loop = [line for part in loop_of_steps(kernel.code) for line in part]
        assert any("TRYWAIT" in line for line in loop), kernel.name
        assert not any("CCTL" in line or "MEMBAR" in line for line in loop), kernel.name


@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, which Triton's package brings")
def test_no_address_is_divided_for_behind_the_wait():
    for kernel in compile_instance("bfloat16_cluster", "90a", disassemble=True):
        if kernel.name.endswith("forward"):
            before_product, _ = loop_of_steps(kernel.code)
            waited = next(i for i, line in enumerate(before_product) if "TRYWAIT" in line)
            assert not any("F2I" in line or "I2F" in line for line in before_product[waited:]), kernel.name


def loop_of_steps(code):
    """The instructions of the loop over the steps in front of its product, and those behind the product's first."""
    product = next(i for i, line in enumerate(code) if "HMMA" in line)
    end_of_kernel = next(i for i, line in enumerate(code) if line.strip() == "EXIT")  # rare ways are behind it
    jumps = [(int(found[1], 16) // 16, i) for i, line in enumerate(code) if (found := re.search(r"BRA (0x\w+)", line))]
    start, end = min((to, i) for to, i in jumps if to <= product <= i < end_of_kernel)
    return code[start:product], code[product + 1 : end]
