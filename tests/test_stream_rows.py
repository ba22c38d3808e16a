"""Rows of a stream's batch: which begin anew, and from what, which stay, and how far each goes in a chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnnfast
from tests.test_stream import BATCH, STEPS, Tagger


def test_rows_begin_anew_while_others_go_on() -> None:
    layer, input = rnnfast.LSTM(5, 8, num_layers=2, backend="cpu"), torch.randn(STEPS, BATCH, 5)
    reset = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    reset[4, 1] = reset[7, 0] = reset[7, 2] = True
    expected, final = layer(input, reset=reset)
    stream = rnnfast.Stream(layer)
    outputs = []
    with torch.inference_mode():
        for x, mask in zip(input, reset, strict=True):
            if mask.any():
                stream.reset(mask if mask[1] else mask.nonzero().flatten().tolist())
            outputs.append(stream(x))
    torch.testing.assert_close((torch.stack(outputs), stream.state), (expected, final), rtol=0, atol=0)


def test_rows_to_reset_as_a_list() -> None:
    stream = rnnfast.Stream(rnnfast.GRU(5, 8))
    for rows, cleared in (
        ([1], [False, True]),
        ([-1, 0], [True, True]),
        ([True, False], [True, False]),
        (range(1), [True, False]),
        (1, [False, True]),
        ([], [False, False]),
    ):
        stream.reset()
        stream(torch.ones(2, 5))
        stream.reset(rows)  # type: ignore[arg-type]  # one index as it is will do, too
        assert (stream.state == 0).all(2)[0].tolist() == cleared
    with pytest.raises(TypeError, match="rows are integer indices or a bool mask"):
        stream.reset([1.0, 0.0])  # type: ignore[list-item]  # a mask of floats, which indices 1 and 0 are not
    state = stream.state
    for rows, got in (([5], r"\[5\]"), ([-3], r"\[-3\]"), (2, "2"), ([True] * 3, r"a mask \(3,\)")):
        with pytest.raises(IndexError, match=rf"rows are indices below 2, .* a bool mask \(2,\), got {got}"):
            stream.reset(rows)  # type: ignore[arg-type]
    assert stream.state is state


def test_a_models_rows_begin_from_the_state_it_gives() -> None:
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    stream, fresh = rnnfast.Stream(model), rnnfast.Stream(model)
    with torch.no_grad():
        stream(ids)
        stream.reset([1])
        outputs = stream(ids)
        torch.testing.assert_close(outputs[1], fresh(ids)[1])
        stream.reset()
        torch.testing.assert_close(stream(ids[:2]), model(ids[:2]), rtol=0, atol=0)


def test_a_models_state_continues_in_another_stream() -> None:
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    stream, other = rnnfast.Stream(model), rnnfast.Stream(model)
    with torch.no_grad():
        stream(ids)
        other.state = stream.state
        torch.testing.assert_close(other(ids), stream(ids), rtol=0, atol=0)
        stream.reset([1])
        other.reset([1])  # to the state that the model gives it, which the other stream has seen, too
        torch.testing.assert_close(other(ids), stream(ids), rtol=0, atol=0)


class Speaker(nn.Module):
    """Layers over B rows, which begin from what the model gives, and over B F rows of F frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Linear(2, 6)
        self.frames, self.bands = rnnfast.GRU(4, 6), rnnfast.LSTM(1, 5)

    def forward(self, input: Tensor, who: Tensor) -> Tensor:  # (T, B, F), (B, 2)
        output, _ = self.frames(input, self.begin(who).tanh()[None])
        above, _ = self.bands(input.flatten(1)[..., None])
        return torch.cat((output, above.unflatten(1, input.shape[1:]).flatten(2)), 2)


def test_rows_of_layers_with_different_batches() -> None:
    model, input, who = Speaker(), torch.randn(STEPS, 3, 4), torch.randn(3, 2)
    stream = rnnfast.Stream(model)
    with torch.no_grad():
        stream(input, who)
        with pytest.raises(RuntimeError, match=r"batches differ \('frames' 3, 'bands' 12\): give rows in a dict"):
            stream.reset([1])
        stream.reset({"frames": [1], "bands": range(4, 8)})
        other = torch.randn(3, 2)  # somebody else
        output, going_on = stream(input, other), rnnfast.Stream(model)
        torch.testing.assert_close(output[:, 1], model(input, other)[:, 1])
        going_on(input, who)
        torch.testing.assert_close(output[:, ::2], going_on(input, who)[:, ::2])
        with pytest.raises(RuntimeError, match="rows to select are those of all layers: bands is missing"):
            stream.select({"frames": [0]})
        stream.select({"frames": [2, None], "bands": [*range(8, 12), *[None] * 4]})
        chosen = torch.stack((other[2], who[0]))
        output = stream(input[:, [2, 0]], chosen)
        torch.testing.assert_close(output[:, 0], going_on(input, who)[:, 2])
        torch.testing.assert_close(output[:, 1], model(input[:, [2, 0]], chosen)[:, 1])


