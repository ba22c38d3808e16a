"""`make gpu`, as far as it goes without a GPU: what it makes of what fails, hangs, crashes or misses its goal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_report import readable

CIRCUMSTANCES = {"card": "NVIDIA H200", "driver": "580.65", "torch": "2.11.0", "commit": "0123456789abcdef"}


@pytest.mark.parametrize(
    ("cell", "hidden", "batch", "compute_type", "training", "algorithm"),
    [
        ("rnn_tanh", 384, 32, "float32", False, "PERSIST_STATIC_SMALL_H"),
        ("rnn_tanh", 384, 32, "float32", True, "STANDARD"),
        ("lstm", 192, 32, "bfloat16", False, "PERSIST_STATIC_SMALL_H"),
        ("lstm", 192, 32, "bfloat16", True, "STANDARD"),
        ("lstm", 512, 32, "float16", True, "PERSIST_STATIC"),
        ("lstm", 512, 33, "float16", True, "STANDARD"),
        ("gru", 512, 32, "float16", True, "STANDARD"),
        ("rnn_tanh", 1024, 96, "float16", True, "STANDARD"),
        ("rnn_tanh", 1024, 88, "float16", True, "PERSIST_STATIC"),
        ("lstm", 2048, 32, "float16", False, "STANDARD"),
    ],
)
def test_which_algorithm_cudnn_uses(
    cell: str, hidden: int, batch: int, compute_type: str, training: bool, algorithm: str
) -> None:
    assert gpu_parts.cudnn_algorithm(cell, hidden, batch, compute_type, 128, training) == algorithm


def test_the_command_of_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1
    assert capsys.readouterr().err == "this needs a GPU, and PyTorch sees none here\n"


# A process that works through tasks


def task(name: str, result: Any) -> gpu.Task:
    def measure() -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    return {"of": name}, measure


def test_tasks_that_fail_cost_no_others(tmp_path: Path) -> None:
    tasks = [task("a", {"us": 1}), task("b", RuntimeError("no such size")), task("c", {"us": 3})]
    gpu.work_through(tasks, time.perf_counter() + 60, 60, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {"of": "a", "us": 1},
        {"of": "b", "failure": "RuntimeError: no such size"},
        {"of": "c", "us": 3},
    ]
    assert signal.alarm(0) == 0
    gpu.work_through(tasks, time.perf_counter(), 60, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"left_out": 3}]


def test_a_task_that_breaks_the_device_ends_its_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", dead)
    tasks = [task("a", {"us": 1}), task("b", RuntimeError("CUDA error")), task("c", {"us": 3})]
    with pytest.raises(RuntimeError, match="launch failure"):
        gpu.work_through(tasks, time.perf_counter() + 60, 60, tmp_path / "rows.json")
    signal.alarm(0)
    assert [row["of"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["a", "b"]


# The process that starts it

CHILD = """
import json, os, pathlib, signal, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
rows = []
for what in BEHAVIOUR[int(given["--skip"]):]:
    if what == "never": sys.exit("cannot start")
    pathlib.Path(given["--output"]).with_suffix(".begun").write_text(str(len(rows) + 1))
    if what == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang": os.kill(os.getpid(), signal.SIGALRM)
    if what == "sleep": time.sleep(60)
    rows.append({"failure": "CUDA error"} if what in ("broken", "wrong") else {"us": what})
    pathlib.Path(given["--output"]).write_text(json.dumps(rows))
    if what == "broken":
        print("rnnfast: a block did not arrive: 1")
        sys.exit("device lost")
