"""Blocks kept between calls, large tapes among them: no page faults, no more memory, and each graph its own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast.backends import native

STEPS, BATCH, INPUTS, HIDDEN = 64, 64, 8, 80  # a tape of 5 x 80 floats a row is 6.5 MB of an LSTM, 5.2 MB of a GRU


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
keeps_tapes = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 11), reason="this torch takes no memory of the library's"
)


def run_alone(code: str) -> list[int]:
    """Runs code in a process without huge pages, so that faults are in pages of 4 KB, and returns what it prints."""
    head = """
import ctypes, os, resource, sys, threading, torch
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
import rnnfast

layer = rnnfast.LSTM(8, 128)

def step(steps, batch):
    _, (h_n, _) = layer(torch.randint(8, (steps, batch)))
    h_n.sum().backward()

def use():
    return resource.getrusage(resource.RUSAGE_SELF)
"""
    native.load()  # compiles, if need be, before the time is taken
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(number) for number in done.stdout.split()]


@linux
@keeps_tapes
def test_a_repeated_step_makes_few_page_faults() -> None:
    code = """
rows = 128, 256
for _ in range(4):
    step(*rows)
for _ in range(3):
    before = use().ru_minflt
    for _ in range(3):
        step(*rows)
    print(use().ru_minflt - before)
"""
    # The least of three: an output, which is torch's memory, may come from new pages now and then.
    faults = min(run_alone(code))
    tape = 5 * 128 * 4 * 128 * 256 // 4096  # pages; the gradients of the gates take as many, less a fifth
    assert faults < tape / 4  # in three steps


@linux
@keeps_tapes
def test_sequences_of_many_lengths_take_no_more_memory_than_the_longest() -> None:
    code = """
for _ in range(2):
    step(128, 256)
before = use().ru_maxrss
for steps in (100, 31, 127, 9, 77, 50, 113, 64, 90, 20, 128):
    step(steps, 256)
print(use().ru_maxrss - before)
"""
    (grown,) = run_alone(code)
    assert grown < 80_000  # in KB, less than one more tape; the memory of outputs, which is torch's, grows a little


def call(layer: Any, input: Tensor) -> Tensor:
    output, state = layer(input)
    h_n = state[0] if isinstance(state, tuple) else state
    return output.square().sum() + h_n.sum()


def gradients(loss: Tensor, layer: Any, **options: bool) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(layer.parameters()), **options))


@pytest.fixture(params=["direct", "operator"])
def layer(request: Any) -> Any:
    if request.param == "operator":  # both directions do not go past the dispatcher
        return rnnfast.GRU(INPUTS, HIDDEN, bidirectional=True)
    layer = rnnfast.LSTM(INPUTS, HIDDEN)
    layer(torch.randn(1, 1, INPUTS))
    return layer


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_live_graphs_have_tapes_of_their_own(layer: Any) -> None:
    inputs = [torch.randn(STEPS, BATCH, INPUTS) for _ in range(3)]
    alone = [gradients(call(layer, input), layer) for input in inputs]
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        losses = [call(layer, input) for input in inputs]
        for index in order:
            assert_same(gradients(losses[index], layer), alone[index])


def test_a_tape_lasts_as_long_as_its_graph(layer: Any) -> None:
    input = torch.randn(STEPS, BATCH, INPUTS)
    loss = call(layer, input)
    first = gradients(loss, layer, retain_graph=True)
    gradients(call(layer, input + 1), layer)  # takes blocks, and gives them back
    assert_same(gradients(loss, layer, retain_graph=True), first)
    second = gradients(loss, layer, create_graph=True)
    assert all(gradient.grad_fn is not None for gradient in second)
    assert_same([gradient.detach() for gradient in second], first)


def test_a_compiled_layer_has_large_tapes(layer: Any) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(STEPS, BATCH, INPUTS) for _ in range(2)]
    losses = [call(compiled, input) for input in inputs]
    for loss, input in zip(losses, inputs, strict=True):
        torch.testing.assert_close(gradients(loss, layer), gradients(call(layer, input), layer))


def test_a_tape_is_an_ordinary_tensor() -> None:
    native.load()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        like = torch.zeros(1, dtype=dtype)
        tape = torch.ops.rnnfast.direct_tape_cpu(like, 3000, 1000)
        assert tape.shape == (1, 3000, 1000)
        assert (tape.dtype, tape.device, tape.layout) == (dtype, like.device, torch.strided)
        assert tape.is_contiguous()
        assert tape.untyped_storage().nbytes() == tape.numel() * tape.element_size()
        assert tape.fill_(2).sum(dtype=torch.float64) == 6e6


@linux
def test_tapes_in_a_forked_child_and_at_exit() -> None:
    code = """
from rnnfast.backends import native
native.load()
like = torch.zeros(1)
tapes = [torch.ops.rnnfast.direct_tape_cpu(like, 3000, 1000).fill_(i) for i in range(3)]
del tapes[1]  # kept when the process forks
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        new = torch.ops.rnnfast.direct_tape_cpu(like, 3000, 1000)
        new.numpy()[:] = 7  # torch's own parallel operations hang here
        same = (tapes[0].numpy() == 0).all() and (tapes[1].numpy() == 2).all() and (new.numpy() == 7).all()
        tapes.clear()
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
assert tapes[0].sum() == 0 and (tapes[1] == 2).all()
torch.held = tapes  # lives until the interpreter ends
threading.Thread(target=tapes.pop).start()
"""
    assert run_alone(code) == []
