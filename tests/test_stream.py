"""Stream: a layer or a model fed in pieces has the bits of one call over the whole sequence."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rnnfast

LAYERS = ["RNN", "LSTM", "GRU"]
STEPS, BATCH = 12, 3


class Tagger(nn.Module):
    """An embedding, two recurrent layers that begin from states of their own, and a head."""

    def __init__(self, layers: Any = rnnfast) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.lower = layers.LSTM(5, 16, num_layers=2, batch_first=True, proj_size=6)
        self.upper = layers.GRU(6, 9, batch_first=True)
        self.begin = nn.Parameter(torch.randn(1, 1, 9))
        self.head = nn.Linear(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        below, _ = self.lower(self.embedding(ids))
        above, _ = self.upper(below, hx=self.begin.expand(1, len(ids), 9))
        result: Tensor = self.head(above)
        return result


@pytest.mark.parametrize("sizes", [[1] * STEPS, [5, 1, 1, 3, 2], [STEPS]])
@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [*((name, {"num_layers": 2}) for name in LAYERS), ("LSTM", {"num_layers": 3, "proj_size": 7})]
)
def test_a_layer_in_pieces_has_the_bits_of_the_whole(
    name: str, options: dict[str, Any], token_ids: bool, sizes: list[int]
) -> None:
    layer = getattr(rnnfast, name)(5, 33, backend="cpu", **options)
    input = torch.randint(5, (STEPS, BATCH)) if token_ids else torch.randn(STEPS, BATCH, 5)
    stream = rnnfast.Stream(layer)
    assert stream.state is None
    with torch.no_grad():
        expected, final = layer(input)
        outputs = [stream(piece[0])[None] if len(piece) == 1 else stream(piece) for piece in input.split(sizes)]
    torch.testing.assert_close((torch.cat(outputs), stream.state), (expected, final), rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [[1] * STEPS, [5, 1, 1, 3, 2]])
def test_a_model_in_pieces_has_the_bits_of_the_whole(sizes: list[int]) -> None:
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    # The head is torch's, whose products change with the number of rows: the states are what is compared bit by bit.
    stream = rnnfast.Stream(model)
    with torch.no_grad():
        expected = model(ids)
        outputs = [stream(piece) for piece in ids.split(sizes, dim=1)]
        whole = rnnfast.Stream(model)
        whole(ids)
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    assert stream.state.keys() == {"lower", "upper"}
    torch.testing.assert_close(stream.state, whole.state, rtol=0, atol=0)
    assert not model.lower._forward_hooks
    assert not model.lower._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(ids), expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_model_with_layers_of_torch() -> None:
    model, ids = Tagger(nn), torch.randint(7, (BATCH, STEPS))
    stream = rnnfast.Stream(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([stream(piece) for piece in ids.split(4, 1)], 1), model(ids))


def test_a_state_can_be_kept_and_set_again() -> None:
    for module, input in (
        (rnnfast.LSTM(5, 8), torch.randn(STEPS, BATCH, 5)),
        (Tagger(), torch.randint(7, (BATCH, STEPS))),
    ):
        stream = rnnfast.Stream(module)
        with torch.no_grad():
            stream(input)
            kept = stream.state
            after = stream(input)
            for _ in range(2):  # what was set is not changed by the calls that follow
                stream.state = kept
                torch.testing.assert_close(stream(input), after, rtol=0, atol=0)


def test_an_interrupt_that_leaves_hooks_leaves_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    stream = rnnfast.Stream(model)
    with torch.no_grad():
        expected = model(ids), stream(ids)
        again = stream(ids)
        stream.reset()
        stream(ids)

        def interrupted(self: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(rnnfast.stream._Followed, "leave", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stream(ids)
        assert model.lower._forward_pre_hooks  # as an interrupt would leave them
        torch.testing.assert_close(model(ids), expected[0], rtol=0, atol=0)
        torch.testing.assert_close(stream(ids), again, rtol=0, atol=0)  # that call has not been


def test_a_layer_that_takes_or_returns_no_state_is_refused() -> None:
    class Taking(rnnfast.GRU):
        def forward(self, input: Tensor) -> Any:  # type: ignore[override]
            return super().forward(input)

    class Returning(rnnfast.GRU):
        def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
            return super().forward(input, hx)[0]

    with pytest.raises(RuntimeError, match=r"layer '0' \(Taking\) takes no hx, so no state can be given to it"):
        rnnfast.Stream(nn.Sequential(Taking(4, 4)))
    for module, whose in ((nn.Sequential(Returning(4, 4)), "layer '0'"), (Returning(4, 4), "Returning")):
        with pytest.raises(RuntimeError, match=f"{whose} returned no state"):
            rnnfast.Stream(module)(torch.randn(STEPS, BATCH, 4))


def test_a_models_state_may_be_none() -> None:
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    stream = rnnfast.Stream(model)
    with torch.no_grad():
        stream(ids)
        stream.state = None
        torch.testing.assert_close(stream(ids), model(ids), rtol=0, atol=0)


def test_a_compiled_layer_that_hides_is_refused() -> None:
    model, input = nn.Sequential(Halves(), Halves()), torch.randn(STEPS, BATCH, 4)
    torch._dynamo.reset()
    model[0].compile(backend="eager")
    with torch.no_grad():
        model(input)
        with pytest.raises(RuntimeError, match=r"layer '0\.first', which is compiled, was not seen to run"):
            rnnfast.Stream(model)(input)
        torch._dynamo.reset()
        stream, unbroken = rnnfast.Stream(model), rnnfast.Stream(nn.Sequential(Halves(), Halves()))
        unbroken.module.load_state_dict(model.state_dict())
        for piece in input.split(6):
            torch.testing.assert_close(stream(piece), unbroken(piece))


def test_streams_of_a_compiled_model_in_several_threads() -> None:
    torch._dynamo.reset()
    model, input = Halves(), torch.randn(2, STEPS, BATCH, 4)
    compiled: Any = torch.compile(model, backend="eager")
    expected = [rnnfast.Stream(model)(each) for each in input]
    found: list[Any] = [None, None]

    def run(which: int) -> None:
        stream = rnnfast.Stream(compiled)
        found[which] = torch.cat([stream(piece) for piece in input[which].split(1)])

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, expected)


def test_a_call_that_fails_midway_can_be_made_again() -> None:
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    stream, unbroken = rnnfast.Stream(model), rnnfast.Stream(model)

    def fail(*_: Any) -> None:
        raise InterruptedError

    with torch.no_grad():
        for piece in ids.split(6, dim=1):
            handle = model.upper.register_forward_pre_hook(fail)  # the lower layer has run by then
            with pytest.raises(InterruptedError):
                stream(piece)
            handle.remove()
            torch.testing.assert_close(stream(piece), unbroken(piece), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["LSTM", "Stack", "model"])
def test_a_state_made_in_inference_mode_can_be_trained_from(kind: str, steps: int) -> None:
    layer: Any = rnnfast.LSTM(5, 6) if kind == "LSTM" else rnnfast.Stack("gru", 5, [6])
    model, ids = Tagger() if kind == "model" else layer, torch.randint(7, (BATCH, 1))
    stream = rnnfast.Stream(model)
    with torch.inference_mode():
        for x in torch.randn(steps, BATCH, 5):
            stream(ids if kind == "model" else x)
    stream(ids if kind == "model" else torch.randn(2, BATCH, 5)).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name != "begin")


def test_truncated_backpropagation() -> None:
    layer = rnnfast.GRU(5, 8)
    input = torch.randn(STEPS, BATCH, 5, requires_grad=True)
    stream = rnnfast.Stream(layer)
    stream(input[:6])
    stream.detach()
    stream(input[6:]).sum().backward()
    assert input.grad is not None
    assert input.grad[6:].any()
    assert not input.grad[:6].any()


def test_streams_of_one_model_in_several_threads() -> None:
    model, inputs = Tagger(), torch.randint(0, 7, (2, BATCH, STEPS))
    expected = [model(input) for input in inputs]
    together = threading.Barrier(2)

    def wait(*_: Any) -> None:  # until both calls are under way
        together.wait(60)

    handle = model.embedding.register_forward_hook(wait)

    def run(input: Tensor) -> Tensor:
        stream = rnnfast.Stream(model)
        return torch.cat([stream(part) for part in input.split(3, dim=1)], 1)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, inputs))
    handle.remove()
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right)


def test_a_stream_in_another_thread_ends_while_a_layer_is_about_to_run() -> None:
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    expected, first = model(ids), threading.current_thread()
    begun, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:  # the other call, its hooks on the layers, until this one is in the layer
        if threading.current_thread() is not first:
            begun.set()
            assert go_on.wait(60)

    def let_end(*_: Any) -> None:
        if threading.current_thread() is first:
            go_on.set()
            other.join(60)

    handles = model.embedding.register_forward_hook(hold), model.lower.register_forward_pre_hook(let_end)
    other = threading.Thread(target=rnnfast.Stream(model), args=(ids,))
    other.start()
    assert begun.wait(60)
    torch.testing.assert_close(rnnfast.Stream(model)(ids), expected)
    assert not other.is_alive()
    for handle in handles:
        handle.remove()


def test_a_model_that_hides_its_layers_is_refused() -> None:
    model, input = Tagger(), torch.randint(0, 5, (4, 2))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(input)
    stream = rnnfast.Stream(compiled)
    with pytest.raises(RuntimeError, match="no recurrent layer was seen to run"):
        stream(input)
    torch._dynamo.reset()
    parts = torch.cat([rnnfast.Stream(compiled)(input)])
    torch.testing.assert_close(parts, model(input))


@pytest.mark.parametrize("batch_first", [False, True])
def test_another_number_of_sequences_needs_a_reset(batch_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnnfast.LSTM(3, 4, batch_first=batch_first)

        def forward(self, input: Tensor) -> Tensor:
            return self.rnn(input=input)[0]

    stack = rnnfast.Stack("lstm", 3, [4], batch_first=batch_first)
    for module in (rnnfast.GRU(3, 4, batch_first=batch_first), stack, Model()):
        stream = rnnfast.Stream(module)
        first, second = torch.randn(2, 2, 3), torch.randn(3, 3, 3)  # as many steps as sequences
        stream(first)
        before = stream.state
        with pytest.raises(RuntimeError, match=r"this stream has 2 sequences, the input 3: reset\(\)"):
            stream(second)
        if not isinstance(module, Model):
            with pytest.raises(RuntimeError, match=r"2 sequences, the input 3"):
                stream(second[0])
        assert stream.state == before if isinstance(module, Model) else stream.state is before
        stream.reset()
        assert stream(second).shape == (3, 3, 4)


def test_errors_are_clear() -> None:
    with pytest.raises(RuntimeError, match="layer 'rnn' is bidirectional: it reads the whole sequence at once"):
        rnnfast.Stream(nn.ModuleDict({"rnn": rnnfast.GRU(3, 4, bidirectional=True)}))
    with pytest.raises(ValueError, match="Linear has no RNN, LSTM or GRU in it"):
        rnnfast.Stream(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"make it an rnnfast\.GRU, or rnnfast\.accelerate it"):
        rnnfast.Stream(nn.GRU(3, 4))
    with pytest.raises(ValueError, match="no recurrent layer nothing"):
        rnnfast.Stream(Tagger()).state = {"nothing": torch.zeros(1, 1, 1)}

    class ByItself(nn.Module):
        """It carries the state from step to step itself."""

        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnnfast.GRU(4, 4)

        def forward(self, input: Tensor) -> Any:
            state = None
            for row in input:
                _, state = self.rnn(row[None], state)
            return state

    model = ByItself()
    stream = rnnfast.Stream(model)
    stream(torch.randn(1, 3, 4))
    before = stream.state["rnn"].clone()
    with pytest.raises(RuntimeError, match="layer 'rnn' ran again in one call, with a state that the model gave it"):
        stream(torch.randn(2, 3, 4))
    assert torch.equal(stream.state["rnn"], before)
    assert not model.rnn._forward_hooks


class Twice(nn.Module):
    """One layer for two channels, and then once more."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = rnnfast.LSTM(4, 4)

    def forward(self, input: Tensor, times: int = 3) -> Tensor:
        left, right = input.unbind(-1)
        outputs = [self.rnn(left)[0], self.rnn(right)[0]]
        for _ in range(times - 2):
            outputs.append(self.rnn(outputs[-2] + outputs[-1])[0])
        return torch.stack(outputs)


