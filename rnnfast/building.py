"""What compiling the native and the CUDA library has in common: sources, compiler, and the folder they are kept in.

setup.py imports this file without the package, so it imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from rnnfast import files
from rnnfast.errors import note

PACKAGE = Path(__file__).resolve().parent
TARGET_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # torch 2.10
WORK = ".build"  # what the names of folders end with in which something is compiled


@cache
def sources() -> Path | None:
    """csrc/: within the package where it was installed, beside it in a checkout."""
    return next((f for f in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if (f / "library.cpp").exists()), None)


def compiler() -> tuple[str, ...]:
    """The C++ compiler and what it is always given: the words of $CXX, or the first that is found; () if none is."""
    given = os.environ.get("CXX", "").strip()
    try:
        commands = [[given], shlex.split(given)] if given else [["c++"], ["g++"], ["clang++"]]
    except ValueError:  # a quotation that does not end
        return ()
    # It is called from another folder, where a relative path would be another file.
    return next(((os.path.abspath(path), *words) for name, *words in commands if (path := shutil.which(name))), ())


def why_no_compiler() -> str | None:
    """Returns what is missing, or None if there is a compiler."""
    if compiler():
        return None
    given = os.environ.get("CXX", "").strip()
    return f"CXX is '{given}', which is no program" if given else "no C++ compiler was found: install g++ (or set CXX)"


def torch_folder() -> Path:
    """The installed torch's, whose headers and libraries are in it; torch itself may lack what it imports yet."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    return Path(torch.origin).parent


def includes(torch: Path) -> list[str]:
    """The compilers' options for the headers of the torch in that folder."""
    include = torch / "include"
    return ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]


def hash_of(files: Iterable[Path], *more: object) -> str:
    """A hash of the names and contents of files, and of what else they are compiled with."""
    digest = hashlib.sha256(repr(more).encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def compiled_once(stamp: object, name: str, what: str, compile_library: Callable[[Path], None]) -> Path:
    """The library in the cache that belongs to a stamp, compiled now if it is not there."""
    library = files.cache_folder() / hashlib.sha256(repr(stamp).encode()).hexdigest()[:16] / name
    if not library.exists():
        with one_process(library.parent):
            if not library.exists():
                note(f"compiling {what} into {library.parent} (once)")
                compile_library(library)
    return library


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Makes the folder, and lets no other process in here with it meanwhile."""
    import fcntl  # not on Windows, where nothing is compiled

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(f"another process is compiling into {folder}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for remnant in folder.glob(f"*{WORK}"):  # of a process that was killed
                shutil.rmtree(remnant, ignore_errors=True)
        except OSError:  # some network file systems lock nothing: what is compiled appears in one step all the same
            pass
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing leaves it to a child that was forked meanwhile


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, for the time of its compilation."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=WORK, dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put(library: Path, target: Path) -> None:
    """Moves what was compiled to its place, in one step and after all of it has reached the disk."""
    with open(library, "rb") as file:
        os.fsync(file.fileno())
    os.replace(library, target)


def run(command: Sequence[str], name: str) -> None:
    """Runs a compiler, or ninja. Raises RuntimeError if it fails, with the reason from what it said."""
    # Compilers speak the user's language, and name files, in whatever encoding.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError("; ".join([f"{name} failed", *_what_failed(done.stdout + done.stderr)]))


def _what_failed(said: str) -> list[str]:
    """The lines of a compiler's or ninja's output that tell the reason, three at most."""
    lines = said.splitlines()
    errors = [line for line in lines if re.search(r"error\s*:", line, re.IGNORECASE)]
    if not errors:  # ninja names what failed and the command, and then comes what that said
        failed = next((at for at, line in enumerate(lines) if line.startswith("FAILED")), -2)
        errors = [line for line in lines[failed + 2 :] if not line.startswith("ninja: ")]
    return (errors or lines)[:3]
