"""Generation: greedy, sampled, and what it refuses."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from rnnfast.lm import RNNLM, UserError, Vocab, encode_prefix, generate, render
from rnnfast.lm.generate import pick


@pytest.fixture
def model() -> RNNLM:
    torch.manual_seed(0)
    return RNNLM(28, "lstm", 16)


def test_greedy_is_the_argmax_of_the_whole_text(model: RNNLM) -> None:
    ids = list(generate(model, [3, 1, 4], 12))
    assert len(ids) == 12
    text = [3, 1, 4]
    for index in ids:
        logits, _ = model(torch.tensor(text).view(-1, 1))
        assert index == logits[-1, 0].argmax()
        text.append(index)


def test_a_seed_reproduces_and_leaves_the_global_state_alone(model: RNNLM) -> None:
    before = torch.get_rng_state()
    first = list(generate(model, [1], 40, temperature=1.5, seed=3))
    assert first == list(generate(model, [1], 40, temperature=1.5, seed=3))
    assert first != list(generate(model, [1], 40, temperature=1.5, seed=4))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_it_streams(model: RNNLM) -> None:
    stream = generate(model, [1], 10**9)
    assert len([next(stream) for _ in range(5)]) == 5


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_between_two_tokens_the_model_is_in_its_own_mode(backend: str) -> None:
    model = RNNLM(28, "lstm", 16, dropout=0.5, backend=backend)
    expected = list(generate(model.eval(), [1], 3))
    for training in (True, False):
        model.train(training)
        first, second = generate(model, [1], 3), generate(model, [1], 3)
        for token in expected:  # without dropout, in either mode
            assert next(first) == token
            assert model.training == training
            assert next(second) == token
            assert model.training == training


def test_threads_keep_the_evaluation_mode_of_one_another() -> None:
    modes: list[bool] = []

    class Slow(RNNLM):
        def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            time.sleep(0.001)  # the others run now
            modes.append(any(module.training for module in self.modules()))
            return super().forward(ids, state)

    model = Slow(28, "lstm", 16, dropout=0.5)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: list(generate(model, [1], 20)), range(4)))
    assert not any(modes)
    assert all(text == texts[0] for text in texts)
    assert all(module.training for module in model.modules())


LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()


def draws(**options: object) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    return {int(pick(LOGITS, **settings, generator=generator)) for _ in range(200)}  # type: ignore[arg-type]


def test_what_is_drawn_from() -> None:
    assert draws() == {0, 1, 2, 3}
    assert draws(temperature=0.0) == {0}
    assert draws(top_k=2) == {0, 2}
    assert draws(top_k=9) == {0, 1, 2, 3}
    assert draws(top_p=0.5) == {0}
    assert draws(top_p=0.51) == {0, 2}
    assert draws(top_p=1e-9) == {0}
    assert draws(top_p=1.0) == {0, 1, 2, 3}
    assert draws(temperature=1e-30) == {0}


def test_temperature_scales_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[pick(LOGITS, 0.5, None, None, generator)] += 1
    expected = (LOGITS / 0.5).softmax(0)
    torch.testing.assert_close(counts / 4000, expected, atol=0.03, rtol=0)  # 4 standard deviations


def test_a_part_that_was_in_evaluation_mode_stays_so() -> None:
    model = RNNLM(28, "gru", 8, backend="reference").train()
    model.rnn.eval()  # as where its dropout is frozen
    list(generate(model, [1, 2], 4))
    assert [model.training, model.rnn.training, model.head.training] == [True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top-k"),
        ({"temperature": 1.0, "top_k": 2.5}, "top-k must be a whole number of at least 1, not 2.5"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p"),
        ({"temperature": 1.0, "top_p": 1.5}, "top-p"),
        ({"top_k": 3}, "--temperature 1"),
        ({"length": -1}, "length"),
        ({"temperature": 1.0, "seed": -1}, "seed"),
        ({"temperature": 1.0, "seed": 2**63}, "seed"),
        ({"prefix": []}, "prefix is empty"),
    ],
)
def test_bad_options_are_refused_before_the_first_token(model: RNNLM, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, **({"prefix": [1], "length": 5} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("prefix", "message"), [("abc", "encode_prefix"), (torch.tensor([1, 2]), "tolist")])
def test_a_prefix_is_a_list_of_ids(model: RNNLM, prefix: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"a list of token ids, not a {type(prefix).__name__}: .*{message}"):
        generate(model, prefix, 5)


def test_bidirectional_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="backward direction"):
        generate(RNNLM(28, "rnn", 8, bidirectional=True), [1], 5)


def test_prefix_and_rendering(capsys: pytest.CaptureFixture[str]) -> None:
    vocab = Vocab("abc")
    assert encode_prefix("axbyx", vocab) == [1, 0, 2, 0, 0]
    assert capsys.readouterr().err == "rnnfast: the vocabulary lacks 'x', 'y' of the prefix: replaced by <unk>\n"
    with pytest.raises(UserError, match="empty"):
        encode_prefix("", vocab)
    words = Vocab(["the", "time"])
    assert encode_prefix("the  time", words, "word") == [1, 2]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="empty"):
        encode_prefix("  ", words, "word")
    assert "".join(render(iter([1, 2]), vocab)) == "ab"
    assert "the" + "".join(render(iter([2, 1]), words, "word")) == "the time the"
