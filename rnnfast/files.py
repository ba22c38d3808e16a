"""Where files are kept, and how they are written: whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from rnnfast.errors import UserError, reason


def cache_folder() -> Path:
    """Where libraries, measurements and texts are kept: $RNNFAST_CACHE, or rnnfast in the user's cache folder (XDG).

    Raises:
        RuntimeError: there is no home folder for it.
    """
    try:
        if folder := os.environ.get("RNNFAST_CACHE"):
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rnnfast"
    except RuntimeError as error:
        raise RuntimeError(f"{error} Set RNNFAST_CACHE to a folder that can be written") from error


def expanded(path: Path | str) -> Path:
    """The path, with the home folder in place of a leading ~ or ~user.

    Raises:
        UserError: there is no such folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} begins with a home folder that cannot be found: write the path in full") from error


def check_writable(path: Path) -> None:
    """Refuse a path that `atomic_write` could not write, before there is anything to write; its folder is made.

    Raises:
        UserError: it is a folder or a device, or its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is a folder or a device; give the name of a file")
        with _temporary(path) as file:
            temporary = file.name
        os.unlink(temporary)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; choose another place") from error


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path`, so that a crash or a full disk leaves the previous file as it was.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        kept = f" ({path.name} is still the previous one)" if path.is_file() else ""
        advice = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        raise UserError(f"cannot write {path}: {reason(error)}{kept}; {advice} or choose another folder") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _temporary(path: Path) -> BinaryIO:
    """A new file beside `path`, open for writing; lm/run_folder.py knows its name. (tempfile's are private.)"""
    return open(path.with_name(f".{path.name}.{secrets.token_hex(4)}.part"), "xb")
