"""Layers, forward and backward."""

from collections.abc import Callable

from rnnfast.bench.layers import BOTH


def test_forward_backward(run: Callable[[str], None]) -> None:
    run(BOTH)
