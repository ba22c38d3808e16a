"""Lengths and resets: against torch's packing and against a loop over the steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import rnnfast
from tests.parity import parts

LAYERS = ["RNN", "LSTM", "GRU"]
STEPS, BATCH, INPUTS, HIDDEN = 9, 4, 3, 5


def make(name: str, **options: Any) -> Any:
    return getattr(rnnfast, name)(INPUTS, HIDDEN, **options)


def state_of(layer: Any, batch: int = BATCH, **options: Any) -> Any:
    lanes = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = layer.weight_hh_l0.dtype
    h = torch.randn(lanes, batch, layer.proj_size or HIDDEN, dtype=dtype, **options)
    return (h, torch.randn(lanes, batch, HIDDEN, dtype=dtype, **options)) if layer.mode == "LSTM" else h


def like(state: Any, values: Any) -> Any:
    return tuple(values) if isinstance(state, tuple) else next(iter(values))


def loop(layer: Any, input: Tensor, hx: Any, reset: Tensor, reset_to: Any) -> tuple[Tensor, Any]:
    """One call of the layer for each step, resetting the state by hand."""
    outputs, state = [], hx
    zeros = like(hx, (torch.zeros_like(part) for part in parts(hx)))
    for x, mask in zip(input, reset, strict=True):
        pairs = zip(parts(state), parts(zeros if reset_to is None else reset_to), strict=True)
        state = like(hx, [torch.where(mask[None, :, None], new, old) for old, new in pairs])
        output, state = layer(x[None], state)
        outputs.append(output)
    return torch.cat(outputs), state


OPTIONS = [
    pytest.param("RNN", {}, id="RNN"),
    pytest.param("RNN", {"num_layers": 2, "nonlinearity": "relu"}, id="RNN 2 layers relu"),
    pytest.param("GRU", {"num_layers": 2}, id="GRU 2 layers"),
    pytest.param("LSTM", {}, id="LSTM"),
    pytest.param("LSTM", {"num_layers": 2, "proj_size": 2}, id="LSTM 2 layers projected"),
]


@pytest.mark.parametrize("to", ["zeros", "hx", "learned"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_resets_give_the_bits_of_a_loop_on_the_cpu(name: str, options: Any, rate: float, to: str) -> None:
    layer = make(name, backend="cpu", **options)
    reset, hx = torch.rand(STEPS, BATCH) < rate, state_of(layer)
    learned = state_of(layer, batch=1)
    reset_to = {"zeros": None, "hx": hx, "learned": learned}[to]
    for input in (torch.randn(STEPS, BATCH, INPUTS), torch.randint(INPUTS, (STEPS, BATCH))):
        expected = loop(layer, input, hx, reset, reset_to)
        actual = layer(input, hx, reset=reset, reset_to=reset_to)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("to", ["zeros", "hx"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference", "torch"])
def test_gradients_through_resets_are_those_of_a_loop(name: str, options: Any, to: str, backend: str) -> None:
    layer = make(name, backend=backend, dtype=torch.float64, **options)
    reset = torch.rand(STEPS, BATCH) < 0.3
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    hx = state_of(layer, requires_grad=True)
    leaves = [input, *parts(hx), *layer.parameters()]
    reset_to = hx if to == "hx" else None
    gradients = []
    for output, final in (loop(layer, input, hx, reset, reset_to), layer(input, hx, reset=reset, reset_to=reset_to)):
        loss = output.square().sum() + sum(part.sin().sum() for part in parts(final))
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("to", ["zeros", "hx", "learned", "zeros from zeros", "learned from zeros"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_resets_before_the_only_step(name: str, options: Any, to: str, backend: str) -> None:
    """As where an agent acts; nothing is cut then, and on the cpu backend the calls are direct."""
    layer = make(name, backend=backend, dtype=torch.float64, **options)
    reset = torch.tensor([True, False, True, False])
    given = state_of(layer, requires_grad=True)
    hx = None if "from" in to else given
    begin = tree_map(torch.zeros_like, given) if hx is None else hx
    learned = state_of(layer, batch=1, requires_grad=True)
    reset_to = hx if to == "hx" else learned if "learned" in to else None
    leaves = [*layer.parameters(), *(parts(hx) if hx is not None else ()), *(parts(learned) if "learned" in to else ())]
    for batch_first in (False, True):
        layer.batch_first = batch_first
        for input in (torch.randn(1, BATCH, INPUTS, dtype=torch.float64), torch.randint(INPUTS, (1, BATCH))):
            turned, mask = (x.transpose(0, 1) if batch_first else x for x in (input, reset[None]))
            for _ in range(2):  # the second may be direct
                layer.batch_first = False
                expected = loop(layer, input, begin, reset[None], reset_to)
                layer.batch_first = batch_first
                output, final = layer(turned, hx, reset=mask, reset_to=reset_to)
                actual = output.transpose(0, 1) if batch_first else output, final
                torch.testing.assert_close(actual, expected, rtol=0, atol=0)
                gradients = [torch.autograd.grad(result[0].square().sum(), leaves) for result in (actual, expected)]
                torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_a_reset_before_the_only_step_is_behind_the_backward_direction(name: str, backend: str) -> None:
    """It enters a sequence at the end, with the column's own state; the reset is at its beginning."""
    layer = make(name, bidirectional=True, backend=backend)
    hx, input, reset = state_of(layer), torch.randn(1, BATCH, INPUTS), torch.ones(1, BATCH, dtype=torch.bool)
    begin = like(hx, (torch.cat((torch.zeros_like(part[:1]), part[1:])) for part in parts(hx)))
    torch.testing.assert_close(layer(input, hx, reset=reset), layer(input, begin))


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_with_resets_and_sequences_that_are_whole_are_not_cut(
    name: str, direct_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(name)
    hx, input = state_of(layer), torch.randn(STEPS, BATCH, INPUTS)
    whole: Any = {"lengths": [STEPS] * BATCH, "reset": torch.zeros(STEPS, BATCH, dtype=torch.bool)}
    expected = layer(input, hx)
    monkeypatch.setattr(rnnfast.sequences, "cut", None)
    layer(input[:1], hx, reset=torch.ones(1, BATCH, dtype=torch.bool))
    assert direct_calls == [0]
    for options in (whole, {"lengths": torch.tensor(whole["lengths"])}, {"reset": whole["reset"]}):
        torch.testing.assert_close(layer(input, hx, **options), expected, rtol=0, atol=0)
    assert direct_calls == [0] * 4
    other = make(name)
    for _ in range(2):  # the first of which leaves a plan
        other(input, hx, lengths=[STEPS] * BATCH)
    assert direct_calls == [0] * 5


def test_second_derivatives(backend: str) -> None:
    layer = make("LSTM", bidirectional=True, backend=backend, dtype=torch.float64)
    input = torch.randn(5, 3, INPUTS, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(5, 3, dtype=torch.bool)
    reset[2, 1] = reset[3, 0] = True
    hx, reset_to = state_of(layer, batch=3, requires_grad=True), state_of(layer, batch=1, requires_grad=True)

    def function(input: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        output, final = layer(input, states[:2], lengths=[5, 3, 0], reset=reset, reset_to=states[2:])
        return output, *final

    inputs = (input, *hx, *reset_to)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_may_come_with_a_state_in_a_list(name: str) -> None:
    layer, input = make(name), torch.randn(STEPS, BATCH, INPUTS)
    hx = state_of(layer)
    given = list(hx) if isinstance(hx, tuple) else hx
    expected = layer(input, hx, lengths=[3, 9, 0, 5])
    torch.testing.assert_close(layer(input, given, lengths=[3, 9, 0, 5]), expected, rtol=0, atol=0)


def test_what_lies_before_a_reset_is_forgotten() -> None:
    layer = make("LSTM", num_layers=2)
    input = torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    reset = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    reset[4, 1] = True
    layer(input, reset=reset)[0][-1].sum().backward()
    assert input.grad is not None
    reached = input.grad.ne(0).any(-1)
    assert reached[4:].all()
    assert not reached[:4, 1].any()
    assert reached[:4, [0, 2, 3]].all()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}])
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_are_torchs_packing(name: str, options: dict[str, Any], backend: str) -> None:
    layer = make(name, backend=backend, dtype=torch.float64, **options)
    theirs = getattr(nn, name)(INPUTS, HIDDEN, dtype=torch.float64, **options)
    theirs.load_state_dict(layer.state_dict())
    lengths, hx = torch.tensor([3, STEPS - 1, 1, 5]), state_of(layer)
    input = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    output, final = layer(input.transpose(0, 1) if layer.batch_first else input, hx, lengths=lengths)
    packed, expected_final = theirs(pack_padded_sequence(input, lengths, enforce_sorted=False), hx)
    expected, _ = pad_packed_sequence(packed, total_length=STEPS)
    output = output.transpose(0, 1) if layer.batch_first else output
    torch.testing.assert_close((output, final), (expected, expected_final))
    assert not output[lengths.max() :].any()
    gradients = []
    for out, end in ((expected, expected_final), (output, final)):
        loss = out.square().sum() + sum(part.sin().sum() for part in parts(end))
        leaves = (theirs if out is expected else layer).parameters()
        gradients.append(torch.autograd.grad(loss, [input, *leaves]))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", LAYERS)
