"""LSTM.states: h and c of every step, against one call of the layer for each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

import rnnfast
from rnnfast import dispatch

STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 6


def one_by_one(layer: Any, input: Tensor, hx: Any, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    states = []
    for t in range(len(input)):
        if reset is not None:
            hx = tuple(torch.where(reset[t][None, :, None], 0.0, part) for part in hx)
        _, hx = layer(input[t : t + 1], hx)
        states.append(hx)
    h, c = (torch.stack(part) for part in zip(*states, strict=True))
    return h, c


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "proj_size": 2}, {"num_layers": 2, "bias": False}])
def test_states_are_those_of_the_layer_run_step_by_step(options: Any, backend: str) -> None:
    layer = rnnfast.LSTM(INPUTS, HIDDEN, dtype=torch.float64, backend=backend, **options)
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    _, hx = layer(input)
    reset = torch.rand(STEPS, BATCH) < 0.4
    with torch.no_grad():
        torch.testing.assert_close(layer.states(input, hx), one_by_one(layer, input, hx))
        torch.testing.assert_close(layer.states(input, hx, reset=reset), one_by_one(layer, input, hx, reset))
        h, c = layer.states(input, hx)
        torch.testing.assert_close(layer(input[3:], (h[2], c[2]))[0], layer(input, hx)[0][3:])
        ids = torch.randint(INPUTS, (STEPS, BATCH))
        torch.testing.assert_close(layer.states(ids), layer.states(torch.nn.functional.one_hot(ids, INPUTS).double()))


def test_directions_batch_first_and_lengths() -> None:
    layer = rnnfast.LSTM(INPUTS, HIDDEN, bidirectional=True, batch_first=True)
    input = torch.randn(BATCH, STEPS, INPUTS)
    with torch.no_grad():
        h, c = layer.states(input, lengths=[2, 5, 0])
        output, (h_n, c_n) = layer(input, lengths=[2, 5, 0])
    torch.testing.assert_close(h.permute(2, 0, 1, 3).flatten(2), output)
    assert c.shape == (STEPS, 2, BATCH, HIDDEN)
    assert not c[:, :, 2].any()
    assert not c[2:, :, 0].any()
    torch.testing.assert_close((h[1, 0, 0], c[1, 0, 0]), (h_n[0, 0], c_n[0, 0]))
    torch.testing.assert_close((h[0, 1, :2], c[0, 1, :2]), (h_n[1, :2], c_n[1, :2]))


def test_empty_sequences() -> None:
    h, c = rnnfast.LSTM(INPUTS, HIDDEN, 2).states(torch.randn(STEPS, BATCH, INPUTS), lengths=[0, 0, 0])
    assert h.shape == c.shape == (STEPS, 2, BATCH, HIDDEN)
    assert not h.any()
    assert not c.any()


@pytest.mark.parametrize("options", [{}, {"proj_size": 2, "bias": False}])
def test_every_c_has_gradients(options: Any, backend: str) -> None:
    layer = rnnfast.LSTM(INPUTS, HIDDEN, 2, dtype=torch.float64, backend=backend, **options)
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(2, BATCH, size, dtype=torch.float64) for size in (layer.proj_size or HIDDEN, HIDDEN))
    reset = torch.rand(STEPS, BATCH) < 0.4
    leaves = [input, *(part.requires_grad_() for part in hx), *layer.parameters()]
    for mask in (None, reset):
        gradients = []
        for h, c in (layer.states(input, hx, reset=mask), one_by_one(layer, input, hx, mask)):
            gradients.append(torch.autograd.grad(c.sin().sum() + h.square().sum(), leaves))
        torch.testing.assert_close(*gradients)


def test_both_directions_and_each_result_alone_have_gradients(backend: str) -> None:
    layer = rnnfast.LSTM(INPUTS, HIDDEN, bidirectional=True, dtype=torch.float64, backend=backend)
    oracle = copy.deepcopy(layer)
    oracle.backend = "reference"
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64)
    for which in (0, 1):
        gradients = []
        for one in (layer, oracle):
            loss = one.states(input, lengths=[2, 5, 0])[which].square().sum()
            gradients.append(torch.autograd.grad(loss, list(one.parameters())))
        torch.testing.assert_close(*gradients)


def test_higher_derivatives_and_transforms() -> None:
    layer = rnnfast.LSTM(2, 3, dtype=torch.float64)
    input = torch.randn(3, 2, 2, dtype=torch.float64)

    lane = rnnfast.functional.Weights(*(parameter.detach() for parameter in layer.parameters()))
    hx = torch.zeros(1, 2, 3).double(), torch.zeros(1, 2, 3).double()

    def function(input: Tensor, w_hh: Tensor) -> Any:
        return rnnfast.functional.states(input, hx, [lane._replace(w_hh=w_hh)])

    tensors = [input.requires_grad_(), lane.w_hh.clone().requires_grad_()]
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)
    detached = [tensor.detach() for tensor in tensors]
    expected = torch.autograd.functional.jacobian(function, tuple(detached))
    torch.testing.assert_close(torch.func.jacrev(function, (0, 1))(*detached), expected)
    torch.testing.assert_close(torch.func.jacfwd(function, (0, 1))(*detached), expected)


def test_what_a_transform_may_differentiate_asks_for_gradients_of_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within vmap no tensor says that a gradient is wanted; a GPU's backends would give none."""
    asked, choose_name = [], dispatch.choose_name
    monkeypatch.setattr(dispatch, "choose_name", lambda *given: (asked.append(given[-1]), choose_name(*given))[1])
    layer = rnnfast.LSTM(INPUTS, HIDDEN).requires_grad_(False)
    inputs = torch.randn(3, STEPS, BATCH, INPUTS)

    def total(inputs: Tensor) -> Tensor:
        return vmap(lambda input: layer.states(input)[1].sum())(inputs).sum()

    assert grad(total)(inputs).any()
    with torch.no_grad():
        total(inputs)
    assert asked == [(dispatch.CELL_STATE_GRADIENTS,), (dispatch.CELL_STATES,)]


