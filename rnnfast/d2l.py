"""The classic names (0.17) of "Dive into Deep Learning", chapter on recurrent networks, over rnnfast.

A program of its sections on text, on recurrent networks from scratch and concise, and of the next chapter's on GRU,
LSTM and deep networks, runs with `from rnnfast import d2l` in place of `from d2l import torch as d2l`, except for what
it draws with `d2l.plot`. The functions do what the book's do, and draw from Python's `random` in the same way;
batches, recurrence and prediction are rnnfast's.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnnfast.errors import UserError
from rnnfast.lm import data
from rnnfast.lm.model import detach, scratch_rnn, scratch_weight
from rnnfast.lm.vocab import Vocab, count_corpus
from rnnfast.swap import is_ours

__all__ = [
    "Accumulator",
    "Animator",
    "RNNModel",
    "RNNModelScratch",
    "SeqDataLoader",
    "Timer",
    "Vocab",
    "count_corpus",
    "get_params",
    "grad_clipping",
    "init_rnn_state",
    "load_corpus_time_machine",
    "load_data_time_machine",
    "predict_ch8",
    "read_time_machine",
    "rnn",
    "seq_data_iter_random",
    "seq_data_iter_sequential",
    "sgd",
    "tokenize",
    "train_ch8",
    "train_epoch_ch8",
    "try_gpu",
]


# Text


def read_time_machine() -> list[str]:
    """The Time Machine as cleaned lines: letters only, in lower case.

    Raises:
        rnnfast.lm.UserError: the text cannot be had.
    """
    return data.clean_lines(data.time_machine())


def tokenize(lines: Sequence[str], token: str = "word") -> list[list[str]]:
    """Split lines into words, or for token="char" into characters."""
    if token not in ("word", "char"):
        raise ValueError(f"unknown token type {token!r}: take 'word' or 'char'")
    return [line.split() if token == "word" else list(line) for line in lines]


def load_corpus_time_machine(max_tokens: int = -1) -> tuple[list[int], Vocab]:
    """The character ids of The Time Machine (the first `max_tokens`, or all), and the vocabulary of all of it."""
    corpus = data.load_corpus("timemachine", max_tokens=max_tokens if max_tokens > 0 else -1)
    return corpus.train.tolist(), corpus.vocab


def seq_data_iter_random(
    corpus: Sequence[int] | Tensor, batch_size: int, num_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches X, Y, (batch_size, num_steps), of pieces of the text in random order, cut from a random offset."""
    ids = torch.as_tensor(corpus)
    offset = random.randint(0, num_steps - 1)
    pieces = list(range(data.num_random_pieces(len(ids), num_steps, offset)))
    random.shuffle(pieces)
    order = torch.tensor(pieces, dtype=torch.int64)  # an empty list is float
    yield from _batch_first(data.random_batches(ids, batch_size, num_steps, offset, order))


