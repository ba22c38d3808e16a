"""Language models whose parts were replaced, patched or hooked: they are trained, and write, as they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import rnnfast
from rnnfast.lm import RNNLM, generate, train_step
from rnnfast.lm.parts import parts_of
from tests.lm.test_backpropagation import UNITS, VOCABULARY, B, T, batches, model_of


class DoublingHead(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoublingLayer(rnnfast.LSTM):
    def forward(self, input: Tensor, hx: Any = None, **options: Any) -> Any:
        output, state = super().forward(input, hx, **options)
        return 2 * output, state


def doubled_states(model: RNNLM, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    output, state = RNNLM.hidden_states(model, ids, state)
    return 2 * output, state


OTHER_PARTS: dict[str, Callable[[RNNLM], Any]] = {
    "projected": lambda model: setattr(model, "rnn", rnnfast.LSTM(VOCABULARY, 32, proj_size=UNITS)),
    "torch.nn's": lambda model: setattr(model, "rnn", nn.LSTM(VOCABULARY, UNITS)),
    "no bias": lambda model: setattr(model, "head", nn.Linear(UNITS, VOCABULARY, bias=False)),
    "several heads": lambda model: setattr(model, "head", nn.Sequential(nn.Tanh(), nn.Linear(UNITS, VOCABULARY))),
    "subclass": lambda model: setattr(model, "head", DoublingHead(UNITS, VOCABULARY)),
    "patched head": lambda model: setattr(model.head, "forward", lambda rows: 3 * rows @ model.head.weight.t()),
    "patched model": lambda model: setattr(model, "hidden_states", functools.partial(doubled_states, model)),
    "subclass of a layer": lambda model: setattr(model, "rnn", DoublingLayer(VOCABULARY, UNITS)),
    "batch first": lambda model: setattr(model, "rnn", rnnfast.LSTM(VOCABULARY, UNITS, batch_first=True)),
    "patched": lambda model: setattr(model.rnn, "forward", lambda *_: (torch.zeros(T, B, UNITS), (torch.zeros(()),))),
}


@pytest.mark.parametrize("part", OTHER_PARTS)
def test_a_model_with_other_parts_is_trained_as_it_computes(part: str) -> None:
    (inputs, targets), found = batches(), []
    if part == "torch.nn's":  # which takes no ids
        inputs = nn.functional.one_hot(inputs, VOCABULARY).float()
    for step in (train_step, plain_step):
        model = model_of("lstm")
        OTHER_PARTS[part](model)
        assert (parts_of(model) is None) == (part != "no bias")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        torch.manual_seed(3)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.2, 0.2)
        state = None
        for x, y in zip(inputs, targets, strict=True):
            loss, state = step(model, optimizer, x, y, None if part == "batch first" else state, 1.0)
        found.append([loss, *model.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def plain_step(model: RNNLM, optimizer: Any, x: Tensor, y: Tensor, state: Any, clip: float) -> Any:
    optimizer.zero_grad()
    logits, state = model(x, state)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_([*model.parameters()], clip)
    optimizer.step()
    return loss.detach(), None if state is None else tuple(part.detach() for part in state)


@pytest.mark.parametrize(
    "part",
    ["projected", "no bias", "several heads", "subclass", "patched head", "patched model", "subclass of a layer"],
)
def test_a_model_with_other_parts_writes_what_it_computes(part: str) -> None:
    model, written = model_of("lstm"), [1, 2]
    OTHER_PARTS[part](model)
    with torch.no_grad():
        for _ in range(8):
            written.append(int(model(torch.tensor(written).unsqueeze(1))[0][-1, 0].argmax()))
    assert list(generate(model, [1, 2], 8)) == written[2:]


def test_a_pruned_head_learns_what_is_left_of_it() -> None:
    model, (inputs, targets) = model_of("gru"), batches()
    prune.l1_unstructured(model.head, "weight", 0.5)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(4):
        losses.append(float(train_step(model, optimizer, inputs[0], targets[0], None, 1.0)[0]))
    assert sorted(losses, reverse=True) == losses
    assert not model.head.weight_orig.grad[model.head.weight_mask == 0].any()
    assert model.head.weight_orig.grad.any()