def test_torch_func_in_any_order(backend: str) -> None:
    layer = rnnfast.LSTM(INPUTS, HIDDEN, dtype=torch.float64, backend=backend)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    inputs = torch.randn(3, STEPS, BATCH, INPUTS, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], input: Tensor) -> Tensor:
        def states(input: Tensor) -> Tensor:
            return layer.states(input, lengths=[2, 5, 0])[1].sin().sum()

        return functional_call(_Calling(layer, states), {f"layer.{k}": v for k, v in parameters.items()}, (input,))

    expected = [grad(loss)(parameters, input) for input in inputs]
    own = [torch.autograd.grad(layer.states(x, lengths=[2, 5, 0])[1].sin().sum(), layer.weight_hh_l0) for x in inputs]
    torch.testing.assert_close([e["weight_hh_l0"] for e in expected], [g for (g,) in own])
    per_sample = vmap(grad(loss), (None, 0))(parameters, inputs)
    outside = grad(lambda parameters: vmap(loss, (None, 0))(parameters, inputs).sum())(parameters)
    for name in parameters:
        stacked = torch.stack([e[name] for e in expected])
        torch.testing.assert_close(per_sample[name], stacked)
        torch.testing.assert_close(outside[name], stacked.sum(0))


class _Calling(torch.nn.Module):
    """What functional_call needs: a module that holds the layer and calls a function."""

    def __init__(self, layer: Any, function: Any) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, input: Tensor) -> Any:
        return self.function(input)


