"""C++ programs that call parts of the native library without torch."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rnnfast import building

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc/cpu"
COMPILER = building.compiler()
THREADS = (CSRC / "threads.cpp", CSRC / "processors.cpp", CSRC / "sharing.cpp")


def compile_program(folder: Path, flags: str, *sources: Path) -> Path:
    """Skips the test where the compiler has no library that the flags ask for."""
    program = folder / "program"
    command = [*COMPILER, "-std=c++17", "-O1", "-fopenmp", "-Wno-psabi", *flags.split(), *map(str, sources)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    if "cannot find -l" in done.stderr or "cannot find lib" in done.stderr:
        pytest.skip(f"this compiler lacks a library for {flags}")
    assert done.returncode == 0, done.stderr[-2000:]
    return program
