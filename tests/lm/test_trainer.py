"""The steps of training: what one computes, the perplexity of many, and the learning rate."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnnfast.backends import cpu
from rnnfast.lm import TrainConfig, load_corpus, train, train_step
from rnnfast.lm.config import build_model
from rnnfast.lm.trainer import Trainer, evaluate, learning_rate_factor
from tests.lm.test_train import SMALL


def perplexity_by_torch(model: Any, inputs: Tensor, targets: Tensor, dropout: float) -> float:
    """Of all tokens of batches (N, T, B) at once, in torch's own layers, the state carried from batch to batch."""
    layer = nn.LSTM(model.rnn.input_size, model.rnn.hidden_size)
    layer.load_state_dict(model.rnn.state_dict())
    state, logits = None, []
    torch.manual_seed(1)
    with torch.no_grad():
        for x in inputs:
            hidden, state = layer(F.one_hot(x, layer.input_size).float(), state)
            logits.append(model.head(F.dropout(hidden, dropout)))
        return math.exp(F.cross_entropy(torch.stack(logits).flatten(0, 2), targets.flatten()))


def test_perplexity_is_that_of_the_whole_text() -> None:
    config = replace(SMALL, cell="lstm", dropout=0.4, validation=0.2, lr=1e-30)  # no step moves a weight
    corpus = load_corpus(config.corpus, max_tokens=config.max_tokens, validation=config.validation)
    trainer = Trainer(config, corpus)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(4)  # for texts of which the state matters
    drawn = trainer.batches.generator.get_state()
    train_batches, validation = trainer.batches.epoch(), trainer.validation
    assert validation is not None
    assert min(len(train_batches[0]), len(validation[0])) >= 3
    expected = perplexity_by_torch(trainer.model, *train_batches, config.dropout)
    torch.manual_seed(1)  # for the same masks of dropout
    trainer.batches.generator.set_state(drawn)
    record = trainer.run_epoch(lambda *_: None)
    assert record["perplexity"] == pytest.approx(expected, rel=1e-5)
    expected = perplexity_by_torch(trainer.model, *validation, 0.0)
    assert record["validation_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert evaluate(trainer.model, *validation) == record["validation_perplexity"]


@pytest.mark.parametrize("options", [{"cell": "lstm"}, {"scratch": True}], ids=["lstm", "scratch"])
def test_bfloat16_computes_in_it_and_learns_as_float32_does(options: dict[str, Any]) -> None:
    config = replace(SMALL, **options)
    half = replace(config, precision="bfloat16")
    torch.manual_seed(0)
    model = build_model(half, 28)
    optimizer, ids = torch.optim.SGD(model.parameters(), lr=1), torch.randint(28, (10, 4))
    loss, state = train_step(model, optimizer, ids, ids, None, 1.0, half.precision)
    assert loss.dtype == torch.float32
    assert {part.dtype for part in (state if isinstance(state, tuple) else (state,))} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert train(half).perplexity == pytest.approx(train(config).perplexity, rel=0.02)


@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_train_step_is_the_chapters(clip: float) -> None:
    """Against clipping, if there is any, and SGD written out."""
    torch.manual_seed(0)
    model: Any = build_model(replace(SMALL, scratch=True), 28)
    expected = build_model(replace(SMALL, scratch=True), 28)
    expected.load_state_dict(model.state_dict())
    ids = torch.randint(28, (11, 4))
    with torch.no_grad():
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            p *= 30  # large enough for a gradient above the norm
            q *= 30
    loss, state = train_step(model, torch.optim.SGD(model.parameters(), lr=0.7), ids[:-1], ids[1:], None, clip)
    logits, _ = expected(ids[:-1])
    expected_loss = -logits.log_softmax(-1).gather(-1, ids[1:, :, None]).mean()
    gradients = torch.autograd.grad(expected_loss, list(expected.parameters()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert norm > 0.01
    torch.testing.assert_close(loss, expected_loss.detach())
    assert not state.requires_grad
    for p, q, g in zip(model.parameters(), expected.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.detach(), (q - 0.7 * g * (clip / norm if clip else 1)).detach())


@pytest.mark.parametrize("stalled", [True, False])
def test_the_optimizer_takes_one_thread_while_scans_do(stalled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_stalled", lambda: stalled)
    threads: list[int] = []

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            threads.append(torch.get_num_threads())
            raise RuntimeError("a step that fails")

    model = build_model(TrainConfig(cell="rnn", hidden_size=8), 7)
    ids, before = torch.randint(7, (5, 3)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="a step that fails"):
            train_step(model, Failing(model.parameters(), lr=0.1), ids, ids, None, 1.0)
        assert threads == [1 if stalled else 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_learning_rates() -> None:
    factor = learning_rate_factor(replace(SMALL, schedule="cosine", warmup=4), total_steps=104)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(54) == pytest.approx(0.5)
    assert factor(104) == pytest.approx(0.0)
    assert factor(200) == pytest.approx(0.0)
    assert learning_rate_factor(SMALL, 100)(99) == 1.0
