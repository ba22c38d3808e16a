"""accelerate and restore: what changes in a model (a few attributes of its layers) and what does not (all else)."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import io
import pickle
import pickletools
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnfast
from rnnfast.swap import is_ours

CLASSES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]
INPUT = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(5))


class Model(nn.Module):
    """Layers, a cell in a loop, and a layer with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(4, 8, num_layers=2, bidirectional=True)
        self.stack = nn.ModuleList([nn.GRU(16, 8), nn.RNN(8, 8, nonlinearity="relu")])
        self.again = self.stack[1]
        self.cell = nn.LSTMCell(8, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, input: Tensor) -> Tensor:
        x, _ = self.encoder(input)
        for layer in [*self.stack, self.again]:
            x, _ = layer(x)
        state = None
        for step in x:
            state = self.cell(step, state)
        assert state is not None
        result: Tensor = self.head(state[0])
        return result


def recurrent(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.RNNBase | nn.RNNCellBase)]


def swapped(model: nn.Module) -> list[bool]:
    return [is_ours(module) for module in recurrent(model)]


def gradients(model: nn.Module, input: Tensor = INPUT) -> list[Tensor]:
    result = model(input)
    result = result if isinstance(result, Tensor) else result[0]
    return [result, *torch.autograd.grad(result.sin().sum(), list(model.parameters()))]


def test_all_but_the_methods_stays() -> None:
    model = Model().eval()
    model.cell.register_buffer("extra", torch.ones(2))
    seen: list[Any] = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(module))
    model.stack[0].train()
    elsewhere = [model.encoder, *model.stack]
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    before = [dict(vars(module)) for module in model.modules()]
    state, text, expected = copy.deepcopy(model.state_dict()), repr(model), gradients(model)

    report = rnnfast.accelerate(model)
    assert [swap.names for swap in report.swapped] == [("encoder",), ("stack.0",), ("stack.1", "again"), ("cell",)]
    assert not report.left
    assert "stack.1, again  RNN       swapped" in repr(report)
    assert [type(module) for module in recurrent(model)] == [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell]
    assert swapped(model) == [True] * 4
    assert all(a is b for a, b in zip(elsewhere, [model.encoder, *model.stack], strict=True))
    for now, then in ((list(model.named_modules()), modules), (list(model.named_parameters()), parameters)):
        assert [name for name, _ in now] == [name for name, _ in then]
        assert all(a is b for (_, a), (_, b) in zip(now, then, strict=True))
    assert [module.training for module in recurrent(model)] == [False, True, False, False]
    assert repr(model) == text
    for module, then in zip(model.modules(), before, strict=True):
        assert all(vars(module)[name] is value for name, value in then.items() if name != "_flat_weight_refs")
    seen.clear()
    torch.testing.assert_close(gradients(model), expected)
    assert seen == [model.encoder]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT), expected[0])

    rnnfast.restore(model)
    assert not any(swapped(model))
    for module, then in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == then.keys()
        assert all(vars(module)[name] is value for name, value in then.items() if name != "_flat_weight_refs")
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_the_model_itself_may_be_a_layer(name: str) -> None:
    module = getattr(nn, name)(4, 8)
    input = INPUT[0] if "Cell" in name else INPUT
    expected = gradients(module, input)
    report = rnnfast.accelerate(module)
    assert repr(report).splitlines() == ["1 swapped, 0 left", f"(the model)  {name}  swapped"]
    assert type(module) is getattr(nn, name)
    assert is_ours(module)
    torch.testing.assert_close(gradients(module, input), expected)
    rnnfast.restore(module)
    assert not is_ours(module)


def test_a_swapped_layer_has_all_that_rnnfasts_has() -> None:
    layer, twin, ids = nn.LSTM(4, 8, 2), rnnfast.LSTM(4, 8, 2), torch.randint(4, (6, 3))
    twin.load_state_dict(layer.state_dict())
    rnnfast.accelerate(layer)
    assert inspect.signature(layer.forward) == inspect.signature(twin.forward)
    assert str(rnnfast.explain(layer, INPUT)) == str(rnnfast.explain(twin, INPUT))
    calls: list[Callable[[Any], Any]] = [
        lambda layer: layer(ids),
        lambda layer: layer(INPUT, lengths=[2, 6, 0], reset=ids > 2),
        lambda layer: layer.step(INPUT[0]),
        lambda layer: layer.states(INPUT),
        lambda layer: rnnfast.Stream(layer)(INPUT[0]),
    ]
    for call in calls:
        torch.testing.assert_close(call(layer), call(twin), rtol=0, atol=0)
    layer.backend = "reference"  # type: ignore[assignment]
    assert rnnfast.explain(layer, INPUT).backend == "reference"
    torch.testing.assert_close(layer(INPUT), twin(INPUT))
    with pytest.raises(RuntimeError, match=r"the state of an LSTM is a pair of tensors \(h_0, c_0\), got Tensor"):
        layer(INPUT, torch.zeros(2, 3, 8))


