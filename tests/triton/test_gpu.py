"""What only a GPU can show of the Triton backend: large sizes, torch.compile, graph capture, streams.

The parity tests beside this file run on the GPU too where there is one. Most tests compile kernels of their own, for
seconds, and `make gpu` has a minute for all: ways of launching come first, then sizes, each for all
cells, and what torch.compile compiles as well comes last.
"""

import pytest
import torch

import rnnfast
from rnnfast.backends import reference
from rnnfast.cells import CELLS
from rnnfast.scan import Weights, scan
from tests.scans import GRADIENTS, OUTPUTS, random_gradients, random_layer, widened

from .layers import assert_near
from .test_parity import BACKWARD_ROUNDINGS, FORWARD_ROUNDINGS

# A batch for which the step scan has more programs than any card has multiprocessors, at 512 units.
MANY_ROWS = 600

pytestmark = pytest.mark.gpu


@pytest.fixture
def launch(device: torch.device):
    from rnnfast.backends.triton import launch

    return launch


def assert_matches(launch, layer, dtype):
    def assert_all_near(names, results, truth, plain, roundings):
        if dtype is not torch.float32:
            plain = [None] * len(plain)
        for name, a, t, p in zip(names, results, truth, plain, strict=True):
            assert_near(name, a, t, dtype, roundings[dtype], p)

    ours, truth = launch.forward(*layer, True), reference.forward(*widened(layer), True)
    assert_all_near(OUTPUTS, ours, truth, reference.forward(*layer, True), FORWARD_ROUNDINGS)
    arguments = [*random_gradients(ours), *layer, ours[0], ours[3], True, True]
    results, plain = launch.backward(*arguments), reference.backward(*arguments)
    assert_all_near(GRADIENTS, results, reference.backward(*widened(arguments)), plain, BACKWARD_ROUNDINGS)


def test_one_launch_a_step_where_not_all_programs_fit(launch, device, monkeypatch):
    layer = random_layer("gru", 300, 9, 10, torch.float32, device=device)
    at_once = launch.forward(*layer, True)
    monkeypatch.setattr(launch, "_run_at_once", lambda *_: False)
    for a, b in zip(at_once, launch.forward(*layer, True), strict=True):
        assert torch.equal(a, b)


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


