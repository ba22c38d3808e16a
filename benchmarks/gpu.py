"""All that a GPU is needed for, in one command and under ten minutes: `make gpu`, or

    python -m benchmarks.gpu [--minutes 9] [--output benchmarks/results/FILE.json]

It compiles the CUDA kernels, runs `pytest -m gpu`, runs compute-sanitizer over small layers, measures the latency of
each exchange and of cuDNN's three algorithms, times layers beside cuDNN (TF32 off and on) after holding them against it
in float64, and runs training and generation with CUDA graphs. Each part is in the JSON as soon as it is done; one that
fails is reported there and makes the exit status 1. Needs torch with CUDA and nvcc; no network.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast
from benchmarks.gpu_triton import CELLS, ROOT, circumstances, results, seconds_in_turns
from rnnfast.backends import cuda
from rnnfast.backends.cuda import build, launch
from rnnfast.backends.cuda.launch import Plan

Report = dict[str, Any]
# What a step may take, in microseconds: the goals for an H200 at H=512, B=32.
GOALS = {("lstm", "bfloat16"): 0.8, ("lstm", "tf32"): 1.0, ("lstm", "float32"): 1.9, ("rnn_tanh", "float32"): 0.9}
BACKWARD_GOAL = 1.6  # times the forward
NUMBERS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 2e-5, "tf32": 5e-3, "bfloat16": 2e-2, "float16": 4e-3}
CUDNN_ALGORITHMS = {  # layers for which PyTorch picks each (aten/src/ATen/native/cudnn/RNN.cpp, get_algo)
    "PERSIST_STATIC_SMALL_H": ("rnn_tanh", 256, torch.float32),
    "PERSIST_STATIC": ("lstm", 512, torch.float16),
    "STANDARD": ("lstm", 512, torch.float32),
}


def compile_kernels(deadline: float) -> Report:
    start = time.perf_counter()
    path = build.library()
    cuda.load()
    return {"seconds": time.perf_counter() - start, "architectures": build.device_architectures(), "library": path.name}


def run_tests(deadline: float) -> Report:
    """The tests that need a GPU, in a process of their own; plugins and warnings are as the machine has them."""
    # The pinned configuration may ask for plugins that this machine lacks.
    options = ["-q", "-m", "gpu", "-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    # Only these folders: others need packages that this machine may lack, even to be collected.
    done = _run([sys.executable, "-m", "pytest", *options, "tests/cuda", "tests/triton"], deadline)
    return {"passed": done.returncode == 0, "summary": _last_lines(done, 25)}


def run_sanitizer(deadline: float) -> Report:
    """Memcheck and racecheck over small layers of every kernel."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        return {"passed": None, "summary": "compute-sanitizer is not installed"}
    report: Report = {"passed": True}
    for tool in ("memcheck", "racecheck"):
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--small-layers",
        ]
        done = _run(command, min(deadline, time.perf_counter() + 75))
        report[tool] = {"exit_status": done.returncode, "summary": _last_lines(done, 8)}
        report["passed"] &= done.returncode == 0
    return report


def small_layers() -> None:
    """What the sanitizer watches: each kernel once, forward and backward."""
    cuda.load()
    for kernel, numbers in itertools.product(("block", "cluster", "grid", "steps"), NUMBERS):
        plan = {
            "block": Plan("block", 1, 8, 8),
            "cluster": Plan("cluster", 2, 8, 8),
            "grid": Plan("grid", 2, 8, 8),
            "steps": Plan("steps", 0, 0, 0),
        }[kernel]
        with _using(plan, numbers):
            layer = _scan_arguments("lstm", 24, 8, 3, NUMBERS[numbers])
            output, _, _, tape = _forward(layer)
            _backward(output, layer, output, tape, True)
    torch.cuda.synchronize()


def calibrate(deadline: float) -> Report:
    """Microseconds a step of a layer so small that the exchange is all it does, and cuDNN's a step."""
    report: Report = {"exchange_us": {}, "cudnn_us": {}}
    teams = [Plan("block", 1, 8, 16)]
    teams += [Plan("cluster", n, 8, 16) for n in (2, 4, 8, 16)] + [Plan("grid", n, 8, 16) for n in (2, 16, 64, 128)]
    for plan, numbers in itertools.product(teams, ("float32", "bfloat16")):
        # Eight units a block on plain arithmetic, sixteen on tensor cores: the least a block can own.
        hidden = plan.blocks * (8 if numbers == "float32" else 16)
        name = f"{plan.kernel} of {plan.blocks}, {numbers}"
        if torch.ops.rnnfast_cuda.check("rnn_tanh", hidden, 8, 1, numbers, False, _limits(), plan.team):
            continue
        report["exchange_us"][name] = _scan_step_us("rnn_tanh", hidden, 8, numbers, plan)["forward"]
    for algorithm, (cell, hidden, dtype) in CUDNN_ALGORITHMS.items():
        torch.backends.cudnn.allow_tf32 = False
        layer = getattr(nn, CELLS[cell])(128, hidden).to("cuda", dtype)
        report["cudnn_us"][algorithm] = {"layer": f"{cell} {hidden} {dtype}", **_layer_step_us(layer, 32, dtype)}
    return report


