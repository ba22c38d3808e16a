"""How a Stack is called: reset states, unbatched input, steps, and inside graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import rnnfast

STEPS, BATCH, INPUTS, SIZES = 7, 3, 4, [6, 5]
CELLS = ["rnn_tanh", "lstm", "gru"]
# torch's own, raised by its compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def make(cell: str, **options: Any) -> Any:
    return rnnfast.Stack(cell, INPUTS, SIZES, **options)


def state_of(stack: Any, batch: int = BATCH) -> Any:
    directions, parts = 2 if stack.bidirectional else 1, 2 if stack.cell == "lstm" else 1
    states = [tuple(torch.randn(directions, batch, size) for _ in range(parts)) for size in stack.hidden_sizes]
    return states if parts == 2 else [state for (state,) in states]


def same_bits(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected), rtol=0, atol=0)


@pytest.mark.parametrize("to", ["zeros", "hx", "learned"])
@pytest.mark.parametrize("cell", CELLS)
def test_resets_are_those_of_a_loop(cell: str, to: str) -> None:
    stack = make(cell, connection=None)
    input, reset, hx = torch.randn(STEPS, BATCH, INPUTS), torch.rand(STEPS, BATCH) < 0.4, state_of(stack)
    learned = state_of(stack, batch=1)
    reset_to = {"zeros": None, "hx": hx, "learned": learned}[to]
    state, outputs = hx, []
    for x, mask in zip(input, reset, strict=True):
        news = [torch.zeros_like(part) for part in tree_leaves(hx)] if reset_to is None else tree_leaves(reset_to)
        parts = [torch.where(mask[:, None], new, old) for new, old in zip(news, tree_leaves(state), strict=True)]
        output, state = stack.step(x, list(zip(parts[::2], parts[1::2], strict=True)) if cell == "lstm" else parts)
        outputs.append(output)
    same_bits(stack(input, hx, reset=reset, reset_to=reset_to), (torch.stack(outputs), state))


def test_a_learned_reset_state_has_gradients() -> None:
    stack, reset = make("lstm", bidirectional=True), torch.rand(STEPS, BATCH) < 0.4
    start = [tuple(part.requires_grad_() for part in pair) for pair in state_of(stack, batch=1)]
    stack(torch.randn(STEPS, BATCH, INPUTS), reset=reset, reset_to=start)[0].sum().backward()
    assert all(part.grad is not None and part.grad.any() for part in tree_leaves(start))
    with torch.autocast("cpu", torch.bfloat16):
        output, state = stack(torch.randn(STEPS, BATCH, INPUTS), reset=reset, reset_to=start)
    assert {part.dtype for part in tree_leaves((output, state))} == {torch.bfloat16}


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}])
@pytest.mark.parametrize("cell", CELLS)
def test_unbatched_input_is_a_batch_of_one(cell: str, options: Any) -> None:
    stack = make(cell, **options)
    hx, reset_to, reset = state_of(stack, 1), state_of(stack, 1), torch.rand(STEPS) < 0.4
    squeezed = [torch.utils._pytree.tree_map(lambda part: part.squeeze(1), state) for state in (hx, reset_to)]
    dim = 0 if stack.batch_first else 1
    for input in (torch.randn(STEPS, INPUTS), torch.randint(INPUTS, (STEPS,))):
        expected, final = stack(input.unsqueeze(dim), hx, reset=reset.unsqueeze(dim), reset_to=reset_to)
        output, state = stack(input, squeezed[0], reset=reset, reset_to=squeezed[1])
        same_bits(output, expected.squeeze(dim))
        same_bits(state, torch.utils._pytree.tree_map(lambda part: part.squeeze(1), final))


@pytest.mark.parametrize("options", [{}, {"connection": "residual"}, {"dropout": 0.5, "weight_dropout": 0.5}])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_have_the_bits_of_the_whole(cell: str, options: Any) -> None:
    stack = rnnfast.Stack(cell, INPUTS, [33, 33], **options).eval()
    for input in (torch.randn(STEPS, BATCH, INPUTS), torch.randint(INPUTS, (STEPS, BATCH))):
        with torch.no_grad():
            state, outputs = None, []
            for x in input:
                output, state = stack.step(x, state)
                outputs.append(output)
            same_bits((torch.stack(outputs), state), stack(input))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_projections_are_torchs(bidirectional: bool, backend: str) -> None:
    options: Any = {"bidirectional": bidirectional, "proj_size": 3}
    theirs = torch.nn.LSTM(INPUTS, 6, num_layers=2, **options)
    stack = rnnfast.Stack("lstm", INPUTS, [6, 6], backend=backend, **options)
    stack.load_state_dict(theirs.state_dict())
    assert list(stack.state_dict()) == list(theirs.state_dict())
    input, (h, c) = torch.randn(STEPS, BATCH, INPUTS), theirs(torch.randn(STEPS, BATCH, INPUTS))[1]
    hx = list(zip(h.detach().chunk(2), c.detach().chunk(2), strict=True))
    output, states = stack(input, hx)
    expected, (h_n, c_n) = theirs(input, (h.detach(), c.detach()))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close([torch.cat(parts) for parts in zip(*states, strict=True)], [h_n, c_n])
    gradients = [
        torch.autograd.grad(out.square().sum(), list(module.parameters()))
        for out, module in ((output, stack), (expected, theirs))
    ]
    torch.testing.assert_close(gradients[0], gradients[1])
    wide = rnnfast.Stack("lstm", INPUTS, [6, 8], connection="highway", backend=backend, **options)
    assert wide(input, lengths=[1, 7, 0])[0].shape == (STEPS, BATCH, 6 if bidirectional else 3)
    assert "proj_size=3" in repr(wide)


def test_a_step_in_training_draws_masks() -> None:
    stack, x = make("gru", dropout=0.5), torch.ones(BATCH, INPUTS)
    steps = [stack.step(x, generator=torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])
    assert stack.eval().step(x)[0].shape == (BATCH, SIZES[-1])


def test_mistakes_are_told() -> None:
    stack, input = make("lstm"), torch.randn(STEPS, BATCH, INPUTS)
    reset, hx = torch.zeros(STEPS, BATCH, dtype=torch.bool), state_of(stack)
    resets, double = {"reset": reset}, [tuple(part.double() for part in pair) for pair in hx]
    cases: list[tuple[type[Exception], str, Any, Any, Any]] = [
        (ValueError, "give reset= as well", input, None, {"reset_to": hx}),
        (
            ValueError,
            "reset_to must be a list with one state for",
            input,
            None,
            resets | {"reset_to": hx[0][0]},
        ),
        (
            RuntimeError,
            r"reset_to\[0\] must be \(h, c\)",
            input,
            None,
            resets | {"reset_to": state_of(stack, 2)},
        ),
        (RuntimeError, "reset_to has dtype", input, None, resets | {"reset_to": double}),
        (RuntimeError, r"hx\[0\] must be .*got \[\(1, 1, 6\)", input, state_of(stack, 1), {}),
        (RuntimeError, r"hx\[0\] must be \(h, c\) of shapes \[\(1, 6\), \(1, 6\)\]", input[:, 0], hx, {}),
        (
            RuntimeError,
            r"reset_to\[0\] must be \(h, c\) of shapes \[\(1, 6\), \(1, 6\)\], got",
            input[:, 0],
            None,
            {"reset": reset[:, 0], "reset_to": state_of(stack, 1)},
        ),
        (ValueError, "give an unbatched one", input[:, 0], None, {"lengths": [3]}),
        (ValueError, r"without features, \(7,\)", input[:, 0], None, resets),
        (ValueError, "Expected token ids to be 1D or 2D, got 3D", input.long(), None, {}),
    ]
    for error, message, given, state, options in cases:
        with pytest.raises(error, match=message):
            stack(given, state, **options)
    with pytest.raises(RuntimeError, match=r"a step takes \(B, 4\)"):
        stack.step(input)
    with pytest.raises(RuntimeError, match="it has no step"):
        make("lstm", bidirectional=True).step(input[0])


OPTIONS = {
    "dropouts": {"input_dropout": 0.2, "dropout": 0.5, "weight_dropout": 0.5},
    "highway, both directions": {"connection": "highway", "bidirectional": True},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_in_a_graph(case: str) -> None:
    torch._dynamo.reset()
    stack = rnnfast.Stack("lstm", INPUTS, [5, 5], **OPTIONS[case])
    compiled = torch.compile(stack, fullgraph=True, dynamic=True, backend="aot_eager")

    def run(function: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        torch.manual_seed(1)
        outputs = tree_leaves(function(*args, **kwargs))
        return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), list(stack.parameters()))]

    for steps, lengths in ((8, [2, 8, 1]), (9, [0, 9])):
        input, reset = torch.randn(steps, len(lengths), INPUTS), torch.rand(steps, len(lengths)) < 0.3
        torch.testing.assert_close(run(compiled, input), run(stack, input))
        options = {"lengths": torch.tensor(lengths), "reset": reset, "reset_to": state_of(stack, batch=1)}
        torch.testing.assert_close(run(compiled, input, **options), run(stack, input, **options))


def test_packed_in_a_graph() -> None:
    torch._dynamo.reset()
    stack = make("gru", dropout=0.5)
    compiled = torch.compile(stack, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, enforce_sorted in (([5, 2], True), ([3, 4, 1], False)):
        packed = pack_sequence([torch.randn(length, INPUTS) for length in lengths], enforce_sorted=enforce_sorted)
        results = []
        for function in (stack, compiled):
            torch.manual_seed(1)
            output, state = function(packed)
            results.append([output.data, *state])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    stack = make("lstm", batch_first=True, dropout=0.5).eval()
    sizes = {0: Dim("batch", min=1, max=512), 1: Dim("steps", min=1, max=4096)}
    arguments, dynamic = (torch.randn(3, 6, INPUTS),), {"input": sizes, "lengths": {0: sizes[0]}}
    program = export(stack, arguments, {"lengths": torch.tensor([6, 1, 2])}, dynamic_shapes=dynamic, strict=strict)
    for lengths, steps in (([1, 4, 0, 5], 5), ([1], 1)):
        input, ends = torch.randn(len(lengths), steps, INPUTS), torch.tensor(lengths)
        torch.testing.assert_close(program.module()(input, lengths=ends), stack(input, lengths=ends))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{"zoneout": 0.5}, {"recurrent_dropout": 0.5}, {"layer_norm": True}])
def test_gradients_of_an_empty_batch(options: Any, backend: str) -> None:
    stack = rnnfast.Stack("lstm", 3, [4, 5], backend=backend, **options)
    input = torch.zeros(5, 0, 3, requires_grad=True)
    stack(input)[0].sum().backward()
    assert input.grad is not None
    assert input.grad.shape == input.shape
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in stack.parameters())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_penalty_on_per_sample_gradients(cell: str, backend: str) -> None:
    stack = rnnfast.Stack(cell, 2, [3], layer_norm=True, dtype=torch.float64, backend=backend)
    samples, parameters = torch.randn(3, 4, 2, 2, dtype=torch.float64), dict(stack.named_parameters())

    def loss(parameters: Any, sample: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(stack, parameters, (sample,))[0].sin().sum()
        return result

    mapped = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    penalty, expected = sum(part.square().sum() for part in mapped.values()), torch.zeros((), dtype=torch.float64)
    for sample in samples:
        single = torch.autograd.grad(loss(parameters, sample), [*parameters.values()], create_graph=True)
        expected = expected + sum(part.square().sum() for part in single)
    actual = torch.autograd.grad(penalty, [*parameters.values()], allow_unused=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, [*parameters.values()], allow_unused=True))
