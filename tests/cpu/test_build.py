"""Compilation on first use: where the sources lie and what CXX says."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnnfast import building
from rnnfast.backends.cpu import build

needs_compiler = pytest.mark.skipif(not building.compiler() or build.ninja() is None, reason="no C++ compiler or ninja")


@needs_compiler
def test_a_folder_of_any_name(tmp_path: Path) -> None:
    sources, work = tmp_path / "a $b: c's", tmp_path / "work"
    for name in ("scan.h", "cells.h", "cpu/processors.h", "cpu/threads.h", "cpu/threads.cpp"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        found = building.sources()
        assert found is not None
        shutil.copy(found / name, sources / name)
    work.mkdir()
    text = build._ninja_file(sources, building.compiler(), tmp_path / "torch's $folder", build.ALL)
    (work / "build.ninja").write_text(text)
    done = subprocess.run(
        [str(build.ninja()), "-C", str(work), "threads.o"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "threads.o").exists()


def test_the_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -m64 'a b'")
    assert building.compiler() == (sys.executable, "-m64", "a b")
    program = tmp_path / "a compiler"
    program.symlink_to(sys.executable)
    monkeypatch.setenv("CXX", str(program))
    assert building.compiler() == (str(program),)
    assert building.why_no_compiler() is None
    monkeypatch.setenv("CXX", "c++ 'open")
    assert building.why_no_compiler() == "CXX is 'c++ 'open', which is no program"


def ninja(work: Path, *arguments: str, compiler: tuple[str, ...] | None = None) -> None:
    """Runs it on the library's own build file."""
    sources = building.sources()
    assert sources is not None
    text = build._ninja_file(sources, compiler or building.compiler(), Path(torch.__file__).parent, build.ALL)
    (work / "build.ninja").write_text(text)
    command = [str(build.ninja()), "-C", str(work), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_compiler
def test_the_compiler_warns_of_nothing(tmp_path: Path) -> None:
    sources = building.sources()
    assert sources is not None
    files = [path.stem for path in build._source_files(sources) if path.suffix == ".cpp" and path.stem != "kernels"]
    known, _ = build._known(building.compiler(), build.ALL)
    compiler = (*building.compiler(), "-Werror", "-fsyntax-only")  # which leaves no objects
    ninja(tmp_path, *(f"{name}.o" for name in (*files, *known)), compiler=compiler)


# A function that several objects have is linked once, from any of them: one for new processors must not be for all.
@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of the binutils")
def test_an_instruction_set_shares_no_function(tmp_path: Path) -> None:
    *_, newest = build._known(building.compiler(), build.ALL)[0]
    ninja(tmp_path, f"{newest}.o")
    command = ["nm", "--defined-only", str(tmp_path / f"{newest}.o")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = [line.split(" W ")[1] for line in said.splitlines() if " W " in line]
    assert functions
    assert [name for name in functions if f"{len(newest)}{newest}" not in name] == []  # as names are mangled


def test_a_compiler_may_lack_newer_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = building.sources()
    assert sources is not None
    monkeypatch.setattr(build, "_INSTRUCTION_SETS", dict.fromkeys(("generic", "avx2", "avx512_bf16", "amx"), "-flag"))
    monkeypatch.setattr(build, "_accepts", lambda compiler, name, flags: False)
    known, defines = build._known(["c++"], build._INSTRUCTION_SETS)
    assert [*known] == ["generic", "avx2"]
    assert defines == "-DRNNFAST_GENERIC -DRNNFAST_AVX2"
    text = build._ninja_file(sources, ["c++"], Path("torch"), build._INSTRUCTION_SETS)
    assert "avx512_bf16" not in text
    assert "amx" not in text


@needs_compiler
def test_what_ninja_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_ninja_file", lambda *_: "build library.so: no_such_rule\n")
    with pytest.raises(RuntimeError, match="unknown build rule 'no_such_rule'"):
        build.compile_library(tmp_path / "library.so", build.ALL)


def compiler_script(folder: Path, script: str) -> str:
    """A program in the place of a compiler."""
    program = folder / "compiler"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


@needs_compiler
@pytest.mark.parametrize("script", ["printf 'gr\\374n\\n' >&2; exit 1", "echo 'no space left' >&2; exit 1"])
def test_a_compiler_that_fails_is_told_in_whatever_encoding(
    script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", compiler_script(tmp_path, script))
    reason = "gr\ufffdn" if "gr" in script else "no space left"
    with pytest.raises(RuntimeError, match=f"compiler failed; {reason}"):
        build.compile_library(tmp_path / "library.so", build.ALL)
    assert [path.name for path in tmp_path.iterdir()] == ["compiler"]


@needs_compiler
def test_an_instruction_set_that_the_assembler_lacks_is_left_out(tmp_path: Path) -> None:
    script = 'for word; do [ "$word" = -fsyntax-only ] && exit 0; done; grep -q tilezero && exit 1; exit 0'
    known, _ = build._known([compiler_script(tmp_path, script)], build.ALL)
    assert "amx" not in known
    if "avx512" in known:
        assert "avx512_bf16" in known


@pytest.mark.skipif("amx" not in build.ALL, reason="of x86-64")
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("AVX2 FMA PRFCHW AVX512F AVX512BW AVX512DQ AVX512VL AVX512BF16 AMX_TILE AMX_BF16", ("avx512", "amx")),
        ("AVX2 FMA PRFCHW AVX512F AVX512BW AVX512DQ AVX512VL AVX512BF16", ("avx512", "avx512_bf16")),
        ("AVX2 FMA PRFCHW AVX512F AVX512BW AVX512DQ AVX512VL", ("avx512",)),
        ("AVX2 FMA AVX512F AVX512BW AVX512DQ AVX512VL AVX512BF16", ("avx512", "avx512_bf16")),
        ("AVX2 FMA AVX512F", ("avx2",)),
        ("", ("generic", "avx2", "avx512", "avx512_bf16", "amx")),
        ("AVX2", ("generic",)),
        (None, ("generic", "avx2", "avx512", "avx512_bf16", "amx")),
    ],
)
def test_on_first_use_it_is_compiled_for_this_processor(
    said: str | None, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "exit 1" if said is None else f'for macro in {said}; do echo "#define __${{macro}}__ 1"; done'
    monkeypatch.setenv("CXX", compiler_script(tmp_path, script))
    monkeypatch.setenv("RNNFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "installed", lambda: None)
    compiled: list[tuple[str, ...]] = []

    def compile_library(target: Path, instruction_sets: tuple[str, ...]) -> None:
        compiled.append(instruction_sets)
        target.touch()

    monkeypatch.setattr(build, "compile_library", compile_library)
    monkeypatch.delenv("RNNFAST_CPU_ISA", raising=False)
    library = build.library()
    assert build.library() == library
    for wanted in ("no such set", expected[-1]):
        monkeypatch.setenv("RNNFAST_CPU_ISA", wanted)
        assert build.library() == library
    monkeypatch.setenv("RNNFAST_CPU_ISA", "generic")  # with every set, to compare one with another
    assert (build.library() == library) == ("generic" in expected)
    assert compiled == [expected, build.ALL][: 2 - ("generic" in expected)]


def test_a_relative_compiler_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = compiler_script(tmp_path, "exit 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./compiler -flag")
    assert building.compiler() == (program, "-flag")


def test_a_cache_that_cannot_be_locked_serves_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with building.one_process(tmp_path / "cache"), building.work_folder(tmp_path / "cache" / "library.so") as work:
        (work / "library.so").write_text("library")
        building.put(work / "library.so", tmp_path / "cache" / "library.so")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"lock", "library.so"}


def test_the_lock_ends_although_a_child_was_forked_with_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And what a killed process has left is removed by the next."""
    (tmp_path / "library.so.abc.build").mkdir()
    read, write = os.pipe()
    with building.one_process(tmp_path):
        assert not (tmp_path / "library.so.abc.build").exists()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the test ends
            os._exit(0)
    other = f"from rnnfast import building; building.one_process(building.Path({str(tmp_path)!r})).__enter__()"
    subprocess.run([sys.executable, "-c", other], check=True, timeout=60)
    os.close(write)
    os.close(read)
    os.waitpid(child, 0)
    assert "another process" not in capfd.readouterr().err


def test_a_library_that_cannot_be_loaded_says_what_to_do(tmp_path: Path) -> None:
    code = """
import torch, rnnfast
from rnnfast.backends.cpu import build
build.installed = lambda: build.Path(DAMAGED)
layer = rnnfast.GRU(3, 4)
for _ in range(2):
    layer(torch.randn(5, 2, 3))
assert "cpu" not in rnnfast.explain(layer, torch.randn(5, 2, 3)).backend
"""
    damaged = tmp_path / "librnnfast.so"
    damaged.write_text("nothing")
    done = subprocess.run(
        [sys.executable, "-c", code.replace("DAMAGED", repr(str(damaged)))], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("if it is damaged, delete that file") == 1
    # Nobody reads what is said there, and the layer runs all the same.
    for closing in ("import os; os.close(2)", "import sys; sys.stderr.close()", "import sys; sys.stderr = None"):
        quiet = f"{closing}\n{code.replace('DAMAGED', repr(str(damaged)))}"
        done = subprocess.run([sys.executable, "-c", quiet], capture_output=True, text=True, check=True)
        assert not done.stdout
