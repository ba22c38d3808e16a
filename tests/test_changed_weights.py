"""Weights packed for calls without gradients: every change of a weight is noticed, and what is not can be told."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing

import rnnfast
from rnnfast.backends import cpu
from tests.test_direct import general_step, warmed_up

WAYS = ["in place", "data", "copy_data", "replaced", "shared", "load_state_dict", "optimizer"]


def change(layer: Any, way: str, other: Any) -> None:
    """Changes a layer's weight_hh_l0, perhaps to that of another layer like it."""
    weight = layer.weight_hh_l0
    if way == "in place":
        with torch.no_grad():
            weight.mul_(0.5)
    elif way == "data":
        weight.data = weight.data * 0.5
    elif way == "copy_data":
        weight.data.mul_(0.5)
    elif way == "replaced":
        layer.weight_hh_l0 = torch.nn.Parameter(weight.detach() * 0.5)
    elif way == "shared":
        layer.weight_hh_l0 = other.weight_hh_l0
    elif way == "load_state_dict":
        layer.load_state_dict(other.state_dict())
    else:
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()


@pytest.mark.parametrize("way", [*WAYS, "double"])
def test_changed_weights_are_seen(way: str, direct_calls: list[int]) -> None:
    layer, other = rnnfast.LSTM(5, 16), rnnfast.LSTM(5, 16)
    input = torch.randn(2, 5)
    state = warmed_up(layer, input)
    if way == "double":
        layer.double()
        input, state = input.double(), tuple(part.double() for part in state)
    else:
        change(layer, way, other)
    torch.testing.assert_close(layer.step(input, state), general_step(layer, input, state), rtol=0, atol=0)
    layer.step(input, state)
    assert direct_calls[-1:] == [0]


@pytest.mark.parametrize("way", WAYS)
def test_changed_weights_give_what_the_reference_gives(way: str) -> None:
    layer, other = rnnfast.GRU(5, 64, backend="cpu"), rnnfast.GRU(5, 64, backend="reference")
    input = torch.randn(4, 2, 5)
    with torch.no_grad():
        before = layer(input)[0]
    change(layer, way, other)
    with torch.no_grad():
        after, stepped = layer(input)[0], layer.step(input[0])[0]
        other.load_state_dict(layer.state_dict())
        expected = other(input)[0]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(stepped, expected[0])


@pytest.mark.parametrize("place", [0, 7, 16, -1])
@pytest.mark.parametrize("part", ["unit", "gate", "column", "bias"])
def test_what_is_written_through_data_is_seen(part: str, place: int, direct_calls: list[int]) -> None:
    """Such a write counts no version, as where units or features are pruned."""
    layer, cell = rnnfast.GRU(28, 64), rnnfast.GRUCell(28, 64, backend="cpu")
    input = torch.randn(3, 2, 28)
    for _ in range(2):
        layer(input), cell(input[0])
    state = warmed_up(layer, input[0])
    for module in (layer, cell):
        for name, weight in module.named_parameters():
            if part == "bias" and "bias" in name:
                weight.data[place] += 1
            elif part == "unit" and "weight" in name:
                weight.data.view(3, 64, -1)[:, place] = 1
            elif part == "gate" and "weight" in name:
                weight.data.view(3, 64, -1)[place % 3] = 1
            elif part == "column" and "weight" in name:
                weight.data[:, place] = 1
    torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)
    torch.testing.assert_close(cell(input[0]), copy.deepcopy(cell)(input[0]), rtol=0, atol=0)
    torch.testing.assert_close(layer.step(input[0], state), general_step(layer, input[0], state), rtol=0, atol=0)


@pytest.mark.parametrize(("features", "units", "part"), [(28, 64, "unit"), (100, 16, "column")])
def test_the_last_one_of_a_matrix_alone_is_seen(features: int, units: int, part: str, direct_calls: list[int]) -> None:
    """Of the longer side of `weight_ih`, which a sample of the other side's length does not reach."""
    layer, input = rnnfast.GRU(features, units), torch.randn(3, 2, features)
    for _ in range(2):
        layer(input)
    weight = layer.weight_ih_l0.data
    if part == "unit":
        weight.view(3, units, features)[:, -1] += 1
    else:
        weight[:, -1] += 1
    torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)


