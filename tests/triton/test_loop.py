"""The loop of GEMM and gates' kernel when it is kept: a stand-in for the CUDA graph repeats the loop's launches.

The stand-in shows that buffers and addresses are right whatever T, lengths and tensors come; what CUDA makes of a
capture, only test_gpu.py can show.
"""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from rnnfast.backends.triton import plan
from tests.scans import random_gradients, random_layer


@pytest.fixture
def launch(device: torch.device):
    if device.type == "cuda":
        pytest.skip("the stand-in is for machines without a GPU; test_gpu.py has the real graph")
    from rnnfast.backends.triton import launch

    return launch


class StandIn:
    """Repeats a loop's steps, and insists that the loop's buffers stay where they were when it was made."""

    def __init__(self, loop):
        self.loop, self.replays = loop, 0
        self.addresses = self._addresses()

    def _addresses(self):
        loop = self.loop
        buffers = (loop.table, loop.w_hh, loop.h, loop.c, loop.product, loop.operand)
        return [None if buffer is None else buffer.data_ptr() for buffer in buffers]

    def replay(self):
        assert self._addresses() == self.addresses
        self.loop.graph_steps()
        self.replays += 1


@pytest.fixture
def kept(launch, monkeypatch):
    """The loops kept, by key; all layers take the gates' kernel, in graphs of 2 steps."""
    from rnnfast.backends.triton import loop

    def capture(scan, stream):
        made = loop.Loop(scan, own_weights=True)
        made.graph = StandIn(made)
        return made

    loops = type(loop._kept)()
    monkeypatch.setattr(loop, "_kept", loops)
    monkeypatch.setattr(loop, "_capture", capture)
    monkeypatch.setattr(loop, "_stream_to_keep_for", lambda device: "a stream")
    monkeypatch.setattr(loop, "GRAPH_STEPS", 2)
    monkeypatch.setattr(launch, "plan", lambda *_: plan.Plan("gates", 4, 16, 4))
    return loops


def run(launch, layer):
    outputs = launch.forward(*layer, True)
    gradients = random_gradients(outputs)
    return (*outputs, *launch.backward(*gradients, *layer, outputs[0], outputs[3], True, True))


def replays(loops):
    return [None if loop is None else loop.graph.replays for loop in loops.values()]


@pytest.mark.parametrize(
    ("cell", "dtype", "token_ids"),
    [("lstm", torch.float32, True), ("gru", torch.bfloat16, False), ("rnn_tanh", torch.float32, False)],
)
def test_a_kept_loop_serves_other_lengths_and_tensors(launch, monkeypatch, kept, cell, dtype, token_ids):
    """Bit for bit what a loop of its own gives; ragged batches, two directions, steps that do not fill a graph."""
    from rnnfast.backends.triton import loop

    options = {"lanes": 2, "ragged": True, "token_ids": token_ids}
    layers = [random_layer(cell, 5, 3, steps, dtype, seed=steps, **options) for steps in (2, 3, 5)]
    ours = [run(launch, layer) for layer in layers]
    assert replays(kept) == [1 + 2, 1 + 2]  # forward and backward: none at first, then of 3 and of 5 steps
    monkeypatch.setattr(loop, "_stream_to_keep_for", lambda device: None)
    for layer, results in zip(layers, ours, strict=True):
        for a, b in zip(results, run(launch, layer), strict=True):
            assert torch.equal(a, b)


def test_what_a_loop_is_kept_for(launch, monkeypatch, kept):
    """A graph is made when a scan comes again, and not for few steps or in a capture of the caller's own."""
    from rnnfast.backends.triton import loop

    layer = random_layer("rnn_tanh", 3, 2, 2, torch.float32)
    short = random_layer("rnn_tanh", 3, 2, 1, torch.float32)
    launch.forward(*short, False)
    launch.forward(*short, False)
    assert not kept
    launch.forward(*layer, False)
    assert replays(kept) == [None]
    launch.forward(*layer, False)
    assert replays(kept) == [1]

    monkeypatch.setattr(loop, "_stream_to_keep_for", lambda device: "another stream")
    launch.forward(*layer, False)
    assert replays(kept) == [1, None]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        launch.forward(*layer, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert replays(kept) == [1, None, None]


def test_few_loops_are_kept(launch, monkeypatch, kept):
    """The longest unused goes first."""
    from rnnfast.backends.triton import loop

    monkeypatch.setattr(loop, "KEPT", 2)
    first, second, third = (random_layer("rnn_relu", 3, batch, 2, torch.float32) for batch in (1, 2, 3))
    for layer in (first, second, first, third, first):
        launch.forward(*layer, False)
    assert [(key[0].batch, loop and loop.graph.replays) for key, loop in kept.items()] == [(3, None), (1, 2)]


def test_made_apart_from_the_callers_thread(launch, monkeypatch, kept):
    """So a loop made in inference mode serves training, too. Where none can be made, it goes on without one."""
    from rnnfast.backends.triton import loop

    threads = []
    capture = loop._capture
    monkeypatch.setattr(loop, "_capture", lambda *a: (threads.append(threading.get_ident()), capture(*a))[1])
    layer = random_layer("gru", 3, 2, 2, torch.float32)
    with torch.inference_mode():
        launch.forward(*layer, False)
        launch.forward(*layer, False)
    assert threads[0] != threading.get_ident()
    assert not next(iter(kept.values())).h.is_inference()

    tries = []

    def fail(*_):
        tries.append(1)
        raise RuntimeError("no memory")

    monkeypatch.setattr(loop, "_capture", fail)
    monkeypatch.setattr(loop, "_not_captured", set())
    expected = launch.forward(*layer, True)
    with pytest.warns(UserWarning, match="no CUDA graph can be made of this scan's steps, each is launched: no memory"):
        found = launch.forward(*layer, True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for _ in range(2):
        launch.forward(*layer, True)
    assert len(tries) == 1


def test_capture(launch, monkeypatch):
    """First cuBLAS is set up; the launches are on a stream aside, with one memory pool for the caller's stream."""
    from rnnfast.backends.triton import loop

    said = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            said.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            said.append("end")

    @contextlib.contextmanager
    def on(stream):
        said.append(("on", stream))
        yield

    streams = iter(("aside", "not asked for"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Stream", lambda priority: next(streams))
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: SimpleNamespace(id="pool"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: said.append("cuBLAS"))
    monkeypatch.setattr(loop, "_places", {})
    monkeypatch.setattr(loop.Loop, "graph_steps", lambda self: said.append("steps"))
    flags = {"ALIGNED": True, "IDS": False, "BIAS": False, "RAGGED": False, "SAVE": False}
    scan = loop.Scan(True, "gru", torch.float32, torch.device("cpu"), 1, 2, 3, 0, plan.GATES, tuple(flags.items()))
    expected = [("on", "caller's"), "cuBLAS", ("on", "aside"), ("begin", "pool", "thread_local"), "steps", "end"]
    for _ in range(2):
        assert loop._capture(scan, "caller's").w_hh.shape == (1, 9, 3)
        assert said == expected
        said.clear()

    def fail(self):
        raise ValueError("in a step")

    monkeypatch.setattr(loop.Loop, "graph_steps", fail)
    with pytest.raises(ValueError, match="in a step"):
        loop._capture(scan, "caller's")
    assert said[-1] == "end"


def test_no_graph_in_the_callers_own_capture(launch, monkeypatch):
    from rnnfast.backends.triton import loop

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert loop._stream_to_keep_for(gpu) == "stream of cuda:0"
    assert loop._stream_to_keep_for(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert loop._stream_to_keep_for(gpu) is None
