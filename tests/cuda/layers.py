"""The comparison of a scan's results with the truth and with torch.nn's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnfast.backends import reference
from rnnfast.tuning import allowed_error
from tests.scans import GRADIENTS, OUTPUTS, random_gradients, widened

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Errors are held against torch.nn's own on the same input (`allowed_error`). Where that is no measure (on a CPU it has
# no TF32, and its float64 is the truth itself) a bound of the error's RMS over the truth's, forward and backward: 2^-11
# a factor in TF32, a few roundings in float64.
BOUNDS = {"tf32": (1e-3, 2e-3), "float64": (2e-15, 4e-15)}


def torch_nn(layer: list[Any], d_outputs: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Output, h_n, c_n and the gradients, in the order of GRADIENTS, that torch.nn's layers give for the lanes."""
    input, *weights, _, h_0, c_0, batch_sizes, cell, bidirectional = layer
    rows = input if input.is_floating_point() else nn.functional.one_hot(input, weights[0].shape[2]).to(h_0.dtype)
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (rows, *weights, h_0, c_0)]
    rows, *weights, h_0, c_0 = leaves
    directions = 2 if bidirectional else 1
    outputs = []
    for first in range(0, h_0.shape[0], directions):
        lanes = range(first, first + directions)
        module = _nn_module(cell, weights, bidirectional)
        names = [f"{name}_l0{suffix}" for suffix in ("", "_reverse")[:directions] for name in _NN_WEIGHTS]
        values = [None if w is None else w[lane] for lane in lanes for w in weights]
        states = tuple(t[first : first + directions] for t in (h_0, c_0) if t is not None)
        padded = rows.view(-1, h_0.shape[1], rows.shape[1]) if batch_sizes is None else rows
        output, state = torch.func.functional_call(
            module,
            {name: value for name, value in zip(names, values, strict=True) if value is not None},
            (
                padded if batch_sizes is None else PackedSequence(rows, batch_sizes),
                states if len(states) > 1 else states[0],
            ),
        )
        output = output.flatten(0, 1) if batch_sizes is None else output.data
        outputs.append((output, *(state if isinstance(state, tuple) else (state,))))
    output, *states = (torch.cat(parts, 1 if i == 0 else 0) for i, parts in enumerate(zip(*outputs, strict=True)))
    results = [output, *states] if c_0 is not None else [output, *states, h_0.new_empty(0)]
    used = [(result, d) for result, d in zip(results, d_outputs, strict=True) if d is not None]
    gradients = iter(
        torch.autograd.grad([r for r, _ in used], [leaf for leaf in leaves if leaf is not None], [d for _, d in used])
    )
    empty = h_0.new_empty(0)
    d_input, *d_weights, d_h_0, d_c_0 = (empty if leaf is None else next(gradients) for leaf in leaves)
    return [r.detach() for r in results], [d_input, *d_weights, empty, d_h_0, d_c_0]


_NN_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _wide(values: Sequence[Any]) -> list[Any]:
    """On the CPU, and in float64."""
    return widened([x.cpu() if isinstance(x, Tensor) else x for x in values])


def _nn_module(cell: str, weights: list[Any], bidirectional: bool) -> nn.RNNBase:
    w_ih, w_hh, b_ih, _ = weights
    module = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
    options = {"nonlinearity": cell.removeprefix("rnn_")} if module is nn.RNN else {}
    return module(
        w_ih.shape[2],
        w_hh.shape[2],
        bias=b_ih is not None,
        bidirectional=bidirectional,
        device=w_hh.device,
        dtype=w_hh.dtype,
        **options,
    )


def check_against_truth(forward: Any, backward: Any, layer: list[Any], compute_type: str) -> None:
    """Runs both directions, and holds every result against the reference in float64, its error beside torch.nn's.

    Each backward reads the other's tape as well as its own.
    """
    wide = _wide(layer)
    truth = reference.forward(*wide, True)
    ours, theirs = forward(*layer, True), reference.forward(*layer, True)
    without_tape = forward(*layer, False)
    assert torch.equal(without_tape[0], ours[0])
    assert without_tape[3].numel() == 0

    d_outputs = random_gradients(ours)
    nn_outputs, nn_gradients = torch_nn(layer, d_outputs)
    # torch.nn shows no tape: its measure is the reference's in the same dtype.
    _assert_near("", OUTPUTS, ours, truth, [*nn_outputs, theirs[3]], truth, compute_type, True)

    def true_gradients(output: Tensor) -> tuple[Tensor, ...]:
        # The slope of relu is a step: a sum that rounding takes across zero would count as an error of backward. So
        # each backward is judged by the forward that it was given.
        output = _wide([output])[0] if layer[-2] == "rnn_relu" else truth[0]
        return reference.backward(*_wide(d_outputs), *wide, output, truth[3], True, True)

    nn_truth = true_gradients(nn_outputs[0])
    for way, run, used in (
        ("", ours, backward),
        ("after the reference: ", theirs, backward),
        ("the reference after ours: ", ours, reference.backward),
    ):
        gradients = used(*d_outputs, *layer, run[0], run[3], True, True)
        _assert_near(way, GRADIENTS, gradients, true_gradients(run[0]), nn_gradients, nn_truth, compute_type, False)


def _assert_near(
    way: str, names: tuple[str, ...], ours: Any, truth: Any, nn_s: Any, nn_truth: Any, compute_type: str, fwd: bool
) -> None:
    for name, a, t, nn_a, nn_t in zip(names, ours, truth, nn_s, nn_truth, strict=True):
        assert a.shape == t.shape, f"{way}{name}: {tuple(a.shape)} where {tuple(t.shape)} is right"
        if not t.numel():
            continue
        error = _relative_rms(a, t)
        if compute_type in BOUNDS:
            allowed = BOUNDS[compute_type][0 if fwd else 1]
        else:
            allowed = allowed_error(compute_type, _relative_rms(nn_a, nn_t), fwd)
        assert error <= allowed, f"{way}{name}: relative RMS error {error:.1e}, above {allowed:.1e}"


def _relative_rms(value: Tensor, truth: Tensor) -> float:
    return ((value.cpu().double() - truth).square().mean() / truth.square().mean()).sqrt().item()