def test_a_layer_that_runs_several_times_in_a_call() -> None:
    model, input = Twice(), torch.randn(STEPS, BATCH, 4, 2)
    stream = rnnfast.Stream(model)
    with torch.no_grad():
        outputs = [stream(piece) for piece in input.split([1, 4, 1, 6])]
        assert torch.equal(torch.cat(outputs, 1), model(input))
        assert stream.state.keys() == {"rnn", "rnn[1]", "rnn[2]"}
        kept = stream.state
        with pytest.raises(RuntimeError, match="layer 'rnn' ran 2 times in this call, and there are states of 3 runs"):
            stream(input[:1], times=2)
        with pytest.raises(RuntimeError, match="layer 'rnn' ran 4 times in this call, and there are states of 3 runs"):
            stream(input[:1], times=4)
        other = rnnfast.Stream(model)
        other.state = kept
        assert torch.equal(other(input), stream(input))
        stream.reset([1])
        whole = model(input[:, 1:2])
        assert torch.equal(stream(input)[:, :, 1:2], whole)
        stream.reset()
        assert torch.equal(stream(input[:1], times=2), model(input[:1], times=2))


def test_names_that_look_like_runs() -> None:
    model = nn.ModuleDict({"a[0]": rnnfast.GRU(3, 4)})
    model.forward = lambda x: model["a[0]"](x)[0]  # type: ignore[method-assign]
    stream, input = rnnfast.Stream(model), torch.randn(STEPS, BATCH, 3)
    with torch.no_grad():
        first = stream(input[:5])
        stream.state = stream.state
        assert torch.equal(torch.cat([first, stream(input[5:])]), model(input))
    for key in ("a[0][x]", "a[0][0]", "b[1]"):
        with pytest.raises(ValueError, match="no recurrent layer"):
            stream.state = {key: torch.zeros(1, BATCH, 4)}
    with pytest.raises(ValueError, match=r"the name of layer 'r\[1\]' is that of a run of 'r'"):
        rnnfast.Stream(nn.ModuleDict({"r": rnnfast.GRU(3, 4), "r[1]": rnnfast.GRU(3, 4)}))


