"""The clockwork of the benchmarks: turns, quartiles, comparisons."""

from dataclasses import replace

import pytest
import torch

from rnnfast.backends import cpu
from rnnfast.bench import measure
from rnnfast.bench.measure import (
    Disagreement,
    Work,
    alternate,
    alternate_with_limits,
    check_same,
    fma_peak,
    relative_error,
    sample,
)


def test_sample_is_median_and_quartiles() -> None:
    assert sample([5.0, 1.0, 2.0, 4.0, 3.0], calls=7) == (3.0, 2.0, 4.0, 5, 7)
    assert sample([2.0]) == (2.0, 2.0, 2.0, 1, 1)
    assert sample([1.0, 2.0, 3.0]).spread == pytest.approx(0.25)


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def contestant(name: str) -> measure.Turn:
        def turn(calls: int) -> float:
            order.append(name)
            return calls * {"a": 0.01, "b": 0.02}[name]

        return turn

    samples = alternate({"a": contestant("a"), "b": contestant("b")}, seconds=0.0)
    assert samples["a"].median == pytest.approx(0.01)
    assert samples["b"].median == pytest.approx(0.02)
    assert samples["a"].turns == measure.MIN_TURNS
    assert "".join(order).endswith("ab" * measure.MIN_TURNS)


def test_short_work_is_repeated_within_a_turn() -> None:
    calls_of_turns: list[int] = []

    def turn(calls: int) -> float:
        calls_of_turns.append(calls)
        return calls * 1e-5

    result = alternate({"short": turn}, seconds=0.0)["short"]
    assert calls_of_turns[-1] * 1e-5 >= measure.TURN_SECONDS
    assert result.calls == calls_of_turns[-1]
    assert result.median == pytest.approx(1e-5)


def test_relative_error_is_rms_over_rms() -> None:
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
    assert relative_error(torch.tensor([2.0]), torch.tensor([0.0])) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ({"h_n": torch.ones(2)}, "returns h_n in place of output"),
        ({"output": torch.ones(3)}, r"output has shape \(3,\), not \(2,\)"),
        ({"output": torch.tensor([1.0, 1.001])}, "output differs by 7.1e-04"),
        ({"output": torch.tensor([1.0, float("nan")])}, "output differs by nan"),
    ],
)
def test_what_differs_is_not_timed(actual: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(Disagreement, match=message):
        check_same("peer", actual, {"output": torch.ones(2)}, 1e-4, "a case")


def test_fma_peak_is_a_speed_where_the_library_is() -> None:
    if (reason := cpu.why_not()) is not None:
        pytest.skip(reason)
    peak = fma_peak()
    assert peak is not None
    assert 0 < peak < 1e6


class _Machine:
    """Products at 100 GFLOP/s, a tenth of that for one row only, weights at 2 GB/s, gate math of 1e9 units a second."""

    def fma_peak_cpu(self, rounds: int) -> float:
        return 120.0

    def product_limit_cpu(self, batch: int, depth: int, rounds: int) -> float:
        return 100.0 if batch > 1 else 10.0

    def weight_limit_cpu(self, batch: int, depth: int, rounds: int) -> float:
        assert batch > 1
        return 400.0

    def read_limit_cpu(self, bytes: int, rounds: int) -> float:
        assert bytes * rounds >= 200e6
        return 2.0

    def gate_limit_cpu(self, cell: str, backward: bool, rounds: int) -> float:
        assert cell == "rnn_tanh"
        return 2e9 if backward else 1e9


def test_the_limit_is_that_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_limit_operators", _Machine)
    flops = {"recurrent_flops": 1e10, "parallel_flops": 2e11, "weight_flops": 2e11}
    work = Work("rnn", 1, 64, **flops, recurrent_bytes=10**6, reads=100, forward_units=1e9, backward_units=1e9)
    assert work.flops == 4.1e11
    samples, limits = alternate_with_limits({"a": lambda calls: 1.0}, 0.0, work=work)
    assert list(samples) == ["a"]
    assert limits == (120.0, pytest.approx(1 + 2 + 0.5 + 1 + 0.5), 2.0)
    _, limits = alternate_with_limits({"a": lambda calls: 1.0}, 0.0, work=replace(work, reads=6000))
    assert limits.seconds == pytest.approx(3 + 2 + 0.5 + 1 + 0.5)  # reading takes longer than the product
    assert alternate_with_limits({"a": lambda calls: 1.0}, 0.0)[1] == (120.0, None, None)


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
def test_limits_are_found_where_the_library_is(cell: str) -> None:
    if (reason := cpu.why_not()) is not None:
        pytest.skip(reason)
    flops = dict.fromkeys(("recurrent_flops", "parallel_flops", "weight_flops"), 1e6)
    work = Work(cell, 3, 40, **flops, recurrent_bytes=10**5, reads=10, forward_units=1e4, backward_units=1e4)
    _, limits = alternate_with_limits({"a": lambda calls: 1.0}, 0.0, work=work)
    assert limits.seconds is not None
    assert 0 < limits.seconds < 1
