"""Lengths and resets, any of them: against each stretch of a sequence between resets, run on its own."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from torch import Tensor

from tests.parity import parts
from tests.test_sequences import BATCH, HIDDEN, INPUTS, LAYERS, STEPS, like, make, state_of


def stretches(layer: Any, input: Tensor, hx: Any, lengths: list[int], reset: Tensor, reset_to: Any) -> Any:
    """Each stretch between resets on its own; a backward direction enters by the last one and leaves by the first."""
    directions = 2 if layer.bidirectional else 1
    output = torch.zeros(STEPS, BATCH, directions * (layer.proj_size or HIDDEN), dtype=input.dtype)
    final = like(hx, [part.clone() for part in parts(hx)])
    for column in range(BATCH):
        one = slice(column, column + 1)
        stops = [t for t in range(1, lengths[column]) if reset[t, column]] + [lengths[column]] * (lengths[column] > 0)
        start = 0
        for stop in stops:
            enters = [[start == 0 and not reset[0, column]], [stop == lengths[column]]][:directions]
            leaves = [[stop == lengths[column]], [start == 0]][:directions]
            state = []
            for own, to in zip(parts(hx), parts(reset_to), strict=True):
                mask = torch.tensor(enters * layer.num_layers)[..., None]
                state.append(torch.where(mask, own[:, one], to[:, one]))
            out, ends = layer(input[start:stop, one], like(hx, state))
            output[start:stop, one] = out
            mask = torch.tensor(leaves * layer.num_layers)[..., None]
            for whole, end in zip(parts(final), parts(ends), strict=True):
                whole[:, one] = torch.where(mask, end, whole[:, one])
            start = stop
    return output, final


@hypothesis.given(
    name=st.sampled_from(LAYERS),
    lengths=st.lists(st.integers(0, STEPS), min_size=BATCH, max_size=BATCH),
    resets=st.lists(st.booleans(), min_size=STEPS * BATCH, max_size=STEPS * BATCH),
    num_layers=st.integers(1, 2),
    bidirectional=st.booleans(),
)
@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
def test_lengths_and_resets_cut_a_batch_into_stretches(
    name: str, lengths: list[int], resets: list[bool], num_layers: int, bidirectional: bool
) -> None:
    layer = make(name, num_layers=num_layers, bidirectional=bidirectional, backend="cpu")
    input, hx, reset_to = torch.randn(STEPS, BATCH, INPUTS), state_of(layer), state_of(layer)
    reset = torch.tensor(resets).view(STEPS, BATCH)
    with torch.no_grad():
        expected = stretches(layer, input, hx, lengths, reset, reset_to)
        actual = layer(input, hx, lengths=lengths, reset=reset, reset_to=reset_to)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
