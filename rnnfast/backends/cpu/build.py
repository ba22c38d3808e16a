"""Finds the library of csrc/ beside the package, or compiles it on first use and keeps it in the user's cache.

Nothing here runs at import. A library that was installed with the package has every instruction set, and serves any
torch from 2.10 on, as it uses torch's stable ABI only. On first use it is compiled for the processor at hand, in less
than half the time. setup.py imports this file without the package, so torch is imported only where it compiles on first
use.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from rnnfast import building

_FLAGS = (
    "-std=c++17 -O3 -g0 -fPIC -fopenmp -ffp-contract=off -fvisibility=hidden "
    f"-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas {building.TARGET_ABI}"
)
_AVX2 = "-mavx2 -mfma"
_AVX512 = f"{_AVX2} -mprfchw -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# From the least to the best. csrc/cpu/kernels.cpp is compiled once for each; choose.cpp picks one when it runs.
_INSTRUCTION_SETS = {"generic": ""}
if platform.machine() in ("x86_64", "AMD64"):
    _INSTRUCTION_SETS |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": f"{_AVX512} -mavx512bf16"}
    _INSTRUCTION_SETS["amx"] = f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"
# Those for bfloat16, beyond one of the others, and an instruction of each. They are newer than some compilers that know
# the rest; the library is complete without them.
_NEWER = {"avx512_bf16": "vdpbf16ps %zmm0, %zmm0, %zmm0", "amx": "tilezero %tmm0"}
ALL = tuple(_INSTRUCTION_SETS)


def why_not() -> str | None:
    """Returns why there is no library and none can be compiled, or None. Compiles and loads nothing."""
    if not sys.platform.startswith("linux"):
        return f"the native library is for Linux, this is {sys.platform}"
    if installed() is not None:
        return None
    if building.sources() is None:
        return "the package was installed without the native library and without its sources"
    if reason := building.why_no_compiler():
        return f"{reason}; with one the library compiles on first use"
    if ninja() is None:
        return "ninja was not found: pip install ninja, and the library compiles on first use"
    return None


def library() -> Path:
    """Returns the library, compiling it for this processor first if need be (about a minute on two cores, once).

    Raises:
        RuntimeError: it cannot be compiled; the message says why, or ends with what the compiler said.
    """
    if (found := installed()) is not None:
        return found
    import torch

    name, *words = building.compiler()
    compiler = Path(name).resolve()
    instruction_sets, wanted = _of_this_processor([name, *words]), os.environ.get("RNNFAST_CPU_ISA")
    if wanted in ALL and wanted not in instruction_sets:
        instruction_sets = ALL
    stamp = (source_hash(), [compiler, *words], compiler.stat().st_mtime_ns, torch.__version__, instruction_sets)
    compile_for = partial(compile_library, instruction_sets=instruction_sets)
    return building.compiled_once(stamp, "librnnfast.so", "the native scan", compile_for)


def compile_library(target: Path, instruction_sets: Sequence[str]) -> None:
    """Compiles csrc/ and puts the library at `target`, in one step, so that no one sees half of it.

    Instruction sets that the compiler lacks are left out.

    Raises:
        RuntimeError: the compiler failed; the message ends with what it said.
    """
    sources, compiler, command = building.sources(), building.compiler(), ninja()
    assert sources is not None
    assert command is not None
    with building.work_folder(target) as work:
        text = _ninja_file(sources, compiler, building.torch_folder(), instruction_sets)
        (work / "build.ninja").write_bytes(os.fsencode(text))
        building.run([command, "-C", str(work)], shlex.join(compiler))
        building.put(work / "library.so", target)


def installed() -> Path | None:
    """The library beside the package, if it was compiled from the sources that are there, or there are none."""
    found = sorted(building.PACKAGE.glob("librnnfast-*.so"))
    if not found or building.sources() is None:
        return found[0] if found else None
    wanted = building.PACKAGE / installed_name()
    return wanted if wanted in found else None


def installed_name() -> str:
    """The name of a library compiled while installing: it tells from which sources."""
    return f"librnnfast-{source_hash()}.so"


def source_hash() -> str:
    """A hash of csrc/, which names the library that belongs to it."""
    sources = building.sources()
    assert sources is not None
    return building.hash_of(_source_files(sources), _FLAGS, _INSTRUCTION_SETS)


def _ninja_file(sources: Path, compiler: Sequence[str], torch_folder: Path, instruction_sets: Iterable[str]) -> str:
    known, defines = _known(compiler, instruction_sets)

    def words(*each: object) -> str:  # for the shell, behind ninja's own `$`
        return shlex.join(map(str, each)).replace("$", "$$")

    def path_of(file: Path) -> str:
        return re.sub(r"[$ :]", r"$\g<0>", str(file))

    lines = [
        f"cc = {words(*compiler)} {_FLAGS} {defines} {words(*building.includes(torch_folder))}",
        "rule compile",
        "  command = $cc $isa -c $in -o $out",
        "rule link",
        f"  command = {words(*compiler)} -shared -fopenmp $in -o $out {words(f'-L{torch_folder}/lib')} -ltorch_cpu",
    ]
    objects = []
    for isa, flags in known.items():
        objects.append(f"{isa}.o")
        lines += [
            f"build {isa}.o: compile {path_of(sources / 'cpu/kernels.cpp')}",
            f"  isa = -DRNNFAST_ISA={isa} {flags}",
        ]
    for path in _source_files(sources):
        if path.suffix == ".cpp" and path.name != "kernels.cpp":
            objects.append(f"{path.stem}.o")
            lines.append(f"build {path.stem}.o: compile {path_of(path)}")
    return "\n".join([*lines, f"build library.so: link {' '.join(objects)}", ""])


def _of_this_processor(compiler: Sequence[str]) -> tuple[str, ...]:
    """What csrc/cpu/choose.cpp would choose here: a set for float32 and, if there is one, another for bfloat16."""
    command = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    has = {f"-m{macro.lower().replace('_', '-')}" for macro in re.findall(r"#define __(\w+)__ ", done.stdout)}
    if done.returncode or not has:
        return ALL
    has.add("-mprfchw")  # a hint, which does nothing where a processor lacks it
    found = [name for name, flags in _INSTRUCTION_SETS.items() if has.issuperset(flags.split())]
    *_, best = (name for name in found if name not in _NEWER)
    return best, *[name for name in found if name in _NEWER][-1:]


def _known(compiler: Sequence[str], names: Iterable[str]) -> tuple[dict[str, str], str]:
    """The flags of those that the compiler knows, and the macros that tell csrc/cpu/choose.cpp of them."""
    known = {
        name: _INSTRUCTION_SETS[name]
        for name in names
        if name not in _NEWER or _accepts(compiler, name, _INSTRUCTION_SETS[name])
    }
    return known, " ".join(f"-DRNNFAST_{name.upper()}" for name in known)


def _accepts(compiler: Sequence[str], name: str, flags: str) -> bool:
    """Whether the compiler, and the assembler behind it, know an instruction set."""
    command = [*compiler, *flags.split(), "-x", "c++", "-c", "-", "-o", os.devnull]
    code = f'void f() {{ asm("{_NEWER[name]}"); }}'.encode()
    return subprocess.run(command, input=code, capture_output=True, check=False).returncode == 0


def _source_files(sources: Path) -> list[Path]:
    files = (*sources.iterdir(), *(sources / "cpu").rglob("*"))
    return sorted(path for path in files if path.suffix in (".h", ".cpp"))


def ninja() -> str | None:
    """The program, beside Python or on the PATH."""
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")
