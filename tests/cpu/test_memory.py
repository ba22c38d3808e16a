"""Blocks kept between calls, also for large tensors: no page faults, no more memory, and each tensor its own."""

from __future__ import annotations

import copy
import ctypes
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast.backends import cpu

STEPS, BATCH, INPUTS, HIDDEN = 64, 64, 8, 80  # a tape of 5 x 80 floats a row is 6.5 MB of an LSTM, 5.2 MB of a GRU


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
keeps_tensors = pytest.mark.skipif(
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
    cpu.load()  # compiles, if need be, before the time is taken
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(number) for number in done.stdout.split()]


@linux
@keeps_tensors
@pytest.mark.parametrize(
    "call",
    ["step(128, 256)", "with torch.no_grad(): layer(torch.zeros(128, 256, dtype=torch.int64))"],
    ids=["training", "inference"],
)
def test_repeated_calls_make_few_page_faults(call: str) -> None:
    code = f"""
for _ in range(4):
    {call}
for _ in range(3):
    before = use().ru_minflt
    for _ in range(3):
        {call}
    print(use().ru_minflt - before)
"""
    # The least of three: what else torch and Python allocate may come from new pages now and then.
    faults = min(run_alone(code))
    output = 128 * 4 * 128 * 256 // 4096  # pages, of which the tape has five times as many
    assert faults < output / 4  # in three calls


@linux
@keeps_tensors
def test_outputs_that_come_and_go_are_kept_within_a_bound() -> None:
    code = """
torch.set_grad_enabled(False)
ids = torch.randint(8, (16, 256))
outputs = [layer(ids)[0] for _ in range(100)]  # 2 MB each
outputs.clear()
with open("/proc/self/statm") as statm:
    before = int(statm.read().split()[1])
outputs = [layer(ids)[0] for _ in range(100)]
with open("/proc/self/statm") as statm:
    held = int(statm.read().split()[1])
print((held - before) * 4)
"""
    (taken_anew,) = run_alone(code)  # KB
    assert taken_anew > 100 * 2048 - 80_000  # at most 64 MB had stayed


@linux
@keeps_tensors
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
    assert grown < 80_000  # in KB, less than one more tape


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


def test_a_kept_block_makes_an_ordinary_tensor() -> None:
    cpu.load()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        like = torch.zeros(1, dtype=dtype)
        tensor = torch.ops.rnnfast.direct_empty_cpu(like, [3, 1000, 1000])
        assert tensor.shape == (3, 1000, 1000)
        assert (tensor.dtype, tensor.device, tensor.layout) == (dtype, like.device, torch.strided)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.fill_(2).sum(dtype=torch.float64) == 6e6


@keeps_tensors
def test_direct_calls_keep_what_the_operators_keep() -> None:
    cpu.load()
    like = torch.zeros(1)
    for size, kept in ((128 << 10, True), ((128 << 10) - 4, False)):
        for tensor in (torch.ops.rnnfast.direct_empty_cpu(like, [size // 4]), cpu.empty(like, size // 4)):
            assert tensor.untyped_storage().resizable() != kept


def test_what_users_do_with_a_large_output(layer: Any) -> None:
    with torch.no_grad():
        output, _ = layer(torch.randn(STEPS, BATCH, INPUTS))
        assert output.nbytes > 128 << 10
        expected = output.clone()
        saved = io.BytesIO()
        torch.save(output, saved)
        saved.seek(0)
        copied = [copy.deepcopy(output), torch.load(saved), torch.from_numpy(output.numpy()), torch.from_dlpack(output)]
        assert_same(copied, [expected] * 4)
        assert_same([output.share_memory_()], [expected])
        assert output.is_shared()
        output, _ = layer(torch.randn(STEPS, BATCH, INPUTS))  # takes a block that the first had, if any
        assert_same([output.mul_(0).resize_(3, 4)], [torch.zeros(3, 4)])


@keeps_tensors
def test_what_a_large_output_cannot_do_is_torch_s_error(layer: Any) -> None:
    with torch.no_grad():
        output, _ = layer(torch.randn(STEPS, BATCH, INPUTS))
        copy = output.clone()  # before: torch leaves a tensor that it could not resize with sizes beyond its memory
        with pytest.raises(RuntimeError, match="not resizable"):
            output.resize_(10 * copy.numel())
        assert copy.resize_(10 * copy.numel()).numel() == 10 * STEPS * BATCH * HIDDEN * (
            2 if layer.bidirectional else 1
        )


def test_outputs_that_live_share_no_memory(layer: Any) -> None:
    with torch.no_grad():
        inputs = [torch.randn(STEPS, BATCH, INPUTS) for _ in range(4)]
        alone = [layer(input)[0].clone() for input in inputs]
        together = [layer(input)[0] for input in inputs]
        del together[1]
        together.insert(1, layer(inputs[1])[0])
    assert_same(together, alone)


@linux
def test_kept_tensors_in_a_forked_child_and_at_exit() -> None:
    code = """
from rnnfast.backends import cpu
cpu.load()
like = torch.zeros(1)
tapes = [torch.ops.rnnfast.direct_empty_cpu(like, [1, 3000, 1000]).fill_(i) for i in range(3)]
del tapes[1]  # kept when the process forks
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        new = torch.ops.rnnfast.direct_empty_cpu(like, [1, 3000, 1000])
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


@linux
@keeps_tensors
def test_what_is_kept_is_given_up_where_memory_is_short() -> None:
    """A block that does not fit is all that is kept, and a limit that has room for one of the two."""
    code = """
from rnnfast.backends import cpu
cpu.load()
def block(millions):
    return torch.ops.rnnfast.direct_empty_cpu(torch.zeros(1), [millions, 1000, 1000])
block(80)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, -1))
print(block(85).numel())
try:
    block(200)
except RuntimeError as error:
    assert "no memory for a block" in str(error), error
    print(1)
"""
    assert run_alone(code) == [85_000_000, 1]


@linux
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's mallinfo2")
def test_operators_lose_no_memory() -> None:
    """Thousands of calls: torch's own conversion of their strings loses 32 bytes in each, before torch 2.14."""
    code = """
class Statistics(ctypes.Structure):
    _fields_ = [(str(at), ctypes.c_size_t) for at in range(10)]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Statistics
torch.set_num_threads(1)
from rnnfast.backends import cpu
cpu.load()
ops = torch.ops.rnnfast
w_ih, w_hh, bias = torch.randn(1, 16, 3), torch.randn(1, 16, 4), torch.randn(1, 16)
input, h_0 = torch.randn(6, 3), torch.randn(1, 2, 4)

def call():
    layer = (input, w_ih, w_hh, bias, bias, None, h_0, h_0, None, "lstm", False)
    output, h_n, c_n, tape = ops.scan_cpu(*layer, True)
    ops.scan_cpu_backward(output, h_n, c_n, *layer, output, tape, True, True)
    packed = ops.scan_cpu_pack(w_ih, w_hh, bias, bias, None, "lstm", False)
    ops.scan_cpu_packed(input, packed, h_0, h_0, None, False)
    samples = ops.weight_samples_cpu([w_ih[0], w_hh[0]], 4, False)
    ops.direct_plan_cpu([packed], samples)
    ops.direct_layer_cpu(w_ih, w_hh, None, "lstm", False)

for _ in range(100):
    call()
before = getattr(mallinfo(), "7")  # bytes in use
for _ in range(3000):
    call()
print(max(0, getattr(mallinfo(), "7") - before))
"""
    (lost,) = run_alone(code)
    assert lost < 3000 * 8