"""


def run_tasks(monkeypatch: pytest.MonkeyPatch, behaviour: list[Any], seconds: float) -> tuple[Any, list[Any]]:
    saved: list[Any] = []
    program = CHILD.replace("BEHAVIOUR", repr(behaviour))
    monkeypatch.setattr(gpu, "_own", lambda *arguments: [sys.executable, "-c", program, *arguments])
    part = gpu.Part(1.0, tasks=lambda: [task(f"task {i}", {}) for i in range(len(behaviour))], limit=7)
    monkeypatch.setitem(gpu.PARTS, "goals", part)
    result = gpu.run_tasks("goals", time.perf_counter() + seconds, lambda rows: saved.append(list(rows)))
    return result, saved


def test_it_goes_on_behind_what_a_process_did_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, saved = run_tasks(monkeypatch, [1, "crash", 2, "broken", "hang", 3], 60)
    assert [row.get("us") for row in rows] == [1, None, 2, None, None, 3]
    assert rows[1] == {"of": "task 1", "failure": "it ended with status -11"}
    assert rows[3] == {"failure": "CUDA error", "said": ["rnnfast: a block did not arrive: 1", "device lost"]}
    assert rows[4] == {"of": "task 4", "failure": "it took more than 7 s"}
    assert [len(r) for r in saved] == [2, 4, 5]
    assert gpu.has_failed(rows)


@pytest.mark.parametrize("end", ["crash", "hang"])
def test_no_task_is_run_again_behind_one_that_failed(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    run, starts = gpu._run, []

    def count(*arguments: Any, **options: Any) -> Any:
        starts.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(gpu, "_run", count)
    rows, _ = run_tasks(monkeypatch, ["wrong", end, 3], 60)
    assert len(starts) == 2
    assert rows[0] == {"failure": "CUDA error"}
    how = "it took more than 7 s" if end == "hang" else "it ended with status -11"
    assert rows[1] == {"of": "task 1", "failure": how}
    assert rows[2] == {"us": 3}


def test_it_gives_up_a_process_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = run_tasks(monkeypatch, ["never"] * 9, 60)
    assert rows == [{"of": f"task {i}", "failure": "cannot start"} for i in range(3)]


def test_what_was_measured_when_the_time_is_over_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    start = time.perf_counter()
    rows, saved = run_tasks(monkeypatch, [1, 2, "sleep", 3], 6.5)
    assert time.perf_counter() - start < 30
    assert rows == [{"us": 1}, {"us": 2}, {"left_out": 2, "stopped_in": {"of": "task 2"}}]
    assert [{"us": 1}, {"us": 2}] in saved  # while it ran
    assert not gpu.has_failed(rows)


def test_tuning_goes_on_behind_a_point_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = gpu.table.Identity("NVIDIA H200", "580.65", "2.11.0", {"cuda": "abc", "triton": "def"})
    monkeypatch.setattr(gpu.table, "identity", lambda device: card)
    monkeypatch.setattr(gpu.table, "path_of", lambda identity: tmp_path / "table.json")
    monkeypatch.setattr(gpu, "circumstances", lambda: {"time": "now"})
    monkeypatch.setattr(gpu.torch.cuda, "current_device", lambda: 0)
    statuses = iter([-signal.SIGALRM, 1, -signal.SIGSEGV, 0])
    monkeypatch.setattr(gpu, "_run", lambda *_, **__: subprocess.CompletedProcess([], next(statuses), "a line\n", ""))
    report = gpu.run_tune(time.perf_counter() + 60, lambda result: None)
    first, second = list(gpu.tuning.grid())[:2]
    assert [(p["cell"], p["compute_type"], p["hidden"], p["batch"]) for p in report["table"]["points"]] == [
        first,
        second,
    ]
    assert report["passed"] is False
    assert set(next(iter(report["wrong"].values())).values()) == {"it did not end, or ended the process"}


PARENT = """
import sys, time
from benchmarks import gpu
gpu._end_parts_at_signals()
child = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); time.sleep(60)"
gpu._run([sys.executable, "-c", child, sys.argv[1]], time.perf_counter() + 60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_from_outside_ends_the_part_that_runs(tmp_path: Path, number: int) -> None:
    written = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(written)], cwd=gpu.ROOT)
    _wait_until(lambda: written.exists() and written.read_text().endswith("\n"))
    part = int(written.read_text())
    assert not _has_ended(part)
    parent.send_signal(number)
    assert parent.wait(30) == (128 + number if number == signal.SIGTERM else -number)
    _wait_until(lambda: _has_ended(part))