def test_the_states_are_an_operator(backend: str) -> None:
    op = getattr(torch.ops.rnnfast, f"scan_{backend}_states")
    backward_op = getattr(torch.ops.rnnfast, f"scan_{backend}_states_backward")
    rows, sizes = torch.randn(6, INPUTS), torch.tensor([3, 2, 1])
    w_ih, w_hh, w_hr = torch.randn(2, 4 * HIDDEN, INPUTS), torch.randn(2, 4 * HIDDEN, 2), torch.randn(2, 2, HIDDEN)
    states = torch.randn(2, 3, 2), torch.randn(2, 3, HIDDEN)
    layer = (rows, w_ih, w_hh, None, None, w_hr, *states, sizes, "lstm", True)
    torch.library.opcheck(op.default, (*layer, True))
    output, cells, c_n, tape = op(*layer, True)
    gradients = torch.randn_like(output), torch.randn_like(cells), torch.randn_like(c_n)
    torch.library.opcheck(backward_op.default, (*gradients, *layer, output, tape, True, True))
    assert op(*layer, False)[3].shape == (0,)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, raised by its compiler
def test_in_a_graph(backend: str) -> None:
    torch._dynamo.reset()
    layer = rnnfast.LSTM(INPUTS, HIDDEN, 2, bidirectional=True, proj_size=2, backend=backend)
    operators: list[list[str]] = []

    def record(module: Any, inputs: Any) -> Any:
        found = [str(node.target) for node in module.graph.nodes if "rnnfast" in str(node.target)]
        operators.append([name for name in found if "cut" not in name])
        return aot_eager(module, inputs)

    graph = torch.compile(layer.states, fullgraph=True, dynamic=True, backend=record)
    for steps, batch in ((5, 3), (7, 2), (9, 4)):
        ragged = {"lengths": torch.randint(steps + 1, (batch,)), "reset": torch.rand(steps, batch) < 0.3}
        for arguments in ({}, ragged):
            input = torch.randn(steps, batch, INPUTS)
            results = []
            for function in (layer.states, graph):
                h, c = function(input, **arguments)
                gradients = torch.autograd.grad(h.sin().sum() + c.square().sum(), list(layer.parameters()))
                results.append([h, c, *gradients])
            torch.testing.assert_close(*results)
            with torch.no_grad():
                torch.testing.assert_close(graph(input, **arguments), layer.states(input, **arguments))
    assert (
        operators == [[f"rnnfast.scan_{backend}_states.default"] * layer.num_layers] * 4
    )  # with gradients and without


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool, backend: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnfast.LSTM(INPUTS, HIDDEN, 2, backend=backend)

        def forward(self, input: Tensor, lengths: Tensor) -> Any:
            return self.layer.states(input, lengths=lengths)

    model, batch = Model(), torch.export.Dim("batch", min=1, max=99)
    sizes = {0: torch.export.Dim("steps", min=1, max=99), 1: batch}
    arguments = torch.randn(STEPS, BATCH, INPUTS), torch.tensor([2, 5, 0])
    program = torch.export.export(model, arguments, dynamic_shapes=(sizes, {0: batch}), strict=strict)
    arguments = torch.randn(9, 2, INPUTS), torch.tensor([9, 4])
    torch.testing.assert_close(program.module()(*arguments), model(*arguments))


def test_a_backend_asked_for_by_name_that_cannot_says_so() -> None:
    layer, input = rnnfast.LSTM(INPUTS, HIDDEN, backend="torch"), torch.randn(STEPS, BATCH, INPUTS)
    with pytest.raises(RuntimeError, match="no gradients of c of every step, which the reference has"):
        layer.states(input)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no c of every step"):
        layer.states(input)


def test_mistaken_calls() -> None:
    layer = rnnfast.LSTM(INPUTS, HIDDEN)
    with pytest.raises(ValueError, match="3D batched input"):
        layer.states(torch.randn(STEPS, INPUTS))
    with pytest.raises(ValueError, match="input's shape without features"):
        layer.states(torch.randn(STEPS, BATCH, INPUTS), reset=torch.zeros(BATCH, STEPS, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="h_0 must have shape"):
        layer.states(torch.randn(STEPS, BATCH, INPUTS), (torch.zeros(1, 1, HIDDEN),) * 2)
    for h, c in ((BATCH + 1, BATCH), (BATCH, BATCH + 1)):
        hx = torch.zeros(1, h, HIDDEN), torch.zeros(1, c, HIDDEN)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[[01]\] size"):
            layer.states(torch.randn(STEPS, BATCH, INPUTS), hx, lengths=[2, 5, 0])
