"""The native loop of generation against the loop in Python."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn

from rnnfast import dispatch
from rnnfast.backends import cpu
from rnnfast.errors import UserError
from rnnfast.lm import RNNLM, RNNLMScratch, generate, operators
from rnnfast.lm.generate import CHUNK, native_parts

if cpu.why_not() is not None:
    pytest.skip(f"no cpu backend: {cpu.why_not()}", allow_module_level=True)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: RNNLM(28, "rnn", 64),
    "rnn_relu": lambda: RNNLM(28, "rnn_relu", 33),
    "lstm": lambda: RNNLM(28, "lstm", 48),
    "gru": lambda: RNNLM(28, "gru", 21),
    "one unit": lambda: RNNLM(3, "gru", 1),
    "three layers": lambda: RNNLM(28, "lstm", 24, 3, dropout=0.5),
    "embedding": lambda: RNNLM(28, "gru", 24, 2, embedding_size=10, dropout=0.2),
    "tied": lambda: RNNLM(301, "lstm", 24, embedding_size=24, tie_weights=True),
    "scratch": lambda: RNNLMScratch(28, 40),
    "float64": lambda: RNNLM(28, "lstm", 20, 2).double(),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 9, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 10**30},
]


class Wrapped(nn.Module):
    """A model that the native loop does not know, and so is called for every token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, state: Any = None) -> Any:
        return self.model(ids, state)


def varied(name: str) -> nn.Module:
    """A model whose texts vary: large parameters, and recurrent weights that neither forget nor blow up."""
    torch.manual_seed(len(name))
    model = MODELS[name]()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            scale = 1.3 * len(parameter) ** -0.5 if "hh" in label else 1.0
            parameter.copy_(torch.randn_like(parameter) * scale)
    return model


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_text_as_the_python_loop(name: str, settings: dict[str, Any]) -> None:
    model = varied(name)
    assert native_parts(model) is not None
    written = set()
    for seed in range(3):
        for prefix in ([seed], [2, 1, 2]):
            expected = list(generate(Wrapped(model), prefix, 2 * CHUNK + 9, **settings, seed=seed))
            assert list(generate(model, prefix, 2 * CHUNK + 9, **settings, seed=seed)) == expected
            written |= set(expected)
    assert len(written) >= (1 if name == "one unit" else 3)


def test_a_nucleus_that_reaches_top_p_exactly() -> None:
    """Of four tokens as likely as each other, the first two have a probability of 0.5 together."""
    model = RNNLM(4, "rnn", 8)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    written = list(generate(model, [1], 50, temperature=1.0, top_p=0.5))
    assert set(written) == {0, 1}
    assert written == list(generate(Wrapped(model), [1], 50, temperature=1.0, top_p=0.5))


def test_draws_at_the_edges_of_tokens() -> None:
    model = RNNLM(4, "rnn", 8)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)

    def drawn(draws: list[float], **settings: Any) -> list[int]:
        parts = native_parts(model)
        assert parts is not None
        uniforms = torch.tensor(draws, dtype=torch.float64)
        return operators.generate(*parts, 1, len(draws), uniforms, **settings)[0].tolist()

    assert drawn([1e-9, 0.25, 0.26, 0.5, 0.75, 1.0]) == [0, 0, 1, 1, 2, 3]
    assert drawn([2.0]) == [3]  # no draw, and still a token
    with torch.no_grad():
        model.head.bias[1] = -1
    assert drawn([0.35]) == [1]
    assert drawn([0.35], top_k=3) == [2]  # all but the least likely


@pytest.mark.parametrize("length", [0, 1, 2, CHUNK, CHUNK + 1, CHUNK + 2])
def test_lengths_around_a_chunk(length: int) -> None:
    model = varied("lstm")
    whole = list(generate(model, [1], 3 * CHUNK, temperature=1.0))
    assert list(generate(model, [1], length, temperature=1.0)) == whole[:length]
    assert list(islice(generate(model, [1], 10**9, temperature=1.0), length)) == whole[:length]
    assert model.training


def test_states_and_ids_go_on_from_call_to_call() -> None:
    parts = native_parts(varied("three layers"))
    assert parts is not None
    whole, *states = operators.generate(*parts, 1, 20)
    first, h, c = operators.generate(*parts, 1, 7)
    rest, h, c = operators.generate(*parts._replace(h_0=h, c_0=c), int(first[-1]), 13)
    assert torch.equal(torch.cat([first, rest]), whole)
    assert torch.equal(h, states[0])
    assert torch.equal(c, states[1])