def test_rows_are_reset_in_all_layers_or_in_none() -> None:
    class Narrower(Twice):
        def forward(self, input: Tensor, times: int = 2) -> Tensor:
            return self.rnn(input[..., 0])[0].sum() + self.rnn(input[:, :1, :, 1])[0].sum()

    stream = rnnfast.Stream(Narrower())
    with torch.no_grad():
        stream(torch.randn(STEPS, BATCH, 4, 2))
        before = stream.state
        with pytest.raises(
            RuntimeError, match=r"batches differ \('rnn' 3, 'rnn\[1\]' 1\): give rows in a dict by the names"
        ):
            stream.reset([2])
        with pytest.raises(IndexError, match="rows are indices below 1"):
            stream.reset({"rnn": [2]})
    assert all(torch.equal(a, b) for key in before for a, b in zip(stream.state[key], before[key], strict=True))


class Halves(nn.Module):
    """Two layers, and what comes between them in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = rnnfast.GRU(4, 4), rnnfast.GRU(4, 4)
        self.between: Any = None

    def forward(self, input: Tensor) -> Tensor:
        output, _ = self.first(input)
        if self.between is not None:
            between, self.between = self.between, None
            thread = threading.Thread(target=between)
            thread.start()
            thread.join()
        result: Tensor = self.second(output)[0]
        return result


@pytest.mark.parametrize("shares", [False, True])
def test_another_call_meanwhile(shares: bool) -> None:
    """Of a copy of the stream, or of the stream itself, in another thread."""
    model, input = Halves(), torch.randn(STEPS, BATCH, 4)
    stream = rnnfast.Stream(model)
    with torch.no_grad():
        outputs = [stream(input[:5])]
        other = stream if shares else copy.copy(stream)
        kept = stream.state

        def between() -> None:
            with torch.no_grad():
                other(torch.ones(2, BATCH, 4))

        model.between = between
        outputs.append(stream(input[5:]))
        assert torch.equal(torch.cat(outputs), model(input))
        assert not model.first._forward_hooks
        assert not model.first._forward_pre_hooks
        stream.state = kept
        assert torch.equal(stream(input[5:]), outputs[1])


class DualPath(nn.Module):
    """A frame's frequencies, both ways, and then time, for each frequency: the form of many denoisers."""

    def __init__(self) -> None:
        super().__init__()
        self.across = nn.ModuleDict({"rnn": rnnfast.GRU(4, 3, bidirectional=True), "out": nn.Linear(6, 4)})
        self.along = rnnfast.GRU(4, 4)

    def forward(self, frames: Tensor) -> Tensor:
        steps, batch, frequencies, _ = frames.shape
        across, _ = self.across["rnn"](frames.flatten(0, 1).transpose(0, 1))
        frames = self.across["out"](across).transpose(0, 1).unflatten(0, (steps, batch))
        along, _ = self.along(frames.flatten(1, 2))
        result: Tensor = along.unflatten(1, (batch, frequencies))
        return result


