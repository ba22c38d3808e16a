"""What `make gpu` makes of a layer, on a machine without a GPU: its comparison is real, its clock is not."""

import pytest
import torch

gpu_parts = pytest.importorskip("benchmarks.gpu_parts")


@pytest.fixture
def compare(device: torch.device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("the benchmark itself can run here")
    monkeypatch.setattr(gpu_parts, "DEVICE", "cpu")

    def timed(work, budget):
        for function in work.values():
            function()
        return {"rnnfast": {"median": 1.0}, "nn": {"median": 2.0}}

    monkeypatch.setattr(gpu_parts, "seconds_in_turns", timed)
    return lambda cell, compute_type: gpu_parts.compare("triton", cell, 8, 2, 2, compute_type, inputs=3)


@pytest.mark.parametrize(("cell", "compute_type"), [("lstm", "float32"), ("gru", "bfloat16")])
def test_a_right_layer_is_timed(compare, cell, compute_type):
    row = compare(cell, compute_type)
    assert (row["kernel"], row["right"]) == ("registers", True)
    assert [row[way]["ratio"] for way in ("forward", "both")] == [2.0, 2.0]


@pytest.mark.parametrize(("factor", "timed"), [(1 + 4e-7, True), (1.01, False), (torch.nan, False)])
def test_a_wrong_result_is_a_failure_and_timed_only_if_nearly_right(compare, monkeypatch, factor, timed):
    results = gpu_parts.tuning.results

    def spoilt(layer, *arguments):
        values = results(layer, *arguments)
        return {**values, "output": values["output"] * factor} if hasattr(layer, "backend") else values

    monkeypatch.setattr(gpu_parts.tuning, "results", spoilt)
    row = compare("rnn_tanh", "float32")
    assert not row["right"]
    assert "output is off by" in row["failure"]
    assert ("forward" in row) == timed
