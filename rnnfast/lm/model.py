"""The language models: recurrent layers from token ids to the logits of the next token.

Each is called as `logits, state = model(ids, state)`: ids (T, B), int64; logits (T, B, vocabulary); state None at the
start. `hidden_states` is that without the head, whose weight (vocabulary, hidden) and bias `head_weights` returns; its
attribute `bidirectional` tells whether it reads the text both ways.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast
from rnnfast import functional
from rnnfast.autocast import dtype_of_products
from rnnfast.cells import LAYERS
from rnnfast.errors import UserError

State = Any
"""A recurrent state: a tensor (layers * directions, B, hidden), for an LSTM a pair of them; None at the start."""


class RNNLM(nn.Module):
    """One of rnnfast's layers and a linear head.

    Without an embedding the token ids go straight into the layer: the product of a one-hot row with `weight_ih` is a
    column of it, so nothing else is computed.

    Args:
        cell: "rnn" (tanh), "rnn_relu", "lstm" or "gru".
        dropout: probability of zeroing an output of the embedding or of a layer, before the next layer and the head.
        embedding_size: None for no embedding.
        tie_weights: the head's weight is the embedding's (Press & Wolf 2017); their sizes must agree.
        bidirectional: such a model reads the very token it is to predict; it cannot generate.
        backend: rnnfast's backend to run on.

    Raises:
        UserError: there is no such cell, or the weights to tie differ in size.
    """

    def __init__(
        self,
        vocab_size: int,
        cell: str = "rnn",
        hidden_size: int = 512,
        num_layers: int = 1,
        *,
        dropout: float = 0.0,
        embedding_size: int | None = None,
        tie_weights: bool = False,
        bidirectional: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if cell not in LAYERS:
            raise UserError(f"unknown cell '{cell}'; choose from {', '.join(LAYERS)}")
        features = hidden_size * (2 if bidirectional else 1)
        if tie_weights and embedding_size != features:
            raise UserError(
                f"tied weights need an embedding as wide as the output: add --embedding-size {features}, "
                "or leave --tie-weights out"
            )
        self.bidirectional = bidirectional
        self.backend = backend
        self.embedding = None if embedding_size is None else nn.Embedding(vocab_size, embedding_size)
        layer, options = LAYERS[cell]
        self.rnn = getattr(rnnfast, layer)(
            vocab_size if embedding_size is None else embedding_size,
            hidden_size,
            num_layers,
            dropout=dropout if num_layers > 1 else 0.0,
            bidirectional=bidirectional,
            backend=backend,
            **options,
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(features, vocab_size)
        if tie_weights and self.embedding is not None:
            self.head.weight = self.embedding.weight
            nn.init.normal_(self.head.weight, std=features**-0.5)  # logits of order 1 at the start

    def hidden_states(self, ids: Tensor, state: State = None) -> tuple[Tensor, State]:
        """The hidden states that the head reads, (T, B, hidden), and the state."""
        inputs = ids if self.embedding is None else self._dropout(self.embedding(ids))
        output, state = self.rnn(inputs, state)
        return self._dropout(output), state

    def _dropout(self, tensor: Tensor) -> Tensor:
        return self.dropout(tensor) if self.dropout.p else tensor

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Weight (vocabulary, hidden) and bias (vocabulary)."""
        return self.head.weight, self.head.bias

    def forward(self, ids: Tensor, state: State = None) -> tuple[Tensor, State]:
        hidden, state = self.hidden_states(ids, state)
        return self.head(hidden), state


class RNNLMScratch(nn.Module):
    """The d2l chapter's model from scratch: H = tanh(X W_xh + H W_hh + b_h), logits = H W_hq + b_q.

    The five parameters have the chapter's shapes and initialisation, N(0, 0.01^2) weights and zero biases. X is never
    built.
    """

    bidirectional = False

    def __init__(self, vocab_size: int, hidden_size: int = 512, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.W_xh = scratch_weight(vocab_size, hidden_size)
        self.W_hh = scratch_weight(hidden_size, hidden_size)
        self.b_h = nn.Parameter(torch.zeros(hidden_size))
        self.W_hq = scratch_weight(hidden_size, vocab_size)
        self.b_q = nn.Parameter(torch.zeros(vocab_size))

    def hidden_states(self, ids: Tensor, state: State = None) -> tuple[Tensor, State]:
        """The hidden states that the head reads, (T, B, hidden), and the state."""
        if state is None:
            state = self.b_h.new_zeros(1, ids.shape[1], len(self.b_h))
        return scratch_rnn(ids, state, self.W_xh, self.W_hh, self.b_h, self.backend)

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Weight (vocabulary, hidden) and bias (vocabulary)."""
        return self.W_hq.t(), self.b_q

    def forward(self, ids: Tensor, state: State = None) -> tuple[Tensor, State]:
        hidden, state = self.hidden_states(ids, state)
        return F.linear(hidden, *self.head_weights()), state


def scratch_weight(rows: int, columns: int, device: torch.device | None = None) -> nn.Parameter:
    """A weight drawn from N(0, 0.01^2).

    It is laid out column by column, so that its transpose, which the scan and the head read, needs no copy.
    """
    return nn.Parameter((torch.randn(rows, columns, device=device) * 0.01).t().contiguous().t())


def scratch_rnn(
    inputs: Tensor, state: Tensor, W_xh: Tensor, W_hh: Tensor, b_h: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The chapter's recurrence, run by rnnfast's scan.

    Args:
        inputs: token ids (T, B), int64, or their one-hot rows (T, B, vocabulary).
        state: (1, B, hidden).

    Returns:
        The hidden states (T, B, hidden) and the last one, (1, B, hidden).
    """
    # The scan knows torch.nn's two biases: the second one is zero.
    tensors = [t.to(dtype_of_products(b_h)) for t in (state, W_xh.t(), W_hh.t(), b_h, torch.zeros_like(b_h))]
    return functional.rnn(inputs, tensors[0], [functional.Weights(*tensors[1:])], backend=backend)


def detach(state: State) -> State:
    """The state's values, cut from the graph that computed them: truncated backpropagation through time."""
    if isinstance(state, Tensor):
        return state.detach()
    parts = [part.detach() for part in state]
    return parts if isinstance(state, list) else tuple(parts)
