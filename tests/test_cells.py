"""RNNCell, LSTMCell and GRUCell beside torch.nn's, and in a loop against the whole sequence."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnfast
from tests.parity import parts

CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
BATCH, INPUTS, HIDDEN = 4, 3, 5


def pair(name: str, backend: str = "auto", **options: Any) -> tuple[Any, Any]:
    """A cell of torch.nn's and ours with its weights."""
    theirs = getattr(nn, name)(INPUTS, HIDDEN, **options)
    ours = getattr(rnnfast, name)(INPUTS, HIDDEN, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def state_of(name: str, *batch: int, **options: Any) -> Any:
    h = torch.randn(*batch, HIDDEN, **options)
    return (h, torch.randn(*batch, HIDDEN, **options)) if name == "LSTMCell" else h


@pytest.mark.parametrize("name", CELLS)
def test_is_a_torch_cell(name: str) -> None:
    torch.manual_seed(3)
    theirs = getattr(nn, name)(INPUTS, HIDDEN, bias=False)
    torch.manual_seed(3)
    ours = getattr(rnnfast, name)(INPUTS, HIDDEN, bias=False)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("backend", ["cpu", "reference", "torch"])
@pytest.mark.parametrize("batch", [(BATCH,), (), (0,)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, options) for name in CELLS for options in ({}, {"bias": False})), ("RNNCell", {"nonlinearity": "relu"})],
)
def test_equals_torch(name: str, options: Any, with_state: bool, batch: tuple[int, ...], backend: str) -> None:
    input = torch.randn(*batch, INPUTS, dtype=torch.float64, requires_grad=True)
    hx = state_of(name, *batch, dtype=torch.float64, requires_grad=True) if with_state else None
    results, gradients = [], []
    for cell in pair(name, backend, dtype=torch.float64, **options):
        state = cell(input, hx)
        results.append(state)
        leaves = [input, *(parts(hx) if with_state else ()), *cell.parameters()]
        weighted = sum((k + 1) * part.sin().sum() for k, part in enumerate(parts(state)))
        gradients.append(torch.autograd.grad(weighted, leaves))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", CELLS)
