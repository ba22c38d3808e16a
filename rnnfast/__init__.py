"""rnnfast: fast drop-in recurrent layers for PyTorch."""

import typing as _typing
from importlib import import_module as _import_module
from importlib import metadata as _metadata

from rnnfast import functional, sequences
from rnnfast.cell_modules import GRUCell, LSTMCell, RNNCell
from rnnfast.direct import forget_packed_weights
from rnnfast.dispatch import backends, explain, use_backend
from rnnfast.errors import UserError
from rnnfast.layers import GRU, LSTM, RNN
from rnnfast.stack import Stack
from rnnfast.stream import Stream
from rnnfast.swap import accelerate, restore
from rnnfast.tuning import tune

try:
    __version__ = _metadata.version("rnnfast")
except _metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Stack",
    "Stream",
    "UserError",
    "accelerate",
    "backends",
    "explain",
    "forget_packed_weights",
    "functional",
    "restore",
    "sequences",
    "tune",
    "use_backend",
]


if not _typing.TYPE_CHECKING:  # a type checker would take any name for a module

    def __getattr__(name):
        """The modules that `import rnnfast` alone does not import, as few programs need them."""
        if name in ("d2l", "lm", "onnx"):
            return _import_module(f"rnnfast.{name}")
        raise AttributeError(f"module 'rnnfast' has no attribute {name!r}")
