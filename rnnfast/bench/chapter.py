"""The d2l chapter's own training and prediction over torch.nn layers: what a reader runs today.

The book's choices are kept because they are what is measured: one-hot input, mean cross entropy, gradient clipping in a
Python loop, SGD, and a prediction that goes character by character and records gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChapterModel(nn.Module):
    """A torch.nn layer on one-hot characters, and a linear head."""

    def __init__(self, layer: nn.RNNBase, vocab_size: int) -> None:
        super().__init__()
        self.rnn, self.vocab_size = layer, vocab_size
        self.linear = nn.Linear(layer.hidden_size, vocab_size)

    def forward(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (T*B, vocabulary) for ids (B, T), and the state."""
        one_hot = F.one_hot(ids.T.long(), self.vocab_size).to(torch.float32)
        output, state = self.rnn(one_hot, state)
        return self.linear(output.reshape(-1, output.shape[-1])), state

    def begin_state(self, batch_size: int) -> Any:
        """Zeros."""
        size = (self.rnn.num_layers, batch_size, self.rnn.hidden_size)
        return (torch.zeros(size), torch.zeros(size)) if self.rnn.mode == "LSTM" else torch.zeros(size)


def batches(ids: Tensor, batch_size: int, num_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T) in text order, sliced one after the other."""
    length = (len(ids) - 1) // batch_size * batch_size
    inputs = ids[:length].reshape(batch_size, -1)
    targets = ids[1 : 1 + length].reshape(batch_size, -1)
    for start in range(0, inputs.shape[1] // num_steps * num_steps, num_steps):
        yield inputs[:, start : start + num_steps], targets[:, start : start + num_steps]


def clip_gradients(model: nn.Module, largest: float) -> None:
    """Scale all gradients down to the norm `largest`, parameter by parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    norm = torch.sqrt(sum((torch.sum(p.grad**2) for p in parameters if p.grad is not None), torch.tensor(0.0)))
    if norm > largest:
        for p in parameters:
            assert p.grad is not None
            p.grad[:] *= largest / norm


def train_step(
    model: ChapterModel, updater: torch.optim.Optimizer, x: Tensor, y: Tensor, state: Any
) -> tuple[Tensor, Any]:
    """One batch (B, T): the loss and the state."""
    if state is None:
        state = model.begin_state(x.shape[0])
    else:
        for part in state if isinstance(state, tuple) else (state,):
            part.detach_()
    logits, state = model(x, state)
    loss = nn.functional.cross_entropy(logits, y.T.reshape(-1).long())
    updater.zero_grad()
    loss.backward()
    clip_gradients(model, 1)
    updater.step()
    return loss, state


def train_epoch(
    model: ChapterModel, updater: torch.optim.Optimizer, ids: Tensor, batch_size: int, num_steps: int
) -> tuple[float, int]:
    """One pass over the text: the sum of the losses of all tokens, and their number."""
    state, total, tokens = None, 0.0, 0
    for x, y in batches(ids, batch_size, num_steps):
        loss, state = train_step(model, updater, x, y, state)
        total += float(loss.detach() * y.numel())
        tokens += y.numel()
    return total, tokens


def predict(model: ChapterModel, prefix: list[int], length: int) -> list[int]:
    """The prefix and the `length` likeliest characters after it, one call of the model a character."""
    state, ids = model.begin_state(batch_size=1), [prefix[0]]

    def last() -> Tensor:
        return torch.tensor([ids[-1]]).reshape(1, 1)

    for known in prefix[1:]:
        _, state = model(last(), state)
        ids.append(known)
    for _ in range(length):
        logits, state = model(last(), state)
        ids.append(int(logits.argmax(dim=1).reshape(1)))
    return ids
