"""All that a GPU is needed for, in one command and under ten minutes: `make gpu`, or

    python -m benchmarks.gpu [--minutes 9] [--only PART ...] [--output benchmarks/results/FILE.json]

It compiles the CUDA kernels, runs `pytest -m gpu`, measures the latency of each exchange and of cuDNN's three
algorithms and the step times that are goals, makes the table that `auto` follows (`rnnfast tune`), runs training and
generation with CUDA graphs, runs compute-sanitizer over small layers, and times layers beside cuDNN (TF32 off and on)
after holding them against it in float64. Each part is a process with a time of its own, so that one that fails or hangs
costs no other, and is in the JSON as soon as it is done; a failure makes the exit status 1. A readable table is written
beside the JSON. Needs torch with CUDA, nvcc, a C++ compiler and pytest; no network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast
from benchmarks.gpu_triton import ROOT, circumstances
from rnnfast import table, tuning
from rnnfast.backends import cuda
from rnnfast.backends.cuda import build, launch
from rnnfast.backends.cuda.launch import Plan
from rnnfast.tuning import CELLS, NUMBERS, arithmetic, seconds_in_turns

Report = dict[str, Any]
# What a step may take, in microseconds: the goals for an H200 at H=512, B=32.
GOALS = {("lstm", "bfloat16"): 0.8, ("lstm", "tf32"): 1.0, ("lstm", "float32"): 1.9, ("rnn_tanh", "float32"): 0.9}
BACKWARD_GOAL = 1.6  # times the forward
# How many times as fast as cuDNN, by the algorithm that PyTorch has it use.
RATIO_GOALS = {"STANDARD": 4.0, "PERSIST_STATIC": 1.5, "PERSIST_STATIC_SMALL_H": 1.0}
PIPELINE_GOALS = {("rnn_tanh", 512): {"tokens_per_s": 2_000_000, "characters_per_s": 100_000}}
CUDNN_LAYERS = {  # one for each algorithm; the input has 128 features
    "PERSIST_STATIC_SMALL_H": ("rnn_tanh", 256, "float32"),
    "PERSIST_STATIC": ("lstm", 512, "float16"),
    "STANDARD": ("lstm", 512, "float32"),
}


def cudnn_algorithm(cell: str, hidden: int, batch: int, numbers: str, inputs: int, training: bool) -> str:
    """The algorithm that PyTorch picks for one unpacked layer (aten/src/ATen/native/cudnn/RNN.cpp, get_algo)."""
    small = (384 if cell == "rnn_tanh" else 192) if not training else (256 if cell == "rnn_tanh" else 128)
    if hidden <= small:
        return "PERSIST_STATIC_SMALL_H"
    fits = hidden <= 1024 and hidden % 128 == 0 and inputs % 128 == 0 and batch % 8 == 0 and batch <= 128
    if numbers == "float16" and cell != "gru" and fits and (cell != "rnn_tanh" or batch < 96 or hidden < 896):
        return "PERSIST_STATIC"
    return "STANDARD"


def compile_kernels(deadline: float) -> Report:
    start = time.perf_counter()
    path = build.library()
    cuda.load()
    report: Report = {"seconds": time.perf_counter() - start, "architectures": build.device_architectures()}
    return {**report, "library": path.name, "limits": _limits()}


def run_tests(folder: str, deadline: float) -> Report:
    """The tests of a folder that need a GPU; plugins and warnings are as the machine has them."""
    # The pinned configuration may ask for plugins that this machine lacks.
    options = ["-q", "--tb=short", "-m", "gpu", "-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    done = _run([sys.executable, "-m", "pytest", *options, folder], deadline)
    return {"passed": done.returncode == 0, "summary": _last_lines(done, 25)}


def run_sanitizer(deadline: float) -> Report:
    """Memcheck and racecheck over small layers of every kernel."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        return {"passed": None, "summary": "compute-sanitizer is not installed"}
    report: Report = {"passed": True}
    for left, tool in ((2, "memcheck"), (1, "racecheck")):
        program = [sys.executable, "-m", "benchmarks.gpu", "--small-layers"]
        limit = time.perf_counter() + (deadline - time.perf_counter()) / left
        done = _run([sanitizer, "--tool", tool, "--error-exitcode", "9", *program], limit)
        report[tool] = {"exit_status": done.returncode, "summary": _last_lines(done, 8)}
        report["passed"] &= done.returncode == 0
    return report


