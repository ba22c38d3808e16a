"""The d2l names: what the chapter's programs ask of them."""

import math
import random
import runpy
import sys
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rnnfast
from rnnfast import d2l

pytestmark = pytest.mark.usefixtures("time_machine")
EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")


def loop_rnn(inputs: torch.Tensor, state: Any, params: Any) -> Any:
    """The chapter's recurrence, as a user writes it."""
    W_xh, W_hh, b_h, W_hq, b_q = params
    (H,) = state
    outputs = []
    for X in inputs:
        H = torch.tanh(torch.mm(X, W_xh) + torch.mm(H, W_hh) + b_h)
        outputs.append(torch.mm(H, W_hq) + b_q)
    return torch.cat(outputs, dim=0), (H,)


def test_text_names() -> None:
    lines = d2l.read_time_machine()
    assert all(line == line.strip().lower() for line in lines)
    assert d2l.tokenize(["a bc"]) == [["a", "bc"]]
    assert d2l.tokenize(["a bc"], "char") == [["a", " ", "b", "c"]]
    with pytest.raises(ValueError, match="unknown token type"):
        d2l.tokenize(lines, "syllable")
    assert d2l.count_corpus([["a"], ["b", "a"]]) == {"a": 2, "b": 1}
    corpus, vocab = d2l.load_corpus_time_machine()
    assert len(vocab) == 28
    assert corpus == d2l.Vocab(d2l.tokenize(lines, "char"))[[c for line in lines for c in line]]
    short, _ = d2l.load_corpus_time_machine(max_tokens=100)
    assert short == corpus[:100]