def test_layers_that_do_not_walk_through_time() -> None:
    model, frames = DualPath(), torch.randn(STEPS, BATCH, 5, 4)
    with pytest.raises(RuntimeError, match=r"layer 'across\.rnn' is bidirectional.* name it in stateless"):
        rnnfast.Stream(model)
    for name in ("across", "across.rnn"):
        stream = rnnfast.Stream(model, stateless=[name])
        with torch.no_grad():
            outputs = torch.cat([stream(piece) for piece in frames.split([1, 4, 1, 6])])
            torch.testing.assert_close(outputs, model(frames))
        assert stream.state.keys() == {"along"}
    with pytest.raises(ValueError, match="the model has no module 'acro'"):
        rnnfast.Stream(model, stateless=["acro"])
    with pytest.raises(TypeError, match="stateless is a list of names, got 'across'"):
        rnnfast.Stream(model, stateless="across")
    with pytest.raises(TypeError, match="stateless is a list of names, got None"):
        rnnfast.Stream(model, stateless=None)  # type: ignore[arg-type]
    model.again = model.across["rnn"]  # a second name of a layer, which is first met under the other
    assert rnnfast.Stream(model, stateless=["again"])._layers.keys() == {"along"}
    with pytest.raises(ValueError, match="has no RNN, LSTM or GRU in it whose state could be kept"):
        rnnfast.Stream(model, stateless=[""])
    with pytest.raises(ValueError, match="has no RNN, LSTM or GRU in it whose state could be kept"):
        rnnfast.Stream(model, stateless=["across", "along"])


