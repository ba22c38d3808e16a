"""The CUDA kernels on a GPU, against the reference in float64 on the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rnnfast
from rnnfast import tuning
from rnnfast.backends import cuda
from rnnfast.backends.cuda import build, launch
from rnnfast.backends.cuda.launch import Plan
from rnnfast.cells import CELLS
from rnnfast.table import Point
from tests.scans import random_layer

from .layers import DTYPES, check_against_truth

pytestmark = pytest.mark.gpu

SHAPES = {
    "small": {"hidden": 20, "batch": 6, "steps": 4, "lanes": 2},
    "ragged token ids": {"hidden": 65, "batch": 9, "steps": 7, "lanes": 2, "ragged": True, "token_ids": True},
    "of a block": {"hidden": 128, "batch": 33, "steps": 35},
    "of a cluster": {"hidden": 512, "batch": 32, "steps": 35},
    "of the chip": {"hidden": 1024, "batch": 8, "steps": 5},
}
# Every kernel at a size that each kind of team can hold.
TEAMS = [
    *(Plan("cluster", blocks, 8, 16) for blocks in (2, 4, 8, 16)),
    *(Plan("grid", blocks, 8, 16) for blocks in (2, 13, 32)),
    Plan("block", 1, 8, 16),
    Plan("steps", 0, 0, 0),
]


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    torch.ops.load_library(str(build.library()))


@pytest.fixture(autouse=True)
def _arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """That of the test's compute type, in cuDNN, too, which would else judge float32 by its TF32."""
    callspec = getattr(request.node, "callspec", None)
    with tuning.arithmetic("float32" if callspec is None else callspec.params.get("compute_type", "float32")):
        yield


def _layer(compute_type: str, cell: str = "lstm", **shape: Any) -> list[Any]:
    return random_layer(cell, dtype=DTYPES[compute_type], device="cuda", **shape)


@pytest.mark.parametrize("compute_type", DTYPES)
@pytest.mark.parametrize("plan", TEAMS, ids=lambda p: f"{p.kernel}-{p.blocks}")
def test_every_team(monkeypatch, plan, compute_type):
    problem = ("gru", 100, 20, 2, compute_type)
    for backward in (False, True) if plan.kernel != "steps" else ():
        refusal = torch.ops.rnnfast_cuda.check(*problem, backward, launch._limits(0), plan.team)
        if refusal:
            pytest.skip(refusal)
    monkeypatch.setattr(launch, "plan", lambda *_, **__: plan)
    check_against_truth(
        launch.forward,
        launch.backward,
        _layer(compute_type, "gru", hidden=100, batch=20, steps=9, lanes=2),
        compute_type,
    )


@pytest.mark.parametrize("compute_type", DTYPES)
def test_runs_give_the_same_bits_on_two_streams(compute_type):
    layer = _layer(compute_type, hidden=256, batch=16, steps=64)
    expected = launch.forward(*layer, True)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    runs = []
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            runs.append(launch.forward(*layer, True))
    torch.cuda.synchronize()
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, expected, strict=True))


def test_grids_that_do_not_fit_side_by_side_take_turns():
    """On streams of different priority: half of one and half of the other resident at once would wait for ever."""
    layer = _layer("bfloat16", hidden=1024, batch=16, steps=64)
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    with launch.use_plans(Plan("grid", processors * 2 // 3, 16, 16)):
        expected = launch.forward(*layer, True)
        torch.cuda.synchronize()
        streams, runs = [torch.cuda.Stream(priority=priority) for priority in (0, -1)], []
        for stream in streams * 8:
            with torch.cuda.stream(stream):
                runs.append(launch.forward(*layer, True))
        torch.cuda.synchronize()
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, expected, strict=True))


@pytest.mark.parametrize("hidden", [64, 512, 4096])
def test_a_graph_replays_it(hidden):
    """Block, cluster or grid, and a step at a time."""
    layer = _layer("bfloat16", hidden=hidden, batch=8, steps=5)

    def both() -> tuple[torch.Tensor, ...]:
        outputs = launch.forward(*layer, True)
        return *outputs, *launch.backward(outputs[0], None, None, *layer, outputs[0], outputs[3], True, True)

    both()  # kernels are loaded before a capture, as torch.cuda.graph asks
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    layer[6].neg_()
    graph.replay()
    expected = both()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_nothing_synchronises_the_device():
    layer = _layer("float32", hidden=512, batch=8, steps=16, ragged=True)
    outputs = launch.forward(*layer, True)
    launch.backward(outputs[0], None, None, *layer, outputs[0], outputs[3], True, True)
    try:
        torch.cuda.set_sync_debug_mode("error")
        outputs = launch.forward(*layer, True)
        launch.backward(outputs[0], None, None, *layer, outputs[0], outputs[3], True, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_grid_that_cannot_be_resident_is_refused_and_does_not_hang():
    layer = _layer("bfloat16", hidden=512, batch=320, steps=4)
    with launch.use_plans(Plan("grid", 32, 8, 16)), pytest.raises(RuntimeError, match="launching the scan"):
        launch.forward(*layer, True)
    torch.zeros(1, device="cuda")  # the refusal is over: torch does not find it behind its own next launch
    check_against_truth(launch.forward, launch.backward, layer, "bfloat16")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("hidden", [64, 512])
def test_it_runs_on_the_device_of_its_tensors(hidden):
    layer = _layer("float32", hidden=hidden, batch=8, steps=5)
    there = [x.to("cuda:1") if isinstance(x, torch.Tensor) and x.is_cuda else x for x in layer]
    assert torch.cuda.current_device() == 0
    for a, b in zip(launch.forward(*layer, True), launch.forward(*there, True), strict=True):
        assert b.device == torch.device("cuda:1")
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("compute_type", tuning.COMPUTE_TYPES)
@pytest.mark.parametrize("cell", tuning.LAYERS)
def test_tuning_finds_it_right(cell, compute_type):
    cuda.load()
    point = Point(cell, compute_type, 256, 8)
    tuning.measure(point, ["cuda"], torch.device("cuda"))
    assert point.failures == {}
    assert point.teams.keys() == {"forward", "backward"}


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_compiled_layer_on_cudnn(name, token_ids):
    layer = getattr(rnnfast, name)(24, 32, bidirectional=True, backend="torch").cuda()
    input = torch.randint(24, (7, 3), device="cuda") if token_ids else torch.randn(7, 3, 24, device="cuda")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        output, _ = call(input)
        results.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    torch.testing.assert_close(*reversed(results), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_under_autocast(name):
    ours, theirs = getattr(rnnfast, name)(24, 64, backend="cuda").cuda(), getattr(torch.nn, name)(24, 64).cuda()
    theirs.load_state_dict(ours.state_dict())
    input, results = torch.randn(6, 4, 24, device="cuda"), []
    for layer in (ours, theirs):
        with torch.autocast("cuda", dtype=torch.float16):
            output, _ = layer(input)
        assert output.dtype is torch.float16
        output.float().square().sum().backward()
        results.append((output, *(parameter.grad for parameter in layer.parameters())))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_layers_and_the_backend_table():
    layer = rnnfast.LSTM(32, 256, backend="cuda").cuda()
    output, _ = layer(torch.randn(7, 3, 32, device="cuda"))
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert "cuda" in {status.name for status in rnnfast.backends() if status.available}


@pytest.mark.parametrize("compute_type", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_as_planned(cell, shape, compute_type):
    check_against_truth(launch.forward, launch.backward, _layer(compute_type, cell, **SHAPES[shape]), compute_type)
