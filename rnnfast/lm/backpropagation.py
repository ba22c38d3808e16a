"""The gradient of a language model's loss: backpropagation through the steps of a batch.

A model of layers and a head, its parameters in float32, on the cpu backend goes past its modules and autograd, which
would take a good share of a small model's step: one operator does all of it, or all of many training steps.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.optim import SGD
from torch.optim import optimizer as torch_optimizer

from rnnfast.backends import cpu
from rnnfast.backends.cpu.packing import count_fused_step
from rnnfast.direct.plans import is_observed
from rnnfast.lm import operators
from rnnfast.lm.loss import cross_entropy, cross_entropy_of_logits
from rnnfast.lm.model import RNNLM, RNNLMScratch, State, detach
from rnnfast.lm.parts import is_as_made, parts_of


def backpropagate(
    model: RNNLM | RNNLMScratch, inputs: Tensor, targets: Tensor, state: State, precision: str = "float32"
) -> tuple[Tensor, State]:
    """Adds the gradient of the mean cross entropy to `.grad` of the parameters.

    Arguments and results are those of `rnnfast.lm.train_step`.
    """
    native = _native(model, precision)
    states = None if native is None else native.states(inputs, targets, state, 2)
    if native is None or states is None:
        loss, state = loss_of(model, inputs, targets, state, precision)
        loss.backward()
        return loss.detach(), detach(state)
    gradients = [cpu.empty(memory, *memory.shape) for memory in native.memory]
    loss, *found = operators.backpropagate(inputs, targets, native.memory, gradients, *states, native.cell)
    for parameter, gradient in zip(native.parameters, gradients, strict=True):
        gradient = gradient.t() if native.is_transposed else gradient
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient
    return loss, native.state(found)


def descend(
    model: RNNLM | RNNLMScratch,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    state: State,
    loss_sum: Tensor,
    clip: float,
    precision: str,
    carries: bool,
) -> tuple[State] | None:
    """`rnnfast.lm.train_steps` as one operator, with the bits of step after step.

    Returns:
        The state, in a tuple; or None, with nothing done, if the model is not `_native` or the optimizer does more than
        plain gradient descent.
    """
    native = _native(model, precision)
    states = None if native is None else native.states(inputs, targets, state, 3)
    if native is None or states is None or not _descends_plainly(optimizer, native.parameters):
        return None
    rate = float(optimizer.param_groups[0]["lr"])
    for parameter in native.parameters:
        parameter.grad = None
    try:
        found = operators.train(
            inputs,
            targets,
            native.memory,
            *states,
            loss_sum,
            native.cell,
            carries,
            rate,
            clip if clip > 0 else math.inf,
        )
    finally:
        torch.autograd.graph.increment_version(native.parameters)  # packed weights are to be packed anew
    return (native.state(found),)


def loss_of(
    model: RNNLM | RNNLMScratch, inputs: Tensor, targets: Tensor, state: State, precision: str = "float32"
) -> tuple[Tensor, State]:
    """The mean cross entropy in nats, in float32 or wider, and the state; arguments as in `rnnfast.lm.train_step`."""
    device, mixed = inputs.device.type, precision == "bfloat16"
    is_plain = not mixed and not torch.is_autocast_enabled(device)
    with nullcontext() if is_plain else torch.autocast(device, torch.bfloat16, enabled=mixed):
        if not is_as_made(model):  # what was changed, hooks for one, may only be seen in calls
            logits, state = model(inputs, state)
            return cross_entropy_of_logits(logits.flatten(0, -2), targets.flatten()), state
        hidden, state = model.hidden_states(inputs, state)
        return cross_entropy(hidden, *model.head_weights(), targets, model.backend), state


class _Native(NamedTuple):
    """A model as the operators take it."""

    parameters: list[nn.Parameter]
    memory: list[Tensor]  # of the parameters, as torch.nn lays a layer's weights out
    is_transposed: bool  # which they are not in the model from scratch
    cell: str
    dtype: torch.dtype  # of layers and states: float32, or bfloat16
    lead: tuple[int, int]  # layers, and units of the state

    def states(self, inputs: Tensor, targets: Tensor, state: State, dims: int) -> tuple[Tensor, Tensor | None] | None:
        """h_0 and c_0 for such tokens; or None if anything is not what the operators read."""
        for tokens in (inputs, targets):
            if type(tokens) is not Tensor or not tokens.is_cpu or not tokens.is_contiguous() or not tokens.numel():
                return None
        if inputs.dtype != torch.int64 or inputs.dim() != dims:
            return None
        shape = (self.lead[0], inputs.shape[-1], self.lead[1])
        is_lstm = self.cell == "lstm"
        if state is None:
            zeros = torch.zeros(shape, dtype=self.dtype, device="cpu")
            return zeros, zeros if is_lstm else None
        given = state if is_lstm else (state,)
        if not isinstance(given, tuple) or len(given) != 1 + is_lstm:
            return None
        for part in given:
            if type(part) is not Tensor or part.dtype != self.dtype or part.shape != shape or part.requires_grad:
                return None
        h_0, c_0 = (*given, None)[:2]
        return h_0.contiguous(), c_0 if c_0 is None else c_0.contiguous()

    def state(self, found: Any) -> State:
        return tuple(found) if self.cell == "lstm" else found[0]


def _native(model: RNNLM | RNNLMScratch, precision: str) -> _Native | None:
    """The model for the operators; None if it has other parts, or if somebody would miss what autograd does."""
    if not torch.is_grad_enabled() or torch.is_anomaly_enabled() or torch.compiler.is_compiling() or is_observed():
        return None
    if _top_saved_tensors_default_hooks(True):
        return None
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    parts = parts_of(model, dtype)
    if parts is None or parts.embedding is not None or parts.head_bias is None or model.bidirectional:
        return None
    parameters: list[nn.Parameter]
    if isinstance(model, RNNLM):
        if model.dropout.p or model.rnn.dropout:
            return None
        weights: list[Any] = [weight for lane in parts.layers for weight in lane if weight is not None]
        parameters = [*weights, model.head.weight, model.head.bias]
    else:
        parameters = [model.W_xh, model.W_hh, model.b_h, model.W_hq, model.b_q]
    if len({*map(id, parameters)}) < len(parameters) or not all(map(_is_plain_leaf, parameters)):
        return None
    is_transposed = isinstance(model, RNNLMScratch)
    memory = [parameter.detach().t() if is_transposed else parameter.detach() for parameter in parameters]
    if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in memory):
        return None
    return _Native(parameters, memory, is_transposed, parts.cell, dtype, (len(parts.layers), memory[1].shape[1]))


def _is_plain_leaf(parameter: nn.Parameter) -> bool:
    """Whether nobody would notice that autograd has not made its gradient."""
    return (
        type(parameter) is nn.Parameter
        and parameter.requires_grad
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
    )


def _descends_plainly(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Whether a step takes the learning rate times the gradient from these parameters, and nobody sees it do so."""
    if type(optimizer) is not SGD or len(optimizer.param_groups) != 1:
        return False
    if "step" in vars(optimizer) or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False  # a scheduler counts the steps, for one
    of_all = torch_optimizer._global_optimizer_post_hooks.values()
    if torch_optimizer._global_optimizer_pre_hooks or any(hook is not count_fused_step for hook in of_all):
        return False
    (group,) = optimizer.param_groups
    if group["momentum"] or group["weight_decay"] or group["maximize"] or group["differentiable"]:
        return False
    return type(group["lr"]) in (int, float) and [*map(id, group["params"])] == [*map(id, parameters)]
