"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rnnfast.errors import UserError, reason


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path`, so that a crash or a full disk leaves the previous file as it was.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