@pytest.mark.parametrize("gate", range(4))
def test_a_gate_of_one_unit_written_through_data_is_seen(gate: int, direct_calls: list[int]) -> None:
    layer, input = rnnfast.LSTM(1, 1), torch.randn(3, 2, 1)
    for _ in range(2):
        layer(input)
    layer.weight_hh_l0.data[gate] += 1
    torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)


def check_that_every_element_is_seen(layer: Any, input: torch.Tensor, names: Sequence[str] = ()) -> None:
    """Of all weights, or of those named: without gradients."""
    expected = layer(input)[0]
    for name in names or dict(layer.named_parameters()):
        elements = layer.get_parameter(name).data.view(-1)
        for i in range(len(elements)):
            was = elements[i].item()
            elements[i] += 1
            assert not torch.equal(layer(input)[0], expected)
            elements[i] = was
            assert torch.equal(layer(input)[0], expected)


@pytest.mark.parametrize("gate", range(3))
def test_a_gate_of_a_square_matrix_alone_is_seen(gate: int, direct_calls: list[int]) -> None:
    layer, input = rnnfast.GRU(28, 64), torch.randn(3, 2, 28)
    for _ in range(2):
        layer(input)
    layer.weight_hh_l0.data.view(3, 64, 64)[gate] += 1
    torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)


@pytest.mark.parametrize("place", [(-1, slice(None)), (slice(None), -1)])
def test_the_last_row_and_column_of_a_projection_are_seen(place: Any, direct_calls: list[int]) -> None:
    """It has no gates, and fewer rows than the layer has units."""
    layer, input = rnnfast.LSTM(5, 64, proj_size=24), torch.randn(3, 2, 5)
    for _ in range(2):
        layer(input)
    layer.weight_hr_l0.data[place] += 1
    torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("features", "units", "options"), [(28, 64, {}), (100, 16, {}), (32, 64, {"proj_size": 32})], ids=str
)
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_each_unit_and_each_column_is_seen(
    name: str, features: int, units: int, options: dict[str, int], direct_calls: list[int]
) -> None:
    layer, input = rnnfast.LSTM(features, units, **options), torch.randn(1, 2, features)
    state = torch.randn(1, 2, options.get("proj_size", units)), torch.zeros(1, 2, units)
    weight = layer.get_parameter(name).data.view(4, units, -1)
    assert weight.nbytes >= 4096
    for written in (*weight.unbind(1), *weight.unbind(2)):
        for _ in range(2):
            layer(input, state)
        written += 1
        torch.testing.assert_close(layer(input, state), copy.deepcopy(layer)(input, state), rtol=0, atol=0)


def test_any_element_of_a_small_matrix_written_through_data_is_seen(direct_calls: list[int]) -> None:
    """As a numerical derivative writes them."""
    check_that_every_element_is_seen(rnnfast.GRU(3, 8, dtype=torch.float64), torch.randn(3, 2, 3, dtype=torch.float64))


