"""The one place that chooses a backend, and explains its choice.

A backend asked for by name is used or an error says why it cannot be. `auto` takes the first of `_AUTO[device]` that is
available and can do what is asked; what it passed over, and why, is part of the choice.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.utils.rnn import PackedSequence

AUTO = "auto"
CELL_STATES = "c of every step"  # an extension of a request: the scans have it on their tape


class Request(NamedTuple):
    """What decides whether a backend can run a layer; `extension` tells what changes its recurrence, "" if nothing."""

    cell: str
    device: str
    dtype: torch.dtype
    token_ids: bool
    projected: bool
    extension: str = ""


class Choice(NamedTuple):
    """A backend, why it was chosen, and why those before it were not."""

    backend: str
    reason: str
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  not {name}: {why}" for name, why in self.passed_over]
        return "\n".join(lines)


class Backend(NamedTuple):
    """A way to run a layer.

    `why_not()` tells cheaply, without building or loading anything, what is missing; None if nothing is. `load()` makes
    it ready and raises RuntimeError if that fails. `declines(request)` tells why it cannot do this request. Of the
    extensions of a request it has `extensions`; the reference has all.
    """

    name: str
    devices: tuple[str, ...]
    description: str
    why_not: Callable[[], str | None]
    load: Callable[[], None]
    declines: Callable[[Request], str | None]
    extensions: tuple[str, ...] = ()

    def refusal(self, request: Request) -> str | None:
        """Why this backend cannot run `request`, or None once it is loaded and can."""
        if self.devices and request.device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, the input is on {request.device}"
        reason = self.declines(request)
        if request.extension and self.name != "reference" and request.extension not in self.extensions:
            reason = f"it has no {request.extension}, which the reference has"
        if reason is None and self.name not in _loaded:
            reason = self.why_not()
            if reason is None:
                try:
                    self.load()
                except RuntimeError as error:
                    return str(error)
                _loaded.add(self.name)
        return reason


def _nothing(*_: object) -> None:
    """Nothing is missing, nothing to load, nothing declined."""


@cache
def _module(name: str) -> Any:
    """A backend's module, imported when it is first asked for."""
    return importlib.import_module(f"rnnfast.backends.{name}")


def _torch_declines(request: Request) -> str | None:
    return "torch.nn takes no token ids" if request.token_ids else None


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu",
            ("cpu",),
            "native C++, one library for every instruction set",
            lambda: _module("native").why_not(),
            lambda: _module("native").load(),
            lambda request: _module("native").declines(request),
            (CELL_STATES,),
        ),
        Backend(
            "triton",
            (),
            "Triton kernels for NVIDIA and AMD GPUs; not yet run on a GPU, so auto leaves it alone",
            lambda: _module("triton").why_not(),
            lambda: _module("triton").load(),
            lambda request: _module("triton").declines(request),
            (CELL_STATES,),
        ),
        Backend(
            "cuda",
            ("cuda",),
            "C++/CUDA kernels that keep the weights on the chip; not yet run on a GPU, so auto leaves it alone",
            lambda: _module("cuda").why_not(),
            lambda: _module("cuda").load(),
            lambda request: _module("cuda").declines(request),
            (CELL_STATES,),
        ),
        Backend("reference", (), "eager PyTorch, the definition of every cell", _nothing, _nothing, _nothing),
        Backend(
            "torch",
            (),
            "torch.nn's own path: oneDNN or ATen on a CPU, cuDNN on a GPU",
            _nothing,
            _nothing,
            _torch_declines,
        ),
    )
}

# For each kind of device, the order in which `auto` tries. It follows measurements: a kernel that no machine of
# the kind has run and timed is not in it.
_AUTO: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch", "reference")}
_AUTO_ELSEWHERE = ("torch", "reference")

_loaded: set[str] = set()


class _Context(threading.local):
    backend = AUTO


_context = _Context()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Uses the named backend for every rnnfast call of this thread within the block that does not name one itself.

    Raises:
        ValueError: no backend has this name.
    """
    check_name(name)
    before = _context.backend
    _context.backend = name
    try:
        yield
    finally:
        _context.backend = before


def asked(backend: str) -> str:
    """Returns the name that `backend` stands for here: that of `use_backend` where it is "auto"."""
    return _context.backend if backend == AUTO else backend


def choose(request: Request, backend: str = AUTO) -> Choice:
    """Chooses the backend for a request and loads it.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend asked for by name is not available or cannot do this; the message says why.
    """
    backend = asked(backend)
    check_name(backend)
    if backend != AUTO:
        refusal = _BACKENDS[backend].refusal(request)
        if refusal is not None:
            raise RuntimeError(
                f"rnnfast backend '{backend}' cannot run this {request.cell}: {refusal}. "
                "Use backend='auto' to let rnnfast choose, or see rnnfast.backends()."
            )
        return Choice(backend, "asked for by name", ())
    passed_over: list[tuple[str, str]] = []
    for name in _AUTO.get(request.device, _AUTO_ELSEWHERE):
        refusal = _BACKENDS[name].refusal(request)
        if refusal is None:
            return Choice(name, _BACKENDS[name].description, tuple(passed_over))
        passed_over.append((name, refusal))
    raise AssertionError("the reference backend declines nothing")


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or a backend's."""
    if name != AUTO and name not in _BACKENDS:
        raise ValueError(f"unknown rnnfast backend '{name}'; choose from {', '.join([AUTO, *_BACKENDS])}")


class BackendStatus(NamedTuple):
    """A row of `backends()`."""

    name: str
    available: bool
    picked_on: tuple[str, ...]
    note: str


class BackendTable(tuple[BackendStatus, ...]):
    """The backends, printed as a table."""

    def __repr__(self) -> str:
        rows = [("backend", "available", "auto picks it on", "note")]
        rows += [(s.name, "yes" if s.available else "no", ", ".join(s.picked_on) or "-", s.note) for s in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


def backends() -> BackendTable:
    """Returns every backend with whether it is available on this machine, or why not."""
    statuses = []
    for backend in _BACKENDS.values():
        why_not = backend.why_not()
        picked_on = tuple(device for device, names in _AUTO.items() if backend.name in names)
        if backend.name in _AUTO_ELSEWHERE:
            picked_on += ("other devices",)
        statuses.append(BackendStatus(backend.name, why_not is None, picked_on, why_not or backend.description))
    return BackendTable(statuses)


def explain(layer: Any, input: Tensor | PackedSequence) -> Choice:
    """Returns which backend `layer(input)` would run on and why; print it.

    Args:
        layer: an `rnnfast.RNN`, `LSTM` or `GRU`, a cell, or a `Stack` in the mode it is in.
        input: what the layer would be called with: a floating tensor, token ids, or a PackedSequence.
    """
    data = input if isinstance(input, torch.Tensor) else input.data
    if hasattr(layer, "request"):
        return choose(layer.request(data), layer.backend)
    is_cell = isinstance(layer, torch.nn.RNNCellBase)
    if is_cell:
        cell, weight, projected = layer._cell(), layer.weight_hh, False
    else:
        cell, weight, projected = layer.mode.lower(), layer.weight_hh_l0, layer.proj_size > 0
    request = Request(cell, weight.device.type, weight.dtype, not data.is_floating_point(), projected)
    return choose(request, getattr(layer, "backend", AUTO))
