"""What decides whether, when and for which cards the CUDA kernels are compiled; nvcc itself is played by a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rnnfast import building
from rnnfast.backends.cuda import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of CUDA 13.0 in CUDA_HOME, whose nvcc writes what it is asked for; returns nvcc."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    write_nvcc(nvcc, 'while [ "$1" != -o ]; do shift; done; echo made > "$2"')
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    monkeypatch.setattr(build, "torch_cuda", lambda: "13.0")
    build._nvcc_version.cache_clear()
    yield nvcc
    build._nvcc_version.cache_clear()


def write_nvcc(path: Path, does: str) -> None:
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "release 13.0, V13.0.48"; exit; fi\n{does}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("named", "architectures"),
    [
        ("8.0;9.0a", ("80", "90a")),
        ("8.6 9.0+PTX", ("86", "90")),
        ("", ()),
        ("8.0;8.0", ("80",)),
        ("7.5 8.0 9.0 10.0 12.0+PTX", ("80", "90", "100", "120")),
        ("Hopper", ()),
    ],
)
def test_architectures_named(monkeypatch, named, architectures):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    assert build.named_architectures() == architectures


@pytest.mark.parametrize(
    ("seen", "named", "compiled"),
    [
        ([(9, 0)], "7.5 8.0 12.0+PTX", ("90a",)),
        ([(8, 6), (8, 6), (9, 0)], "", ("86", "90a")),
        ([], "8.6", ("86",)),
        ([], "", ("80", "90a")),
    ],
)
def test_on_first_use_it_is_compiled_for_the_devices(toolkit, monkeypatch, tmp_path, seen, named, compiled):
    targets = []
    monkeypatch.setenv("RNNFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    monkeypatch.setattr(building, "PACKAGE", tmp_path)
    monkeypatch.setattr(build, "_capabilities", lambda: seen)
    monkeypatch.setattr(build, "compile_library", lambda target, architectures: targets.append(architectures))
    build.library()
    assert targets == [compiled]


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("90a", (9, 0), True),
        ("90a", (9, 1), False),
        ("100", (10, 3), True),
    ],
)
def test_where_compiled_code_runs(architecture, capability, runs):
    assert build._runs_on(architecture, capability) is runs


def test_an_installed_library_is_used_if_it_is_of_these_sources_and_for_these_devices(monkeypatch, tmp_path):
    monkeypatch.setattr(building, "PACKAGE", tmp_path)
    monkeypatch.setattr(build, "_capabilities", lambda: [(9, 0)])
    assert build.installed() is None
    (tmp_path / "librnnfast_cuda-0123456789ab-80-90a.so").touch()
    assert build.installed() is None
    installed = tmp_path / build.installed_name(("80", "90a"))
    installed.touch()
    assert build.installed() == installed
    assert build.library() == installed
    monkeypatch.setattr(build, "_capabilities", lambda: [(9, 0), (12, 0)])
    assert build.installed() is None


def test_what_is_missing_is_told(monkeypatch, toolkit, tmp_path):
    assert build.why_not_compile() is None
    monkeypatch.setattr(build, "torch_cuda", lambda: "12.8")
    assert build.why_not_compile() == ("nvcc is of CUDA 13.0, PyTorch of CUDA 12.8: set CUDA_HOME to one that matches")
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert "nvcc was not found" in build.why_not_compile()


def test_a_library_appears_whole_or_not_at_all(toolkit, monkeypatch, tmp_path):
    monkeypatch.setattr(building, "compiler", lambda: (str(toolkit),))
    target = tmp_path / "out" / "library.so"
    build.compile_library(target, ("80", "90a"))
    assert target.read_text() == "made\n"
    target.unlink()
    write_nvcc(toolkit, 'echo "scan.cuh(7): error: no such thing" >&2; exit 1')
    with pytest.raises(RuntimeError, match=r"nvcc failed; scan.cuh\(7\): error: no such thing"):
        build.compile_library(target, ("80",))
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(("cuda", "compiled"), [("'13.0'", True), ("None", False)])
def test_setup_compiles_for_a_torch_with_cuda_and_a_toolkit(toolkit, tmp_path, cuda, compiled):
    """Whether there is a GPU is not asked: torch, which could tell, cannot even be imported."""
    torch = tmp_path / "site" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("raise ImportError('still being installed')")
    (torch / "version.py").write_text(f"cuda: str | None = {cuda}\n")
    code = (
        "import sys; sys.argv = ['setup.py', '--name']; namespace = {'__file__': 'setup.py', '__name__': 'setup'}; "
        "exec(open('setup.py').read(), namespace); "
        "print([extension.name for extension in namespace['extensions']])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(torch.parent), "CUDA_HOME": str(toolkit.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("rnnfast.librnnfast_cuda" in done.stdout) is compiled