def test_padding_is_never_read(name: str, backend: str) -> None:
    layer = make(name, bidirectional=True, backend=backend)
    lengths = [3, 9, 0, 5]
    input = torch.randn(STEPS, BATCH, INPUTS)
    ids = torch.randint(INPUTS, (STEPS, BATCH))
    expected = layer(input, lengths=lengths), layer(ids, lengths=lengths)
    for column, length in enumerate(lengths):
        input[length:, column] = float("nan")
        ids[length:, column] = -1
    input.requires_grad_()
    actual = layer(input, lengths=lengths), layer(ids, lengths=lengths)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    actual[0][0].sum().backward()
    assert input.grad is not None
    assert not input.grad[3:, 0].any()
    assert not input.grad[:, 2].any()
    assert input.grad[:3, 0].all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_lengths_of_any_integer_type_or_a_list(dtype: torch.dtype) -> None:
    layer, input, lengths = make("GRU"), torch.randn(STEPS, BATCH, INPUTS), [3, 9, 1, 5]
    expected = layer(input, lengths=lengths)
    torch.testing.assert_close(layer(input, lengths=torch.tensor(lengths, dtype=dtype)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_lengths_of_a_type_that_cannot_hold_the_number_of_steps(dtype: torch.dtype) -> None:
    layer, input = make("GRU"), torch.randn(256 + 44, 2, INPUTS)
    expected = layer(input, lengths=[44, 44])
    assert not expected[0][44:].any()
    lengths = torch.tensor([44, 44], dtype=dtype)  # what 300 is in these types
    torch.testing.assert_close(layer(input, lengths=lengths), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference", "torch"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_sequence_keeps_its_state(name: str, backend: str) -> None:
    layer = make(name, num_layers=2, backend=backend)
    input, hx = torch.randn(STEPS, BATCH, INPUTS), state_of(layer)
    output, final = layer(input, hx, lengths=[3, 0, 9, 0])
    assert not output[:, [1, 3]].any()
    for before, after in zip(parts(hx), parts(final), strict=True):
        torch.testing.assert_close(after[:, [1, 3]], before[:, [1, 3]], rtol=0, atol=0)
    output, final = layer(input, hx, lengths=[0] * BATCH)
    torch.testing.assert_close((output, final), (torch.zeros(STEPS, BATCH, HIDDEN), hx), rtol=0, atol=0)
    for of_state in (False, True):
        output, final = layer(input, lengths=[0] * BATCH)
        layer.zero_grad()
        sum(part.sum() for part in (parts(final) if of_state else [output])).backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())
    output, final = layer(input[:, :0], lengths=[])
    assert output.shape == (STEPS, 0, HIDDEN)
    assert parts(final)[0].shape == (2, 0, HIDDEN)


def test_conventions_of_the_input_hold_for_the_mask() -> None:
    layer, first = make("GRU"), make("GRU", batch_first=True)
    first.load_state_dict(layer.state_dict())
    input, reset = torch.randn(STEPS, BATCH, INPUTS), torch.rand(STEPS, BATCH) < 0.3
    output, final = layer(input, reset=reset)
    turned, end = first(input.transpose(0, 1), reset=reset.t())
    torch.testing.assert_close((turned.transpose(0, 1), end), (output, final), rtol=0, atol=0)
    alone, end = layer(input[:, 1], reset=reset[:, 1])
    torch.testing.assert_close((alone, end), (output[:, 1], final[:, 1]), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name: str) -> None:
    layer, hx = make(name), None
    input, reset = torch.randn(STEPS, BATCH, INPUTS), torch.rand(STEPS, BATCH) < 0.3
    expected = layer(input, reset=reset, lengths=[3, 9, 0, 5])[0]
    with torch.autocast("cpu", torch.bfloat16):
        output, hx = layer(input, hx, reset=reset, lengths=[3, 9, 0, 5])
        again, _ = layer(input, hx, reset=reset, reset_to=hx)
        widened, _ = layer(input, hx, reset=reset, reset_to=tree_map(torch.Tensor.float, hx))
    assert torch.equal(widened, again)
    assert output.dtype == again.dtype == parts(hx)[0].dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02)


def operations(function: Any) -> Counter[str]:
    """How often each operation was dispatched."""

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        function()
    return count.seen


@pytest.mark.parametrize("kind", ["packed", "lengths", "reset"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_operation_is_dispatched_for_each_step(name: str, kind: str) -> None:
    layer = make(name, num_layers=2, bidirectional=True, backend="cpu")

    def run(steps: int) -> None:
        input, lengths = torch.randn(steps, BATCH, INPUTS), [steps, 1, steps // 2, 4]
        if kind == "packed":
            output = layer(pack_padded_sequence(input, torch.tensor(lengths), enforce_sorted=False))[0].data
        elif kind == "lengths":
            output = layer(input, lengths=lengths)[0]
        else:
            reset = torch.zeros(steps, BATCH, dtype=torch.bool)
            reset[::3] = True
            output = layer(input, reset=reset)[0]
        output.sum().backward()

    run(5)
    few, many = operations(lambda: run(6)), operations(lambda: run(60))
    # Packing itself, torch's, takes slices.
    assert {k: v for k, v in many.items() if kind != "packed" or "rnnfast" in k} == {
        k: v for k, v in few.items() if kind != "packed" or "rnnfast" in k
    }
    assert many["rnnfast.scan_cpu.default"] == many["rnnfast.scan_cpu_backward.default"] == 2


@pytest.mark.parametrize("name", LAYERS)
def test_more_than_65535_steps(name: str) -> None:
    steps = 70_000
    layer = getattr(rnnfast, name)(2, 4, backend="cpu")
    input = torch.randn(steps, 2, 2, requires_grad=True)
    reset = torch.zeros(steps, 2, dtype=torch.bool)
    reset[[1000, 69_000], [0, 1]] = True
    output, _ = layer(input, reset=reset, lengths=[steps, steps - 500])
    output[-1].sum().backward()
    assert input.grad is not None
    assert input.grad.isfinite().all()
    assert input.grad[-1, 0].any()
    with torch.no_grad():
        tail, _ = layer(input[1000:, :1])
        whole, final = layer(input[:, 1:])
        half, state = layer(input[:35_000, 1:])
        rest, end = layer(input[35_000:, 1:], state)
    torch.testing.assert_close(output[1000:, :1], tail, rtol=0, atol=0)
    torch.testing.assert_close(output[:69_000, 1:], whole[:69_000], rtol=0, atol=0)
    torch.testing.assert_close((torch.cat((half, rest)), end), (whole, final), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_and_resets_on_a_gpu(name: str) -> None:
    layer = make(name, num_layers=2, bidirectional=True, dtype=torch.float64, backend="reference")
    input, hx = torch.randn(STEPS, BATCH, INPUTS, dtype=torch.float64), state_of(layer)
    lengths, reset = torch.tensor([3, 9, 0, 5]), torch.rand(STEPS, BATCH) < 0.3
    expected, final = layer(input, hx, lengths=lengths, reset=reset)
    there = like(hx, [part.cuda() for part in parts(hx)])
    layer = layer.cuda()
    for where in ("cuda", "cpu"):  # the lengths and the mask may lie elsewhere
        output, end = layer(input.cuda(), there, lengths=lengths.to(where), reset=reset.to(where))
        torch.testing.assert_close(output.cpu(), expected)
        torch.testing.assert_close([part.cpu() for part in parts(end)], list(parts(final)))


def test_the_functional_form() -> None:
    layer = make("GRU", num_layers=2)
    weights = rnnfast.functional.lane_weights(layer)
    input, hx = torch.randn(STEPS, BATCH, INPUTS), state_of(layer)
    lengths, reset = [3, 9, 0, 5], torch.rand(STEPS, BATCH) < 0.3
    segments = rnnfast.sequences.cut(STEPS, BATCH, lengths, reset)
    initial = segments.initial(hx, torch.zeros_like(hx), bidirectional=False)
    rows, ends = rnnfast.functional.gru(segments.gather(input), initial, weights, batch_sizes=segments.batch_sizes)
    actual = segments.scatter(rows), segments.final(ends, hx, bidirectional=False)
    torch.testing.assert_close(actual, layer(input, hx, lengths=lengths, reset=reset), rtol=0, atol=0)


def test_the_default_device_does_not_matter() -> None:
    layer, input = make("GRU"), torch.randn(STEPS, BATCH, INPUTS)
    reset, lengths = torch.rand(STEPS, BATCH) < 0.3, [3, 9, 0, 5]
    with torch.no_grad():
        expected = layer(input, lengths=lengths, reset=reset)
        with torch.device("meta"):
            torch.testing.assert_close(layer(input, lengths=lengths, reset=reset), expected, rtol=0, atol=0)


def test_vmap_maps_inputs_and_lengths() -> None:
    layer, input = make("GRU"), torch.randn(2, STEPS, BATCH, INPUTS)
    lengths, reset = torch.tensor([3, 9, 0, 5]), torch.rand(STEPS, BATCH) < 0.3

    def call(input: Tensor, lengths: Tensor) -> Tensor:
        return torch.as_tensor(layer(input, lengths=lengths, reset=reset)[0])

    expected = torch.stack([call(one, lengths) for one in input])
    torch.testing.assert_close(torch.vmap(call, (0, None))(input, lengths), expected)
    torch.testing.assert_close(torch.vmap(call)(input, lengths.expand(2, -1)), expected)


def test_vmap_maps_resets_alone() -> None:
    layer, input = make("GRU"), torch.randn(STEPS, BATCH, INPUTS)
    resets = torch.rand(3, STEPS, BATCH) < 0.3
    resets[1] = False  # a member of whole sequences
    expected = torch.stack([layer(input, reset=reset)[0] for reset in resets])
    torch.testing.assert_close(torch.vmap(lambda reset: layer(input, reset=reset)[0])(resets), expected)


def test_errors_are_clear() -> None:
    layer, input = make("GRU"), torch.randn(STEPS, BATCH, INPUTS)
    reset = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    packed = pack_padded_sequence(input, torch.tensor([9, 5, 3, 1]))
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (ValueError, r"lengths must be in \[0, 9\].*got \[9, 10, 1, 1\]", input, {"lengths": [9, 10, 1, 1]}),
        (ValueError, r"lengths must be in \[0, 9\]", input, {"lengths": [9, -1, 1, 1]}),
        (ValueError, r"one length for each of the 4 sequences, got \(3,\)", input, {"lengths": [9, 1, 1]}),
        (TypeError, "lengths must be integers, got torch.float32", input, {"lengths": torch.ones(BATCH)}),
        (TypeError, "lengths must be integers, got torch.bool", input, {"lengths": torch.ones(BATCH) > 0}),
        (TypeError, r"got torch.float32; use reset.bool\(\)", input, {"reset": reset.float()}),
        (ValueError, r"shape without features, \(9, 4\), got \(4, 9\)", input, {"reset": reset.t()}),
        (ValueError, r"shape without features, \(9, 4\), got \(9, 4, 1\)", input, {"reset": reset[..., None]}),
        (ValueError, r"shape without features, \(9,\), got \(9, 1\)", input[:, 0], {"reset": reset[:, :1]}),
        (ValueError, "give reset= as well", input, {"reset_to": state_of(layer)}),
        (RuntimeError, "Expected hidden size", input, {"reset": reset, "reset_to": state_of(layer, batch=3)}),
        (RuntimeError, "reset_to has dtype", input, {"reset": reset, "reset_to": state_of(layer).double()}),
        (RuntimeError, "Expected hidden size", input, {"reset": reset, "hx": state_of(layer, batch=3)}),
        (RuntimeError, "h_0 has dtype torch.float64", input, {"reset": ~reset, "hx": state_of(layer).double()}),
        (ValueError, "a PackedSequence has lengths of its own", packed, {"lengths": [9, 5, 3, 1]}),
        (ValueError, "a PackedSequence has lengths of its own", packed, {"reset": reset}),
        (ValueError, "give an unbatched one without its padding", input[:, 0], {"lengths": [3]}),
        (IndexError, "token ids must be in", torch.full((STEPS, BATCH), 7), {"lengths": [9, 5, 3, 1]}),
        (RuntimeError, "Expected sequence length to be larger than 0", input[:0], {"lengths": [0] * BATCH}),
        (RuntimeError, "Expected 3, got 4", torch.randn(STEPS, BATCH, 4), {"lengths": [9, 5, 3, 1]}),
    ]
    one, mask = input[:1], reset[:1]
    cases += [
        (RuntimeError, "Expected hidden size", one, {"reset": mask, "reset_to": state_of(layer, batch=3)}),
        (RuntimeError, "Expected hidden size", one, {"reset": mask, "hx": state_of(layer, batch=3)}),
        (RuntimeError, "reset_to has dtype", one, {"reset": mask, "reset_to": state_of(layer).double()}),
        (ValueError, r"shape without features, \(1, 4\), got \(4, 1\)", one, {"reset": mask.t()}),
        (RuntimeError, "Expected 3, got 4", torch.randn(1, BATCH, 4), {"reset": mask}),
    ]
    for error, message, given, options in cases:
        with pytest.raises(error, match=message):
            layer(given, **options)
    first = make("GRU", batch_first=True)
    with pytest.raises(ValueError, match=r"shape without features, \(4, 9\), got \(9, 4\)"):
        first(input.transpose(0, 1), reset=reset)
    with pytest.raises(ValueError, match=r"shape without features, \(9, 4\), got \(4, 9\)"):
        rnnfast.sequences.cut(STEPS, BATCH, reset=reset.t())
