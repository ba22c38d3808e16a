"""Files that are written whole or not at all, and folders that one process at a time writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rnnfast.errors import UserError, note, reason


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
        descriptor, temporary = _temporary(path)
        os.close(descriptor)
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
        descriptor, temporary = _temporary(path)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        kept = f" ({path.name} is still the previous one)" if path.is_file() else ""
        raise UserError(f"cannot write {path}: {reason(error)}{kept}; free space or choose another folder") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside `path`, open for writing; `held` knows its name."""
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run's folder to oneself, made if it is missing and removed again if it stays empty.

    Checkpoints that a killed run left half written are removed once the folder is locked, since only its run writes
    checkpoints into it; where it cannot be locked they stay.

    Raises:
        UserError: it cannot be made, or is held already.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {reason(error)}; choose another one") from error
    try:
        with _locked(folder) as is_locked:
            for remnant in folder.glob(".checkpoint.safetensors.*.part") if is_locked else ():
                with suppress(OSError):  # it is in nobody's way
                    remnant.unlink()
            yield
    finally:
        with suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether it is locked, which some systems cannot do."""
    try:
        import fcntl
    except ImportError:  # on Windows
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {reason(error)}; choose another one") from error
    is_locked = False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released however the process ends
            is_locked = True
        except BlockingIOError as error:
            raise UserError(
                f"another run is training in {folder}: wait until it has ended, or choose another folder"
            ) from error
        except OSError as error:  # some network file systems lock no folders
            note(f"{folder} cannot be locked ({reason(error)}): start no second run in it")
        yield is_locked
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
