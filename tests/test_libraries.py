"""What other people's libraries do with layers: they wrap an accelerated one's forward, and make models themselves."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
import types
from typing import Any

import torch
from torch import nn

import rnnfast
from rnnfast.swap import is_ours


def wrap_forward(layer: Any) -> None:
    function = layer.forward.__func__

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args)

    layer.forward = types.MethodType(wrapped, layer)


def test_a_forward_taken_apart_and_put_together_again_is_ours() -> None:
    """As Hugging Face Accelerate does, for mixed precision and to undo it."""
    layer, input = nn.LSTM(4, 8), torch.randn(5, 2, 4)
    rnnfast.accelerate(layer)
    expected, _ = layer(input)
    wrap_forward(layer)
    assert torch.equal(layer(input)[0], expected)
    assert not is_ours(layer)
    layer.forward = types.MethodType(layer.forward.__wrapped__, layer)  # type: ignore[method-assign]
    assert is_ours(layer)
    assert torch.equal(copy.deepcopy(layer)(input)[0], expected)
    replica = layer._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica
    assert replica.step.__self__ is replica
    replica.forward = lambda *args: None
    assert replica._replicate_for_data_parallel().forward is replica.forward
    # A pickle finds such a method by its name in an object that has none of ours yet.
    for undo in (rnnfast.restore, rnnfast.accelerate):
        loaded = pickle.loads(pickle.dumps(layer))
        assert torch.equal(loaded(input)[0], nn.LSTM.forward(loaded, input)[0])
        undo(loaded)
        assert is_ours(loaded) == (undo is rnnfast.accelerate)
    rnnfast.restore(layer)
    assert type(layer).__dict__.keys().isdisjoint(vars(layer))


def test_a_wrapped_forward_compiles() -> None:
    layer, input = nn.GRU(4, 8), torch.randn(5, 2, 4)
    rnnfast.accelerate(layer)
    expected, _ = layer(input)
    wrap_forward(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(input)[0], expected)


def test_a_library_may_be_given_our_classes() -> None:
    """As docs/modules.md says: one that derives its own from them, and one that makes its model itself."""
    code = """
import torch, rnnfast
Original, Lstm = torch.nn.GRU, torch.nn.LSTM
torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU = rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU

class Own(torch.nn.GRU):
    def forward(self, x, lengths=None):
        return super().forward(x)

layer, input = Own(3, 4, num_layers=2), torch.randn(5, 2, 3)
theirs = Original(3, 4, num_layers=2)
theirs.load_state_dict(layer.state_dict())
torch.testing.assert_close(layer(input), theirs(input))
assert isinstance(layer, Original) and isinstance(layer, rnnfast.GRU)
assert rnnfast.accelerate(theirs).swapped
assert str(rnnfast.explain(theirs, input)) == str(rnnfast.explain(layer, input))
lstm = Lstm(28, 4)
rnnfast.accelerate(lstm)
lstm.backend = "torch"
assert "states() with gradients" in str(rnnfast.explain(lstm, torch.randn(5, 2, 28)))
lstm.backend = "auto"
from rnnfast import d2l
model = d2l.RNNModel(lstm, 28)
model(torch.zeros(2, 5, dtype=torch.int64), model.begin_state(torch.device("cpu"), 2))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
