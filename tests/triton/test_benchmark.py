"""The benchmark's own code on a machine without a GPU: its comparison is real, its clock and its card are not."""

import json
import sys

import pytest
import torch

gpu_triton = pytest.importorskip("benchmarks.gpu_triton")


@pytest.fixture
def run(device: torch.device, monkeypatch, tmp_path):
    """Runs the benchmark over the given sizes; returns its exit status and what it wrote."""
    if device.type == "cuda":
        pytest.skip("the benchmark itself can run here")
    monkeypatch.setattr(gpu_triton, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_triton, "circumstances", lambda: {"card": "none"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def timed(work, budget):
        for function in work.values():
            function()
        return {"rnnfast": {"median": 1.0}, "nn": {"median": 2.0}}

    monkeypatch.setattr(gpu_triton, "seconds_in_turns", timed)
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["gpu_triton", "--output", str(path)])

    def run(*sizes):
        monkeypatch.setattr(gpu_triton, "grid", lambda quick: iter(sizes))
        status = gpu_triton.main()
        return status, json.loads(path.read_text())

    allow_tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield run
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allow_tf32


def test_rows(run):
    size = gpu_triton.Size
    sizes = [size("lstm", 8, 2, 2, torch.float32, False), size("gru", 8, 2, 2, torch.bfloat16, False)]
    status, report = run(*sizes)
    assert status == 0
    assert report["left_out"] == 0
    assert [(row["cell"], row["kernel"], row["right"]) for row in report["rows"]] == [
        ("lstm", "registers", True),
        ("gru", "registers", True),
    ]
    assert all(row[way]["ratio"] == 2.0 for row in report["rows"] for way in ("forward", "forward_backward"))


def test_a_wrong_result_is_reported_and_not_timed(run, monkeypatch):
    results = gpu_triton.results

    def spoilt(layer, input):
        values = results(layer, input)
        return {**values, "output": values["output"] * 1.01} if hasattr(layer, "backend") else values

    monkeypatch.setattr(gpu_triton, "results", spoilt)
    status, report = run(gpu_triton.Size("rnn_tanh", 8, 2, 2, torch.float32, False))
    assert status == 1
    assert not report["rows"][0]["right"]
    assert "forward" not in report["rows"][0]


def test_the_grid_has_tf32_both_ways_for_every_cell():
    sizes = list(gpu_triton.grid(quick=False))
    assert {(size.cell, size.allow_tf32) for size in sizes if size.dtype is torch.float32} == {
        (cell, tf32) for cell in gpu_triton.CELLS for tf32 in (False, True)
    }
    assert len(set(sizes)) == len(sizes)