def test_sequential_batches_are_the_books() -> None:
    random.seed(3)
    offset = random.randint(0, 5)
    random.seed(3)
    batches = list(d2l.seq_data_iter_sequential(list(range(35)), batch_size=2, num_steps=5))
    num_tokens = ((35 - offset - 1) // 2) * 2
    Xs = torch.arange(offset, offset + num_tokens).reshape(2, -1)
    assert len(batches) == Xs.shape[1] // 5
    for i, (X, Y) in enumerate(batches):
        assert torch.equal(X, Xs[:, 5 * i : 5 * i + 5])
        assert torch.equal(Y, X + 1)


def test_random_batches_are_the_books() -> None:
    random.seed(4)
    offset = random.randint(0, 4)
    starts = list(range(0, (35 - offset - 1) // 5 * 5, 5))
    random.shuffle(starts)
    random.seed(4)
    batches = list(d2l.seq_data_iter_random(list(range(35)), batch_size=2, num_steps=5))
    assert len(batches) == len(starts) // 2
    rows = torch.cat([X for X, _ in batches])
    expected = [list(range(offset + start, offset + start + 5)) for start in starts[: len(rows)]]
    assert rows.tolist() == expected
    assert all(torch.equal(Y, X + 1) for X, Y in batches)


@pytest.mark.parametrize("iterate", [d2l.seq_data_iter_random, d2l.seq_data_iter_sequential])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 6])
def test_a_text_too_short_for_a_batch_has_none(iterate: Any, num_tokens: int) -> None:
    for _ in range(10):  # whatever the offset
        assert list(iterate(list(range(num_tokens)), batch_size=2, num_steps=5)) == []


def test_loader() -> None:
    for use_random_iter in (False, True):
        loader, vocab = d2l.load_data_time_machine(32, 35, use_random_iter)
        assert isinstance(loader, d2l.SeqDataLoader)
        batches = list(loader)
        assert len(batches) == 8
        assert batches[0][0].shape == (32, 35)
        assert loader.vocab is vocab
        assert len(loader.corpus) == 10_000


def test_scratch_model_with_our_rnn_and_with_the_users() -> None:
    ours = d2l.RNNModelScratch(28, 16, CPU, d2l.get_params, d2l.init_rnn_state, d2l.rnn)
    users = d2l.RNNModelScratch(28, 16, CPU, lambda *_: ours.params, d2l.init_rnn_state, loop_rnn)
    X = torch.randint(28, (2, 5))
    Y, (H,) = ours(X, ours.begin_state(2, CPU))
    expected, (expected_H,) = users(X, users.begin_state(2, CPU))
    assert Y.shape == (10, 28)
    assert H.shape == (2, 16)
    torch.testing.assert_close(Y, expected)
    torch.testing.assert_close(H, expected_H)
    one_hot, _ = d2l.rnn(F.one_hot(X.t(), 28).float(), ours.begin_state(2, CPU), ours.params)
    torch.testing.assert_close(one_hot, expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("name", "options"), [("RNN", {}), ("LSTM", {}), ("GRU", {}), ("LSTM", {"proj_size": 4})])
def test_concise_model_takes_both_kinds_of_layer(name: str, options: dict[str, int]) -> None:
    theirs = d2l.RNNModel(getattr(nn, name)(28, 16, **options), 28)
    ours = d2l.RNNModel(getattr(rnnfast, name)(28, 16, **options), vocab_size=28)
    ours.load_state_dict(theirs.state_dict())
    X = torch.randint(28, (2, 5))
    state = ours.begin_state(batch_size=2, device=CPU)
    Y, new = ours(X, state)
    expected, expected_state = theirs(X, theirs.begin_state(CPU, 2))
    assert Y.shape == (10, 28)
    torch.testing.assert_close(Y, expected)
    torch.testing.assert_close(new, expected_state)
    for part in new if name == "LSTM" else (new,):
        part.detach_()  # as the book's own training loop does


def test_prediction_is_greedy() -> None:
    vocab = d2l.Vocab("abc")
    net = d2l.RNNModelScratch(4, 8, CPU, d2l.get_params, d2l.init_rnn_state, loop_rnn)
    with pytest.raises(rnnfast.UserError, match="the prefix is empty"):
        d2l.predict_ch8("", 6, net, vocab, CPU)
    text = d2l.predict_ch8("ab", 6, net, vocab, CPU)
    assert text.startswith("ab")
    ids = vocab[["a", "b"]]
    for _ in range(6):
        Y, _ = net(torch.tensor([ids]), net.begin_state(1, CPU))
        ids.append(int(Y[-1].argmax()))
    assert text == "".join(vocab.to_tokens(ids))


def test_gradient_clipping_of_both_kinds() -> None:
    layer = nn.Linear(3, 3)
    scratch = d2l.RNNModelScratch(4, 8, CPU, d2l.get_params, d2l.init_rnn_state, d2l.rnn)
    for net, params in ((layer, list(layer.parameters())), (scratch, scratch.params)):
        for param in params:
            param.grad = torch.ones_like(param)
        d2l.grad_clipping(net, 100)
        assert all((param.grad == 1).all() for param in params)
        d2l.grad_clipping(net, 0.5)
        assert math.isclose(math.sqrt(sum(param.grad.square().sum() for param in params)), 0.5, rel_tol=1e-4)


@pytest.mark.parametrize("use_random_iter", [False, True])
def test_an_epoch_equals_the_books_loop(use_random_iter: bool) -> None:
    """Ours on the scan against the chapter's code, the same batches and start."""
    torch.manual_seed(0)
    ours = d2l.RNNModelScratch(28, 16, CPU, d2l.get_params, d2l.init_rnn_state, d2l.rnn)
    params = [param.detach().clone().requires_grad_() for param in ours.params]
    batches = [(X, Y) for X, Y in d2l.load_data_time_machine(8, 10, use_random_iter, 1500)[0]]
    perplexity, speed = d2l.train_epoch_ch8(
        ours,
        batches,
        nn.CrossEntropyLoss(),
        lambda batch_size: d2l.sgd(ours.params, 1, batch_size),
        CPU,
        use_random_iter,
    )
    metric, state = d2l.Accumulator(2), None
    for X, Y in batches:
        state = (torch.zeros(8, 16),) if state is None or use_random_iter else (state[0].detach(),)
        Y_hat, state = loop_rnn(F.one_hot(X.T, 28).float(), state, params)
        loss = F.cross_entropy(Y_hat, Y.T.reshape(-1))
        loss.backward()
        norm = torch.sqrt(sum(torch.sum(p.grad**2) for p in params))  # type: ignore[arg-type]
        with torch.no_grad():
            for p in params:
                p -= p.grad * (1 / norm if norm > 1 else 1)
                p.grad.zero_()
        metric.add(loss.item() * Y.numel(), Y.numel())
    assert speed > 0
    assert perplexity == pytest.approx(math.exp(metric[0] / metric[1]), rel=1e-4)
    torch.testing.assert_close(list(ours.params), params, atol=1e-4, rtol=1e-3)


def test_training_prints_what_the_book_prints(capsys: pytest.CaptureFixture[str]) -> None:
    loader, vocab = d2l.load_data_time_machine(8, 10, max_tokens=600)
    net = d2l.RNNModel(rnnfast.GRU(len(vocab), 16), len(vocab))
    d2l.train_ch8(net, loader, vocab, 1, 10, d2l.try_gpu())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 10, perplexity")
    assert lines[1].startswith("perplexity")
    assert "tokens/sec" in lines[1]
    assert lines[2].startswith("time traveller")
    assert len(lines[3]) == len("traveller") + 50


@pytest.mark.parametrize("kind", [list, tuple, deque])
def test_a_state_is_any_row_of_tensors(kind: Any) -> None:
    """As in the book, whose loop detaches each tensor of it."""

    def begin(*sizes: Any) -> Any:
        return kind(d2l.init_rnn_state(*sizes))

    def forward(inputs: torch.Tensor, state: Any, params: Any) -> Any:
        output, new = loop_rnn(inputs, state, params)
        return output, kind(new)

    nets = [
        d2l.RNNModelScratch(28, 16, CPU, d2l.get_params, *functions)
        for functions in ((begin, forward), (d2l.init_rnn_state, d2l.rnn))
    ]
    nets[0].params = [param.detach().clone().requires_grad_() for param in nets[1].params]
    loader, _ = d2l.load_data_time_machine(8, 10, max_tokens=600)
    batches = list(loader)
    losses = [
        d2l.train_epoch_ch8(net, batches, nn.CrossEntropyLoss(), partial(d2l.sgd, net.params, 1), CPU, False)[0]
        for net in nets
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_states_can_be_detached_in_place_as_in_the_books_loop() -> None:
    net = d2l.RNNModelScratch(28, 16, CPU, d2l.get_params, d2l.init_rnn_state, d2l.rnn)
    _, state = net(torch.randint(28, (2, 5)), net.begin_state(2, CPU))
    for part in state:
        part.detach_()


@pytest.mark.usefixtures("matplotlib")
def test_accumulator_timer_animator(tmp_path: Path) -> None:
    metric = d2l.Accumulator(2)
    metric.add(1, 2)
    metric.add(3, torch.tensor(4))
    assert (metric[0], metric[1]) == (4.0, 6.0)
    metric.reset()
    assert metric[0] == 0
    timer = d2l.Timer()
    assert timer.stop() >= 0
    timer.times = [1.0, 2.0, 4.0]
    assert timer.cumsum() == [1.0, 3.0, 7.0]
    assert timer.sum() == 7.0
    animator = d2l.Animator(xlabel="epoch", ylabel="perplexity", legend=["train"], xlim=[10, 20])
    animator.add(10, [3.0])
    animator.add(20, 2.0)
    animator.save(str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("matplotlib")
def test_an_animator_has_the_books_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    d2l.Animator().save("nothing.png")
    animator = d2l.Animator(
        "epoch", "loss", ["train", "test"], [1, 3], [0.1, 10], "linear", "log", ("g-.",), 2, 3, (6.0, 4.0)
    )
    animator.add(1, (torch.tensor(4.0), None))
    animator.add(2, torch.tensor([2.0, 3.0]))
    animator.add([3, 2.5], [1.0, 2.0])
    animator.save("curves.png")
    assert (animator.X, animator.Y) == ([[1, 2, 3], [2, 2.5]], [[4, 2, 1], [3, 2]])
    figure = figures[-1]
    assert len(figure.axes) == 6
    assert tuple(figure.get_size_inches()) == (6.0, 4.0)
    axes = figure.axes[0]
    assert (axes.get_xlim(), axes.get_ylim(), axes.get_yscale()) == ((1, 3), (0.1, 10), "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
    assert [line.get_linestyle() for line in axes.lines] == ["-.", "-."]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "test"]


@pytest.mark.parametrize("name", ["rnn_scratch", "rnn_concise"])
def test_examples_run_as_they_stand(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "1"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("time traveller")
    assert lines[1].startswith("perplexity")
    assert len(lines) == 4
