"""Calls with gradients that go past torch's dispatcher: they have the general way's bits, and all of its features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast.direct import plans, training


def states_for(layer: Any, *batch: int) -> tuple[Tensor, ...]:
    dtype = layer.weight_hh_l0.dtype
    sizes = [layer.proj_size or layer.hidden_size, *([layer.hidden_size] if layer.mode == "LSTM" else [])]
    return tuple(torch.randn(layer.num_layers, *batch, size, dtype=dtype, requires_grad=True) for size in sizes)


def results(layer: Any, input: Tensor, states: tuple[Tensor, ...], used: str = "all", **options: Any) -> list[Tensor]:
    """Outputs and gradients of one call, with a loss of all outputs or of those that are used."""
    torch.manual_seed(1)
    output, state = layer(input, (states if len(states) == 2 else states[0]) if states else None)
    outputs = [output, *(state if isinstance(state, tuple) else (state,))]
    weighed = {"all": outputs, "output": outputs[:1], "state": outputs[1:], "last": outputs[-1:]}[used]
    loss = sum((part.double().sin() * torch.randn(part.shape, dtype=torch.float64)).sum() for part in weighed)
    leaves = [tensor for tensor in (*layer.parameters(), input, *states) if tensor.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, leaves, **options)]  # type: ignore[arg-type]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNN", {}),
        ("RNN", {"nonlinearity": "relu", "dtype": torch.bfloat16, "num_layers": 2, "bias": False}),
        ("LSTM", {"batch_first": True}),
        ("LSTM", {"num_layers": 2, "proj_size": 7, "bias": False}),
        ("LSTM", {"proj_size": 3, "dtype": torch.float64}),
        ("GRU", {"num_layers": 3, "batch_first": True, "dropout": 0.5}),
        ("GRU", {"dtype": torch.bfloat16}),
    ],
)
def test_it_has_the_general_calls_bits(
    name: str, options: dict[str, Any], token_ids: bool, direct_call_names: list[str]
) -> None:
    layer = getattr(rnnfast, name)(5, 17, **options)
    for sizes in ((9, 2), (9,), (1, 3), (1, 1)):
        input = torch.randint(5, sizes) if token_ids else torch.randn(*sizes, 5).to(layer.weight_hh_l0.dtype)
        input.requires_grad_(not token_ids)
        batch = sizes[: len(sizes) - 1] if layer.batch_first else sizes[1:]
        for states in ((), states_for(layer, *batch)):
            for used in ("all", "output", "last"):
                results(layer, input, states)
                direct_call_names.clear()
                found = results(layer, input, states, used)
                assert direct_call_names == [*["forward"] * layer.num_layers, *["backward"] * layer.num_layers]
                expected = results(copy.deepcopy(layer), input, states, used)
                assert_same(found, expected)
                assert found[0].stride() == expected[0].stride()
                memory = {tensor.untyped_storage().data_ptr() for tensor in found}
                assert len(memory) == len(found)


def test_what_needs_no_gradient_gets_none(direct_call_names: list[str]) -> None:
    layer, input, states = rnnfast.LSTM(5, 8), torch.randn(4, 2, 5), states_for(rnnfast.LSTM(5, 8), 2)
    layer(input)
    for frozen in (["weight_ih_l0"], ["bias_hh_l0", "weight_hh_l0"], [name for name, _ in layer.named_parameters()]):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for given in (input, input.clone().requires_grad_()):
            assert_same(results(layer, given, states), results(copy.deepcopy(layer), given, states))
    assert direct_call_names == ["forward", "backward"] * 6
    assert not layer(input)[0].requires_grad
    assert direct_call_names[-1] == "infer"


def test_second_derivatives(direct_call_names: list[str]) -> None:
    for name in ("RNN", "LSTM", "GRU"):
        layer = getattr(rnnfast, name)(2, 3, dtype=torch.float64)
        input = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
        layer(input)
        leaves = (input, *states_for(layer, 2), *layer.parameters())

        def call(input: Tensor, *tensors: Tensor, layer: Any = layer) -> tuple[Tensor, ...]:
            output, state = layer(input, tensors[:2] if layer.mode == "LSTM" else tensors[0])
            return (output, *state) if isinstance(state, tuple) else (output, state)

        def call_without_state(input: Tensor, *_: Tensor, layer: Any = layer) -> Tensor:
            output: Tensor = layer(input)[0]
            return output

        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call_without_state, (input, *layer.parameters()))
    assert {"forward", "backward"} <= set(direct_call_names)


def test_second_derivatives_of_what_was_frozen(direct_call_names: list[str]) -> None:
    """What needed no gradient in the call has none, even if it needs one by the time of the derivative."""
    layer, input = rnnfast.GRU(5, 8), torch.randn(4, 2, 5, requires_grad=True)
    layer(input)
    layer.weight_hh_l0.requires_grad_(False)
    loss = layer(input)[0].square().sum()
    layer.weight_hh_l0.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    weights = [layer.weight_hh_l0, layer.weight_ih_l0]
    frozen, other = torch.autograd.grad(gradient.square().sum(), weights, allow_unused=True)
    assert frozen is None
    assert other.any()
    assert "forward" in direct_call_names


def test_a_batch_of_gradients(direct_call_names: list[str]) -> None:
    layer, input = rnnfast.GRU(5, 8), torch.randn(4, 2, 5, requires_grad=True)
    layer(input)
    output, _ = layer(input)
    d_outputs = torch.randn(3, *output.shape)
    leaves = [input, *layer.parameters()]
    found = torch.autograd.grad(output, leaves, d_outputs, is_grads_batched=True, retain_graph=True)
    assert "backward" not in direct_call_names
    for index, d_output in enumerate(d_outputs):
        expected = torch.autograd.grad(output, leaves, d_output, retain_graph=True)
        torch.testing.assert_close([gradient[index] for gradient in found], list(expected))
    assert direct_call_names == ["forward", *["backward"] * 3]


def test_gradients_in_unusual_memory(direct_call_names: list[str]) -> None:
    layer, input = rnnfast.LSTM(5, 8), torch.randn(4, 2, 5)
    layer(input)
    output, _ = layer(input)
    d_output = torch.randn(4, 2, 8)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(output, parameters, d_output, retain_graph=True)
    for same in (d_output.mT.contiguous().mT, torch._neg_view(-d_output)):
        assert_same(list(torch.autograd.grad(output, parameters, same, retain_graph=True)), list(expected))
    ones = torch.autograd.grad(output.sum(), parameters, retain_graph=True)
    assert_same(list(ones), list(torch.autograd.grad(output, parameters, torch.ones_like(output))))
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_what_is_saved_may_not_change(direct_call_names: list[str]) -> None:
    layer, input = rnnfast.RNN(5, 8), torch.randn(4, 2, 5)
    layer(input)
    output, _ = layer(input)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output, _ = layer(input)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    assert direct_call_names == ["forward"] * 2


@pytest.mark.parametrize("way", ["half", "double", "data", "smaller data", "twice", "input", "state"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_data_replaced_before_backward(name: str, way: str, direct_call_names: list[str]) -> None:
    """Gradients are those of what the forward call read, as where autograd keeps views."""
    layer, input = getattr(rnnfast, name)(5, 8), torch.randn(4, 2, 5, requires_grad=True)
    layer(input)
    hx = tuple(torch.randn(1, 2, 8, requires_grad=True) for _ in range(1 + (name == "LSTM")))
    leaves = [input, *hx, *layer.parameters()]

    def output() -> Tensor:
        found: Tensor = layer(input, hx if name == "LSTM" else hx[0])[0]
        return found

    expected = torch.autograd.grad(output().sum(), leaves)
    loss = output().sum()
    if way in ("half", "double"):
        layer.to(torch.bfloat16 if way == "half" else torch.float64)
    elif way == "smaller data":
        layer.weight_hh_l0.data = torch.zeros(3, 1)
    elif way in ("data", "twice"):
        for _ in range(1 + (way == "twice")):  # the second may find the memory that the first has freed
            for parameter in layer.parameters():
                parameter.data = parameter.data * 2
    else:
        tensor = input if way == "input" else hx[-1]
        tensor.data = torch.zeros(1)
    if way in ("half", "double"):  # a parameter of another type is another leaf, but accumulates as it did
        loss.backward()
        found = [leaf.grad for leaf in leaves]
    else:
        found = list(torch.autograd.grad(loss, leaves))
    assert_same(found, list(expected))
    assert direct_call_names == ["forward", "backward"] * 2


@pytest.mark.parametrize("way", ["optimizer", "data", "sliced", "transposed", "double"])
def test_changed_weights_are_seen(way: str, direct_call_names: list[str]) -> None:
    layer, input = rnnfast.RNN(8, 8), torch.randn(4, 2, 8)
    layer(input)
    layer(input)[0].sum().backward()
    weight = layer.weight_hh_l0
    if way == "optimizer":
        torch.optim.SGD(layer.parameters(), lr=0.5).step()
    elif way == "data":
        weight.data = weight.data * 0.5
    elif way == "sliced":
        weight.data = weight.data[:4]
    elif way == "transposed":
        weight.data = weight.data.t()
    else:
        layer.double()
        input = input.double()
    fresh = rnnfast.RNN(8, 8)  # without a plan; a deep copy of a transpose is none
    for name in list(fresh._parameters):
        setattr(fresh, name, torch.nn.Parameter(getattr(layer, name).detach()))
    if way == "sliced":
        for each in (layer, fresh):
            with pytest.raises(RuntimeError):
                each(input)
    else:
        assert_same(results(layer, input, ()), results(fresh, input, ()))


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_a_loop_of_short_calls_packs_its_weights_once(
    name: str, token_ids: bool, direct_call_names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {} if name.endswith("Cell") else {"num_layers": 2}
    layer = getattr(rnnfast, name)(5, 24, **options)
    steps = torch.randint(5, (6, 1, 3)) if token_ids else torch.randn(6, 1, 3, 5)
    packings = []
    pack = plans.Plan.pack
    monkeypatch.setattr(plans.Plan, "pack", lambda plan, ids: packings.append(ids) or pack(plan, ids))

    def loop() -> list[Tensor]:
        state, outputs = None, []
        for step in steps[:, 0] if name.endswith("Cell") else steps:
            output, state = (layer(step, state),) * 2 if name.endswith("Cell") else layer(step, state)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        result = torch.stack(outputs)
        return [result, *torch.autograd.grad(result.sin().sum(), list(layer.parameters()))]

    loop()  # the first call leaves a plan, the third packs
    direct_call_names.clear()
    found = loop()
    layers = options.get("num_layers", 1)
    calls = ["forward"] * 6 * layers + ["backward"] * 6 * layers
    assert sorted(direct_call_names) == sorted(calls + ["weight_gradients"] * layers)
    assert packings == [token_ids]

    def assert_as_without_packing(found: list[Tensor]) -> None:
        with monkeypatch.context() as context:
            context.setattr(training, "_SHORT", 0)
            expected = loop()
        assert_same(found[:1], expected[:1])
        torch.testing.assert_close(found, expected)  # gradients of weights are added up in another order

    assert_as_without_packing(found)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= 0.5
    layer(steps[0, 0] if name.endswith("Cell") else steps[0])
    assert not plans.kept_plan(layer).packed  # the weights that were are not held
    assert_as_without_packing(loop())


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTMCell"])
@pytest.mark.parametrize("freed", ["input", "state", "output", "weight"])
def test_what_is_freed_before_backward_is_an_error(name: str, freed: str) -> None:
    """Its memory, not the tensor: the address that is left is that of what is absent."""
    for calls in (1, 2, 3):  # the general way, a direct call, and one of a loop
        layer = getattr(rnnfast, name)(8, 8)
        is_cell = name.endswith("Cell")
        for _ in range(calls):
            input, h = torch.randn(*([] if is_cell else [3]), 2, 8), torch.randn(*([] if is_cell else [1]), 2, 8)
            result = layer(input, (h, torch.randn_like(h)) if name.startswith("LSTM") else h)
        output = result[0] if isinstance(result, tuple) else result
        (weight, *_) = layer.parameters()
        tensor = {"input": input, "state": h, "output": output, "weight": weight}[freed]
        gradient = torch.ones_like(output)
        tensor.untyped_storage().resize_(0)
        if freed == "output" and name not in ("RNN", "LSTM", "GRU"):
            continue  # a cell's backward does not read it
        with pytest.raises(RuntimeError, match="has no memory"):
            output.backward(gradient)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTMCell"])
def test_a_freed_weight_is_an_error(name: str, gradients: bool) -> None:
    layer, input = getattr(rnnfast, name)(8, 8), torch.randn(2, 2, 8)[0 if name.endswith("Cell") else slice(None)]
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            layer(input)
        layer.get_parameter(next(name for name in layer._parameters if "weight_hh" in name)).untyped_storage().resize_(
            0
        )
        with pytest.raises(RuntimeError, match=r"has no memory|out of bounds for storage of size 0"):
            layer(input)


def test_a_loop_over_token_ids_of_a_large_vocabulary_packs_no_table(direct_call_names: list[str]) -> None:
    for size, packs in ((4096, True), (4097, False)):
        cell, ids = rnnfast.GRUCell(size, 4), torch.tensor([1, size - 1])
        results = [cell(ids) for _ in range(4)]
        plan = plans.kept_plan(cell)
        assert plan is not None
        assert (True in plan.packed) == packs
        assert all(torch.equal(each, results[0]) for each in results)
        sum(each.sum() for each in results).backward()
        expected = rnnfast.GRUCell(size, 4, backend="reference")
        expected.load_state_dict(cell.state_dict())
        (4 * expected(ids).sum()).backward()
        for ours, theirs in zip(cell.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_loop_with_shared_weights_keeps_none() -> None:
    layer, input = rnnfast.GRU(8, 8).share_memory(), torch.randn(1, 2, 8)
    for _ in range(4):
        layer(input)
    assert not plans.kept_plan(layer).packed


def test_a_loop_sees_weights_written_through_data(direct_call_names: list[str]) -> None:
    layer, input = rnnfast.LSTM(8, 8), torch.randn(1, 2, 8)
    for _ in range(4):
        layer(input)
    assert direct_call_names == ["forward"] * 3
    assert plans.kept_plan(layer).packed
    layer.weight_hh_l0.data *= 0.5
    assert_same(results(layer, input, ()), results(copy.deepcopy(layer), input, ()))
    assert direct_call_names == ["forward"] * 3  # the general way, once
    assert_same(results(layer, input, ()), results(copy.deepcopy(layer), input, ()))
    assert direct_call_names == [*["forward"] * 4, "backward"]


def test_a_loop_sees_one_element_that_is_written(direct_call_names: list[str]) -> None:
    """Of a matrix of which a sample of elements is compared, and not this one: by its version."""
    layer, input = rnnfast.RNN(5, 64), torch.randn(1, 2, 5)
    state = torch.ones(1, 2, 64)
    for _ in range(4):
        layer(input, state)
    assert plans.kept_plan(layer).packed
    with torch.no_grad():
        layer.weight_hh_l0[3, 10] += 1
    assert_same(results(layer, input, (state,)), results(copy.deepcopy(layer), input, (state,)))
    assert not plans.kept_plan(layer).packed


def test_checkpointing_before_and_behind_a_plan(direct_call_names: list[str]) -> None:
    layer, input = rnnfast.GRU(5, 8), torch.randn(4, 2, 5, requires_grad=True)
    output, _ = checkpoint(layer, input, use_reentrant=False)  # the general way
    layer(input)
    assert direct_call_names == ["forward"]
    output.sum().backward()  # runs the layer again, and must find what the first run saved
    found = [input.grad, *(parameter.grad for parameter in layer.parameters())]
    expected = torch.autograd.grad(layer(input)[0].sum(), [input, *layer.parameters()])
    assert_same(found, list(expected))  # type: ignore[arg-type]
    output, _ = checkpoint(layer, input, use_reentrant=False)
    assert_same(list(torch.autograd.grad(output.sum(), [input, *layer.parameters()])), list(expected))


def test_hooks_of_all_kinds(direct_call_names: list[str]) -> None:
    layer, input, seen = rnnfast.GRU(5, 8), torch.randn(4, 2, 5, requires_grad=True), list[str]()
    layer(input)
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.weight_hh_l0.register_hook(lambda _: seen.append("weight"))
    layer.weight_ih_l0.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    layer(input)[0].sum().backward()
    assert sorted(seen) == ["accumulated", "backward", "forward", "weight"]
    assert direct_call_names == ["forward", "backward"]
    with torch.autograd.graph.save_on_cpu():
        output, _ = layer(input)
    output.sum().backward()
    assert direct_call_names == ["forward", "backward"]


def test_what_must_see_a_backward_call_does(direct_call_names: list[str]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    layer, input, seen = rnnfast.GRU(5, 8), torch.randn(4, 2, 5), list[str]()
    layer(input)
    output, _ = layer(input)
    with Names():
        output.sum().backward()
    assert any("scan_cpu_backward" in name for name in seen)
    with Names():
        layer(input)
    assert direct_call_names == ["forward"]
    found = torch.func.grad(lambda x: layer(x)[0].sum())(input)
    given = input.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(given)[0].sum(), given)
    torch.testing.assert_close(found, expected)


def test_both_directions_go_the_general_way(direct_call_names: list[str]) -> None:
    layer, input = rnnfast.LSTM(5, 8, bidirectional=True), torch.randn(4, 2, 5)
    layer(input)
    layer(input)[0].sum().backward()
    assert not direct_call_names
    with torch.no_grad():
        layer(input)
    assert direct_call_names == ["infer"]


def test_a_token_id_outside_the_vocabulary(direct_call_names: list[str]) -> None:
    layer = rnnfast.LSTM(5, 8, num_layers=2)
    layer(torch.randint(5, (3, 2)))
    layer(torch.randint(5, (3, 2)))
    with pytest.raises(IndexError, match=r"token ids must be in \[0, 5\)"):
        layer(torch.tensor([[1], [5]]))


def test_training_in_several_threads(direct_call_names: list[str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    layer, inputs = rnnfast.GRU(5, 8), [torch.randn(20, 2, 5, requires_grad=True) for _ in range(4)]
    layer(inputs[0])
    expected = [results(layer, input, (), "state") for input in inputs]

    def work(index: int) -> bool:
        output, _ = layer(inputs[index])
        gradients = torch.autograd.grad(output.square().sum(), [inputs[index]])
        with torch.no_grad():
            return torch.equal(layer(inputs[index])[0], output) and bool(gradients[0].isfinite().all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, list(range(4)) * 10))
    assert_same(results(layer, inputs[0], (), "state"), expected[0])
