"""The Triton backend on a GPU: right first, then how fast beside cuDNN. Run from the repository's root:

    python -m benchmarks.gpu_triton [--minutes 8] [--quick] [--output benchmarks/results/FILE.json]

Layer by layer, output, final states and all gradients are held against torch.nn in float64; a layer that fails is
reported, not timed, and makes the exit status 1. Then rnnfast and torch.nn (cuDNN) take turns at forward and at
forward+backward, float32 both with TF32 off and on, bfloat16 once. Times are of the whole call on an otherwise idle
stream, between two events, host launch overhead included; the figure is the ratio of the medians. When the minutes are
over the remaining sizes are left out, and the file says how many.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast.backends import triton as backend

ROOT = Path(__file__).resolve().parents[1]
INPUTS = 64
DEVICE = "cuda"


class Size(NamedTuple):
    """A layer and what it is called with."""

    cell: str
    hidden: int
    batch: int
    steps: int
    dtype: torch.dtype
    allow_tf32: bool


# Most telling first: the size of one character model, then the grid, then long sequences.
CELLS = {"rnn_tanh": "RNN", "lstm": "LSTM", "gru": "GRU"}
PRECISIONS = ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
# The largest error's RMS over the truth's: float32 as DESIGN's half-type bound scaled by the dtype; TF32 has 10 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
TOLERANCE_TF32 = 5e-3


def grid(quick: bool) -> Iterator[Size]:
    """The sizes, in the order they are run."""
    hidden = (64, 512) if quick else (32, 64, 128, 256, 512, 1024)
    shapes = ((32, 35),) if quick else ((32, 128), (1, 128), (128, 128), (32, 1024))
    for (batch, steps), h, cell, (dtype, tf32) in itertools.product(shapes, hidden, CELLS, PRECISIONS):
        yield Size(cell, h, batch, steps, dtype, tf32)


def layers(size: Size) -> tuple[nn.RNNBase, nn.RNNBase]:
    """Returns rnnfast's layer on Triton and torch.nn's, with the same weights."""
    torch.manual_seed(0)
    name = CELLS[size.cell]
    theirs = getattr(nn, name)(INPUTS, size.hidden).to(DEVICE, size.dtype)
    ours = getattr(rnnfast, name)(INPUTS, size.hidden, backend="triton").to(DEVICE, size.dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def results(layer: nn.RNNBase, input: Tensor) -> dict[str, Tensor]:
    """Output, final states and every gradient of the sum of squares of them all."""
    input = input.detach().requires_grad_()
    output, state = layer(input)
    states = state if isinstance(state, tuple) else (state,)
    loss = sum((x.float().square().sum() for x in (output, *states)), torch.zeros((), device=DEVICE))
    leaves = {"d_input": input, **{f"d_{name}": parameter for name, parameter in layer.named_parameters()}}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {"output": output, **{f"state_{i}": s for i, s in enumerate(states)}}
    return {**named, **dict(zip(leaves, gradients, strict=True))}


def relative_errors(size: Size, input: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """RMS error over RMS of the truth, of rnnfast and of torch.nn; the truth is torch.nn in float64."""
    ours, theirs = layers(size)
    truth_layer = getattr(nn, CELLS[size.cell])(INPUTS, size.hidden).to(DEVICE, torch.float64)
    truth_layer.load_state_dict(theirs.state_dict())
    truth = results(truth_layer, input.double())

    def rms(x: Tensor) -> float:
        return float(x.detach().square().mean().sqrt())

    def errors(values: dict[str, Tensor]) -> dict[str, float]:
        return {name: rms(value.double() - truth[name]) / rms(truth[name]) for name, value in values.items()}

    results(ours, input)  # what comes a second time may be replayed from a CUDA graph, as it will be when timed
    return errors(results(ours, input)), errors(results(theirs, input))


def planned(size: Size) -> str:
    """The kernel that rnnfast's layer takes."""
    from rnnfast.backends.triton import launch, plan

    how = launch.numbers(size.dtype), launch.card(torch.device(DEVICE, 0))
    return plan.plan(size.cell, size.hidden, size.batch, 1, *how).kernel


