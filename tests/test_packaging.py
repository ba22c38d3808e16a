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
folder = sys.argv[1]  # setuptools has arguments of its own
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The names in the sdist, without its own folder, and in the wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    source, out = folder / "source", folder / "out"
    for name in FOLDERS:
        # Not what git ignores, except for a library and a cache made here, which must not be shipped.
        ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*cache", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in (*FILES, "Makefile", "requirements-dev.txt"):
        shutil.copy(ROOT / path, source / path)
    (source / "rnnfast/librnnfast-000000000000.so").touch()
    (source / "tests/__pycache__").mkdir()
    (source / "tests/__pycache__/conftest.cpython-311.pyc").touch()
    out.mkdir()
    environment = os.environ | {"CXX": "/nonexistent", "CUDA_HOME": "", "CUDA_PATH": "", "PATH": os.defpath}
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
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
