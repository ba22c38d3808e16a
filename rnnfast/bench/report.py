"""What a benchmark has found: the table, the summary, the JSON file and the chart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rnnfast.bench.measure import NO_LIMITS, Limits, Sample
from rnnfast.errors import note
from rnnfast.files import atomic_write

OURS, TORCH = "rnnfast", "torch.nn"
BEST = "the best peer"
LIBRARIES = (TORCH, "onnxruntime", "jax")  # of these the best at each point is told


@dataclass
class Row:
    """One case, measured.

    Attributes:
        label: the case in a few words; `case` says it in full.
        backend: rnnfast's backend that ran it.
        samples: seconds a call (or bytes, for `unit` "bytes") by contestant; ours is under `OURS`. Less is better.
        flops: multiplications and additions of a call; None where they say nothing.
        limits: of the machine, beside this case.
        tokens: tokens or characters of a call, where a rate is of interest.
    """

    label: str
    case: dict[str, Any]
    backend: str
    samples: dict[str, Sample]
    unit: str = "seconds"
    flops: float | None = None
    limits: Limits = NO_LIMITS
    tokens: int | None = None

    def ratio(self, name: str) -> float:
        """How many times better than `name` ours is."""
        return self.samples[name].median / self.samples[OURS].median

    def ratio_at_limit(self, name: str) -> float | None:
        """What `ratio` would be if ours reached the machine's limit."""
        return None if self.limits.seconds is None else self.samples[name].median / self.limits.seconds

    @property
    def peers(self) -> list[str]:
        return [name for name in self.samples if name != OURS]

    @property
    def best_peer(self) -> str | None:
        """The quickest of the other libraries, if there are several."""
        libraries = [name for name in LIBRARIES if name in self.samples]
        return min(libraries, key=lambda name: self.samples[name].median) if len(libraries) > 1 else None

    @property
    def gflops(self) -> float | None:
        return None if self.flops is None else self.flops / self.samples[OURS].median / 1e9

    @property
    def share(self) -> float | None:
        """The share of the measured float32 FMA peak that ours has reached."""
        return None if self.gflops is None or not self.limits.fma_peak else self.gflops / self.limits.fma_peak

    @property
    def share_of_limit(self) -> float | None:
        """The least time that the machine allows over ours."""
        return None if self.limits.seconds is None else self.limits.seconds / self.samples[OURS].median

    @property
    def rate(self) -> float | None:
        """Tokens a second."""
        return None if self.tokens is None else self.tokens / self.samples[OURS].median

    @property
    def spread(self) -> float:
        return max(sample.spread for sample in self.samples.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "label": self.label,
            "case": self.case,
            "backend": self.backend,
            "unit": self.unit,
            "samples": {name: sample._asdict() for name, sample in self.samples.items()},
            "ratios": {name: self.ratio(name) for name in self.peers},
            "ratios_at_limit": {name: self.ratio_at_limit(name) for name in self.peers},
            "flops": self.flops,
            "fma_peak_gflops": self.limits.fma_peak,
            "share_of_fma_peak": self.share,
            "limit_seconds": self.limits.seconds,
            "share_of_limit": self.share_of_limit,
            "weights_gb_s": self.limits.reading,
            "tokens_per_second": self.rate,
        }


