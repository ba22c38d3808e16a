"""The operator itself: its registration, its gradients of first and second order, and the tape as a common language."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import rnnfast
from rnnfast.cells import CELLS
from rnnfast.dispatch import Request, choose
from rnnfast.scan import Weights, scan
from tests.conftest import SCAN_BACKENDS

VARIANTS = list(itertools.product(CELLS, [False, True], [False, True], [False, True]))


def arguments(
    cell: str,
    bidirectional: bool,
    ragged: bool,
    token_ids: bool,
    projected: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Small random arguments of the forward operator."""
    lanes, inputs, hidden, sizes = 1 + bidirectional, 3, 4, [3, 3, 2, 1] if ragged else [2] * 3
    gates, rows, columns = CELLS[cell].gates, sum(sizes), projected or hidden

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).mul_(0.7).requires_grad_()

    return {
        "input": torch.randint(inputs, (rows,)) if token_ids else tensor(rows, inputs),
        "w_ih": tensor(lanes, gates * hidden, inputs),
        "w_hh": tensor(lanes, gates * hidden, columns),
        "b_ih": tensor(lanes, gates * hidden),
        "b_hh": tensor(lanes, gates * hidden),
        "w_hr": tensor(lanes, projected, hidden) if projected else None,
        "h_0": tensor(lanes, sizes[0], columns),
        "c_0": tensor(lanes, sizes[0], hidden) if CELLS[cell].has_cell_state else None,
        "batch_sizes": torch.tensor(sizes) if ragged else None,
        "cell": cell,
        "bidirectional": bidirectional,
        "save_tape": True,
    }


def operator(backend: str, backward: bool = False) -> Any:
    request = Request("lstm", "cpu", torch.float64, token_ids=False, projected=False)
    choose(request, backend)  # loads it
    return getattr(torch.ops.rnnfast, f"scan_{backend}" + "_backward" * backward).default


def detached(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}


def backward_arguments(values: dict[str, Any], output: Tensor, h_n: Tensor, c_n: Tensor, tape: Tensor) -> list[Any]:
    layer = list(detached(values).values())[:-1]
    d_c_n = torch.randn_like(c_n) if c_n.numel() else None
    needs = [not isinstance(values["input"], Tensor) or values["input"].is_floating_point(), True]
    return [torch.randn_like(output), torch.randn_like(h_n), d_c_n, *layer, output.detach(), tape.detach(), *needs]


@pytest.mark.parametrize(("cell", "bidirectional", "ragged", "token_ids"), VARIANTS)
def test_opcheck(cell: str, bidirectional: bool, ragged: bool, token_ids: bool, backend: str) -> None:
    values = arguments(cell, bidirectional, ragged, token_ids)
    torch.library.opcheck(operator(backend), tuple(values.values()))
    results = operator(backend)(*detached(values).values())
    torch.library.opcheck(operator(backend, backward=True), tuple(backward_arguments(values, *results)))


@pytest.mark.parametrize(("cell", "bidirectional", "ragged", "token_ids"), VARIANTS)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradients(cell: str, bidirectional: bool, ragged: bool, token_ids: bool, check: Any, backend: str) -> None:
    values = arguments(cell, bidirectional, ragged, token_ids, projected=2 if cell == "lstm" and ragged else 0)
    operator(backend)
    names = [name for name, value in values.items() if isinstance(value, Tensor) and value.requires_grad]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        v = values | dict(zip(names, tensors, strict=True))
        weights = Weights(v["w_ih"], v["w_hh"], v["b_ih"], v["b_hh"], v["w_hr"])
        results = scan(backend, v["input"], weights, v["h_0"], v["c_0"], v["batch_sizes"], cell, bidirectional)
        return results if CELLS[cell].has_cell_state else results[:2]

    assert check(function, [values[name] for name in names], fast_mode=check is gradgradcheck)


def test_second_derivative_sees_each_input_once() -> None:
    """h_0 computed from w_hh: the gradient of w_hh must not count the path through h_0 twice, to any order."""
    w_hh = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    input, w_ih = torch.randn(6, 3, dtype=torch.float64), torch.randn(1, 4, 3, dtype=torch.float64)

    def function(w: Tensor) -> Tensor:
        h_0 = w.sum(1, keepdim=True).expand(1, 2, 4) * 0.1
        return scan("reference", input, Weights(w_ih, w), h_0, None, None, "rnn_tanh", False)[0]

    assert gradcheck(function, [w_hh])
    assert gradgradcheck(function, [w_hh])


PAIRS = [
    pytest.param(a.values[0], b.values[0], marks=[*a.marks, *b.marks])
    for a, b in itertools.product(SCAN_BACKENDS, repeat=2)
    if a is not b
]


@pytest.mark.parametrize(("cell", "bidirectional", "ragged", "token_ids"), VARIANTS)
@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_any_backward_reads_any_tape(
    cell: str, bidirectional: bool, ragged: bool, token_ids: bool, forward: str, backward: str
) -> None:
    values = arguments(cell, bidirectional, ragged, token_ids)
    results = operator(forward)(*detached(values).values())
    inputs = backward_arguments(values, *results)
    expected = operator(forward, backward=True)(*inputs)
    torch.testing.assert_close(operator(backward, backward=True)(*inputs), expected)


def test_backward_without_a_tape_says_so(backend: str) -> None:
    values = arguments("lstm", False, False, False) | {"save_tape": False}
    output = operator(backend)(*values.values())[0]
    with pytest.raises(RuntimeError, match="save_tape=False"):
        output.sum().backward()


def test_no_tape_is_kept_where_no_gradient_is_wanted() -> None:
    layer = rnnfast.LSTM(3, 4, backend="reference")
    input = torch.randn(5, 2, 3)
    with torch.no_grad():
        assert layer(input)[0].grad_fn is None
    layer.requires_grad_(False)
    assert layer(input)[0].grad_fn is None
