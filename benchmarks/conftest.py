"""What the pytest-benchmark files share: the cases, and the comparison in front of every timing.

pytest benchmarks --benchmark-enable
"""

from collections.abc import Callable
from typing import Any

import pytest

from rnnfast.bench.layers import LayerCase, check_parity, contestants, set_up
from rnnfast.bench.report import OURS, TORCH

SHAPES = [(cell, hidden, batch) for cell in ("rnn", "lstm", "gru") for hidden in (64, 256, 512) for batch in (1, 32)]


@pytest.fixture(params=SHAPES, ids=lambda shape: "{}-H{}-B{}".format(*shape))
def shape(request: pytest.FixtureRequest) -> Any:
    """Cell, hidden size and batch; there are 35 steps."""
    return request.param


@pytest.fixture(params=[OURS, TORCH])
def run(benchmark: Any, shape: Any, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Times one direction of ours and of torch.nn's, which stand side by side in the table of their cell."""

    def run(direction: str) -> None:
        cell, hidden, batch = shape
        case = LayerCase(cell, hidden, batch, steps=35, direction=direction)
        both = contestants(set_up(case))
        check_parity(case, both)
        benchmark.group = f"{cell} {direction}"
        benchmark(both[request.param].call)

    return run
