"""Streaming: steps one by one against the whole sequence, and weights that change between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rnnfast

LAYERS = ["RNN", "LSTM", "GRU"]


def stream(layer: Any, input: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
    outputs = []
    for x in input:
        output, state = layer.step(x, state)
        outputs.append(output)
    return torch.stack(outputs), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bias": False}, {"num_layers": 2, "batch_first": True}])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_give_the_bits_of_the_whole_sequence(
    name: str, options: dict[str, Any], token_ids: bool, dtype: torch.dtype
) -> None:
    layer = getattr(rnnfast, name)(5, 33, backend="cpu", dtype=dtype, **options)
    input = torch.randint(5, (9, 3)) if token_ids else torch.randn(9, 3, 5, dtype=dtype)
    whole, final = layer(input.transpose(0, 1) if layer.batch_first else input)
    whole = whole.transpose(0, 1) if layer.batch_first else whole
    with torch.no_grad():
        output, state = stream(layer, input)
    torch.testing.assert_close((output, state), (whole, final), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_steps_on_every_backend_with_gradients(name: str, backend: str) -> None:
    layer = getattr(rnnfast, name)(5, 8, num_layers=2, dtype=torch.float64, backend=backend)
    input = torch.randn(6, 2, 5, dtype=torch.float64)
    gradients = []
    for output in (layer(input)[0], stream(layer, input)[0]):
        gradients.append(torch.autograd.grad(output.square().sum(), list(layer.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("backend", ["reference", "cpu", "torch"])
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_for_training(name: str, backend: str) -> None:
    layer = getattr(rnnfast, name)(5, 8, num_layers=2, dropout=0.5, backend=backend)
    input = torch.randn(6, 2, 5)
    assert not torch.equal(layer.step(input[0])[0], layer.step(input[0])[0])
    layer.eval()
    torch.testing.assert_close(stream(layer, input), layer(input))


def test_projected_steps(backend: str) -> None:
    layer = rnnfast.LSTM(5, 8, proj_size=3, backend=backend)
    input = torch.randn(6, 2, 5)
    with torch.no_grad():
        torch.testing.assert_close(stream(layer, input), layer(input))


def test_inference_mode() -> None:
    layer = rnnfast.LSTM(5, 8, backend="cpu")
    input = torch.randn(6, 2, 5)
    expected = layer(input)[0]
    with torch.inference_mode():
        torch.testing.assert_close(layer(input)[0], expected, rtol=0, atol=0)
        made_here = rnnfast.LSTM(5, 8, backend="cpu")
        made_here.load_state_dict(layer.state_dict())
        torch.testing.assert_close(made_here(input)[0], expected, rtol=0, atol=0)
    with torch.no_grad():  # where calls may follow a plan, which goes by versions, that these weights do not have
        for _ in range(2):
            torch.testing.assert_close(made_here(input)[0], expected, rtol=0, atol=0)


def test_errors_are_clear() -> None:
    with pytest.raises(RuntimeError, match="it has no step"):
        rnnfast.GRU(3, 4, bidirectional=True).step(torch.randn(2, 3))
    layer = rnnfast.GRU(3, 4)
    with pytest.raises(RuntimeError, match=r"a step takes \(B, 3\) input"):
        layer.step(torch.randn(5, 2, 3))
    with pytest.raises(RuntimeError, match=r"h_0 must have shape \(1, 2, 4\)"):
        layer.step(torch.randn(2, 3), torch.randn(1, 3, 4))
    with pytest.raises(IndexError, match="token ids"):
        layer.step(torch.tensor([3]))
