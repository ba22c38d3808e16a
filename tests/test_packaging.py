"""The wheel has what the package needs to compile itself, the sdist the whole project; no network, no compiler."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from rnnfast.backends.cpu import build

ROOT = Path(__file__).parent.parent
NEEDED = 77  # of setuptools, which before does not know pyproject's license field
FOLDERS = ("csrc", "rnnfast", "tests", "docs", "examples", "benchmarks", ".ci")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")


def _setuptools() -> int:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


pytestmark = [
    pytest.mark.skipif(_setuptools() < NEEDED, reason=f"needs setuptools {NEEDED} or newer"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout"),
]

BUILD = """
import sys
from setuptools import build_meta
kind, folder = sys.argv[1:]  # setuptools has arguments of its own
getattr(build_meta, f"build_{kind}")(folder)
"""
# What it compiles and links is an empty file.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : >"$2"; fi
  shift
done
"""


def copy_checkout(source: Path) -> None:
    """All of it but what git ignores."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*cache", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in (*FILES, "Makefile", "requirements-dev.txt"):
        shutil.copy(ROOT / path, source / path)


def make(kind: str, source: Path, out: Path, compiler: str = "/nonexistent") -> Path:
    """Makes the "sdist" or the "wheel"."""
    out.mkdir()
    environment = os.environ | {"CXX": compiler, "CUDA_HOME": "", "CUDA_PATH": "", "PATH": os.defpath}
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The names in the sdist, without its own folder, and in the wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    copy_checkout(source)
    # A library and a cache, which must not be shipped.
    (source / "rnnfast/librnnfast-000000000000.so").touch()
    (source / "tests/__pycache__").mkdir()
    (source / "tests/__pycache__/conftest.cpython-311.pyc").touch()
    sdist, wheel = (make(kind, source, folder / kind) for kind in ("sdist", "wheel"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return names, set(zipfile.ZipFile(wheel).namelist())


def files_below(folder: str) -> set[str]:
    """All source files of a folder of the checkout."""
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".png", ".typed"}
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}


def test_the_wheel_can_compile_itself(built: tuple[set[str], set[str]]) -> None:
    _, wheel = built
    assert {f"rnnfast/{name}" for name in files_below("csrc")} <= wheel
    assert files_below("rnnfast") <= wheel
    assert "rnnfast/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_wheel_has_nothing_else(built: tuple[set[str], set[str]]) -> None:
    _, wheel = built
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"rnnfast"}
    assert not [name for name in wheel if name.endswith((".so", ".pyc"))]


def test_the_sdist_has_the_whole_project(built: tuple[set[str], set[str]]) -> None:
    sdist, _ = built
    for folder in ("csrc", "rnnfast", "tests", "docs", "examples"):
        assert files_below(folder) <= sdist, folder
    assert {*FILES, "Makefile", "requirements-dev.txt", ".ci/run", "tests/conftest.py"} <= sdist
    assert not [name for name in sdist if name.endswith((".so", ".pyc")) or "__pycache__/" in name]


@pytest.mark.skipif(build.ninja() is None, reason="needs ninja")
def test_a_second_build_ships_nothing_of_the_first(tmp_path: Path) -> None:
    source, compiler = tmp_path / "source", tmp_path / "compiler"
    copy_checkout(source)
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    make("wheel", source, tmp_path / "first", str(compiler))
    gone = {"csrc/cpu/limit_kernels.h", "rnnfast/flops.py"}
    for name in gone:
        (source / name).unlink()
    wheel, installed = make("wheel", source, tmp_path / "second", str(compiler)), tmp_path / "installed"
    assert wheel.name.startswith("rnnfast-0.1.0-py3-none-linux_"), "the library needs no certain Python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(installed),
        wheel,
    ]
    subprocess.run(pip, check=True)
    assert not [name for name in gone if (installed / name).exists() or (installed / "rnnfast" / name).exists()]
    ask = [sys.executable, "-c", "from rnnfast.backends.cpu import build; print(build.installed())"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run(ask, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert found.split() == [str(path) for path in (installed / "rnnfast").glob("librnnfast-*.so")]


@pytest.mark.parametrize("name", ["lm", "d2l", "onnx"])
def test_modules_that_are_imported_when_they_are_asked_for(name: str) -> None:
    code = f"import sys, rnnfast; assert 'rnnfast.{name}' not in sys.modules; print(rnnfast.{name}.__name__)"
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said == f"rnnfast.{name}\n"


def test_the_core_imports_torch_alone() -> None:
    others = ("jsonargparse", "matplotlib", "ninja", "numpy", "safetensors", "tqdm", "triton", "yaml")
    lines = ("import torch, sys", "before = set(sys.modules)", "import rnnfast", "print(*(set(sys.modules) - before))")
    command = [sys.executable, "-c", "\n".join(lines)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "rnnfast.layers" in said.split()
    assert not {name.partition(".")[0] for name in said.split()} & set(others)
