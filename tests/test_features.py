"""The table in docs/features.md: each row is a function here, tried on rnnfast and on torch.nn.

To add a row, write a function that takes `rnnfast` or `torch.nn`, uses the feature, asserts what it promises, and
raises where it is missing; decorate it with `@feature(name, note)`. Then `python -m tests.test_features` writes the
table. Rows come in the order of the functions.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn as torch_nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast

PAGE = Path(__file__).parent.parent / "docs" / "features.md"
BEGIN, END = "<!-- begin: written by python -m tests.test_features -->\n", "<!-- end -->\n"
# How a feature may be missing; anything else is a mistake in the row.
MISSING = (AssertionError, AttributeError, TypeError, ValueError, RuntimeError)


class Feature(NamedTuple):
    """A row: what it is called, what tries it, and a remark."""

    name: str
    attempt: Callable[[Any], None]
    note: str


FEATURES: list[Feature] = []


def feature(name: str, note: str = "") -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    def add(attempt: Callable[[Any], None]) -> Callable[[Any], None]:
        FEATURES.append(Feature(name, attempt, note))
        return attempt

    return add


# ---- rows -----------------------------------------------------------------------------------------------------------


@feature("layers, directions, dropout, projections, batch first, unbatched input")
def options(nn: Any) -> None:
    lstm = nn.LSTM(3, 8, 2, bidirectional=True, proj_size=2, dropout=0.1, batch_first=True)
    output, (h_n, c_n) = lstm(torch.randn(2, 5, 3))
    assert [tuple(part.shape) for part in (output, h_n, c_n)] == [(2, 5, 4), (4, 2, 2), (4, 2, 8)]
    output, h_n = nn.RNN(3, 8, nonlinearity="relu", bias=False)(torch.randn(5, 3))
    assert output.min() == 0
    assert torch.equal(output[-1:], h_n)


@feature("PackedSequence")
def packed(nn: Any) -> None:
    layer, sequences = nn.GRU(3, 8), [torch.randn(5, 3), torch.randn(2, 3)]
    _, h_n = layer(pack_sequence(sequences))
    for index, sequence in enumerate(sequences):
        torch.testing.assert_close(h_n[:, index], layer(sequence)[1])


@feature("pickle and deepcopy")
def copies(nn: Any) -> None:
    layer, x = nn.GRU(3, 8), torch.randn(5, 2, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], layer(x)[0])


@feature("token ids in place of one-hot vectors", "no one-hot is built, forward or backward")
def token_ids(nn: Any) -> None:
    ids = torch.randint(7, (5, 2))
    layer = nn.LSTM(7, 8)
    torch.testing.assert_close(layer(ids), layer(torch_nn.functional.one_hot(ids, 7).float()))


@feature(
    "lengths of a padded batch: `layer(x, lengths=...)`",
    "torch.nn: through PackedSequence, with the lengths on the CPU",
)
def lengths(nn: Any) -> None:
    layer, x = nn.LSTM(3, 8, bidirectional=True), torch.randn(5, 3, 3)
    output, (h_n, _) = layer(x, lengths=torch.tensor([2, 5, 1]))
    torch.testing.assert_close(output[:2, 0], layer(x[:2, 0])[0])
    torch.testing.assert_close(h_n[:, 0], layer(x[:2, 0])[1][0])
    assert not output[2:, 0].any()


@feature("empty sequences in a batch")
def empty_sequences(nn: Any) -> None:
    layer = nn.GRU(3, 8)
    if nn is rnnfast:
        output = layer(torch.randn(5, 3, 3), lengths=[2, 0, 5])[0]
    else:
        sequences = torch_nn.utils.rnn.pack_padded_sequence(torch.randn(5, 3, 3), [2, 0, 5], enforce_sorted=False)
        output = torch_nn.utils.rnn.pad_packed_sequence(layer(sequences)[0])[0]
    assert not output[:, 1].any()


@feature("resets within a sequence: `layer(x, hx, reset=mask)`", "to zeros, or with `reset_to=` to any state")
def resets(nn: Any) -> None:
    layer, x = nn.LSTM(3, 8, num_layers=2), torch.randn(6, 3, 3)
    mask = torch.zeros(6, 3, dtype=torch.bool)
    mask[4, 1] = True
    torch.testing.assert_close(layer(x, reset=mask)[0][4:, 1], layer(x[4:, 1])[0])


@feature("more than 65,535 steps", "cuDNN: no (pytorch#133751)")
def many_steps(nn: Any) -> None:
    with torch.no_grad():
        assert nn.RNN(2, 2)(torch.randn(66_000, 1, 2))[0].isfinite().all()


@feature("one step of a stream: `layer.step(x, state)`", "torch.nn: a call with T = 1")
def step(nn: Any) -> None:
    layer, x = nn.GRU(3, 8, num_layers=2), torch.randn(5, 2, 3)
    torch.testing.assert_close(layer.step(x[0])[0], layer(x)[0][0])


@feature("a model fed in pieces, its states kept: `Stream(model)`")
def stream(nn: Any) -> None:
    layer, x = nn.GRU(3, 8), torch.randn(5, 2, 3)
    stream = nn.Stream(layer)
    torch.testing.assert_close(torch.cat([stream(x[:3]), stream(x[3:])]), layer(x)[0])


@feature("cells: RNNCell, LSTMCell, GRUCell")
def cells(nn: Any) -> None:
    for cell, kind in (nn.RNNCell(3, 8), nn.RNN), (nn.LSTMCell(3, 8), nn.LSTM), (nn.GRUCell(3, 8), nn.GRU):
        layer, x = kind(3, 8), torch.randn(2, 2, 3)
        layer.load_state_dict({f"{name}_l0": parameter for name, parameter in cell.state_dict().items()})
        state = cell(x[1], cell(x[0]))
        torch.testing.assert_close(state[0] if kind is nn.LSTM else state, layer(x)[0][1])


@feature("token ids in cells")
def token_ids_in_cells(nn: Any) -> None:
    cell = nn.GRUCell(3, 8)
    torch.testing.assert_close(cell(torch.tensor([2])), cell(torch.tensor([[0.0, 0, 1]])))


@feature("backward in eval mode", "cuDNN: no (pytorch#5878)")
def backward_in_eval_mode(nn: Any) -> None:
    nn.LSTM(3, 8).eval()(torch.randn(5, 2, 3))[0].sum().backward()


@feature("double backward", "cuDNN: no (pytorch#5261)")
def double_backward(nn: Any) -> None:
    layer, x = nn.LSTM(3, 8), torch.randn(5, 2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert layer.weight_hh_l0.grad.any()


def sizes() -> list[tuple[int, int]]:
    """Hidden and batch sizes of several kinds, as what changes the bits of a product is their combination."""
    return [(hidden, batch) for hidden in (32, 100) for batch in (1, 5, 33)]


@feature("forward-mode derivatives: `torch.func.jvp`")
def forward_mode(nn: Any) -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    _, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (torch.ones_like(x),))
    near = (layer(x + 1e-3)[0] - layer(x - 1e-3)[0]) / 2e-3
    torch.testing.assert_close(tangent, near, rtol=0.05, atol=1e-3)


@feature("`torch.vmap` over inputs and states", "one scan")
def vmap(nn: Any) -> None:
    layer, x, h = nn.GRU(3, 4), torch.randn(6, 5, 2, 3), torch.randn(6, 1, 2, 4)
    with torch.no_grad():
        outputs = torch.vmap(lambda x, h: layer(x, h)[0])(x, h)
        torch.testing.assert_close(outputs[1], layer(x[1], h[1])[0])


@feature("`torch.vmap` over lengths and resets", "one scan")
def vmap_over_lengths(nn: Any) -> None:
    layer, x, lengths, mask = nn.GRU(3, 4), torch.randn(6, 5, 2, 3), torch.randint(6, (6, 2)), torch.rand(6, 5, 2) < 0.3
    with torch.no_grad():
        outputs = torch.vmap(lambda x, n, m: layer(x, lengths=n, reset=m)[0])(x, lengths, mask)
        torch.testing.assert_close(outputs[1], layer(x[1], lengths=lengths[1], reset=mask[1])[0])


@feature("`torch.vmap` over weights: an ensemble", "one scan")
def ensemble(nn: Any) -> None:
    layers, x = [nn.GRU(3, 4) for _ in range(3)], torch.randn(5, 2, 3)
    parameters, _ = torch.func.stack_module_state(layers)

    def call(parameters: Any) -> torch.Tensor:
        return torch.func.functional_call(layers[0], parameters, (x,))[0]

    with torch.no_grad():
        outputs = torch.vmap(call)(parameters)
        torch.testing.assert_close(outputs, torch.stack([layer(x)[0] for layer in layers]))


@feature("per-sample gradients: `torch.vmap` of `torch.func.grad`")
def per_sample_gradients(nn: Any) -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(6, 5, 3)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x.unsqueeze(1),))[0].square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    expected = torch.func.grad(loss)(parameters, x[1])
    torch.testing.assert_close({name: gradient[1] for name, gradient in found.items()}, expected)


@feature("`torch.compile(fullgraph=True)`", "one operator per layer, dynamic T and B")
def compiled(nn: Any) -> None:
    torch._dynamo.reset()
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x)[0], layer(x)[0])


@feature("lengths and resets in a graph", "dynamic T, B and lengths")
def compiled_lengths(nn: Any) -> None:
    torch._dynamo.reset()
    layer = nn.GRU(3, 4)
    graph = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for steps, lengths in ((5, [2, 5]), (7, [0, 7, 1])):
        x, mask = torch.randn(steps, len(lengths), 3), torch.rand(steps, len(lengths)) < 0.3
        options = {"lengths": torch.tensor(lengths), "reset": mask}
        torch.testing.assert_close(graph(x, **options), layer(x, **options))


@feature("a cell in a graph")
def compiled_cell(nn: Any) -> None:
    torch._dynamo.reset()
    cell, x = nn.LSTMCell(3, 4), torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(cell, fullgraph=True, backend="eager")(x), cell(x))


@feature("`torch.export` with dynamic T and B")
def exported(nn: Any) -> None:
    layer, sizes = nn.GRU(3, 4).eval(), {0: torch.export.Dim("steps", min=1), 1: torch.export.Dim("batch", min=1)}
    program = torch.export.export(layer, (torch.randn(5, 2, 3),), dynamic_shapes=(sizes,))
    x = torch.randn(9, 4, 3)
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


@feature("autocast and `GradScaler`", "on a CPU; torch.nn: RNN and LSTM, the GRU stays in float32")
def autocast(nn: Any) -> None:
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        layer, x = kind(3, 8), torch.randn(5, 2, 3)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)[0]
        assert output.dtype == torch.bfloat16
        torch.amp.GradScaler("cpu").scale(output.float().sum()).backward()
        assert layer.weight_hh_l0.grad.dtype == torch.float32


@feature("input or state of another dtype is refused")
def mixed_dtypes(nn: Any) -> None:
    layer, x = nn.GRU(3, 8), torch.randn(5, 2, 3)
    for arguments in ((x.double(),), (x, torch.zeros(1, 2, 8).double()), (x.bfloat16(),)):
        with pytest.raises((RuntimeError, ValueError)):
            layer(*arguments)


@feature("operations in `FlopCounterMode`", "torch.nn on a CPU: not the LSTM's")
def operations_are_counted(nn: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for layer in (nn.GRU(3, 4), nn.LSTM(3, 4)):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(5, 2, 3))
        assert counter.get_total_flops() > 0


@feature("a sequence's bits do not depend on the batch around it", "on the cpu backend")
def batch_invariance(nn: Any) -> None:
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        for hidden, batch in sizes():
            layer, x = kind(28, hidden), torch.randn(6, batch, 28)
            with torch.no_grad():
                assert torch.equal(layer(x)[0][:, :1], layer(x[:, :1])[0])


@feature("steps one by one are bit-for-bit equal to the whole sequence", "on the cpu backend, in float32 and float64")
def chunk_invariance(nn: Any) -> None:
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        for hidden, batch in sizes():
            layer, x, state, outputs = kind(28, hidden), torch.randn(35, batch, 28), None, []
            with torch.no_grad():
                for one in x.split(1):
                    output, state = layer(one, state)
                    outputs.append(output)
                assert torch.equal(torch.cat(outputs), layer(x)[0])


@feature("the same bits in every run, gradients too", "on a CPU")
def reproducible(nn: Any) -> None:
    layer, x = nn.LSTM(28, 64, num_layers=2, dropout=0.5), torch.randn(10, 33, 28)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@feature("a backend can be asked for by name, and the choice is explained", "`backend=`, `explain`, `backends()`")
def backends(nn: Any) -> None:
    layer = nn.GRU(3, 8, backend="reference")
    assert "asked for by name" in str(nn.explain(layer, torch.randn(5, 2, 3)))
    assert nn.backends()


@feature(
    "an existing model's layers swapped in place, types and references kept, and swapped back: `accelerate`, `restore`"
)
def accelerate(nn: Any) -> None:
    model = torch_nn.Sequential(torch_nn.GRU(3, 8))
    parameter, x = model[0].weight_hh_l0, torch.randn(5, 2, 3)
    expected = model(x)
    assert nn.accelerate(model).swapped
    assert type(model[0]) is torch_nn.GRU
    assert model[0].weight_hh_l0 is parameter
    torch.testing.assert_close(model(x), expected)
    assert nn.explain(model[0], x).backend in ("cpu", "torch")
    nn.restore(model)
    with pytest.raises(TypeError):
        nn.explain(model[0], x)


@feature("a size for each layer: `Stack`")
def layer_sizes(nn: Any) -> None:
    assert nn.Stack("gru", 3, [8, 4])(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


@feature("variational dropout: one mask per sequence", "on every backend")
def variational(nn: Any) -> None:
    stack = nn.Stack("rnn_relu", 3, [8, 8], input_dropout=0.2, dropout=0.5, bias=False)
    with torch.no_grad():
        stack.weight_hh_l0.zero_()
        stack.weight_hh_l1.zero_()
    output, _ = stack(torch.ones(5, 2, 3))
    assert torch.equal(output, output[:1].expand_as(output))


@feature("weight drop (AWD-LSTM)", "on every backend")
def weight_drop(nn: Any) -> None:
    stack = nn.Stack("lstm", 3, [32], weight_dropout=0.5)
    stack(torch.randn(5, 2, 3))[0].sum().backward()
    assert 0.4 < (stack.weight_hh_l0.grad == 0).float().mean() < 0.6  # of weights that were left out


@feature("residual and highway connections between layers", "on every backend")
def connections(nn: Any) -> None:
    x = torch.randn(5, 2, 3)
    for connection in ("residual", "highway"):
        stack, below, above = nn.Stack("gru", 3, [8, 8], connection=connection), nn.GRU(3, 8), nn.GRU(8, 8)
        weights = stack.state_dict()
        for layer, name in ((below, "_l0"), (above, "_l1")):
            layer.load_state_dict({own: weights[own.replace("_l0", name)] for own in layer.state_dict()})
        h = below(x)[0]
        t = torch.ones(8)
        if connection == "highway":
            t = (h @ weights["highway_weight_l1"].t() + weights["highway_bias_l1"]).sigmoid()
        carried = h if connection == "residual" else (1 - t) * h
        torch.testing.assert_close(stack(x)[0], t * above(h)[0] + carried)


@feature(
    "recurrent dropout, zoneout, layer normalisation",
    "native on a CPU; elsewhere a loop over torch's operations",
)
def extended_recurrence(nn: Any) -> None:
    for cell in ("lstm", "gru"):
        stack, x = nn.Stack(cell, 3, [8], recurrent_dropout=0.5, zoneout=0.1, layer_norm=True), torch.randn(5, 2, 3)
        outputs = [stack(x, generator=torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])


@feature("peephole connections of an LSTM", "native on a CPU; elsewhere a loop over torch's operations")
def peepholes(nn: Any) -> None:
    stack, x = nn.Stack("lstm", 3, [8], peepholes=True), torch.randn(5, 2, 3)
    stack(x)[0].sum().backward()
    assert stack.weight_peephole_l0.grad.any()


@feature("c of every step of an LSTM: `layer.states(x)`", "with gradients: native on a CPU, elsewhere on the reference")
def cell_states(nn: Any) -> None:
    layer, x = nn.LSTM(3, 8, num_layers=2), torch.randn(5, 2, 3)
    h, c = layer.states(x)
    torch.testing.assert_close(layer(x[2:], (h[1], c[1]))[0], layer(x)[0][2:])
    c.sum().backward()


# ---- the table ------------------------------------------------------------------------------------------------------


def has(library: Any, row: Feature) -> str:
    torch.manual_seed(0)
    try:
        row.attempt(library)
    except MISSING:
        return "no"
    return "yes"


def table() -> str:
    lines = ["| | rnnfast | torch.nn | |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {has(rnnfast, row)} | {has(torch_nn, row)} | {row.note} |" for row in FEATURES]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("row", [pytest.param(row, id=row.attempt.__name__) for row in FEATURES])
def test_rnnfast_has_it(row: Feature) -> None:
    row.attempt(rnnfast)


# torch.nn's own, of its projections, under vmap and under export.
@pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN",
    "ignore:There is a performance drop because we have not yet implemented the batching rule",
    "ignore:The tensor attributes self._flat_weights",
)
def test_the_page_shows_what_is_found() -> None:
    _, rest = PAGE.read_text().split(BEGIN)
    assert rest.split(END)[0] == table(), "docs/features.md differs; python -m tests.test_features writes it"


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
    print(table())
