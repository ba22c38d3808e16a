"""Compiles the kernels that given layers launch, for a GPU that is not there, and prints their resources as JSON.

Run as a program, in a process of its own, because Triton's interpreter is switched on or off for a whole process:

    python tests/triton/compile_report.py < cases.json

A case is {"cell", "hidden", "dtype", "arch", "batch", "steps", "lanes", "token_ids", "ragged", "allow_tf32", "at_once",
"kernel"}; a kernel named is preferred to the one planned. The layer is launched through the backend's own code with a
driver that only compiles, so the specialisations are those a GPU gets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from rnnfast.backends.triton import launch, plan
from rnnfast.cells import CELLS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class CompileOnlyDriver:
    """Stands in for a GPU of the given compute capability."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def resources(kernel: Any, direction: str, planned: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    starts = re.findall(r"tt\.dot %\S+, %\S+, (%\w+)", kernel.asm["ttgir"])
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout).groups()
    return {
        "direction": direction,
        "kernel": planned,
        "function": kernel.src.fn.__name__,
        "registers": int(registers),
        "spilled_bytes": int(stack) + int(local),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "continued_sums": sum(not start.startswith("%cst") for start in starts),
        "hash": kernel.hash,
    }


def compile_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Compiles the kernels of one layer, the forward ones first."""
    triton.runtime.driver.set_active(CompileOnlyDriver(case["arch"]))
    launch._run_at_once = lambda *_: case["at_once"]
    launch.plan = lambda *layer: sorted(plan.candidates(*layer), key=lambda how: how.kernel != case["kernel"])[0]
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    try:
        cell, hidden, lanes, batch, steps = (case[k] for k in ("cell", "hidden", "lanes", "batch", "steps"))
        torch.backends.cuda.matmul.allow_tf32 = case["allow_tf32"]
        dtype, gates, rows = getattr(torch, case["dtype"]), CELLS[cell].gates, steps * batch
        input = torch.zeros(rows, dtype=torch.int64) if case["token_ids"] else torch.zeros(rows, 3, dtype=dtype)
        w_ih = torch.zeros(lanes, gates * hidden, 3, dtype=dtype)
        w_hh = torch.zeros(lanes, gates * hidden, hidden, dtype=dtype)
        bias = torch.zeros(lanes, gates * hidden, dtype=dtype)
        # A second layer's states are a slice of all layers', aligned or not.
        h_0 = torch.zeros(2, lanes, batch, hidden, dtype=dtype)[1]
        c_0 = h_0 if cell == "lstm" else None
        sizes = torch.full((steps,), batch) if case["ragged"] else None
        layer = (input, w_ih, w_hh, bias, bias, None, h_0, c_0, sizes, cell, lanes > 1)
        output, _, _, tape = launch.forward(*layer, True)
        forward_kernels = {kernel.hash: kernel for kernel in compiled}
        compiled.clear()
        launch.backward(output, h_0, c_0, *layer, output, tape, False, False)
        backward_kernels = {kernel.hash: kernel for kernel in compiled}
        planned = launch._plan(cell, h_0).kernel
    finally:
        JITFunction.run = run
    return [
        resources(kernel, direction, planned)
        for direction, kernels in (("forward", forward_kernels), ("backward", backward_kernels))
        for kernel in kernels.values()
    ]


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ
    torch.set_num_threads(1)
    json.dump([compile_case(case) for case in json.load(sys.stdin)], sys.stdout)