def small_layers() -> None:
    """What the sanitizer watches: each kernel once, forward and backward."""
    cuda.load()
    for kernel, numbers in itertools.product(launch.KERNELS, NUMBERS):
        blocks = {"block": 1, "cluster": 2, "grid": 2, "steps": 0}[kernel]
        plan = Plan(kernel, blocks, 8, 8)
        if kernel == "cluster" and torch.cuda.get_device_capability() < (9, 0):
            continue
        with arithmetic(numbers), launch.use_plans(plan, plan):
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
        refusal = torch.ops.rnnfast_cuda.check("rnn_tanh", hidden, 8, 1, numbers, False, _limits(), plan.team)
        report["exchange_us"][name] = refusal or _scan_step_us("rnn_tanh", hidden, 8, numbers, plan)["forward"]
    for algorithm, (cell, hidden, numbers) in CUDNN_LAYERS.items():
        assert cudnn_algorithm(cell, hidden, 32, numbers, 128, training=True) == algorithm
        with arithmetic(numbers):
            layer = getattr(nn, CELLS[cell])(128, hidden).to("cuda", NUMBERS[numbers])
            measured = _layer_step_us(layer, 32, NUMBERS[numbers])
        report["cudnn_us"][algorithm] = {"layer": f"{cell} {hidden} {numbers}", **measured}
    return report


def time_goals(deadline: float) -> Iterator[Report]:
    """The step times that were set as goals: of the scan alone, products apart."""
    for (cell, numbers), goal in GOALS.items():
        with arithmetic(numbers):
            h_0 = torch.empty(1, 32, 512, device="cuda", dtype=NUMBERS[numbers])
            plans = {way: launch.plan(h_0, cell, way == "backward") for way in ("forward", "backward")}
        measured = _scan_step_us(cell, 512, 32, numbers, None)
        goals = {"forward": goal, "backward": BACKWARD_GOAL * goal}
        row = {"cell": cell, "numbers": numbers, "plans": {way: plan._asdict() for way, plan in plans.items()}}
        yield {**row, "us_a_step": measured, "goals": goals, "of_goal": {w: measured[w] / goals[w] for w in goals}}


def run_tune(deadline: float) -> Report:
    """`rnnfast tune` with the CUDA kernels, begun again behind a kernel that broke the device; a fresh table."""
    path = table.path_of(table.identity(torch.cuda.current_device()))
    path.unlink(missing_ok=True)
    said: list[str] = []
    while (seconds := deadline - time.perf_counter()) > 5:
        done = _run([sys.executable, "-m", "benchmarks.gpu", "--tune", str(seconds - 5)], deadline)
        said += done.stdout.splitlines()
        print(done.stdout, end="", flush=True)
        if done.returncode == 0:
            break
        said += _last_lines(done, 1)
    if not path.exists():
        return {"failure": "no table was made", "said": said}
    made = table.read(path)
    wins, calls = made.wins("cuda")
    wrong = {f"{p.cell} {p.numbers} {p.hidden} {p.batch}": p.failures for p in made.points if p.failures}
    summary = f"fastest in {wins} of {calls} calls at {len(made.points)} points"
    return {
        "passed": not wrong,
        "summary": summary,
        "wrong": wrong,
        "table": json.loads(path.read_text()),
        "said": said,
    }


def run_pipeline(deadline: float) -> Iterator[Report]:
    """The chapter's training (B=32, T=35, SGD, clipping) and greedy generation at B=1, each a replayed CUDA graph."""
    for cell, hidden, backend in itertools.product(("rnn_tanh", "lstm", "gru"), (512, 256), ("cuda", "torch")):
        torch.manual_seed(0)
        model = _Model(cell, hidden, backend).cuda()
        row: Report = {"cell": cell, "hidden": hidden, "backend": backend}
        row["tokens_per_s"] = 32 * 35 / _training_step_s(model)
        row["characters_per_s"] = 1 / _character_s(model)
        goals = PIPELINE_GOALS.get((cell, hidden), {}) if backend == "cuda" else {}
        yield {**row, "of_goal": {what: row[what] / goal for what, goal in goals.items()}}


def time_grid(deadline: float) -> Iterator[Report]:
    """Whole layers beside cuDNN, most telling first; what does not fit the time is left out and counted."""
    shapes = [(32, 35), (32, 1024), (1, 128), (128, 128)]
    grid = list(itertools.product(shapes, (512, 256, 128, 1024, 64, 32, 2048), CELLS, NUMBERS))
    for left, ((batch, steps), hidden, cell, numbers) in zip(range(len(grid), 0, -1), grid, strict=True):
        if time.perf_counter() > deadline:
            yield {"left_out": left}
            return
        row: Report = {"cell": cell, "hidden": hidden, "batch": batch, "steps": steps, "numbers": numbers}
        with arithmetic(numbers):
            yield {**row, **_compare(cell, hidden, batch, steps, numbers)}


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
    return seconds_in_turns({"replay": graph.replay}, 0.3)["replay"]["median"]


