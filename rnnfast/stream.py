"""Streams: a layer, or a whole model, fed step by step or chunk by chunk, its states kept between the calls."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rnnfast import direct
from rnnfast.inputs import map_state
from rnnfast.layers import DropIn
from rnnfast.stack import Stack
from rnnfast.swap import hides_state, is_ours


class Stream:
    """Keeps the states of a layer, or of every recurrent layer in a model, from one call to the next.

    The outputs of successive calls are those of one call over the whole sequence; on the cpu backend rnnfast's layers
    yield exactly the same bits in float32 and float64, however the sequence is cut. A stream belongs to the sequences
    it is fed: make one for each group of B that run side by side. It neither copies nor changes the module, which any
    number of streams may share, also in several threads. Without `torch.no_grad()` or `torch.inference_mode()` the
    states carry the graph of all calls so far: see `detach`.

    A model is called as it is and needs no change. In its first call each recurrent layer starts from the state that
    the model gives it, or from zeros; in later calls, from where it stopped. A layer that runs several times in a call,
    given no state, has a state for each of its runs, in their order. The rest of the model must treat each time step on
    its own, as linear layers, embeddings and layer norms do; a convolution over time does not. Cells are left alone,
    because the model keeps their states itself.

    Args:
        module: an `rnnfast.RNN`, `LSTM`, `GRU` or `Stack`; or a model with recurrent layers in it, ours or torch.nn's.
        stateless: names of layers of the model, or of modules that contain them, which begin anew in every call, and
            may be bidirectional: those that do not walk through time, but for instance through the frequencies of a
            frame.

    Raises:
        RuntimeError: a layer is bidirectional, so its first output needs the last input; or it is in a module that is
            quantized, compiled by torch.jit or exported, so its state cannot be seen.
        ValueError: there is no recurrent layer, or no module of a name in `stateless`; or a layer has a name such as
            "a[1]" beside a module "a".
        TypeError: the module is itself a torch.nn layer, which has no step; or `stateless` is no list.
    """

    def __init__(self, module: nn.Module, stateless: Sequence[str] = ()) -> None:
        if isinstance(module, nn.RNNBase) and not is_ours(module):
            name = type(module).__name__
            raise TypeError(f"a torch.nn {name} has no step: make it an rnnfast.{name}, or rnnfast.accelerate it")
        self.module = module
        self._is_alone = isinstance(module, nn.RNNBase | Stack)
        self._layers = dict(_layers_with_state(module, stateless))
        if not self._layers:
            raise ValueError(
                f"{type(module).__name__} has no RNN, LSTM or GRU in it whose state could be kept; those of cells, and "
                "of recurrences written by hand, are the model's own"
            )
        self._states: dict[str, Any] = {}
        self._started_from: dict[str, Any] = {}
        self._steps: direct.Steps | None = None  # of a layer: where there are any, they have the state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Feeds the next step or steps.

        Args:
            args, kwargs: what the module takes. For a layer or a stack the input alone: a step, (B, I) or ids (B,), or
                a chunk of T steps, (T, B, I) or ids (T, B), or with batch_first (B, T, ...).

        Returns:
            For a layer or a stack, the output of the step (B, P) or of the chunk; for a model, what it returns.

        Raises:
            RuntimeError: a layer of the model ran again in the same call with a state that the model gave it, or more
                or less often than before, left no state (as `LSTM.states` does), or runs under activation checkpointing
                with gradients; or none ran where it could be seen; and what the module raises. The states are then
                those before the call.
        """
        if not self._is_alone:
            return self._call_model(*args, **kwargs)
        if self._steps is not None and len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            output = self._steps(args[0])
            if output is not None:
                return output
        return self._feed(*args, **kwargs)

    def _call_model(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(dict(self._states), dict(self._started_from))
        followed = [_Followed(name, layer, call) for name, layer in self._layers.items()]
        try:
            for each in followed:
                each.follow()
            result = self.module(*args, **kwargs)
        finally:
            for each in followed:
                each.leave()
        # Taken over once the whole model has run: after an error the same steps can be fed again.
        call.check()
        self._states.update({key: _kept(state) for key, state in call.after.items()})
        self._started_from.update(call.started_from)
        return result

    def _feed(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            raise TypeError(
                "a stream of a layer takes the input alone: it keeps the state, and all rows go on together"
            )
        (input,) = args
        if not isinstance(input, Tensor):
            raise TypeError(f"a stream of a layer takes a tensor, got {type(input).__name__}")
        self._end_steps()
        layer: Any = self.module
        state, steps = self._states.get(""), input.dim() - (1 if input.is_floating_point() else 0)
        try:
            result: tuple[Tensor, Any] = layer.step(input, state) if steps == 1 else layer(input, state)
        except RuntimeError:
            _check_batch(layer, input, state)
            raise
        output, state = result
        self._states[""] = _kept(state)
        is_ordinary = getattr(layer.step, "__func__", None) is DropIn.step  # neither a stack's, nor a subclass's own
        if steps == 1 and is_ordinary and not torch.compiler.is_compiling():
            self._steps = direct.steps_after(layer, input, self._states[""])
        return output

    def _end_steps(self) -> None:
        """Takes the state over from them."""
        if self._steps is not None:
            self._states[""], self._steps = self._steps.state, None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, too: it goes on with this state, in memory of its own."""
        self._end_steps()
        return self.__dict__ | {"_states": dict(self._states), "_started_from": dict(self._started_from)}

    @property
    def state(self) -> Any:
        """The state after the last call, which can be saved and set again.

        For a layer h (L, B, P), or (h, c) for an LSTM; for a stack one for each layer; None before the first call. For
        a model a dict of such states by the layers' names; that of another run in the same call has "[1]", "[2]" and so
        on after the name.
        """
        self._end_steps()
        return self._states.get("") if self._is_alone else dict(self._states)

    @state.setter
    def state(self, state: Any) -> None:
        if self._is_alone:
            state = {} if state is None else {"": state}
        if not isinstance(state, dict):
            raise TypeError(f"the state of a model is a dict by its layers' names, got {type(state).__name__}")
        unknown = {key for key in state if key not in self._layers and _name_of(key) not in self._layers}
        if unknown:
            raise ValueError(f"the model has no recurrent layer {', '.join(sorted(unknown))}")
        self._states, self._started_from, self._steps = dict(state), {}, None

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Starts over: all sequences, or those in some rows of the batch.

        Args:
            rows: indices into the batch of the layers, or a (B,) bool mask: where a model makes a batch of B F rows of
                F frequencies, those of all F. None: all, and the next call may have another B.

        Raises:
            IndexError: an index outside the batch, or a mask of another size.
        """
        self._end_steps()
        if rows is None:
            self._states.clear()
            self._started_from.clear()
            return
        states = {}
        for name, state in self._states.items():
            start = self._started_from.get(name)
            start = map_state(state, lambda part: part.new_zeros(()).expand_as(part)) if start is None else start
            states[name] = map_state(state, lambda part, begin: _with_rows(part, rows, begin), start)
        self._states = states

    def detach(self) -> None:
        """Cuts the graph at the states, as truncated backpropagation through time does between chunks."""
        self._end_steps()
        self._states = {name: map_state(state, lambda part: part.detach()) for name, state in self._states.items()}


class _Call:
    """A call of a stream's model: the states before it, and those that its layers have left so far."""

    def __init__(self, before: dict[str, Any], started_before: dict[str, Any]) -> None:
        self.before, self.started_before = before, started_before
        self.after: dict[str, Any] = {}
        self.started_from: dict[str, Any] = {}
        self.runs: dict[str, int] = {}  # of each layer
        self.thread = threading.get_ident()
        self.is_training = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    def is_ours(self) -> bool:
        """A thread that calls the same model meets the hooks of this call, too. (No compiler knows of threads.)"""
        return torch.compiler.is_compiling() or threading.get_ident() == self.thread

    def check(self) -> None:
        """Raises RuntimeError if not every layer that ran has left a state, as often as before."""
        if not self.runs:
            raise RuntimeError(
                "no recurrent layer was seen to run, so no state was kept. A model that was compiled and called "
                "before hides its layers: stream the one that is not compiled, or call torch._dynamo.reset() first"
            )
        for name, runs in self.runs.items():
            if any(_key(name, run) not in self.after for run in range(runs)):
                raise RuntimeError(
                    f"layer '{name}' left no state: a stream follows calls and `step`, not `states`, nor a call that "
                    "raises"
                )
            if name in self.before and (_key(name, runs) in self.before or _key(name, runs - 1) not in self.before):
                kept = sum(_name_of(key) == name or key == name for key in self.before)
                raise RuntimeError(
                    f"layer '{name}' ran {runs} times in this call, and there are states of {kept} runs: a stream "
                    "cannot tell which is whose"
                )


def _key(name: str, run: int) -> str:
    """The key in the states of the run of that number in a call."""
    return f"{name}[{run}]" if run else name


def _name_of(key: str) -> str | None:
    """The layer of which it is the key of a run but the first, or None."""
    match = re.fullmatch(r"(.*)\[[1-9]\d*\]", key, re.DOTALL)
    return None if match is None else match[1]


class _Followed:
    """A layer in a call of a streamed model: hooks that give it the stream's state, and take the next one from it."""

    def __init__(self, name: str, layer: nn.Module, call: _Call) -> None:
        self.name, self.layer, self.call = name, layer, call
        self.handles: list[Any] = []

    def follow(self) -> None:
        self.handles = [
            self.layer.register_forward_pre_hook(self.before, with_kwargs=True),
            self.layer.register_forward_hook(self.after),
        ]

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()

    # A call that meets this hook while its own call takes it off calls it without the keyword arguments.
    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        call, name = self.call, self.name
        if kwargs is None or not call.is_ours():
            return None
        if call.is_training and not torch.compiler.is_compiling() and _is_checkpointed():
            raise RuntimeError(
                f"layer '{name}' runs under activation checkpointing, which runs it once more in the backward "
                "pass, without this stream's state: leave the recurrent layers of a stream out of checkpoints"
            )
        run, given = call.runs.get(name, 0), args[1] if len(args) > 1 else kwargs.get("hx")
        if run and given is not None:
            raise RuntimeError(
                f"layer '{name}' ran again in one call, with a state that the model gave it: a stream cannot tell its "
                "states apart"
            )
        call.runs[name], key = run + 1, _key(name, run)
        if key not in call.before or key not in call.started_before:  # such a state was set
            call.started_from[key] = given
        if key in call.before:
            _check_batch(layer, args[0] if args else kwargs.get("input"), call.before[key])
        return args[:1], kwargs | {"hx": call.before.get(key, given)}

    def after(self, layer: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if self.call.is_ours():
            self.call.after[_key(self.name, self.call.runs[self.name] - 1)] = result[1]


def _kept(state: Any) -> Any:
    """A state that a call with gradients can go on from, as from one made in inference mode it cannot."""
    if not torch.is_inference_mode_enabled():
        return state
    with torch.inference_mode(False):
        return map_state(state, lambda part: part.clone() if part.is_inference() else part)


def _layers_with_state(module: nn.Module, stateless: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The recurrent layers of a model by their names, but for those in modules of the names in `stateless`."""
    if isinstance(stateless, str) or not isinstance(stateless, Sequence):
        raise TypeError(f"stateless is a list of names, got {stateless!r}")
    modules = dict(module.named_modules(remove_duplicate=False))
    unknown = [name for name in stateless if name not in modules]
    if unknown:
        raise ValueError(f"stateless: the model has no module {', '.join(map(repr, unknown))}")
    left = {id(each) for name in stateless for each in modules[name].modules()}
    for name, layer in module.named_modules():
        if id(layer) in left:
            continue
        if hides_state(layer):
            raise RuntimeError(
                f"'{name}' is quantized, compiled by torch.jit or exported, so the state of what runs in it cannot be "
                "seen: stream the model that it was made from, or name it in stateless if it begins anew in every call"
            )
        if not isinstance(layer, nn.RNNBase | Stack):
            continue
        if _name_of(name) in modules:
            raise ValueError(f"the name of layer '{name}' is that of a run of '{_name_of(name)}': give it another")
        if layer.bidirectional:
            which = f"layer '{name}'" if name else f"this {type(layer).__name__}"
            raise RuntimeError(
                f"{which} is bidirectional: it reads the whole sequence at once, so it has no stream. If it walks "
                "through something else than time, name it in stateless"
            )
        yield name, layer


def _is_checkpointed() -> bool:
    """Whether torch.utils.checkpoint, in either of its ways, is between the stream and the layer."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not Stream._call_model.__code__:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
    return False


def _check_batch(layer: Any, input: Any, state: Any) -> None:
    """Raises if a step or chunk has another number of sequences than the state that is to go on with it."""
    while isinstance(state, tuple | list) and state:
        state = state[0]
    if not isinstance(input, Tensor) or not isinstance(state, Tensor) or state.dim() != 3:
        return
    dims = input.dim() - input.is_floating_point()
    if dims not in (1, 2):
        return
    size, kept = input.shape[0 if dims == 1 or layer.batch_first else 1], state.shape[1]
    if size != kept:
        raise RuntimeError(f"this stream has {kept} sequences, the input {size}: reset() lets it begin anew")


def _with_rows(state: Tensor, rows: Tensor | Sequence[int], begin: Tensor) -> Tensor:
    if not isinstance(rows, Tensor):
        # Of floats, which may be a mask's, indexing would make integers. An empty list is float, too, and means no row.
        rows = torch.as_tensor(rows)
        rows = rows if rows.numel() else rows.long()
    if rows.is_floating_point() or rows.dtype == torch.uint8:
        raise TypeError(f"rows are integer indices or a bool mask, got {rows.dtype}; of a mask make rows.bool()")
    state = state.clone()
    try:
        state[:, rows] = begin[:, rows].to(state.dtype)
    except IndexError as error:
        size = state.shape[1]
        got = f"a mask {tuple(rows.shape)}" if rows.dtype == torch.bool else rows.tolist()
        raise IndexError(f"rows are indices below {size}, the batch's, or a bool mask ({size},), got {got}") from error
    return state
