"""RNN, LSTM and GRU: drop-in replacements of torch.nn's.

Each is a subclass of its torch.nn namesake and inherits its parameters, checks and pickling. Beyond torch.nn, `forward`
takes token ids (an integer tensor) in place of one-hot vectors, and `lengths`, `reset` and `reset_to`; `step` runs one
time step, an LSTM's `states` gives the states after every step, and each layer has a `backend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from rnnfast import direct, dispatch, functional, inputs, sequences
from rnnfast.autocast import autocast_dtype, cast
from rnnfast.direct.plans import is_hooked
from rnnfast.inputs import map_state
from rnnfast.sequences import Segments
from rnnfast.tracing import is_jit_traced, is_traced_for_onnx

Sequences = TypeVar("Sequences", Tensor, PackedSequence)
State = TypeVar("State")  # of a layer: h, or (h, c) of an LSTM


class DropIn(dispatch.Dispatched, nn.RNNBase, Generic[State]):
    """What the three layers share: from torch.nn's calling conventions to time-major rows and back.

    The methods use of `self` what torch.nn's layers have, and `backend`; so `accelerate` can bind them to one of those.
    """

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        reset_to: Any = None,
    ) -> Any:
        """Runs the layer over whole sequences.

        T steps, B sequences, I = input_size, L = num_layers, D = 2 if bidirectional else 1, P = proj_size or
        hidden_size:

        Args:
            input: (T, B, I), or (B, T, I) with batch_first, or (T, I) unbatched, of the weights' dtype; or integer
                token ids, which stand for one-hot vectors, of the same shapes without I; or a PackedSequence of either.
            hx: the initial state h_0 (L*D, B, P), for an LSTM (h_0, c_0) with c_0 (L*D, B, hidden_size); without B if
                unbatched. Zeros if None.
            lengths: (B,) integers in [0, T], in any order and on any device, or a list: the steps of each sequence.
                What follows is padding: it is never read, the output there is zero, and the final state is the one at
                each sequence's own end (its initial state, if it is empty).
            reset: bool, of the input's shape without I, on any device: True where the state is reset before that step,
                as at the start of an episode. Neither states nor gradients cross a reset. A backward direction runs
                through each segment between resets on its own, from its end.
            reset_to: what the state is reset to, in hx's form, with B columns or one for all: for example hx itself,
                or a learned state. Zeros if None.

        Returns:
            output, of the input's shape with D*P features or a PackedSequence, and the final state in hx's form.

        Raises:
            ValueError, RuntimeError: as in torch.nn, for dimensions, sizes and dtypes that do not fit.
            ValueError, TypeError: lengths or resets of the wrong shape, type or range.
            IndexError: a token id outside [0, I).
        """
        cuts = lengths is not None or reset is not None
        may_be_direct = not (cuts or reset_to is not None or torch.compiler.is_compiling())
        if may_be_direct and (result := direct.run(self, input, hx, self.batch_first)) is not None:
            return result
        inputs.check_kind(input, lengths, reset, reset_to)
        if is_traced_for_onnx() and not cuts and input.data.is_floating_point():
            return _OF_TORCH.get(self.mode, nn.RNN).forward(self, input, hx)
        for state in (hx, reset_to):
            if state is not None:
                check_state_form(self, state)
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                if sequences.is_known(batch_sizes):  # else the operator looks when it runs
                    _check_state_size(self, hx, _batch(data, batch_sizes))
                hx = self.permute_hidden(hx, sorted_indices)
            output, state = _run(self, data, hx, batch_sizes)
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), self.permute_hidden(
                state, unsorted_indices
            )

        batched = inputs.is_batched(input, type(self).__name__, " tensor" if self.mode.startswith("RNN") else "")
        for state in (hx, reset_to):
            if state is not None:
                _check_state_dims(self, state, batched, input.dim())
        if not batched:
            hx, reset_to = (map_state(state, lambda part: part.unsqueeze(1)) for state in (hx, reset_to))
        input, reset = inputs.to_time_major(input, lengths, reset, batched, self.batch_first)
        if cuts:
            output, state = _run_cut(self, input, hx, lengths, reset, reset_to)
        else:
            output, state = _run(self, input, hx, None)
            if may_be_direct:
                direct.prepare(self, input)
        return inputs.from_time_major(output, state, batched, self.batch_first)

    if TYPE_CHECKING:  # torch.nn's is Callable[..., Any]

        def __call__(
            self,
            input: Sequences,
            hx: State | None = None,
            *,
            lengths: Tensor | Sequence[int] | None = None,
            reset: Tensor | None = None,
            reset_to: State | None = None,
        ) -> tuple[Sequences, State]: ...

    def step(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        """Runs one time step of a stream. Feeding the state back yields the bits of one call over the whole sequence.

        That holds on the cpu backend in float32 and float64; in bfloat16 the state is rounded between calls, and the
        bits may differ. On the cpu backend without gradients a step costs its arithmetic and some six microseconds. If
        the layer has hooks, they run: a step is then a call of the layer with a sequence of one step. What the
        `forward` of a derived class adds is not in a step; `rnnfast.Stream` calls it.

        Args:
            input: (B, I) of the weights' dtype, or (B,) integer token ids.
            hx: the state from the last step, h (L, B, P), for an LSTM (h, c) with c (L, B, hidden_size). Zeros if None.

        Returns:
            output (B, P), and the state for the next step.

        Raises:
            RuntimeError: the layer is bidirectional, so its first output needs the last input.
            Further errors are those of `forward`.
        """
        state: Any
        may_be_direct = hx is not None and not torch.compiler.is_compiling()
        if may_be_direct and (result := direct.step(self, input, hx)) is not None:
            return result
        if self.bidirectional:
            raise RuntimeError("a bidirectional layer reads the whole sequence at once: it has no step")
        inputs.check_step(input, self.input_size)
        if is_hooked(self) or is_traced_for_onnx():
            time = 1 if self.batch_first else 0
            output, state = self(input.unsqueeze(time), hx)
            return output.squeeze(time), state
        weights, state = functional.lane_weights(self), hx
        inputs.refuse_inference_weights(weights)
        if state is None:
            state = _zero_state(self, input.shape[0], weights[0].w_hh.dtype, input.device)
        else:
            check_state_form(self, state)
        input, state, weights = _autocast(input, state, weights)
        h_0, c_0 = state if isinstance(state, tuple | list) else (state, None)
        output, h_n, c_n = functional.step(
            self.mode.lower(),
            input,
            h_0,
            c_0,
            weights,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        if may_be_direct:
            direct.prepare(self, input)
        state = h_n if c_0 is None else (h_n, c_n)
        return output, state


class RNN(DropIn[Tensor], nn.RNN):
    """`torch.nn.RNN`: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu (Elman 1990).

    Takes torch.nn.RNN's arguments, and `backend`: "auto" or a name of `rnnfast.backends()`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = dispatch.AUTO,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers=num_layers,
            nonlinearity=nonlinearity,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
        )