def test_graphs_serve_other_lengths_and_tensors(launch, device, monkeypatch):
    """Bit for bit what launching step by step gives; a replay on a stream is not another stream's."""
    from rnnfast.backends.triton import loop

    monkeypatch.setattr(loop, "_kept", type(loop._kept)())
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    layers = [
        random_layer("lstm", 512, MANY_ROWS, steps, torch.bfloat16, ragged=True, seed=steps, device=device)
        for steps in (16, 19, 9, 40)
    ]
    torch.cuda.synchronize()
    results = []
    for layer in layers:
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs = launch.forward(*layer, True)
                gradients = random_gradients(outputs)
                back = launch.backward(*gradients, *layer, outputs[0], outputs[3], True, True)
                results.append((*outputs, *back))
    torch.cuda.synchronize()
    assert [kept is not None for kept in loop._kept.values()] == [True] * 4
    monkeypatch.setattr(loop, "_stream_to_keep_for", lambda device: None)
    for index, layer in enumerate(layers):
        outputs = launch.forward(*layer, True)
        back = launch.backward(*random_gradients(outputs), *layer, outputs[0], outputs[3], True, True)
        for ours in results[2 * index : 2 * index + 2]:
            for a, b in zip(ours, (*outputs, *back), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(("hidden", "batch"), [(64, 8), (512, 8), (512, MANY_ROWS)])
def test_cuda_graph_capture_of_a_layer(launch, device, hidden, batch):
    """Training steps replayed on new input, with torch's graphs as a caller makes them."""
    layer = rnnfast.LSTM(16, hidden, num_layers=2, backend="triton", device=device)
    input = torch.randn(16, batch, 16, device=device)

    def step():
        output, (h_n, c_n) = layer(input)
        loss = output.square().mean() + h_n.sum() + c_n.sum()
        return output, *torch.autograd.grad(loss, list(layer.parameters()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    input.copy_(torch.randn_like(input))
    graph.replay()
    for c, e in zip(captured, step(), strict=True):
        torch.testing.assert_close(c, e)


@pytest.mark.parametrize("batch", [8, MANY_ROWS])
def test_nothing_synchronises_the_device(launch, device, batch):
    """Once kernels are compiled and, for many rows, the graphs are made."""
    layer = random_layer("lstm", 512, batch, 16, torch.float32, ragged=True, device=device)
    gradients = random_gradients(launch.forward(*layer, True))

    def run():
        output = launch.forward(*layer, True)
        launch.backward(*gradients, *layer, output[0], output[3], True, True)

    run()
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("hidden", [64, 512])
def test_long_sequences(launch, device, hidden):
    """70,000 steps, past cuDNN's limit of 65,535; rows are addressed in 64 bits."""
    layer = random_layer("rnn_tanh", hidden, 2, 70_000, torch.float32, device=device)
    first = launch.forward(*layer, False)
    again = launch.forward(*layer, False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gemm_and_gates(launch, device, cell, dtype):
    """Twice, so that the second time takes the graph; 12 steps leave 4 beside it."""
    layer = random_layer(cell, 510, MANY_ROWS, 12, dtype, lanes=2, ragged=True, device=device)
    assert launch._plan(cell, layer[6]).kernel == "gates"
    for _ in range(2):
        assert_matches(launch, layer, dtype)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [512, 64, 256, 128, 250, 30])
def test_sizes_of_every_kernel(launch, device, cell, hidden, dtype):
    """Ragged and in two directions, so the step scan is synchronised within one launch at 512 and below."""
    assert_matches(launch, random_layer(cell, hidden, 19, 12, dtype, lanes=2, ragged=True, device=device), dtype)


def test_graphs_beside_those_of_torch_compile(launch, device, monkeypatch):
    """Loops kept while torch.compile's CUDA graphs warm up must not lie in their memory."""
    from rnnfast.backends.triton import loop

    monkeypatch.setattr(loop, "_kept", type(loop._kept)())
    layer = rnnfast.LSTM(16, 512, num_layers=3, backend="triton", device=device)
    input = torch.randn(16, MANY_ROWS, 16, device=device)
    with torch.no_grad():
        compiled = torch.compile(lambda x: layer(x)[0], mode="reduce-overhead")
        for _ in range(4):
            output = compiled(input).clone()
        eager = layer(input)[0]
    assert any(kept is not None for kept in loop._kept.values())
    torch.testing.assert_close(output, eager)


def _scan_arguments(layer):
    return [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in layer]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("hidden", "batch"), [(64, 8), (512, 8), (512, MANY_ROWS)])
def test_torch_compile(device, launch, cell, hidden, batch):
    layer = _scan_arguments(random_layer(cell, hidden, batch, 16, torch.float32, device=device))

    def loss(input, *rest):
        output, h_n, c_n = scan("triton", input, Weights(*rest[:5]), *rest[5:])
        return output.square().sum() + h_n.sum() + c_n.sum()

    leaves = [x for x in layer if isinstance(x, torch.Tensor) and x.requires_grad]
    eager = torch.autograd.grad(loss(*layer), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*layer), leaves)
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(c, e)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("hidden", [64, 512])
def test_torch_compile_of_a_layer(device, launch, cell, hidden):
    """Two layers and two directions, token ids; forward and the parameters' gradients."""
    options = {"num_layers": 2, "bidirectional": True, "backend": "triton", "device": device}
    layer = getattr(rnnfast, cell)(20, hidden, **options)
    ids = torch.randint(20, (12, 5), device=device)

    def loss():
        return layer(ids)[0].square().sum()

    eager = torch.autograd.grad(loss(), list(layer.parameters()))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(), list(layer.parameters()))
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(c, e)
