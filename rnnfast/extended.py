"""The scan with an extended recurrence, as a differentiable operator: recurrent dropout, zoneout, layer normalisation,
peepholes.

`rnnfast::scan_extended_cpu` is to `definition`, the reference with an `Extension` for each lane, what
`rnnfast::scan_cpu` is to the plain reference. Its second and higher derivatives and its forward-mode derivatives are
the reference's. In a graph the reference is an operator as well, `rnnfast::scan_extended_reference`, so that no
compiler unrolls it, and where torch.vmap maps over lengths or resets; other eager code has autograd run through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnfast import batching, derivatives, flops
from rnnfast.autocast import without_autocast
from rnnfast.backends import reference
from rnnfast.backends.cpu import packing
from rnnfast.backends.reference import Extension, Norms
from rnnfast.batching import ROWS, ROWS_OF_LANES, STATES
from rnnfast.cells import CELLS
from rnnfast.scan import (
    Weights,
    call,
    contiguous,
    define,
    empty_or_like,
    is_plain_inference,
    library,
    load_when_called,
    stack,
)
from rnnfast.tracing import constant_in_graphs, is_mapped

# D lanes: the gains (D, G*H) but for gain_c (D, H), bias_c (D, H), peepholes (D, 3, H), recurrent_mask (D, B, P),
# zoneout_h bool (D, N, P) and zoneout_c (D, N, H), or a share of the old state in the new one, 0 for none. The rest is
# the plain scan's.
_ARGUMENTS = (
    "Tensor input, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor h_0, Tensor? c_0, "
    "Tensor? gain_ih, Tensor? gain_hh, Tensor? gain_c, Tensor? bias_c, Tensor? peepholes, Tensor? recurrent_mask, "
    "Tensor? zoneout_h, Tensor? zoneout_c, Tensor? batch_sizes, float share_h, float share_c, str cell, "
    "bool bidirectional"
)
_LEAVES, _TENSORS, _WEIGHTS = 13, 17, (1, 2, 3, 4, 5, 8, 9, 10, 11, 12)
_GRADIENTS = (
    "Tensor d_input, Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh, Tensor d_w_hr, Tensor d_h_0, "
    "Tensor d_c_0, Tensor d_gain_ih, Tensor d_gain_hh, Tensor d_gain_c, Tensor d_bias_c, Tensor d_peepholes"
)


def scan_extended(
    backend: str,
    input: Tensor,
    lanes: Sequence[Weights],
    extensions: Sequence[Extension],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    cell: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rnnfast.scan.scan_layer` with an extension for each lane, all of one kind, on "cpu" or "reference".

    The other arguments and the results are `scan_layer`'s.
    """
    extended, shares = _stack_extensions(extensions)
    tensors: tuple[Any, ...] = (input, *map(stack, zip(*lanes, strict=True)), h_0, c_0, *extended)
    options = (batch_sizes, *shares, cell, bidirectional)
    is_eager = not _is_graph() and not is_mapped(batch_sizes)
    if forward_ad._current_level >= 0 or (backend == "reference" and is_eager):
        return definition(*tensors, *options)
    formula = _FORMULAS[backend]
    if backend == "cpu" and is_plain_inference(tensors):
        packed = packing.packed_weights(lanes, cell, not input.is_floating_point(), extended=True)
        output, h_n, c_n, _ = formula.op(*contiguous(tensors), *options, False, packed)
    else:
        output, h_n, c_n, _ = call(formula, tensors, *options)
    return output, h_n, c_n


def _is_graph() -> bool:
    """A compiler or exporter looks, but for ONNX's, which has no such operator and takes the reference step by step."""
    return torch.compiler.is_compiling() and not _is_for_onnx()


@constant_in_graphs
def _is_for_onnx() -> bool:
    return bool(torch.onnx.is_in_onnx_export())