class GRU(DropIn[Tensor], nn.GRU):
    """`torch.nn.GRU` (Cho et al. 2014), with the reset gate applied after the recurrent product.

    Takes torch.nn.GRU's arguments, and `backend`: "auto" or a name of `rnnfast.backends()`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = dispatch.AUTO,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
        )


class LSTM(DropIn[tuple[Tensor, Tensor]], nn.LSTM):
    """`torch.nn.LSTM` with forget gates (Gers et al. 2000) and optional projections (Sak et al. 2014).

    Takes torch.nn.LSTM's arguments, and `backend`: "auto" or a name of `rnnfast.backends()`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = dispatch.AUTO,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
            device=device,
            dtype=dtype,
            backend=backend,
        )

    def states(
        self,
        input: Tensor,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The states of all layers after every step: (h[t], c[t]) is the `hx` with which step t + 1 continues.

        In evaluation mode the last layer's h is the output of `forward`; dropout is never applied here. If gradients
        are enabled and needed, c has gradients too, on the cpu backend or the reference; otherwise the states come from
        the tape of any backend but torch, in whose place `auto` takes the reference.

        Args:
            input: (T, B, I), or (B, T, I) with batch_first, of the weights' dtype; or token ids without I.
            hx, lengths, reset: as in `forward`; a reset returns to zeros.

        Returns:
            h (T, L*D, B, P) and c (T, L*D, B, hidden_size), even with batch_first; zeros after a sequence's end.

        Raises:
            ValueError, TypeError: the input is not batched, or not a tensor, such as a PackedSequence.
            RuntimeError: as `forward`; or the layer's backend was asked for by name and cannot do this.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"states takes a tensor, and lengths= for a ragged batch, got {type(input).__name__}")
        inputs.refuse_nested(input)
        has_features = input.is_floating_point() or input.is_complex()
        if not has_features and input.dim() > 2:
            raise ValueError(inputs.token_ids_error("states", "2D", input))
        if input.dim() != 2 + has_features:
            raise ValueError(f"states takes {2 + has_features}D batched input, got {input.dim()}D")
        input, hx = _after_pre_hooks(self, input, hx)
        input, reset = inputs.to_time_major(input, lengths, reset, True, self.batch_first)
        weights, (steps, batch) = functional.lane_weights(self), input.shape[:2]
        if hx is None:
            hx = _zero_state(self, batch, weights[0].w_hh.dtype, input.device)
        else:
            check_state_form(self, hx)
        input, hx, weights = _autocast(input, hx, weights)
        options: Any = {"bidirectional": self.bidirectional, "backend": self.backend}
        if lengths is None and reset is None:
            rows = functional.states(input, hx, weights, **options)
            padded = [part.unflatten(0, (steps, batch)) for part in rows]
        else:
            segments = sequences.cut(steps, batch, lengths, reset, input.device)
            _check_state_size(self, hx, batch)
            begin = map_state(hx, lambda part: segments.initial(part, torch.zeros_like(part), self.bidirectional))
            options["batch_sizes"] = segments.batch_sizes
            rows = functional.states(segments.gather(input), begin, weights, **options)
            padded = [segments.scatter(part.flatten(1)).unflatten(2, part.shape[1:]) for part in rows]
        h, c = (part.transpose(1, 2) for part in padded)
        return h, c


# ---- what the methods are made of: functions of a layer, be it ours or torch.nn's ------------------------------


def _after_pre_hooks(layer: Any, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """Runs the hooks that a call would run first; the arguments as they leave them."""
    args: tuple[Any, ...] = (input, hx)
    kwargs: dict[str, Any] = {}
    for key, hook in list(layer._forward_pre_hooks.items()):
        if key in layer._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(layer, args, kwargs) or (args, kwargs)
        elif (result := hook(layer, args)) is not None:
            args = result if isinstance(result, tuple) else (result,)
    return args[0], args[1] if len(args) > 1 else kwargs.get("hx")


def _run(layer: Any, data: Tensor, hx: Any, batch_sizes: Tensor | None) -> tuple[Tensor, Any]:
    """Time-major data, (T, B, I) or (N, I), or ids without I, through all layers."""
    weights = functional.lane_weights(layer)
    inputs.refuse_inference_weights(weights)
    # Within a transform a layer does not hold the weights that it is given: of another dtype, the operator checks them.
    has_features = data.is_floating_point() or data.is_complex()
    checked = has_features and layer._flat_weights[0].dtype == weights[0].w_ih.dtype
    own_checks = checked and inputs.has_own_checks(type(layer))
    if checked and not own_checks:
        layer.check_input(data, batch_sizes)
    if hx is None:
        hx = _zero_state(layer, _batch(data, batch_sizes), weights[0].w_hh.dtype, data.device)
    elif batch_sizes is None or sequences.is_known(batch_sizes):  # else the operator looks when it runs
        _check_state_size(layer, hx, _batch(data, batch_sizes))
    if own_checks:
        as_given = data.transpose(0, 1) if layer.batch_first and batch_sizes is None else data
        layer.check_forward_args(as_given, hx, batch_sizes)
    data, hx, weights = _autocast(data, hx, weights)
    result: tuple[Tensor, Any] = _FUNCTIONS[layer.mode](
        data,
        hx,
        weights,
        batch_sizes=batch_sizes,
        bidirectional=layer.bidirectional,
        dropout=layer.dropout,
        training=layer.training,
        backend=layer.backend,
    )
    return result


_OF_TORCH: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU}
_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    "RNN_TANH": functional.rnn,
    "RNN_RELU": functools.partial(functional.rnn, nonlinearity="relu"),
    "LSTM": functional.lstm,
    "GRU": functional.gru,
}


