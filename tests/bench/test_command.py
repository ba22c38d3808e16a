"""The `bench` verb: the ratios it prints, the files it writes, and what it says to a wrong option."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rnnfast import cli, files
from rnnfast.bench import command
from rnnfast.bench.measure import Limits, sample
from rnnfast.bench.presets import FLAGS, PRESETS, cases
from rnnfast.bench.report import OURS, TORCH, Report, Row


def row(label: str, ours: float, **others: float) -> Row:
    names = {"nn": TORCH, "ort": "onnxruntime", "jax": "jax"}
    samples = {OURS: sample([ours])} | {names[name]: sample([value]) for name, value in others.items()}
    return Row(label, {}, "cpu", samples, flops=1e9, limits=Limits(4.0, None))


def test_ratios_and_their_summary() -> None:
    report = Report("x", "a title", [row("a", 1.0, nn=4.0, ort=2.0), row("b", 0.5, nn=0.5, ort=1.0)])
    assert [r.ratio(TORCH) for r in report.rows] == [4.0, 1.0]
    assert [r.best_peer for r in report.rows] == ["onnxruntime", TORCH]
    assert [r.gflops for r in report.rows] == [1.0, 2.0]
    assert [r.share for r in report.rows] == [0.25, 0.5]
    summary = report.summary()
    assert summary[f"ratio to {TORCH}"]["geometric_mean"] == pytest.approx(2.0)
    assert summary[f"ratio to {TORCH}"]["worst"] == 1.0
    assert summary[f"ratio to {TORCH}"]["worst_at"] == "b"
    assert summary["ratio to the best peer"]["geometric_mean"] == pytest.approx((2.0 * 1.0) ** 0.5)
    assert summary["share of FMA peak"]["worst_at"] == "a"


def test_the_commit_is_not_another_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment may lie in a checkout that does not track it."""
    package = tmp_path / "environment" / "rnnfast"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(command.rnnfast, "__file__", str(package / "__init__.py"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert command.commit() is None
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    found = command.commit()
    assert found is not None
    assert found.endswith("-dirty")


def test_a_single_peer_is_not_the_best_of_any() -> None:
    report = Report("x", "a title", [row("a", 1.0, nn=4.0)])
    assert report.rows[0].best_peer is None
    assert report.series().keys() == {TORCH}
    assert "best peer" not in report.table()


def test_the_table_has_a_line_a_case() -> None:
    lines = Report("x", "a title", [row("a", 1.0, nn=4.0), row("b", 1.0, nn=2.0, jax=3.0)]).table().splitlines()
    assert lines[0].split("  ")[0] == "case"
    assert lines[1].split() == ["a", "4.00x", "-", "-", "1.0", "25%", "cpu", "±0%"]
    assert lines[2].split() == ["b", "2.00x", "3.00x", "2.00x", TORCH, "1.0", "25%", "cpu", "±0%"]
    assert len(set(map(len, lines))) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_benchmark_has_cases_with_labels_of_their_own(name: str) -> None:
    grid = PRESETS[name].grid
    labels = [label for label, _ in cases(grid)]
    assert len(set(labels)) == len(labels) > 0
    assert 0 < len(cases(grid.quick())) <= len(labels)
    assert grid.measures in FLAGS
    assert FLAGS[grid.measures] <= command.HELP.keys()


def run_bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["bench", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.usefixtures("matplotlib")
def test_json_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results" / "x.json"
    monkeypatch.setattr(command, "copy_bandwidth", lambda: 12.5)  # a quarter of a gigabyte is not for a test
    small = ("--cells", "gru", "--hidden-sizes", "8", "--batches", "2", "--steps", "3", "--seconds", "0.01")
    status, printed, _ = run_bench(capsys, "layers", *small, "--backend", "reference", "--out", str(out))
    assert status == 0
    assert "gru H=8 B=2 T=3 fwd+bwd" in printed
    assert "ratio to torch.nn: geometric mean" in printed
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    record: dict[str, Any] = json.loads(out.read_text())
    assert record.keys() == {"format", "commit", "date", "command", "machine", "benchmarks"}
    machine = record["machine"]
    assert {"cpu", "cores", "torch", "torch_threads", "fma_peak_gflops", "copy_bandwidth_gb_s"} <= machine.keys()
    assert machine["copy_bandwidth_gb_s"] == 12.5
    (only,) = record["benchmarks"]["layers"]["rows"]
    assert only["case"]["hidden_size"] == 8
    assert only["backend"] == "reference"
    assert only["unit"] == "seconds"
    ours, theirs = only["samples"][OURS], only["samples"][TORCH]
    assert 0 < ours["lower"] <= ours["median"] <= ours["upper"]
    assert ours["turns"] >= 3
    assert only["ratios"][TORCH] == pytest.approx(theirs["median"] / ours["median"])
    assert record["benchmarks"]["layers"]["summary"][f"ratio to {TORCH}"]["points"] == 1


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    Report("x", "a title", [row("a", 1.0, nn=4.0)]).plot(tmp_path / "x.png")
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonesuch"], "no benchmark is called nonesuch: choose from scan, layers"),
        (["layers", "--cells", "transformer"], "--cells"),
        (["layers", "--hidden-sizes", "0"], "--hidden-sizes must be positive"),
        (["layers", "--seconds", "-1"], "--seconds must be positive"),
        (["layers", "--backend", "nonesuch"], "unknown rnnfast backend 'nonesuch'"),
        (["layers", "--threads", "0"], "--threads must be positive, and at most 1,024"),
        (["layers", "--threads", "100000000"], "--threads must be positive, and at most 1,024"),
        (["scan", "--packed"], "bench scan has no use for --packed"),
        (["generation", "--batches", "2"], "bench generation has no use for --batches"),
    ],
)
def test_a_wrong_option_gets_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run_bench(capsys, *arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err


def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    status, out, err = run_bench(capsys, "layers", "--out", str(tmp_path / "file" / "x.json"))
    assert status == 2
    assert "cannot write" in err
    assert "case" not in out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder", "cannot write folder: it is a folder or a device; give the name of a file"),
        ("", "cannot write .: it is a folder"),
        ("pipe.json", "cannot write pipe.json: it is a folder or a device"),
        ("chart.json", "cannot write chart.png: it is a folder"),
        ("new/x.png", "new/x.png is where the chart goes: give the JSON file another name, such as x.json"),
        ("x.png", "x.png is where the chart goes: give the JSON file another name, such as x.json"),
        ("x" * 250 + ".json", "xxx.json: File name too long; choose another place"),
        ("~nosuch/x.json", "begins with a home folder that cannot be found"),
    ],
)
def test_a_file_that_cannot_be_written_is_found_out_first(
    out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "machine", lambda: pytest.fail("it began to measure"))
    for folder in ("folder", "chart.png"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    before = set(tmp_path.iterdir())
    status, _, err = run_bench(capsys, "layers", "--quick", "--out", out)
    assert status == 2
    assert message in err
    assert err.count("error:") == 1
    assert set(tmp_path.iterdir()) == before


def test_a_folder_without_permission_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:  # root, who may run the tests, may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(command, "machine", lambda: pytest.fail("it began to measure"))
    monkeypatch.setattr(files, "_temporary", refuse)
    status, _, err = run_bench(capsys, "layers", "--quick", "--out", str(tmp_path / "x.json"))
    assert status == 2
    assert "Permission denied" in err


def test_memory_of_a_call_is_measured_in_a_process_of_its_own() -> None:
    if sys.platform != "linux":
        pytest.skip("/proc is Linux's")
    from rnnfast.bench.layers import LayerCase
    from rnnfast.bench.memory import _child

    case = LayerCase("rnn", hidden_size=256, batch=64, steps=32)
    output = 4 * case.steps * case.batch * case.hidden_size
    assert output < _child(case, TORCH, "auto") < 100 * output
