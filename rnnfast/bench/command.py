"""`rnnfast bench`: runs benchmarks, prints their tables, writes a JSON file and charts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from tqdm import tqdm

import rnnfast
from rnnfast.bench import peers
from rnnfast.bench.measure import copy_bandwidth, cpu_model, fma_peak, threads
from rnnfast.bench.presets import FLAGS, PRESETS, Grid, cases
from rnnfast.bench.report import Report
from rnnfast.errors import UserError, note
from rnnfast.files import atomic_write, check_writable, expanded
from rnnfast.lm.config import check_backend

DESCRIPTION = "Time rnnfast against torch.nn and other libraries on this machine, after comparing their results."
FORMAT = 1
RESULTS = Path("benchmarks/results")
MOST_THREADS = 1024  # OpenMP crashes where it cannot make as many as it is asked for

HELP = {
    "cells": "recurrent cells",
    "hidden_sizes": "hidden units",
    "batches": "sequences per batch",
    "steps": "time steps",
    "directions": "forward is inference, without gradients",
    "dtypes": "of weights, input and state",
    "inputs": "features of the input",
    "packed": "ragged sequences, packed",
    "token_ids": "rnnfast takes token ids, torch.nn their one-hot rows",
    "peers": "ONNX Runtime and JAX take part if they are installed (pip install 'rnnfast[peers]')",
    "backend": "rnnfast's backend",
    "seconds": "about how long to measure a case",
}
TYPES: dict[str, Any] = {"inputs": int | None, "backend": str, "seconds": float | None}
LISTS: dict[str, Any] = {
    "cells": Literal["rnn", "rnn_relu", "lstm", "gru"],
    "hidden_sizes": int,
    "batches": int,
    "steps": int,
    "directions": Literal["forward", "forward+backward"],
    "dtypes": Literal["float32", "float64", "bfloat16"],
}


def parser() -> ArgumentParser:
    """The parser of the verb; what is not given on the command line is the benchmark's own."""
    benchmarks = "\n".join(f"  {name:18} {preset.title}" for name, preset in PRESETS.items())
    # The usage is the one part of the help whose lines are kept as they are.
    usage = f"rnnfast bench [BENCHMARK ...] [options]\n\nbenchmarks:\n{benchmarks}"
    parser = ArgumentParser(usage=usage, description=DESCRIPTION, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("benchmarks", type=str, nargs="*", default=["layers"], help="by name; table is all of them")
    parser.add_argument("--quick", action="store_true", help="a few small cases of each, to see that everything works")
    for setting, help in HELP.items():
        options: dict[str, Any] = {"action": "store_true", "default": None}
        if setting in TYPES:
            options = {"type": TYPES[setting]}
        elif setting in LISTS:
            options = {"type": LISTS[setting], "nargs": "+"}
        parser.add_argument("--" + setting.replace("_", "-"), help=help, **options)
    parser.add_argument("--threads", type=int | None, help="torch's threads (default: as torch chooses)")
    parser.add_argument("--out", type=str, metavar="FILE.json", help=f"default: {RESULTS}/BENCHMARK.json")
    return parser


def run(options: Any) -> int:
    """Run what the options ask for.

    Returns:
        The exit status.

    Raises:
        UserError: an option that has no meaning for a benchmark, contestants that disagree, a file that cannot
            be written.
    """
    if odd := [name for name in options.benchmarks if name not in ("table", *PRESETS)]:
        raise UserError(f"no benchmark is called {odd[0]}: choose from {', '.join([*PRESETS, 'table'])}")
    names = list(PRESETS) if "table" in options.benchmarks else list(dict.fromkeys(options.benchmarks))
    grids = {name: _grid(name, options) for name in names}
    if options.threads is not None and not 0 < options.threads <= MOST_THREADS:
        raise UserError(f"--threads must be positive, and at most {MOST_THREADS:,}")
    check_backend(options.backend or "auto", torch.device("cpu"))
    with threads(options.threads):
        return _run(grids, options)


def _grid(name: str, options: Any) -> Grid:
    grid = PRESETS[name].grid
    grid = grid.quick() if options.quick else grid
    given = {f.name: options[f.name] for f in fields(Grid) if f.name in HELP and options[f.name] is not None}
    if odd := given.keys() - FLAGS[grid.measures]:
        raise UserError(f"bench {name} has no use for --{sorted(odd)[0].replace('_', '-')}: leave it out")
    for setting in ("hidden_sizes", "batches", "steps", "inputs", "seconds"):
        value = given.get(setting, 1)
        if min(value if isinstance(value, list) else [value]) <= 0:
            raise UserError(f"--{setting.replace('_', '-')} must be positive")
    return replace(grid, **given)


def _run(grids: Mapping[str, Grid], options: Any) -> int:
    work = {name: cases(grid) for name, grid in grids.items()}
    if any(grid.peers for grid in grids.values()) and (absent := peers.missing()):
        note(f"{', '.join(absent)} not installed, so not among the peers (pip install 'rnnfast[peers]')")
    path, charts = _out(options.out, list(grids))
    limits = machine()
    print(describe(limits))
    reports = []
    with tqdm(total=sum(map(len, work.values())), unit="case", disable=None, leave=False) as bar:
        for name, found in work.items():
            report = Report(name, PRESETS[name].title)
            for label, measure in found:
                bar.set_postfix_str(label)
                report.rows.append(measure())
                bar.update()
            reports.append(report)
            tqdm.write("\n".join(["", f"{name}: {report.title}", report.table(), *report.summary_lines()]))
    record = {
        "format": FORMAT,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["rnnfast", *sys.argv[1:]],
        "machine": limits,
        "benchmarks": {report.name: report.to_json() for report in reports},
    }
    atomic_write(path, json.dumps(record, indent=1).encode())
    for report, chart in zip(reports, charts, strict=True):
        report.plot(chart)
    print(f"\nkept in {path}, charts beside it")
    return 0


def _out(given: str | None, names: list[str]) -> tuple[Path, list[Path]]:
    """The JSON file and the charts beside it, all found writable before anything is measured."""
    path = RESULTS / f"{'table' if names == list(PRESETS) else '+'.join(names)}.json"
    if given is not None:
        path = expanded(given)
    charts = [path.parent / (path.stem + ("" if len(names) == 1 else f"-{name}") + ".png") for name in names]
    if path in charts:
        raise UserError(f"{path} is where the chart goes: give the JSON file another name, such as {path.stem}.json")
    for file in (path, *charts):
        check_writable(file)
    return path, charts


def machine() -> dict[str, Any]:
    """The machine, and its limits as measured now."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "peers": {name: metadata.version(name) for name in ("onnxruntime", "jax") if name not in peers.missing()},
        "fma_peak_gflops": fma_peak(),
        "copy_bandwidth_gb_s": copy_bandwidth(),
    }


def describe(machine: Mapping[str, Any]) -> str:
    """The machine in a line."""
    peak = machine["fma_peak_gflops"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']} on {machine['torch_threads']} threads; "
        + (f"FMA peak {peak:.0f} GFLOP/s (float32), " if peak else "")
        + f"copy {machine['copy_bandwidth_gb_s']:.0f} GB/s"
    )


def commit() -> str | None:
    """The commit that this rnnfast is checked out at, marked where files have changed since; None if it is not."""

    def git(*arguments: str) -> str:
        folder = str(Path(rnnfast.__file__).parent)
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a checkout may hold an environment, which it ignores
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
