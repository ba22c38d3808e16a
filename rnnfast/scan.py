"""The scan: one recurrent layer, all lanes and all rows, as a differentiable torch operator.

Every backend implements the same pair of operators, `rnnfast::scan_<backend>` and `rnnfast::scan_<backend>_backward`.
Their schemas, fakes (shapes without computation) and autograd formula are defined here, so they exist before any
compiled library is loaded; a backend registers implementations and nothing else. `docs/design.md` tells the contract.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from rnnfast import batching, derivatives, dispatch, flops
from rnnfast.autocast import without_autocast
from rnnfast.backends import reference, torch_nn
from rnnfast.backends.cpu import packing
from rnnfast.cells import CELLS
from rnnfast.tracing import is_jit_traced, is_traced

BACKEND_NAMES = ("reference", "cpu", "triton", "cuda", "torch")
# Those with an operator for the states of every step of an LSTM, `scan_<backend>_states`.
WITH_STATES = ("reference", "cpu")

_LAYER = (
    "Tensor input, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor h_0, Tensor? c_0, "
    "Tensor? batch_sizes, str cell, bool bidirectional"
)
FORWARD_SCHEMA = f"({_LAYER}, bool save_tape) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor tape)"
BACKWARD_SCHEMA = (
    f"(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, {_LAYER}, Tensor output, Tensor tape, bool need_input, "
    "bool need_weights) -> (Tensor d_input, Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh, "
    "Tensor d_w_hr, Tensor d_h_0, Tensor d_c_0)"
)


class Weights(NamedTuple):
    """Parameters of one direction of one layer, in torch.nn's shapes and gate order.

    w_ih (G*H, I), w_hh (G*H, P), b_ih and b_hh (G*H) or both None, and for an LSTM with projections w_hr (P, H);
    P is H without them. G is 1 (RNN), 4 (LSTM: i f g o) or 3 (GRU: r z n).
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def scan(
    backend: str,
    input: Tensor,
    weights: Weights,
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one recurrent layer on the named backend.

    D lanes (directions), N rows in all, B rows in the first step, I inputs, H hidden units, G gates; P is the projected
    size of an LSTM with projections (Sak et al. 2014) and H elsewhere.

    Args:
        backend: one of `BACKEND_NAMES`; it must be loaded (`rnnfast.dispatch` sees to it).
        input: (N, I) floating, or (N,) int64 token ids. Rows are time-major, as in `PackedSequence.data`.
        weights: the lanes' parameters, stacked: each with a leading dimension D.
        h_0, c_0: (D, B, P) and (D, B, H); c_0 is for the LSTM only.
        batch_sizes: (T,) int64 on the CPU, non-increasing: the rows of each step. None: every step has B rows.
        cell: a key of `rnnfast.cells.CELLS`.
        bidirectional: odd lanes walk time backwards.

    Returns:
        output (N, D*P), h_n (D, B, P) and c_n (D, B, H); c_n is empty but for the LSTM.
    """
    tensors = (input, *weights, h_0, c_0)
    if forward_ad._current_level >= 0:
        # The reference is made of operations that have forward-mode derivatives.
        output, h_n, c_n = _definition(*tensors, batch_sizes, cell, bidirectional)
        return output, h_n, c_n
    output, h_n, c_n, _ = call(FORMULAS[backend], tensors, batch_sizes, cell, bidirectional)
    return output, h_n, c_n


def call(
    formula: derivatives.Formula, tensors: Sequence[Tensor | None], *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs a formula's operator, with a tape where a backward may follow; `options` come between tensors and that."""
    # torch.jit.trace compares its trace with one without gradients.
    save_tape = derivatives.needs_gradient(tensors) or is_jit_traced()
    arguments = (*contiguous(tensors), *options, save_tape)
    # What the operator's Autograd kernel does, without the way there through the dispatcher and back into Python.
    eager_training = save_tape and not is_traced()
    results = derivatives.Scan.apply(formula, *arguments) if eager_training else formula.op(*arguments)
    return results  # type: ignore[no-any-return]


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def lstm_states(
    backend: str,
    input: Tensor,
    weights: Weights,
    h_0: Tensor,
    c_0: Tensor,
    batch_sizes: Tensor | None,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """Runs one LSTM layer as `scan` does, and returns h (N, D*P) and c (D, N, H) of every step.

    On the cpu backend and the reference both have gradients; elsewhere neither has: c is read from the tape.
    """
    tensors = (input, *weights, h_0, c_0)
    if forward_ad._current_level >= 0:
        output, cells, _ = _states_definition(*tensors, batch_sizes, "lstm", bidirectional)
    elif backend in WITH_STATES:
        output, cells, _, _ = call(FORMULAS[f"{backend}_states"], tensors, batch_sizes, "lstm", bidirectional)
    else:
        with torch.no_grad():
            output, _, _, tape = FORMULAS[backend].op(*contiguous(tensors), batch_sizes, "lstm", bidirectional, True)
        cells = _cells(tape, c_0)
    return output, cells


def _cells(tape: Tensor, c_0: Tensor) -> Tensor:
    return tape[..., -c_0.shape[2] :]


_PLAIN = (Tensor, torch.nn.Parameter)


def scan_layer(
    backend: str,
    input: Tensor,
    lanes: Sequence[Weights],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`scan` with the parameters of each lane on their own, as modules hold them.

    Where no gradient is wanted, the cpu backend uses weights it has packed in an earlier call, if they are still good.
    """
    if backend == "cpu" and is_plain_inference((input, h_0, c_0, *(p for lane in lanes for p in lane))):
        packed = packing.packed_weights(lanes, cell, not input.is_floating_point())
        return packing.scan_packed(
            input.contiguous(),
            packed,
            h_0.contiguous(),
            None if c_0 is None else c_0.contiguous(),
            batch_sizes,
            bidirectional,
        )
    return scan(backend, input, stack_lanes(lanes), h_0, c_0, batch_sizes, cell, bidirectional)


def stack_lanes(lanes: Sequence[Weights]) -> Weights:
    return Weights(*map(stack, zip(*lanes, strict=True)))


def stack(parts: Sequence[Any]) -> Any:
    """A parameter of all lanes, None if they lack it; a view of one lane's."""
    if parts[0] is None:
        return None
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack([*parts])


def is_plain_inference(tensors: Sequence[Tensor | None]) -> bool:
    """No gradient is wanted, and nothing (compiler, tracer, vmap, a tensor subclass) must see the operator itself."""
    given = [tensor for tensor in tensors if tensor is not None]
    if derivatives.needs_gradient(given):
        return False
    if is_traced() or _C._len_torch_dispatch_stack():
        return False
    return all(type(tensor) in _PLAIN for tensor in given)


def _fake_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lanes, gate_rows, state_size = w_hh.shape
    gates, tape = CELLS[cell].gates, CELLS[cell].tape
    rows = input.shape[0]
    return (
        h_0.new_empty(rows, lanes * state_size),
        h_0.new_empty(h_0.shape),
        h_0.new_empty(0) if c_0 is None else c_0.new_empty(c_0.shape),
        h_0.new_empty(lanes, rows, tape * (gate_rows // gates)) if save_tape else h_0.new_empty(0),
    )


def _fake_forward_of_torch(*arguments: Any) -> tuple[Tensor, ...]:
    *results, tape = _fake_forward(*arguments)
    return (*results, tape[..., :0].clone() if arguments[-1] else tape)


def _fake_backward(leaves: int, weights: Sequence[int], *arguments: Any) -> tuple[Tensor, ...]:
    layer, (need_input, need_weights) = arguments[3 : 3 + leaves], arguments[-2:]
    input, h_0 = layer[0], layer[6]
    needed = [need_weights if i in weights else True for i in range(leaves)]
    needed[0] = need_input and input.is_floating_point()
    return tuple(empty_or_like(h_0, tensor, need) for tensor, need in zip(layer, needed, strict=True))


def empty_or_like(like: Tensor, tensor: Tensor | None, needed: bool = True) -> Tensor:
    """An operator's result in the form of `tensor`, or of none."""
    return like.new_empty(0) if tensor is None or not needed else torch.empty_like(tensor)


_reference = without_autocast(reference.forward)


def _definition(*layer: Any) -> tuple[Tensor, ...]:
    return _reference(*layer, False)[:3]


def _states(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Implements `rnnfast::scan_<backend>_states`: the scan with every c, (D, N, H), in place of h_n."""
    *layer, save_tape = arguments
    output, _, c_n, tape = FORMULAS[backend].op(*layer, True)
    return output, _cells(tape, layer[7]).clone(), c_n, tape if save_tape else tape.new_empty(0)


def _fake_states(*arguments: Any) -> tuple[Tensor, ...]:
    output, h_n, c_n, tape = _fake_forward(*arguments)
    return output, c_n.new_empty(h_n.shape[0], output.shape[0], c_n.shape[2]), c_n, tape


def _states_definition(*layer: Any) -> tuple[Tensor, ...]:
    output, _, c_n, tape = _reference(*layer, True)
    return output, _cells(tape, layer[7]), c_n


library = torch.library.Library("rnnfast", "DEF")


def define(
    name: str,
    schemas: tuple[str, str],
    fake: Callable[..., tuple[Tensor, ...]],
    rules: tuple[Any, Any] | None,
    definition: Callable[..., tuple[Tensor, ...]],
    sizes: tuple[int, int, tuple[int, ...]],
) -> derivatives.Formula:
    """Defines the operators `rnnfast::<name>` and `rnnfast::<name>_backward`, all but their implementations.

    Args:
        schemas, rules: of the forward scan and of the backward one. The rules are torch.vmap's, and take the operator
            first; None: it has no vmap.
        fake: the forward scan's.
        definition, sizes: the formula's, the sizes being its `tensors`, `leaves` and `weights`.
    """
    names = (name, f"{name}_backward")
    for each, schema in zip(names, schemas, strict=True):
        library.define(each + schema)
    ops = [getattr(torch.ops.rnnfast, each).default for each in names]
    formula = derivatives.Formula(ops[0], ops[1], definition, *sizes)
    functions = (derivatives.Scan, derivatives.ScanBackward)
    fakes: tuple[Any, Any] = (fake, partial(_fake_backward, *sizes[1:]))
    for each, op, function, fake_of_each in zip(names, ops, functions, fakes, strict=True):
        library.impl(each, derivatives.kernel(function, formula, op), "Autograd")
        torch.library.register_fake(f"rnnfast::{each}", fake_of_each, lib=library)
    for each, op, rule in zip(names, ops, rules or (), strict=False):
        torch.library.register_vmap(f"rnnfast::{each}", batching.or_no_members(partial(rule, op)), lib=library)
    return formula


def load_when_called(backend: str, *ops: Any) -> None:
    """Implements operators of a backend until it is loaded.

    A program that was exported, compiled ahead of time or traced calls them in a process where nobody has asked for it.
    """
    for op in ops:
        library.impl(op, partial(_load_and_call, backend, op), "CompositeExplicitAutograd")


_redispatch = threading.local()  # `op`: that which this thread has called again, now that its backend is loaded


def _load_and_call(backend: str, op: Any, *arguments: Any) -> Any:
    name, is_again = op.name(), getattr(_redispatch, "op", None) is op
    reason = dispatch.BACKENDS[backend].why_not_loaded()
    if reason is not None:
        raise RuntimeError(
            f"this program calls {name}, but {reason}. Make it with backend='reference' to run it everywhere"
        )
    if is_again:  # the backend's own implementation was passed by
        devices = {str(argument.device) for argument in arguments if isinstance(argument, Tensor)}
        raise NotImplementedError(f"{name} has no implementation for these tensors, on {' and '.join(sorted(devices))}")
    _redispatch.op = op
    try:
        return op(*arguments)
    finally:
        _redispatch.op = None


_SIZES = 9, 8, (1, 2, 3, 4, 5)  # of _LAYER
FORMULAS: dict[str, derivatives.Formula] = {}
for _backend in BACKEND_NAMES:
    FORMULAS[_backend] = define(
        f"scan_{_backend}",
        (FORWARD_SCHEMA, BACKWARD_SCHEMA),
        _fake_forward_of_torch if _backend == "torch" else _fake_forward,
        # They rely on the tape.
        None if _backend == "torch" else (partial(batching.map_forward, False), partial(batching.map_backward, False)),
        _definition,
        _SIZES,
    )
for _backend in WITH_STATES:
    FORMULAS[f"{_backend}_states"] = define(
        f"scan_{_backend}_states",
        (FORWARD_SCHEMA.replace("Tensor h_n", "Tensor cells"), BACKWARD_SCHEMA.replace("d_h_n", "d_cells")),
        _fake_states,
        (partial(batching.map_forward, True), partial(batching.map_backward, True)),
        _states_definition,
        _SIZES,
    )
    library.impl(f"scan_{_backend}_states", partial(_states, _backend), "CompositeExplicitAutograd")
for _backend in ("cpu", "triton", "cuda"):
    load_when_called(_backend, FORMULAS[_backend].op, FORMULAS[_backend].backward_op)
load_when_called("cpu", FORMULAS["cpu_states"].backward_op)
for _name, _implementation in (
    ("scan_reference", reference.forward),
    ("scan_reference_backward", reference.backward),
    ("scan_reference_states_backward", reference.states_backward),
    ("scan_torch", torch_nn.forward),
    ("scan_torch_backward", torch_nn.backward),
):
    library.impl(_name, without_autocast(_implementation), "CompositeExplicitAutograd")
flops.count(f"scan_{_backend}" for _backend in FORMULAS)