def test_any_element_of_a_matrix_of_4_kb_is_seen(direct_calls: list[int]) -> None:
    layer = rnnfast.RNN(16, 64, bias=False)
    assert layer.weight_ih_l0.nbytes == 4096
    check_that_every_element_is_seen(layer, torch.randn(1, 1, 16), ["weight_ih_l0"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_step_of_a_fused_optimizer_is_seen(kind: Any, direct_calls: list[int]) -> None:
    """It writes without counting a version, here to an element that no sample has."""
    layer, cell, input = rnnfast.GRU(28, 64), rnnfast.GRUCell(28, 64, backend="cpu"), torch.randn(3, 2, 28)
    for _ in range(2):
        layer(input), cell(input[0])
    state = warmed_up(layer, input[0])
    for weight in (layer.weight_hh_l0, cell.weight_hh):
        weight.grad = torch.zeros_like(weight)
        weight.grad[3, 7] = 1
        kind([weight], lr=0.5, fused=True).step()
    torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)
    torch.testing.assert_close(cell(input[0]), copy.deepcopy(cell)(input[0]), rtol=0, atol=0)
    torch.testing.assert_close(layer.step(input[0], state), general_step(layer, input[0], state), rtol=0, atol=0)


def test_a_compiled_step_of_a_fused_optimizer_compiles_once() -> None:
    cpu.load()
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    for _ in range(4):
        weight.grad = torch.ones(3)
        step()
    assert counter.frame_count <= 1
    assert weight.tolist() == [-2.0] * 3


def test_new_weights_that_lie_where_the_old_ones_did_are_seen(direct_calls: list[int]) -> None:
    """The address is then the same, and so is the version; what has changed is an element that no sample has."""
    layer, cell, input = rnnfast.GRU(28, 64), rnnfast.GRUCell(28, 64, backend="cpu"), torch.randn(3, 2, 28)
    for i in range(20):
        layer(input), cell(input[0])
        for weight in (layer.weight_hh_l0, cell.weight_hh):
            for _ in range(2):
                changed = weight.data.clone()
                changed[5 * i % 192, (7 * i + 3) % 64] += 3
                weight.data = changed
                del changed
        torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)
        torch.testing.assert_close(cell(input[0]), copy.deepcopy(cell)(input[0]), rtol=0, atol=0)


def test_so_are_they_behind_a_call_of_another_kind(direct_calls: list[int]) -> None:
    """Which packs the weights in between for itself, and drops the packed ones that it finds."""
    layer, input = rnnfast.GRU(28, 64), torch.randn(3, 2, 28)
    weight = layer.weight_hh_l0
    for i in range(20):
        layer(input)
        for way in ("between", "last"):
            changed = weight.data.clone()
            changed[5 * i % 192, (7 * i + 3) % 64] += 3
            weight.data = changed
            del changed
            if way == "between":
                layer(input, lengths=[3, 2])
        torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)


def test_weights_that_are_put_back_after_others(direct_calls: list[int]) -> None:
    """As averaged weights are put there for an evaluation: in between, a call of another kind packs those."""
    layer, input = rnnfast.GRU(28, 64), torch.randn(3, 2, 28)
    for _ in range(2):
        expected = layer(input)
    for _ in range(5):
        weights = [weight.data for weight in layer.parameters()]
        for weight in layer.parameters():
            weight.data = weight.data * 0.5
        layer(input, lengths=[3, 2])
        rnnfast.GRU(28, 64)(input)  # may come to lie where nothing is kept any more
        for weight, data in zip(layer.parameters(), weights, strict=True):
            weight.data = data
        torch.testing.assert_close(layer(input), expected, rtol=0, atol=0)


def _write(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "weight" in name:
                weight[3, 7] += 5


def test_what_another_process_writes_to_shared_weights_is_seen(direct_calls: list[int]) -> None:
    """A learner beside its actors: torch counts the versions of each process for itself."""
    layer, cell = rnnfast.GRU(28, 64).share_memory(), rnnfast.GRUCell(28, 64, backend="cpu").share_memory()
    input = torch.randn(3, 2, 28)
    for _ in range(2):
        layer(input), cell(input[0])
    state = warmed_up(layer, input[0])
    for module in (layer, cell):
        learner = torch.multiprocessing.get_context("fork").Process(target=_write, args=(module,))
        learner.start()
        learner.join()
        assert learner.exitcode == 0
    torch.testing.assert_close(layer.step(input[0], state), general_step(layer, input[0], state), rtol=0, atol=0)
    torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)
    torch.testing.assert_close(cell(input[0]), copy.deepcopy(cell)(input[0]), rtol=0, atol=0)


def test_weights_that_functional_call_puts_there_are_used() -> None:
    layer, other, input = rnnfast.GRU(5, 8), rnnfast.GRU(5, 8), torch.randn(3, 2, 5)
    given = {name: weight.detach() for name, weight in other.named_parameters()}
    for _ in range(2):
        torch.testing.assert_close(torch.func.functional_call(layer, given, (input,)), other(input), rtol=0, atol=0)
    assert not torch.equal(layer(input)[0], other(input)[0])


