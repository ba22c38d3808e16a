"""Layers, forward only."""

from collections.abc import Callable

from rnnfast.bench.layers import FORWARD


def test_forward(run: Callable[[str], None]) -> None:
    run(FORWARD)
