"""A layer's gradients without autograd: they have autograd's bits, and are left to autograd where somebody looks on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast import direct

T, B, VOCABULARY = 9, 5, 7
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {}),
    "relu, 3 layers": ("RNN", {"nonlinearity": "relu", "num_layers": 3}),
    "lstm": ("LSTM", {}),
    "lstm, 2 layers, projected, no biases": ("LSTM", {"num_layers": 2, "proj_size": 3, "bias": False}),
    "gru, 2 layers": ("GRU", {"num_layers": 2}),
    "gru, float64": ("GRU", {"dtype": torch.float64}),
    "lstm, bfloat16": ("LSTM", {"dtype": torch.bfloat16}),
}


def made(name: str) -> Any:
    cell, options = LAYERS[name]
    torch.manual_seed(1)
    layer = getattr(rnnfast, cell)(VOCABULARY, 19, **options)
    layer(torch.randint(VOCABULARY, (T, B)))  # leaves the plan
    return layer


def state_of(layer: Any) -> Any:
    dtype = layer.weight_hh_l0.dtype
    h = torch.randn(layer.num_layers, B, layer.proj_size or layer.hidden_size, dtype=dtype)
    return (h, torch.randn(layer.num_layers, B, layer.hidden_size, dtype=dtype)) if layer.mode == "LSTM" else h


def flat(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_it_has_the_bits_of_autograd(name: str, ids: bool, with_state: bool) -> None:
    layer = made(name)
    dtype = layer.weight_hh_l0.dtype
    input = torch.randint(VOCABULARY, (T, B)) if ids else torch.randn(B, T, VOCABULARY, dtype=dtype).transpose(0, 1)
    hx = state_of(layer) if with_state else None
    result = direct.vjp(layer, input, hx)
    assert result is not None
    output, state, pullback = result
    assert not any(tensor.requires_grad for tensor in (output, *flat(state)))
    d_output = torch.randn(B, T, output.shape[-1], dtype=dtype).transpose(0, 1)
    pairs = pullback(d_output)
    assert pairs is not None
    assert [id(weight) for weight, _ in pairs] == [id(weight) for weight in layer.parameters()]
    expected, expected_state = layer(input, hx)
    expected.backward(d_output)
    assert torch.equal(output, expected)
    assert all(map(torch.equal, flat(state), flat(expected_state)))
    for weight, gradient in pairs:
        assert torch.equal(gradient, weight.grad)


def nothing(*_: Any) -> None:
    pass


def freeze(layer: Any) -> None:
    layer.bias_hh_l0.requires_grad_(False)


def drop_out(layer: Any) -> None:
    layer.dropout = 0.5


# What autograd or the layer's own call has to do, since somebody would notice.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda layer: layer.register_forward_hook(nothing),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(nothing),
    "backward hook": lambda layer: layer.register_full_backward_hook(nothing),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(nothing),
    "hook of a weight": lambda layer: layer.weight_hh_l1.register_hook(nothing),
    "hook behind a weight": lambda layer: layer.weight_ih_l0.register_post_accumulate_grad_hook(nothing),
    "frozen weight": freeze,
    "dropout": drop_out,
    "another backend": lambda layer: setattr(layer, "backend", "reference"),
}
CONTEXTS: dict[str, Callable[[], Any]] = {
    "no gradients": torch.no_grad,
    "anomaly detection": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": torch.autograd.profiler.profile,
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("why", [*CHANGES, *CONTEXTS])
def test_it_leaves_alone_what_somebody_would_notice(why: str) -> None:
    layer, ids = made("gru, 2 layers"), torch.randint(VOCABULARY, (T, B))
    assert direct.vjp(layer, ids, None) is not None
    with ExitStack() as stack:
        if why in CHANGES:
            CHANGES[why](layer)
        else:
            stack.enter_context(CONTEXTS[why]())
        assert direct.vjp(layer, ids, None) is None


def test_it_declines_what_it_does_not_compute() -> None:
    layer, ids = made("lstm"), torch.randint(VOCABULARY, (T, B))
    h, c = state_of(layer)
    rows = torch.randn(T, B, VOCABULARY)
    for input, hx in (
        (rows.requires_grad_(), None),  # gradients of the input
        (ids, (h, c.requires_grad_())),  # or of a state
        (ids[:, 0], None),  # no batch
        (ids, h),  # half a state
        (ids.int(), None),
        (ids + VOCABULARY, None),  # token ids outside the vocabulary
    ):
        assert direct.vjp(layer, input, hx) is None
    assert direct.vjp(rnnfast.LSTM(VOCABULARY, 19), ids, None) is None  # its first call
    both = rnnfast.GRU(VOCABULARY, 19, bidirectional=True)
    both(ids)
    assert direct.vjp(both, ids, None) is None


def test_gradients_of_another_kind_are_left_to_autograd() -> None:
    result = direct.vjp(made("tanh"), torch.randint(VOCABULARY, (T, B)), None)
    assert result is not None
    output, _, pullback = result
    assert pullback(torch.ones_like(output).double()) is None
    assert pullback(torch.ones_like(output)) is not None