def _has_ended(process: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def _wait_until(is_so: Any) -> None:
    end = time.perf_counter() + 60
    while not is_so():
        assert time.perf_counter() < end
        time.sleep(0.05)


@pytest.mark.parametrize("commit", ["", "0123456789abcdef"])
def test_where_the_folder_is_no_checkout_the_commit_is_told_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commit: str
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setenv("RNNFAST_COMMIT", commit)
    assert gpu.circumstances()["commit"] == commit


TESTS = """
import os, signal, pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong():
    os.write(1, b"rnnfast: a block did not arrive: 1")
    assert 1 == 2
def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)
@pytest.mark.skip
def test_left_out(): pass
def test_last(): pass
"""


def test_tests_go_on_behind_one_that_crashes(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    saved: list[Any] = []
    report = gpu.run_tests([str(tmp_path)], time.perf_counter() + 100, saved.append)
    assert report["passed"] is False
    assert report["summary"] == "1 did not end, 1 failed, 2 passed, 1 skipped"
    outcomes = {test.split("::")[1]: text for test, text in report["wrong"].items()}
    assert outcomes.keys() == {"test_wrong", "test_crash"}
    assert "assert 1 == 2" in outcomes["test_wrong"]
    assert "rnnfast: a block did not arrive: 1" in outcomes["test_wrong"]
    assert len(saved) >= 2


def test_tests_that_the_time_cuts_short_are_no_failure(tmp_path: Path) -> None:
    def summary(*outcomes: tuple[str, str], status: int | None) -> Any:
        (tmp_path / "tests.jsonl").write_text("".join(f"{json.dumps(outcome)}\n" for outcome in outcomes))
        done = None if status is None else subprocess.CompletedProcess([], status, "", "")
        report = gpu._summary_of_tests(tmp_path / "tests.jsonl", done)
        return report["passed"], report["summary"]

    ended, running, hung = ("a", "passed"), ("b", "did not end"), ("c", "did not end")
    for status in (None, gpu.STOPPED):
        assert summary(ended, running, status=status) == (None, "1 passed, then the time was over")
        assert summary(hung, running, status=status) == (False, "1 did not end, then the time was over")
    assert summary(ended, running, status=-signal.SIGALRM) == (False, "1 did not end, 1 passed")
    assert summary(ended, status=0) == (True, "1 passed")
    assert summary(ended, status=1) == (False, "1 passed")


SANITIZED = ("memcheck of cluster", "memcheck of grid", "memcheck of block", "memcheck of steps")
SANITIZED += ("racecheck of cluster", "racecheck of block", "racecheck of grid")


@pytest.mark.parametrize(
    ("statuses", "passed", "others"),
    [
        ({}, True, {}),
        ({1: 9}, False, {1: "not clean"}),
        ({0: 9, 4: gpu.STOPPED}, False, {0: "not clean", 4: "not ended in its time"}),
        ({2: gpu.STOPPED}, None, {2: "not ended in its time"}),
        ({3: 255}, False, {3: "it ended with status 255"}),
    ],
)
def test_the_sanitizer(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    statuses: dict[int, int],
    passed: bool | None,
    others: dict[int, str],
) -> None:
    nvcc, beside = tmp_path / "cuda" / "bin" / "nvcc", tmp_path / "cuda" / "bin" / "compute-sanitizer"
    nvcc.parent.mkdir(parents=True)
    link = tmp_path / "nvcc"
    nvcc.touch()
    link.symlink_to(nvcc)
    monkeypatch.setattr(gpu.build, "nvcc", lambda: str(link))
    monkeypatch.setenv("PATH", "")
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert gpu.run_sanitizer(time.perf_counter() + 60, lambda result: None) == {
            "passed": None,
            "summary": "not run: compute-sanitizer is not installed",
        }
    beside.touch()
    commands: list[list[str]] = []
    said = "\n".join(f"line {i}" for i in range(100))

    def run(command: list[str], deadline: float, environment: dict[str, str]) -> Any:
        commands.append(command)
        assert environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return subprocess.CompletedProcess(command, statuses.get(len(commands) - 1, 0), said, "")

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    report = gpu.run_sanitizer(time.perf_counter() + 60, lambda result: None)
    verdicts = [f"{check}: {others.get(i, 'clean')}" for i, check in enumerate(SANITIZED)]
    assert (report["passed"], report["summary"]) == (passed, "; ".join(verdicts))
    assert [f"{command[2]} of {command[-1]}" for command in commands] == list(SANITIZED)
    assert all(command[:2] == [str(beside), "--tool"] for command in commands)
    lines = report["memcheck grid"]["said"]
    assert (lines[0], lines[19:22], lines[-1]) == ("line 0", ["line 19", "...", "line 80"], "line 99")
    late = gpu.run_sanitizer(time.perf_counter() + 5, lambda result: None)
    assert late == {"passed": None, "summary": "; ".join(f"{check}: not run for lack of time" for check in SANITIZED)}
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (8, 0))
    report = gpu.run_sanitizer(time.perf_counter() + 60, lambda result: None)
    assert report["summary"].count("of cluster: not run, the device has no clusters") == 2
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    refusal = subprocess.CompletedProcess([], 255, "", "Error: Device not supported.")
    monkeypatch.setattr(gpu, "_run", lambda *_: refusal)
    report = gpu.run_sanitizer(time.perf_counter() + 60, lambda result: None)
    assert (report["passed"], report["summary"]) == (None, "memcheck: not run: Error: Device not supported.")


# All parts


def test_every_part_is_kept_and_one_that_raises_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(deadline: float, save: gpu.Save) -> None:
        save({"summary": "begun"})
        raise OSError("pytest is not installed")

    def build(deadline: float, save: gpu.Save) -> dict[str, Any]:
        return {"failure": "nvcc was not found"}

    parts = {
        "build": gpu.Part(0.1, run=build, backend=""),
        "tests": gpu.Part(0.2, run=broken),
        "triton_tests": gpu.Part(0.3, run=broken, backend="triton"),
        "sanitizer": gpu.Part(1.0, run=lambda deadline, save: {"passed": True}, backend="triton"),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "circumstances", lambda: dict(CIRCUMSTANCES))
    path = tmp_path / "results" / "gpu.json"
    assert gpu.run_parts(1.0, None, path) == 1
    assert json.loads(path.read_text()) == {
        **CIRCUMSTANCES,
        "build": {"failure": "nvcc was not found"},
        "tests": {"failure": "the CUDA kernels did not compile"},
        "triton_tests": {"failure": "OSError: pytest is not installed"},
        "sanitizer": {"passed": True},
    }
    assert gpu._readable({}).startswith("no table: KeyError")
    assert "triton_tests: FAILED  OSError: pytest is not installed" in path.with_suffix(".txt").read_text()
    assert gpu.run_parts(1.0, ["tests"], path) == 1  # the build failed
    path.unlink()
    assert gpu.run_parts(1.0, ["sanitizer"], path) == 0  # what is not of CUDA needs none
    assert json.loads(path.read_text()) == {**CIRCUMSTANCES, "sanitizer": {"passed": True}}


def test_parts_that_are_run_later_cost_nothing_of_those_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = dict(CIRCUMSTANCES, time="first", sources={"cuda": "a"}, uncommitted_changes=False)
    verdicts = iter([False, True, True, True])

    def run(deadline: float, save: gpu.Save) -> dict[str, Any]:
        return {"passed": next(verdicts)}

    parts = {name: gpu.Part(until, run=run, backend="triton") for name, until in (("tests", 0.5), ("sanitizer", 1.0))}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "circumstances", lambda: dict(state))
    path = tmp_path / "gpu.json"
    assert gpu.run_parts(1.0, ["tests"], path) == 1
    state |= {"time": "second", "uncommitted_changes": True}
    assert gpu.run_parts(1.0, ["sanitizer"], path) == 0
    assert json.loads(path.read_text()) == {**state, "tests": {"passed": False}, "sanitizer": {"passed": True}}
    state["sources"] = {"cuda": "b"}
    assert gpu.run_parts(1.0, ["tests"], path) == 0
    assert json.loads(path.read_text()) == {**state, "tests": {"passed": True}}
    path.write_text("{")
    assert gpu.run_parts(1.0, ["sanitizer"], path) == 0
    assert json.loads(path.read_text()) == {**state, "sanitizer": {"passed": True}}


