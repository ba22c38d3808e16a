"""Lets torch.compile and torch.fx trace the layers.

Dynamo declines every instance of nn.RNN, nn.LSTM and nn.GRU, as it would unroll torch's own step by step. Ours are one
operator a layer. It asks `isinstance` in one private method, and a configuration flag turns the question off for all
layers, torch's included; so that method is wrapped, and the flag is on while it looks at a layer of ours. A torch that
has no such method breaks the graph at our layers as it does at its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.fx
from torch import nn

from rnnfast.imports import after_import

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

    after_import(_BUILDER, allow)


def let_fx_keep_whole(is_ours: Callable[[Any], bool]) -> None:
    """Has torch.fx's tracers record a call of our layers and cells as they do of torch.nn's own: as one node."""
    is_leaf = torch.fx.Tracer.is_leaf_module

    def wrap(self: torch.fx.Tracer, m: nn.Module, module_qualified_name: str) -> bool:
        return is_ours(m) or is_leaf(self, m, module_qualified_name)

    torch.fx.Tracer.is_leaf_module = wrap  # type: ignore[method-assign]
