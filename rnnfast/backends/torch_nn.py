"""torch.nn's own path: cuDNN (or MIOpen) on a GPU, oneDNN or ATen on a CPU.

Eager code calls it as torch.nn's layers do, by `layers`. A compiler would unroll that step by step, so a graph holds it
as one operator, `rnnfast::scan_torch`. What cuDNN keeps for its backward only cuDNN knows the size of; the operator's
tape is therefore empty, and its backward runs the forward once more.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnfast.autocast import autocast_dtype, without_autocast
from rnnfast.derivatives import gradients_below_autograd

Lane = Sequence["Tensor | None"]  # w_ih, w_hh, b_ih, b_hh, w_hr
Result = tuple[Tensor, Tensor, Tensor]  # output, h_n, c_n


@contextmanager
def _quiet() -> Iterator[None]:
    """Without cuDNN's hint to call flatten_parameters(), which would change nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        yield


def _quiet_under_autocast(layers: Callable[..., Result]) -> Callable[..., Result]:
    """A decorator: `_quiet` where autocast has made weights, which are not in one piece."""

    @functools.wraps(layers)
    def run(cell: str, input: Tensor, *more: Any) -> Result:
        if not input.is_cuda or autocast_dtype("cuda") is None:
            return layers(cell, input, *more)
        with _quiet():
            return layers(cell, input, *more)

    return run


@_quiet_under_autocast
@without_autocast
def layers(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Lane],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    dropout: float = 0.0,
    training: bool = False,
) -> Result:
    """Layers x directions, as `rnnfast.functional` takes and returns them."""
    directions = 2 if bidirectional else 1
    if batch_sizes is not None and not len(input):  # cuDNN takes no empty batch
        # Nothing, but of all that the results of any other batch depend on: so the gradients are zeros.
        tensors = (input, *itertools.chain(*weights))
        nothing = torch.cat([t.flatten()[:0] for t in tensors if t is not None and t.is_floating_point()])
        output = nothing.view(0, directions * h_0.shape[2])
        return output, h_0 + nothing.sum(), h_0.new_empty(0) if c_0 is None else c_0 + nothing.sum()
    if not input.is_floating_point():
        input, first = _floating(input, [lane[0] for lane in weights[:directions]], h_0.dtype)
        lanes = [(w_ih, *lane[1:]) for w_ih, lane in zip(first, weights, strict=False)]
        weights = [*lanes, *weights[directions:]]
    flat_weights = [parameter for lane in weights for parameter in lane if parameter is not None]
    # cuDNN has a backward only for what it ran in training mode; without dropout that is the same.
    dropout, training = float(dropout if training else 0.0), training or torch.is_grad_enabled()
    options = (flat_weights, weights[0][2] is not None, len(weights) // directions, dropout, training, bidirectional)
    hx = h_0 if c_0 is None else (h_0, c_0)
    function = getattr(torch._VF, cell)
    if batch_sizes is None:
        output, h_n, *c_n = function(input, hx, *options, False)
    else:
        output, h_n, *c_n = function(input, batch_sizes, hx, *options)
    return output, h_n, c_n[0] if c_n else h_n.new_empty(0)


def _floating(ids: Tensor, w_ih: list[Any], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Rows, and the weights they are to be multiplied with, whose products are the columns of w_ih that ids look up.

    One-hot rows, where they are no larger than the products; else the products themselves, and the identity.
    """
    inputs, products = w_ih[0].shape[1], sum(len(w) for w in w_ih)
    if inputs <= products:
        return F.one_hot(ids.long(), inputs).to(dtype), w_ih
    identity = torch.eye(products, dtype=dtype, device=ids.device)
    return F.embedding(ids.long(), torch.cat(w_ih).t()), list(identity.split([len(w) for w in w_ih]))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements `rnnfast::scan_torch`; shapes are those of `rnnfast.scan.scan`, and the tape's (D, N, 0)."""
    tape = h_0.new_empty((h_0.shape[0], len(input), 0) if save_tape else (0,))
    if len(input) == 0:
        c_n = h_0.new_empty(0) if c_0 is None else c_0.clone()
        return h_0.new_empty(0, h_0.shape[0] * h_0.shape[2]), h_0.clone(), c_n, tape
    layer = (input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0)
    return (*_scan(layer, batch_sizes, cell, bidirectional), tape)


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
) -> tuple[Tensor, ...]:
    """Implements `rnnfast::scan_torch_backward`: what is absent or not needed is returned empty."""
    layer = (input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0)
    needed = (need_input and input.is_floating_point(), *[need_weights] * 5, True, True)

    def definition(*leaves: Any) -> tuple[Tensor, ...]:
        final: Any = (output, leaves[6], leaves[7])  # of no steps
        return _scan(leaves, batch_sizes, cell, bidirectional) if len(input) else final

    found = gradients_below_autograd(definition, (d_output, d_h_n, d_c_n), layer, needed)
    return tuple(h_0.new_empty(0) if g is None else g for g in found)


def _scan(
    layer: Sequence[Any], batch_sizes: Tensor | None, cell: str, bidirectional: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The lanes, a pair of directions or a single one at a time."""
    input, *weights, h_0, c_0 = layer
    if batch_sizes is None:
        input = input.unflatten(0, (-1, h_0.shape[1]))
    directions, parts = 2 if bidirectional else 1, []
    with _quiet():
        for first in range(0, len(h_0), directions):
            lanes = slice(first, first + directions)
            of_lanes = [[None if w is None else w[lane] for w in weights] for lane in range(*lanes.indices(len(h_0)))]
            c = None if c_0 is None else c_0[lanes]
            parts.append(layers(cell, input, h_0[lanes], c, of_lanes, batch_sizes, bidirectional))
    outputs, h_n, c_n = zip(*parts, strict=True)
    output = torch.cat(outputs, -1)
    return output.flatten(0, -2), torch.cat(h_n), torch.cat(c_n)
