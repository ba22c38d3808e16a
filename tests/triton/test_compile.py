"""Every kernel that `plan` sends a layer to compiles for sm_80 and sm_90, without a spill and within shared memory."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rnnfast.backends.triton.plan import IN_REGISTERS, IN_SHARED_MEMORY, REGISTERS, RESIDENT

ROOT = Path(__file__).parents[2]
REPORT = Path(__file__).with_name("compile_report.py")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}

# A step kernel may keep a few addresses in local memory; the block scan, which lives in registers, may not.
SPILLED_BYTES = {"registers": 0, "shared": 0, "resident": 32, "step": 32, "gates": 0}

# The largest H of the block scan in float32 and in half types.
LARGEST = {cell: (max(IN_REGISTERS[cell]), max(IN_SHARED_MEMORY[cell])) for cell in IN_REGISTERS}
COMMON = {
    "batch": 32,
    "steps": 4,
    "lanes": 1,
    "token_ids": False,
    "ragged": False,
    "allow_tf32": False,
    "at_once": True,
    "kernel": None,
}


def cases() -> Iterator[dict[str, Any]]:
    """Each cell at the limits of each kernel, and one of them in every other way a kernel is specialised."""
    for arch in SHARED_BYTES:
        yield {**COMMON, "cell": "rnn_relu", "hidden": 128, "dtype": "float32", "arch": arch}
        for cell in ("rnn_tanh", "lstm", "gru"):
            in_registers, in_shared_memory = LARGEST[cell]
            for hidden in (*IN_REGISTERS[cell], RESIDENT[cell]):
                yield {**COMMON, "cell": cell, "hidden": hidden, "dtype": "float32", "arch": arch}
            for hidden in (in_registers, in_shared_memory, RESIDENT[cell], 2048):
                yield {**COMMON, "cell": cell, "hidden": hidden, "dtype": "bfloat16", "arch": arch}
        odd = {**COMMON, "cell": "lstm", "arch": arch, "lanes": 2, "ragged": True}
        for hidden, dtype in ((3, "float32"), (31, "float16"), (63, "float32"), (63, "float16"), (501, "float16")):
            yield {**odd, "hidden": hidden, "dtype": dtype}
        yield {**odd, "hidden": 496, "dtype": "bfloat16"}
        yield {**odd, "cell": "gru", "hidden": 501, "dtype": "float32"}
        yield {**odd, "cell": "gru", "hidden": 112, "dtype": "float16"}
        yield {**odd, "hidden": 50, "dtype": "float32", "token_ids": True}
        yield {**odd, "cell": "rnn_tanh", "hidden": 256, "dtype": "bfloat16"}
        for cell in ("lstm", "gru"):
            yield {**COMMON, "cell": cell, "hidden": 1024, "dtype": "float32", "arch": arch}
            yield {**COMMON, "cell": cell, "hidden": 512, "dtype": "float32", "arch": arch, "allow_tf32": True}
        yield {**COMMON, "cell": "gru", "hidden": 512, "dtype": "bfloat16", "arch": arch, "at_once": False}
        gates = {**COMMON, "arch": arch, "steps": 1, "kernel": "gates"}
        for cell in ("rnn_tanh", "rnn_relu", "lstm", "gru"):
            for dtype in ("float32", "bfloat16"):
                yield {**gates, "cell": cell, "hidden": 512, "dtype": dtype}
        for cell, dtype in (("lstm", "float32"), ("gru", "float16")):
            yield {**gates, "cell": cell, "hidden": 501, "dtype": dtype, "lanes": 2, "ragged": True, "token_ids": True}


def recompilation_cases() -> Iterator[dict[str, Any]]:
    """Three batches and lengths each; with an odd H, batches for which a layer's states are aligned and not."""
    for hidden, ragged, kernel in (
        (64, True, "registers"),
        (1024, False, "step"),
        (512, True, "gates"),
        (33, False, "registers"),
        (501, True, "resident"),
        (501, False, "gates"),
    ):
        for batch, steps in ((1, 7), (17, 1), (48, 3)):
            case = {**COMMON, "cell": "lstm", "hidden": hidden, "dtype": "float32", "arch": 90, "ragged": ragged}
            case["kernel"] = kernel
            yield {**case, "batch": batch, "steps": steps}


CASES = list(cases())
RECOMPILATION_CASES = list(recompilation_cases())


def report(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs compile_report.py on the cases, in two processes."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    halves = [cases[0::2], cases[1::2]]
    processes = [
        subprocess.Popen(
            [sys.executable, REPORT], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        for _ in halves
    ]
    for process, half in zip(processes, halves, strict=True):
        assert process.stdin is not None
        json.dump(half, process.stdin)
        process.stdin.close()
        process.stdin = None
    results: list[list[dict[str, Any]]] = [[] for _ in cases]
    for start, process in enumerate(processes):
        out, _ = process.communicate()
        assert process.returncode == 0, "compile_report.py failed; its error is on stderr"
        results[start::2] = json.loads(out)
    return results


@pytest.fixture(scope="module")
def compiled() -> list[list[dict[str, Any]]]:
    """The resources of the kernels of every case."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return report(CASES + RECOMPILATION_CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(str(v) for v in case.values()) for case in CASES])
def test_within_budget(compiled, index):
    case = CASES[index]
    in_registers, in_shared_memory = LARGEST[case["cell"]]
    assert {kernel["direction"] for kernel in compiled[index]} == {"forward", "backward"}
    for kernel in compiled[index]:
        if case["kernel"]:
            assert kernel["kernel"] == case["kernel"]
        elif case["hidden"] <= in_registers:
            assert kernel["kernel"] == "registers"
        elif case["dtype"] != "float32" and case["hidden"] <= in_shared_memory:
            assert kernel["kernel"] in ("shared", "resident")
        else:
            assert kernel["kernel"] in ("resident", "step")
        assert kernel["spilled_bytes"] <= SPILLED_BYTES[kernel["kernel"]], kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES[case["arch"]], kernel
        if case["dtype"] == "float32" and not case["allow_tf32"]:
            # Products are summed in chains of 64 at most: the compiler joins none of them to another.
            assert kernel["continued_sums"] == 0, kernel
        assert kernel["registers"] * 32 * kernel["warps"] <= REGISTERS, kernel


def test_no_recompilation_when_batch_or_length_changes(compiled):
    results = compiled[len(CASES) :]
    for same in (results[start : start + 3] for start in range(0, len(results), 3)):
        assert len({tuple(kernel["hash"] for kernel in result) for result in same}) == 1
