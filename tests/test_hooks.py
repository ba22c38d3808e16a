"""Hooks of a layer run however it is called, so that weights which a hook makes anew are never those of before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import rnnfast
from rnnfast import lm
from rnnfast.lm.generate import native_parts

STEPS, BATCH, INPUTS, HIDDEN = 5, 2, 3, 4

HOOKED: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", 0.5),
    "weight_norm": lambda layer: nn.utils.weight_norm(layer, "weight_hh_l0"),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer, "weight_hh_l0").eval(),
}
MAKERS: dict[str, Callable[[], Any]] = {
    "LSTM": lambda: rnnfast.LSTM(INPUTS, HIDDEN),
    "GRU batch_first": lambda: rnnfast.GRU(INPUTS, HIDDEN, batch_first=True),
    "accelerated": lambda: accelerated(nn.LSTM(INPUTS, HIDDEN)),
    "Stack": lambda: rnnfast.Stack("lstm", INPUTS, [HIDDEN]),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")


def accelerated(layer: nn.Module) -> nn.Module:
    rnnfast.accelerate(layer)
    return layer


def make(name: str, how: str) -> Any:
    """A layer that has been called, and whose weights have changed since."""
    layer = MAKERS[name]()
    HOOKED[how](layer)
    with torch.no_grad():
        layer(torch.randn(BATCH, STEPS, INPUTS))
        for parameter in layer.parameters():
            parameter.mul_(3).add_(0.1)
    return layer


def pieces(layer: Any, input: Tensor) -> list[Tensor]:
    return list(input.unbind(1 if layer.batch_first else 0))


@pytest.mark.parametrize("how", HOOKED)
@pytest.mark.parametrize("name", MAKERS)
def test_steps_and_streams_have_the_weights_of_now(name: str, how: str) -> None:
    layer, input = make(name, how), torch.randn(STEPS, BATCH, INPUTS)
    input = input.transpose(0, 1) if layer.batch_first else input
    time = 1 if layer.batch_first else 0
    with torch.no_grad():
        stream = rnnfast.Stream(copy.deepcopy(layer))
        streamed = [stream(part) for part in pieces(layer, input)]
        stepping, state, stepped = copy.deepcopy(layer), None, []
        for part in pieces(layer, input):
            output, state = stepping.step(part, state)
            stepped.append(output)
        whole = layer(input)[0]
    torch.testing.assert_close(torch.stack(stepped, time), whole, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(streamed, time), whole, rtol=0, atol=0)


@pytest.mark.parametrize("how", HOOKED)
@pytest.mark.parametrize("name", ["LSTM", "accelerated"])
def test_states_have_the_weights_of_now(name: str, how: str) -> None:
    layer, input = make(name, how), torch.randn(STEPS, BATCH, INPUTS)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        h, _ = other.states(input)
        torch.testing.assert_close(h[:, 0], layer(input)[0], rtol=0, atol=0)


def test_states_have_the_arguments_that_hooks_leave() -> None:
    layer, input = rnnfast.LSTM(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS)
    expected = layer.states(2 * input, (torch.ones(1, BATCH, HIDDEN),) * 2)
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"hx": (torch.ones(1, BATCH, HIDDEN),) * 2}), with_kwargs=True
    )
    torch.testing.assert_close(layer.states(input), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_is_seen_by_hooks_as_a_call(name: str) -> None:
    layer, seen = MAKERS[name](), []
    with torch.no_grad():
        layer(torch.randn(BATCH, STEPS, INPUTS))
        _, state = layer.step(torch.randn(BATCH, INPUTS))
        handle = layer.register_forward_hook(lambda _, args, result: seen.append((args[0].shape, result[0].shape)))
        layer.step(torch.randn(BATCH, INPUTS), state)
        handle.remove()
        layer.step(torch.randn(BATCH, INPUTS), state)
    sizes = (BATCH, 1) if layer.batch_first else (1, BATCH)
    assert seen == [((*sizes, INPUTS), (*sizes, HIDDEN))]


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_is_seen_by_hooks_of_all_modules(name: str) -> None:
    layer, seen = MAKERS[name](), []
    with torch.no_grad():
        layer(torch.randn(BATCH, STEPS, INPUTS))
        _, state = layer.step(torch.randn(BATCH, INPUTS))
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            layer.step(torch.randn(BATCH, INPUTS), state)
        finally:
            handle.remove()
        layer.step(torch.randn(BATCH, INPUTS), state)
    assert seen == [layer]


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_is_seen_by_backward_hooks_as_a_call(name: str) -> None:
    layer, seen, input = MAKERS[name](), [], torch.randn(BATCH, INPUTS, requires_grad=True)
    layer.register_full_backward_hook(lambda _, of_input, of_output: seen.append(of_input[0].clone()))
    layer.step(input)[0].sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].flatten(0, 1), input.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_is_seen_by_backward_pre_hooks_as_a_call(name: str) -> None:
    layer, seen = MAKERS[name](), []
    layer.register_full_backward_pre_hook(lambda _, of_output: seen.append(of_output[0].clone()))
    output, _ = layer.step(torch.randn(BATCH, INPUTS, requires_grad=True))
    output.backward(torch.arange(output.numel()).view_as(output).float())
    assert len(seen) == 1
    assert seen[0].flatten().tolist() == list(range(BATCH * HIDDEN))


def test_generation_is_seen_by_hooks_of_all_modules() -> None:
    model, seen = lm.RNNLM(8, cell="gru", hidden_size=16), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        list(lm.generate(model, [1, 2], 4))
    finally:
        handle.remove()
    assert {model.rnn, model.head} <= seen


def test_generation_has_the_weights_of_now() -> None:
    model = lm.RNNLM(8, cell="gru", hidden_size=16)
    assert native_parts(model) is not None
    prune.l1_unstructured(model.rnn, "weight_hh_l0", 0.5)
    assert native_parts(model) is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.1)
    text = list(lm.generate(model, [1, 2], 40))
    assert list(lm.generate(model, [1, 2], 40)) == text
    prune.remove(model.rnn, "weight_hh_l0")
    assert list(lm.generate(model, [1, 2], 40)) == text


@pytest.mark.parametrize(("name", "used"), [(n, u) for n in ("RNN", "GRU", "LSTM") for u in (0, 1)] + [("LSTM", 2)])
def test_hooks_on_results_are_called_where_these_are_used(name: str, used: int) -> None:
    """Not with None, in the first call as in those after it, which go another way."""
    layer, input = getattr(rnnfast, name)(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS)
    for _ in range(3):
        output, states = layer(input)
        assert_hooks_are_called(layer, [output, *(states if name == "LSTM" else [states])], used)


@pytest.mark.parametrize("used", [0, 1])
def test_hooks_on_states_of_cells_are_called_where_these_are_used(used: int) -> None:
    cell, input = rnnfast.LSTMCell(INPUTS, HIDDEN), torch.randn(BATCH, INPUTS)
    for _ in range(3):
        assert_hooks_are_called(cell, cell(input), used)


def assert_hooks_are_called(module: nn.Module, results: Any, used: int) -> None:
    """Two hooks that halve the gradient of a result, and one that was removed."""
    weights = list(module.parameters())
    expected = torch.autograd.grad(results[used].sum(), weights, retain_graph=True)
    called: list[int] = []

    def halve(index: int, gradient: Tensor) -> Tensor:
        called.append(index)
        return gradient * 0.5

    for index, result in enumerate(results):
        handles = [result.register_hook(functools.partial(halve, index)) for _ in range(3)]
        handles[1].remove()
    found = torch.autograd.grad(results[used].sum(), weights)
    assert called == [used, used]
    torch.testing.assert_close(found, tuple(0.25 * gradient for gradient in expected))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_hook_on_several_results_is_called_with_those_that_are_used(used: tuple[int, ...]) -> None:
    layer, input = rnnfast.LSTM(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS)
    for _ in range(3):
        output, states = layer(input)
        results, seen = (output, *states), []
        torch.autograd.graph.register_multi_grad_hook(
            results, lambda gradients, seen=seen: seen.append([g is not None for g in gradients])
        )
        torch.stack([results[index].sum() for index in used]).sum().backward()
        assert seen == [[index in used for index in range(3)]]


def test_gradients_of_gradients_are_hooked_likewise() -> None:
    layer, input = rnnfast.LSTM(INPUTS, HIDDEN, bidirectional=True), torch.randn(STEPS, BATCH, INPUTS)
    states = [torch.randn(2, BATCH, HIDDEN, requires_grad=True) for _ in range(2)]
    d_h_0, d_c_0 = torch.autograd.grad(layer(input, tuple(states))[0].pow(2).sum(), states, create_graph=True)
    seen: list[Tensor | None] = []
    d_c_0.register_hook(seen.append)
    d_h_0.sum().backward()
    assert seen == []