def time_goals(deadline: float) -> list[Report]:
    """The step times that were set as goals: of the scan alone, products apart."""
    rows = []
    for (cell, numbers), goal in GOALS.items():
        with _using(None, numbers):
            h_0 = torch.empty(1, 32, 512, device="cuda", dtype=NUMBERS[numbers])
            plans = {way: launch.plan(h_0, cell, way == "backward") for way in ("forward", "backward")}
        measured = _scan_step_us(cell, 512, 32, numbers, None)
        goals = {"forward": goal, "backward": BACKWARD_GOAL * goal}
        row = {"cell": cell, "numbers": numbers, "plans": {way: plan._asdict() for way, plan in plans.items()}}
        rows.append(
            {**row, "us_a_step": measured, "goals": goals, "of_goal": {w: measured[w] / goals[w] for w in goals}}
        )
    return rows


def time_grid(deadline: float) -> list[Report]:
    """Whole layers beside cuDNN, most telling first; what does not fit the time is left out and counted."""
    rows: list[Report] = []
    shapes = [(32, 35), (32, 1024), (1, 128), (128, 128)]
    grid = list(itertools.product(shapes, (512, 256, 128, 1024, 64, 32, 2048), CELLS, NUMBERS))
    for left, ((batch, steps), hidden, cell, numbers) in zip(range(len(grid), 0, -1), grid, strict=True):
        if time.perf_counter() > deadline:
            rows.append({"left_out": left})
            break
        row: Report = {"cell": cell, "hidden": hidden, "batch": batch, "steps": steps, "numbers": numbers}
        rows.append(row)
        with _using(None, numbers):
            try:
                row.update(_compare(cell, hidden, batch, steps, numbers))
            except RuntimeError as error:
                row.update(right=False, failure=str(error))
        ratios = {way: round(row[way]["ratio"], 2) for way in ("forward", "both") if way in row}
        print(
            *row.values() if not row["right"] else (cell, hidden, batch, steps, numbers, row["plan"], ratios),
            flush=True,
        )
    return rows


def run_pipeline(deadline: float) -> list[Report]:
    """The chapter's training (B=32, T=35, SGD, clipping) and greedy generation at B=1, each a replayed CUDA graph."""
    rows = []
    for cell, hidden, backend in itertools.product(("rnn_tanh", "lstm", "gru"), (256, 512), ("cuda", "torch")):
        torch.manual_seed(0)
        model = _Model(cell, hidden, backend).cuda()
        row = {"cell": cell, "hidden": hidden, "backend": backend}
        rows.append(
            {**row, "tokens_per_s": 32 * 35 / _training_step_s(model), "characters_per_s": 1 / _character_s(model)}
        )
        print(rows[-1], flush=True)
    return rows


class _Model(nn.Module):
    """A character model over 28 symbols. torch.nn's layers take one-hot rows, ours the ids themselves."""

    def __init__(self, cell: str, hidden: int, backend: str) -> None:
        super().__init__()
        self.ids = backend != "torch"
        options: Report = {"backend": backend} if self.ids else {}
        self.rnn = getattr(rnnfast if self.ids else nn, CELLS[cell])(28, hidden, **options)
        self.head = nn.Linear(hidden, 28)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.rnn(ids if self.ids else F.one_hot(ids, 28).float(), state)
        return self.head(output), state


