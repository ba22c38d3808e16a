"""Locks that may be held by another thread when a process is forked."""

from __future__ import annotations

import os
import threading


class ForkSafeLock:
    """`lock` is a `threading.RLock`, and in a forked child a new one: the child has no thread that would release it."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()
