"""The native scan under AddressSanitizer and UBSan, its barrier and its memory under ThreadSanitizer, without torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rnnfast import building
from rnnfast.backends.cpu import build

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc/cpu"
THREADS = (CSRC / "threads.cpp", CSRC / "processors.cpp")
COMPILER = building.compiler()

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler was found")


def compile_program(folder: Path, sanitizer: str, *sources: str, defines: str = "") -> Path:
    program = folder / "program"
    flags = f"-std=c++17 -O1 -g -fopenmp -ffp-contract=off -Wno-psabi -fno-sanitize-recover=all {defines}"
    command = [*COMPILER, *flags.split(), f"-fsanitize={sanitizer}", *sources, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find -l" in done.stderr or "cannot find lib" in done.stderr:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert done.returncode == 0, done.stderr[-2000:]
    return program


def run_program(program: Path, **environment: str) -> None:
    done = subprocess.run([program], env=os.environ | environment, capture_output=True, text=True, check=False)
    if "does not have it" in done.stderr:
        pytest.skip("this processor lacks the instruction set")
    assert done.returncode == 0, done.stderr[-3000:]


def test_barrier_under_thread_sanitizer(tmp_path: Path) -> None:
    sources = [str(file) for file in (HERE / "barrier.cpp", *THREADS, CSRC / "sharing.cpp")]
    program = compile_program(tmp_path, "thread", *sources)
    run_program(program, TSAN_OPTIONS="halt_on_error=1")


def test_stalled_threads_are_noticed_for_a_while(tmp_path: Path) -> None:
    sources = [str(file) for file in (HERE / "stalls.cpp", *THREADS)]
    run_program(compile_program(tmp_path, "address,undefined", *sources))


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_memory_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    run_program(compile_program(tmp_path, sanitizer, str(HERE / "memory.cpp")), TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.skipif("RNNFAST_SANITIZE" not in os.environ, reason="takes minutes; set RNNFAST_SANITIZE=1 to run it")
def test_kernels_under_address_sanitizer(tmp_path: Path) -> None:
    objects, (instruction_sets, defines) = [], build._instruction_sets(COMPILER)
    for isa, flags in instruction_sets.items():
        objects.append(str(tmp_path / f"{isa}.o"))
        flags = f"-std=c++17 -O1 -g -ffp-contract=off -Wno-psabi -fno-sanitize-recover=all -DRNNFAST_ISA={isa} {flags}"
        sanitizer = "-fsanitize=address,undefined"
        command = [*COMPILER, *flags.split(), sanitizer, "-c", str(CSRC / "kernels.cpp"), "-o", objects[-1]]
        subprocess.run(command, check=True)
    sources = [
        str(HERE / "sanitize.cpp"),
        *(str(CSRC / f"{name}.cpp") for name in ("threads", "processors", "sharing", "memory", "choose")),
        *objects,
    ]
    program = compile_program(tmp_path, "address,undefined", *sources, defines=defines)
    for isa in instruction_sets:
        run_program(program, RNNFAST_CPU_ISA=isa)
