"""The loss of a language model, from its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnnfast import dispatch
from rnnfast.derivatives import needs_gradient
from rnnfast.lm import operators


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, backend: str = "auto"
) -> Tensor:
    """The mean cross entropy of the next tokens, in nats: that of a linear head's logits.

    On a CPU in float32 it is one operator, which turns logits into their gradients while they are near; elsewhere it is
    torch's product and cross entropy, in float32 or wider.

    Args:
        hidden: (T, B, hidden).
        weight, bias: the head's, (vocabulary, hidden) and (vocabulary), or no bias.
        targets: token ids (T, B), int64.
        backend: the scan's; the operator is the cpu backend's.

    Raises:
        RuntimeError: a target is not in the vocabulary.
    """
    rows, targets = hidden.flatten(0, -2), targets.flatten()
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if is_native(backend, rows, weight, bias):
        tensors = [t.contiguous() for t in (rows, weight, bias, targets)]
        if needs_gradient(tensors):
            loss: Tensor = _LinearCrossEntropy.apply(*tensors)
            return loss
        return _loss_and_gradients(tensors, False)[0]
    return cross_entropy_of_logits(F.linear(rows, weight, bias), targets)


def cross_entropy_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy of logits (N, vocabulary), in float32 or wider, for the tokens (N,) that were to come."""
    return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, targets)


def is_native(backend: str, *tensors: Tensor) -> bool:
    """Whether the loss and the clipping of gradients run as operators of the cpu backend for such tensors."""
    if any(t.device.type != "cpu" or t.dtype != torch.float32 or not t.numel() for t in tensors):
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    # Where a scan of that type would run on the cpu backend: that is loaded then.
    return dispatch.choose_name(dispatch.asked(backend), None, "rnn_tanh", "cpu", torch.float32, False, False) == "cpu"


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients, too, while all that they are made of is near."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        loss, *ctx.gradients = _loss_and_gradients((hidden, weight, bias, targets), True)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        # They are the caller's from now on. Where the graph is kept for another backward, that computes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = _loss_and_gradients(ctx.saved_tensors, True)
        if d_loss.item() != 1:
            torch._foreach_mul_(gradients, d_loss)
        return *gradients, None


def _loss_and_gradients(tensors: Sequence[Tensor], need_gradients: bool) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = operators.linear_cross_entropy(*tensors, need_gradients)
    return results
