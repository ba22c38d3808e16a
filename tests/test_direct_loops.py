"""Loops of short calls with gradients: those of the weights are made at once, behind the last backward call."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast.backends import cpu
from rnnfast.direct import loops, plans

NAMES = ("RNNCell", "LSTMCell", "GRUCell", "RNN", "LSTM", "GRU")


def pair(name: str, *sizes: int, **options: Any) -> tuple[Any, Any]:
    """Ours, ready for direct calls, and torch.nn's with the same weights."""
    theirs = getattr(nn, name)(*sizes, **options)
    ours = getattr(rnnfast, name)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    like = torch.zeros(2, sizes[0], dtype=theirs._parameters[next(iter(theirs._parameters))].dtype)
    for _ in range(3):
        ours(like if name.endswith("Cell") else like.unsqueeze(0))
    return ours, theirs


def outputs(module: Any, steps: Tensor) -> list[Tensor]:
    """Of calls that feed the state back, one for each of `steps`."""
    state, found = None, []
    for step in steps:
        if isinstance(module, nn.RNNCellBase):
            state = module(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        else:
            output, state = module(step, state)
            found.append(output)
    return found


def loss_of(results: list[Tensor]) -> Tensor:
    return torch.stack(results).double().sin().sum()


def assert_same_gradients(ours: Any, theirs: Any) -> None:
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=lambda text, of=name: f"{of}: {text}")


def both(pair_of: tuple[Any, Any], run: Callable[[Any], Any]) -> tuple[Any, Any]:
    return run(pair_of[0]), run(pair_of[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"dtype": torch.float64}, {"num_layers": 2}],
    ids=["plain", "no bias", "f64", "two"],
)
def test_gradients(name: str, options: dict[str, Any], direct_call_names: list[str]) -> None:
    if name.endswith("Cell") and "num_layers" in options:
        pytest.skip("a cell has one layer")
    ours, theirs = pair(name, 5, 20, **options)
    sizes = (6, 3, 5) if name.endswith("Cell") else (6, 2, 3, 5)
    steps = torch.randn(*sizes, dtype=options.get("dtype")).requires_grad_()
    direct_call_names.clear()
    d_steps = []
    for module in (ours, theirs):
        loss_of(outputs(module, steps)).backward()
        d_steps.append(steps.grad)
        steps.grad = None
    torch.testing.assert_close(*d_steps)
    assert_same_gradients(ours, theirs)
    layers = options.get("num_layers", 1)
    calls = ["forward"] * 6 * layers + ["backward"] * 6 * layers
    assert sorted(direct_call_names) == sorted(calls + ["weight_gradients"] * layers)