@pytest.mark.filterwarnings("ignore")  # torch's of its older tools
@pytest.mark.parametrize("kind", ["script", "trace", "frozen", "stack", "exported", "quantized"])
def test_a_layer_whose_state_cannot_be_seen_is_refused(kind: str) -> None:
    inner = nn.Sequential(nn.GRU(4, 4)).eval()
    if kind == "script":
        hidden: nn.Module = torch.jit.script(inner)
    elif kind == "frozen":
        hidden = torch.jit.freeze(torch.jit.script(inner))
    elif kind == "stack":
        hidden = torch.jit.trace(rnnfast.Stack("gru", 4, [4]).eval(), torch.randn(STEPS, BATCH, 4))
    elif kind == "exported":
        hidden = torch.export.export(rnnfast.GRU(4, 4), (torch.randn(STEPS, BATCH, 4),)).module()
    elif kind == "trace":
        hidden = torch.jit.trace(inner, torch.randn(STEPS, BATCH, 4))
    else:
        hidden = torch.ao.quantization.quantize_dynamic(inner, {nn.GRU}, dtype=torch.qint8)
    model = nn.ModuleDict({"hidden": hidden, "seen": nn.GRU(4, 4)})
    with pytest.raises(RuntimeError, match=r"'hidden(\.0)?' is quantized, compiled by torch\.jit or exported"):
        rnnfast.Stream(model)
    assert rnnfast.Stream(model, stateless=["hidden"])._layers.keys() == {"seen"}
    for cells in (torch.jit.script(nn.Sequential(nn.LSTMCell(4, 4))), torch.ao.nn.quantized.dynamic.LSTMCell(4, 4)):
        assert rnnfast.Stream(nn.ModuleDict({"cells": cells, "seen": nn.GRU(4, 4)}))._layers.keys() == {"seen"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_refused_with_gradients(use_reentrant: bool) -> None:
    """It would run the layer again in the backward pass, from another state."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = rnnfast.GRU(3, 4), nn.Linear(4, 2)

        def forward(self, input: Tensor, whole: bool) -> Any:
            part = self.rnn if whole else self.head
            output = input if whole else self.rnn(input)[0]
            return checkpoint(part, output, use_reentrant=use_reentrant)

    model, input = Model(), torch.randn(5, 2, 3, requires_grad=True)
    stream = rnnfast.Stream(model)
    with pytest.raises(RuntimeError, match="layer 'rnn' runs under activation checkpointing"):
        stream(input, whole=True)
    assert not stream.state
    with torch.no_grad():
        stream(input, whole=True)
    stream(input, whole=False).sum().backward()  # what is not recurrent may be under it
    assert model.rnn.weight_hh_l0.grad is not None


def test_a_layer_that_leaves_no_state_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnnfast.LSTM(3, 4)

        def forward(self, input: Tensor) -> Tensor:
            return self.rnn.states(input)[0][:, -1]

    stream = rnnfast.Stream(Model())
    with pytest.raises(RuntimeError, match="layer 'rnn' left no state: a stream follows calls and `step`, not"):
        stream(torch.randn(2, 3, 3))
    assert not stream.state


def test_a_compiled_model_with_a_compiled_stream_in_it() -> None:
    """One waits for another thread's, not for its own."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, inner = rnnfast.GRU(4, 4), nn.Sequential(Halves())
            inner.compile(backend="eager")
            self.stream = [rnnfast.Stream(inner)]

        def forward(self, input: Tensor) -> Tensor:
            result: Tensor = self.stream[0](self.own(input)[0])
            return result

    torch._dynamo.reset()
    model, input = Outer(), torch.randn(STEPS, BATCH, 4)
    model.own.compile(backend="eager")
    stream = rnnfast.Stream(model)
    with torch.no_grad():
        pieces = torch.cat([stream(piece) for piece in input.split(5)])
        model.stream[0].reset()
        stream.reset()
        torch.testing.assert_close(pieces, stream(input))