def _run_cut(layer: Any, input: Tensor, hx: Any, lengths: Any, reset: Any, reset_to: Any) -> tuple[Tensor, Any]:
    """Time-major padded input, (T, B, I) or ids (T, B), with lengths or resets.

    Cutting a batch takes longer than a small scan. Where all sequences are whole there is nothing to be cut, and where
    resets come before the only step, as in acting, the states are reset instead.
    """
    steps, batch = input.shape[:2]
    if lengths is None and steps == 1 and not layer.bidirectional:
        hx, reset_to = _both_states(layer, input, hx, reset_to)
        mask = reset.reshape(1, batch, 1).to(input.device)
        hx = map_state(hx, lambda old, new: torch.where(mask, sequences.checked_reset(old, new), old), reset_to)
    else:
        lengths, reset = sequences.on_cpu(lengths), sequences.on_cpu(reset)
        if reset_to is not None or not sequences.are_whole(steps, batch, lengths, reset):
            segments = sequences.cut(steps, batch, lengths, reset, input.device)
            return _run_segments(layer, input, *_both_states(layer, input, hx, reset_to), segments)
    if torch.compiler.is_compiling():
        return _run(layer, input, hx, None)
    if (result := direct.run(layer, input, hx, batch_first=False)) is None:
        result = _run(layer, input, hx, None)
        direct.prepare(layer, input)
    return result


