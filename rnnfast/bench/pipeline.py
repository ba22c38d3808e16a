"""The whole pipeline beside the d2l chapter's own loop over torch.nn layers: tokens/s trained, characters/s generated.

One model, B=32, T=35, the first 10,000 characters of the text, SGD with learning rate 1 and gradients clipped to 1.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import rnnfast
from rnnfast import lm
from rnnfast.bench import chapter
from rnnfast.bench.measure import Turn, Work, alternate_with_limits, check_same, timed
from rnnfast.bench.report import OURS, Row
from rnnfast.cells import LAYERS, cell_named

CHAPTER, CHAPTER_NO_GRAD = "the chapter's loop", "the chapter's loop without gradients"
PREFIX = "time traveller"
BATCH = 32
EPOCHS = 3  # of a call
CHECKED_STEPS = 3
CHECKED_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass(frozen=True)
class PipelineCase:
    """A model and what is done with it. `length`: characters to generate."""

    cell: str
    hidden_size: int
    what: str
    dtype: str = "float32"
    length: int = 200

    @property
    def label(self) -> str:
        return f"{self.what} {self.cell} H={self.hidden_size}" + ("" if self.dtype == "float32" else f" {self.dtype}")

    def work(self, tokens: int, vocab_size: int) -> Work:
        """Layer and head, of token ids: no input product. Loss, clipping and update are not in it."""
        cell = cell_named(self.cell)
        units = float(tokens * self.hidden_size)
        weights, of_head = cell.gates * self.hidden_size**2, self.hidden_size * vocab_size
        recurrent, head = 2.0 * tokens * weights, 2.0 * tokens * of_head
        if self.what == "generation":  # the head waits for the layer, and the next step for it
            size = 4 * (weights + of_head)
            return Work(self.cell, 1, self.hidden_size, recurrent + head, size, tokens, 0.0, 0.0, units, 0.0)
        sizes, steps = (self.cell, BATCH, self.hidden_size), 2 * tokens // BATCH  # forward and backward
        return Work(*sizes, 2 * recurrent, 4 * weights, steps, 2 * head, recurrent + head, units, units)

    def config(self, corpus: str, backend: str) -> lm.TrainConfig:
        """The chapter's settings."""
        options: Any = {"cell": self.cell, "hidden_size": self.hidden_size, "backend": backend, "precision": self.dtype}
        return lm.TrainConfig(corpus=corpus, device="cpu", sample_every=0, epochs=EPOCHS, batch_size=BATCH, **options)


@functools.cache
def load_text() -> lm.Corpus:
    """The chapter's text, or the built-in one: their letters and sizes are the same, and so is the work."""
    return lm.load_corpus(max_tokens=10_000)


def _models(case: PipelineCase, corpus: lm.Corpus, backend: str) -> tuple[Any, chapter.ChapterModel]:
    """Ours and the chapter's, with the same weights; the global random state is left as it was."""
    vocab_size = len(corpus.vocab)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours: Any = lm.build_model(case.config(corpus.name, backend), vocab_size)
        layer, options = LAYERS[case.cell]
        theirs = chapter.ChapterModel(getattr(nn, layer)(vocab_size, case.hidden_size, **options), vocab_size)
    theirs.rnn.load_state_dict(ours.rnn.state_dict())
    theirs.linear.load_state_dict(ours.head.state_dict())
    return ours, theirs


def check_training(case: PipelineCase, corpus: lm.Corpus, backend: str) -> None:
    """Assert that some steps of training give the same losses and parameters.

    Raises:
        Disagreement: they do not.
    """
    ours, theirs = _models(case, corpus, backend)
    config = case.config(corpus.name, backend)
    optimizers = [torch.optim.SGD(model.parameters(), lr=config.lr) for model in (ours, theirs)]
    batches = [*itertools.islice(chapter.batches(corpus.train, config.batch_size, config.steps), CHECKED_STEPS)]
    ids, targets = (torch.stack([part.T for part in parts]).contiguous() for parts in zip(*batches, strict=True))
    losses, their_losses = torch.zeros(2, dtype=torch.float64)
    lm.train_steps(ours, optimizers[0], ids, targets, None, losses, config.clip, case.dtype)
    their_state = None
    for x, y in batches:
        loss, their_state = chapter.train_step(theirs, optimizers[1], x, y, their_state)
        their_losses += loss.detach()
    results, truth = (
        {"loss": losses} | {f"parameter {i}": p.detach() for i, p in enumerate(model.parameters())}
        for losses, model in ((losses, ours), (their_losses, theirs))
    )
    check_same(OURS, results, truth, CHECKED_TOLERANCE[case.dtype], case.label)


def measure_training(case: PipelineCase, seconds: float, backend: str = "auto") -> Row:
    """`lm.train`, by its own tokens/s (start-up is not in it), beside the chapter's epochs.

    Raises:
        Disagreement: they do not train the same model.
    """
    corpus = load_text()
    check_training(case, corpus, backend)
    config = case.config(corpus.name, backend)
    ours, theirs = _models(case, corpus, backend)
    updater = torch.optim.SGD(theirs.parameters(), lr=config.lr)

    def train(calls: int) -> float:
        seconds_a_token = 0.0
        for _ in range(calls):
            with torch.random.fork_rng(devices=[]):
                seconds_a_token += 1 / lm.train(config, report=lambda line: None).tokens_per_second
        return seconds_a_token * tokens

    def train_chapter() -> int:
        epochs = (
            chapter.train_epoch(theirs, updater, corpus.train, config.batch_size, config.steps) for _ in range(EPOCHS)
        )
        return sum(tokens for _, tokens in epochs)

    tokens = train_chapter()
    turns: dict[str, Turn] = {OURS: train, CHAPTER: timed(train_chapter)}
    return _measure(case, corpus, ours, turns, seconds, tokens)


def measure_generation(case: PipelineCase, seconds: float, backend: str = "auto") -> Row:
    """`lm.generate` beside the chapter's prediction, as it is and under `torch.no_grad`; greedy.

    Raises:
        Disagreement: they write different texts.
    """
    corpus = load_text()
    ours, theirs = _models(case, corpus, backend)
    prefix = corpus.vocab.encode(list(PREFIX))

    def write() -> list[int]:
        return list(lm.generate(ours, prefix, case.length))

    def predict() -> list[int]:
        return chapter.predict(theirs, prefix, case.length)

    expected = torch.tensor(predict()[len(prefix) :])
    check_same(OURS, {"text": torch.tensor(write())}, {"text": expected}, 0.0, case.label)
    turns = {OURS: timed(write), CHAPTER: timed(predict), CHAPTER_NO_GRAD: timed(torch.no_grad()(predict))}
    return _measure(case, corpus, ours, turns, seconds, case.length)


def _measure(
    case: PipelineCase, corpus: lm.Corpus, ours: nn.Module, turns: dict[str, Turn], seconds: float, tokens: int
) -> Row:
    work = case.work(tokens, len(corpus.vocab))
    samples, limits = alternate_with_limits(turns, seconds, work=work if case.dtype == "float32" else None)
    where = _describe(case, corpus), _backend(ours, corpus)
    return Row(case.label, *where, samples, flops=work.flops, limits=limits, tokens=tokens)


def _describe(case: PipelineCase, corpus: lm.Corpus) -> dict[str, Any]:
    return asdict(case) | {"corpus": corpus.name, "vocabulary": len(corpus.vocab), "tokens": len(corpus.train)}


def _backend(model: Any, corpus: lm.Corpus) -> str:
    return rnnfast.explain(model.rnn, corpus.train[:1, None]).backend
