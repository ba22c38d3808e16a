"""Steps and sequences without gradients that go past torch's dispatcher: they run where they may, and miss nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.nn.utils import parametrizations, prune

import rnnfast
from rnnfast.direct import plans


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


def test_steps_of_many_batch_sizes_keep_no_memory(direct_calls: list[int]) -> None:
    layer = rnnfast.GRU(3, 8)
    warmed_up(layer, torch.randn(1, 3))
    held = []
    for batch in range(1, 20):
        layer.step(torch.randn(batch, 3), torch.zeros(1, batch, 8))
        held.append(sum(type(each) is torch.Tensor for each in gc.get_objects()))
    assert held[-1] == held[0]
    assert direct_calls == [0] * 19


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # of torch 2.11
def test_a_profiler_sees_the_operators() -> None:
    layer, input = rnnfast.GRU(5, 16), torch.randn(3, 2, 5)
    layer(input)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(input)
    assert "rnnfast::scan_cpu_packed" in {event.name for event in profile.events()}


def test_a_layer_that_has_moved_leaves_no_memory_behind() -> None:
    layer, input = rnnfast.LSTM(64, 512), torch.randn(3, 2, 64)
    for _ in range(2):
        layer(input)
        layer(input)[0].sum().backward()
    assert plans.kept_plan(layer) is not None
    layer.to("meta")
    layer(input.to("meta"))
    assert plans.kept_plan(layer) is None


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
    layer.step(input, state)  # torch.nn's list of weights still has what functional_call put there
    assert not direct_calls
    layer.step(input.t().contiguous().t(), state)
    layer.step(input, state.transpose(0, 2).contiguous().transpose(0, 2))
    layer.step(input, state)
    assert direct_calls == [0] * 3


@pytest.mark.parametrize("part", [0, 1], ids=["h", "c"])
def test_a_part_of_a_state_that_is_not_contiguous(part: int, direct_calls: list[int]) -> None:
    layer, input = rnnfast.LSTM(5, 16), torch.randn(2, 5)
    state = list(warmed_up(layer, input))
    state[part] = state[part].transpose(0, 2).contiguous().transpose(0, 2)
    expected = general_step(layer, input, state)
    torch.testing.assert_close(layer.step(input, state), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer(input[None], state)[0][0], expected[0], rtol=0, atol=0)
    assert direct_calls == [0] * 2


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
    layer(input[None])
    assert not direct_calls
    layer.eval()
    layer.step(input, state)
    layer(input[None])
    assert direct_calls == [0, 0]


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
    from rnnfast.direct import plans

    layer = rnnfast.GRU(3, 4)
    warmed_up(layer, torch.randn(2, 3))
    plan = weakref.ref(plans.kept_plan(layer))
    assert plan() in plans.all_plans()
    del layer
    assert plan() is None


@pytest.mark.parametrize("gradients", [False, True])
def test_a_plan_goes_with_its_layer_even_where_a_hook_of_a_weight_refers_to_it(gradients: bool) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.mask = rnnfast.LSTM(8, 8), torch.ones(32, 8)
            self.layer.weight_hh_l0.register_hook(lambda gradient: gradient * self.mask)

    model = Masked()
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            output = model.layer(torch.randn(3, 2, 8))[0]
    if gradients:
        output.sum().backward()
    plan, gone = weakref.ref(plans.kept_plan(model.layer)), weakref.ref(model)
    assert plan() is not None
    del model, output
    gc.collect()
    assert gone() is None
    assert plan() is None


def test_copies_and_pickles_have_no_plan() -> None:
    layer, input = rnnfast.GRU(3, 4), torch.randn(2, 2, 3)
    layer(input)
    assert plans.kept_plan(layer) is not None
    twin, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for other in (twin, pickled):
        assert plans.kept_plan(other) is None
        torch.testing.assert_close(other(input), layer(input), rtol=0, atol=0)
    shallow = copy.copy(layer)
    shallow._parameters = {name: torch.nn.Parameter(2 * weight) for name, weight in layer._parameters.items()}
    shallow._flat_weights = list(shallow._parameters.values())
    for _ in range(2):
        torch.testing.assert_close(shallow(input), copy.deepcopy(shallow)(input), rtol=0, atol=0)
        torch.testing.assert_close(layer(input), twin(input), rtol=0, atol=0)


def test_a_layer_of_another_dtype_leaves_no_memory_behind() -> None:
    layer, input = rnnfast.LSTM(4, 8), torch.randn(3, 2, 4)
    with torch.no_grad():
        for _ in range(2):
            layer(input)
        plan = weakref.ref(plans.kept_plan(layer))
        layer.half()(input.half())
    assert plan() is None


# ---- whole sequences -----------------------------------------------------------------------------------------------


def general(layer: Any, *args: Any) -> Any:
    return copy.deepcopy(layer)(*args)  # a copy has no plan


def state_for(layer: Any, *batch: int) -> Any:
    lanes, dtype = layer.num_layers * (2 if layer.bidirectional else 1), layer.weight_hh_l0.dtype
    h_0 = torch.randn(lanes, *batch, layer.proj_size or layer.hidden_size, dtype=dtype)
    return (h_0, torch.randn(lanes, *batch, layer.hidden_size, dtype=dtype)) if layer.mode == "LSTM" else h_0


def parts(result: Any) -> list[torch.Tensor]:
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, check_stride=True)


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNN", {"nonlinearity": "relu"}),
        ("RNN", {"dtype": torch.bfloat16, "num_layers": 2}),
        ("LSTM", {"num_layers": 3}),
        ("LSTM", {"num_layers": 2, "proj_size": 7, "bias": False, "bidirectional": True}),
        ("GRU", {"dtype": torch.float64, "num_layers": 4, "bidirectional": True, "batch_first": True}),
        ("GRU", {"batch_first": True}),
    ],
)
def test_a_sequence_has_the_general_calls_bits(
    name: str, options: dict[str, Any], token_ids: bool, direct_calls: list[int]
) -> None:
    layer = getattr(rnnfast, name)(5, 33, **options)
    for sizes in ((9, 2), (9,), (1, 3)):
        input = torch.randint(5, sizes) if token_ids else torch.randn(*sizes, 5).to(layer.weight_hh_l0.dtype)
        batch = sizes[: len(sizes) - 1] if layer.batch_first else sizes[1:]
        for state in (None, state_for(layer, *batch)):
            layer(input, state)
            direct_calls.clear()
            result = layer(input, state)
            assert direct_calls == [0]
            assert_same(result, general(layer, input, state))
            memory = [part.untyped_storage().data_ptr() for part in parts(result)]
            assert len(set(memory)) == len(memory)
        noncontiguous = input.transpose(0, -1).contiguous().transpose(0, -1)
        assert_same(layer(noncontiguous), layer(input))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layers_whose_weights_no_cache_holds_together_have_the_general_calls_bits(
    name: str, direct_calls: list[int]
) -> None:
    """Threads share such a step, be it ever so short."""
    layer = getattr(rnnfast, name)(60, 300, num_layers=3)
    with torch.no_grad():
        layer(torch.randn(1, 1, 60))
        for size in ((1, 1), (1, 3), (4, 1), (2, 9)):
            input = torch.randn(*size, 60)
            assert_same(layer(input), general(layer, input))
        assert direct_calls == [0] * 4


def test_sequences_of_other_sizes_follow_one_plan(direct_calls: list[int]) -> None:
    layer = rnnfast.LSTM(5, 16, num_layers=2)
    layer(torch.randn(3, 2, 5))
    state = None
    for steps in (1, 40, 3):
        input = torch.randn(steps, 7, 5)
        expected = general(layer, input, state)
        result = layer(input, state)
        assert_same(result, expected)
        state = list(result[1])  # torch.nn takes a list, too
    layer(torch.randint(5, (4, 2)))
    assert direct_calls == [0] * 4


@pytest.mark.parametrize("way", ["in place", "data", "sliced", "written", "replaced", "double", "transposed"])
def test_a_sequence_sees_changed_weights(way: str, direct_calls: list[int]) -> None:
    layer, input = rnnfast.RNN(16, 16), torch.randn(4, 2, 16)
    layer(input)
    layer(input)
    weight = layer.weight_hh_l0
    if way == "in place":
        weight.mul_(0.5)
    elif way == "data":
        weight.data = weight.data * 0.5
    elif way == "sliced":  # at the same address
        weight.data = weight.data[:8]
    elif way == "written":
        weight.data.mul_(0.5)
    elif way == "replaced":
        layer.weight_hh_l0 = torch.nn.Parameter(weight * 0.5)
    elif way == "double":
        layer.double()
    else:
        weight.data = weight.data.t()  # likewise
    for each in (input, input.double()):
        assert outcome(layer, each) == outcome(copy.deepcopy(layer), each)
    if way not in ("sliced", "double", "transposed"):
        layer(input)
        assert direct_calls[-1:] == [0]


def outcome(layer: Any, *args: Any) -> Any:
    """The numbers that a call returns, or its error."""
    try:
        return [part.tolist() for part in parts(layer(*args))]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return type(error), str(error)


MISTAKES: list[Any] = [
    ([[1.0]],),
    (torch.randn(3),),
    (torch.randn(3, 2, 4),),
    (torch.randn(3, 2, 2, 5),),
    (torch.randn(0, 2, 5),),
    (torch.randn(3, 2, 5).double(),),
    (torch.randn(3, 2, 5, dtype=torch.complex64),),
    (torch.ones(3, 2, dtype=torch.bool),),
    (torch.tensor([[0, 5]]),),
    (torch.tensor([[-1, 4]]),),
    (torch.tensor(1),),
    (torch.randn(3, 2, 5, device="meta"),),
    (torch.randn(3, 2, 5), "state"),
    (torch.randn(3, 2, 5), 3),
    (torch.randn(3, 2, 5), torch.zeros(2, 1, 2, 8)),
    (torch.randn(3, 2, 5), (torch.zeros(1, 2, 8),) * 3),
    (torch.randn(3, 2, 5), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 7))),
    (torch.randn(3, 2, 5), (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8))),
    (torch.randn(3, 2, 5), torch.zeros(1, 2, 8)),
    (torch.randn(3, 2, 5), torch.zeros(2, 8)),
    (torch.randn(3, 2, 5), torch.zeros(1, 2, 8).double()),
    (torch.randn(3, 2, 5), torch.zeros(1, 2, 8, device="meta")),
    (torch.randn(3, 5), torch.zeros(1, 1, 8)),
]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_mistakes_have_the_errors_of_the_general_call(name: str, gradients: bool) -> None:
    layer = getattr(rnnfast, name)(5, 8)
    with torch.set_grad_enabled(gradients):
        layer(torch.randn(3, 2, 5))
        layer(torch.randint(5, (3, 2)))
        failed = 0
        for mistake in MISTAKES:
            expected = outcome(copy.deepcopy(layer), *mistake)
            failed += isinstance(expected, tuple)
            assert outcome(layer, *mistake) == expected
    assert failed >= len(MISTAKES) - 3  # each is a mistake for two of the cells at least
    assert outcome(layer, torch.randn(0, 0, 5)) == outcome(copy.deepcopy(layer), torch.randn(0, 0, 5))


def test_a_batch_of_nothing_goes_the_general_way(direct_calls: list[int]) -> None:
    layer = rnnfast.GRU(5, 8)
    layer(torch.randn(3, 2, 5))
    assert_same(layer(torch.randn(3, 0, 5)), general(layer, torch.randn(3, 0, 5)))
    assert not direct_calls


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_inference_mode_with_gradients_enabled_records_no_graph(name: str, options: Any, backend: str) -> None:
    layer, input = getattr(rnnfast, name)(5, 7, backend=backend, **options), torch.randn(6, 3, 5)
    cell = getattr(rnnfast, f"{name}Cell")(5, 7, backend=backend)
    expected = layer(input)[0].detach(), layer(input, lengths=[3, 6, 1])[0].detach()
    stream = None if options.get("bidirectional") else rnnfast.Stream(layer)
    for _ in range(3):  # the general way, and those that follow its plan
        with torch.inference_mode(), torch.enable_grad():
            found = layer(input)[0], layer(input, lengths=[3, 6, 1])[0]
            state = cell(input[0])
            steps = torch.stack([found[0][0] if stream is None else stream(step) for step in input])
        torch.testing.assert_close(found, expected)
        assert not found[0].requires_grad
        assert not (state[0] if name == "LSTMCell" else state)[0].requires_grad
        if stream is not None:
            torch.testing.assert_close(steps, expected[0])
            stream.reset()
    layer(input)[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None


def test_what_must_see_a_sequence_does(direct_calls: list[int]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    layer, input, seen = rnnfast.GRU(5, 16), torch.randn(4, 2, 5), list[str]()
    layer(input)
    with Names():
        layer(input)
    assert any("rnnfast" in name for name in seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(input)[0].dtype == torch.bfloat16
    with torch.device("meta"):
        layer(input)
    with rnnfast.use_backend("reference"):
        layer(input)
    half = {"weight_hh_l0": layer.weight_hh_l0 * 0.5}
    changed = torch.func.functional_call(layer, half, (input,))
    mapped = torch.vmap(lambda x: layer(x)[0])(torch.stack([input, -input]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)[0]).tangent is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, (input,), check_trace=False)
    layer(input, lengths=[4, 2])
    layer(torch.nn.utils.rnn.pack_padded_sequence(input, torch.tensor([4, 2])))
    assert not direct_calls
    torch.testing.assert_close(traced(-input)[0], layer(-input)[0])
    torch.testing.assert_close(mapped[1], layer(-input)[0])
    layer.weight_hh_l0.mul_(0.5)
    torch.testing.assert_close(changed, layer(input))
    assert direct_calls == [0] * 3


@pytest.mark.parametrize("gradients", [False, True])
def test_transforms_behind_a_plan(gradients: bool) -> None:
    """Dual numbers, and vmap over something other than the input: both are ordinary tensors for the layer."""
    layer, cell, input = rnnfast.GRU(5, 16), rnnfast.GRUCell(5, 16), torch.randn(4, 2, 5)
    state = torch.randn(1, 2, 16)
    calls = [lambda m, x: m[0](x)[0], lambda m, x: m[0].step(x[0], state)[0], lambda m, x: m[1](x[0])]
    with torch.set_grad_enabled(gradients):
        for call in calls:
            for _ in range(3):
                expected = call((layer, cell), input)
            mapped = torch.vmap(lambda scale, f=call: scale * f((layer, cell), input))(torch.tensor([1.0, 3.0]))
            torch.testing.assert_close(mapped, torch.stack([expected, 3 * expected]))
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
                found, reference = (
                    torch.autograd.forward_ad.unpack_dual(call(modules, dual)).tangent
                    for modules in ((layer, cell), copy.deepcopy((layer, cell)))
                )
            assert reference is not None
            torch.testing.assert_close(found, reference)


def test_a_negative_view_is_read_as_what_it_holds(direct_calls: list[int]) -> None:
    layer, input = rnnfast.GRU(5, 16), torch.randn(4, 2, 5)
    state = layer(input)[1]
    negative, negative_state = torch._neg_view(input), torch._neg_view(state)
    assert negative.is_contiguous()
    assert_same(layer(negative, negative_state), layer(-input, -state))
    assert_same(layer.step(negative[0], state), layer.step(-input[0], state))
    assert direct_calls == [0, 0]


@pytest.mark.parametrize("way", ["pruned", "parametrized"])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_made_from_others_are_used(way: str, bias: bool, direct_calls: list[int]) -> None:
    layer, input = rnnfast.RNN(5, 8, bias=bias), torch.randn(4, 2, 5)
    layer(input)
    state = layer(input)[1]
    if way == "pruned":
        prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
        layer.weight_hh_l0_orig.mul_(2)
    else:
        parametrizations.weight_norm(layer, "weight_hh_l0")
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
    direct_calls.clear()
    layer(input)
    expected = torch.nn.RNN(5, 8, bias=bias)
    expected.load_state_dict({name: getattr(layer, name) for name in expected.state_dict()})
    torch.testing.assert_close(layer(input), expected(input))
    torch.testing.assert_close(layer.step(input[0], state)[0], expected(input[:1], state)[0][0])
    assert not direct_calls


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_flat_weights_that_are_assigned_are_used(name: str, grad: bool) -> None:
    theirs, ours = getattr(torch.nn, name)(5, 7), getattr(rnnfast, name)(5, 7)
    ours.load_state_dict(theirs.state_dict())
    input, found = torch.randn(6, 3, 5), []
    for layer in (theirs, ours):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                layer(input)
            others = [(0.5 * weight).detach().requires_grad_() for weight in layer._flat_weights]
            layer._flat_weights = others
            results = []
            for _ in range(3):
                output = layer(input)[0]
                results += [output.detach(), *(torch.autograd.grad(output.sum(), others) if grad else ())]
            layer._flat_weights[1] = torch.zeros_like(others[1])
            found.append([*results, layer(input)[0].detach()])
    torch.testing.assert_close(found[1], found[0])


def test_hooks_are_called(direct_calls: list[int]) -> None:
    layer, input, seen = rnnfast.GRU(5, 8), torch.randn(4, 2, 5), list[str]()
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer(input)
    layer(input)
    assert seen == ["before", "after"] * 2
    assert direct_calls == [0]


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_state_of_another_dtype(wrong: int) -> None:
    layer, input = rnnfast.LSTM(5, 16), torch.randn(2, 5)
    with torch.no_grad():
        state = list(warmed_up(layer, input))
        layer(input[None])
        state[wrong] = state[wrong].double()
        for call in (lambda: layer.step(input, tuple(state)), lambda: layer(input[None], tuple(state))):
            with pytest.raises((TypeError, ValueError, RuntimeError), match=r"dtype|float64|double"):
                call()


@pytest.mark.parametrize("gradients", [False, True])
def test_a_dtype_that_only_another_backend_has(gradients: bool) -> None:
    layer, input = rnnfast.GRU(5, 16, dtype=torch.float16), torch.randn(3, 2, 5, dtype=torch.float16)
    expected = torch.nn.GRU.forward(layer, input)
    with torch.set_grad_enabled(gradients):
        for _ in range(4):
            torch.testing.assert_close(layer(input), expected)
            torch.testing.assert_close(layer.step(input[0])[0], expected[0][0])
