"""Programs that were exported or traced, saved, and loaded by a process in which nothing has run on the backend yet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rnnfast
from rnnfast import scan

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)

LOADERS = {
    "export": "torch.export.load({path!r}).module()",
    "inductor": "torch._inductor.aoti_load_package({path!r})",
    "trace": "torch.jit.load({path!r})",
}


def run_elsewhere(kind: str, path: Path, inputs: Any, backward: bool = False) -> list[Tensor]:
    """The program's outputs, or with `backward` the gradients of its parameters, from a process that only loads it."""
    torch.save(inputs, path.with_suffix(".inputs"))
    code = f"""
import torch, rnnfast
from torch.utils._pytree import tree_leaves
program = {LOADERS[kind].format(path=str(path))}
found = tree_leaves(program(*torch.load({str(path.with_suffix(".inputs"))!r})))
if {backward}:
    found = list(torch.autograd.grad(sum(each.sin().sum() for each in found), list(program.parameters())))
torch.save(found, {str(path.with_suffix(".outputs"))!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    outputs: list[Tensor] = torch.load(path.with_suffix(".outputs"))
    return outputs


class Called(nn.Module):
    """A module around another, as a program to be."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.layer, *inputs)


def call(layer: Any, *inputs: Any) -> Any:
    return layer(*inputs)[0]


CASES: dict[str, tuple[Callable[[], Any], Callable[..., Any], tuple[Tensor, ...]]] = {
    "scan": (lambda: rnnfast.GRU(5, 7, num_layers=2), call, (torch.randn(4, 3, 5),)),
    "step": (
        lambda: rnnfast.RNN(5, 7),
        lambda layer, x, h: layer.step(x, h),
        (torch.randn(3, 5), torch.zeros(1, 3, 7)),
    ),
    "lengths": (
        lambda: rnnfast.LSTM(5, 7),
        lambda layer, x, n: layer(x, lengths=n)[0],
        (torch.randn(4, 3, 5), torch.tensor([2, 4, 1])),
    ),
    "states": (lambda: rnnfast.LSTM(5, 7), lambda layer, x: layer.states(x)[:2], (torch.randn(4, 3, 5),)),
    "extended": (lambda: rnnfast.Stack("gru", 5, [7, 6], layer_norm=True), call, (torch.randn(4, 3, 5),)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_exported_program(case: str, tmp_path: Path) -> None:
    build, way, inputs = CASES[case]
    model, path = Called(build(), way).eval(), tmp_path / "program.pt2"
    torch.export.save(torch.export.export(model, inputs), path)
    torch.testing.assert_close(run_elsewhere("export", path, inputs), tree_leaves(model(*inputs)))


@pytest.mark.parametrize("case", ["scan", "states", "extended"])
def test_a_trace_that_is_trained(case: str, tmp_path: Path) -> None:
    build, way, inputs = CASES[case]
    model, path = Called(build(), way), tmp_path / "program.pt"
    torch.jit.trace(model, inputs).save(path)
    outputs = tree_leaves(model(*inputs))
    gradients = torch.autograd.grad(sum(each.sin().sum() for each in outputs), list(model.parameters()))
    torch.testing.assert_close(run_elsewhere("trace", path, inputs, backward=True), list(gradients))


SERVER = """
import threading, torch, rnnfast
from torch._inductor.package import load_package
inputs, expected = torch.load({data!r})
def serve(program, mode):
    found = []
    def call():
        for _ in range(500):
            with mode():
                found.append(program(*inputs))
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(found) == 1000 and all(torch.equal(each, expected) for each in found)
serve(load_package({path!r}, num_runners=2), torch.no_grad)
program = load_package({path!r})
with torch.inference_mode():
    program(*inputs)
serve(program, torch.inference_mode)
"""


def test_a_program_compiled_ahead_of_time(tmp_path: Path) -> None:
    build, way, inputs = CASES["scan"]
    model, path, data = Called(build(), way).eval(), tmp_path / "program.pt2", tmp_path / "data.pt"
    with torch.no_grad():
        program = torch.export.export(model, inputs)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        expected = model(*inputs)
    torch.testing.assert_close(run_elsewhere("inductor", path, inputs), [expected])
    # By several threads, as docs/transforms.md says: other ways of theirs hang.
    torch.save((inputs, expected), data)
    code = SERVER.format(path=str(path), data=str(data))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_a_backend_that_cannot_be_loaded_is_named() -> None:
    weights = (torch.zeros(1, 7, 5), torch.zeros(1, 7, 7))
    arguments = (torch.zeros(12, 5), *weights, None, None, None, torch.zeros(1, 3, 7), None, None, "rnn_tanh", False)
    with pytest.raises(RuntimeError, match=r"this program calls rnnfast::scan_cuda, but .* backend='reference'"):
        torch.ops.rnnfast.scan_cuda.default(*arguments, False)


def test_tensors_that_a_loaded_backend_does_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rnnfast.RNN(5, 7, backend="cpu")(torch.zeros(1, 5))
    input, *weights = (torch.zeros(size).to_mkldnn() for size in ((12, 5), (1, 7, 5), (1, 7, 7)))
    arguments = (input, *weights, None, None, None, torch.zeros(1, 3, 7).to_mkldnn(), None, None, "rnn_tanh", False)
    with pytest.raises(NotImplementedError, match="rnnfast::scan_cpu has no implementation for these tensors, on cpu"):
        torch.ops.rnnfast.scan_cpu.default(*arguments, False)


def test_a_call_that_was_on_its_way_when_another_thread_had_loaded_the_backend() -> None:
    """The dispatcher has picked the kernel that loads it, and Python's lock was not to be had until it was loaded."""
    rnnfast.RNN(5, 7, backend="cpu")(torch.zeros(1, 5))
    op, weights = torch.ops.rnnfast.scan_cpu.default, (torch.randn(1, 7, 5), torch.randn(1, 7, 7))
    arguments = (torch.randn(12, 5), *weights, None, None, None, torch.zeros(1, 3, 7), None, None, "rnn_tanh", False)
    found = scan._load_and_call("cpu", op, *arguments, False)
    torch.testing.assert_close(found, op(*arguments, False), rtol=0, atol=0)
