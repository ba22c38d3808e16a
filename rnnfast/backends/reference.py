"""The scan in eager PyTorch: the definition that every other backend is checked against.

`forward` uses differentiable operations only, so torch's autograd can run through it to any order; `backward` is the
reverse scan written out, reading the tape that any backend may have written. Shapes are those of `rnnfast.scan.scan`.
Half types are computed in float32 from end to end and rounded once, on the way out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnfast.backends.products import check_batch_sizes, widen
from rnnfast.cells import CELLS
from rnnfast.tracing import is_mapped

# ---- extensions: what may change the recurrence of a lane ----------------------------------------------------------


class Norms(NamedTuple):
    """Gains and shifts of a layer-normalised LSTM or GRU lane (Ba et al. 2016, as their supplement defines both).

    `gain_ih` and `gain_hh` (G*H,) belong to the products with W_ih and W_hh, whose shifts are the biases of the lane;
    `gain_c` and `bias_c` (H,) to the cell state of the LSTM on its way to the output.
    """

    gain_ih: Tensor
    gain_hh: Tensor
    gain_c: Tensor | None = None
    bias_c: Tensor | None = None


class Extension(NamedTuple):
    """Changes to the recurrence of one lane; each field left out changes nothing.

    recurrent_mask: (B, P), what h is multiplied by on its way into W_hh, at every step (Gal & Ghahramani 2016).
    zoneout_h, zoneout_c: where h and c stay what they were (Krueger et al. 2017): bool, (N, P) and (N, H), for every
        row of the scan; or a number, the share of the old state in the new one, which is zoneout's expectation.
    norms: layer normalisation.
    peepholes: (3, H), weights of c in the gates i, f and o of an LSTM (Gers & Schmidhuber 2000): i and f see it as it
        was before the step, o as it is after.
    """

    recurrent_mask: Tensor | None = None
    zoneout_h: Tensor | float = 0.0
    zoneout_c: Tensor | float = 0.0
    norms: Norms | None = None
    peepholes: Tensor | None = None


_NORM_EPSILON = 1e-5
# The gates that are normalised together, as the paper has it: the candidate of a GRU apart, as r is applied to it.
_NORM_GROUPS = {"lstm": (4,), "gru": (2, 1)}


def _layer_norm(product: Tensor, gain: Tensor, bias: Tensor | None, groups: tuple[int, ...]) -> Tensor:
    sizes = [product.shape[-1] // sum(groups) * group for group in groups]
    biases: Sequence[Tensor | None] = [None] * len(groups) if bias is None else bias.split(sizes)
    parts = zip(product.split(sizes, dim=-1), gain.split(sizes), biases, strict=True)
    return torch.cat([_normalised(x, g, b) for x, g, b in parts], dim=-1)


def _normalised(x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    # With gain and bias in it, torch's has wrong derivatives of per-sample gradients (torch 2.13, vmap of grad).
    x = F.layer_norm(x, (x.shape[-1],), eps=_NORM_EPSILON)
    x = x if gain is None else x * gain
    return x if bias is None else x + bias


def _zone_out(before: Tensor, after: Tensor, zoneout: Tensor | float, rows: slice) -> Tensor:
    if isinstance(zoneout, Tensor):
        return torch.where(zoneout[rows], before, after)
    return after + zoneout * (before - after) if zoneout else after


# ---- cells: gates_x = x W_ih^T + b_ih and gates_h = h W_hh^T + b_hh of one step, (rows, G*H) each ------------------
#
# A step takes (gates_x, gates_h, state) to (new state, tape). State is (h,) or (h, c).
# Its backward takes (gradient of the new state, tape, output h, state before) to
# (d_gates_x, d_gates_h, the gradient that reaches the state before without passing through W_hh).

State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, State], tuple[State, tuple[Tensor, ...]]]
StepBackward = Callable[[State, Tensor, Tensor, State], tuple[Tensor, Tensor, State]]


def _tanh_backward(d: Tensor, y: Tensor) -> Tensor:
    """The gradient d (1 - y^2), rounded once where y is near 1 and the difference small."""
    result: Tensor = torch.ops.aten.tanh_backward.default(d, y)
    return result


def _rnn_tanh(gates_x: Tensor, gates_h: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
    """Elman (1990): h' = tanh(gates)."""
    return (torch.tanh(gates_x + gates_h),), ()


