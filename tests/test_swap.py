"""accelerate and restore: what changes in a model (its classes) and what does not (all else)."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnfast

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


def gradients(model: nn.Module, input: Tensor = INPUT) -> list[Tensor]:
    result = model(input)
    result = result if isinstance(result, Tensor) else result[0]
    return [result, *torch.autograd.grad(result.sin().sum(), list(model.parameters()))]


def test_only_the_classes_change() -> None:
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
    assert [type(module) for module in recurrent(model)] == [rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN, rnnfast.LSTMCell]
    assert isinstance(model.encoder, nn.LSTM)
    assert all(a is b for a, b in zip(elsewhere, [model.encoder, *model.stack], strict=True))
    for now, then in ((list(model.named_modules()), modules), (list(model.named_parameters()), parameters)):
        assert [name for name, _ in now] == [name for name, _ in then]
        assert all(a is b for (_, a), (_, b) in zip(now, then, strict=True))
    assert [module.training for module in recurrent(model)] == [False, True, False, False]
    assert repr(model) == text
    seen.clear()
    torch.testing.assert_close(gradients(model), expected)
    assert seen == [model.encoder]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT), expected[0])
        model.stack[0].step(torch.randn(3, 16))  # type: ignore[operator]

    rnnfast.restore(model)
    assert [type(module) for module in recurrent(model)] == [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell]
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
    assert type(module) is getattr(rnnfast, name)
    torch.testing.assert_close(gradients(module, input), expected)
    rnnfast.restore(module)
    assert type(module) is getattr(nn, name)


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
        assert other.again is other.stack[1]
        torch.testing.assert_close(other(INPUT), expected, rtol=0, atol=0)
        rnnfast.restore(other)
        assert type(other.encoder) is nn.LSTM
        torch.testing.assert_close(other(INPUT), expected)
    assert type(model.encoder) is rnnfast.LSTM


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


def parametrized() -> nn.Module:
    return parametrizations.spectral_norm(nn.GRU(4, 8), "weight_hh_l0")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnForward(4, 8), "OwnForward is a subclass of torch.nn.LSTM; derive it from rnnfast.LSTM"),
        (OwnKind, "OwnKind is no layer or cell that rnnfast has"),
        (replaced, "its forward was replaced on the object"),
        (parametrized, "accelerate first, then parametrize"),
        (lambda: rnnfast.LSTM(4, 8), "it is rnnfast's already"),
        (lambda: torch.ao.nn.quantized.dynamic.LSTM(4, 8), "it is quantized"),
        (lambda: torch.ao.nn.quantized.dynamic.GRUCell(4, 8), "it is quantized"),
        (lambda: torch.jit.script(nn.LSTM(4, 8)), "it was compiled by torch.jit"),
    ],
)
def test_what_is_left_and_why(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"kept": make(), "plain": nn.GRU(4, 8)})
    kind = type(model["kept"])
    report = rnnfast.accelerate(model)
    assert [swap.names for swap in report.swapped] == [("plain",)]
    assert [swap.names for swap in report.left] == [("kept",)]
    assert reason in str(report.left[0].left_because)
    assert reason in repr(report)
    assert type(model["kept"]) is kind
    rnnfast.restore(model)
    assert type(model["kept"]) is kind
    assert type(model["plain"]) is nn.GRU


def test_accelerating_twice_changes_nothing_more() -> None:
    model = Model()
    rnnfast.accelerate(model)
    report = rnnfast.accelerate(model)
    assert not report.swapped
    assert {swap.left_because for swap in report.left} == {"it is rnnfast's already"}
    rnnfast.restore(model)
    rnnfast.restore(model)
    assert type(model.encoder) is nn.LSTM


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


def test_parametrized_after_accelerating() -> None:
    layer, theirs = nn.GRU(4, 8), nn.GRU(4, 8)
    theirs.load_state_dict(layer.state_dict())
    rnnfast.accelerate(layer)
    for module in (layer, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
    assert isinstance(layer, rnnfast.GRU)
    torch.testing.assert_close(gradients(layer), gradients(theirs))
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)  # type: ignore[union-attr, operator]
        theirs.parametrizations.weight_hh_l0.original0.mul_(2)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(layer(INPUT), theirs(INPUT))
    with pytest.raises(RuntimeError, match="'' has become a ParametrizedGRU since it was accelerated: undo that first"):
        rnnfast.restore(layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is rnnfast.GRU
    torch.testing.assert_close(layer(INPUT), theirs(INPUT))
    rnnfast.restore(layer)
    assert type(layer) is nn.GRU


# ---- wrappers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _process_group() -> Iterator[None]:
    """One process that talks to itself."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel() -> None:
    model = Model()
    expected = gradients(model)
    rnnfast.accelerate(model)
    torch.testing.assert_close(gradients(nn.DataParallel(model)), expected)  # without a GPU it calls the model
    replica = model.encoder._replicate_for_data_parallel()
    assert type(replica) is rnnfast.LSTM


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
def test_fully_sharded_data_parallel() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    rnnfast.accelerate(model)
    mesh = init_device_mesh("cpu", (1,))
    for module in (*recurrent(model), model):
        fully_shard(module, mesh=mesh)
    assert isinstance(model.encoder, rnnfast.LSTM)
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
