"""rnnfast: fast drop-in recurrent layers for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from rnnfast import functional
from rnnfast.dispatch import backends, explain, use_backend
from rnnfast.layers import GRU, LSTM, RNN
from rnnfast.tuning import tune

try:
    __version__ = version("rnnfast")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = ["GRU", "LSTM", "RNN", "backends", "explain", "functional", "tune", "use_backend"]
