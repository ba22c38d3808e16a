"""Stack: recurrent layers with the regularisation, normalisation and connections that torch.nn's constructors lack."""

from __future__ import annotations

import inspect
import math
import operator
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from rnnfast import dispatch, functional, inputs, sequences
from rnnfast.autocast import autocast_dtype, cast, dtype_of_products
from rnnfast.backends.reference import Extension, Norms
from rnnfast.cells import CELLS
from rnnfast.direct.plans import is_hooked
from rnnfast.extended import scan_extended
from rnnfast.inputs import map_state
from rnnfast.layers import Sequences
from rnnfast.regularisation import Masks, dropout_mask
from rnnfast.tracing import is_transformed

State = Any  # of one layer: h, or (h, c) of an LSTM


class Stack(nn.Module):
    """Stacked recurrent layers, each with its own size, with regularisation, normalisation and connections.

    Without options it computes what torch.nn's layers do, and parameters have torch.nn's names, shapes and
    initialisation. Dropout, zoneout and weight drop draw their masks from torch's default generator, or from the one
    passed to the call.

    Weight drop, dropout of inputs and between layers, connections and sizes leave the recurrence as it is, and run on
    every backend at its full speed. Recurrent dropout (in training), zoneout, layer normalisation and peepholes change
    the recurrence, and run on the cpu backend and the reference; `rnnfast.explain(stack, input)` says which.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        input_size: I, features of the input, or number of token ids.
        hidden_sizes: the units of each layer, from first to last.
        bias, batch_first, bidirectional: as in torch.nn.
        proj_size: P, to which an LSTM's h is projected in every layer (Sak et al. 2014); 0 for none. Recurrent dropout
            and zoneout apply to the projected h.
        input_dropout: probability of zeroing a feature of a sequence's input, at all its steps (variational dropout,
            Gal & Ghahramani 2016).
        dropout: the same between layers.
        recurrent_dropout: the same for h before its product with W_hh, in every layer.
        weight_dropout: probability of zeroing an element of W_hh, for a whole call (DropConnect; "weight drop" of
            AWD-LSTM, Merity et al. 2018).
        zoneout: probability, 1 included, that a unit keeps its h from the previous step (Krueger et al. 2017). For an
            LSTM a pair, for h and for c, or one number for both. In evaluation the expectation is taken.
        layer_norm: normalises an LSTM or GRU as Ba et al. (2016): each of the two products, with a gain (the biases are
            the shifts), and the cell state of an LSTM on its way to the output.
        peepholes: lets the gates of an LSTM see its cell state (Gers & Schmidhuber 2000), through a weight (3, H) per
            layer and direction: i and f see the previous state, o the new one.
        connection: "residual" adds a layer's input to its output; "highway" mixes them as t output + (1 - t) input with
            t = sigmoid(W input + b) (Srivastava et al. 2015), where b starts at -1. Around every layer but the first,
            with the input as it is before dropout. None: no connection.
        backend: "auto" or a name of `rnnfast.backends()`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown cell, connection or backend, a probability out of range, an option that the cell lacks,
            or a connection between layers of different sizes.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_sizes: Sequence[int],
        *,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        proj_size: int = 0,
        input_dropout: float = 0.0,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        peepholes: bool = False,
        connection: str | None = None,
        backend: str = dispatch.AUTO,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dispatch.check_name(backend)
        try:
            sizes = tuple(operator.index(size) for size in hidden_sizes)
        except TypeError:
            raise ValueError(
                f"hidden_sizes must be a list, the number of units of each layer, got {hidden_sizes!r}"
            ) from None
        self.cell, self.input_size, self.hidden_sizes = cell, input_size, sizes
        self.bias, self.batch_first, self.bidirectional, self.proj_size = bias, batch_first, bidirectional, proj_size
        self.input_dropout, self.dropout, self.recurrent_dropout = input_dropout, dropout, recurrent_dropout
        self.weight_dropout, self.zoneout, self.layer_norm = weight_dropout, _pair(zoneout, cell), layer_norm
        self.peepholes, self.connection, self.backend = peepholes, connection, backend
        self._check_options()

        directions = 2 if bidirectional else 1
        below = input_size
        for layer, size in enumerate(self.hidden_sizes):
            shapes: dict[str, tuple[int, ...]] = {}
            for suffix in self._suffixes(layer):
                shapes |= {name + suffix: shape for name, shape in self._lane_shapes(below, size).items()}
            below = directions * (proj_size or size)
            if connection == "highway" and layer > 0:
                shapes |= {f"highway_weight_l{layer}": (below, below), f"highway_bias_l{layer}": (below,)}
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _lane_shapes(self, below: int, size: int) -> dict[str, tuple[int, ...]]:
        rows = CELLS[self.cell].gates * size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, below), "weight_hh": (rows, self.proj_size or size)}
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, size)
        if self.layer_norm:
            shapes |= {"gain_ih": (rows,), "gain_hh": (rows,)}
            shapes |= {"gain_c": (size,), "bias_c": (size,)} if self.cell == "lstm" else {}
        if self.peepholes:
            shapes["weight_peephole"] = (3, size)
        return shapes

    def _check_options(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"unknown cell '{self.cell}'; choose from {', '.join(CELLS)}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1 or self.input_size < 1:
            raise ValueError(
                f"input_size and every one of hidden_sizes must be positive, got {self.input_size}, {self.hidden_sizes}"
            )
        if self.proj_size and (self.cell != "lstm" or not 0 < self.proj_size < min(self.hidden_sizes)):
            raise ValueError(
                f"proj_size is for lstm and below every one of hidden_sizes, got {self.proj_size} for {self.cell}"
            )
        for name in ("input_dropout", "dropout", "recurrent_dropout", "weight_dropout"):
            p = getattr(self, name)
            if not isinstance(p, float | int) or not 0 <= p < 1:
                raise ValueError(f"{name} is a probability in [0, 1), got {p!r}")
        if not all(0 <= p <= 1 for p in self.zoneout):
            raise ValueError(f"zoneout is a probability in [0, 1], got {self.zoneout}")
        if self.zoneout[1] > 0 and not CELLS[self.cell].has_cell_state:
            raise ValueError(f"{self.cell} has no cell state: give zoneout as one number")
        if self.layer_norm and self.cell not in ("lstm", "gru"):
            raise ValueError(f"layer_norm is for lstm and gru, got {self.cell}")
        if self.peepholes and self.cell != "lstm":
            raise ValueError(f"peepholes are for lstm, got {self.cell}")
        if self.connection not in (None, "residual", "highway"):
            raise ValueError(f"unknown connection '{self.connection}'; choose from None, 'residual', 'highway'")
        if self.connection is not None and not self.proj_size and len(set(self.hidden_sizes)) > 1:
            raise ValueError(f"a {self.connection} connection needs layers of one size, got {self.hidden_sizes}")

    def reset_parameters(self) -> None:
        """Draws weights and biases from U(-1/sqrt(H), 1/sqrt(H)) as torch.nn does; gains start at 1, shifts at 0."""
        begin = {"gain_ih": 1.0, "gain_hh": 1.0, "gain_c": 1.0, "bias_c": 0.0, "highway_bias": -1.0}
        for name, parameter in self.named_parameters():
            # Its own, also as a parametrization or pruning renames them; not those of modules that a subclass adds.
            of_layer = re.fullmatch(r"(?:parametrizations\.)?(\w+)_l(\d+)(?:_reverse)?(?:_\w+|\.\w+)?", name)
            if of_layer is None:
                continue
            kind, layer = of_layer.groups()
            if kind in begin:
                nn.init.constant_(parameter, begin[kind])
            else:
                bound = 1 / math.sqrt(self.hidden_sizes[int(layer)])
                nn.init.uniform_(parameter, -bound, bound)

    @property
    def num_layers(self) -> int:
        """How many layers there are, as in torch.nn."""
        return len(self.hidden_sizes)

    def flatten_parameters(self) -> None:
        """Does nothing; kept because code written for torch.nn calls it."""

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def extra_repr(self) -> str:
        parts = [repr(self.cell), str(self.input_size), str(list(self.hidden_sizes))]
        keywords = [p for p in inspect.signature(Stack).parameters.values() if p.kind is p.KEYWORD_ONLY]
        defaults = {p.name: p.default for p in keywords if p.name not in ("device", "dtype")} | {"zoneout": (0.0, 0.0)}
        options = {name: getattr(self, name) for name in defaults}
        return ", ".join(parts + [f"{name}={value!r}" for name, value in options.items() if value != defaults[name]])

    def forward(
        self,
        input: Any,
        hx: Sequence[State] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        reset_to: Sequence[State] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, tuple[State, ...]]:
        """Runs the layers over whole sequences.

        T steps, B sequences, I = input_size, D = 2 if bidirectional else 1, H units of a layer, P = proj_size or H:

        Args:
            input: (T, B, I), or (B, T, I) with batch_first, or (T, I) unbatched, of the weights' dtype; or integer
                token ids, which stand for one-hot vectors, without I; or a PackedSequence of either.
            hx: for each layer its initial state h (D, B, P), for an LSTM (h, c) with c (D, B, H); without B if
                unbatched. Zeros if None.
            lengths: (B,) integers in [0, T], in any order and on any device, or a list: the steps of each sequence, as
                in `rnnfast.LSTM`.
            reset: bool, of the input's shape without I: True where the state is reset before that step. The masks of a
                sequence stay the same.
            reset_to: what the state is reset to, in hx's form, with B columns or one for all. Zeros if None.
            generator: the source of all masks of this call. Equal seeds give equal masks, whether the batch is padded,
                has lengths or is packed; those of zoneout, one for each step, where T is the longest length. torch's
                default generator if None.

        Returns:
            output, of the input's shape with D*P features of the last layer or a PackedSequence, and the final state in
            hx's form.

        Raises:
            ValueError, RuntimeError, TypeError: shapes, dtypes, devices, lengths or resets that do not fit; token ids
                with input_dropout in training; a backend asked for by name that cannot do this.
            IndexError: a token id outside [0, I).
        """
        inputs.check_kind(input, lengths, reset, reset_to)
        packed = input if isinstance(input, PackedSequence) else None
        data, batched, segments = input if packed is None else packed.data, True, None
        if packed is not None:
            segments = sequences.of_packed(packed)
            steps, batch = segments.shape
        else:
            batched = inputs.is_batched(data, "Stack")
            data, reset = inputs.to_time_major(data, lengths, reset, batched, self.batch_first)
            steps, batch = data.shape[:2]
            if lengths is not None or reset is not None:
                segments = sequences.cut(steps, batch, lengths, reset, data.device)
                data = segments.gather(data)
        states = self._states("hx", hx, batch, data.device, batched)
        resets = None if reset_to is None else self._states("reset_to", reset_to, batch, data.device, batched)
        output, final = self._run(data, states, resets, Masks((steps, batch), segments, generator))
        if packed is not None:
            return PackedSequence(output, *packed[1:]), final
        output = output if segments is None else segments.scatter(output)
        return inputs.from_time_major(output, final, batched, self.batch_first)

    if TYPE_CHECKING:  # torch.nn's is Callable[..., Any]

        def __call__(
            self,
            input: Sequences,
            hx: Sequence[State] | None = None,
            *,
            lengths: Tensor | Sequence[int] | None = None,
            reset: Tensor | None = None,
            reset_to: Sequence[State] | None = None,
            generator: torch.Generator | None = None,
        ) -> tuple[Sequences, tuple[State, ...]]: ...

    def step(
        self, input: Tensor, hx: Sequence[State] | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Runs one time step of a stream: what a call over a sequence of one step does.

        In evaluation mode on the cpu backend, feeding the state back yields the bits of one call over the whole
        sequence, except with highway connections. In training every step draws its own masks. If the stack has hooks,
        they run: a step is then a call with a sequence of one step.

        Args:
            input: (B, I) of the weights' dtype, or (B,) integer token ids.
            hx: the state from the last step: for each layer h (1, B, P), for an LSTM (h, c) with c (1, B, H). Zeros if
                None.
            generator: as in `forward`.

        Returns:
            output (B, P) of the last layer, and the state for the next step.

        Raises:
            RuntimeError: the stack is bidirectional, so its first output needs the last input.
            Further errors are those of `forward`.
        """
        if self.bidirectional:
            raise RuntimeError("a bidirectional stack reads the whole sequence at once: it has no step")
        inputs.check_step(input, self.input_size)
        if is_hooked(self):
            time = 1 if self.batch_first else 0
            output, final = self(input.unsqueeze(time), hx, generator=generator)
            return output.squeeze(time), final
        states = self._states("hx", hx, len(input), input.device)
        output, final = self._run(input.unsqueeze(0), states, None, Masks((1, len(input)), None, generator))
        return output.squeeze(0), final

    def _request(self, input: Tensor) -> dispatch.Request:
        """What decides which backend can run these layers, in the mode they are in, on such input."""
        there = (self.training and self.recurrent_dropout > 0, any(self.zoneout), self.layer_norm, self.peepholes)
        extensions = tuple(name for name, is_there in zip(dispatch.EXTENDED_RECURRENCE, there, strict=True) if is_there)
        weight, token_ids = self._parameter("weight_hh_l0"), not input.is_floating_point()
        kind = self.cell, weight.device.type, dtype_of_products(weight), token_ids, self.proj_size > 0
        return dispatch.Request(*kind, is_transformed(), extensions=extensions)

    def _run(
        self, rows: Tensor, states: list[tuple[Tensor, ...]], resets: list[tuple[Tensor, ...]] | None, masks: Masks
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Rows (T, B, I), or ragged (N, I), through all layers."""
        if self.input_dropout > 0 and self.training and not rows.is_floating_point():
            raise ValueError("input_dropout drops features of floating input; give the stack embedded token ids")
        weight, segments = self._parameter("weight_ih_l0"), masks.segments
        dtype, autocast = dtype_of_products(weight), autocast_dtype(weight.device.type)
        if autocast is not None:
            rows, states, resets = map_state((rows, states, resets), lambda part: cast(part, autocast))
        request, backend = self._request(rows), dispatch.asked(self.backend)
        extended = dispatch.choose_name(backend, None, *request) if request.extensions else None
        final: list[State] = []
        for layer, state in enumerate(states):
            below, p = rows, self.dropout if layer else self.input_dropout
            if p > 0 and self.training:
                rows = rows * masks.of_input(p, rows)
            begin = state
            if segments is not None:
                to = [torch.zeros_like(part) for part in state] if resets is None else resets[layer]
                begin = tuple(map(segments.initial, state, to, [self.bidirectional] * len(state)))
            rows, *ends = self._run_layer(layer, rows, begin, masks, dtype, extended)
            if segments is not None:
                ends = [segments.final(end, part, self.bidirectional) for end, part in zip(ends, state, strict=False)]
            final.append(tuple(ends) if self.cell == "lstm" else ends[0])
            if layer > 0 and self.connection is not None:
                rows = self._connect(layer, rows, below)
        return rows, tuple(final)

    def _run_layer(
        self,
        layer: int,
        rows: Tensor,
        state: tuple[Tensor, ...],
        masks: Masks,
        dtype: torch.dtype,
        extended: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        suffixes, segments = self._suffixes(layer), masks.segments
        weights = [self._weights(suffix, dtype, masks.generator) for suffix in suffixes]
        batch_sizes = None if segments is None else segments.batch_sizes
        h_0, c_0 = state[0], state[1] if len(state) > 1 else None
        if extended is None:
            options = batch_sizes, self.bidirectional, 0.0, False, self.backend
            return functional.run(self.cell, rows, h_0, c_0, weights, *options)
        functional.check(self.cell, rows, h_0, c_0, weights, batch_sizes, len(weights))
        extensions = [self._extension(suffix, h_0, c_0, masks) for suffix in suffixes]
        flat = rows if segments is not None else rows.flatten(0, 1)
        flat = flat if flat.is_floating_point() else flat.long()
        output, h_n, c_n = scan_extended(
            extended, flat, weights, extensions, h_0, c_0, batch_sizes, self.cell, self.bidirectional
        )
        return output if segments is not None else output.view(*masks.shape, output.shape[-1]), h_n, c_n

    def _extension(self, suffix: str, h_0: Tensor, c_0: Tensor | None, masks: Masks) -> Extension:
        """The extension of a lane, whose states are like h_0[0] and c_0[0]; draws its masks."""
        h, mask, norms, peepholes = h_0[0], None, None, None
        zoneout_h, zoneout_c = (
            masks.of_steps(p, h if state is None else state[0]) if self.training and p > 0 else p
            for p, state in zip(self.zoneout, (h_0, c_0), strict=True)
        )
        if self.training and self.recurrent_dropout > 0:
            mask = masks.of_state(self.recurrent_dropout, h)
        if self.layer_norm:
            names = ("gain_ih", "gain_hh", "gain_c", "bias_c") if self.cell == "lstm" else ("gain_ih", "gain_hh")
            norms = Norms(*(self._parameter(name + suffix).to(h.dtype) for name in names))
        if self.peepholes:
            peepholes = self._parameter("weight_peephole" + suffix).to(h.dtype)
        return Extension(mask, zoneout_h, zoneout_c, norms, peepholes)

    def _weights(self, suffix: str, dtype: torch.dtype, generator: torch.Generator | None) -> functional.Weights:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        weights = functional.Weights(*(self._parameter(name + suffix).to(dtype) for name in names))
        if self.proj_size:
            weights = weights._replace(w_hr=self._parameter("weight_hr" + suffix).to(dtype))
        if not self.training or self.weight_dropout == 0:
            return weights
        mask = dropout_mask(self.weight_dropout, weights.w_hh.shape, weights.w_hh, generator)
        return weights._replace(w_hh=weights.w_hh * mask)

    def _connect(self, layer: int, output: Tensor, input: Tensor) -> Tensor:
        if self.connection == "residual":
            return output + input
        weight, bias = (self._parameter(f"highway_{name}_l{layer}").to(input.dtype) for name in ("weight", "bias"))
        return input + F.linear(input, weight, bias).sigmoid() * (output - input)

    def _parameter(self, name: str) -> Tensor:
        parameter: Tensor = getattr(self, name)
        return parameter

    def _states(
        self, name: str, given: Sequence[State] | None, batch: int, device: torch.device, batched: bool = True
    ) -> list[tuple[Tensor, ...]]:
        """For each layer (h,) or (h, c), of the shapes that `forward` tells, of what a caller gives as `name`."""
        directions, is_lstm = 2 if self.bidirectional else 1, self.cell == "lstm"
        sizes = [(self.proj_size or size, size)[: 1 + is_lstm] for size in self.hidden_sizes]
        if given is None:
            options: Any = {"dtype": self._parameter("weight_ih_l0").dtype, "device": device}
            return [tuple(torch.zeros(directions, batch, size, **options) for size in parts) for parts in sizes]
        if not isinstance(given, tuple | list) or len(given) != len(sizes):
            got = f"one {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            got = f"{len(given)}" if isinstance(given, tuple | list) else got
            raise ValueError(f"{name} must be a list with one state for each of the {len(sizes)} layers, got {got}")
        states = []
        for layer, (state, parts) in enumerate(zip(given, sizes, strict=True)):
            pair = tuple(state) if isinstance(state, tuple | list) else (state,)
            expected = [(directions, batch, size) if batched else (directions, size) for size in parts]
            shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in pair]
            takes_one = name == "reset_to" and batched  # column, for all sequences
            one = [(directions, 1, size) if takes_one else None for size in parts]
            fits = [got in these for got, *these in zip(shapes, expected, one, strict=False)]
            if len(shapes) != len(expected) or not all(fits):
                form = f"(h, c) of shapes {expected}" if is_lstm else f"h of shape {expected[0]}"
                also = ", or with one column for all" if takes_one else ""
                raise RuntimeError(f"{name}[{layer}] must be {form}{also}, got {shapes}")
            pair = pair if batched else tuple(part.unsqueeze(1) for part in pair)
            states.append(tuple(part.expand(-1, batch, -1) for part in pair))
        return states


def _pair(zoneout: float | tuple[float, float], cell: str) -> tuple[float, float]:
    """Of h and of c, which is the LSTM's alone."""
    if isinstance(zoneout, float | int):
        return zoneout, zoneout if cell == "lstm" else 0.0
    if not isinstance(zoneout, tuple | list) or len(zoneout) != 2:
        raise ValueError(f"zoneout is a number, or a pair for h and for c, got {zoneout}")
    return float(zoneout[0]), float(zoneout[1])
