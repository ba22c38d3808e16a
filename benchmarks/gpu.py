"""All that a GPU is needed for, in one command and under ten minutes: `make gpu`, or

    python -m benchmarks.gpu [--minutes 9] [--only PART ...] [--output benchmarks/results/FILE.json]

It compiles the CUDA kernels, measures the step times that are goals, runs `pytest -m gpu`, makes the table that `auto`
follows (`rnnfast tune`), runs training and generation with CUDA graphs, measures the latency of each exchange and of
cuDNN's three algorithms, times layers on CUDA and on Triton beside cuDNN (TF32 off and on) after holding them against
it in float64, and runs compute-sanitizer over small layers: what tells most comes first. Each part has a time of its
own and runs in a process of its own, which goes on behind a measurement that crashes, hangs or breaks the device. The
JSON holds what was measured within seconds, also if the command itself is ended; a failure makes the exit status 1. A
readable table is written beside it. Where the CUDA kernels do not compile, what needs only Triton is run. Needs torch
with CUDA, nvcc, a C++ compiler and pytest; no network.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rnnfast
from benchmarks import gpu_parts
from benchmarks.gpu_parts import Report, Task
from benchmarks.gpu_report import outcomes_of_tests, readable
from rnnfast import table, tuning
from rnnfast.backends import cuda
from rnnfast.backends.cuda import build
from rnnfast.table import Point, Table

ROOT = Path(__file__).resolve().parents[1]
Save = Callable[[Any], None]  # keeps what a part has so far


# ---- parts: each is given the time by which it must be done, and may save what it has so far -----------------------


def compile_kernels(deadline: float, save: Save) -> Report:
    """Compiles the CUDA kernels for this device."""
    start = time.perf_counter()
    done = _run(_own("--build"), deadline)
    report = {"seconds": time.perf_counter() - start, "architectures": build.device_architectures()}
    if done.returncode:
        return {**report, "failure": "\n".join(_last_lines(done, 12))}
    return {**report, **json.loads(done.stdout.splitlines()[-1])}


def run_tests(paths: Sequence[str], deadline: float, save: Save) -> Report:
    """The tests of files and folders that need a GPU; plugins and warnings are as the machine has them."""
    # The pinned configuration may ask for plugins that this machine lacks.
    options = ["-q", "--tb=short", "-m", "gpu", "-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    options.append("--continue-on-collection-errors")  # a file may need a package that is not here
    command = [sys.executable, "-m", "pytest", *options, "-p", "benchmarks.gpu_pytest", *paths]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tests.jsonl"
        known = -1
        while True:
            done = _run(
                command, deadline, {"RNNFAST_GPU_TESTS": str(file)}, lambda: save(_summary_of_tests(file, None))
            )
            report = _summary_of_tests(file, done)
            save(report)
            tests = len(outcomes_of_tests(file))
            # Where it was ended by a test that it did not survive, it goes on behind that.
            if done.returncode in (0, ENDED_WITH_FAILURES, NO_TESTS) or tests == known:
                return report
            if time.perf_counter() > deadline - STARTING_SECONDS:
                return report
            known = tests


def _summary_of_tests(file: Path, done: subprocess.CompletedProcess[str] | None) -> Report:
    """`done` is None while they run. What the end of the time left undone is no failure, and no success either."""
    outcomes = outcomes_of_tests(file)
    unfinished = done is None or done.returncode == STOPPED
    if unfinished and list(outcomes.values())[-1:] == ["did not end"]:
        outcomes.popitem()  # the test that was running
    counts = Counter(text.split(":")[0] for text in outcomes.values())
    wrong = {test: text for test, text in outcomes.items() if text not in ("passed", "skipped")}
    summary = ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "no test ran"
    summary += ", then the time was over" if unfinished else ""
    passed = False if wrong else None if unfinished else done is not None and done.returncode == 0
    report: Report = {"passed": passed, "summary": summary, "wrong": wrong}
    return report if passed or done is None else {**report, "said": _last_lines(done, 8)}


def run_tune(deadline: float, save: Save) -> Report:
    """`rnnfast tune` with the CUDA kernels, begun again behind one that breaks the device or hangs; a fresh table."""
    identity = table.identity(torch.cuda.current_device())
    path = table.path_of(identity)
    path.unlink(missing_ok=True)
    said: list[str] = []

    def so_far() -> Report:
        if not path.exists():
            return {"failure": "no table was made", "said": said}
        made = table.read(path)
        wins, calls = made.wins("cuda")
        wrong = {f"{p.cell} {p.compute_type} {p.hidden} {p.batch}": p.failures for p in made.points if p.failures}
        summary = f"fastest in {wins} of {calls} calls at {len(made.points)} points"
        content = json.loads(path.read_text())
        return {"passed": not wrong, "summary": summary, "wrong": wrong, "table": content, "said": said}

    while deadline - time.perf_counter() > 5:
        done = _run(_own("--tune", _at(deadline - 5)), deadline, meanwhile=partial(_save_now, save, so_far))
        said += dict.fromkeys(done.stdout.splitlines())  # each thread of a kernel that fails says so
        if done.returncode == 0:
            break
        said += _last_lines(done, 1)
        if done.returncode < 0 and "the time is over" not in done.stdout:  # else it ended in no point
            _leave_out_next_point(identity, path)
    return so_far()


def _leave_out_next_point(identity: table.Identity, path: Path) -> None:
    """The point that tuning did not get past, as one where nothing is right."""
    points = table.read(path).points if path.exists() else []
    done = {(p.cell, p.compute_type, p.hidden, p.batch) for p in points}
    stuck = next((key for key in tuning.grid() if key not in done), None)
    if stuck is not None:
        points.append(Point(*stuck, failures={"cuda": "it did not end, or ended the process"}))
        Table(identity, points, circumstances()["time"]).write(path)


def run_sanitizer(deadline: float, save: Save) -> Report:
    """Memcheck and racecheck over small layers, each with a verdict: what one does wrong hides no other."""
    beside_nvcc = Path(build.nvcc() or "").resolve().with_name("compute-sanitizer")
    places = (shutil.which("compute-sanitizer"), beside_nvcc, "/usr/local/cuda/bin/compute-sanitizer")
    sanitizer = next((str(place) for place in places if place is not None and Path(place).exists()), None)
    if sanitizer is None:
        return {"passed": None, "summary": "not run: compute-sanitizer is not installed"}
    # Our kernels alone, in the program itself. That the device forms no cluster of some size is an answer, no error.
    options = [
        "--error-exitcode",
        str(NOT_CLEAN),
        "--kernel-name",
        "kernel_substring=rnnfast",
        "--target-processes",
        "application-only",
    ]
    report: Report = {"passed": True, "summary": ""}
    for left, (tool, kernel) in zip(range(len(SANITIZED), 0, -1), SANITIZED, strict=True):
        now = time.perf_counter()
        if kernel == "cluster" and torch.cuda.get_device_capability() < (9, 0):
            found = "not run, the device has no clusters"
        elif deadline - now < STARTING_SECONDS:
            found, report["passed"] = "not run for lack of time", report["passed"] and None
        else:
            limit = min(deadline, now + max(SECONDS_A_CHECK, (deadline - now) / left))
            more = ["--report-api-errors", "no"] if tool == "memcheck" else []
            command = [sanitizer, "--tool", tool, *options, *more, *_own("--small-layers", kernel)]
            done = _run(command, limit, UNCACHED)
            report[f"{tool} {kernel}"] = {"exit_status": done.returncode, "said": _ends(done, 20)}
            refusal = next((line for line in _lines(done) if "device not supported" in line.lower()), None)
            if refusal is not None and done.returncode not in (0, NOT_CLEAN, STOPPED):
                report["passed"] = report["passed"] and None
                report["summary"] += f"{'; ' if report['summary'] else ''}{tool}: not run: {refusal}"
                return report
            if done.returncode == STOPPED:
                found, report["passed"] = "not ended in its time", report["passed"] and None
            elif done.returncode:
                # Any other status is the program's, or of a sanitizer that cannot run here: no verdict on the kernel.
                found = "not clean" if done.returncode == NOT_CLEAN else f"it ended with status {done.returncode}"
                report["passed"] = False
            else:
                found = "clean"
        report["summary"] += f"{'; ' if report['summary'] else ''}{tool} of {kernel}: {found}"
        save(report)
    return report


def run_tasks(name: str, deadline: float, save: Save) -> list[Report]:
    """The rows of a part that consists of tasks. Its process is begun again behind a task that it did not survive."""
    rows: list[Report] = []
    starts_in_vain = 0
    while True:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "rows.json"
            before = list(rows)

            def so_far(output: Path = output, before: list[Report] = before) -> list[Report]:
                return [*before, *(json.loads(output.read_text()) if output.exists() else [])]

            own = _own("--part", name, "--until", _at(deadline), "--skip", str(len(rows)), "--output", str(output))
            done = _run(own, deadline + GRACE_SECONDS, meanwhile=partial(_save_now, save, so_far))
            rows = so_far()
            begun = len(before) + (int(_begun(output).read_text()) if _begun(output).exists() else 0)
        tasks = PARTS[name].tasks()
        if done.returncode == 0:
            return rows
        took_too_long, nothing = -done.returncode == signal.SIGALRM, len(rows) == len(before)
        if done.returncode == STOPPED and len(rows) < len(tasks):
            rows.append({"left_out": len(tasks) - len(rows), "stopped_in": tasks[len(rows)][0]})
        elif nothing or begun > len(rows):  # it ended in a task
            why = f"it took more than {PARTS[name].limit} s" if took_too_long else "\n".join(_last_lines(done, 8))
            rows.append({**tasks[len(rows)][0], "failure": why or f"it ended with status {done.returncode}"})
        else:  # behind one that failed; a kernel's own words, which the row does not have
            rows[-1]["said"] = _ends(done, 8)
        save(rows)
        # A process that cannot even start fails the same way every time.
        starts_in_vain = starts_in_vain + 1 if nothing and not took_too_long else 0
        is_over = done.returncode == STOPPED or time.perf_counter() > deadline - STARTING_SECONDS
        if len(rows) >= len(tasks) or starts_in_vain > 2 or is_over:
            return rows


def work_through(tasks: list[Task], deadline: float, limit: int, output: Path) -> None:
    """Runs tasks in this process, and has the rows in the file `output` after each, and how many are begun beside it.

    A task that takes more than `limit` seconds ends the process: one that waits for a kernel hears nothing else. So
    does a task that has broken the device, after its row was written.
    """
    rows: list[Report] = []
    for left, (label, measure) in zip(range(len(tasks), 0, -1), tasks, strict=True):
        if time.perf_counter() > deadline:
            rows.append({"left_out": left})
            _replace(output, json.dumps(rows))
            return
        _replace(_begun(output), str(len(rows) + 1))
        signal.alarm(limit if rows else limit + STARTING_SECONDS)  # cuBLAS and cuDNN are loaded by the first
        try:
            rows.append({**label, **measure()})
        except Exception as error:  # a measurement that fails is a row that says so, and costs no other
            rows.append({**label, "failure": f"{type(error).__name__}: {error}"[:2000]})
        _replace(output, json.dumps(rows))
        if "failure" in rows[-1] and torch.cuda.is_available():
            torch.cuda.synchronize()
        signal.alarm(0)


def _begun(output: Path) -> Path:
    return output.with_suffix(".begun")


class Part(NamedTuple):
    """A part of the run: `until` is the share of the time by whose end it must be done.

    It has `run`, or `tasks` that take `limit` seconds each at the most, on the `backend`.
    """

    until: float
    run: Callable[[float, Save], Any] | None = None
    tasks: Callable[[], list[Task]] = list
    limit: int = 0
    backend: str = "cuda"


PARTS = {
    "build": Part(0.22, run=compile_kernels, backend=""),
    "goals": Part(0.27, tasks=gpu_parts.goals, limit=20),
    "tests": Part(0.43, run=partial(run_tests, ("tests/cuda", "tests/test_sequences.py", "tests/test_autocast.py"))),
    "tune": Part(0.53, run=run_tune),
    "pipeline": Part(0.58, tasks=gpu_parts.pipeline, limit=20),
    "calibration": Part(0.62, tasks=gpu_parts.calibration, limit=20),
    "grid": Part(0.68, tasks=partial(gpu_parts.grid, "cuda"), limit=30),
    "triton_grid": Part(0.74, tasks=partial(gpu_parts.grid, "triton"), limit=60, backend="triton"),
    "triton_tests": Part(0.84, run=partial(run_tests, ("tests/triton",)), backend="triton"),
    "sanitizer": Part(0.99, run=run_sanitizer),
}
PR_SET_PDEATHSIG = 1  # Linux's
STOPPED = 124  # the status of a program whose time was over
NOT_CLEAN = 9  # of a sanitizer that has found something
# Torch keeps tensors side by side in large blocks, within which memcheck would see no access beyond a tensor.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
ENDED_WITH_FAILURES, NO_TESTS = 1, 5  # pytest's
GRACE_SECONDS = 10  # for a process to end by itself before it is stopped
STARTING_SECONDS = 15  # too little time to begin again
SECONDS_A_CHECK = 25  # a sanitizer's, of one kernel, even if others are then left out: much of it is the start
# What exchanges most comes first. Racecheck looks at shared memory, of which the kernel of one step has none.
SANITIZED = [
    *(("memcheck", kernel) for kernel in ("cluster", "grid", "block", "steps")),
    *(("racecheck", kernel) for kernel in ("cluster", "block", "grid")),
]


# ---- the command ---------------------------------------------------------------------------------------------------


def main() -> int:
    """Runs every part; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="be done by then (9)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts, which then have all the time")
    parser.add_argument("--output", type=Path, help="the JSON file; default: benchmarks/results/gpu-CARD.json")
    # How this program starts itself.
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--small-layers", help=argparse.SUPPRESS)
    parser.add_argument("--tune", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build or options.small_layers or options.tune is not None or options.part is not None:
        _end_with_parent()  # which may be the sanitizer
    if not torch.cuda.is_available():
        print("this needs a GPU, and PyTorch sees none here", file=sys.stderr)
        return 1
    if options.build:
        path = build.library()
        cuda.load()
        print(json.dumps({"library": path.name, "limits": gpu_parts.limits()}))
    elif options.small_layers:
        gpu_parts.small_layers(options.small_layers)
    elif options.tune is not None:
        _tune(options.tune)
    elif options.part is not None:
        deadline = time.perf_counter() + options.until - time.time()
        part = PARTS[options.part]
        gpu_parts.load(part.backend)
        work_through(part.tasks()[options.skip :], deadline, part.limit, options.output)
    else:
        _end_parts_at_signals()
        return run_parts(options.minutes, options.only, options.output)
    return 0


def run_parts(minutes: float, only: list[str] | None, output: Path | None) -> int:
    """Runs the parts in turn; what they give is in the JSON file from the moment they have it.

    Where only some are run, what the file has of the others under the same circumstances stays.
    """
    start = time.perf_counter()
    report: Report = circumstances()
    path = output or ROOT / "benchmarks" / "results" / f"gpu-{report['card'].lower().replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report |= _measured_before(path, report) if only else {}
    failed = []

    def save(name: str, result: Any) -> None:
        report[name] = result
        _replace(path, json.dumps(report, indent=1) + "\n")
        _replace(path.with_suffix(".txt"), _readable(report) + "\n")

    for name, until in shares_of_time(only or list(PARTS)).items():
        part = PARTS[name]
        began = time.perf_counter()
        print(f"== {name}", flush=True)
        deadline = start + 60 * minutes * until
        if part.backend == "cuda" and "build" in failed:
            result: Any = {"failure": "the CUDA kernels did not compile"}
        else:
            result = _guarded(name, part, deadline, partial(save, name))
        save(name, result)
        if has_failed(result):
            failed.append(name)
        print(f"   {time.perf_counter() - began:.0f} s: {'FAILED' if name in failed else 'done'}", flush=True)
    print(_readable(report))
    print(f"written to {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def _measured_before(path: Path, now: Report) -> Report:
    """The parts in the file, if it is of the same code on the same machine."""
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    changing = ("time", "uncommitted_changes")  # the file itself may be such a change
    same = all(before.get(name) == value for name, value in now.items() if name not in changing)
    return {name: result for name, result in before.items() if name in PARTS} if same else {}


def shares_of_time(only: Sequence[str]) -> dict[str, float]:
    """By which share of the time each of these parts must be done, in their order, and the build that they may need.

    The time of parts that are left out goes to these, in proportion.
    """
    needs_build = any(PARTS[name].backend == "cuda" for name in only)
    begin, widths = 0.0, {}
    for name, part in PARTS.items():
        if name in only or (name == "build" and needs_build):
            widths[name] = part.until - begin
        begin = part.until
    ends = itertools.accumulate(widths.values())
    return {name: begin * end / sum(widths.values()) for name, end in zip(widths, ends, strict=True)}


def _readable(report: Report) -> str:
    try:
        return readable(report)
    except Exception as error:  # a table that cannot be made must not cost a measurement
        return f"no table: {type(error).__name__}: {error}"


def _guarded(name: str, part: Part, deadline: float, save: Save) -> Any:
    try:
        return part.run(deadline, save) if part.run is not None else run_tasks(name, deadline, save)
    except Exception as error:  # a part that fails must not cost the machine time spent on the others
        return {"failure": f"{type(error).__name__}: {error}"}


def has_failed(result: Any) -> bool:
    """Whether a part failed, or a row of it did."""
    if isinstance(result, list):
        return any("failure" in row for row in result)
    return "failure" in result or result.get("passed") is False


def circumstances() -> Report:
    """The card, driver, versions and commit that the figures belong to."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
        except OSError:  # the program is not installed
            return ""

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": said("git", "rev-parse", "HEAD") or os.environ.get("RNNFAST_COMMIT", ""),
        "uncommitted_changes": bool(said("git", "status", "--porcelain", "--untracked-files=no")),
        "sources": table.sources(),
        "card": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
    }


def _tune(until: float) -> None:
    """Tunes in this process, until that time, which a point that takes too long ends."""

    def report(line: str) -> None:
        signal.alarm(30)
        print(line, flush=True)

    signal.alarm(60)  # the library is loaded, and cuDNN
    rnnfast.tune(minutes=(until - time.time()) / 60, backends=["cuda"], report=report)
    signal.alarm(0)


def _end_parts_at_signals() -> None:
    """Has an end from outside raise SystemExit, so that the part that runs is ended too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def _end_with_parent() -> None:
    """Has Linux kill this process when its parent ends, however that ends: it would disturb what is measured next."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _ending_with_parent(command: list[str]) -> list[str]:
    """A command that does the same and becomes `command`. (A preexec_fn would fork, which threads may not survive.)"""
    if sys.platform != "linux":
        return command
    asks = f"import ctypes, os, sys; ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})"
    return [sys.executable, "-ISc", f"{asks}; os.execvp(sys.argv[1], sys.argv[1:])", *command]


def _at(deadline: float) -> str:
    """A time of this process's clock as another process takes it: what it takes to start is then in it."""
    return str(time.time() + deadline - time.perf_counter())


def _own(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *arguments]


def _run(
    command: list[str],
    deadline: float,
    environment: dict[str, str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program, until the deadline at most, and calls `meanwhile` every few seconds."""
    limit = max(5.0, deadline - time.perf_counter())
    end = time.perf_counter() + limit
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    env = {**os.environ, **(environment or {})}
    # A group of its own, to be stopped together with what it has started.
    process = subprocess.Popen(_ending_with_parent(command), cwd=ROOT, env=env, start_new_session=True, **pipes)
    try:
        while time.perf_counter() < end:
            try:
                out, err = process.communicate(timeout=max(0.1, min(5.0, end - time.perf_counter())))
                return subprocess.CompletedProcess(command, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                meanwhile()
        os.killpg(process.pid, signal.SIGKILL)
        try:
            out, err = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # the driver has not let go of it
            out, err = "", "it could not be stopped"
        return subprocess.CompletedProcess(command, STOPPED, out, f"{err}\nstopped after {limit:.0f} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _save_now(save: Save, so_far: Callable[[], Any]) -> None:
    save(so_far())


def _replace(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text)
    aside.replace(path)


def _lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return (done.stdout + done.stderr).strip().splitlines()


def _last_lines(done: subprocess.CompletedProcess[str], count: int) -> list[str]:
    return _lines(done)[-count:]


def _ends(done: subprocess.CompletedProcess[str], count: int) -> list[str]:
    """The first and the last lines: the first error tells most, and a sanitizer's last line how many there are."""
    lines = _lines(done)
    return lines if len(lines) <= 2 * count else [*lines[:count], "...", *lines[-count:]]


if __name__ == "__main__":
    sys.exit(main())
