"""The gradient of a language model's loss: backpropagation through the steps of a batch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from rnnfast import direct
from rnnfast.lm.loss import cross_entropy, is_native, loss_and_gradients
from rnnfast.lm.model import RNNLM, RNNLMScratch, State, detach


def backpropagate(
    model: RNNLM | RNNLMScratch, inputs: Tensor, targets: Tensor, state: State, precision: str = "float32"
) -> tuple[Tensor, State]:
    """Adds the gradient of the mean cross entropy to `.grad` of the parameters.

    Arguments and results are those of `rnnfast.lm.train_step`.
    """
    found = _past_autograd(model, inputs, targets, state) if precision == "float32" else None
    if found is not None:
        return found
    loss, state = loss_of(model, inputs, targets, state, precision)
    loss.backward()
    return loss.detach(), detach(state)


def loss_of(
    model: RNNLM | RNNLMScratch, inputs: Tensor, targets: Tensor, state: State, precision: str = "float32"
) -> tuple[Tensor, State]:
    """The mean cross entropy in nats, in float32 or wider, and the state; arguments as in `rnnfast.lm.train_step`."""
    device, mixed = inputs.device.type, precision == "bfloat16"
    is_plain = not mixed and not torch.is_autocast_enabled(device)
    with nullcontext() if is_plain else torch.autocast(device, torch.bfloat16, enabled=mixed):
        hidden, state = model.hidden_states(inputs, state)
        return cross_entropy(hidden, *model.head_weights(), targets, model.backend), state


def _past_autograd(
    model: RNNLM | RNNLMScratch, inputs: Tensor, targets: Tensor, state: State
) -> tuple[Tensor, State] | None:
    """The same, bit for bit, part by part: autograd would take a good share of a small model's step.

    For token ids, layers and a head, on the cpu backend, where nobody looks at what autograd does; None for all else.
    """
    if type(model) is not RNNLM or model.embedding is not None or model.dropout.p:
        return None
    head = model.head_weights()
    if not is_native(model.backend, model.rnn.weight_hh_l0, *head) or not all(map(direct.is_plain_leaf, head)):
        return None
    made = direct.vjp(model.rnn, inputs, state)
    if made is None:
        return None
    hidden, state, pullback = made
    with torch.no_grad():
        loss, d_hidden, *d_head = loss_and_gradients(hidden, *head, targets)
        d_layers = pullback(d_hidden)
        if d_layers is None:
            return None
        for parameter, gradient in (*d_layers, *zip(head, d_head, strict=True)):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
    return loss, state
