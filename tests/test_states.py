"""LSTM.states: h and c of every step, against one call of the layer for each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import rnnfast

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