def test_a_patched_class_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, input, hx=None: (input, hx))
    model = nn.ModuleList([nn.LSTM(3, 4), nn.GRU(3, 4)])
    report = rnnfast.accelerate(model)
    assert [swap.names for swap in report.swapped] == [("1",)]
    assert "LSTM.forward was replaced" in str(report.left[0].left_because)


def test_hooks_fire_once_a_call() -> None:
    layer, seen = nn.GRU(4, 8), []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))  # type: ignore[func-returns-value]
    rnnfast.accelerate(layer)
    layer.register_forward_hook(lambda module, args, output: seen.append("forward"))
    layer.register_full_backward_hook(lambda module, d_input, d_output: seen.append("backward"))  # type: ignore[func-returns-value]
    layer(INPUT.clone().requires_grad_())[0].sum().backward()
    assert seen == ["pre", "forward", "backward"]


def test_an_optimizer_made_before_goes_on() -> None:
    torch.manual_seed(1)
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    for step in range(4):
        if step == 2:
            rnnfast.accelerate(model)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(INPUT).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


def test_copies_stay_accelerated_and_can_be_restored() -> None:
    model = Model()
    rnnfast.accelerate(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    expected = model(INPUT)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert [type(module) for module in recurrent(other)] == [type(module) for module in recurrent(model)]
        assert swapped(other) == [True] * 4
        assert other.again is other.stack[1]
        torch.testing.assert_close(other(INPUT), expected, rtol=0, atol=0)
        with torch.no_grad():  # its own parameters, not the model's
            for parameter in recurrent(other)[0].parameters():
                parameter.zero_()
        assert not other.encoder(INPUT)[0].any()
        torch.testing.assert_close(model(INPUT), expected, rtol=0, atol=0)
        other(INPUT).sum().backward()
        assert other.encoder.weight_ih_l0.grad is not None
        assert model.encoder.weight_ih_l0.grad is None
        found = other(INPUT)
        rnnfast.restore(other)
        assert not any(swapped(other))
        torch.testing.assert_close(other(INPUT), found)
    assert swapped(model) == [True] * 4


def test_a_pickle_holds_one_name_of_ours() -> None:
    """So that later versions can load it, whatever they have moved."""
    model = torch.nn.LSTM(3, 4)
    rnnfast.accelerate(model)
    strings = [argument for _, argument, _ in pickletools.genops(pickle.dumps(model)) if isinstance(argument, str)]
    assert [name for name in strings if "rnnfast" in name] == ["rnnfast.swap"]
    assert "method_of" in strings


def test_a_deleted_model_is_freed_at_once() -> None:
    model = Model()
    rnnfast.accelerate(model)
    model(INPUT).sum().backward()
    parameter, forward = weakref.ref(model.encoder.weight_hh_l0), model.encoder.forward
    gc.disable()
    try:
        del model
        assert parameter() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="the module whose forward this was is gone; keep the module itself"):
        forward(INPUT)


def test_parameters_given_by_functional_call() -> None:
    layers = [nn.GRU(4, 8) for _ in range(3)]
    for layer in layers:
        rnnfast.accelerate(layer)
    parameters, _ = torch.func.stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")
    found = torch.vmap(lambda p: torch.func.functional_call(skeleton, p, (INPUT,))[0])(parameters)
    torch.testing.assert_close(found, torch.stack([layer(INPUT)[0] for layer in layers]))


def test_in_a_graph() -> None:
    torch._dynamo.reset()
    model = Model()
    expected = gradients(model)
    rnnfast.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), expected)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.head.weight.zero_()
        copied.encoder.weight_ih_l0.zero_()
    recompiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(recompiled(INPUT), copied(INPUT))
    rnnfast.restore(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        compiled(INPUT)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_exported(strict: bool, alone: bool) -> None:
    steps, batch = torch.export.Dim("steps", min=1, max=99), torch.export.Dim("batch", min=1, max=99)
    model: nn.Module = nn.GRU(4, 8) if alone else nn.Sequential(nn.GRU(4, 8))
    rnnfast.accelerate(model)
    shapes = {"input": {0: steps, 1: batch}}
    program = torch.export.export(model, (INPUT,), dynamic_shapes=shapes, strict=strict)
    assert list(program.state_dict) == list(model.state_dict())
    x = torch.randn(9, 2, 4)
    torch.testing.assert_close(program.module()(x)[0], model(x)[0])


class OwnInit(nn.LSTM):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        nn.init.orthogonal_(self.weight_hh_l0)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.bias_hh_l0)