def test_rows_reset_one_after_the_other_begin_anew_once() -> None:
    model, input, who = Speaker(), torch.randn(STEPS, 3, 4), torch.randn(3, 2)
    stream, other = rnnfast.Stream(model), rnnfast.Stream(model)
    with torch.no_grad():
        stream(input, who)
        stream.reset({"frames": [0], "bands": range(4)})
        stream.reset({"frames": [2], "bands": range(8, 12)})
        for _ in range(2):  # from what the model gives, and on from there
            torch.testing.assert_close(stream(input, who)[:, ::2], other(input, who)[:, ::2])


def test_rows_begin_anew_in_training() -> None:
    """From a beginning that is learned, chunk after chunk, with and without inference mode between."""
    model, input, who = Speaker(), torch.randn(STEPS, 3, 4), torch.randn(3, 2)
    stream = rnnfast.Stream(model)
    for number in range(3):
        with torch.inference_mode(number == 1):
            output = stream(input, who)
        if number != 1:
            model.zero_grad()
            output[:, 1].sum().backward()
            assert model.begin.weight.grad is not None
            assert model.begin.weight.grad.any()
        stream.detach()
        with torch.inference_mode(number == 0):
            stream.reset({"frames": [1], "bands": range(4, 8)})


@pytest.mark.parametrize("kind", ["LSTM", "Stack", "model"])
def test_rows_are_selected(kind: str) -> None:
    layer: Any = rnnfast.GRU(5, 6) if kind != "Stack" else rnnfast.Stack("lstm", 5, [6, 4])
    layer = rnnfast.LSTM(5, 6, num_layers=2) if kind == "LSTM" else layer
    model = nn.Sequential(layer) if kind == "model" else layer
    input, stream = torch.randn(4, STEPS, 3, 5), rnnfast.Stream(model)

    def of(output: Any) -> Tensor:
        result: Tensor = output[0] if kind == "model" else output
        return result

    with torch.no_grad():
        stream(input[0])
        stream.select([2, 0, 0])
        beams = of(stream(input[1][:, [2, 0, 0]]))
        expected, _ = layer(torch.cat((input[0], input[1])))
        torch.testing.assert_close(beams, expected[STEPS:][:, [2, 0, 0]], rtol=0, atol=0)
        stream.select(torch.tensor([True, True, False]))
        stream.select([None, 1])
        joined = of(stream(input[2][:, :2]))
        torch.testing.assert_close(joined[:, 0], layer(input[2][:, :1])[0][:, 0], rtol=0, atol=0)
        expected, _ = layer(torch.cat((input[0][:, :1], input[1][:, :1], input[2][:, 1:2])))
        torch.testing.assert_close(joined[:, 1], expected[2 * STEPS :, 0], rtol=0, atol=0)
        with pytest.raises(IndexError, match="rows are indices below 2"):
            stream.select([2, None])
        with pytest.raises(TypeError, match="rows are integer indices"):
            stream.select([0.5])  # type: ignore[list-item]


@pytest.mark.parametrize("kept", [[0, 2], [2, 0, 2], [-1], []])
@pytest.mark.parametrize("make", [torch.tensor, list, tuple, np.array])
def test_rows_are_selected_by_indices_of_any_kind(kept: list[int], make: Any) -> None:
    stream = rnnfast.Stream(rnnfast.GRU(5, 6))
    stream(torch.randn(3, 5))
    before = stream.state
    stream.select(make(kept))
    assert torch.equal(stream.state, before[:, kept])