def _compare(cell: str, hidden: int, batch: int, steps: int, numbers: str, inputs: int = 128) -> Report:
    """Parity with torch.nn in float64 first; then the time of the whole call, in turns with torch.nn."""
    dtype, name = NUMBERS[numbers], CELLS[cell]
    torch.manual_seed(0)
    theirs = getattr(nn, name)(inputs, hidden).to("cuda", dtype)
    ours = getattr(rnnfast, name)(inputs, hidden, backend="cuda").to("cuda", dtype)
    ours.load_state_dict(theirs.state_dict())
    h_0 = torch.empty(1, batch, hidden, device="cuda", dtype=dtype)
    row: Report = {"plans": [list(launch.plan(h_0, cell, backward)[:4]) for backward in (False, True)]}
    parity = tuning.Parity(theirs, batch, numbers)
    try:
        row.update(right=True, worst_error=max(parity.check(ours).values()))
    except (tuning.Wrong, RuntimeError) as error:
        return {**row, "right": False, "failure": str(error)}
    input = torch.randn(steps, batch, inputs, device="cuda", dtype=dtype)
    gradient = torch.randn(steps, batch, hidden, device="cuda", dtype=dtype)

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(input)

    def both(layer: nn.Module) -> None:
        output, _ = layer(input)
        torch.autograd.grad(output, list(layer.parameters()), gradient)

    for way, call in (("forward", forward), ("both", both)):
        times = seconds_in_turns({"rnnfast": partial(call, ours), "nn": partial(call, theirs)}, 0.08)
        ratio = times["nn"]["median"] / times["rnnfast"]["median"]
        algorithm = cudnn_algorithm(cell, hidden, batch, numbers, inputs, training=way == "both")
        row[way] = {**times, "ratio": ratio, "cudnn": algorithm, "of_goal": ratio / RATIO_GOALS[algorithm]}
    return row


def _scan_step_us(cell: str, hidden: int, batch: int, numbers: str, plan: Plan | None) -> dict[str, float]:
    """Microseconds a step of the scan operators alone: the slope between two lengths."""
    lengths, times = (256, 1280), []
    with arithmetic(numbers), launch.use_plans(plan, plan):
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


# Each part and the share of the time by whose end it must be done. One that gives rows gives them as they are measured.
PARTS: dict[str, tuple[Callable[[float], Any], float]] = {
    "build": (compile_kernels, 0.3),
    "tests": (partial(run_tests, "tests/cuda"), 0.45),
    "calibration": (calibrate, 0.5),
    "goals": (time_goals, 0.53),
    "tune": (run_tune, 0.67),
    "pipeline": (run_pipeline, 0.73),
    "sanitizer": (run_sanitizer, 0.85),
    "grid": (time_grid, 0.93),
    "triton_tests": (partial(run_tests, "tests/triton"), 0.99),
}
IN_THIS_PROCESS = ("tests", "tune", "sanitizer", "triton_tests")  # they start others themselves
GRACE_SECONDS = 10  # for a part to end by itself before it is stopped


