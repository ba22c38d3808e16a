"""Finds the library of csrc/cuda beside the package, or compiles it on first use and keeps it in the user's cache.

setup.py compiles it where a CUDA toolkit and a torch built for CUDA are there, for TORCH_CUDA_ARCH_LIST (such as
"8.0;9.0a") or else sm_80 and sm_90a; whether a GPU is present decides nothing then. On first use it is compiled for the
devices that PyTorch sees, and goes by that variable where it sees none: many machines set it to all cards there are.
setup.py imports this file without the package, so torch is imported only where a device is asked for.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from rnnfast import building

_NVCC_FLAGS = (
    f"-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA {building.TARGET_ABI}"
)
_CXX_FLAGS = f"-std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wextra {building.TARGET_ABI}"
DEFAULT_ARCHITECTURES = ("80", "90a")


def why_not() -> str | None:
    """Returns why there is no library and none can be compiled, or None. Compiles and loads nothing."""
    return None if installed() is not None else why_not_compile()


def why_not_compile() -> str | None:
    """Returns what is missing to compile the library, or None."""
    if _sources() is None:
        return "the package was installed without the sources of its CUDA kernels"
    if nvcc() is None:
        return "nvcc was not found: install the CUDA toolkit or set CUDA_HOME, and the kernels compile on first use"
    cuda = torch_cuda()
    if cuda is not None and _nvcc_release().split(".")[0] != cuda.split(".")[0]:
        return f"nvcc is of CUDA {_nvcc_release()}, PyTorch of CUDA {cuda}: set CUDA_HOME to one that matches"
    if reason := building.why_no_compiler():
        return f"{reason}; with one the kernels compile on first use"
    return None


def library() -> Path:
    """Returns the library, compiling it first if need be (a minute or two, once).

    Raises:
        RuntimeError: it cannot be compiled; the message says why, or ends with what nvcc said.
    """
    if (found := installed()) is not None:
        return found
    reason = why_not_compile()
    if reason is not None:
        raise RuntimeError(reason)
    import torch

    targets = device_architectures() or named_architectures() or DEFAULT_ARCHITECTURES
    stamp = (source_hash(), targets, torch.__version__, nvcc(), _nvcc_version(), building.compiler())
    compile_for = partial(compile_library, architectures=targets)
    return building.compiled_once(stamp, "librnnfast_cuda.so", "the CUDA scan", compile_for)


def compile_library(target: Path, architectures: tuple[str, ...]) -> None:
    """Compiles csrc/cuda and puts the library at `target`, in one step.

    Raises:
        RuntimeError: the compiler failed; the message ends with what it said.
    """
    with building.work_folder(target) as work:
        *compile_all, link = _commands(architectures, work)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compile_all))
        try:
            _run(link)
        except RuntimeError:
            # A toolkit without libcudart.so to link with: torch has loaded that of its own, which resolves the names.
            _run(["none" if word == "shared" else word for word in link])
        building.put(work / "library.so", target)


def installed_name(architectures: tuple[str, ...]) -> str:
    """The name of a library compiled while installing: it tells from which sources and for which architectures."""
    return "-".join(["librnnfast_cuda", source_hash(), *architectures]) + ".so"


def source_hash() -> str:
    """A hash of csrc/cuda, which names the library that belongs to it; "none" without sources."""
    return "none" if _sources() is None else building.hash_of(_files(), _NVCC_FLAGS, _CXX_FLAGS)


def named_architectures() -> tuple[str, ...]:
    """Those of TORCH_CUDA_ARCH_LIST from 8.0 on, as nvcc names them without the sm_."""
    named = re.findall(r"\b(\d+)\.(\d)(a?)\b", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    return tuple(dict.fromkeys("".join(name) for name in named if int(name[0]) >= 8))


def device_architectures() -> tuple[str, ...]:
    """Those of the devices that PyTorch sees."""
    found = []
    for major, minor in _capabilities():
        # The a: code for this architecture alone, with all that it has.
        found.append(f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}")
    return tuple(dict.fromkeys(found))


def torch_cuda() -> str | None:
    """The version of CUDA that the installed torch was built for; None for a torch without CUDA, or none at all."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    found: Any = runpy.run_path(str(Path(torch.origin).with_name("version.py"))).get("cuda")
    return found if isinstance(found, str) else None


def nvcc() -> str | None:
    """The compiler: that of CUDA_HOME or CUDA_PATH, on the PATH, or where toolkits are installed."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.exists() else None)


def installed() -> Path | None:
    """The library beside the package, if it is of the sources that are there and runs on every device."""
    for path in sorted(building.PACKAGE.glob("librnnfast_cuda-*.so")):
        _, sources, *architectures = path.stem.split("-")
        current = _sources() is None or sources == source_hash()
        if current and all(any(_runs_on(a, device) for a in architectures) for device in _capabilities()):
            return path
    return None


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Code for sm_XY runs on later minor versions of X as well, code for sm_XYa on X.Y alone."""
    found = re.fullmatch(r"(\d+)(\d)(a?)", architecture)
    assert found is not None, architecture
    major, minor = int(found[1]), int(found[2])
    return (major, minor) == capability or (not found[3] and major == capability[0] and minor < capability[1])


def _capabilities() -> list[tuple[int, int]]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]


def _commands(architectures: tuple[str, ...], work: Path) -> list[list[str]]:
    """What compiles each file into the folder `work` and, last, links library.so there."""
    torch = building.torch_folder()
    compilers = {
        ".cu": [nvcc() or "", *_NVCC_FLAGS.split(), *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures)],
        ".cpp": [*building.compiler(), *_CXX_FLAGS.split()],
    }
    commands, objects = [], []
    for path in _files():
        if path.suffix in compilers:
            objects.append(str(work / f"{path.stem}.o"))
            commands.append([*compilers[path.suffix], *building.includes(torch), "-c", str(path), "-o", objects[-1]])
    link = [nvcc() or "", "-shared", "-cudart", "shared", *objects, "-o", str(work / "library.so")]
    return [*commands, [*link, f"-L{torch}/lib", "-ltorch_cpu", "-ltorch_cuda"]]


def _run(command: list[str]) -> None:
    building.run(command, command[0])


def _nvcc_release() -> str:
    found = re.search(r"release ([\d.]+)", _nvcc_version())
    return found[1] if found else "an unknown version"


@cache
def _nvcc_version() -> str:
    done = subprocess.run([nvcc() or "", "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _sources() -> Path | None:
    sources = building.sources()
    return sources / "cuda" if sources is not None and (sources / "cuda").is_dir() else None


def _files() -> list[Path]:
    """Everything that is compiled, what the CPU scan shares first."""
    sources = _sources()
    assert sources is not None
    found = [path for path in sources.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    return [sources.parent / "cells.h", sources.parent / "text.h", *sorted(found)]
