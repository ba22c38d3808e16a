"""Autocast, half types, mixed dtypes, and GradScaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import rnnfast
from rnnfast import dispatch, functional, scan

LAYERS = ["RNN", "LSTM", "GRU"]
DTYPE_ERROR = "does not match weight dtype|must have the type"  # torch 2.11 and later, torch 2.10


def build(name: str, backend: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    theirs = getattr(nn, name)(5, 7, num_layers=2, dtype=dtype)
    ours = getattr(rnnfast, name)(5, 7, num_layers=2, dtype=dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name: str, with_state: bool, backend: str) -> None:
    theirs, ours = build(name, backend)
    input = torch.randn(6, 4, 5, requires_grad=True)
    hx: Any = torch.randn(2, 4, 7) if with_state else None
    hx = (hx, hx) if with_state and name == "LSTM" else hx
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = tree_leaves(ours(input, hx))
    assert all(out.dtype == torch.bfloat16 for out in outputs)
    expected = tree_leaves(theirs(input, hx))
    torch.testing.assert_close([out.float() for out in outputs], expected, rtol=0.02, atol=0.02)
    leaves, their_leaves = [input, *ours.parameters()], [input, *theirs.parameters()]
    actual = torch.autograd.grad(outputs[0].float().pow(2).sum(), leaves)
    gradients = torch.autograd.grad(expected[0].pow(2).sum(), their_leaves)
    for ours_, theirs_ in zip(actual, gradients, strict=True):
        assert ours_.dtype == torch.float32
        assert (ours_ - theirs_).norm() < 0.02 * theirs_.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_steps_under_autocast(name: str) -> None:
    _, layer = build(name, "cpu")
    input, stream = torch.randn(6, 4, 5), rnnfast.Stream(layer)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = layer(input)
        steps = torch.stack([stream(x) for x in (*input[:3], *input[3:].bfloat16())])
    # The state is rounded between the steps, and within a call it is not.
    torch.testing.assert_close(steps, output, rtol=0.02, atol=0.01)
    torch.testing.assert_close(tree_leaves(stream.state), tree_leaves(state), rtol=0.02, atol=0.01)


def test_states_under_autocast() -> None:
    _, layer = build("LSTM", "cpu")
    input = torch.randn(6, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, (h_n, c_n) = layer(input)
        for given in (input, input.bfloat16()):
            h, c = layer.states(given)
            assert torch.equal(h[:, -1], output)
            assert torch.equal(h[-1], h_n)
            assert torch.equal(c[-1], c_n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_leaves_float64_alone(name: str, dtype: torch.dtype) -> None:
    theirs, ours = build(name, "auto", torch.float64)
    input = torch.randn(6, 4, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(tree_leaves(ours(input)), tree_leaves(theirs(input)))
        with pytest.raises(RuntimeError, match="convert one of them"):
            ours(input.float())
        assert (
            rnnfast.Stack(name.lower().replace("rnn", "rnn_tanh"), 5, [7], dtype=torch.float64)(input)[0].dtype
            == input.dtype
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_half_weights(name: str, dtype: torch.dtype) -> None:
    _, ours = build(name, "auto", dtype)
    _, wide = build(name, "reference")
    wide.load_state_dict(ours.state_dict())
    input = torch.randn(6, 4, 5, dtype=dtype)
    outputs, expected = ours(input)[0], wide(input.float())[0]
    assert outputs.dtype == dtype
    actual = torch.autograd.grad(outputs.float().pow(2).sum(), list(ours.parameters()))
    gradients = torch.autograd.grad(expected.pow(2).sum(), list(wide.parameters()))
    for ours_, theirs_ in zip((outputs, *actual), (expected, *gradients), strict=True):
        assert ours_.dtype == dtype
        assert (ours_.float() - theirs_).norm() < 0.02 * theirs_.norm()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("weights", "input"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float32, torch.complex64)],
)
def test_input_of_another_dtype_is_refused_in_torchs_words(name: str, weights: Any, input: Any) -> None:
    theirs, ours = build(name, "auto", weights)
    data = torch.randn(6, 4, 5).to(input)
    with pytest.raises(ValueError, match=DTYPE_ERROR) as expected:
        theirs(data)
    with pytest.raises(ValueError, match=DTYPE_ERROR) as actual:
        ours(data)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("name", LAYERS)
def test_state_of_another_dtype_is_refused(name: str) -> None:
    theirs, ours = build(name, "auto")
    state: Any = torch.randn(2, 4, 7, dtype=torch.float64)
    state = (state, state) if name == "LSTM" else state
    with pytest.raises(RuntimeError):  # from whichever kernel meets it first
        theirs(torch.randn(6, 4, 5), state)
    with pytest.raises(RuntimeError, match=r"h_0 has dtype torch.float64, the weights have torch.float32"):
        ours(torch.randn(6, 4, 5), state)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode_computes_as_ever(name: str, backend: str) -> None:
    """A functional call follows no autocast, with or without tangents."""
    _, layer = build(name, backend)
    scan, hx = getattr(rnnfast.functional, name.lower()), torch.randn(2, 4, 7)
    arguments = (torch.randn(6, 4, 5), (hx, hx) if name == "LSTM" else hx, rnnfast.functional.lane_weights(layer))
    options: Any = {"bidirectional": layer.bidirectional, "backend": backend}
    expected, _ = scan(*arguments, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16), forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
        actual, tangent = forward_ad.unpack_dual(scan(dual, *arguments[1:], **options)[0])
    assert tangent is not None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_grad_scaler(backend: str) -> None:
    torch.manual_seed(0)
    layer = rnnfast.GRU(5, 7, backend=backend)
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.5), torch.amp.GradScaler("cpu", init_scale=1024.0)
    input, losses = torch.randn(6, 4, 5), []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (layer(input)[0].float() - 0.3).pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    before = [parameter.clone() for parameter in layer.parameters()]
    layer.weight_hh_l0.grad.fill_(float("inf"))
    scaler.scale(loss.detach())
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert scaler.get_scale() < 1024.0


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_on_a_gpu(name: str) -> None:
    theirs, ours = build(name, "auto")
    theirs, ours, input = theirs.cuda(), ours.cuda(), torch.randn(6, 4, 5, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        actual, expected = tree_leaves(ours(input)), tree_leaves(theirs(input))
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", LAYERS)
def test_torchs_operator_does_as_well(name: str) -> None:
    """It is what a compiled or exported layer on the torch backend calls."""
    _, layer = build(name, "torch")
    weights, input = scan.stack_lanes(functional.lane_weights(layer)[1:]), torch.randn(24, 7)
    states = (torch.randn(1, 4, 7), torch.randn(1, 4, 7) if name == "LSTM" else None)
    arguments = (*weights, *states, None, dispatch.cell_of(layer), False, False)
    expected = torch.ops.rnnfast.scan_torch(input, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.ops.rnnfast.scan_torch(input, *arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(("backend", "within"), [("cpu", True), ("cpu", False), ("reference", True), ("torch", False)])
def test_operators_compute_in_the_dtypes_of_their_arguments(backend: str, within: bool) -> None:
    """A functional call under autocast, its backward within or after it, has the bits that it has without."""
    _, layer = build("GRU", backend)
    weights, input = functional.lane_weights(layer), torch.randn(6, 4, 5, requires_grad=True)
    state, leaves = torch.randn(2, 4, 7), [input, *layer.parameters()]
    expected, _ = functional.gru(input, state, weights, backend=backend)
    gradients = torch.autograd.grad(expected.sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = functional.gru(input, state, weights, backend=backend)
        with torch.autocast("cpu", enabled=within):
            found = torch.autograd.grad(output.sum(), leaves)
    assert torch.equal(output, expected)
    for ours, theirs in zip(found, gradients, strict=True):
        assert torch.equal(ours, theirs)
