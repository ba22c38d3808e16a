"""Compiles the CUDA kernels for the CPU, with the emulator of csrc/cuda/emulator.h, once a state of the sources."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rnnfast import building
from rnnfast.backends.cpu.build import ninja
from rnnfast.backends.cuda import build, launch
from rnnfast.files import cache_folder
from rnnfast.tuning import arithmetic

HERE = Path(__file__).parent
EMULATED = "rnnfast_cuda_emulated"
WATCHED = "rnnfast_cuda_watched"


def _ninja_file(compiler: str, namespace: str, flags: str, sources: list[Path]) -> str:
    """Of a library; `flags` are for the kernels."""
    folder = Path(torch.__file__).parent
    common = (
        "-std=c++17 -O1 -g0 -fPIC -Wall -Wextra -Wno-unknown-pragmas -Wno-clobbered "
        f"{building.TARGET_ABI} -DRNNFAST_CUDA_NAMESPACE={namespace} -DRNNFAST_CUDA_KEY=CPU "
        f"-isystem {folder}/include -isystem {folder}/include/torch/csrc/api/include -I{build._sources()}"
    )
    lines = ["rule compile", f"  command = {compiler} {common} $flags -x c++ -c $in -o $out"]
    lines += ["rule link", f"  command = {compiler} -shared $in -o $out -L{folder}/lib -ltorch_cpu"]
    for path in sources:
        lines.append(f"build {path.stem}.o: compile {path}")
        if path.suffix == ".cu" or path.name == "faults.cpp":
            lines.append(f"  flags = {flags}")
    return "\n".join([*lines, f"build emulated.so: link {' '.join(f'{path.stem}.o' for path in sources)}", ""])


def _compile(ninja: str, ninja_file: str, library: Path) -> None:
    work = library.with_name(f"{os.getpid()}.build")
    work.mkdir()
    (work / "build.ninja").write_text(ninja_file)
    done = subprocess.run([ninja, "-C", str(work)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    os.replace(work / "emulated.so", library)
    shutil.rmtree(work)


def _load(namespace: str, instances: str, ours: tuple[str, ...], flags: str = "") -> ctypes.CDLL:
    """The library with its operators registered for the CPU in the namespace; `ours` are the files of this folder."""
    compiler, command = building.compiler(), ninja()
    if not compiler or command is None:
        pytest.skip("no C++ compiler or no ninja")
    files = [path for path in build._files() if path.name != "device.cu"]
    files = [path for path in files if path.suffix != ".cu" or re.fullmatch(instances, path.stem)]
    files += [HERE / name for name in ours]
    compiled = [path for path in files if path.suffix in (".cu", ".cpp")]
    text = _ninja_file(shlex.join(compiler), namespace, flags, compiled)
    stamp = hashlib.sha256((text + torch.__version__).encode())
    for path in files:
        stamp.update(path.read_bytes())
    library = cache_folder() / f"emulated-{stamp.hexdigest()[:16]}" / "emulated.so"
    if not library.exists():
        with building.one_process(library.parent):  # of several that run the tests
            if not library.exists():
                _compile(command, text, library)
    torch.ops.load_library(str(library))
    functions = ctypes.CDLL(str(library))
    functions.rnnfast_run_fault.restype = ctypes.c_char_p
    return functions


@pytest.fixture(scope="session")
def emulated() -> ctypes.CDLL:
    """The kernels on the emulator."""
    return _load(EMULATED, ".*", ("emulated_device.cpp", "faults.cpp"))


@pytest.fixture(scope="session")
def watched() -> ctypes.CDLL:
    """The same with the race detector: enough instances to have all exchanges, and the product with and without mma."""
    ours = ("emulated_device.cpp", "faults.cpp", "races.cpp", "absent_instances.cpp")
    functions = _load(WATCHED, "(float32|bfloat16)_.*", ours, "-DRNNFAST_RACES -fsanitize=thread")
    functions.rnnfast_checked_accesses.restype = ctypes.c_uint64
    return functions


def use_operators(monkeypatch: pytest.MonkeyPatch, namespace: str) -> None:
    """Sends `rnnfast.backends.cuda.launch` to the operators of this name."""
    monkeypatch.setattr(launch, "NAMESPACE", namespace)
    for planned in (launch._plan, launch._limits):
        planned.cache_clear()


@pytest.fixture
def schedule(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sends `rnnfast.backends.cuda.launch` to the emulator; call it to choose the order in which threads run."""
    use_operators(monkeypatch, EMULATED)
    emulated.rnnfast_set_schedule(0)
    yield emulated.rnnfast_set_schedule
    emulated.rnnfast_set_schedule(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The layers are tiny: torch's threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _tf32_off() -> Iterator[None]:
    """Tests may allow TF32; the setting does not outlive them."""
    with arithmetic("float32"):
        yield
