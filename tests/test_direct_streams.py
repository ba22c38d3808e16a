"""The steps of a layer's stream keep their states themselves, and nothing that happens between them goes unnoticed."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast.backends import cpu

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

LAYERS = ["RNN", "LSTM", "GRU"]
INPUT = torch.randn(12, 3, 5)


def make(name: str = "LSTM", **options: Any) -> Any:
    torch.manual_seed(1)
    return getattr(rnnfast, name)(5, 17, **options)


def stepping(layer: Any) -> rnnfast.Stream:
    """A stream after four steps, on its own way."""
    stream = rnnfast.Stream(layer)
    with torch.no_grad():
        for x in INPUT[:4]:
            stream(x)
    assert is_stepping(stream)
    return stream


def is_stepping(stream: rnnfast.Stream) -> bool:
    """Whether the next step would not call the layer's."""
    return stream._steps is not None


def assert_goes_on(stream: rnnfast.Stream, expected: Any, state: Any, first: int = 4) -> None:
    """As the layer `expected` does with the inputs from `first` on, bit by bit."""
    with torch.no_grad():
        for x in INPUT[first:]:
            output, state = expected.step(x, state)
            torch.testing.assert_close(stream(x), output, rtol=0, atol=0)
    torch.testing.assert_close(stream.state, state, rtol=0, atol=0)