def definition(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    gain_ih: Tensor | None,
    gain_hh: Tensor | None,
    gain_c: Tensor | None,
    bias_c: Tensor | None,
    peepholes: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    batch_sizes: Tensor | None,
    share_h: float,
    share_c: float,
    cell: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's output, h_n and c_n on the reference, step by step in eager torch, for autograd to run through."""

    def lane(tensor: Tensor | None, d: int) -> Any:
        return None if tensor is None else tensor[d]

    extensions = [
        Extension(
            lane(recurrent_mask, d),
            share_h if zoneout_h is None else zoneout_h[d],
            share_c if zoneout_c is None else zoneout_c[d],
            None if gain_ih is None else Norms(*(lane(norm, d) for norm in (gain_ih, gain_hh, gain_c, bias_c))),
            lane(peepholes, d),
        )
        for d in range(w_hh.shape[0])
    ]
    output, h_n, c_n, _ = without_autocast(reference.forward)(
        input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, batch_sizes, cell, bidirectional, False, extensions
    )
    return output, h_n, c_n


def _stack_extensions(extensions: Sequence[Extension]) -> tuple[list[Tensor | None], list[float]]:
    """gain_ih, gain_hh, gain_c, bias_c, peepholes, recurrent_mask, zoneout_h, zoneout_c; the shares of h and c."""
    masks, *zoneouts, norms, peepholes = zip(*extensions, strict=True)
    gains = zip(*(norm or (None,) * 4 for norm in norms), strict=True)
    zones = [parts if isinstance(parts[0], Tensor) else (None,) for parts in zoneouts]
    shares = [0.0 if isinstance(parts[0], Tensor) else float(parts[0]) for parts in zoneouts]
    return [stack(parts) for parts in (*gains, peepholes, masks, *zones)], shares


# ---- the operator ----------------------------------------------------------------------------------------------------


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    input, _, w_hh, _, _, _, h_0, c_0, gain_ih = arguments[:9]
    *_, zoneout_h, zoneout_c, _, share_h, share_c, cell, _, save_tape = arguments
    lanes, gate_rows, size = w_hh.shape
    hidden, rows = gate_rows // CELLS[cell].gates, input.shape[0]
    width = CELLS[cell].tape * hidden
    zones_h, zones_c = zoneout_h is not None or share_h != 0, zoneout_c is not None or share_c != 0
    # The tape of csrc/scan.h's ExtendedTape.
    if zones_c if cell == "lstm" else zones_h and gate_rows == hidden:
        width += hidden
    if gain_ih is not None:
        width += 2 * gate_rows
    tape = h_0.new_empty(lanes, rows, width) if save_tape else h_0.new_empty(0)
    return h_0.new_empty(rows, lanes * size), torch.empty_like(h_0), empty_or_like(h_0, c_0), tape


_PLACES = (ROWS, *[None] * 5, STATES, STATES, *[None] * 5, STATES, ROWS_OF_LANES, ROWS_OF_LANES, *[None] * 5)
_RESULT_PLACES = (ROWS, STATES, STATES, ROWS_OF_LANES)
_BACKWARD_PLACES = (*_RESULT_PLACES[:3], *_PLACES, ROWS, ROWS_OF_LANES, None, None)
_GRADIENT_PLACES = _PLACES[:_LEAVES]


def _map_forward(op: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """torch.vmap's rule: a scan for each member."""
    layer, save_tape = arguments[: len(_PLACES)], arguments[len(_PLACES)]
    arguments = (*layer, save_tape or derivatives.needs_gradient(layer))
    dims = in_dims[: len(arguments)]  # without those of packed weights, which only calls without a transform have
    return batching.map_in_turn(op, (*_PLACES, None), _TENSORS - 1, _RESULT_PLACES, info, dims, *arguments)


def _map_backward(op: Any, *arguments: Any) -> tuple[Any, Any]:
    return batching.map_in_turn(op, _BACKWARD_PLACES, _TENSORS + 2, _GRADIENT_PLACES, *arguments)


# ---- the reference as an operator: nothing is kept, so backward runs the definition once more -----------------------


def _forward_of_reference(*arguments: Any) -> tuple[Tensor, ...]:
    *layer, _save_tape = arguments
    return *definition(*layer), arguments[1].new_empty(0)


def _fake_forward_of_reference(*arguments: Any) -> tuple[Tensor, ...]:
    *results, _tape = _fake_forward(*arguments)
    return *results, arguments[1].new_empty(0)


def _backward_of_reference(*arguments: Any) -> tuple[Tensor, ...]:
    d_results, layer = arguments[:3], arguments[3 : 3 + _LEAVES]
    *constants, _output, _tape, need_input, need_weights = arguments[3 + _LEAVES :]
    needed = [need_weights if i in _WEIGHTS else i > 0 or need_input for i in range(_LEAVES)]
    found = derivatives.gradients_below_autograd(
        lambda *leaves: definition(*leaves, *constants), d_results, layer, needed
    )
    return tuple(layer[1].new_empty(0) if gradient is None else gradient for gradient in found)


# ---- both operators --------------------------------------------------------------------------------------------------

_FORMULAS: dict[str, derivatives.Formula] = {}
for _backend, _fake, _kept in (
    # `packed`, in calls without gradients: what scan_extended_cpu_pack has made of the weights.
    ("cpu", _fake_forward, ", Tensor? packed=None"),
    ("reference", _fake_forward_of_reference, ""),
):
    _FORMULAS[_backend] = define(
        f"scan_extended_{_backend}",
        (
            f"({_ARGUMENTS}, bool save_tape{_kept}) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor tape)",
            f"(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, {_ARGUMENTS}, Tensor output, Tensor tape, "
            f"bool need_input, bool need_weights) -> ({_GRADIENTS})",
        ),
        _fake,
        (_map_forward, _map_backward),
        definition,
        (_TENSORS, _LEAVES, _WEIGHTS),
    )
load_when_called("cpu", _FORMULAS["cpu"].op, _FORMULAS["cpu"].backward_op)
library.impl("scan_extended_reference", _forward_of_reference, "CompositeExplicitAutograd")
library.impl("scan_extended_reference_backward", _backward_of_reference, "CompositeExplicitAutograd")
flops.count(f"scan_extended_{_backend}" for _backend in _FORMULAS)