def test_the_table_tells_what_missed_its_goal() -> None:
    times = {"ratio": 3.0, "cudnn": "STANDARD", "of_goal": 0.75}
    grid = {"cell": "lstm", "hidden": 512, "batch": 32, "steps": 35, "compute_type": "float32", "right": True}
    report = {
        **CIRCUMSTANCES,
        "build": {"seconds": 40.0},
        "tests": {"passed": True, "summary": "253 passed"},
        "sanitizer": {"passed": None, "summary": "not run: compute-sanitizer is not installed"},
        "tune": {"failure": "no table was made", "said": []},
        "calibration": [
            {"of": "cluster of 2, float32", "us": {"forward": 0.4, "backward": 0.5}},
            {"of": "cluster of 16, float32", "not_run": "the device runs no such cluster"},
            {"of": "cuDNN STANDARD", "us": {"forward": 9.5, "both": 30.0}, "layer": "lstm 512 float32, B=32"},
        ],
        "goals": [
            {
                "cell": "lstm",
                "compute_type": "tf32",
                "right": True,
                "us_a_step": {"forward": 0.9, "backward": 2.0},
                "goals": {"forward": 1.0, "backward": 1.6},
            },
            {"cell": "lstm", "compute_type": "float32", "failure": "it took more than 20 s"},
        ],
        "pipeline": [
            {
                "cell": "rnn_tanh",
                "hidden": 512,
                "backend": "cuda",
                "tokens_per_s": 1_000_000.0,
                "characters_per_s": 120_000.0,
                "of_goal": {"tokens_per_s": 0.5, "characters_per_s": 1.2},
            }
        ],
        "grid": [
            {**grid, "kernel": "cluster", "forward": {**times, "of_goal": 1.2}, "both": times},
            {**grid, "right": False, "failure": "output is off by 1.0e-01"},
            {"left_out": 12},
        ],
        "triton": "3.6.0",
        "triton_grid": [{**grid, "kernel": "gates", "forward": {"ratio": 0.5}, "both": {"ratio": 0.7}}],
    }
    text = readable(report)
    for line in (
        "NVIDIA H200, driver 580.65, torch 2.11.0, commit 0123456789",
        "build: done",
        "tests: passed  253 passed",
        "sanitizer: not run: compute-sanitizer is not installed",
        "tune: FAILED  no table was made",
        "us a step of cluster of 2, float32: forward 0.40, backward 0.50",
        "not run: cluster of 16, float32, the device runs no such cluster",
        "us a step of cuDNN STANDARD (lstm 512 float32, B=32): forward 9.50, both 30.00",
        "lstm 512 B=32 tf32: forward 0.90 us (goal 1.00), backward 2.00 us (goal 1.60)",
        "FAILED: lstm float32 it took more than 20 s",
        "1,000,000 tokens/s      120,000 characters/s  tokens_per_s is 50% of its goal",
        "cluster   forward   3.00x of cuDNN  both   3.00x of cuDNN (below its goal)",
        "output is off by 1.0e-01",
        "12 measurements were left out for lack of time",
        "gates     forward   0.50x of cuDNN  both   0.70x of cuDNN",
    ):
        assert line in text
    assert [name for name in gpu.PARTS if name in report and gpu.has_failed(report[name])] == ["goals", "tune", "grid"]


