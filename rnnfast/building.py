"""What compiling the native and the CUDA library has in common: sources, compiler, and the folder they are kept in.

setup.py imports this file without the package, so it imports no torch.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
TARGET_ABI = "0x020a000000000000"  # torch 2.10


def cache_folder() -> Path:
    """Where libraries, measurements and texts are kept: $RNNFAST_CACHE, or rnnfast in the user's cache folder (XDG)."""
    if folder := os.environ.get("RNNFAST_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rnnfast"


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
    return next(((path, *words) for name, *words in commands if (path := shutil.which(name))), ())


def why_no_compiler() -> str | None:
    """Returns what is missing, or None if there is a compiler."""
    if compiler():
        return None
    given = os.environ.get("CXX", "").strip()
    return f"CXX is '{given}', which is no program" if given else "no C++ compiler was found: install g++ (or set CXX)"


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Makes the folder, and lets no other process in here with it meanwhile."""
    import fcntl  # not on Windows, where nothing is compiled

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, however the process ends
        yield
