"""What the user is told: the one error that is theirs to correct, and notes to the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress


class UserError(Exception):
    """An error that the user can correct. The message is one line and says what to do."""


def note(message: str) -> None:
    """Tell the user something in one line on stderr, apart from the program's output, if anyone is there to read it."""
    if sys.stderr is not None:  # else `print` would take the program's output
        with suppress(OSError, ValueError):  # a full disk, a reader that has gone; a file that is closed
            print(f"rnnfast: {message}", file=sys.stderr, flush=True)


def reason(error: OSError | ValueError) -> str:
    """The bare reason of an operating system error: "No space left on device", without number and path.

    It is a ValueError where a path holds what no path can, such as a NUL.
    """
    return getattr(error, "strerror", None) or str(error)