def _training_step_s(model: _Model) -> float:
    inputs, targets = (torch.randint(28, (35, 32), device="cuda") for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        logits, _ = model(inputs)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return _replayed_s(step)


def _character_s(model: _Model, characters: int = 32) -> float:
    ids = torch.zeros(1, 1, dtype=torch.int64, device="cuda")

    @torch.no_grad()
    def generate() -> None:
        token, state = ids, None
        for _ in range(characters):
            logits, state = model(token, state)
            token = logits.argmax(-1)
        ids.copy_(token)

    return _replayed_s(generate) / characters


def _replayed_s(work: Callable[[], None]) -> float:
    """Median seconds of a replay of `work`, captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return float(seconds_in_turns({"replay": graph.replay}, 0.3)["replay"]["median"])


def _compare(cell: str, hidden: int, batch: int, steps: int, numbers: str) -> Report:
    """Parity with torch.nn in float64 first; then the time of the whole call, in turns with torch.nn."""
    dtype, name = NUMBERS[numbers], CELLS[cell]
    torch.manual_seed(0)
    theirs = getattr(nn, name)(64, hidden).to("cuda", dtype)
    ours = getattr(rnnfast, name)(64, hidden, backend="cuda").to("cuda", dtype)
    truth_layer = getattr(nn, name)(64, hidden).to("cuda", torch.float64)
    for layer in (ours, truth_layer):
        layer.load_state_dict(theirs.state_dict())
    input = torch.randn(steps, batch, 64, device="cuda", dtype=dtype)
    truth = results(truth_layer, input[:16].double())
    errors = {}
    for who, layer in (("ours", ours), ("theirs", theirs)):
        values = results(layer, input[:16].contiguous())
        errors[who] = {k: float((v.double() - truth[k]).norm() / truth[k].norm()) for k, v in values.items()}
    right = all(e <= max(TOLERANCE[numbers], 1.5 * errors["theirs"][k]) for k, e in errors["ours"].items())
    h_0 = torch.empty(1, batch, hidden, device="cuda", dtype=dtype)
    row: Report = {
        "right": right,
        "worst_error": max(errors["ours"].values()),
        "plan": launch.plan(h_0, cell, False).kernel,
    }
    if not right:
        return {**row, "errors": errors}

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(input)

    def both(layer: nn.Module) -> None:
        output, _ = layer(input)
        torch.autograd.grad(output, list(layer.parameters()), torch.ones_like(output))

    for way, call in (("forward", forward), ("both", both)):
        times = seconds_in_turns({"rnnfast": partial(call, ours), "nn": partial(call, theirs)}, 0.08)
        row[way] = {**times, "ratio": times["nn"]["median"] / times["rnnfast"]["median"]}
    return row


def _scan_step_us(cell: str, hidden: int, batch: int, numbers: str, plan: Plan | None) -> dict[str, float]:
    """Microseconds a step of the scan operators alone: the slope between two lengths."""
    lengths, times = (256, 1280), []
    with _using(plan, numbers):
        for steps in lengths:
            layer = _scan_arguments(cell, hidden, batch, steps, NUMBERS[numbers])
            layer[0] = torch.randint(1, (steps * batch,), device="cuda")  # ids: no input product
            output, _, _, tape = _forward(layer)
            backward = partial(_backward, torch.ones_like(output), layer, output, tape, False)
            measured = seconds_in_turns({"forward": partial(_forward, layer), "backward": backward}, 0.05)
            times.append({way: values["median"] for way, values in measured.items()})
    return {way: 1e6 * (times[1][way] - times[0][way]) / (lengths[1] - lengths[0]) for way in times[0]}


def _layer_step_us(layer: nn.Module, batch: int, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds a step of a whole layer, input product included: the slope between two lengths."""
    lengths, times = (256, 1280), []
    for steps in lengths:
        input = torch.randn(steps, batch, 128, device="cuda", dtype=dtype)

        def forward(input: Tensor = input) -> None:
            with torch.no_grad():
                layer(input)

        def both(input: Tensor = input) -> None:
            output, _ = layer(input)
            torch.autograd.grad(output, list(layer.parameters()), torch.ones_like(output))

        measured = seconds_in_turns({"forward": forward, "both": both}, 0.05)
        times.append({way: values["median"] for way, values in measured.items()})
    return {way: 1e6 * (times[1][way] - times[0][way]) / (lengths[1] - lengths[0]) for way in times[0]}


def _scan_arguments(cell: str, hidden: int, batch: int, steps: int, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    gates = rnnfast.cells.CELLS[cell].gates

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype).uniform_(-(hidden**-0.5), hidden**-0.5)

    weights = [uniform(1, gates * hidden, 4), uniform(1, gates * hidden, hidden), uniform(1, gates * hidden)]
    states = [uniform(1, batch, hidden), uniform(1, batch, hidden) if cell == "lstm" else None]
    return [uniform(steps * batch, 4), *weights, weights[2].clone(), None, *states, None, cell, False]


def _forward(layer: list[Any]) -> tuple[Tensor, ...]:
    arguments: Any = (*layer, True)
    return launch.forward(*arguments)


def _backward(d_output: Tensor, layer: list[Any], output: Tensor, tape: Tensor, products: bool) -> tuple[Tensor, ...]:
    """With or without the products that follow the scan."""
    arguments: Any = (d_output, None, None, *layer, output, tape, products, products)
    return launch.backward(*arguments)


@contextlib.contextmanager
def _using(plan: Plan | None, numbers: str) -> Iterator[None]:
    """A plan in place of the one that would be made, and TF32 for what is called tf32 only."""
    made, allowed = launch.plan, (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = numbers == "tf32"
    if plan is not None:
        forced = plan
        launch.plan = lambda h_0, cell, backward: forced
    try:
        yield
    finally:
        launch.plan = made
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def _limits() -> list[int]:
    return list(torch.ops.rnnfast_cuda.limits(torch.cuda.current_device()))


def _run(command: list[str], deadline: float) -> subprocess.CompletedProcess[str]:
    limit = max(5.0, deadline - time.perf_counter())
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit, check=False)
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout.decode(errors="replace") if isinstance(stopped.stdout, bytes) else ""
        return subprocess.CompletedProcess(command, 124, said, f"stopped after {limit:.0f} s")


def _last_lines(done: subprocess.CompletedProcess[str], count: int) -> list[str]:
    return (done.stdout + done.stderr).strip().splitlines()[-count:]


# Each part and the share of the time by whose end it must be done.
PARTS: dict[str, tuple[Callable[[float], Any], float]] = {
    "build": (compile_kernels, 0.35),
    "tests": (run_tests, 0.55),
    "calibration": (calibrate, 0.6),
    "goals": (time_goals, 0.65),
    "pipeline": (run_pipeline, 0.72),
    "sanitizer": (run_sanitizer, 0.87),
    "grid": (time_grid, 0.98),
}


def main() -> int:
    """Runs every part; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="be done by then (9)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts only")
    parser.add_argument("--output", type=Path, help="the JSON file; default: benchmarks/results/gpu-CARD.json")
    parser.add_argument("--small-layers", action="store_true", help=argparse.SUPPRESS)  # what the sanitizer runs
    options = parser.parse_args()
    reason = cuda.why_not()
    if reason is not None:
        print(f"this needs the cuda backend: {reason}", file=sys.stderr)
        return 1
    if options.small_layers:
        small_layers()
        return 0

    start = time.perf_counter()
    cuda_report: Report = {**circumstances(), "limits": None}
    card = cuda_report["card"].lower().replace(" ", "-")
    path = options.output or ROOT / "benchmarks" / "results" / f"gpu-{card}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, (part, share) in PARTS.items():
        if options.only and name not in ("build", *options.only):
            continue
        began = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            cuda_report[name] = part(start + 60 * options.minutes * share)
        except Exception as error:  # one part that fails must not cost the machine time spent on the others
            traceback.print_exc()
            cuda_report[name] = {"failure": f"{type(error).__name__}: {error}"}
        if name == "build" and "failure" not in cuda_report[name]:
            cuda_report["limits"] = _limits()
        if _has_failed(cuda_report[name]):
            failed.append(name)
        path.write_text(json.dumps(cuda_report, indent=1) + "\n")
        print(f"   {time.perf_counter() - began:.0f} s: {'FAILED' if name in failed else 'done'}", flush=True)
        if name == "build" and failed:
            break
    print(_table(cuda_report))
    print(f"written to {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _has_failed(result: Any) -> bool:
    if isinstance(result, list):
        return any(row.get("right") is False for row in result)
    return "failure" in result or result.get("passed") is False


def _table(report: Report) -> str:
    """The measurements, for reading."""
    lines = [f"{report['card']}, torch {report['torch']}, commit {report['commit'][:10]}"]
    if "exchange_us" in report.get("calibration", {}):
        lines += [f"  {us:7.2f} us a step: {name}" for name, us in report["calibration"]["exchange_us"].items()]
        for name, row in report["calibration"]["cudnn_us"].items():
            lines.append(f"  {row['forward']:7.2f} us a step: cuDNN {name} ({row['layer']}, B=32)")
    for row in _rows(report, "goals"):
        us, goals = row["us_a_step"], row["goals"]
        figures = ", ".join(f"{way} {us[way]:.2f} us (goal {goals[way]:.2f})" for way in us)
        lines.append(f"  {row['cell']} 512 B=32 {row['numbers']}: {figures}")
    for row in _rows(report, "pipeline"):
        speed = f"{row['tokens_per_s']:12,.0f} tokens/s {row['characters_per_s']:12,.0f} characters/s"
        lines.append(f"  {row['cell']:8} {row['hidden']} {row['backend']:5} {speed}")
    for row in _rows(report, "grid"):
        if "both" in row:
            shape = f"{row['cell']:8} H={row['hidden']:<4} B={row['batch']:<3} T={row['steps']:<4} {row['numbers']:8}"
            ratios = f"forward {row['forward']['ratio']:6.2f}x  both {row['both']['ratio']:6.2f}x of cuDNN"
            lines.append(f"  {shape} {row['plan']:7} {ratios}")
    return "\n".join(lines)


def _rows(report: Report, part: str) -> list[Report]:
    rows = report.get(part, [])
    return rows if isinstance(rows, list) else []


if __name__ == "__main__":
    sys.exit(main())