@pytest.mark.parametrize("gradients", [True, False])
def test_a_nonlinearity_assigned_between_calls_is_used(gradients: bool, direct_calls: list[int]) -> None:
    layer, cell, input = rnnfast.RNN(5, 8), rnnfast.RNNCell(5, 8), torch.randn(3, 2, 5)
    state, stream = torch.randn(1, 2, 8), rnnfast.Stream(layer)
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in layer.state_dict().items()})
    with torch.set_grad_enabled(gradients):
        for name in ("relu", "tanh"):
            stream.state = state
            for _ in range(3):
                layer(input), layer.step(input[0], state), cell(input[0]), stream(input[0])
            going_on = layer(input[:1].expand(3, -1, -1), state)[1]
            layer.mode, cell.nonlinearity = f"RNN_{name.upper()}", name
            expected, _ = torch.nn.RNN.forward(layer, input, state)
            torch.testing.assert_close(layer(input, state)[0], expected)
            torch.testing.assert_close(layer.step(input[0], state)[0], expected[0])
            torch.testing.assert_close(cell(input[0], state[0]), expected[0])
            torch.testing.assert_close(stream(input[0]), torch.nn.RNN.forward(layer, input[:1], going_on)[0][0])
    assert gradients or direct_calls


def test_packed_weights_can_be_forgotten(direct_calls: list[int]) -> None:
    layer, cell, input = rnnfast.GRU(5, 64), rnnfast.GRUCell(5, 64, backend="cpu"), torch.randn(3, 2, 5)
    for _ in range(2):
        layer(input), cell(input[0])
    layer.weight_hh_l0.data[3, 7] += 1  # a single element, off the diagonal
    cell.weight_hh.data[3, 7] += 1
    rnnfast.forget_packed_weights()
    assert not weakref.getweakrefcount(cell.weight_hh)  # torch.utils.swap_tensors takes none that has any
    torch.testing.assert_close(layer(input), copy.deepcopy(layer)(input), rtol=0, atol=0)
    torch.testing.assert_close(cell(input[0]), copy.deepcopy(cell)(input[0]), rtol=0, atol=0)


@pytest.mark.parametrize("unusual", [lambda w: w.t().contiguous().t(), torch._neg_view], ids=["transposed", "negative"])
def test_weights_that_lie_unusually_from_the_start(unusual: Any) -> None:
    layer, input, state = rnnfast.RNN(16, 16), torch.randn(3, 2, 16), torch.randn(1, 2, 16)
    weight = torch.nn.Parameter(unusual(layer.weight_hh_l0.detach()))
    layer.weight_hh_l0 = weight
    plain = rnnfast.RNN(16, 16, backend="reference")
    plain.load_state_dict({name: w.detach().resolve_neg().contiguous() for name, w in layer.named_parameters()})
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for _ in range(3):
                torch.testing.assert_close(layer(input), plain(input))
                torch.testing.assert_close(layer.step(input[0], state), plain.step(input[0], state))
    for module in (layer, plain):
        module(input)[0].sum().backward()
    torch.testing.assert_close(layer.weight_hh_l0.grad.resolve_neg(), plain.weight_hh_l0.grad)


class _Seeing(torch.Tensor):
    """Sees what is done with it."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", ["meta", "subclass"])
def test_a_weight_swapped_for_one_of_another_kind(kind: str, gradients: bool) -> None:
    """By torch.utils.swap_tensors, which leaves the parameter the object that it was."""
    cell, input = rnnfast.RNNCell(16, 16), torch.randn(150, 16)
    for _ in range(3):
        cell(input)
    data = cell.weight_ih.detach().clone()
    torch.utils.swap_tensors(
        cell.weight_ih, torch.nn.Parameter(data.to("meta") if kind == "meta" else data.as_subclass(_Seeing))
    )
    unplanned, found = rnnfast.RNNCell(16, 16), []
    unplanned._parameters.update(cell._parameters)
    with torch.set_grad_enabled(gradients):
        for module in (cell, unplanned):
            _Seeing.seen.clear()
            try:
                result = module(input)
                found.append((type(result), result.tolist(), any("rnnfast.scan" in name for name in _Seeing.seen)))
            except (RuntimeError, NotImplementedError) as error:
                found.append((type(error), str(error)))
    assert found[0] == found[1]