def main() -> int:
    """Runs every part; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="be done by then (9)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts only")
    parser.add_argument("--output", type=Path, help="the JSON file; default: benchmarks/results/gpu-CARD.json")
    # How this program starts itself.
    parser.add_argument("--small-layers", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tune", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    reason = cuda.why_not()
    if reason is not None:
        print(f"this needs the cuda backend: {reason}", file=sys.stderr)
        return 1
    if options.small_layers:
        small_layers()
        return 0
    if options.tune is not None:
        rnnfast.tune(minutes=options.tune / 60, backends=["cuda"], report=partial(print, flush=True))
        return 0
    if options.part is not None:
        run_part(options.part, options.seconds, options.output)
        return 0

    start = time.perf_counter()
    report: Report = circumstances()
    card = report["card"].lower().replace(" ", "-")
    path = options.output or ROOT / "benchmarks" / "results" / f"gpu-{card}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, (_, share) in PARTS.items():
        if options.only and name not in ("build", *options.only):
            continue
        began = time.perf_counter()
        print(f"== {name}", flush=True)
        report[name] = _part(name, start + 60 * options.minutes * share)
        if has_failed(report[name]):
            failed.append(name)
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".txt").write_text(readable(report) + "\n")
        print(f"   {time.perf_counter() - began:.0f} s: {'FAILED' if name in failed else 'done'}", flush=True)
        if name == "build" and failed:
            break
    print(readable(report))
    print(f"written to {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _part(name: str, deadline: float) -> Any:
    """The result of a part: one that measures runs in a process of its own, which may break the device, or hang."""
    if name in IN_THIS_PROCESS:
        try:
            return PARTS[name][0](deadline)
        except Exception as error:  # a part that fails must not cost the machine time spent on the others
            return {"failure": f"{type(error).__name__}: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part.json"
        seconds = max(10.0, deadline - time.perf_counter())
        own = ["--part", name, "--seconds", str(seconds), "--output", str(output)]
        done = _run([sys.executable, "-m", "benchmarks.gpu", *own], deadline + GRACE_SECONDS)
        result: Any = json.loads(output.read_text()) if output.exists() else {}
    if done.returncode == 0:
        return result
    failure = {"failure": "\n".join(_last_lines(done, 8))}
    print(failure["failure"], flush=True)
    return [*result, failure] if isinstance(result, list) else {**result, **failure}


def run_part(name: str, seconds: float, output: Path) -> None:
    """Runs a part in this process; its result, or what rows it has so far, is in the JSON file `output`."""
    deadline = time.perf_counter() + seconds
    if name != "build":
        cuda.load()
    result = PARTS[name][0](deadline)
    rows = []
    for row in result if isinstance(result, Iterator) else ():
        rows.append(row)
        partial_file = output.with_suffix(".tmp")
        partial_file.write_text(json.dumps(rows))
        partial_file.replace(output)
    if not isinstance(result, Iterator):
        output.write_text(json.dumps(result))


def has_failed(result: Any) -> bool:
    """Whether a part failed, or a row of it did."""
    if isinstance(result, list):
        return any(row.get("right") is False or "failure" in row for row in result)
    return "failure" in result or result.get("passed") is False


def readable(report: Report) -> str:
    """The measurements as a table."""
    lines = [f"{report['card']}, driver {report['driver']}, torch {report['torch']}, commit {report['commit'][:10]}"]
    for part in ("tests", "triton_tests", "sanitizer", "tune"):
        if part in report:
            said = {True: "passed", False: "FAILED", None: "not run"}[report[part].get("passed", False)]
            summary = report[part].get("summary", report[part].get("failure", ""))
            lines.append(f"  {part}: {said}  {summary[-1] if isinstance(summary, list) and summary else summary or ''}")
    calibration = report.get("calibration", {})
    for name, us in calibration.get("exchange_us", {}).items():
        lines.append(f"  {us:7.2f} us a step: {name}" if isinstance(us, float) else f"          not run: {name}, {us}")
    for name, row in calibration.get("cudnn_us", {}).items():
        lines.append(f"  {row['forward']:7.2f} us a step: cuDNN {name} ({row['layer']}, B=32)")
    for row in _rows(report, "goals"):
        us, goals = row["us_a_step"], row["goals"]
        figures = ", ".join(f"{way} {us[way]:.2f} us (goal {goals[way]:.2f})" for way in us)
        lines.append(f"  {row['cell']} 512 B=32 {row['numbers']}: {figures}")
    for row in _rows(report, "pipeline"):
        speed = f"{row['tokens_per_s']:12,.0f} tokens/s {row['characters_per_s']:12,.0f} characters/s"
        missed = [f"{what} is {share:.0%} of its goal" for what, share in row["of_goal"].items() if share < 1]
        lines.append("  ".join([f"  {row['cell']:8} {row['hidden']} {row['backend']:5} {speed}", *missed]))
    for row in _rows(report, "grid"):
        if "left_out" in row:
            lines.append(f"  {row['left_out']} sizes were left out for lack of time")
            continue
        shape = f"{row['cell']:8} H={row['hidden']:<4} B={row['batch']:<3} T={row['steps']:<4} {row['numbers']:8}"
        if not row["right"]:
            lines.append(f"  {shape} WRONG: {row['failure']}")
            continue
        ratios = [
            f"{way} {row[way]['ratio']:6.2f}x of cuDNN{'' if row[way]['of_goal'] >= 1 else ' (below its goal)'}"
            for way in ("forward", "both")
        ]
        lines.append(f"  {shape} {row['plans'][0][0]:7} {'  '.join(ratios)}")
    return "\n".join(lines)


def _rows(report: Report, part: str) -> list[Report]:
    rows = report.get(part, [])
    return [row for row in rows if "failure" not in row or "right" in row] if isinstance(rows, list) else []


if __name__ == "__main__":
    sys.exit(main())
