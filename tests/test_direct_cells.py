"""Calls of cells that go past torch's dispatcher, with gradients and without: they have the general way's bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rnnfast
from tests.parity import parts

NAMES = ["RNNCell", "LSTMCell", "GRUCell"]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("RNNCell", {}),
    ("RNNCell", {"nonlinearity": "relu", "bias": False, "dtype": torch.bfloat16}),
    ("LSTMCell", {}),
    ("LSTMCell", {"bias": False, "dtype": torch.float64}),
    ("GRUCell", {}),
    ("GRUCell", {"dtype": torch.bfloat16}),
]


def state_for(cell: Any, *batch: int) -> Any:
    h, c = (torch.randn(*batch, cell.hidden_size, dtype=cell.weight_hh.dtype, requires_grad=True) for _ in range(2))
    return (h, c) if isinstance(cell, nn.LSTMCell) else h


def input_for(cell: Any, token_ids: bool, *batch: int) -> Tensor:
    if token_ids:
        return torch.randint(cell.input_size, batch)
    return torch.randn(*batch, cell.input_size).to(cell.weight_hh.dtype).requires_grad_()


def results(cell: Any, input: Tensor, hx: Any, used: slice = slice(None), **options: Any) -> list[Tensor]:
    """The next state, and the gradients of a loss of those of its parts that are used."""
    torch.manual_seed(1)
    state = parts(cell(input, hx))
    loss = sum((part.double().sin() * torch.randn(part.shape, dtype=torch.float64)).sum() for part in state[used])
    leaves = (*cell.parameters(), input, *(() if hx is None else parts(hx)))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [*state, *torch.autograd.grad(loss, wanted, **options)]  # type: ignore[arg-type]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_it_has_the_general_calls_bits(
    name: str, options: dict[str, Any], token_ids: bool, direct_call_names: list[str]
) -> None:
    cell = getattr(rnnfast, name)(5, 33, **options)
    for batch in ((3,), (), (1,)):
        input = input_for(cell, token_ids, *batch)
        for hx in (None, state_for(cell, *batch)):
            cell(input, hx)
            general = copy.deepcopy(cell)  # a copy has no plan
            direct_call_names.clear()
            with torch.no_grad():
                found = cell(input, hx)
                assert direct_call_names == ["infer"]
                assert_same(found, copy.deepcopy(cell)(input, hx))
            assert type(found) is type(general(input, hx))
            assert not any(part._is_view() for part in parts(found))
            assert len({part.data_ptr() for part in parts(found)}) == len(parts(found))
            for used in (slice(None), slice(1), slice(-1, None)):
                direct_call_names.clear()
                gradients = results(cell, input, hx, used)
                assert direct_call_names == ["forward", "backward"]
                assert_same(gradients, results(copy.deepcopy(cell), input, hx, used))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_are_not_contiguous(name: str, direct_call_names: list[str]) -> None:
    cell = getattr(rnnfast, name)(5, 7)
    input, hx = input_for(cell, False, 3), state_for(cell, 3)
    cell(input, hx)
    expected = results(copy.deepcopy(cell), input, hx)
    input, *states = (each.detach().t().contiguous().t().requires_grad_() for each in (input, *parts(hx)))
    hx = (*states,) if isinstance(hx, tuple) else states[0]
    direct_call_names.clear()
    assert_same(results(cell, input, hx), expected)
    assert direct_call_names == ["forward", "backward"]


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_has_the_gradients_of_the_layer(name: str, direct_call_names: list[str]) -> None:
    cell = getattr(rnnfast, name)(5, 16, dtype=torch.float64)
    layer = getattr(nn, name.removesuffix("Cell"))(5, 16, dtype=torch.float64)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    input = torch.randn(6, 3, 5, dtype=torch.float64)
    outputs, state = [], None
    for x in input:
        state = cell(x, state)
        outputs.append(parts(state)[0])
    assert direct_call_names == ["forward"] * 5  # after the first
    torch.stack(outputs).sin().sum().backward()
    layer(input)[0].sin().sum().backward()
    for ours, theirs in zip(cell.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str, direct_call_names: list[str]) -> None:
    cell = getattr(rnnfast, name)(2, 3, dtype=torch.float64)
    input, hx = input_for(cell, False, 2), state_for(cell, 2)
    cell(input, hx)

    def call(input: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        return parts(cell(input, states if len(states) == 2 else states[0]))

    leaves = (input, *parts(hx))
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    assert direct_call_names.count("forward") > 10


def test_what_needs_no_gradient_gets_none(direct_call_names: list[str]) -> None:
    cell = rnnfast.LSTMCell(5, 8)
    input, hx = input_for(cell, False, 2), state_for(cell, 2)
    cell(input)
    for frozen in (["weight_ih"], ["bias_hh", "weight_hh"], [name for name, _ in cell.named_parameters()]):
        for name, parameter in cell.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for given in (input, input.detach()):
            assert_same(results(cell, given, hx), results(copy.deepcopy(cell), given, hx))
    assert direct_call_names == ["forward", "backward"] * 6
    assert not parts(cell(input.detach()))[0].requires_grad
    assert direct_call_names[-1] == "infer"


@pytest.mark.parametrize("name", NAMES)
def test_who_looks_on_sees_the_operations(name: str, direct_call_names: list[str]) -> None:
    cell = getattr(rnnfast, name)(5, 7)
    input, hx = input_for(cell, False, 3), state_for(cell, 3)
    expected = parts(cell(input, hx))
    direct_call_names.clear()
    for found in (
        torch.vmap(lambda x: parts(cell(x[None]))[0][0])(input),
        torch.func.functional_call(cell, {"weight_hh": cell.weight_hh * 1}, (input,)),
        torch.compile(cell, backend="eager")(input),
        checkpoint(cell, input, use_reentrant=False),
    ):
        torch.testing.assert_close(parts(found)[0], parts(cell(input))[0])
    assert direct_call_names == ["forward"] * 4  # the calls that they are compared with
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(parts(cell(input, hx)), expected)
    assert direct_call_names == ["forward"] * 4


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_weights_made_from_others_are_used(name: str, gradients: bool) -> None:
    cell, input = getattr(rnnfast, name)(5, 7), torch.randn(3, 5)
    hx = tuple(torch.randn(2, 3, 7)) if name == "LSTMCell" else torch.randn(3, 7)
    nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            cell(input, hx)
        with torch.no_grad():
            cell.parametrizations.weight_hh.original0.mul_(2)
        plain = getattr(nn, name)(5, 7)
        plain.load_state_dict({key: getattr(cell, key) for key in plain.state_dict()})
        torch.testing.assert_close(cell(input, hx), plain(input, hx))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_no_features(name: str, gradients: bool) -> None:
    """torch.nn's cells may have none: a weight then has no memory."""
    cell, theirs = getattr(rnnfast, name)(0, 7), getattr(nn, name)(0, 7)
    theirs.load_state_dict(cell.state_dict())
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            torch.testing.assert_close(cell(torch.zeros(3, 0)), theirs(torch.zeros(3, 0)))


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_after_a_call_are_told_as_before(name: str, direct_call_names: list[str]) -> None:
    cell, new = (getattr(rnnfast, name)(5, 7) for _ in range(2))
    cell(torch.randn(3, 5))
    h = torch.randn(3, 7)
    states = [h[:2], h[:, :4], h[0], h[None], h.double(), h.int()]
    cases: list[tuple[Any, Any]] = [(torch.randn(3, 5), (s, s) if name == "LSTMCell" else s) for s in states]
    inputs = [torch.randn(3, 4), torch.randn(2, 3, 5), torch.tensor(1.0), torch.randn(3, 5).double()]
    inputs += [torch.tensor([5]), "text", h.bool()]
    for input, hx in [*cases, *((input, None) for input in inputs)]:
        with pytest.raises(Exception) as expected:  # noqa: PT011 (whatever a cell without a plan raises)
            new(input, hx)
        with pytest.raises(expected.type) as found:
            cell(input, hx)
        assert str(found.value) == str(expected.value)
