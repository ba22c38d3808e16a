"""A run's folder, which one process at a time writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rnnfast.errors import UserError, note, reason
from rnnfast.lm.checkpoint import FILE_NAME


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
            for remnant in folder.glob(f".{FILE_NAME}.*.part") if is_locked else ():
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
