"""Compiles csrc/cuda/instances with nvcc for a GPU that is not there, and reads what ptxas says of each kernel.

As a program it compiles everything for every default architecture and prints a table:

    python -m tests.cuda.compile_report
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from rnnfast.backends.cuda import build

KINDS = ("rnn", "lstm", "gru")


class Kernel(NamedTuple):
    """What ptxas reports of one kernel, and its machine code, a line an instruction, if that was asked for."""

    name: str
    registers: int
    spilled_bytes: int
    code: tuple[str, ...] = ()


def instances() -> list[str]:
    """The files that hold kernels, by stem."""
    sources = build._sources()
    assert sources is not None
    return sorted(path.stem for path in (sources / "instances").glob("*.cu"))


def nvcc_version() -> tuple[int, int]:
    """Of the CUDA compiler, which must be there."""
    nvcc = build.nvcc()
    assert nvcc is not None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    assert release is not None
    return int(release[1]), int(release[2])


def disassembler() -> Path | None:
    """cuobjdump, as Triton's package brings it."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    found = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found if found.exists() else None


@functools.cache
def compile_instance(stem: str, architecture: str, disassemble: bool = False) -> list[Kernel]:
    """Compiles one file. Raises RuntimeError with nvcc's words."""
    sources = build._sources()
    nvcc = build.nvcc()
    assert sources is not None
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        file, out = str(sources / "instances" / f"{stem}.cu"), str(Path(folder) / "out.o")
        command = [nvcc, *build._NVCC_FLAGS.split(), target, "-Xptxas", "-v", "-c", file, "-o", out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        kernels = _parse(done.stderr)
        if not disassemble:
            return kernels
        listing = subprocess.run([str(disassembler()), "-sass", out], capture_output=True, text=True, check=True).stdout
    codes = {}
    for function in listing.split("Function : ")[1:]:
        codes[_readable(function.split("\n", 1)[0])] = tuple(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", function))
    return [kernel._replace(code=codes[kernel.name]) for kernel in kernels]


def _parse(report: str) -> list[Kernel]:
    kernels = []
    for block in report.split("Compiling entry function '")[1:]:
        mangled = block.split("'", 1)[0]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        assert spills is not None
        assert used is not None
        kernels.append(Kernel(_readable(mangled), int(used[1]), int(spills[1]) + int(spills[2])))
    return kernels


def _readable(mangled: str) -> str:
    """Such as "BFloat16 lstm backward 1" (pairs a thread takes), from template arguments as the ABI spells them."""
    compute_type, kind, backward = (
        re.search(pattern, mangled) for pattern in (r"_kernelINS0_\d+(\w+?)ELNS", r"4KindE(\d)", r"Lb([01])E")
    )
    pairs = re.search(r"Lb[01]ELi(\d)E", mangled)
    assert compute_type is not None
    assert kind is not None
    assert backward is not None
    name = f"{compute_type[1]} {KINDS[int(kind[1])]} {'backward' if backward[1] == '1' else 'forward'}"
    return f"{name} {pairs[1]}" if pairs else name


if __name__ == "__main__":
    for stem in instances():
        for architecture in build.DEFAULT_ARCHITECTURES:
            for kernel in compile_instance(stem, architecture):
                use = f"{kernel.registers:4} registers {kernel.spilled_bytes:5} bytes spilled"
                print(f"{stem:18} sm_{architecture:4} {kernel.name:24} {use}", flush=True)