def test_subclasses_that_compute_as_torch_does() -> None:
    layer = OwnInit(4, 8)
    expected = gradients(layer)
    assert rnnfast.accelerate(layer).swapped
    assert is_ours(layer)
    torch.testing.assert_close(gradients(layer), expected)
    rnnfast.restore(layer)
    assert not is_ours(layer)


class OwnStep(nn.GRU):
    def step(self) -> None: ...


class OwnForward(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return input, hx


class OwnKind(nn.RNNBase):
    def __init__(self) -> None:
        super().__init__("GRU", 4, 8)


def replaced() -> nn.Module:
    layer = nn.GRU(4, 8)
    layer.forward = lambda input, hx=None: (input, hx)  # type: ignore[method-assign]
    return layer


def replaced_by_anothers() -> nn.Module:
    layer = nn.GRU(4, 8)
    layer.forward = nn.GRU(4, 8).forward  # type: ignore[method-assign]
    return layer


def test_a_layer_whose_own_forward_a_library_has_set_on_it_again() -> None:
    """As Hugging Face's accelerate leaves one whose hooks were removed."""
    layer, input = nn.GRU(4, 8), torch.randn(3, 2, 4)
    layer.forward = MethodType(nn.GRU.forward, layer)  # type: ignore[method-assign]
    expected = layer(input)
    assert len(rnnfast.accelerate(layer).swapped) == 1
    assert "cpu" in repr(rnnfast.explain(layer, input))
    torch.testing.assert_close(layer(input), expected)
    rnnfast.restore(layer)
    assert "forward" not in vars(layer)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnForward(4, 8), "OwnForward has a forward of its own; derive it from rnnfast.LSTM"),
        *[
            (lambda name=name: type("Own", (nn.GRU,), {name: lambda *_: None})(4, 8), f"Own has a {name} of its")
            for name in ("check_input", "check_hidden_size", "permute_hidden", "_update_flat_weights")
        ],
        (lambda: OwnStep(4, 8), "it has an attribute step of its own, which rnnfast's would hide"),
        (OwnKind, "tests.test_swap.OwnKind is none of torch.nn's layers and cells, nor derived from one"),
        (replaced, "its forward was replaced on the object"),
        (replaced_by_anothers, "its forward was replaced on the object"),
        (lambda: rnnfast.LSTM(4, 8), "it is rnnfast's already"),
        (lambda: torch.ao.nn.quantized.dynamic.LSTM(4, 8), "it is quantized"),
        (lambda: torch.ao.nn.quantized.dynamic.GRUCell(4, 8), "it is quantized"),
        (lambda: torch.jit.script(nn.LSTM(4, 8)), "it was compiled by torch.jit"),
    ],
)
def test_what_is_left_and_why(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"kept": make(), "plain": nn.GRU(4, 8)})
    kind, attributes = type(model["kept"]), dict(vars(model["kept"]))
    report = rnnfast.accelerate(model)
    assert [swap.names for swap in report.swapped] == [("plain",)]
    assert [swap.names for swap in report.left] == [("kept",)]
    assert reason in str(report.left[0].left_because)
    assert reason in repr(report)
    assert type(model["kept"]) is kind
    rnnfast.restore(model)
    assert vars(model["kept"]) == attributes
    assert not is_ours(model["plain"])


def test_accelerating_twice_changes_nothing_more() -> None:
    model = Model()
    rnnfast.accelerate(model)
    report = rnnfast.accelerate(model)
    assert not report.swapped
    assert {swap.left_because for swap in report.left} == {"it is rnnfast's already"}
    rnnfast.restore(model)
    rnnfast.restore(model)
    assert not any(swapped(model))


def test_a_forward_replaced_since_is_not_undone() -> None:
    model = Model()
    rnnfast.accelerate(model)
    ours = model.encoder.forward
    model.encoder.forward = lambda *args: ours(*args)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="encoder has been given another forward since it was accelerated"):
        rnnfast.restore(model)
    assert swapped(model) == [False, True, True, True]
    model.encoder.forward = ours  # type: ignore[method-assign]
    rnnfast.restore(model)
    assert not any(swapped(model))


