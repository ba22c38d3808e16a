"""Streams: a layer, or a whole model, fed step by step or chunk by chunk, its states kept between the calls."""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rnnfast import direct
from rnnfast.inputs import map_state
from rnnfast.layers import DropIn, check_state_form
from rnnfast.locks import ForkSafeLock
from rnnfast.rows import Rows, Selected, batch_of, cleared, indices_of, kept, mask_of, with_rows_of
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
    because the model keeps their states itself. Streams of a compiled model, in several threads, run one at a time.

    Args:
        module: an `rnnfast.RNN`, `LSTM`, `GRU` or `Stack`; or a model with recurrent layers in it, ours or torch.nn's.
        stateless: names of layers of the model, or of modules that contain them, which begin anew in every call, and
            may be bidirectional: those that do not walk through time, but for instance through the frequencies of a
            frame.

    Raises:
        RuntimeError: a layer is bidirectional, so its first output needs the last input; or it is in a module that is
            quantized, compiled by torch.jit or exported, so its state cannot be seen; or it takes no `hx`.
        ValueError: there is no recurrent layer, or no module of a name in `stateless`; or a layer has a name such as
            "a[1]" beside a module "a".
        TypeError: the module is itself a torch.nn layer, which has no step; or `stateless` is no list.
    """

    def __init__(self, module: nn.Module, stateless: Sequence[str] = ()) -> None:
        _check_is_ours(module)
        self.module = module
        self._is_alone = isinstance(module, nn.RNNBase | Stack)
        self._layers = dict(_layers_with_state(module, stateless))
        if not self._layers:
            raise ValueError(
                f"{type(module).__name__} has no RNN, LSTM or GRU in it whose state could be kept; those of cells, and "
                "of recurrences written by hand, are the model's own"
            )
        self._is_compiled = any(map(_is_compiled, module.modules()))
        self._states: dict[str, Any] = {}
        # Rows of a state, as a mask (B,), that go on from what the model gives in the next call, or from zeros.
        self._anew: dict[str, Tensor] = {}
        self._steps: direct.Steps | None = None  # of a layer: where there are any, they have the state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Feeds the next step or steps.

        Args:
            args, kwargs: what the module takes. For a layer or a stack the input: a step, (B, I) or ids (B,), or a
                chunk of T steps, (T, B, I) or ids (T, B), or with batch_first (B, T, ...); and for a chunk `lengths`,
                0 for a sequence that waits, `reset` and `reset_to`, as in a call of the layer.

        Returns:
            For a layer or a stack, the output of the step (B, P) or of the chunk; for a model, what it returns.

        Raises:
            RuntimeError: a layer of the model ran again in the same call with a state that the model gave it, or more
                or less often than before, left no state (as `LSTM.states` does), or runs under activation checkpointing
                with gradients; or none, or not all that are compiled, ran where it could be seen; and what the module
                raises. The states are then those before the call.
        """
        if not self._is_alone:
            if not self._is_compiled or torch.compiler.is_dynamo_compiling():
                return self._call_model(*args, **kwargs)
            with _one_at_a_time.lock:  # compiled code does not tell the hooks of one call from those of another
                return self._call_model(*args, **kwargs)
        if self._steps is not None and len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            output = self._steps.next(args[0])
            if output is not None:
                return output
        return self._feed(*args, **kwargs)

    def _call_model(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(dict(self._usable_states()), dict(self._anew))
        followed = [_Followed(name, layer, call) for name, layer in self._layers.items()]
        try:
            for each in followed:
                each.follow()
            result = self.module(*args, **kwargs)
        finally:
            call.is_over = True  # first: an interrupt may come before the last hook is off
            for each in followed:
                each.leave()
        # Taken over once the whole model has run: after an error the same steps can be fed again.
        call.check()
        _check_compiled(self.module, [name for name in self._layers if name not in call.runs])
        self._states = call.before | call.after
        self._anew = {key: rows for key, rows in self._anew.items() if key not in call.after}
        return result

    def _feed(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs.keys() - {"lengths", "reset", "reset_to"}:
            raise TypeError("a stream of a layer takes the input, lengths=, reset= and reset_to=: it keeps the state")
        (input,) = args
        if not isinstance(input, Tensor):
            raise TypeError(f"a stream of a layer takes a tensor, got {type(input).__name__}")
        self._end_steps()
        layer: Any = self.module
        state, steps = self._usable_states().get(""), input.dim() - (1 if input.is_floating_point() else 0)
        if steps == 1:
            _check_is_ours(layer)  # it may have been restored
        if steps == 1 and kwargs:
            raise TypeError(f"a step takes no {' or '.join(kwargs)}: give a chunk of one step")
        ours = Stack if isinstance(layer, Stack) else DropIn
        has_our_forward, has_our_step = (_function(layer, name) is getattr(ours, name) for name in ("forward", "step"))
        by_forward = steps == 1 and has_our_step and not has_our_forward  # a derived class's, which our step skips
        time = 1 if layer.batch_first else 0
        try:
            if by_forward:
                result = layer(input.unsqueeze(time), state)
            else:
                result = layer.step(input, state) if steps == 1 else layer(input, state, **kwargs)
        except RuntimeError:
            _check_batch(layer, input, state)
            raise
        output, state = _output_and_state(type(layer).__name__, result)
        output = output.squeeze(time) if by_forward else output
        self._states[""] = state
        is_ordinary = has_our_forward and has_our_step and ours is DropIn
        if steps == 1 and is_ordinary and not torch.compiler.is_compiling():
            self._steps = direct.steps_after(layer, input, self._states[""])
        return output

    def _usable_states(self) -> dict[str, Any]:
        """The states for a call here: what was made in inference mode is of no use to one with gradients."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return self._states
        return {key: kept(state) for key, state in self._states.items()}

    def _end_steps(self) -> None:
        """Takes the state over from them."""
        if self._steps is not None:
            self._states[""], self._steps = self._steps.state, None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, too: it goes on with this state, in memory of its own."""
        self._end_steps()
        states = {key: kept(state) for key, state in self._states.items()}
        return self.__dict__ | {"_states": states, "_anew": dict(self._anew)}

    @property
    def state(self) -> Any:
        """The state after the last call, which can be saved and set again; it is no copy.

        For a layer h (L, B, P), or (h, c) for an LSTM; for a stack one for each layer; None before the first call. For
        a model a dict of such states by the layers' names; that of another run in the same call has "[1]", "[2]" and so
        on after the name.
        """
        self._end_steps()
        self._states = {key: kept(state) for key, state in self._states.items()}
        return self._states.get("") if self._is_alone else dict(self._states)

    @state.setter
    def state(self, state: Any) -> None:
        if state is None:
            state = {}
        elif self._is_alone:
            if isinstance(self.module, nn.RNNBase):
                check_state_form(self.module, state)
            state = {"": state}
        if not isinstance(state, dict):
            raise TypeError(f"the state of a model is a dict by its layers' names, got {type(state).__name__}")
        unknown = {key for key in state if key not in self._layers and _name_of(key) not in self._layers}
        if unknown:
            raise ValueError(f"the model has no recurrent layer {', '.join(sorted(unknown))}")
        self._states, self._anew, self._steps = dict(state), {}, None

    def reset(self, rows: Rows | dict[str, Rows] | None = None) -> None:
        """Starts over: all sequences, or those in some rows of the batch.

        Their state is zeros, until the next call takes the one that the model gives its layers, if it does.

        Args:
            rows: indices into the batch of the layers, or a (B,) bool mask. A dict of such by the names of layers, for
                a model whose layers have different batches, as one of B rows and one of B F rows of F frequencies;
                layers without a name in it go on. None: all, and the next call may have another B.

        Raises:
            IndexError: an index outside the batch, or a mask of another size.
            RuntimeError: the layers' batches differ, and rows are not given by their names.
            TypeError: rows are no integers and no mask of bool.
        """
        self._end_steps()
        if rows is None:
            self._states, self._anew = {}, {}
            return
        masks = {key: mask_of(of_layer, batch_of(self._states[key])) for key, of_layer in self._by_key(rows).items()}
        self._states = self._states | {key: cleared(self._states[key], mask) for key, mask in masks.items()}
        if not self._is_alone:
            self._anew = self._anew | {key: mask | self._anew.get(key, mask) for key, mask in masks.items()}

    def select(self, rows: Selected | dict[str, Selected]) -> None:
        """Goes on with these rows of the batch, in this order: without some, with some of them twice, or with new ones.

        Args:
            rows: indices into the batch of the layers, with None for a sequence that starts, or a (B,) bool mask. A
                dict of such by the names of layers, as in `reset`, and of all of them.

        Raises:
            IndexError, RuntimeError, TypeError: as `reset`; or a dict lacks a layer.
        """
        self._end_steps()
        states, anew = {}, {}
        chosen = self._by_key(rows)
        if missing := [key for key in self._states if key not in chosen]:
            raise RuntimeError(f"rows to select are those of all layers: {', '.join(missing)} is missing")
        for key, state in self._states.items():
            batch = batch_of(state)
            index, new = indices_of(chosen[key], batch)
            selected = map_state(state, lambda part, index=index: part.index_select(1, index.to(part.device)))
            states[key] = cleared(selected, new)
            if not self._is_alone:
                anew[key] = self._anew.get(key, torch.zeros(batch, dtype=torch.bool, device="cpu"))[index] | new
        self._states, self._anew = states, anew

    def _by_key(self, rows: Any) -> dict[str, Any]:
        """Rows for each state, of those given for all or by the names of layers."""
        for given in rows.values() if isinstance(rows, dict) else (rows,):
            if isinstance(given, Iterator):  # which the first state would use up
                raise TypeError(f"rows are a tensor or a sequence, got {type(given).__name__}: make a list of it")
        if isinstance(rows, dict):
            unknown = [name for name in rows if name not in self._layers and name not in self._states]
            if unknown or self._is_alone:
                raise ValueError(f"there is no layer {', '.join(map(repr, unknown or rows))} to give rows of")
            names = {key: key if key in rows else _name_of(key) for key in self._states}  # of a run, or of all of them
            return {key: rows[name] for key, name in names.items() if name in rows}
        batches = {key: batch_of(state) for key, state in self._states.items()}
        if len(set(batches.values())) > 1:
            sizes = ", ".join(f"'{key}' {size}" for key, size in batches.items())
            raise RuntimeError(f"the layers' batches differ ({sizes}): give rows in a dict by the names of layers")
        return dict.fromkeys(self._states, rows)

    def detach(self) -> None:
        """Cuts the graph at the states, as truncated backpropagation through time does between chunks."""
        self._end_steps()
        self._states = {name: map_state(state, lambda part: part.detach()) for name, state in self._states.items()}


class _Call:
    """A call of a stream's model: the states before it, and those that its layers have left so far."""

    def __init__(self, before: dict[str, Any], anew: dict[str, Tensor]) -> None:
        self.before, self.anew = before, anew
        self.after: dict[str, Any] = {}
        self.is_over = False
        self.runs: dict[str, int] = {}  # of each layer
        self.thread = threading.get_ident()
        self.is_training = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    def is_current(self) -> bool:
        """Whether a hook of this call runs in it, and not in another one.

        Another thread that calls the model meets the hooks of this call, too, and a later call those that an interrupt
        has left. (No compiler knows of threads.)
        """
        is_mine = torch.compiler.is_dynamo_compiling() or threading.get_ident() == self.thread
        return is_mine and not self.is_over

    def check(self) -> None:
        """Raises RuntimeError if not every layer that ran has left a state, as often as before."""
        if not self.runs:
            raise RuntimeError(
                "no recurrent layer was seen to run, so no state was kept. A stream follows calls of layers, not of "
                "their `forward`. A model that was compiled and called before hides its layers: stream the one that is "
                "not compiled, or call torch._dynamo.reset() first"
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
        if kwargs is None or not call.is_current():
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
        state = call.before.get(key, given)
        if key in call.before:
            _check_batch(layer, args[0] if args else kwargs.get("input"), state, f"layer '{name}' of this stream")
        if key in call.anew and given is not None:
            begin = partial(with_rows_of, rows=call.anew[key])
            state = map_state(state, begin, given)
        return args[:1], kwargs | {"hx": state}

    def after(self, layer: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if self.call.is_current():
            _, state = _output_and_state(f"layer '{self.name}'", result)
            self.call.after[_key(self.name, self.call.runs[self.name] - 1)] = state


def _check_is_ours(module: Any) -> None:
    if isinstance(module, nn.RNNBase) and not is_ours(module):
        name = type(module).__name__
        if hasattr(module, "backend"):
            raise TypeError(f"this {name} was accelerated, but its forward has been replaced since: undo that first")
        raise TypeError(f"a torch.nn {name} has no step: make it an rnnfast.{name}, or rnnfast.accelerate it")


def _function(layer: Any, name: str) -> Any:
    """Of a method."""
    return getattr(getattr(layer, name, None), "__func__", None)


def _output_and_state(whose: str, result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise RuntimeError(f"{whose} returned no state: a stream follows layers that return (output, state)")
    output, state = result
    return output, state


# ---- what can be followed ------------------------------------------------------------------------------------------

_one_at_a_time = ForkSafeLock()  # held again where a model has a stream in it


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _check_compiled(model: nn.Module, not_run: Sequence[str]) -> None:
    """Raises if one of these layers is compiled: it may have run where its hooks were not asked."""
    for name in not_run:
        parts = name.split(".")
        around = (".".join(parts[:count]) for count in range(len(parts) + 1))
        if any(_is_compiled(model.get_submodule(path)) for path in around):
            raise RuntimeError(
                f"layer '{name}', which is compiled, was not seen to run, so no state was kept. What was compiled by a "
                "call without the stream hides its layers: stream a model that is not compiled, or call "
                "torch._dynamo.reset() and make no other call of the compiled one"
            )


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
        takes = inspect.signature(layer.forward).parameters
        if "hx" not in takes and not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
            which = f"layer '{name}' ({type(layer).__name__})" if name else f"this {type(layer).__name__}"
            has = ", ".join(takes) or "none"
            raise RuntimeError(
                f"{which} takes no hx, so no state can be given to it: its forward's parameters are {has}"
            )
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


def _check_batch(layer: Any, input: Any, state: Any, whose: str = "this stream") -> None:
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
        raise RuntimeError(f"{whose} has {kept} sequences, the input {size}: reset() lets it begin anew")
