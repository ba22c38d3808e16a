"""Compiles csrc/cuda on first use and keeps the library in the user's cache, as `native` does for the CPU library.

It is compiled for the architectures in TORCH_CUDA_ARCH_LIST, if that is set (such as "8.0;9.0a"); else for those of the
devices that PyTorch sees; else for sm_80 and sm_90a. Whether a GPU is present does not decide whether it can be built.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from rnnfast.backends import native

_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
_NVCC_FLAGS = f"-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA {_ABI}"
_CXX_FLAGS = f"-std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wextra {_ABI}"
DEFAULT_ARCHITECTURES = ("80", "90a")


def why_not() -> str | None:
    """Returns why the kernels cannot be compiled here, or None."""
    if _sources() is None:
        return "the package was installed without the sources of its CUDA kernels"
    if nvcc() is None:
        return "nvcc was not found: install the CUDA toolkit or set CUDA_HOME, and the kernels compile on first use"
    if torch.version.cuda is not None and _major() != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {_major()}, PyTorch of CUDA {torch.version.cuda}: set CUDA_HOME to one that matches"
    if native._ninja() is None:
        return "ninja was not found: pip install ninja, and the kernels compile on first use"
    return None


def library() -> Path:
    """Returns the compiled library, compiling it first if need be (a minute or two, once).

    Raises:
        RuntimeError: nvcc failed; the message ends with what it said.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    stamp = hashlib.sha256(repr((_NVCC_FLAGS, architectures(), torch.__version__, nvcc(), _nvcc_version())).encode())
    for path in _files():
        stamp.update(path.name.encode() + path.read_bytes())
    target = native.cache_folder() / stamp.hexdigest()[:16] / "librnnfast_cuda.so"
    if not target.exists():
        with native._one_process(target.parent):
            if not target.exists():
                print(f"rnnfast: compiling the CUDA scan into {target.parent} (once)", file=sys.stderr, flush=True)
                compile_library(target)
    return target


def compile_library(target: Path) -> None:
    """Compiles csrc/cuda and puts the library at `target` in one step; a RuntimeError has the compiler's words."""
    ninja = native._ninja()
    assert ninja is not None
    work = target.with_name(f"{target.name}.{os.getpid()}.build")
    work.mkdir(parents=True, exist_ok=True)
    try:
        (work / "build.ninja").write_text(ninja_file())
        done = subprocess.run([ninja, "-C", str(work)], capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines()
            raise RuntimeError("\n".join([f"{nvcc()} failed", *errors[-10:]]))
        os.replace(work / "library.so", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def ninja_file() -> str:
    """The build, as ninja reads it."""
    folder = Path(torch.__file__).parent
    include = f"-isystem {folder}/include -isystem {folder}/include/torch/csrc/api/include"
    targets = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures())
    lines = [
        "rule nvcc",
        f"  command = {nvcc()} {_NVCC_FLAGS} {targets} {include} -c $in -o $out",
        "rule cxx",
        f"  command = {native._compiler() or 'c++'} {_CXX_FLAGS} {include} -c $in -o $out",
        "rule link",
        f"  command = {nvcc()} -shared -cudart shared $in -o $out -L{folder}/lib -ltorch_cpu -ltorch_cuda",
    ]
    objects = []
    for path in _files():
        if path.suffix in (".cu", ".cpp"):
            objects.append(f"{path.stem}.o")
            lines.append(f"build {objects[-1]}: {'nvcc' if path.suffix == '.cu' else 'cxx'} {path}")
    return "\n".join([*lines, f"build library.so: link {' '.join(objects)}", ""])


def architectures() -> tuple[str, ...]:
    """The architectures compiled for, as nvcc names them without the sm_."""
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        wanted = [name.strip().removesuffix("+PTX").replace(".", "") for name in named.replace(" ", ";").split(";")]
        return tuple(dict.fromkeys(name for name in wanted if name))
    found = []
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(device)
            # The a: code for this architecture alone, with all that it has.
            found.append(f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}")
    return tuple(dict.fromkeys(found)) or DEFAULT_ARCHITECTURES


def nvcc() -> str | None:
    """The compiler: that of CUDA_HOME or CUDA_PATH, on the PATH, or where toolkits are installed."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.exists() else None)


def _major() -> str:
    found = re.search(r"release (\d+)", _nvcc_version())
    return found[1] if found else "an unknown version"


@cache
def _nvcc_version() -> str:
    done = subprocess.run([nvcc() or "", "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _sources() -> Path | None:
    sources = native._sources()
    return sources / "cuda" if sources is not None and (sources / "cuda").is_dir() else None


def _files() -> list[Path]:
    """Everything that is compiled, cells.h first."""
    sources = _sources()
    assert sources is not None
    found = [path for path in sources.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    return [sources.parent / "cells.h", *sorted(found)]