def seconds_in_turns(work: dict[str, Callable[[], object]], budget: float) -> dict[str, dict[str, float]]:
    """Median and quartiles of the seconds of a call, the contestants taking turns for about `budget` seconds."""
    for function in work.values():
        for _ in range(3):
            function()
    samples: dict[str, list[float]] = {name: [] for name in work}
    start = time.perf_counter()
    while len(samples[next(iter(work))]) < 5 or time.perf_counter() - start < budget:
        for name, function in work.items():
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            before.record()
            function()
            after.record()
            after.synchronize()
            samples[name].append(before.elapsed_time(after) / 1e3)
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in samples.items()}
    return {
        name: {"median": q[1], "lower": q[0], "upper": q[2], "calls": float(len(samples[name]))}
        for name, q in quartiles.items()
    }


def measure(size: Size, budget: float) -> dict[str, Any]:
    """Checks one layer and times it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = size.allow_tf32
    input = torch.randn(size.steps, size.batch, INPUTS, device=DEVICE, dtype=size.dtype)
    row: dict[str, Any] = {**size._asdict(), "dtype": str(size.dtype).removeprefix("torch.")}
    row["kernel"] = planned(size)
    # The first steps tell all that a longer sequence would, before rounding errors have grown.
    row["error"], row["error_of_nn"] = relative_errors(size, input[:16].contiguous())
    tolerance = TOLERANCE_TF32 if size.allow_tf32 else TOLERANCE[size.dtype]
    row["right"] = all(error <= max(tolerance, 1.5 * row["error_of_nn"][name]) for name, error in row["error"].items())
    if not row["right"]:
        return row

    ours, theirs = layers(size)
    for name, grad in (("forward", False), ("forward_backward", True)):

        def call(layer: nn.RNNBase, grad: bool = grad) -> None:
            with torch.set_grad_enabled(grad):
                output, _ = layer(input)
                if grad:
                    torch.autograd.grad(output, list(layer.parameters()), torch.ones_like(output))

        times = seconds_in_turns({"rnnfast": lambda: call(ours), "nn": lambda: call(theirs)}, budget)
        row[name] = {**times, "ratio": times["nn"]["median"] / times["rnnfast"]["median"]}
    return row


def circumstances() -> dict[str, Any]:
    """The card, driver, versions and commit that the figures belong to."""
    import triton

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
        except OSError:  # the program is not installed
            return ""

    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": said("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(said("git", "status", "--porcelain", "--untracked-files=no")),
        "card": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting new sizes after this (8)")
    parser.add_argument("--quick", action="store_true", help="a few sizes only")
    parser.add_argument("--output", type=Path, help="the JSON file; default: benchmarks/results/triton-CARD.json")
    options = parser.parse_args()
    reason = backend.why_not()
    if reason is not None or not torch.cuda.is_available():
        print(f"this benchmark needs a GPU: {reason or 'none is visible to PyTorch'}", file=sys.stderr)
        return 1

    report: dict[str, Any] = {
        **circumstances(),
        "seconds_are": "of one call, host overhead included",
        "left_out": 0,
        "rows": [],
    }
    card = report["card"].lower().replace(" ", "-")
    path = options.output or ROOT / "benchmarks" / "results" / f"triton-{card}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = list(grid(options.quick))
    start = time.perf_counter()
    for done, size in enumerate(sizes):
        if time.perf_counter() - start > 60 * options.minutes:
            report["left_out"] = len(sizes) - done
            path.write_text(json.dumps(report, indent=1) + "\n")
            break
        row = measure(size, budget=0.15)
        report["rows"].append(row)
        path.write_text(json.dumps(report, indent=1) + "\n")  # what is done is kept if a later size fails
        figures = (
            " ".join(f"{way} {row[way]['ratio']:5.2f}x" for way in ("forward", "forward_backward"))
            if row["right"]
            else f"WRONG: {max(row['error'].items(), key=lambda item: item[1])}"
        )
        print(f"[{done + 1}/{len(sizes)}] {' '.join(map(str, size))}: {figures}", flush=True)
    wrong = sum(not row["right"] for row in report["rows"])
    print(f"{len(report['rows'])} sizes, {wrong} wrong, {report['left_out']} left out; written to {path}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