def state_after(layer: Any, steps: int = 4) -> Any:
    with torch.no_grad():
        return layer(INPUT[:steps])[1]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "dropout": 0.5}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_steps_go_past_the_layers_own(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(name, **options).eval()
    state = None
    with torch.no_grad():
        for x in INPUT[:4]:
            _, state = layer.step(x, state)
    expected, stream = copy.deepcopy(layer), stepping(layer)
    monkeypatch.setattr(layer, "step", None)
    assert_goes_on(stream, expected, state)


@pytest.mark.parametrize("name", LAYERS)
def test_so_do_those_of_an_accelerated_layer(name: str) -> None:
    layer = make(name)
    accelerated = getattr(torch.nn, name)(5, 17)
    accelerated.load_state_dict(layer.state_dict())
    rnnfast.accelerate(accelerated)
    assert_goes_on(stepping(accelerated), layer, state_after(layer))


@pytest.mark.parametrize("name", LAYERS)
def test_token_ids(name: str) -> None:
    layer, ids = make(name), torch.randint(5, (6, 3))
    stream = rnnfast.Stream(layer)
    with torch.no_grad():
        outputs = [stream(step) for step in ids]
        assert is_stepping(stream)
        torch.testing.assert_close(torch.stack(outputs), layer(ids)[0], rtol=0, atol=0)
        state = stream.state
        stream(ids[0])
        with pytest.raises(IndexError, match="token"):
            stream(torch.tensor([0, 1, 5]))
        torch.testing.assert_close(stream.state, layer.step(ids[0], state)[1], rtol=0, atol=0)


def test_a_state_that_was_taken_stays_as_it_was() -> None:
    layer = make()
    stream = stepping(layer)
    states = []
    with torch.no_grad():
        for x in INPUT[4:]:
            states.append(stream.state)
            stream(x)
            stream(x)
    kept = [copy.deepcopy(state) for state in states]
    expected = state_after(layer)
    with torch.no_grad():
        for x, state in zip(INPUT[4:], states, strict=True):
            torch.testing.assert_close(state, expected, rtol=0, atol=0)
            for _ in range(2):
                _, expected = layer.step(x, expected)
    torch.testing.assert_close(states, kept, rtol=0, atol=0)


def test_the_first_state_is_not_written_to() -> None:
    layer, state = make(), (torch.randn(1, 3, 17), torch.randn(1, 3, 17))
    kept = copy.deepcopy(state)
    stream = rnnfast.Stream(layer)
    stream.state = state
    with torch.no_grad():
        for x in INPUT:
            stream(x)
        torch.testing.assert_close(state, kept, rtol=0, atol=0)
        stream.state = state
        for x in INPUT[:4]:
            stream(x)
        torch.testing.assert_close(stream.state, layer(INPUT[:4], state)[1], rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_a_copy_has_a_state_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    layer = make()
    stream = stepping(layer)
    other = duplicate(stream)
    with torch.no_grad():
        for x in INPUT[:5]:
            other(x)
            other(x)
    assert_goes_on(stream, layer, state_after(layer))


@torch.no_grad()
def change_one_element(layer: Any) -> None:
    layer.weight_hh_l0[3, 4] = 2


@torch.no_grad()
def change_one_element_256_times(layer: Any) -> None:
    """So that the last byte of its version is what it was."""
    for i in range(256):
        layer.weight_hh_l0[3, 4] = 2 + i


def change_data(layer: Any) -> None:
    layer.weight_ih_l0.data[:, 0] += 1


def load(layer: Any) -> None:
    layer.load_state_dict(rnnfast.LSTM(5, 17).state_dict())


def replace(layer: Any) -> None:
    layer.weight_hh_l0 = torch.nn.Parameter(torch.randn(4 * 17, 17))


def optimize(layer: Any) -> None:
    layer(INPUT)[0].sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def write_unseen(layer: Any) -> None:
    layer.weight_hh_l0.data[3, 4] = 2
    rnnfast.forget_packed_weights()


@pytest.mark.parametrize(
    "change",
    [change_one_element, change_one_element_256_times, change_data, load, replace, optimize, write_unseen],
)
def test_weights_that_change_between_steps(change: Callable[[Any], None]) -> None:
    layer = make()
    stream, state = stepping(layer), state_after(layer)
    change(layer)
    assert_goes_on(stream, copy.deepcopy(layer), state)


def test_forgotten_weights_of_a_stream_that_another_backend_came_between() -> None:
    """What it has packed is no longer what the layer's own calls would use."""
    layer = make()
    stream, state = stepping(layer), state_after(layer)
    layer.backend = "cpu"
    with torch.no_grad():
        layer(INPUT)
    layer.backend = "auto"
    write_unseen(layer)
    assert_goes_on(stream, copy.deepcopy(layer), state)


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_hooks_run(register: str) -> None:
    layer, seen = make(), []
    stream, state = stepping(layer), state_after(layer)
    handle = getattr(layer, register)(lambda *args: seen.append(args))
    with torch.no_grad():
        stream(INPUT[4])
        handle.remove()
        state = layer.step(INPUT[4], state)[1]
    assert len(seen) == 1
    kept = copy.deepcopy(seen[0][1:])
    assert_goes_on(stream, layer, state, first=5)
    torch.testing.assert_close(seen[0][1:], kept, rtol=0, atol=0)  # it is the hook's now


@pytest.mark.parametrize("register", ["pre_hook", "hook"])
def test_hooks_of_all_modules_run(register: str) -> None:
    layer, seen = make(), []
    stream, state = stepping(layer), state_after(layer)
    handle = getattr(torch.nn.modules.module, f"register_module_forward_{register}")(lambda *args: seen.append(args[0]))
    try:
        with torch.no_grad():
            stream(INPUT[4])
    finally:
        handle.remove()
    assert any(module is layer for module in seen)
    with torch.no_grad():
        assert_goes_on(stream, layer, layer.step(INPUT[4], state)[1], first=5)


def test_a_subclass_with_a_step_of_its_own() -> None:
    class Doubled(rnnfast.GRU):
        def step(self, input: Tensor, hx: Any = None) -> Any:
            output, state = super().step(input, hx)
            return 2 * output, state

    layer = Doubled(5, 17)
    stream = rnnfast.Stream(layer)
    with torch.no_grad():
        outputs = [stream(x) for x in INPUT]
        torch.testing.assert_close(torch.stack(outputs), 2 * layer(INPUT)[0], rtol=0, atol=0)


def test_no_step_of_both_directions() -> None:
    layer = make(bidirectional=True)
    state = state_after(layer)  # which leaves a plan
    with torch.no_grad(), pytest.raises(RuntimeError, match="a bidirectional layer reads the whole sequence"):
        layer.step(INPUT[4], state)


def test_dropout_is_applied_in_training() -> None:
    layer = make(num_layers=2, dropout=0.5).eval()
    stream, state = stepping(layer), state_after(layer)
    with torch.no_grad():
        expected, _ = layer.step(INPUT[4], state)
        layer.train()
        assert not torch.equal(stream(INPUT[4]), expected)


def test_dropout_that_is_raised_in_training_is_applied() -> None:
    layer = make(num_layers=2)
    stream, state = stepping(layer), state_after(layer)
    with torch.no_grad():
        expected, _ = layer.step(INPUT[4], state)
        layer.dropout = 0.5
        assert not torch.equal(stream(INPUT[4]), expected)


def test_a_backend_asked_for_meanwhile() -> None:
    layer = make()
    stream = stepping(layer)
    state = stream.state
    with torch.no_grad(), rnnfast.use_backend("torch"):
        stream(INPUT[4])
        torch.testing.assert_close(stream.state, torch.nn.LSTM.forward(layer, INPUT[4:5], state)[1], rtol=0, atol=0)


def test_gradients_wanted_meanwhile() -> None:
    layer = make()
    stream, state = stepping(layer), state_after(layer)
    output = stream(INPUT[4])
    expected, _ = layer.step(INPUT[4], state)
    for one, other in zip(
        torch.autograd.grad(output.sum(), layer.parameters()),
        torch.autograd.grad(expected.sum(), layer.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_state_made_in_inference_mode_can_be_trained_from() -> None:
    layer = make()
    stream = rnnfast.Stream(layer)
    with torch.inference_mode():
        for x in INPUT[:4]:
            stream(x)
        assert is_stepping(stream)
    torch.testing.assert_close(stream.state, state_after(layer), rtol=0, atol=0)
    stream(INPUT[4]).sum().backward()
    assert layer.weight_hh_l0.grad is not None


@pytest.mark.parametrize("module", [rnnfast.LSTM(5, 17), rnnfast.Stack("gru", 5, [6])], ids=["LSTM", "Stack"])
def test_a_compiled_stream_is_one_graph(module: Any) -> None:
    stream, expected = rnnfast.Stream(module), rnnfast.Stream(module)
    compiled: Any = torch.compile(lambda x: stream(x), fullgraph=True, backend="aot_eager")
    for x in INPUT[:3]:
        torch.testing.assert_close(compiled(x), expected(x))


def test_the_stream_of_a_restored_layer() -> None:
    """It has no step any more, and says so before anything has run; chunks are as torch.nn's."""
    layer = torch.nn.GRU(5, 6)
    rnnfast.accelerate(layer)
    stream = rnnfast.Stream(layer)
    with torch.no_grad():
        for x in INPUT[:3]:
            stream(x)
        state = stream.state
        rnnfast.restore(layer)
        with pytest.raises(TypeError, match=r"a torch\.nn GRU has no step: .* or rnnfast\.accelerate it"):
            stream(INPUT[3])
        assert torch.equal(stream.state, state)
        torch.testing.assert_close(stream(INPUT[3:5]), layer(INPUT[:5])[0][3:])
        rnnfast.accelerate(layer)
        torch.testing.assert_close(stream(INPUT[5]), layer(INPUT[:6])[0][5])


def test_a_layer_restored_between_two_steps() -> None:
    layer = torch.nn.LSTM(5, 17)
    rnnfast.accelerate(layer)
    stream = stepping(layer)
    rnnfast.restore(layer)
    with torch.no_grad(), pytest.raises(TypeError, match=r"a torch\.nn LSTM has no step"):
        stream(INPUT[4])
    torch.testing.assert_close(stream.state, state_after(layer))


def test_a_compiled_stream() -> None:
    layer = make()
    stream, state = stepping(layer), state_after(layer)
    compiled = torch.compile(stream, backend="eager")
    with torch.no_grad():
        for x in INPUT[4:7]:
            output, state = layer.step(x, state)
            torch.testing.assert_close(compiled(x), output)
            output, state = layer.step(x, state)
            torch.testing.assert_close(stream(x), output)
    torch.testing.assert_close(stream.state, state)


def bad_size(stream: rnnfast.Stream) -> Tensor:
    return stream(INPUT[4, :2])


def bad_dtype(stream: rnnfast.Stream) -> Tensor:
    return stream(INPUT[4].double())


def bad_width(stream: rnnfast.Stream) -> Tensor:
    return stream(INPUT[4, :, :4])


def nested(stream: rnnfast.Stream) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype, torch says
        input = torch.nested.nested_tensor([INPUT[4, 0], INPUT[4, 1]])
    return stream(input)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (bad_size, "this stream has 3 sequences, the input 2"),
        (bad_dtype, "double|float64|Double"),
        (bad_width, "5"),
        (nested, "nested"),
    ],
)
def test_a_mistake_leaves_the_state(mistake: Callable[[Any], Tensor], message: str) -> None:
    layer = make()
    stream = stepping(layer)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        mistake(stream)
    assert_goes_on(stream, layer, state_after(layer))


def test_other_forms_of_input() -> None:
    layer = make()
    stream, state = stepping(layer), state_after(layer)
    with torch.no_grad():
        for x in (INPUT[4].t().contiguous().t(), INPUT[4].neg().conj(), torch.nn.Parameter(INPUT[4]), INPUT[5:8]):
            output, state = layer(x.detach().clone().view(-1, 3, 5), state)
            torch.testing.assert_close(stream(x), output if x.dim() == 3 else output[0], rtol=0, atol=0)


def test_rows_begin_anew() -> None:
    layer = make()
    stream, state = stepping(layer), state_after(layer)
    stream.reset([1])
    for part in state:
        part[:, 1] = 0
    assert_goes_on(stream, layer, state)
    stream.reset()
    assert stream.state is None
