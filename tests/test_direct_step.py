"""The step that goes past torch's dispatcher: it runs where it may, and what it must not miss."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

import rnnfast
from rnnfast.backends import native


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The status of every direct step so far."""
    native.load()
    function, calls = native.step_function, []

    def counted(*args: Any) -> int:
        calls.append(function(*args))
        return calls[-1]

    monkeypatch.setattr(native, "step_function", counted)
    with torch.no_grad():
        yield calls


def warmed_up(layer: Any, input: torch.Tensor) -> Any:
    """The state after the general steps that make the plan for the direct ones."""
    state = None
    for _ in range(2):
        _, state = layer.step(input, state)
    return state


def general_step(layer: Any, input: torch.Tensor, state: Any) -> Any:
    return copy.deepcopy(layer).step(input, state)  # a copy has no plan


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNN", {"nonlinearity": "relu"}),
        ("RNN", {"dtype": torch.bfloat16}),
        ("LSTM", {"num_layers": 3}),
        ("LSTM", {"num_layers": 2, "proj_size": 7, "bias": False}),
        ("GRU", {"dtype": torch.float64, "num_layers": 2, "dropout": 0.5}),
    ],
)
def test_it_runs_and_has_the_general_steps_bits(
    name: str, options: dict[str, Any], token_ids: bool, direct_calls: list[int]
) -> None:
    layer = getattr(rnnfast, name)(5, 33, **options).eval()
    dtype = options.get("dtype", torch.float32)
    input = torch.tensor([1, 4]) if token_ids else torch.randn(2, 5, dtype=dtype)
    state = warmed_up(layer, input)
    assert not direct_calls
    result = layer.step(input, state)
    assert direct_calls == [0]
    torch.testing.assert_close(result, general_step(layer, input, state), rtol=0, atol=0)
    output, after = result
    states = after if isinstance(after, tuple) else (after,)
    assert len({part.data_ptr() for part in (output, *states)}) == 1 + len(states)
    assert not any(part._is_view() for part in (output, *states))
    smaller = [part[:, :1].contiguous() for part in states]
    smaller_state = tuple(smaller) if isinstance(after, tuple) else smaller[0]
    torch.testing.assert_close(
        layer.step(input[:1], smaller_state), general_step(layer, input[:1], smaller_state), rtol=0, atol=0
    )
    assert direct_calls == [0, 0]


@pytest.mark.parametrize("way", ["in place", "data", "copy_data", "replaced", "load_state_dict", "double", "share"])
def test_changed_weights_are_seen(way: str, direct_calls: list[int]) -> None:
    layer, other = rnnfast.LSTM(5, 16), rnnfast.LSTM(5, 16)
    input = torch.randn(2, 5)
    state = warmed_up(layer, input)
    weight = layer.weight_hh_l0
    if way == "in place":
        weight.mul_(0.5)
    elif way == "data":
        weight.data = weight.data * 0.5
    elif way == "copy_data":
        weight.data.mul_(0.5)
    elif way == "replaced":
        layer.weight_hh_l0 = torch.nn.Parameter(weight * 0.5)
    elif way == "load_state_dict":
        layer.load_state_dict(other.state_dict())
    elif way == "double":
        layer.double()
        input, state = input.double(), tuple(part.double() for part in state)
    else:
        layer.weight_hh_l0 = other.weight_hh_l0
    torch.testing.assert_close(layer.step(input, state), general_step(layer, input, state), rtol=0, atol=0)
    assert 0 not in direct_calls
    layer.step(input, state)
    assert direct_calls[-1:] == [0]


@pytest.mark.parametrize(
    "name", ["weight_ih_l0", "bias_hh_l0"]
)  # pruned, the last keeps its place among the parameters
def test_a_pruned_weight_is_seen(name: str, direct_calls: list[int]) -> None:
    layer, input = rnnfast.GRU(5, 16), torch.randn(2, 5)
    state = warmed_up(layer, input)
    prune.l1_unstructured(layer, name, amount=0.5)
    layer(input[None], state)  # the hook that prunes runs before a call
    torch.testing.assert_close(layer.step(input, state), general_step(layer, input, state), rtol=0, atol=0)
    assert not direct_calls


def test_what_must_be_seen_goes_the_general_way(direct_calls: list[int]) -> None:
    layer, input = rnnfast.GRU(5, 16), torch.randn(2, 5)
    state = warmed_up(layer, input)
    with torch.enable_grad():
        output, _ = layer.step(input, state)
    assert output.requires_grad
    with rnnfast.use_backend("reference"):
        layer.step(input, state)
    layer.backend = "reference"
    layer.step(input, state)
    layer.backend = "auto"
    replaced = {"weight_hh_l0": torch.zeros(48, 16)}
    torch.func.functional_call(_Stepper(layer), {f"layer.{k}": v for k, v in replaced.items()}, (input, state))
    torch.vmap(lambda x: layer.step(x, state)[0])(torch.stack([input, input]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        assert torch.autograd.forward_ad.unpack_dual(layer.step(dual, state)[0]).tangent is not None
    layer.step(input.t().contiguous().t(), state)
    layer.step(input, state.transpose(0, 2).contiguous().transpose(0, 2))
    assert not direct_calls
    layer.step(input, state)
    assert direct_calls == [0]


class _Stepper(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: torch.Tensor, state: Any) -> Any:
        return self.layer.step(input, state)


def test_dropout_between_layers_is_not_skipped(direct_calls: list[int]) -> None:
    layer, input = rnnfast.GRU(5, 16, num_layers=2, dropout=0.9), torch.randn(2, 5)
    state = warmed_up(layer, input)
    layer.step(input, state)
    layer.eval()
    warmed_up(layer, input)
    layer.train()
    layer.step(input, state)
    assert not direct_calls


def test_errors_are_those_of_the_general_step(direct_calls: list[int]) -> None:
    layer, ids = rnnfast.GRU(3, 4), torch.tensor([0, 2])
    state = warmed_up(layer, ids)
    with pytest.raises(IndexError, match="token ids"):
        layer.step(torch.tensor([0, 3]), state)
    with pytest.raises(RuntimeError, match=r"h_0 must have shape \(1, 2, 4\)"):
        layer.step(ids, state[:, :1].contiguous())
    with pytest.raises(RuntimeError, match="dtype"):
        layer.step(ids, state.double())
    with pytest.raises(RuntimeError, match=r"a step takes \(B, 3\) input"):
        layer.step(torch.randn(5, 2, 3), state)
    with pytest.raises(RuntimeError, match=r"a step takes \(B, 3\) input"):
        layer.step(torch.tensor(1), state)


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_a_state_of_another_cell_goes_the_general_way(name: str, direct_calls: list[int]) -> None:
    layer, input = getattr(rnnfast, name)(3, 4), torch.randn(2, 3)
    state = warmed_up(layer, input)
    wrong = state[0] if name == "LSTM" else (state, state.clone())
    with pytest.raises((RuntimeError, TypeError)):
        layer.step(input, wrong)
    assert not direct_calls


def test_a_plan_goes_with_its_layer(direct_calls: list[int]) -> None:
    from rnnfast.backends import step

    layer = rnnfast.GRU(3, 4)
    warmed_up(layer, torch.randn(2, 3))
    key = id(layer)
    assert key in step._plans
    del layer
    assert key not in step._plans
