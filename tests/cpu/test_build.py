"""Compilation on first use: where the sources lie and what CXX says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnnfast import building
from rnnfast.backends import native

needs_compiler = pytest.mark.skipif(
    not building.compiler() or native._ninja() is None, reason="no C++ compiler or ninja"
)


@needs_compiler
def test_a_folder_of_any_name(tmp_path: Path) -> None:
    sources, work = tmp_path / "a $b: c's", tmp_path / "work"
    for name in ("scan.h", "cells.h", "cpu/threads.h", "cpu/threads.cpp"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        found = building.sources()
        assert found is not None
        shutil.copy(found / name, sources / name)
    work.mkdir()
    text = native._ninja_file(sources, building.compiler(), tmp_path / "torch's $folder")
    (work / "build.ninja").write_text(text)
    done = subprocess.run(
        [str(native._ninja()), "-C", str(work), "threads.o"], capture_output=True, text=True, check=False
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
    text = native._ninja_file(sources, compiler or building.compiler(), Path(torch.__file__).parent)
    (work / "build.ninja").write_text(text)
    command = [str(native._ninja()), "-C", str(work), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_compiler
def test_the_compiler_warns_of_nothing(tmp_path: Path) -> None:
    sources = building.sources()
    assert sources is not None
    files = [path.stem for path in native._source_files(sources) if path.suffix == ".cpp" and path.stem != "kernels"]
    known, _ = native._instruction_sets(building.compiler())
    compiler = (*building.compiler(), "-Werror", "-fsyntax-only")  # which leaves no objects
    ninja(tmp_path, *(f"{name}.o" for name in (*files, *known)), compiler=compiler)


# A function that several objects have is linked once, from any of them: one for new processors must not be for all.
@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of the binutils")
def test_an_instruction_set_shares_no_function(tmp_path: Path) -> None:
    *_, newest = native._instruction_sets(building.compiler())[0]
    ninja(tmp_path, f"{newest}.o")
    command = ["nm", "--demangle", "--defined-only", str(tmp_path / f"{newest}.o")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = [line.split(" W ")[1] for line in said.splitlines() if " W " in line]
    assert functions
    assert [name for name in functions if f"rnnfast::{newest}::" not in name] == []


def test_a_compiler_may_lack_newer_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = building.sources()
    assert sources is not None
    monkeypatch.setattr(native, "_INSTRUCTION_SETS", dict.fromkeys(("generic", "avx2", "avx512_bf16", "amx"), "-flag"))
    monkeypatch.setattr(native, "_accepts", lambda compiler, flags: False)
    known, defines = native._instruction_sets(["c++"])
    assert [*known] == ["generic", "avx2"]
    assert not defines
    text = native._ninja_file(sources, ["c++"], Path("torch"))
    assert "avx512_bf16" not in text
    assert "amx" not in text


@needs_compiler
def test_what_ninja_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_ninja_file", lambda *_: "build library.so: no_such_rule\n")
    with pytest.raises(RuntimeError, match="unknown build rule 'no_such_rule'"):
        native.compile_library(tmp_path / "library.so")
