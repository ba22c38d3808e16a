"""The gradient of a model's loss: past autograd with the same bits, by autograd where that is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnnfast.lm import RNNLM, RNNLMScratch, train_step
from rnnfast.lm.backpropagation import backpropagate

module = importlib.import_module("rnnfast.lm.backpropagation")
VOCABULARY, T, B = 28, 12, 4
MODELS: dict[str, dict[str, Any]] = {
    "rnn": {},
    "rnn_relu": {"num_layers": 2},
    "lstm": {"num_layers": 3},
    "gru": {},
}


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randint(VOCABULARY, (T + 1, B)) for _ in range(count)]


def model_of(cell: str, **options: Any) -> RNNLM:
    torch.manual_seed(2)
    model = RNNLM(VOCABULARY, cell, 24, **options)
    model(batches()[0])  # leaves the plan of direct calls
    return model


@pytest.fixture
def by_autograd(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The losses that autograd has gone back from."""
    calls: list[str] = []
    loss_of = module.loss_of

    def spying(*args: Any) -> Any:
        calls.append("loss")
        return loss_of(*args)

    monkeypatch.setattr(module, "loss_of", spying)
    return calls


def trained(model: RNNLM) -> list[Tensor]:
    """Losses, states, gradients and parameters of some steps."""
    optimizer, state, found = torch.optim.SGD(model.parameters(), lr=0.5), None, []
    for batch in batches():
        loss, state = train_step(model, optimizer, batch[:-1], batch[1:], state, 1.0)
        found += [loss, *(state if isinstance(state, tuple) else (state,))]
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [*found, *(parameter.detach() for parameter in model.parameters())]


@pytest.mark.parametrize("cell", MODELS)
def test_it_has_the_bits_of_autograd(cell: str, by_autograd: list[str]) -> None:
    found = trained(model_of(cell, **MODELS[cell]))
    assert not by_autograd
    watched = model_of(cell, **MODELS[cell])
    seen: list[Tensor] = []
    watched.rnn.weight_hh_l0.register_hook(seen.append)
    expected = trained(watched)
    assert len(by_autograd) == len(seen) == 3
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_it_adds_to_the_gradients_there_are(by_autograd: list[str]) -> None:
    model, (batch, *_) = model_of("gru"), batches()
    backpropagate(model, batch[:-1], batch[1:], None)
    held = [parameter.grad for parameter in model.parameters()]
    once = [gradient.clone() for gradient in held if gradient is not None]
    backpropagate(model, batch[:-1], batch[1:], None)
    assert not by_autograd
    for parameter, gradient, first in zip(model.parameters(), held, once, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, 2 * first)


class Doubled(RNNLM):
    def hidden_states(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = super().hidden_states(ids, state)
        return 2 * output, state


def subclass() -> nn.Module:
    torch.manual_seed(2)
    return Doubled(VOCABULARY, "gru", 24)


def hooked_head() -> nn.Module:
    model = model_of("gru")
    model.head.bias.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def frozen_head() -> nn.Module:
    model = model_of("gru")
    model.head.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: model_of("gru", embedding_size=6),
        lambda: model_of("lstm", dropout=0.5),
        lambda: model_of("rnn", bidirectional=True),
        lambda: model_of("gru", backend="reference"),
        lambda: model_of("gru").double(),
        lambda: RNNLMScratch(VOCABULARY, 24),
        subclass,
        hooked_head,
        frozen_head,
    ],
)
def test_autograd_does_the_rest(build: Callable[[], Any], by_autograd: list[str]) -> None:
    model, (batch, *_) = build(), batches()
    loss, _ = backpropagate(model, batch[:-1], batch[1:], None)
    assert by_autograd == ["loss"]
    assert not loss.requires_grad
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_is_autograds(by_autograd: list[str]) -> None:
    model, (batch, *_) = model_of("gru"), batches()
    backpropagate(model, batch[:-1], batch[1:], None, "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        backpropagate(model, batch[:-1], batch[1:], None)
    assert by_autograd == ["loss", "loss"]


@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_a_token_outside_the_vocabulary(which: str) -> None:
    model, (batch, *_) = model_of("gru"), batches()
    inputs, targets = batch[:-1].clone(), batch[1:].clone()
    (inputs if which == "inputs" else targets)[3, 1] = VOCABULARY
    with pytest.raises((IndexError, RuntimeError), match=str(VOCABULARY)):
        backpropagate(model, inputs, targets, None)
    assert all(parameter.grad is None for parameter in model.parameters())