def _rnn_tanh_backward(d_state: State, tape: Tensor, output: Tensor, before: State) -> tuple[Tensor, Tensor, State]:
    d_gates = _tanh_backward(d_state[0], output)
    return d_gates, d_gates, (torch.zeros_like(d_gates),)


def _rnn_relu(gates_x: Tensor, gates_h: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
    return (torch.relu(gates_x + gates_h),), ()


def _rnn_relu_backward(d_state: State, tape: Tensor, output: Tensor, before: State) -> tuple[Tensor, Tensor, State]:
    # A NaN output passes the gradient on, as torch.relu's own backward does.
    d_gates = torch.where(output <= 0, 0, d_state[0])
    return d_gates, d_gates, (torch.zeros_like(d_gates),)


def _lstm(
    gates_x: Tensor, gates_h: Tensor, state: State, norms: Norms | None = None, peepholes: Tensor | None = None
) -> tuple[State, tuple[Tensor, ...]]:
    """Hochreiter & Schmidhuber (1997) with forget gates (Gers et al. 2000): c' = f c + i g, h' = o tanh(c')."""
    i, f, g, o = (gates_x + gates_h).chunk(4, dim=-1)
    if peepholes is not None:
        i, f = i + peepholes[0] * state[1], f + peepholes[1] * state[1]
    i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
    c = f * state[1] + i * g
    o = (o if peepholes is None else o + peepholes[2] * c).sigmoid()
    read = c if norms is None else _normalised(c, norms.gain_c, norms.bias_c)
    return (o * read.tanh(), c), (i, f, g, o, c)


def _lstm_backward(d_state: State, tape: Tensor, output: Tensor, before: State) -> tuple[Tensor, Tensor, State]:
    d_h, d_c = d_state
    i, f, g, o, c = tape.chunk(5, dim=-1)
    tanh_c = c.tanh()
    d_c = d_c + _tanh_backward(d_h * o, tanh_c)
    d_gates = torch.cat(
        (
            d_c * g * i * (1 - i),
            d_c * before[1] * f * (1 - f),
            _tanh_backward(d_c * i, g),
            d_h * tanh_c * o * (1 - o),
        ),
        dim=-1,
    )
    return d_gates, d_gates, (torch.zeros_like(before[0]), d_c * f)


def _gru(gates_x: Tensor, gates_h: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
    """Cho et al. (2014), with r applied after the product as in cuDNN: n = tanh(x_n + r h_n), h' = (1 - z) n + z h."""
    x_r, x_z, x_n = gates_x.chunk(3, dim=-1)
    h_r, h_z, h_n = gates_h.chunk(3, dim=-1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (n + z * (state[0] - n),), (r, z, n, h_n)


def _gru_backward(d_state: State, tape: Tensor, output: Tensor, before: State) -> tuple[Tensor, Tensor, State]:
    (d_h,) = d_state
    r, z, n, h_n = tape.chunk(4, dim=-1)
    d_n = _tanh_backward(d_h * (1 - z), n)
    d_r = d_n * h_n * r * (1 - r)
    d_z = d_h * (before[0] - n) * z * (1 - z)
    return torch.cat((d_r, d_z, d_n), dim=-1), torch.cat((d_r, d_z, d_n * r), dim=-1), (d_h * z,)


def recurrent_gradient(cell: str, d_gates_x: Tensor, tape: Tensor) -> Tensor:
    """Returns d_gates_h of any rows, (..., G*H), from their d_gates_x and tape."""
    if cell != "gru":
        return d_gates_x
    d_r, d_z, d_n = d_gates_x.chunk(3, dim=-1)
    return torch.cat((d_r, d_z, d_n * tape[..., : d_n.shape[-1]]), dim=-1)


_STEPS: dict[str, tuple[Step, StepBackward]] = {
    "rnn_tanh": (_rnn_tanh, _rnn_tanh_backward),
    "rnn_relu": (_rnn_relu, _rnn_relu_backward),
    "lstm": (_lstm, _lstm_backward),
    "gru": (_gru, _gru_backward),
}


# ---- rows: sequences sorted by length, so that step t owns the first sizes[t] batch rows --------------------------


def _step_sizes(input: Tensor, h_0: Tensor, batch_sizes: Tensor | None) -> list[int]:
    batch = h_0.shape[1]
    if batch_sizes is not None:
        if is_mapped(batch_sizes):
            raise RuntimeError("forward-mode and second derivatives take no vmap over lengths, resets or batch_sizes")
        check_batch_sizes(batch_sizes, batch, input.shape[0])
        return [int(size) for size in batch_sizes.tolist()]
    return [batch] * (input.shape[0] // batch if batch else 0)


def _before(states: Sequence[Tensor], initial: Tensor, sizes: list[int], backwards: bool) -> list[Tensor]:
    """The state before each step, given the state after each step and the initial one."""
    previous = []
    for t, size in enumerate(sizes):
        if not backwards:
            previous.append(initial[:size] if t == 0 else states[t - 1][:size])
        elif t + 1 == len(sizes):
            previous.append(initial[:size])
        else:
            previous.append(torch.cat((states[t + 1], initial[sizes[t + 1] : size])))
    return previous


def _resize(state: State, rows: int, joining: State, leaving: list[State]) -> State:
    """Lets rows end (their states go to `leaving`) or begin (theirs come from `joining`) until `rows` are left."""
    current = state[0].shape[0]
    if rows < current:
        leaving.append(tuple(s[rows:] for s in state))
        return tuple(s[:rows] for s in state)
    if rows > current:
        return tuple(torch.cat((s, new[current:rows])) for s, new in zip(state, joining, strict=True))
    return state


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """As torch.stack, whose result is a view: an operator's results must not be."""
    return torch.cat([part.unsqueeze(0) for part in parts])


def _cat(parts: Sequence[Tensor], empty: Tensor) -> Tensor:
    return torch.cat(tuple(parts)) if parts else empty


# ---- lanes: one direction of one layer, in the dtype it is computed in ---------------------------------------------


class _Lane(NamedTuple):
    input: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    initial: State
    backwards: bool
    extension: Extension = Extension()


def _lanes(input: Tensor, w_hh: Tensor, *others: Tensor | None, bidirectional: bool) -> list[_Lane]:
    input = widen(input)
    lanes = []
    for d in range(w_hh.shape[0]):
        w_ih, b_ih, b_hh, w_hr, *states = (None if t is None else widen(t[d]) for t in others)
        assert w_ih is not None
        initial = tuple(s for s in states if s is not None)
        lanes.append(_Lane(input, w_ih, widen(w_hh[d]), b_ih, b_hh, w_hr, initial, bidirectional and d % 2 == 1))
    return lanes


def forward(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    bidirectional: bool,
    save_tape: bool,
    extensions: Sequence[Extension] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns output (N, D*P), h_n (D, B, P), c_n (D, B, H) and tape (D, N, K*H); what a cell lacks is empty.

    With `extensions`, one a lane, there is no `backward`, which reads tapes of the plain recurrence: autograd
    differentiates this function.
    """
    sizes = _step_sizes(input, h_0, batch_sizes)
    lanes = _lanes(input, w_hh, w_ih, b_ih, b_hh, w_hr, h_0, c_0, bidirectional=bidirectional)
    if extensions is not None:
        lanes = [lane._replace(extension=extension) for lane, extension in zip(lanes, extensions, strict=True)]
    results = [_forward_lane(lane, sizes, cell) for lane in lanes]
    output = torch.cat([output for output, _, _ in results], dim=1)
    final = [_stack(states).to(h_0.dtype) for states in zip(*(final for _, final, _ in results), strict=True)]
    tape = _stack([tape for _, _, tape in results]).to(h_0.dtype) if save_tape else h_0.new_empty(0)
    return output.to(h_0.dtype), final[0], h_0.new_empty(0) if c_0 is None else final[1], tape


def _gates(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, cell: str) -> Tensor:
    """Of rows or token ids, x W^T + b; with a gain, the product is normalised first."""
    if gain is not None:
        product = F.linear(x, weight) if x.is_floating_point() else weight.t()[x]
        return _layer_norm(product, gain, bias, _NORM_GROUPS[cell])
    if x.is_floating_point():
        return F.linear(x, weight, bias)
    return weight.t()[x] if bias is None else weight.t()[x] + bias


def _forward_lane(lane: _Lane, sizes: list[int], cell: str) -> tuple[Tensor, State, Tensor]:
    mask, *zoneouts, norms, peepholes = lane.extension
    step = _STEPS[cell][0]
    if norms is not None:
        norms = Norms(widen(norms.gain_ih), widen(norms.gain_hh), *(None if t is None else widen(t) for t in norms[2:]))
    if cell == "lstm":
        step = partial(_lstm, norms=norms, peepholes=None if peepholes is None else widen(peepholes))
    gain_ih, gain_hh = (None, None) if norms is None else norms[:2]
    gates_x = _gates(lane.input, lane.w_ih, lane.b_ih, gain_ih, cell)

    order = slice(None, None, -1 if lane.backwards else 1)
    state = tuple(s[: sizes[order][0]] for s in lane.initial) if sizes else lane.initial
    finished: list[State] = []
    outputs, tapes = [], []
    rows = [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
    steps = list(zip(gates_x.split(sizes), rows, strict=True)) if sizes else []
    for step_gates_x, step_rows in steps[order]:
        before = _resize(state, step_gates_x.shape[0], joining=lane.initial, leaving=finished)
        h = before[0] if mask is None else before[0] * mask[: step_gates_x.shape[0]]
        state, saved = step(step_gates_x, _gates(h, lane.w_hh, lane.b_hh, gain_hh, cell), before)
        if lane.w_hr is not None:
            state = (F.linear(state[0], lane.w_hr), *state[1:])
        state = tuple(_zone_out(*pair, step_rows) for pair in zip(before, state, zoneouts, strict=False))
        outputs.append(state[0])
        tapes.append(torch.cat(saved, dim=-1) if saved else step_gates_x[:, :0])
    final = tuple(torch.cat(parts) for parts in zip(state, *reversed(finished), strict=True))
    # Of no rows the empty results are still made from the input and the weights, for autograd to see.
    no_tape = gates_x[:, :1].expand(-1, CELLS[cell].tape * (gates_x.shape[1] // CELLS[cell].gates))
    return _cat(outputs[order], gates_x[:, : state[0].shape[1]]), final, _cat(tapes[order], no_tape)


def backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    bidirectional: bool,
    output: Tensor,
    tape: Tensor,
    need_input: bool,
    need_weights: bool,
    *,
    d_cells: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Returns the gradients of input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0; what is absent or not needed is empty.

    d_cells: (D, N, H), the gradient of an LSTM's c after every step.
    """
    sizes = _step_sizes(input, h_0, batch_sizes)
    lanes = _lanes(input, w_hh, w_ih, b_ih, b_hh, w_hr, h_0, c_0, bidirectional=bidirectional)
    columns = h_0.shape[2]
    outputs, d_outputs = (
        widen(t).split(columns, dim=1) for t in (output, torch.zeros_like(output) if d_output is None else d_output)
    )
    d_final = [widen(torch.zeros_like(s) if d is None else d) for d, s in ((d_h_n, h_0), (d_c_n, c_0)) if s is not None]
    lane_gradients = []
    for d, lane in enumerate(lanes):
        d_final_of_lane = tuple(g[d] for g in d_final)
        d_every = (d_outputs[d],) if d_cells is None else (d_outputs[d], widen(d_cells[d]))
        rows = _backward_lane(lane, d_every, d_final_of_lane, outputs[d], widen(tape[d]), sizes, _STEPS[cell][1])
        lane_gradients.append(
            (
                _linear(rows.d_gates_x, _turned(lane.w_ih)) if need_input and input.is_floating_point() else None,
                *(_weight_gradients(lane, rows) if need_weights else [None] * 5),
                *rows.d_initial,
            )
        )
    d_input, *others = (
        None if gradients[0] is None else _stack(gradients) for gradients in zip(*lane_gradients, strict=True)
    )
    if c_0 is None:
        others.append(None)
    d_input = None if d_input is None else d_input.sum(0)
    return tuple(h_0.new_empty(0) if g is None else g.to(h_0.dtype) for g in (d_input, *others))


def states_backward(
    d_output: Tensor | None, d_cells: Tensor | None, d_c_n: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    """`backward` with the gradient of an LSTM's c after every step in place of h_n's."""
    return backward(d_output, None, d_c_n, *others, d_cells=d_cells)


class _RowGradients(NamedTuple):
    """What the reverse scan finds for each row: all else is parallel in time."""

    d_gates_x: Tensor
    d_gates_h: Tensor
    h_before: Tensor
    projection: tuple[Tensor, Tensor] | None  # the gradients of its results, and its inputs
    d_initial: State


def _backward_lane(
    lane: _Lane,
    d_every: State,
    d_final: State,
    output: Tensor,
    tape: Tensor,
    sizes: list[int],
    step_backward: StepBackward,
) -> _RowGradients:
    outputs, tapes = output.split(sizes), tape.split(sizes)
    before = [_before(outputs, lane.initial[0], sizes, lane.backwards)]
    if len(lane.initial) > 1:
        hidden = lane.initial[1].shape[1]
        before.append(_before(tape[:, -hidden:].split(sizes), lane.initial[1], sizes, lane.backwards))
    d_steps = zip(*(d.split(sizes) for d in d_every), strict=True)
    steps = list(zip(d_steps, tapes, outputs, zip(*before, strict=True), strict=True))

    # The forward walk, mirrored: a row joins where its sequence ended and leaves where it began.
    order, w_hh = slice(None, None, 1 if lane.backwards else -1), _turned(lane.w_hh)
    d_state = tuple(d[: sizes[order][0]] for d in d_final) if sizes else d_final
    left: list[State] = []
    d_gates_x, d_gates_h, d_projected = [], [], []
    for (d_out, *d_cells), step_tape, out, state_before in steps[order]:
        d_state = _resize(d_state, d_out.shape[0], joining=d_final, leaving=left)
        d_h, *d_c = d_state
        d_h = d_h + d_out
        if d_cells:
            d_c = [d_c[0] + d_cells[0]]
        if lane.w_hr is not None:
            d_projected.append(d_h)
            d_h = d_h @ lane.w_hr
        d_x, d_recurrent, d_direct = step_backward((d_h, *d_c), step_tape, out, state_before)
        d_gates_x.append(d_x)
        d_gates_h.append(d_recurrent)
        # Added last: each product of a long sum that started from it would be rounded to its size.
        d_state = (d_direct[0] + _linear(d_recurrent, w_hh), *d_direct[1:])
    d_initial = tuple(torch.cat(parts) for parts in zip(d_state, *reversed(left), strict=True))

    no_gates = output.new_empty(0, lane.w_ih.shape[0])
    projection = None
    if lane.w_hr is not None:
        _, _, _, o, c = tape.chunk(5, dim=-1)
        projection = _cat(d_projected[order], output[:0]), o * c.tanh()
    d_gates = _cat(d_gates_x[order], no_gates), _cat(d_gates_h[order], no_gates)
    return _RowGradients(*d_gates, _cat(before[0], output[:0]), projection, d_initial)


def _turned(weight: Tensor) -> Tensor:
    """The transpose, laid out as F.linear reads it: of few rows some CPUs sum that product more accurately."""
    return weight.t().contiguous()


# Products that are added up at a time. A BLAS library may add up all of a sum one by one; torch.nn rounds less.
_BLOCK = 1024


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear, in blocks of a long sum."""
    blocks = zip(x.split(_BLOCK, dim=-1), weight.split(_BLOCK, dim=-1), strict=True)
    return _added(F.linear(a, w) for a, w in blocks)


def _over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a.t() @ b, in blocks of rows."""
    return _added(rows.t() @ others for rows, others in zip(a.split(_BLOCK), b.split(_BLOCK), strict=True))


def _added(products: Iterable[Tensor]) -> Tensor:
    return reduce(torch.Tensor.add, products)


def _weight_gradients(lane: _Lane, rows: _RowGradients) -> list[Tensor | None]:
    """Gradients of w_ih, w_hh, b_ih, b_hh, w_hr."""
    if lane.input.is_floating_point():
        d_w_ih = _over_rows(rows.d_gates_x, lane.input)
    else:
        d_w_ih = torch.zeros_like(lane.w_ih.t()).index_add_(0, lane.input, rows.d_gates_x).t()
    return [
        d_w_ih,
        _over_rows(rows.d_gates_h, rows.h_before),
        None if lane.b_ih is None else rows.d_gates_x.sum(0),
        None if lane.b_hh is None else rows.d_gates_h.sum(0),
        None if rows.projection is None else _over_rows(*rows.projection),
    ]