@dataclass
class Report:
    """The rows of one benchmark, and what it is called."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)

    @property
    def has_peers(self) -> bool:
        """Whether there are several libraries to be the best of."""
        return any(row.best_peer for row in self.rows)

    def series(self) -> dict[str, list[tuple[Row, float]]]:
        """Ratios by what they are to: each contestant, and the best of them at each point where there are several."""
        names = dict.fromkeys(name for row in self.rows for name in row.peers)
        series = {name: [(row, row.ratio(name)) for row in self.rows if name in row.samples] for name in names}
        if self.has_peers:
            series[BEST] = [(row, row.ratio(row.best_peer)) for row in self.rows if row.best_peer]
        return series

    def series_at_limit(self) -> dict[str, list[tuple[Row, float]]]:
        """`series`, if ours reached the machine's limit."""
        at_limit = {}
        for name, points in self.series().items():
            found = [(row, row.ratio_at_limit((row.best_peer or name) if name == BEST else name)) for row, _ in points]
            limits = [(row, limit) for row, limit in found if limit is not None]
            if len(limits) == len(points):
                at_limit[name] = limits
        return at_limit

    def table(self) -> str:
        """The rows as text."""
        columns: dict[str, list[str]] = {"case": [row.label for row in self.rows]}
        for name in dict.fromkeys(name for row in self.rows for name in row.peers):
            columns[f"vs {name}"] = [f"{row.ratio(name):.2f}x" if name in row.samples else "-" for row in self.rows]
        if self.has_peers:
            best = [(row, row.best_peer) for row in self.rows]
            columns["vs best peer"] = [f"{row.ratio(name):.2f}x {name}" if name else "-" for row, name in best]
        if any(row.rate for row in self.rows):
            columns["tokens/s"] = [f"{row.rate:,.0f}" if row.rate else "-" for row in self.rows]
        if any(row.gflops for row in self.rows):
            columns["GFLOP/s"] = [f"{row.gflops:.1f}" if row.gflops else "-" for row in self.rows]
            columns["of FMA peak"] = [f"{row.share:.0%}" if row.share else "-" for row in self.rows]
        if any(row.share_of_limit for row in self.rows):
            columns["of limit"] = [f"{row.share_of_limit:.0%}" if row.share_of_limit else "-" for row in self.rows]
        if any(row.unit == "bytes" for row in self.rows):
            columns["MiB"] = [f"{row.samples[OURS].median / 2**20:.1f}" for row in self.rows]
        columns["backend"] = [row.backend for row in self.rows]
        columns["spread"] = [f"±{row.spread:.0%}" for row in self.rows]
        widths = [max(len(text) for text in (head, *cells)) for head, cells in columns.items()]
        lines = [tuple(columns), *zip(*columns.values(), strict=True)]
        return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Geometric mean and worst point of every series of ratios, and of the shares of the machine's limits."""
        result = {f"ratio to {name}": _summary(points) for name, points in self.series().items()}
        result |= {f"ratio to {name}, ours at the limit": _summary(p) for name, p in self.series_at_limit().items()}
        of_peak = [(row, row.share) for row in self.rows if row.share is not None]
        of_limit = [(row, row.share_of_limit) for row in self.rows if row.share_of_limit is not None]
        return result | {
            name: _summary(shares)
            for name, shares in (("share of FMA peak", of_peak), ("share of limit", of_limit))
            if shares
        }

    def summary_lines(self) -> list[str]:
        """The summary as text."""
        lines = []
        for name, numbers in self.summary().items():
            form = "{:.0%}" if name.startswith("share") else "{:.2f}x"
            mean, worst = (form.format(numbers[key]) for key in ("geometric_mean", "worst"))
            lines.append(f"{name}: geometric mean {mean}, worst {worst} ({numbers['worst_at']})")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"title": self.title, "rows": [row.to_json() for row in self.rows], "summary": self.summary()}

    def plot(self, path: Path) -> None:
        """Draw the ratios (or, where there are none, the shares of the FMA peak) as a chart, a line a case.

        matplotlib is an extra: without it a note says so and nothing is drawn.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            note(f"no {path.name}: matplotlib is not installed (pip install 'rnnfast[plot]')")
            return
        series = self.series()
        labels = [row.label for row in self.rows]
        figure = Figure(figsize=(8, 1.2 + 0.2 * len(labels)), layout="constrained")
        axes = figure.subplots()
        if series:
            for (name, points), marker in zip(series.items(), "osd^v*", strict=False):
                positions = [labels.index(row.label) for row, _ in points]
                axes.plot([ratio for _, ratio in points], positions, marker, label=name, fillstyle="none")
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set(xlabel="times better than", xscale="log")
            axes.legend()
        else:
            axes.barh(range(len(labels)), [row.share or 0.0 for row in self.rows], height=0.6)
            axes.set(xlabel="share of the measured FMA peak", xlim=(0, 1))
        axes.set(yticks=range(len(labels)), yticklabels=labels, title=self.title)
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        axes.grid(True, which="both", axis="x", alpha=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=100)
        atomic_write(path, buffer.getvalue())


def _summary(points: Sequence[tuple[Row, float]]) -> dict[str, Any]:
    values = [value for _, value in points]
    worst, value = min(points, key=lambda point: point[1])
    return {
        "points": len(points),
        "geometric_mean": math.exp(sum(map(math.log, values)) / len(values)),
        "worst": value,
        "worst_at": worst.label,
    }
