"""`make gpu`, as far as it goes without a GPU: what it makes of parts that fail, hang or miss their goals."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

CIRCUMSTANCES = {"card": "NVIDIA H200", "driver": "580.65", "torch": "2.11.0", "commit": "0123456789abcdef"}


@pytest.mark.parametrize(
    ("cell", "hidden", "batch", "numbers", "training", "algorithm"),
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
    cell: str, hidden: int, batch: int, numbers: str, training: bool, algorithm: str
) -> None:
    assert gpu.cudnn_algorithm(cell, hidden, batch, numbers, 128, training) == algorithm


def test_the_command_of_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    monkeypatch.setattr(gpu.cuda, "why_not", lambda: "no CUDA device is visible to PyTorch")
    assert gpu.main() == 1
    captured = capsys.readouterr()
    assert captured.err == "this needs the cuda backend: no CUDA device is visible to PyTorch\n"


def test_what_was_measured_before_a_failure_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rows(deadline: float) -> Iterator[dict[str, Any]]:
        yield {"right": True}
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(gpu.cuda, "load", lambda: None)
    monkeypatch.setitem(gpu.PARTS, "grid", (rows, 1.0))
    with pytest.raises(RuntimeError, match="launch failure"):
        gpu.run_part("grid", 1.0, tmp_path / "part.json")
    assert json.loads((tmp_path / "part.json").read_text()) == [{"right": True}]


@pytest.mark.parametrize(
    ("program", "failure"),
    [
        ("raise SystemExit('a kernel has failed')", "a kernel has failed"),
        ("import time; time.sleep(60)", "stopped after 5 s"),
    ],
)
def test_a_part_that_fails_or_hangs_costs_no_other(monkeypatch: pytest.MonkeyPatch, program: str, failure: str) -> None:
    original = gpu._run

    def run(command: list[str], deadline: float) -> Any:
        output = Path(command[command.index("--output") + 1])
        write = f"import pathlib; pathlib.Path({str(output)!r}).write_text('[{{\"right\": true}}]'); "
        return original([sys.executable, "-c", write + program], deadline)

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0)
    start = time.perf_counter()
    result = gpu._part("grid", start)
    assert time.perf_counter() - start < 30
    assert result[0] == {"right": True}
    assert result[1]["failure"].splitlines()[-1] == failure
    assert gpu.has_failed(result)
    assert gpu._rows({"grid": result}, "grid") == [{"right": True}]


def test_a_part_of_this_process_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(deadline: float) -> None:
        raise OSError("pytest is not installed")

    monkeypatch.setitem(gpu.PARTS, "tests", (broken, 1.0))
    assert gpu._part("tests", 0.0) == {"failure": "OSError: pytest is not installed"}


def test_the_table_tells_what_missed_its_goal() -> None:
    times = {"ratio": 3.0, "cudnn": "STANDARD", "of_goal": 0.75}
    grid = {"cell": "lstm", "hidden": 512, "batch": 32, "steps": 35, "numbers": "float32", "right": True}
    report = {
        **CIRCUMSTANCES,
        "tests": {"passed": True, "summary": ["...", "253 passed"]},
        "sanitizer": {"passed": None, "summary": "compute-sanitizer is not installed"},
        "tune": {"failure": "no table was made", "said": []},
        "calibration": {
            "exchange_us": {"cluster of 2, float32": 0.4, "cluster of 16, float32": "the device runs no such cluster"},
            "cudnn_us": {"STANDARD": {"layer": "lstm 512 float32", "forward": 9.5, "both": 30.0}},
        },
        "goals": [
            {
                "cell": "lstm",
                "numbers": "tf32",
                "us_a_step": {"forward": 0.9, "backward": 2.0},
                "goals": {"forward": 1.0, "backward": 1.6},
            },
            {"failure": "stopped after 9 s"},
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
            {**grid, "plans": [["cluster", 8, 4, 16]] * 2, "forward": {**times, "of_goal": 1.2}, "both": times},
            {**grid, "right": False, "failure": "output is off by 1.0e-01"},
            {"left_out": 12},
        ],
    }
    text = gpu.readable(report)
    for line in (
        "NVIDIA H200, driver 580.65, torch 2.11.0, commit 0123456789",
        "tests: passed  253 passed",
        "sanitizer: not run  compute-sanitizer is not installed",
        "tune: FAILED  no table was made",
        "not run: cluster of 16, float32, the device runs no such cluster",
        "9.50 us a step: cuDNN STANDARD (lstm 512 float32, B=32)",
        "lstm 512 B=32 tf32: forward 0.90 us (goal 1.00), backward 2.00 us (goal 1.60)",
        "1,000,000 tokens/s      120,000 characters/s  tokens_per_s is 50% of its goal",
        "forward   3.00x of cuDNN  both   3.00x of cuDNN (below its goal)",
        "WRONG: output is off by 1.0e-01",
        "12 sizes were left out for lack of time",
    ):
        assert line in text
    assert [name for name in gpu.PARTS if name in report and gpu.has_failed(report[name])] == ["goals", "tune", "grid"]


def test_the_parts_fit_into_the_time() -> None:
    shares = [share for _, share in gpu.PARTS.values()]
    assert shares == sorted(shares)
    # Each may run over by its grace, and the whole ends within ten minutes all the same.
    assert 9 * 60 * shares[-1] + gpu.GRACE_SECONDS < 600
