"""The one place that chooses a backend, and explains its choice.

A backend asked for by name is used or an error says why it cannot be. `auto` takes the first of an order that is
available and can do what is asked; what it passed over, and why, is part of the choice. On a GPU the order is that of
the card's table of measurements (rnnfast/table.py); elsewhere it is `_AUTO`'s.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import table
from rnnfast.autocast import dtype_of_products
from rnnfast.cells import CELLS
from rnnfast.derivatives import needs_gradient
from rnnfast.locks import ForkSafeLock
from rnnfast.tracing import constant_in_graphs, is_transformed

AUTO = "auto"
# Extensions of a request. The first is on the tape of every scan but torch.nn's.
CELL_STATES, CELL_STATE_GRADIENTS = "c of every step", "gradients of c of every step"
EXTENDED_RECURRENCE = ("recurrent dropout", "zoneout", "layer normalisation", "peepholes")
_EXTENSIONS = (CELL_STATES, CELL_STATE_GRADIENTS, *EXTENDED_RECURRENCE)
_BY_NAME = "asked for by name"


class Size(NamedTuple):
    """How large a call is: H hidden units, B rows times the directions, T steps; whether a backward may follow."""

    device_index: int
    hidden: int
    rows: int
    steps: int
    training: bool


class Request(NamedTuple):
    """What decides whether a backend can run a layer, and on a GPU, where `size` is needed, which is fastest.

    `transformed`: a torch.func transform or forward-mode AD looks at the call. `extensions` are what the call is to do
    beyond a torch.nn layer.
    """

    cell: str
    device: str
    dtype: torch.dtype
    token_ids: bool
    projected: bool
    transformed: bool = False
    size: Size | None = None
    extensions: tuple[str, ...] = ()


class Choice(NamedTuple):
    """A backend, why it was chosen, why those before it were not, and, from `explain`, what runs elsewhere."""

    backend: str
    reason: str
    passed_over: tuple[tuple[str, str], ...]
    elsewhere: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  not {name}: {why}" for name, why in self.passed_over]
        lines += [f"  {what}: {where}" for what, where in self.elsewhere]
        return "\n".join(lines)


class Backend(NamedTuple):
    """A way to run a layer.

    `why_not()` tells cheaply, without building or loading anything, what is missing; None if nothing is. `load()` makes
    it ready and raises RuntimeError if that fails. `declines(request)` tells why it cannot do this request. Of the
    extensions of a request it has `extensions`.
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
        missing = [name for name in request.extensions if name not in self.extensions]
        if missing:
            reason = f"it has no {' or '.join(missing)}, which the reference has"
        return self.why_not_loaded() if reason is None else reason

    def why_not_loaded(self) -> str | None:
        """Why this backend cannot be loaded, or None once it is."""
        if self.name in _loaded:
            return None
        with _loading.lock:
            if self.name in _loaded:  # another thread has done so meanwhile
                return None
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
    return "torch.nn's kernels have no vmap or forward-mode AD" if request.transformed else None


def _of_module(name: str, devices: tuple[str, ...], description: str, extensions: tuple[str, ...]) -> Backend:
    """A backend of its own module, which is imported when one of its functions is first called."""
    return Backend(
        name,
        devices,
        description,
        lambda: _module(name).why_not(),
        lambda: _module(name).load(),
        lambda request: _module(name).declines(request),
        extensions,
    )


