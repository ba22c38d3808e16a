"""What a language model is made of, for the loops in C++ that go past its modules."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from rnnfast import dispatch, functional
from rnnfast.direct.plans import is_hooked
from rnnfast.layers import DropIn
from rnnfast.lm.model import RNNLM, RNNLMScratch

_METHODS = {"forward", "hidden_states", "head_weights"}  # which somebody may replace on the object


class Parts(NamedTuple):
    """The weights as they are now; those of the model from scratch as torch.nn lays them out."""

    layers: list[functional.Weights]
    cell: str
    embedding: Tensor | None
    head_weight: Tensor
    head_bias: Tensor | None


def parts_of(model: nn.Module, dtype: torch.dtype | None = None) -> Parts | None:
    """The parts of an RNNLM or RNNLMScratch as it was made, without hooks, on the CPU, with layers on the cpu backend.

    None for any other, and under autocast: the model must be called then. `dtype`: that of the layers' computation, if
    it is not that of their weights.
    """
    if not is_as_made(model):
        return None
    if isinstance(model, RNNLM):
        layers, cell, backend = functional.lane_weights(model.rnn), model.rnn.mode.lower(), model.rnn.backend
        embedding = None if model.embedding is None else model.embedding.weight
    else:
        layers = [functional.Weights(model.W_xh.t(), model.W_hh.t(), model.b_h, torch.zeros_like(model.b_h))]
        cell, backend, embedding = "rnn_tanh", model.backend, None
    head_weight, head_bias = model.head_weights()
    device, dtype = head_weight.device.type, dtype or head_weight.dtype
    if device != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    request = dispatch.Request(cell, device, dtype, embedding is None, False)
    if dispatch.choose(request, backend).backend != "cpu":
        return None
    return Parts(layers, cell, embedding, head_weight, head_bias)


def is_as_made(model: nn.Module) -> TypeGuard[RNNLM | RNNLMScratch]:
    """Whether a language model and its parts compute what they were made to, and no hook sees them do so."""
    if any(is_hooked(module) or not _METHODS.isdisjoint(vars(module)) for module in model.modules()):
        return False
    if type(model) is not RNNLM:
        return type(model) is RNNLMScratch
    rnn, embedding = model.rnn, model.embedding
    if type(rnn).forward is not DropIn.forward or rnn.proj_size or rnn.batch_first:
        return False
    if embedding is not None and (
        type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None
    ):
        return False
    return rnn.bidirectional == model.bidirectional and type(model.head).forward is nn.Linear.forward