def test_the_states_are_the_bits_of_the_layers() -> None:
    model = varied("three layers")
    parts = native_parts(model)
    assert isinstance(model, RNNLM)
    assert parts is not None
    ids, h, c = operators.generate(*parts, 1, 20)
    with torch.no_grad():
        _, (h_n, c_n) = model.rnn.eval()(torch.cat([torch.tensor([1]), ids[:-1]]).view(-1, 1))
    assert torch.equal(h, h_n)
    assert torch.equal(c, c_n)


def test_what_the_python_loop_keeps() -> None:
    model = varied("gru")
    with torch.autocast("cpu", torch.bfloat16):
        assert native_parts(model) is None
    with dispatch.use_backend("reference"):
        assert native_parts(model) is None
    assert native_parts(RNNLM(28, "gru", 8, backend="reference")) is None
    assert native_parts(RNNLM(28, "gru", 8).bfloat16()) is None
    assert native_parts(RNNLM(28, "gru", 8, backend="cpu").to("meta")) is None
    assert native_parts(Wrapped(model)) is None
    assert len(list(generate(RNNLM(28, "gru", 8).bfloat16(), [1], 9, temperature=1.0))) == 9


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
@pytest.mark.parametrize("name", ["three layers", "embedding"])
def test_the_default_device_is_not_the_models(name: str, settings: dict[str, Any]) -> None:
    model = varied(name)
    written = list(generate(model, [1, 2], 9, **settings))
    with torch.device("meta"):
        assert list(generate(model, [1, 2], 9, **settings)) == written
        assert list(generate(Wrapped(model), [1, 2], 9, **settings)) == written


def test_weights_that_have_changed_are_seen_by_the_next_text() -> None:
    model = varied("rnn")
    before = list(generate(model, [1], 30))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    after = list(generate(model, [1], 30))
    assert after != before
    assert after == list(generate(Wrapped(model), [1], 30))


def test_logits_that_are_not_numbers() -> None:
    model = varied("rnn")
    assert isinstance(model, RNNLM)
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    parts = native_parts(model)
    assert parts is not None
    for draws in (None, torch.ones(5, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="not finite: there is nothing to draw a token from"):
            operators.generate(*parts, 1, 5, draws)
    for either in (model, Wrapped(model)):
        for temperature in (0.0, 1.0):
            with pytest.raises(UserError, match="not finite, there is nothing to draw from"):
                list(generate(either, [1], 5, temperature=temperature))


@pytest.mark.parametrize("name", ["gru", "embedding"])
def test_a_prefix_outside_the_vocabulary(name: str) -> None:
    for prefix in ([28], [1, 28], [28, 1], [-1]):
        with pytest.raises(IndexError, match=rf"in \[0, 28\), got {28 if 28 in prefix else -1}"):
            next(generate(varied(name), prefix, 3))
    with pytest.raises(TypeError, match="integer"):
        generate(varied(name), [1, 1.5], 3)  # type: ignore[list-item]


def test_parts_that_do_not_fit() -> None:
    parts = native_parts(varied("three layers"))
    assert parts is not None
    h = parts.h_0
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        operators.generate(*parts, 28, 5)
    with pytest.raises(RuntimeError, match="does not fit"):
        operators.generate(*parts._replace(c_0=None), 1, 5)
    with pytest.raises(RuntimeError, match="does not fit"):
        operators.generate(parts.packed[1:], torch.zeros(28, 9), *parts[2:4], h[1:], h[1:], 1, 5)
    with pytest.raises(RuntimeError, match="scan_cpu_pack"):
        operators.generate([torch.zeros(1000, dtype=torch.uint8)], *parts[1:], 1, 5)
    with pytest.raises(RuntimeError, match="a draw for each token, must be contiguous float64"):
        operators.generate(*parts, 1, 5, torch.ones(4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="top_k must be positive"):
        operators.generate(*parts, 1, 5, torch.ones(5, dtype=torch.float64), top_k=0)
    with pytest.raises(RuntimeError, match="head_bias must be"):
        operators.generate(parts.packed, parts.embedding, parts.head_weight, torch.zeros(5), h, h, 1, 5)