def test_the_parts_fit_into_the_time() -> None:
    shares = [part.until for part in gpu.PARTS.values()]
    assert shares == sorted(shares)
    # A part may run over by its grace and the time that the driver takes to let go of it, and the whole ends within ten
    # minutes all the same.
    assert 9 * 60 * shares[-1] + 2 * gpu.GRACE_SECONDS < 600
    assert all((part.run is None) == (part.limit > 0) for part in gpu.PARTS.values())


def test_chosen_parts_have_all_the_time() -> None:
    assert gpu.shares_of_time(list(gpu.PARTS)) == pytest.approx({name: part.until for name, part in gpu.PARTS.items()})
    assert gpu.shares_of_time(["triton_tests"]) == pytest.approx({"triton_tests": 0.99})
    of_triton = gpu.shares_of_time(["triton_tests", "triton_grid"])  # with six and ten hundredths of their own
    assert list(of_triton) == ["triton_grid", "triton_tests"]
    assert of_triton == pytest.approx({"triton_grid": 0.99 * 6 / 16, "triton_tests": 0.99})
    assert list(gpu.shares_of_time(["grid", "triton_grid"])) == ["build", "grid", "triton_grid"]


def test_the_tasks_are_named() -> None:
    for part in gpu.PARTS.values():
        labels = [json.dumps(label) for label, _ in part.tasks()]
        assert len(set(labels)) == len(labels)
