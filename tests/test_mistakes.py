"""A mistaken call gets one clear error, from every door there is, before any kernel reads a wrong address."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnfast
from rnnfast import functional
from rnnfast.functional import Weights

INPUT = torch.zeros(5, 2, 3)
RESET = torch.zeros(5, 2, dtype=torch.bool)
H, PAIR = torch.zeros(1, 2, 4), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
LSTM, GRU = rnnfast.LSTM(3, 4), rnnfast.GRU(3, 4)
W_IH, W_HH, B_IH, B_HH = (p.detach() for p in GRU.parameters())
GOOD, SHORT = Weights(W_IH, W_HH, B_IH, B_HH), Weights(W_IH, W_HH, B_IH[:4], B_HH)
CELL, STACK = rnnfast.GRUCell(3, 4), rnnfast.Stack("gru", 3, [4])


def gru(*weights: Any, input: torch.Tensor = INPUT, layers: int = 1, **options: Any) -> Any:
    return functional.gru(input, torch.zeros(layers, 2, 4), list(weights), **options)


def streamed() -> rnnfast.Stream:
    stream = rnnfast.Stream(GRU)
    stream(INPUT)
    return stream


def warm() -> rnnfast.GRU:
    layer = rnnfast.GRU(3, 4)
    with torch.no_grad():
        layer(INPUT), layer(INPUT)
    return layer


def strided() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends the other layout
        return torch.nested.nested_tensor([INPUT[:3, 0], INPUT[:, 1]])


def call_with(name: str, weight: torch.Tensor) -> Any:
    layer = rnnfast.GRU(3, 4)
    setattr(layer, name, nn.Parameter(weight))
    return layer(INPUT)


MISTAKES: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    # what is no tensor
    (TypeError, "input must be a tensor or a PackedSequence, got list", lambda: GRU([1, 2])),
    (TypeError, "input must be a tensor or a PackedSequence, got ndarray", lambda: GRU(INPUT.numpy())),
    (TypeError, "input must be a tensor or a PackedSequence, got list", lambda: STACK([1])),
    (TypeError, "reset must be a bool tensor, got list", lambda: GRU(INPUT, reset=RESET.tolist())),
    (TypeError, "lengths must be a tensor or a list, one for each", lambda: GRU(INPUT, lengths=3)),
    (TypeError, "one for each sequence, got 'ab'", lambda: GRU(INPUT, lengths="ab")),
    (TypeError, "one for each sequence, got {1, 2}", lambda: GRU(INPUT, lengths={1, 2})),
    (TypeError, "one for each sequence, got ['a', 'b']", lambda: GRU(INPUT, lengths=["a", "b"])),
    (TypeError, "a step takes a tensor, got list", lambda: GRU.step([1])),
    (TypeError, "a step takes a tensor, got list", lambda: STACK.step([1])),
    (TypeError, "a stream of a layer takes a tensor, got list", lambda: rnnfast.Stream(GRU)([1])),
    (TypeError, "a cell takes a tensor, got list", lambda: CELL([1.0])),
    (TypeError, "states takes a tensor, and lengths= for a ragged batch, got PackedSequence",
     lambda: LSTM.states(PackedSequence(INPUT[0], torch.tensor([2])))),
    (TypeError, "explain takes a tensor or a PackedSequence as input, got list", lambda: rnnfast.explain(GRU, [1])),
    (TypeError, "got a nested tensor; pad it, use lengths=",
     lambda: GRU(torch.nested.nested_tensor([INPUT[:3, 0], INPUT[:, 1]], layout=torch.jagged))),
    (ValueError, "token ids to be 1D or 2D, got 3D torch.int64 instead; of vectors, one-hot or others, make floating "
     "input: input.float()", lambda: LSTM(INPUT.long())),
    (ValueError, "0D or 1D, got 2D torch.int64 instead; of vectors", lambda: CELL(INPUT[0].long())),
    (ValueError, "1D or 2D, got 3D torch.bool instead; of vectors", lambda: STACK(INPUT > 0)),
    (ValueError, "states: Expected token ids to be 2D, got 3D torch.int64 instead; of vectors",
     lambda: LSTM.states(INPUT.long())),
    (RuntimeError, "a step: Expected token ids to be 1D, got 2D torch.int64 instead; of vectors",
     lambda: GRU.step(INPUT[0].long())),
    (RuntimeError, "a step: Expected token ids to be 1D, got 2D torch.bool instead; of vectors",
     lambda: STACK.step(INPUT[0] > 0)),
    (RuntimeError, "input must be floating, or integer token ids, got torch.complex64",
     lambda: GRU.step(INPUT[0] + 0j)),
    (TypeError, "input must be a tensor, got ndarray", lambda: gru(GOOD, input=INPUT.numpy())),
    (TypeError, "h_0 must be a tensor, got NoneType", lambda: functional.gru(INPUT, None, [GOOD])),
    (TypeError, "got a nested tensor; pad it, use lengths=",
     lambda: STACK(torch.nested.nested_tensor([INPUT[:3, 0], INPUT[:, 1]], layout=torch.jagged))),
    (TypeError, "got a nested tensor; pad it, use lengths=", lambda: warm()(strided())),
    (TypeError, "got a nested tensor; pad it, use lengths=", lambda: warm().step(strided())),
    (TypeError, "got a nested tensor; pad it, use lengths=",
     lambda: LSTM.states(torch.nested.nested_tensor([INPUT[:3, 0], INPUT[:, 1]], layout=torch.jagged))),
    (TypeError, "a stream of a layer takes the input, lengths=, reset= and reset_to=: it keeps the state",
     lambda: rnnfast.Stream(GRU)(INPUT, hx=H)),
    (TypeError, "a step takes no lengths: give a chunk of one step",
     lambda: rnnfast.Stream(GRU)(INPUT[0], lengths=[1, 1])),
    (ValueError, "there is no layer 'x' to give rows of", lambda: streamed().reset({"x": [0]})),
    (TypeError, "rows are integer indices or a bool mask, got torch.float32; of a mask make rows.bool()",
     lambda: streamed().reset(torch.tensor([1.0, 0.0]))),
    (RuntimeError, "input must be floating, or integer token ids, got torch.complex64", lambda: STACK(INPUT + 0j)),
    (RuntimeError, "input must be floating, or integer token ids, got torch.complex64",
     lambda: LSTM.states(INPUT + 0j)),
    # states of another form
    (RuntimeError, "Expected hidden size (1, 2, 4), got [1, 3, 4]",
     lambda: GRU(pack_sequence([INPUT[:, 0], INPUT[:2, 1]], enforce_sorted=False), torch.zeros(1, 3, 4))),
    (RuntimeError, "Expected hidden size (1, 2, 4), got [1, 1, 4]",
     lambda: GRU(pack_sequence([INPUT[:2, 0], INPUT[:, 1]], enforce_sorted=False), torch.zeros(1, 1, 4))),
    (RuntimeError, "a pair of tensors (h_0, c_0), got NoneType in it", lambda: LSTM(INPUT, (H, None))),
    (RuntimeError, "a pair of tensors (h_0, c_0), got int in it", lambda: LSTM(INPUT, reset=RESET, reset_to=(0, 0))),
    (RuntimeError, "hx[0] must be (h, c) of shapes [(1, 2, 4), (1, 2, 4)], got [(1, 2, 4), 'NoneType']",
     lambda: rnnfast.Stack("lstm", 3, [4])(INPUT, [(H, None)])),
    (RuntimeError, "GRU takes one tensor h_0 as its state, got int", lambda: GRU.step(INPUT[0], 0)),
    (RuntimeError, "(h_0, c_0), got Tensor", lambda: LSTM.states(INPUT, H)),
    (RuntimeError, "the state of an LSTM is a pair of tensors (h_0, c_0), got Tensor", lambda: LSTM(INPUT, H)),
    (RuntimeError, "(h_0, c_0), got 3 of them", lambda: LSTM(INPUT, (*PAIR, H))),
    (RuntimeError, "(h_0, c_0), got Tensor", lambda: LSTM(INPUT, reset=RESET, reset_to=H)),
    (RuntimeError, "(h_0, c_0), got Tensor", lambda: functional.lstm(INPUT, H, [Weights(*LSTM.parameters())])),
    (RuntimeError, "(h_0, c_0), got Tensor", lambda: rnnfast.LSTMCell(3, 4)(INPUT[0], H[0])),
    (RuntimeError, "(h_0, c_0), got 3 of them", lambda: rnnfast.LSTMCell(3, 4)(INPUT[0], (H[0],) * 3)),
    (RuntimeError, "GRU takes one tensor h_0 as its state, got tuple", lambda: GRU(INPUT, PAIR)),
    (RuntimeError, "GRUCell takes one tensor h as its state, got tuple", lambda: CELL(INPUT[0], PAIR)),
    # weights of another form
    (ValueError, "one entry per layer and direction, got 0", lambda: gru()),
    (ValueError, "one entry per layer and direction, got 1", lambda: gru(GOOD, bidirectional=True)),
    (TypeError, "weights must be a list of rnnfast.functional.Weights", lambda: gru((W_IH, W_HH))),
    (RuntimeError, "w_hh of gru must have shape (3 H, H), got (12, 3)", lambda: gru(Weights(W_IH, W_IH))),
    (RuntimeError, "w_hh of lstm must have shape (4 H, H)", lambda: functional.lstm(INPUT, PAIR, [GOOD])),
    (RuntimeError, "b_hh of weights[0] must have shape (12,), got None", lambda: gru(Weights(W_IH, W_HH, B_IH))),
    (RuntimeError, "b_ih of weights[0] must have shape (12,), got (4,)", lambda: gru(SHORT)),
    (RuntimeError, "w_ih of weights[1] must have shape (12, 4), got (12, 3)", lambda: gru(GOOD, GOOD, layers=2)),
    (RuntimeError, "w_ih of weights[0] must have shape (12, 3)", lambda: call_with("weight_ih_l0", W_IH[:6])),
    (RuntimeError, "b_hh of weights[0] must have shape (12,)", lambda: call_with("bias_hh_l0", B_HH[:3])),
    (RuntimeError, "b_hh of weights[0] is torch.float64 on cpu", lambda: call_with("bias_hh_l0", B_HH.double())),
    (RuntimeError, "b_ih of weights[0] is torch.float32 on meta", lambda: call_with("bias_ih_l0", B_HH.to("meta"))),
    # devices
    (RuntimeError, "input is on meta, the weights are on cpu", lambda: GRU(INPUT.to("meta"))),
    (RuntimeError, "h_0 is on meta, the weights are on cpu", lambda: GRU(INPUT, H.to("meta"))),
    (RuntimeError, "reset_to is on meta, the state is on cpu", lambda: GRU(INPUT, reset=RESET, reset_to=H.to("meta"))),
    # ragged batches
    (RuntimeError, "batch_sizes must be an int64 tensor on the CPU, as in PackedSequence, got list",
     lambda: gru(GOOD, input=INPUT.flatten(0, 1), batch_sizes=[2] * 5)),
    (RuntimeError, "got torch.int32 on cpu",
     lambda: gru(GOOD, input=INPUT.flatten(0, 1), batch_sizes=torch.full((5,), 2, dtype=torch.int32))),
    # the rest
    (TypeError, "explain takes an rnnfast layer, cell or Stack, got LSTM; rnnfast.accelerate it first",
     lambda: rnnfast.explain(nn.LSTM(3, 4), INPUT)),
    (TypeError, "got Sequential; explain one of its layers", lambda: rnnfast.explain(nn.Sequential(GRU), INPUT)),
    (ValueError, "unknown cell 'elman'; choose from rnn_tanh",
     lambda: functional.step("elman", INPUT[0], H, None, [GOOD])),
    (RuntimeError, "w_hr projects the state of an lstm, gru has none",
     lambda: gru(Weights(W_IH, W_HH, B_IH, B_HH, torch.zeros(4, 4)))),
    (RuntimeError, "this GRU is bidirectional: it reads the whole sequence at once, so it has no stream",
     lambda: rnnfast.Stream(rnnfast.GRU(3, 4, bidirectional=True))),
    (TypeError, "accelerate takes a torch.nn.Module, got list", lambda: rnnfast.accelerate([1])),
    (ValueError, "dropout is a probability in [0, 1), got 'a'", lambda: rnnfast.Stack("gru", 3, [4], dropout="a")),
    (IndexError, "token ids must be in [0, 3), got 7", lambda: GRU(torch.tensor([[7]], dtype=torch.uint16))),
    (TypeError, "the state of a model is a dict by its layers' names, got Tensor",
     lambda: setattr(rnnfast.Stream(nn.Sequential(GRU)), "state", H)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), MISTAKES)
def test_mistakes(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("sizes", [[2, 3, 1], [3, 2], [1, 1]])
def test_packed_rows_that_do_not_fit(sizes: list[int], backend: str) -> None:
    layer = rnnfast.GRU(3, 4, backend=backend)
    with pytest.raises(RuntimeError, match=r"^batch_sizes"):
        layer(PackedSequence(torch.zeros(6, 3), torch.tensor(sizes)))


def test_a_model_on_the_meta_device_has_shapes() -> None:
    for layer in (rnnfast.RNN(3, 4), rnnfast.LSTM(3, 4, 2, bidirectional=True), rnnfast.Stack("gru", 3, [4, 5])):
        expected = layer(INPUT)[0].shape
        assert layer.to("meta")(INPUT.to("meta"))[0].shape == expected