def test_the_module_of_a_method_may_be_gone() -> None:
    layer = nn.GRU(4, 8)
    rnnfast.accelerate(layer)
    forward = layer.forward
    del layer
    assert not hasattr(forward, "__self__")
    with pytest.raises(ReferenceError, match="keep the module itself"):
        forward(torch.randn(5, 2, 4))


def test_a_model_without_any_is_told() -> None:
    assert str(rnnfast.accelerate(nn.Linear(2, 3))) == (
        "0 swapped, 0 left: there is no RNN, LSTM, GRU or cell of torch.nn's in it"
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: nn.utils.weight_norm(layer, "weight_hh_l0"),
        lambda layer: nn.utils.spectral_norm(layer, "weight_hh_l0"),
        lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_hooks_that_compute_a_weight_still_do(wrap: Callable[[nn.Module], nn.Module]) -> None:
    layer = wrap(nn.LSTM(4, 8)).eval()
    expected = gradients(layer)
    assert rnnfast.accelerate(layer).swapped
    assert len(dict(layer.named_parameters())) >= 4
    torch.testing.assert_close(gradients(layer), expected)
    torch.testing.assert_close(gradients(layer), expected)


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_parametrized(accelerated_first: bool) -> None:
    layer, theirs = nn.GRU(4, 8), nn.GRU(4, 8)
    theirs.load_state_dict(layer.state_dict())
    parametrizations.weight_norm(theirs, "weight_hh_l0")
    if accelerated_first:
        rnnfast.accelerate(layer)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    if not accelerated_first:
        assert repr(rnnfast.accelerate(layer)).splitlines()[1] == "(the model)  ParametrizedGRU  swapped"
    assert is_ours(layer)
    torch.testing.assert_close(gradients(layer), gradients(theirs))
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)  # type: ignore[union-attr, operator]
        theirs.parametrizations.weight_hh_l0.original0.mul_(2)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(layer(INPUT), theirs(INPUT))
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is nn.GRU
    assert is_ours(layer)
    torch.testing.assert_close(layer(INPUT), theirs(INPUT))
    parametrizations.weight_norm(layer, "weight_hh_l0")
    rnnfast.restore(layer)
    assert not is_ours(layer)
    torch.testing.assert_close(layer(INPUT), theirs(INPUT))


# ---- wrappers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _process_group() -> Iterator[None]:
    """One process that talks to itself."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    expected = gradients(model)
    rnnfast.accelerate(model)
    torch.testing.assert_close(gradients(nn.DataParallel(model)), expected)  # without a GPU it calls the model

    # What it does with GPUs, but for their streams: parameters copied, and with them copies of the modules.
    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor * factor for tensor in tensors] for factor in (1, 0.5)]

    functions = vars(importlib.import_module("torch.nn.parallel.replicate"))
    monkeypatch.setitem(functions, "_broadcast_coalesced_reshape", broadcast)
    replicas = nn.parallel.replicate(model, [0, 1])
    assert [swapped(replica) for replica in replicas] == [[True] * 4] * 2
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    found = [replica(INPUT) for replica in replicas]
    torch.testing.assert_close(found, [model(INPUT), halved(INPUT)])
    leaves = list(model.parameters())
    of_second = torch.autograd.grad(found[1].sin().sum(), leaves)  # through the copies, to the parameters
    ours = torch.autograd.grad(halved(INPUT).sin().sum(), list(halved.parameters()))
    torch.testing.assert_close(of_second, tuple(0.5 * gradient for gradient in ours))


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_distributed_data_parallel(wrapped_first: bool) -> None:
    model = Model()
    expected = gradients(model)[0]
    model(INPUT).sin().sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    if wrapped_first:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert rnnfast.accelerate(wrapped).swapped[0].names == ("module.encoder",)
    else:
        rnnfast.accelerate(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
    output = wrapped(INPUT)
    output.sin().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], grads)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_fully_sharded_data_parallel(wrapped_first: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    if not wrapped_first:
        rnnfast.accelerate(model)
    mesh = init_device_mesh("cpu", (1,))
    for module in (*recurrent(model), model):
        fully_shard(module, mesh=mesh)
    if wrapped_first:
        rnnfast.accelerate(model)
    assert swapped(model) == [True] * 4
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for _ in range(2):
        with torch.no_grad():  # weights packed for inference, whose storage is then freed and filled again
            for _ in range(2):
                torch.testing.assert_close(model(INPUT), twin(INPUT))
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            m(INPUT).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    report = rnnfast.accelerate(model)
    assert not report.swapped
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    torch.testing.assert_close(state, dict(twin.state_dict()))