@pytest.mark.parametrize(
    "make", [torch.tensor, list, tuple, np.array, lambda mask: [*torch.tensor(mask)], lambda mask: [*np.array(mask)]]
)
def test_rows_are_selected_by_masks_of_any_kind(make: Any) -> None:
    stream = rnnfast.Stream(rnnfast.GRU(5, 6))
    stream(torch.randn(3, 5))
    before = stream.state
    stream.select(make([True, False, True]))
    assert torch.equal(stream.state, before[:, [0, 2]])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.tensor([1, 0, 1], dtype=torch.uint8), TypeError, "of a mask make rows.bool"),
        ((row for row in [0, 2]), TypeError, "got generator: make a list of it"),
        (torch.tensor([[0, 2]]), IndexError, r"have one dimension, got \(1, 2\)"),
        (torch.tensor(1), IndexError, r"have one dimension, got \(\)"),
        ([True, None, False], TypeError, "a mask adds no rows"),
        ("layer", TypeError, "rows are integer indices or a bool mask, got"),
        (1, TypeError, r"a list of indices or a mask, got 1: give \[1\]"),
        ([True, False], IndexError, r"a bool mask \(3,\), got a mask \(2,\)"),
    ],
)
def test_rows_that_select_nothing_clear_are_refused(rows: Any, error: type[Exception], message: str) -> None:
    stream = rnnfast.Stream(rnnfast.GRU(5, 6))
    stream(torch.randn(3, 5))
    before = stream.state
    with pytest.raises(error, match=message):
        stream.select(rows)
    assert stream.state is before


@pytest.mark.parametrize("make", [lambda: rnnfast.LSTM(5, 6), lambda: rnnfast.Stack("gru", 5, [6])])
def test_sequences_may_wait_or_begin_within_a_chunk(make: Any) -> None:
    layer, input = make(), torch.randn(8, 3, 5)
    stream, lengths = rnnfast.Stream(layer), [[4, 0, 3], [2, 4, 0]]
    with torch.no_grad():
        first, second = (stream(chunk, lengths=n) for chunk, n in zip(input.split(4), lengths, strict=True))
        rows = [torch.cat((input[: lengths[0][b], b], input[4 : 4 + lengths[1][b], b])) for b in range(3)]
        for b, row in enumerate(rows):
            expected, _ = layer(row[:, None])
            found = torch.cat((first[: lengths[0][b], b], second[: lengths[1][b], b]))
            torch.testing.assert_close(found, expected[:, 0], rtol=0, atol=0)
        reset = torch.zeros(4, 3, dtype=torch.bool)
        reset[2, 1] = True
        found = stream(input[:4], reset=reset)
        torch.testing.assert_close(found[2:, 1], layer(input[2:4, 1:2])[0][:, 0], rtol=0, atol=0)


def test_a_models_rows_begin_anew_under_autocast() -> None:
    """The state that the model gives is of its parameters' type, those that follow are autocast's."""
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    stream = rnnfast.Stream(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = stream(ids)
        stream.reset([1])
        again = stream(ids)
    torch.testing.assert_close(again[1], first[1])
    assert not torch.equal(again[0], first[0])


@pytest.mark.parametrize("what", ["reset", "state"])
def test_rows_that_were_to_begin_anew_are_forgotten_with_their_state(what: str) -> None:
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    stream, other = rnnfast.Stream(model), rnnfast.Stream(model)
    with torch.no_grad():
        stream(ids)
        other(ids)
        stream.reset([1])
        if what == "reset":
            stream.reset()
            torch.testing.assert_close(stream(ids[:2]), model(ids[:2]), rtol=0, atol=0)  # a batch without such a row
        else:
            stream.state = other.state
            torch.testing.assert_close(stream(ids), other(ids), rtol=0, atol=0)


def test_a_state_that_is_set_has_a_beginning_of_its_own() -> None:
    model, ids = Tagger(), torch.randint(7, (BATCH, STEPS))
    stream, other = rnnfast.Stream(model), rnnfast.Stream(model)
    with torch.no_grad():
        stream(ids)
        other(ids[:2])
        stream.reset()
        stream.state = other.state  # of another batch than that before
        stream(ids[:2])
        stream.reset(torch.tensor([True, False]))
        torch.testing.assert_close(stream(ids[:2])[:1], model(ids[:1]))


def test_the_default_device_does_not_matter() -> None:
    stream, other = (rnnfast.Stream(rnnfast.GRU(5, 6)) for _ in range(2))
    other.module.load_state_dict(stream.module.state_dict())
    for each, device in ((stream, "cpu"), (other, "meta")):
        each(torch.ones(3, 5))
        with torch.device(device):
            each.reset([0])
            each.select([2, None, 0])
            each.reset([True, False, False])
    torch.testing.assert_close(other.state, stream.state, rtol=0, atol=0)


def test_a_state_of_another_form_is_refused_when_it_is_set() -> None:
    stream = rnnfast.Stream(rnnfast.LSTM(5, 6))
    stream(torch.ones(3, 5))
    before = stream.state
    for state in (torch.zeros(1, 3, 6), "x", [1], {"h": before[0]}):
        with pytest.raises(RuntimeError, match="the state of an LSTM is a pair of tensors"):
            stream.state = state
    assert stream.state is before