def seq_data_iter_sequential(
    corpus: Sequence[int] | Tensor, batch_size: int, num_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches X, Y, (batch_size, num_steps), each continuing where the last ended, from a random offset."""
    offset = random.randint(0, num_steps)
    yield from _batch_first(data.sequential_batches(torch.as_tensor(corpus), batch_size, num_steps, offset))


def _batch_first(batches: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views: the transpose a model takes of them is contiguous."""
    for x, y in zip(*batches, strict=True):
        yield x.t(), y.t()


class SeqDataLoader:
    """The batches of The Time Machine, drawn anew in every iteration."""

    def __init__(self, batch_size: int, num_steps: int, use_random_iter: bool, max_tokens: int) -> None:
        self.data_iter_fn = seq_data_iter_random if use_random_iter else seq_data_iter_sequential
        corpus, self.vocab = load_corpus_time_machine(max_tokens)
        self.corpus = torch.tensor(corpus)
        self.batch_size, self.num_steps = batch_size, num_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data_iter_fn(self.corpus, self.batch_size, self.num_steps)


def load_data_time_machine(
    batch_size: int, num_steps: int, use_random_iter: bool = False, max_tokens: int = 10000
) -> tuple[SeqDataLoader, Vocab]:
    """The batches of The Time Machine and its vocabulary."""
    loader = SeqDataLoader(batch_size, num_steps, use_random_iter, max_tokens)
    return loader, loader.vocab


# Models


def get_params(vocab_size: int, num_hiddens: int, device: torch.device) -> list[Tensor]:
    """The five parameters of the RNN from scratch: W_xh, W_hh, b_h, W_hq, b_q; weights from N(0, 0.01^2)."""
    return [
        scratch_weight(vocab_size, num_hiddens, device),
        scratch_weight(num_hiddens, num_hiddens, device),
        nn.Parameter(torch.zeros(num_hiddens, device=device)),
        scratch_weight(num_hiddens, vocab_size, device),
        nn.Parameter(torch.zeros(vocab_size, device=device)),
    ]


def init_rnn_state(batch_size: int, num_hiddens: int, device: torch.device) -> tuple[Tensor]:
    """A zero hidden state, in a tuple as the chapter has it."""
    return (torch.zeros((batch_size, num_hiddens), device=device),)


def rnn(inputs: Tensor, state: tuple[Tensor], params: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
    """The chapter's `rnn`, all steps in one call of the scan.

    Args:
        inputs: token ids (T, B), which `RNNModelScratch` gives to this function, or their one-hot rows (T, B, vocab).

    Returns:
        Logits (T*B, vocab) and the state.
    """
    W_xh, W_hh, b_h, W_hq, b_q = params
    output, h_n = scratch_rnn(inputs, state[0][None], W_xh, W_hh, b_h)
    # A copy, because the book's loop detaches the state in place, which a view refuses.
    return F.linear(output.flatten(0, 1), W_hq.t(), b_q), (h_n[0].clone(),)


class RNNModelScratch:
    """A recurrent network made of functions.

    `forward_fn(inputs, state, params)` gets one-hot rows (T, B, vocab) as in the chapter; our own `rnn` gets the ids.
    """

    def __init__(
        self,
        vocab_size: int,
        num_hiddens: int,
        device: torch.device,
        get_params: Callable[[int, int, torch.device], list[Tensor]],
        init_state: Callable[[int, int, torch.device], Any],
        forward_fn: Callable[[Tensor, Any, list[Tensor]], tuple[Tensor, Any]],
    ) -> None:
        self.vocab_size, self.num_hiddens = vocab_size, num_hiddens
        self.params = get_params(vocab_size, num_hiddens, device)
        self.init_state, self.forward_fn = init_state, forward_fn

    def __call__(self, X: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (T*B, vocab) for ids X (B, T), and the state."""
        inputs = X.t() if self.forward_fn is rnn else F.one_hot(X.t(), self.vocab_size).float()
        return self.forward_fn(inputs, state, self.params)

    def begin_state(self, batch_size: int, device: torch.device) -> Any:
        """The state before the first token."""
        return self.init_state(batch_size, self.num_hiddens, device)


class RNNModel(nn.Module):
    """A layer, rnnfast's or torch.nn's (RNN, LSTM or GRU), and a linear head."""

    def __init__(self, rnn_layer: nn.RNNBase, vocab_size: int) -> None:
        super().__init__()
        self.rnn, self.vocab_size = rnn_layer, vocab_size
        self.num_hiddens = rnn_layer.proj_size or rnn_layer.hidden_size  # what it puts out
        self.num_directions = 2 if rnn_layer.bidirectional else 1
        self.linear = nn.Linear(self.num_hiddens * self.num_directions, vocab_size)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (T*B, vocab) for ids (B, T), and the state."""
        X = inputs.t().long()
        if not is_ours(self.rnn):
            X = F.one_hot(X, self.vocab_size).to(self.linear.weight.dtype)  # only ours take the ids themselves
        Y, state = self.rnn(X, state)
        return self.linear(Y.flatten(0, 1)), state

    def begin_state(self, device: torch.device, batch_size: int = 1) -> Any:
        """Zeros: a tensor (layers * directions, batch_size, hidden), for an LSTM a pair of them."""
        size = self.num_directions * self.rnn.num_layers, batch_size
        state = torch.zeros(*size, self.num_hiddens, device=device)
        return (state, torch.zeros(*size, self.rnn.hidden_size, device=device)) if self.rnn.mode == "LSTM" else state


Net = RNNModel | RNNModelScratch | Any


# Prediction and training


def predict_ch8(prefix: str, num_preds: int, net: Net, vocab: Vocab, device: torch.device) -> str:
    """`prefix`, continued by the likeliest character, `num_preds` times.

    Raises:
        UserError: the prefix is empty.
    """
    if not prefix:
        raise UserError("the prefix is empty: give the text to continue")
    ids = [vocab[character] for character in prefix]
    inputs, state = torch.tensor([ids], device=device), net.begin_state(batch_size=1, device=device)
    with torch.no_grad():
        for _ in range(num_preds):
            Y, state = net(inputs, state)
            inputs = Y[-1].argmax().view(1, 1)
            ids.append(int(inputs))
    return "".join(vocab.to_tokens(ids))


def _parameters(net: Net) -> list[Tensor]:
    return [p for p in net.parameters() if p.requires_grad] if isinstance(net, nn.Module) else net.params


def grad_clipping(net: Net, theta: float) -> None:
    """Scale the gradient down to the norm `theta` if it exceeds it."""
    nn.utils.clip_grad_norm_(_parameters(net), theta)


def sgd(params: Iterable[Tensor], lr: float, batch_size: int) -> None:
    """One step of minibatch stochastic gradient descent; the gradients are zero afterwards."""
    with torch.no_grad():
        for param in params:
            if param.grad is not None:
                param -= lr * param.grad / batch_size
                param.grad.zero_()


def train_epoch_ch8(
    net: Net,
    train_iter: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    updater: torch.optim.Optimizer | Callable[..., Any],
    device: torch.device,
    use_random_iter: bool,
) -> tuple[float, float]:
    """Train for one epoch, the gradient clipped to norm 1.

    Args:
        updater: an optimizer, or a function that takes `batch_size` (1: the loss is a mean already).

    Returns:
        Perplexity, and tokens per second.
    """
    state, timer = None, Timer()
    total, num_tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for X, Y in train_iter:
        if state is None or use_random_iter:
            state = net.begin_state(batch_size=X.shape[0], device=device)
        else:
            state = detach(state)
        y_hat, state = net(X.to(device), state)
        l = loss(y_hat, Y.t().flatten().to(device).long()).mean()  # noqa: E741 - the chapter's name
        if isinstance(updater, torch.optim.Optimizer):
            updater.zero_grad()
            l.backward()
            grad_clipping(net, 1)
            updater.step()
        else:
            l.backward()
            grad_clipping(net, 1)
            updater(batch_size=1)
        total += l.detach() * Y.numel()
        num_tokens += Y.numel()
    return math.exp(total.item() / num_tokens), num_tokens / timer.stop()


def train_ch8(
    net: Net,
    train_iter: Iterable[tuple[Tensor, Tensor]],
    vocab: Vocab,
    lr: float,
    num_epochs: int,
    device: torch.device,
    use_random_iter: bool = False,
) -> None:
    """Train with SGD, printing a prediction every ten epochs, and perplexity and speed at the end."""
    updater = torch.optim.SGD(net.parameters(), lr) if isinstance(net, nn.Module) else partial(sgd, net.params, lr)
    perplexity = speed = math.nan
    for epoch in range(num_epochs):
        perplexity, speed = train_epoch_ch8(net, train_iter, nn.CrossEntropyLoss(), updater, device, use_random_iter)
        if (epoch + 1) % 10 == 0:
            text = predict_ch8("time traveller", 50, net, vocab, device)
            print(f"epoch {epoch + 1}, perplexity {perplexity:.1f}: {text}")
    print(f"perplexity {perplexity:.1f}, {speed:.1f} tokens/sec on {device}")
    print(predict_ch8("time traveller", 50, net, vocab, device))
    print(predict_ch8("traveller", 50, net, vocab, device))


# What the chapter's programs take from the rest of the book


def try_gpu(i: int = 0) -> torch.device:
    """GPU number `i` if there is one, else the CPU."""
    return torch.device(f"cuda:{i}" if torch.cuda.device_count() > i else "cpu")


class Timer:
    """Record times, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def stop(self) -> float:
        """Stop the clock and return what it shows."""
        self.times.append(time.perf_counter() - self.started)
        return self.times[-1]

    def sum(self) -> float:
        """All times."""
        return math.fsum(self.times)

    def avg(self) -> float:
        """The mean time."""
        return self.sum() / len(self.times)

    def cumsum(self) -> list[float]:
        """The sums of the first time, of the first two, and so on."""
        return list(accumulate(self.times))


class Accumulator:
    """Sums of `n` quantities."""

    def __init__(self, n: int) -> None:
        self.data = [0.0] * n

    def add(self, *args: float) -> None:
        """Add to each of them."""
        self.data = [a + float(b) for a, b in zip(self.data, args, strict=True)]

    def reset(self) -> None:
        """Start again at zero."""
        self.data = [0.0] * len(self.data)

    def __getitem__(self, index: int) -> float:
        return self.data[index]


class Animator:
    """Collects the points of curves, as the book's does; `save` draws them (needs rnnfast[plot]).

    Args:
        fmts: the curves' formats, in turn, as matplotlib's `plot` takes them.
        nrows, ncols: how many axes the figure has; the first has the curves.
    """

    def __init__(
        self,
        xlabel: str | None = None,
        ylabel: str | None = None,
        legend: Sequence[str] | None = None,
        xlim: Sequence[float] | None = None,
        ylim: Sequence[float] | None = None,
        xscale: str = "linear",
        yscale: str = "linear",
        fmts: Sequence[str] = ("-", "m--", "g-.", "r:"),
        nrows: int = 1,
        ncols: int = 1,
        figsize: tuple[float, float] = (3.5, 2.5),
    ) -> None:
        scales = {"xscale": xscale, "yscale": yscale}  # first, because a change of scale undoes limits
        self.settings: dict[str, Any] = scales | {"xlim": xlim, "ylim": ylim, "xlabel": xlabel, "ylabel": ylabel}
        self.legend, self.fmts = legend, fmts
        self.nrows, self.ncols, self.figsize = nrows, ncols, figsize
        self.X: list[list[float]] = []
        self.Y: list[list[float]] = []

    def add(self, x: Any, y: Any) -> None:
        """Add a point to each curve, at one `x` or at one for each; a curve whose number is None gets none."""
        xs, ys = _row(x), _row(y)
        while len(self.Y) < len(ys):
            self.X.append([])
            self.Y.append([])
        for X, Y, a, b in zip(self.X, self.Y, xs * len(ys) if len(xs) == 1 else xs, ys, strict=False):
            if a is not None and b is not None:
                X.append(float(a))
                Y.append(float(b))

    def save(self, path: str) -> None:
        """Draw the curves into an image file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.figsize, layout="constrained")
        axes = figure.subplots(self.nrows, self.ncols, squeeze=False)[0, 0]
        for X, Y, fmt in zip(self.X, self.Y, cycle(self.fmts), strict=False):
            axes.plot(X, Y, fmt)
        axes.set(**self.settings)
        if self.legend:
            axes.legend(self.legend)
        axes.grid()
        figure.savefig(path)


def _row(numbers: Any) -> list[Any]:
    """Numbers as a list, and a number alone as a list of it; either may be a tensor."""
    return [*numbers] if isinstance(numbers, Sequence) or getattr(numbers, "ndim", None) else [numbers]
