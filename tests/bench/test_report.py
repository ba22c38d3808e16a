"""What the table and the summary of a benchmark tell."""

from __future__ import annotations

import pytest

from rnnfast.bench.measure import Limits, Sample
from rnnfast.bench.report import Report, Row


def _row(label: str, ours: float, torch: float, jax: float | None = None, limit: float | None = 0.01) -> Row:
    seconds = {"rnnfast": ours, "torch.nn": torch} | ({} if jax is None else {"jax": jax})
    samples = {name: Sample(value, value, value, 3, 1) for name, value in seconds.items()}
    return Row(label, {}, "cpu", samples, flops=1e9, limits=Limits(125.0, limit))


def test_ratios_at_the_limit_are_the_most_there_is_to_win() -> None:
    # The machine cannot do it in less than 10 ms: torch.nn takes twice that, so nothing is more than twice as fast.
    row = _row("a", ours=0.0125, torch=0.02)
    assert row.share == pytest.approx(0.64)
    assert row.share_of_limit == pytest.approx(0.8)
    assert row.ratio("torch.nn") == pytest.approx(1.6)
    assert row.ratio_at_limit("torch.nn") == pytest.approx(2.0)
    assert row.to_json()["ratios_at_limit"] == {"torch.nn": pytest.approx(2.0)}
    assert _row("b", ours=0.0125, torch=0.02, limit=None).ratio_at_limit("torch.nn") is None


def test_at_the_limit_a_series_has_its_own_peer_and_every_point_or_none() -> None:
    report = Report("layers", "layers", [_row("a", 0.0125, 0.02, 0.04), _row("b", 0.0125, 0.08, 0.04)])
    ratios = {name: [ratio for _, ratio in points] for name, points in report.series_at_limit().items()}
    assert ratios == {
        "torch.nn": pytest.approx([2.0, 8.0]),
        "jax": pytest.approx([4.0, 4.0]),
        "the best peer": pytest.approx([2.0, 4.0]),
    }
    report.rows[1] = _row("b", 0.0125, 0.08, 0.04, limit=None)
    assert report.series_at_limit() == {}
    alone = Report("layers", "layers", [_row("a", 0.0125, 0.02)])
    assert list(alone.series()) == ["torch.nn"]


def test_the_summary_has_the_limit_beside_each_ratio() -> None:
    report = Report("layers", "layers", [_row("a", 0.0125, 0.02, 0.04), _row("b", 0.0125, 0.08, 0.04)])
    summary = report.summary()
    assert summary["ratio to the best peer"]["worst"] == pytest.approx(1.6)
    assert summary["ratio to the best peer, ours at the limit"] == {
        "points": 2,
        "geometric_mean": pytest.approx(8**0.5),
        "worst": pytest.approx(2.0),
        "worst_at": "a",
    }
    assert any("ours at the limit: geometric mean 2.83x, worst 2.00x (a)" in line for line in report.summary_lines())
