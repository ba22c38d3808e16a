"""What only a GPU can show of the Triton backend: large sizes, torch.compile, graph capture, streams.

The parity tests beside this file run on the GPU too where there is one.
"""

import pytest
import torch

from rnnfast.backends import reference
from rnnfast.cells import CELLS
from rnnfast.scan import Weights, scan

from .layers import assert_near, random_gradients, random_layer, widened
from .test_parity import BACKWARD_ROUNDINGS, FORWARD_ROUNDINGS, GRADIENTS

pytestmark = pytest.mark.gpu


@pytest.fixture
def launch(device: torch.device):
    from rnnfast.backends.triton import launch

    return launch


def assert_matches(launch, layer, dtype):
    wide = widened(layer)
    ours, truth = launch.forward(*layer, True), reference.forward(*wide, True)
    for name, a, t in zip(("output", "h_n", "c_n", "tape"), ours, truth, strict=True):
        assert_near(name, a, t, dtype, FORWARD_ROUNDINGS[dtype])
    gradients = random_gradients(ours)
    results = launch.backward(*gradients, *layer, ours[0], ours[3], True, True)
    truth = reference.backward(*widened(gradients), *wide, *widened([ours[0], ours[3]]), True, True)
    for name, a, t in zip(GRADIENTS, results, truth, strict=True):
        assert_near(name, a, t, dtype, BACKWARD_ROUNDINGS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [30, 64, 128, 250, 256, 512])
@pytest.mark.parametrize("cell", CELLS)
def test_sizes_of_every_kernel(launch, device, cell, hidden, dtype):
    """Ragged and in two directions, so the step scan is synchronised within one launch at 512 and below."""
    assert_matches(launch, random_layer(cell, hidden, 19, 12, dtype, lanes=2, ragged=True, device=device), dtype)


def test_one_launch_a_step_where_not_all_programs_fit(launch, device, monkeypatch):
    layer = random_layer("gru", 300, 9, 10, torch.float32, device=device)
    at_once = launch.forward(*layer, True)
    monkeypatch.setattr(launch, "_programs_at_once", lambda device: 0)
    for a, b in zip(at_once, launch.forward(*layer, True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("hidden", [64, 512])
def test_long_sequences(launch, device, hidden):
    """70,000 steps, past cuDNN's limit of 65,535; rows are addressed in 64 bits."""
    layer = random_layer("rnn_tanh", hidden, 2, 70_000, torch.float32, device=device)
    first = launch.forward(*layer, False)
    again = launch.forward(*layer, False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].isfinite().all()


def _scan_arguments(layer):
    return [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in layer]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [64, 512])
def test_torch_compile(device, launch, cell, hidden):
    layer = _scan_arguments(random_layer(cell, hidden, 8, 16, torch.float32, device=device))

    def loss(input, *rest):
        output, h_n, c_n = scan("triton", input, Weights(*rest[:5]), *rest[5:])
        return output.square().sum() + h_n.sum() + c_n.sum()

    leaves = [x for x in layer if isinstance(x, torch.Tensor) and x.requires_grad]
    eager = torch.autograd.grad(loss(*layer), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*layer), leaves)
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(c, e)


@pytest.mark.parametrize("hidden", [64, 512])
def test_cuda_graph_capture(launch, device, hidden):
    layer = random_layer("lstm", hidden, 8, 16, torch.float32, device=device)
    eager = launch.forward(*layer, True)
    gradients = random_gradients(eager)
    eager_gradients = launch.backward(*gradients, *layer, eager[0], eager[3], True, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch.forward(*layer, True)
        captured_gradients = launch.backward(*gradients, *layer, captured[0], captured[3], True, True)
    for tensor in (*captured, *captured_gradients):
        tensor.zero_()
    graph.replay()
    for c, e in zip((*captured, *captured_gradients), (*eager, *eager_gradients), strict=True):
        torch.testing.assert_close(c, e)


def test_runs_on_the_current_stream(launch, device):
    """The input is produced late on a side stream; a kernel on another stream would read it too early."""
    layer = random_layer("gru", 512, 8, 16, torch.float32, inputs=512, device=device)
    truth = launch.forward(*layer, True)
    late = torch.zeros_like(layer[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(layer[0])
        ours = launch.forward(late, *layer[1:], True)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


def test_nothing_synchronises_the_device(launch, device):
    layer = random_layer("lstm", 512, 8, 16, torch.float32, ragged=True, device=device)
    output = launch.forward(*layer, True)
    gradients = random_gradients(output)
    launch.backward(*gradients, *layer, output[0], output[3], True, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = launch.forward(*layer, True)
        launch.backward(*gradients, *layer, output[0], output[3], True, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
