"""Modules that take long to import, and that most programs never do: what is to be done once one has been."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType


def after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Calls a function with the module of that name, now or as soon as it is imported."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self.name, self.function = name, function
        self.searching: set[int] = set()  # the threads that ask the finders behind this one

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        thread = threading.get_ident()
        if name != self.name or thread in self.searching:
            return None
        self.searching.add(thread)
        try:
            spec = importlib.util.find_spec(name)  # by the finders behind this one, another of these perhaps
        finally:
            self.searching.discard(thread)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # until then somebody may have asked for the spec alone
                    sys.meta_path.remove(self)
                    self.function(module)

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