def _both_states(layer: Any, input: Tensor, hx: Any, reset_to: Any) -> tuple[Any, Any]:
    """The initial state and the one that resets return to, each of all columns."""
    batch, dtype = input.shape[1], functional.lane_weights(layer)[0].w_hh.dtype
    if hx is None:
        hx = _zero_state(layer, batch, dtype, input.device)
    if reset_to is None:
        reset_to = map_state(_zero_state(layer, 1, dtype, input.device), lambda zeros, h: zeros.to(h.dtype), hx)
    _, (hx, reset_to), _ = _autocast(input, (hx, reset_to))
    reset_to = map_state(reset_to, lambda state: state.expand(-1, batch, -1) if state.shape[1] == 1 else state)
    _check_state_size(layer, hx, batch)
    _check_state_size(layer, reset_to, batch)
    return hx, reset_to


def _run_segments(layer: Any, input: Tensor, hx: Any, reset_to: Any, segments: Segments) -> tuple[Tensor, Any]:
    """As one ragged batch."""
    bidirectional = layer.bidirectional
    initial = map_state(hx, functools.partial(segments.initial, bidirectional=bidirectional), reset_to)
    rows, state = _run(layer, segments.gather(input), initial, segments.batch_sizes)
    final = map_state(state, functools.partial(segments.final, bidirectional=bidirectional), hx)
    return segments.scatter(rows), final


def _state_sizes(layer: Any, batch: int) -> tuple[tuple[int, int, int], ...]:
    """Of h, and for an LSTM of c."""
    lanes = len(layer._all_weights)
    h = (lanes, batch, layer.proj_size or layer.hidden_size)
    return (h, (lanes, batch, layer.hidden_size)) if layer.mode == "LSTM" else (h,)


def _zero_state(layer: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Any:
    zeros = tuple(torch.zeros(size, dtype=dtype, device=device) for size in _state_sizes(layer, batch))
    return zeros if layer.mode == "LSTM" else zeros[0]


def _check_state_size(layer: Any, hx: Any, batch: int) -> None:
    sizes = _state_sizes(layer, batch)
    if layer.mode != "LSTM":
        layer.check_hidden_size(hx, sizes[0])
        return
    for index, size in enumerate(sizes):
        layer.check_hidden_size(hx[index], size, f"Expected hidden[{index}] size {{}}, got {{}}")


def check_state_form(layer: Any, hx: Any) -> None:
    if layer.mode == "LSTM":
        inputs.checked_pair(hx)
    elif not isinstance(hx, Tensor):
        raise RuntimeError(f"{type(layer).__name__} takes one tensor h_0 as its state, got {type(hx).__name__}")


def _check_state_dims(layer: Any, hx: Any, batched: bool, input_dims: int) -> None:
    dims, kind = (3, "batched") if batched else (2, "unbatched")
    if layer.mode == "LSTM" and (hx[0].dim() != dims or hx[1].dim() != dims):
        raise RuntimeError(
            f"For {kind} {input_dims}-D input, hx and cx should also be {dims}-D "
            f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )
    if layer.mode != "LSTM" and hx.dim() != dims:
        raise RuntimeError(f"For {kind} {input_dims}-D input, hx should also be {dims}-D but got {hx.dim()}-D tensor")


def _batch(data: Tensor, batch_sizes: Tensor | None) -> Any:
    if batch_sizes is None:
        return data.shape[1]
    return batch_sizes[0] if is_jit_traced() else batch_sizes[0].item()  # a number would be a constant of that graph


def _autocast(
    input: Tensor, state: Any, weights: list[functional.Weights] | None = None
) -> tuple[Tensor, Any, list[functional.Weights]]:
    """The arguments, cast to autocast's dtype where it is on."""
    dtype, weights = autocast_dtype(input.device.type), weights or []
    if dtype is None:
        return input, state, weights

    to = functools.partial(cast, dtype=dtype)
    return to(input), map_state(state, to), [functional.Weights(*map(to, lane)) for lane in weights]
