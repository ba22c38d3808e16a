"""What type checkers know of the layers and cells; mypy reads this file, which runs as a test as well."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import rnnfast

X = torch.randn(4, 2, 3)
PACKED = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])


def test_a_call_returns_what_it_was_given() -> None:
    for layer in (rnnfast.RNN(3, 5, nonlinearity="relu"), rnnfast.GRU(3, 5, num_layers=2, dropout=0.1)):
        output, h = layer(X, lengths=[4, 2])
        assert_type((output, h), tuple[Tensor, Tensor])
        packed, h = layer(PACKED, h)
        assert_type((packed, h), tuple[PackedSequence, Tensor])

    lstm = rnnfast.LSTM(3, 5, batch_first=False, proj_size=2, device="cpu", dtype=torch.float32, backend="auto")
    assert_type(lstm(X), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(lstm(PACKED), tuple[PackedSequence, tuple[Tensor, Tensor]])
    assert_type(lstm(X, lstm(X)[1]), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(lstm.step(X[0]), tuple[Tensor, tuple[Tensor, Tensor]])


def test_a_stack_returns_what_it_was_given() -> None:
    stack = rnnfast.Stack("lstm", 3, [5, 4])
    assert_type(stack(X, lengths=[4, 2])[0], Tensor)
    assert_type(stack(PACKED)[0], PackedSequence)


def test_a_cell_returns_its_state() -> None:
    assert_type(rnnfast.RNNCell(3, 5, nonlinearity="relu")(X[0]), Tensor)
    assert_type(rnnfast.GRUCell(3, 5, bias=False)(X[0], torch.zeros(2, 5)), Tensor)
    assert_type(rnnfast.LSTMCell(3, 5)(X[0]), tuple[Tensor, Tensor])


def test_a_name_that_is_misspelt_is_seen() -> None:
    with pytest.raises(AttributeError, match="module 'rnnfast' has no attribute 'LSTN'"):
        rnnfast.LSTN  # type: ignore[attr-defined] # noqa: B018


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_constructors_are_torch_nn_s(name: str) -> None:
    """Names, order and defaults, which `help` shows and `skip_init` looks up."""
    theirs: Any = getattr(nn, name)
    documented = theirs.__doc__.removeprefix("__init__(").split(")")[0].replace(" ", "")
    # torch.nn's cells have a signature, and its layers one in their documentation.
    if name.endswith("Cell"):
        documented = ",".join(str(p).split(":")[0].split("=")[0] for p in inspect.signature(theirs).parameters.values())
    ours = list(inspect.signature(getattr(rnnfast, name)).parameters)
    assert ours == [*(part.split("=")[0] for part in documented.split(",")), "backend"]
    assert skip_init(getattr(rnnfast, name), 3, 5)(X[0]) is not None
