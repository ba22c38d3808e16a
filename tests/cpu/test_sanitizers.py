"""The native scan under AddressSanitizer and UBSan, its barrier and its memory under ThreadSanitizer, without torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rnnfast.backends.cpu import build
from tests.cpu.programs import COMPILER, CSRC, HERE, THREADS, compile_program

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler was found")


def sanitized(folder: Path, sanitizer: str, *sources: Path, defines: str = "") -> Path:
    flags = f"-g -ffp-contract=off -fno-sanitize-recover=all -fsanitize={sanitizer} {defines}"
    return compile_program(folder, flags, *sources)


def run_program(program: Path, **environment: str) -> None:
    done = subprocess.run([program], env=os.environ | environment, capture_output=True, text=True, check=False)
    if "does not have it" in done.stderr:
        pytest.skip("this processor lacks the instruction set")
    assert done.returncode == 0, done.stderr[-3000:]


def test_barrier_under_thread_sanitizer(tmp_path: Path) -> None:
    program = sanitized(tmp_path, "thread", HERE / "barrier.cpp", *THREADS)
    run_program(program, TSAN_OPTIONS="halt_on_error=1")


def test_stalled_threads_are_noticed_for_a_while(tmp_path: Path) -> None:
    run_program(sanitized(tmp_path, "address,undefined", HERE / "stalls.cpp", *THREADS))


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_memory_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    run_program(sanitized(tmp_path, sanitizer, HERE / "memory.cpp"), TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.skipif("RNNFAST_SANITIZE" not in os.environ, reason="takes minutes; set RNNFAST_SANITIZE=1 to run it")
def test_kernels_under_address_sanitizer(tmp_path: Path) -> None:
    objects, (instruction_sets, defines) = [], build._known(COMPILER, build.ALL)
    for isa, flags in instruction_sets.items():
        objects.append(tmp_path / f"{isa}.o")
        flags = f"-std=c++17 -O1 -g -ffp-contract=off -Wno-psabi -fno-sanitize-recover=all -DRNNFAST_ISA={isa} {flags}"
        sanitizer = "-fsanitize=address,undefined"
        command = [*COMPILER, *flags.split(), sanitizer, "-c", str(CSRC / "kernels.cpp"), "-o", str(objects[-1])]
        subprocess.run(command, check=True)
    sources = (HERE / "sanitize.cpp", *THREADS, CSRC / "memory.cpp", CSRC / "choose.cpp", *objects)
    program = sanitized(tmp_path, "address,undefined", *sources, defines=defines)
    for isa in instruction_sets:
        run_program(program, RNNFAST_CPU_ISA=isa)
