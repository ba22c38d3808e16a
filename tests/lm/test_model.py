"""The language models against torch.nn, and the chapter's loop over time."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnnfast.lm import RNNLM, RNNLMScratch, UserError
from rnnfast.lm.backpropagation import loss_of

IDS = torch.randint(28, (7, 3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_rnnlm_equals_torch_on_one_hot(cell: str, num_layers: int) -> None:
    model = RNNLM(28, cell, 16, num_layers)
    layer = {"rnn": nn.RNN, "rnn_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
    options: dict[str, Any] = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    reference = layer(28, 16, num_layers, **options)
    reference.load_state_dict(model.rnn.state_dict())
    state, expected_state = None, None
    for ids in (IDS, IDS.flip(0)):  # the second with the state of the first
        logits, state = model(ids, state)
        output, expected_state = reference(F.one_hot(ids, 28).float(), expected_state)
        assert logits.shape == (7, 3, 28)
        torch.testing.assert_close(logits, model.head(output))


def test_hidden_states_and_head_weights_make_the_model() -> None:
    embedded = RNNLM(28, "gru", 16, 2, dropout=0.5, embedding_size=16, tie_weights=True).eval()
    for model in (RNNLM(28, "lstm", 16), RNNLM(28, hidden_size=8, bidirectional=True), embedded, RNNLMScratch(28, 16)):
        logits, _ = model(IDS)
        hidden, _ = model.hidden_states(IDS)
        assert torch.equal(F.linear(hidden, *model.head_weights()), logits)
        loss, _ = loss_of(model, IDS, IDS.flip(0), None)
        torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), IDS.flip(0).flatten()))


def test_scratch_equals_the_chapters_loop() -> None:
    torch.manual_seed(0)
    model = RNNLMScratch(28, 16)
    for name, parameter in model.named_parameters():
        shapes = {"W_xh": (28, 16), "W_hh": (16, 16), "b_h": (16,), "W_hq": (16, 28), "b_q": (28,)}
        assert parameter.shape == shapes[name]
    assert model.W_hh.t().is_contiguous()
    assert 0.005 < model.W_hh.std() < 0.02
    assert not model.b_h.any()
    assert not model.b_q.any()
    logits, state = model(IDS)
    H, outputs = torch.zeros(3, 16), []
    for X in F.one_hot(IDS, 28).float():
        H = torch.tanh(X @ model.W_xh + H @ model.W_hh + model.b_h)
        outputs.append(H @ model.W_hq + model.b_q)
    expected = torch.stack(outputs)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(state[0], H)
    ours = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_embedding_and_tied_weights() -> None:
    model = RNNLM(28, "gru", 16, embedding_size=16, tie_weights=True)
    assert model.head.weight is model.embedding.weight
    assert 0.2 < model.head.weight.std() < 0.3  # that of logits of order 1, 16 ** -0.5
    assert model(IDS)[0].shape == (7, 3, 28)
    assert RNNLM(28, "gru", 16, embedding_size=5).rnn.input_size == 5
    with pytest.raises(UserError, match="unknown cell 'foo'; choose from rnn, rnn_relu, lstm, gru"):
        RNNLM(20, cell="foo")
    with pytest.raises(UserError, match="--embedding-size 16"):
        RNNLM(28, "gru", 16, embedding_size=8, tie_weights=True)
    with pytest.raises(UserError, match="--embedding-size 16"):
        RNNLM(28, "gru", 16, tie_weights=True)


def test_dropout_acts_in_training_only() -> None:
    model = RNNLM(28, "rnn", 64, 2, dropout=0.5)
    assert not torch.equal(model(IDS)[0], model(IDS)[0])
    model.eval()
    assert torch.equal(model(IDS)[0], model(IDS)[0])


def test_dropout_acts_behind_the_embedding_and_in_front_of_the_head() -> None:
    model, inputs = RNNLM(28, "rnn", 64, dropout=0.5, embedding_size=64), []
    model.rnn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for tensor in (model.hidden_states(IDS)[0], inputs[0]):
        assert 0.4 < (tensor == 0).float().mean() < 0.6