@pytest.mark.parametrize("name", NAMES[:3])
def test_token_ids_and_bfloat16(name: str, direct_call_names: list[str]) -> None:
    ids = torch.randint(7, (5, 4))
    exact = getattr(rnnfast, name)(7, 33, dtype=torch.float64)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        ours = getattr(rnnfast, name)(7, 33, dtype=dtype)
        ours.load_state_dict(exact.state_dict())
        exact.load_state_dict(ours.state_dict())
        for _ in range(3):
            ours(ids[0])
        for module in (ours, exact):
            module.zero_grad()
            loss_of(outputs(module, ids)).backward()
        for parameter, expected in zip(ours.parameters(), exact.parameters(), strict=True):
            assert (parameter.grad - expected.grad).norm() <= error * expected.grad.norm()
    assert direct_call_names.count("weight_gradients") >= 2


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_more_rows_than_are_kept(name: str, direct_call_names: list[str]) -> None:
    modules = pair(name, 3, 8, dtype=torch.float64)
    steps = torch.randn(loops._MOST_ROWS // 100 + 3, 100, 3, dtype=torch.float64)
    direct_call_names.clear()
    both(modules, lambda module: loss_of(outputs(module, steps)).backward())
    assert_same_gradients(*modules)
    assert direct_call_names.count("weight_gradients") == 2


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize(
    ("sizes", "dtype", "packed"),
    [
        ((5, 33), torch.float32, (True, True)),  # no multiple of a vector
        ((32, 256), torch.float32, ()),  # read where they lie, or not, as the machine is
        ((28, 256), torch.float64, ()),
        ((16, 48), torch.bfloat16, ()),
        ((16, 1040), torch.float32, (True,)),  # w_hh is larger than any cache that is near
    ],
)
def test_weights_packed_for_many_backward_calls(
    name: str, sizes: tuple[int, int], dtype: torch.dtype, packed: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if sizes[1] > 1000 and name not in ("LSTM", "GRUCell"):
        pytest.skip("one large layer and one large cell suffice")
    module, _ = pair(name, *sizes, dtype=dtype)
    steps = torch.randn(10, 1, 3, sizes[0]).to(dtype)
    steps = (steps[:, 0] if name.endswith("Cell") else steps).requires_grad_()
    found_packed: list[tuple[bool, ...]] = []

    def run() -> list[Tensor]:
        made: list[Any] = []
        init = loops.Rows.__init__
        with monkeypatch.context() as context:
            context.setattr(loops.Rows, "__init__", lambda rows, *given: (made.append(rows), init(rows, *given))[1])
            found = torch.autograd.grad(loss_of(outputs(module, steps)), [steps, *module.parameters()])
        assert len(made) == 1
        weights = made[0].w_hh, made[0].w_ih
        found_packed.append(tuple(weight is not None and weight.numel() > 0 for weight in weights))
        return list(found)

    found = run()
    monkeypatch.setattr(loops, "_WORTH_PACKING", 1000)
    torch.testing.assert_close(found, run(), rtol=0, atol=0)
    assert found_packed[0][: len(packed)] == packed
    assert found_packed[1] == (False, False)


def test_several_backward_passes_through_one_loop() -> None:
    modules = pair("LSTMCell", 4, 12)
    steps = torch.randn(6, 2, 4)

    def run(module: Any) -> None:
        results = outputs(module, steps)
        loss_of(results[:3]).backward(retain_graph=True)
        results[4].sum().backward(retain_graph=True)
        loss_of(results).backward(retain_graph=True)
        loss_of(results).backward()

    both(modules, run)
    assert_same_gradients(*modules)


@pytest.mark.parametrize("steps", [1, 2])
def test_rows_that_fill_their_memory_write_nothing_behind_it(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair("GRU", 3, 5)
    empty, behind = cpu.empty, []

    def followed_by_sevens(like: Tensor, *sizes: int) -> Tensor:
        if like.dtype != torch.uint8:
            return empty(like, *sizes)
        memory = empty(like, sizes[0] + 4096).fill_(7)
        behind.append(memory[sizes[0] :])
        return memory[: sizes[0]]

    monkeypatch.setattr(cpu, "empty", followed_by_sevens)
    monkeypatch.setattr(loops, "_MOST_ROWS", 8)
    state, found = None, []
    for input in torch.randn(1 + 8 // (2 * steps), steps, 2, 3):  # the first call makes its own gradients
        output, state = ours(input, state)
        found.append(output)
    loss_of(found).backward()
    assert behind
    assert all((memory == 7).all() for memory in behind)


def test_a_pass_that_wants_no_weights(direct_call_names: list[str]) -> None:
    modules = pair("GRUCell", 4, 12)
    steps = torch.randn(6, 2, 4, requires_grad=True)

    def run(module: Any) -> list[Tensor]:
        results = outputs(module, steps)
        found = [*torch.autograd.grad(loss_of(results), steps, retain_graph=True)]
        loss_of(results).backward(inputs=[steps], retain_graph=True)
        assert module.weight_hh.grad is None
        found += torch.autograd.grad(loss_of(results), module.weight_hh, retain_graph=True)
        found += torch.autograd.grad(loss_of(results), [module.bias_ih, steps], retain_graph=True)
        loss_of(results).backward()
        return found

    found, expected = both(modules, run)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(*modules)
    assert direct_call_names.count("weight_gradients") == 3


def test_frozen_weights_are_left_alone() -> None:
    modules = pair("LSTMCell", 4, 12)
    steps = torch.randn(6, 2, 4)

    def run(module: Any) -> None:
        results = outputs(module, steps[:4])
        module.weight_ih.requires_grad_(False)
        results += outputs(module, steps[4:])
        module.weight_ih.requires_grad_()
        results += outputs(module, steps[4:])
        loss_of(results).backward()
        module.requires_grad_(False)
        assert not outputs(module, steps)[-1].requires_grad

    both(modules, run)
    assert_same_gradients(*modules)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name: str) -> None:
    modules = pair(name, 3, 5, dtype=torch.float64)
    steps = torch.randn(3, 2, 3, dtype=torch.float64)
    steps = (steps if name.endswith("Cell") else steps.unsqueeze(1)).requires_grad_()

    def run(module: Any) -> list[Tensor]:
        leaves = [steps, *module.parameters()]
        first = torch.autograd.grad(loss_of(outputs(module, steps)), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(d.square().sum() for d in first), leaves)]  # type: ignore[arg-type]

    torch.testing.assert_close(*both(modules, run))


def test_a_batch_of_gradients() -> None:
    modules = pair("LSTMCell", 3, 5)
    steps = torch.randn(4, 2, 3)

    def run(module: Any) -> Any:
        result = torch.stack(outputs(module, steps))
        d_results = torch.eye(6).reshape(6, 1, 6, 1).repeat(1, 4, 1, 5)[:, :, :2]
        return torch.autograd.grad(result, list(module.parameters()), d_results, is_grads_batched=True)

    torch.testing.assert_close(*both(modules, run))


def test_hooks_see_the_whole_gradient_once() -> None:
    modules = pair("LSTMCell", 4, 12)
    steps = torch.randn(6, 2, 4)

    def run(module: Any) -> tuple[list[Tensor], list[Tensor]]:
        of_weight: list[Tensor] = []
        of_bias: list[Tensor] = []
        module.weight_hh.register_hook(lambda d: of_weight.append(d.clone()) or d * 2)
        module.bias_hh.register_post_accumulate_grad_hook(lambda p: of_bias.append(p.grad.clone()))
        loss_of(outputs(module, steps)).backward()
        return of_weight, of_bias

    found, expected = both(modules, run)
    assert [len(seen) for seen in found] == [1, 1]
    torch.testing.assert_close(found, expected)
    assert_same_gradients(*modules)


def test_a_backward_pass_that_fails_leaves_nothing_to_the_next() -> None:
    modules = pair("GRUCell", 4, 12)
    steps = torch.randn(6, 2, 4)

    def run(module: Any) -> None:
        results = outputs(module, steps)

        def refuse(_: Tensor) -> None:
            raise ValueError("refused")

        handle = results[2].register_hook(refuse)
        with pytest.raises(ValueError, match="refused"):
            loss_of(results).backward(retain_graph=True)
        handle.remove()
        loss_of(results).backward()

    both(modules, run)
    assert_same_gradients(*modules)


def test_weights_may_not_change_before_backward() -> None:
    ours, _ = pair("LSTMCell", 4, 12)
    loss = loss_of(outputs(ours, torch.randn(6, 2, 4)))
    with torch.no_grad():
        ours.weight_hh *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_ends_with_its_graphs() -> None:
    ours, theirs = pair("LSTMCell", 4, 12)
    steps = torch.randn(6, 2, 4)
    results = outputs(ours, steps)
    reference = plans.kept_plan(ours).loops[False]
    loop = reference()
    assert loop is not None
    assert all(step.grad_fn.loop is loop for step in results)  # type: ignore[union-attr]
    loss_of(results).backward()
    loss_of(outputs(theirs, steps)).backward()
    assert_same_gradients(ours, theirs)
    assert not loop.shared[0].rows
    del results, loop
    gc.collect()
    assert reference() is None
    # Nothing is left of a graph that a change of type, which replaces the parameters' data, would not fit.
    loss_of(outputs(ours, steps))
    ours.double()
    loss_of(outputs(ours, steps.double())).backward()
    assert ours.weight_hh.grad.dtype == torch.float64


def test_reentrant_checkpoints() -> None:
    modules = pair("GRUCell", 4, 12)
    steps = torch.randn(6, 2, 4, requires_grad=True)

    def run(module: Any) -> None:
        def part(first: Tensor) -> Tensor:
            return torch.stack(outputs(module, first))

        inner = checkpoint(part, steps, use_reentrant=True)
        loss_of([inner, *outputs(module, steps)[:1]][:1]).backward(retain_graph=True)
        (inner.sum() + outputs(module, steps)[2].sum()).backward()

    both(modules, run)
    assert_same_gradients(*modules)


def test_several_threads_at_once() -> None:
    ours, theirs = pair("LSTMCell", 4, 12)
    steps = torch.randn(8, 20, 2, 4)
    for each in steps:
        loss_of(outputs(theirs, each)).backward()
    shared = [loss_of(outputs(ours, each)) for each in steps]
    threads = [threading.Thread(target=loss.backward) for loss in shared]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_calls_between_changes_of_weights() -> None:
    modules = pair("RNNCell", 4, 12)
    steps = torch.randn(5, 2, 4)

    def run(module: Any) -> list[Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(outputs(module, steps)).backward()
            optimizer.step()
        return list(module.parameters())

    torch.testing.assert_close(*both(modules, run))


@pytest.mark.parametrize("name", NAMES)
def test_new_data_that_a_call_without_gradients_has_packed(name: str) -> None:
    """A loop whose graph lives on has views of the old weights: the next loop must not join it."""
    modules = pair(name, 4, 12, dtype=torch.float64)
    steps = torch.randn(5, *([2] if name.endswith("Cell") else [1, 2]), 4, dtype=torch.float64)

    def run(module: Any) -> Any:
        loss_of(outputs(module, steps)).backward()
        old = loss_of(outputs(module, steps))
        for parameter in module.parameters():
            parameter.data = parameter.data * 0.5
        with torch.no_grad():
            outputs(module, steps)
        gradients = torch.autograd.grad(loss_of(outputs(module, steps)), [*module.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), [*module.parameters()])
        return *gradients, *second, old.detach()

    torch.testing.assert_close(*both(modules, run))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projection_goes_without(direct_call_names: list[str]) -> None:
    modules = pair("LSTM", 4, 12, proj_size=5)
    steps = torch.randn(6, 1, 2, 4)
    both(modules, lambda module: loss_of(outputs(module, steps)).backward())
    assert_same_gradients(*modules)
    assert "weight_gradients" not in direct_call_names


def test_copies_have_loops_of_their_own() -> None:
    ours, theirs = pair("GRUCell", 4, 12)
    steps = torch.randn(6, 2, 4)
    results = outputs(ours, steps)
    twin = copy.deepcopy(ours)
    loss_of(results).backward()
    loss_of(outputs(theirs, steps)).backward()
    assert_same_gradients(ours, theirs)
    assert all(parameter.grad is None for parameter in twin.parameters())
    loss_of(outputs(twin, steps)).backward()
    assert_same_gradients(twin, theirs)


def test_a_loop_takes_memory_for_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair("LSTMCell", 4, 12)
    capacities, of_pass = [], loops.SharedWeights.rows_of_pass

    def seen(self: Any, layer: Any, loop: Any) -> Any:
        rows = of_pass(self, layer, loop)
        capacities.append(rows.capacity)
        return rows

    monkeypatch.setattr(loops.SharedWeights, "rows_of_pass", seen)
    both((ours, theirs), lambda module: loss_of(outputs(module, torch.ones(6, 2, 4))).backward())
    assert_same_gradients(ours, theirs)
    assert set(capacities) == {12}


def test_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair("GRUCell", 4, 12)
    loss = loss_of(outputs(ours, torch.randn(6, 2, 4)))
    monkeypatch.setattr(loops.cpu, "weight_gradients", lambda *fields: 2)
    with pytest.raises(RuntimeError, match="no memory for the gradients of the weights"):
        loss.backward()
