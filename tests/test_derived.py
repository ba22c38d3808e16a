"""Classes derived from rnnfast's layers, with methods of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnfast
from tests.parity import parts


class NormalizedLSTM(rnnfast.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        output, state = super().forward(input, hx)
        return nn.functional.layer_norm(output, output.shape[-1:]), state


class ScaledGRU(rnnfast.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        return super().forward(3 * input, hx)


class ResidualStack(rnnfast.Stack):
    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        output, state = super().forward(input, hx)
        return output + input, state


@pytest.mark.parametrize(
    "make",
    [
        lambda: NormalizedLSTM(4, 6),
        lambda: ScaledGRU(4, 6, num_layers=2, batch_first=True),
        lambda: ResidualStack("gru", 4, (6, 4)),
    ],
    ids=["output", "input", "stack"],
)
def test_a_stream_calls_their_forward_for_a_step_too(make: Any) -> None:
    layer, input = make().eval(), torch.randn(7, 2, 4)
    turned = getattr(layer, "batch_first", False)
    stream = rnnfast.Stream(layer)
    with torch.no_grad():
        expected, final = layer(input.transpose(0, 1) if turned else input)
        expected = expected.transpose(0, 1) if turned else expected
        steps = [stream(step) for step in input[:5]]
        rest = stream(input[5:].transpose(0, 1) if turned else input[5:])
    found = torch.cat([torch.stack(steps), rest.transpose(0, 1) if turned else rest])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(stream.state, final)


def test_a_stream_calls_their_step_where_they_have_one() -> None:
    class Negative(NormalizedLSTM):
        def step(self, input: Tensor, hx: Any = None) -> Any:
            output, state = super().step(input, hx)
            return -output, state

    layer, input = Negative(4, 6), torch.randn(5, 2, 4)
    plain = rnnfast.LSTM(4, 6)
    plain.load_state_dict(layer.state_dict())
    stream = rnnfast.Stream(layer)
    with torch.no_grad():
        steps = [stream(step) for step in input]
        torch.testing.assert_close(-torch.stack(steps), plain(input)[0])


def test_an_accelerated_layer_with_another_forward_has_no_stream() -> None:
    layer: Any = nn.LSTM(4, 6)
    rnnfast.accelerate(layer)
    rnnfast.Stream(layer)
    layer.forward = lambda input, hx=None: (input, hx)
    with pytest.raises(TypeError, match="its forward has been replaced since"):
        rnnfast.Stream(layer)


def test_a_forward_without_hx_has_no_stream() -> None:
    class Renamed(rnnfast.GRU):
        def forward(self, input: Any, state: Any = None) -> Any:  # type: ignore[override]
            return super().forward(input, state)

    with pytest.raises(RuntimeError, match=r"this Renamed takes no hx.*parameters are input, state"):
        rnnfast.Stream(Renamed(3, 4))
    with pytest.raises(RuntimeError, match=r"layer '0' \(Renamed\) takes no hx"):
        rnnfast.Stream(nn.Sequential(Renamed(3, 4)))


def test_an_interrupt_in_a_property_is_not_swallowed() -> None:
    """Which direct calls ask; there it would only have told that something is not as it was."""

    class Slow(rnnfast.LSTM):
        @property
        def backend(self) -> str:  # type: ignore[override]
            if interrupting:
                raise KeyboardInterrupt
            return "auto"

        @backend.setter
        def backend(self, value: str) -> None:
            pass

    interrupting = False
    layer, input = Slow(4, 4), torch.randn(1, 2, 4)
    with torch.no_grad():
        for _ in range(3):
            layer(input)
        interrupting = True
        with pytest.raises(KeyboardInterrupt):
            layer(input)
        interrupting = False
        assert all(part.isfinite().all() for part in parts(layer(input)[1]))