BACKENDS = {
    backend.name: backend
    for backend in (
        _of_module("cpu", ("cpu",), "native C++, for every instruction set", _EXTENSIONS),
        _of_module("triton", (), "Triton kernels for NVIDIA and AMD GPUs", (CELL_STATES,)),
        _of_module("cuda", ("cuda",), "C++/CUDA kernels that keep the weights on the chip", (CELL_STATES,)),
        Backend(
            "reference", (), "eager PyTorch, the definition of every cell", _nothing, _nothing, _nothing, _EXTENSIONS
        ),
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
# the kind has run and timed is not in it. On a GPU, what the card's table ranks comes first.
_AUTO: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch", "reference")}
_AUTO_ELSEWHERE = ("torch", "reference")
_PLACES = ("", " (2nd)", " (3rd)")  # in an order of `auto`
TABLED = ("cuda",)  # kinds of device whose cards have tables; a call's size matters there
_USUAL_ROWS, _USUAL_STEPS = 32, 128
HINT = "`rnnfast tune` measures the GPU kernels on this card; until then `auto` does not use them"

_loaded: set[str] = set()
_loading = ForkSafeLock()  # several threads may ask for a backend at once


class _Context(threading.local):
    def __init__(self) -> None:
        self.backend = AUTO  # of the object, where torch's compiler sees a change


context = _Context()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Uses the named backend for this thread's rnnfast calls within the block, unless a call names one itself.

    Raises:
        ValueError: there is no backend of this name.
    """
    check_name(name)
    before = context.backend
    context.backend = name
    try:
        yield
    finally:
        context.backend = before


def asked(backend: str) -> str:
    """Returns the name that `backend` stands for here: that of `use_backend` where it is "auto".

    Callers of `choose_name`, which torch.compile does not trace, call this first, so that it sees `use_backend`.
    """
    return context.backend if backend == AUTO else backend


def choose(request: Request, backend: str = AUTO) -> Choice:
    """Chooses the backend for a request and loads it.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend asked for by name is not available or cannot do this; the message says why.
    """
    backend = asked(backend)
    check_name(backend)
    if backend != AUTO:
        refusal = BACKENDS[backend].refusal(request)
        if refusal is not None:
            raise RuntimeError(
                f"rnnfast backend '{backend}' cannot run this {request.cell}: {refusal}. "
                "Use backend='auto' to let rnnfast choose, or see rnnfast.backends()."
            )
        return Choice(backend, _BY_NAME, ())
    order, left_alone = _order(request)
    passed_over = [(name, left_alone) for name in table.TUNED if name not in order] if left_alone else []
    for name in order:
        refusal = BACKENDS[name].refusal(request)
        if refusal is None:
            if request.size is not None:
                slower = [other for other in table.TUNED if other in order[order.index(name) + 1 :]]
                passed_over += [(other, "the measurements of this card rank it slower") for other in slower]
            return Choice(name, BACKENDS[name].description, tuple(passed_over))
        passed_over.append((name, refusal))
    raise AssertionError("the reference backend declines nothing")


def _order(request: Request) -> tuple[tuple[str, ...], str]:
    """The backends that `auto` tries in turn, and why those that a table decides about are not among them."""
    order = _AUTO.get(request.device, _AUTO_ELSEWHERE)
    if request.device not in TABLED or request.size is None:
        return order, ""
    device, hidden, rows, steps, training = request.size
    found = table.of(device)
    if found.table is None:
        return order, f"no measurement has verified it on this card, {found.why_not}; {HINT}"
    regime = table.Regime.of(request.cell, request.dtype, hidden, rows, steps, training)
    ranking = found.table.ranking(regime, device)
    return (*ranking, *order), "the card's table has not found it right at this size"


@constant_in_graphs
def choose_name(backend: str, size: tuple[Any, ...] | None, *request: Any) -> str:
    """Returns the name that `choose` chooses for a `Request` of these parts, and of a `Size` of those.

    Dynamo would hand over the named tuples without their content.
    """
    return choose(Request(*request)._replace(size=None if size is None else Size(*size)), backend).backend


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or a backend's."""
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"unknown rnnfast backend '{name}'; choose from {', '.join([AUTO, *BACKENDS])}")


class Dispatched(torch.nn.Module):
    """What our layers and cells have beyond torch.nn's: `backend`, and what torch.jit.script is told."""

    backend: str = AUTO

    def __init__(self, *args: Any, backend: str = AUTO, **kwargs: Any) -> None:
        check_name(backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks before it reads the source; its own error would name a type."""
        raise RuntimeError(
            "torch.jit.script cannot compile rnnfast's layers: use torch.export or torch.jit.trace; or give it "
            "torch.nn's, which take the same state_dict, and which rnnfast.restore makes of accelerated ones again"
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == AUTO else f", backend={self.backend!r}")


class BackendStatus(NamedTuple):
    """A row of `backends()`."""

    name: str
    available: bool
    picked_on: tuple[str, ...]
    note: str


class BackendTable(tuple[BackendStatus, ...]):
    """The backends, printed as a table, with a hint below it where something can be done."""

    hint = ""

    def __repr__(self) -> str:
        rows = [("backend", "available", "auto picks it on", "note")]
        rows += [(s.name, "yes" if s.available else "no", ", ".join(s.picked_on) or "-", s.note) for s in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        return "\n".join([*lines, self.hint] if self.hint else lines)


def backends() -> BackendTable:
    """Returns all backends, and for each whether it is available on this machine, or why not. Print it."""
    statuses, hint = [], ""
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    tables = [table.of(device) for device in cards]
    for backend in BACKENDS.values():
        why_not = backend.why_not()
        note = why_not or backend.description
        picked_on = tuple(
            device + _PLACES[names.index(backend.name)] for device, names in _AUTO.items() if backend.name in names
        )
        if backend.name in _AUTO_ELSEWHERE:
            picked_on += ("other devices" + _PLACES[_AUTO_ELSEWHERE.index(backend.name)],)
        if why_not is None and backend.name in table.TUNED and tables:
            verdicts = [_verdict(backend.name, found) for found in tables]
            note = "; ".join([note, *dict.fromkeys(verdict for verdict, _ in verdicts)])
            if any(wins for _, wins in verdicts):
                picked_on += ("cuda, where fastest",)
            if any(found.table is None for found in tables):
                hint = HINT
        statuses.append(BackendStatus(backend.name, why_not is None, picked_on, note))
    result = BackendTable(statuses)
    result.hint = hint
    return result


def _verdict(backend: str, found: table.Found) -> tuple[str, int]:
    """What a card's table says of a backend, and how often it was the fastest."""
    if found.table is None:
        return f"not verified: {found.why_not}", 0
    wins, calls = found.table.wins(backend)
    card = found.table.identity.card
    return f"fastest in {wins} of {calls} calls measured on {card} (table: {found.table.origin})", wins


def explain(layer: Any, input: Tensor | PackedSequence) -> Choice:
    """Returns which backend `layer(input)` would run on and why, and which derivatives run elsewhere. Print it.

    Of a `Stack`, it is the first layer's that is told; on a GPU, layers of other sizes may run on others.

    Args:
        layer: an `rnnfast.RNN`, `LSTM` or `GRU`, a cell, or a `Stack` in the mode it is in; or an accelerated one.
        input: what the layer would be called with: a floating tensor, token ids, or a PackedSequence.

    Raises:
        TypeError: the layer is not one of ours, so there is nothing to choose; or it does not take inputs of this type.
    """
    if not hasattr(layer, "backend"):
        is_recurrent = isinstance(layer, torch.nn.RNNBase | torch.nn.RNNCellBase)
        advice = "rnnfast.accelerate it first" if is_recurrent else "explain one of its layers"
        raise TypeError(f"explain takes an rnnfast layer, cell or Stack, got {type(layer).__name__}; {advice}")
    if not isinstance(input, Tensor | PackedSequence):
        raise TypeError(f"explain takes a tensor or a PackedSequence as input, got {type(input).__name__}")
    if isinstance(layer, torch.nn.RNNCellBase) and not isinstance(input, Tensor):
        raise TypeError(f"a cell takes a tensor, got {type(input).__name__}")
    data = input if isinstance(input, Tensor) else input.data
    token_ids = not data.is_floating_point()
    if hasattr(layer, "_request"):
        request = layer._request(data)
        if not request.extensions:
            request = request._replace(size=_size_of_input(layer.cell, layer, input))
    elif isinstance(layer, torch.nn.RNNCellBase):  # which computes in its weights' type under autocast, too
        weight = layer.weight_hh
        request = Request(cell_of(layer), weight.device.type, weight.dtype, token_ids, False, is_transformed())
    else:
        cell, weight = cell_of(layer), layer.weight_hh_l0
        dtype, size = dtype_of_products(weight), _size_of_input(cell, layer, input)
        request = Request(cell, weight.device.type, dtype, token_ids, layer.proj_size > 0, is_transformed(), size)
    choice = choose(request, layer.backend)
    elsewhere = _elsewhere(choice, request)
    if getattr(layer, "mode", None) == "LSTM":
        elsewhere += _states_elsewhere(choice, request)
    return choice._replace(elsewhere=elsewhere)


def cell_of(module: Any) -> str:
    """The key in `rnnfast.cells.CELLS` of a layer or cell of torch.nn's, or ours.

    Raises:
        RuntimeError: an RNNCell with another nonlinearity, which torch.nn's constructor lets pass.
    """
    if isinstance(module, torch.nn.RNNBase):
        return module.mode.lower()
    if isinstance(module, torch.nn.RNNCell):
        if module.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {module.nonlinearity}")
        return f"rnn_{module.nonlinearity}"
    return "lstm" if isinstance(module, torch.nn.LSTMCell) else "gru"


def _elsewhere(choice: Choice, request: Request) -> tuple[tuple[str, str], ...]:
    if choice.backend == "reference":
        return ()
    if choice.backend != "torch":
        return (
            ("second and higher derivatives", "reference, differentiated by torch"),
            ("forward-mode derivatives", "reference, differentiated by torch"),
        )
    mapped = request._replace(transformed=True)
    refused = choice.reason == _BY_NAME
    elsewhere = f"refused: {_torch_declines(mapped)}" if refused else choose(mapped).backend
    return (
        ("gradients under torch.compile", "torch, which runs forward once more"),
        ("torch.func and forward-mode AD", elsewhere),
    )


def _states_elsewhere(choice: Choice, request: Request) -> tuple[tuple[str, str], ...]:
    """Where `LSTM.states` runs if it does not run where the layer does."""
    request = request._replace(size=None, extensions=(CELL_STATE_GRADIENTS,))
    if choice.reason == _BY_NAME:
        refusal = BACKENDS[choice.backend].refusal(request)
        return () if refusal is None else (("states() with gradients", f"refused: {refusal}"),)
    backend = choose(request).backend
    return () if backend == choice.backend else (("states() with gradients", backend),)


def _size_of_input(cell: str, layer: Any, input: Tensor | PackedSequence) -> Size | None:
    """The size of a layer's call, or of that of a stack's first layer; None where it decides nothing."""
    weight = layer.weight_hh_l0
    if weight.device.type not in TABLED:
        return None
    data = input if isinstance(input, Tensor) else input.data
    leading = data.shape[:-1] if data.is_floating_point() else data.shape
    if not isinstance(input, Tensor):
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
    else:
        steps, batch = leading if len(leading) > 1 else (leading[0], 1)
        if layer.batch_first and len(leading) > 1:
            steps, batch = batch, steps
    return size_of(cell, weight, batch * (1 + layer.bidirectional), steps, (data, *layer.parameters()))


def size_of(cell: str, w_hh: Tensor, rows: int, steps: int, differentiable: Iterable[Tensor | None]) -> Size | None:
    """The size of a call on a GPU.

    Args:
        cell: a key of `rnnfast.cells.CELLS`.
        w_hh: (G*H, P).
        rows, steps: B times the directions, and T.
        differentiable: what may require a gradient.

    Returns:
        None while a graph is exported, which is to hold for sizes that are not known yet. A compiled graph goes by the
        sizes that it is compiled for, and by usual ones where it serves any T or B.
    """
    if _is_exporting():
        return None
    if torch.compiler.is_compiling():
        has_static_value = torch.fx.experimental.symbolic_shapes.has_static_value  # Dynamo has imported it
        rows = rows if has_static_value(rows) else _USUAL_ROWS
        steps = steps if has_static_value(steps) else _USUAL_STEPS
    hidden = w_hh.shape[0] // CELLS[cell].gates
    return Size(w_hh.device.index or 0, hidden, rows, steps, needs_gradient(differentiable))


@constant_in_graphs  # torch 2.11 takes it for true in any graph
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()