def test_input_without_features(name: str, backend: str) -> None:
    """As torch's cells take it: what is left of the input product is its bias, which has a gradient."""
    theirs, ours = getattr(nn, name)(0, 600), getattr(rnnfast, name)(0, 600, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    input, h = torch.zeros(BATCH, 0), torch.randn(BATCH, 600)
    hx = (h, h.cos()) if name == "LSTMCell" else h
    for _ in range(3):
        gradients = []
        for cell in (ours, theirs):
            rest = [torch.full((1800,), 7.7) for _ in range(50)]  # in memory that is not cleared
            del rest
            loss = parts(cell(input, hx))[0].sin().sum()
            gradients.append(torch.autograd.grad(loss, [*cell.parameters()][1:]))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", CELLS)
def test_token_ids_equal_one_hot_input(name: str, backend: str) -> None:
    theirs, ours = pair(name, backend)
    ids, hx = torch.randint(INPUTS, (BATCH,), dtype=torch.int32), state_of(name, BATCH)
    one_hot = nn.functional.one_hot(ids.long(), INPUTS).float()
    torch.testing.assert_close(ours(ids, hx), theirs(one_hot, hx))
    torch.testing.assert_close(ours(ids[0]), theirs(one_hot[0]))


@pytest.mark.parametrize("name", CELLS)
def test_a_loop_gives_the_bits_of_the_layer_on_the_cpu(name: str) -> None:
    cell = getattr(rnnfast, name)(INPUTS, 33, backend="cpu")
    layer = getattr(rnnfast, name.removesuffix("Cell"))(INPUTS, 33, backend="cpu")
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    input = torch.randn(9, BATCH, INPUTS)
    output, final = layer(input)
    for grad in (False, True):
        state, outputs = None, []
        with torch.set_grad_enabled(grad):
            for x in input:
                state = cell(x, state)
                outputs.append(parts(state)[0])
        assert torch.equal(torch.stack(outputs), output)
        assert all(torch.equal(a, b[0]) for a, b in zip(parts(state), parts(final), strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_the_state_can_be_detached_in_place(name: str, backend: str) -> None:
    _, cell = pair(name, backend)
    for part in parts(cell(torch.randn(BATCH, INPUTS))):
        assert not part._is_view()
        part.detach_()


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_the_state_may_be_changed_in_place(name: str, calls: int, backend: str) -> None:
    theirs, ours = pair(name, backend)
    input, found = torch.randn(BATCH, INPUTS), []
    for cell in (theirs, ours):
        for _ in range(calls):
            cell.zero_grad()
            state = cell(input)
            for part in parts(state):
                part[0] = 0
                part.relu_()
            again = cell(input, state)
            sum(part.square().sum() for part in parts(again)).backward()
        found.append([*parts(again), *(parameter.grad for parameter in cell.parameters())])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("name", CELLS)
def test_one_bias_may_be_missing(name: str, missing: str, backend: str) -> None:
    theirs, ours = pair(name, backend)
    input = torch.randn(BATCH, INPUTS)
    for cell in (theirs, ours):
        ours(input)
        setattr(cell, missing, None)
    for _ in range(3):
        found = []
        for cell in (theirs, ours):
            cell.zero_grad()
            state = parts(cell(input))
            sum(part.square().sum() for part in state).backward()
            found.append([*state, *(parameter.grad for parameter in cell.parameters())])
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", CELLS)
def test_autocast_keeps_the_state_in_float32(name: str, backend: str) -> None:
    _, ours = pair(name, backend)
    input, hx = torch.randn(BATCH, INPUTS), state_of(name, BATCH)
    expected = ours(input.bfloat16().float(), hx)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ours(input.bfloat16(), hx)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CELLS)
def test_copies_compute_the_same(name: str, backend: str) -> None:
    _, cell = pair(name, backend)
    input = torch.randn(BATCH, INPUTS)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert other.backend == backend
        torch.testing.assert_close(other(input), cell(input), rtol=0, atol=0)


@pytest.mark.parametrize("name", CELLS)
def test_the_choice_of_a_backend_is_explained(name: str) -> None:
    cell = getattr(rnnfast, name)(INPUTS, HIDDEN, backend="reference")
    assert str(rnnfast.explain(cell, torch.randn(BATCH, INPUTS))) == "reference: asked for by name"
    assert rnnfast.explain(cell.half(), torch.tensor([1])).backend == "reference"


def errors() -> list[Any]:
    x, h = torch.randn(BATCH, INPUTS), torch.randn(BATCH, HIDDEN)
    return [
        pytest.param(torch.randn(2, BATCH, INPUTS), None, id="3-D input"),
        pytest.param(torch.randn(BATCH, 7), None, id="features"),
        pytest.param(x, h[:3], id="batch"),
        pytest.param(x, h[0], id="1-D state"),
        pytest.param(x, h[:, :4], id="hidden size"),
        pytest.param(x, h[None], id="3-D state"),
    ]


@pytest.mark.parametrize(("input", "state"), errors())
@pytest.mark.parametrize("name", CELLS)
def test_errors_are_those_of_torch(name: str, input: Tensor, state: Tensor | None, backend: str) -> None:
    theirs, ours = pair(name, backend)
    hx = (state, state) if name == "LSTMCell" and state is not None else state
    with pytest.raises((ValueError, RuntimeError)) as expected:
        theirs(input, hx)
    with pytest.raises(expected.type) as actual:
        ours(input, hx)
    of_later_torch = "Expected 2D hidden0 (batch x hidden_size), but got 1D tensor"
    assert str(actual.value) in (str(expected.value), of_later_torch)


@pytest.mark.parametrize("name", CELLS)
def test_further_errors_are_clear(name: str) -> None:
    cell = getattr(rnnfast, name)(INPUTS, HIDDEN)
    with pytest.raises(RuntimeError, match=r"input has dtype torch\.float64, the weights have torch\.float32"):
        cell(torch.randn(BATCH, INPUTS).double())
    state = torch.zeros(BATCH)
    with pytest.raises(RuntimeError, match="Expected 2D hidden0"):
        cell(torch.randn(BATCH, INPUTS), (state, state) if name == "LSTMCell" else state)
    with pytest.raises(IndexError, match=r"token ids must be in \[0, 3\), got 3"):
        cell(torch.tensor([3]))
    with pytest.raises(ValueError, match="Expected token ids to be 0D or 1D, got 2D"):
        cell(torch.tensor([[1]]))
    with pytest.raises(RuntimeError, match=r"torch\.bool"):
        cell(torch.ones(BATCH, INPUTS, dtype=torch.bool))
    with pytest.raises(ValueError, match="unknown rnnfast backend"):
        getattr(rnnfast, name)(INPUTS, HIDDEN, backend="cudnn")


def test_unknown_nonlinearity() -> None:
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
        rnnfast.RNNCell(INPUTS, HIDDEN, nonlinearity="gelu")(torch.randn(BATCH, INPUTS))


@pytest.mark.filterwarnings("error")  # torch warns where it falls back to a loop
@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CELLS)
def test_vmap_over_a_batch_more(name: str, dtype: torch.dtype, token_ids: bool) -> None:
    """Half precision, which torch.nn's kernels have on a CPU, and those of the cpu backend have not."""
    _, cell = pair(name, dtype=dtype)
    input = torch.randint(INPUTS, (2, BATCH)) if token_ids else torch.randn(2, BATCH, INPUTS, dtype=dtype)
    expected = [torch.stack(part) for part in zip(*(parts(cell(each)) for each in input), strict=True)]
    bounds = {"atol": 2e-3, "rtol": 2e-3} if dtype is torch.float16 else {}  # two roundings of a number of size 1
    torch.testing.assert_close(list(parts(torch.vmap(cell)(input))), expected, **bounds)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CELLS)
def test_a_trace_serves_any_batch(name: str) -> None:
    _, cell = pair(name)
    traced = torch.jit.trace(cell, (torch.randn(BATCH, INPUTS), state_of(name, BATCH)))
    with_ids = torch.jit.trace(cell, torch.randint(INPUTS, (BATCH,)))
    for batch in (1, BATCH + 3):
        given = torch.randn(batch, INPUTS), state_of(name, batch)
        torch.testing.assert_close(traced(*given), cell(*given), rtol=0, atol=0)
        ids = torch.randint(INPUTS, (batch,))
        torch.testing.assert_close(with_ids(ids), cell(ids), rtol=0, atol=0)
