"""A run's perplexity curve. matplotlib is an extra: without it there is no curve, and nothing else changes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rnnfast.errors import note
from rnnfast.files import atomic_write


def plot(records: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draw perplexity over epochs from the records of a run's log, as a PNG."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        note(f"no {path.name}: matplotlib is not installed (pip install 'rnnfast[plot]')")
        return
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    epochs = [record["epoch"] for record in records]
    for key, label in (("perplexity", "training"), ("validation_perplexity", "validation")):
        if records and key in records[-1]:
            axes.plot(epochs, [record.get(key, float("nan")) for record in records], label=label)
    axes.set(xlabel="epoch", ylabel="perplexity", yscale="log")
    axes.set_title(title, parse_math=False)  # the name of a text may hold a $
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    atomic_write(path, buffer.getvalue())
