"""Lets torch.compile trace the layers.

Dynamo declines every instance of nn.RNN, nn.LSTM and nn.GRU, as it would unroll torch's own step by step. Ours are one
operator a layer. It asks `isinstance` in one private method, and a configuration flag turns the question off for all
layers, torch's included; so that method is wrapped, and the flag is on while it looks at a layer of ours. A torch that
has no such method breaks the graph at our layers as it does at its own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_BUILDER = "torch._dynamo.variables.builder"


def let_dynamo_trace(is_ours: Callable[[Any], bool]) -> None:
    """Tells Dynamo, now or as soon as it is imported, which instances of nn.RNNBase can be traced."""

    def allow(builder: ModuleType) -> None:
        import torch._dynamo.config as config

        wrap_module = getattr(builder.VariableBuilder, "wrap_module", None)
        if wrap_module is None or not hasattr(config, "allow_rnn"):
            return

        def wrap(self: Any, value: Any) -> Any:
            if not is_ours(value):
                return wrap_module(self, value)
            with config.patch(allow_rnn=True):
                return wrap_module(self, value)

        builder.VariableBuilder.wrap_module = wrap

    if _BUILDER in sys.modules:
        allow(sys.modules[_BUILDER])
    else:
        # Importing Dynamo takes longer than importing the rest of torch; most programs never do.
        sys.meta_path.insert(0, _AfterImport(allow))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with Dynamo's builder once that has been imported."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                self.function(module)

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
