"""Backward scans that go through a long sequence part by part, each followed by its gradients of weights and inputs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import rnnfast
from rnnfast.backends import cpu
from tests.cpu.harness import DTYPES, Case, assert_same, build, gradients_like, run
from tests.cpu.test_parity import check

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

STEPS, BATCH = 70, 61
CASES = ("rnn_tanh", "lstm", "gru")
LAYERS = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}


def units(cell: str, dtype: torch.dtype) -> int:
    """As many as make two parts or more of these rows: a part has 4 MB of gradients of gates."""
    return 1056 // dtype.itemsize // (1 if cell == "rnn_tanh" else 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("cell", CASES)
def test_parity(cell: str, lanes: int, ids: bool, ragged: bool, dtype: torch.dtype) -> None:
    case = Case(cell, lanes, STEPS, 2 * BATCH if ragged else BATCH, 5, units(cell, dtype), 0, ids, ragged, not ragged)
    check(case, dtype)
    if cell == "lstm" and not ids:
        check(case._replace(projected=7), dtype)


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_parity_of_several_lanes_in_either_direction(ragged: bool) -> None:
    check(Case("gru", 4, STEPS, BATCH, 5, units("gru", torch.float32), 0, False, ragged), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CASES)
def test_parity_of_as_many_columns_as_are_worth_the_matrix_unit(cell: str, dtype: torch.dtype) -> None:
    check(Case(cell, 1, STEPS, BATCH, 64, units(cell, dtype)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CASES)
def test_results_do_not_depend_on_threads(cell: str, dtype: torch.dtype) -> None:
    results: list[dict[str, Tensor]] = []
    shapes = [(1, False, False, 0), (1, True, False, 0), (2, False, False, 0), (2, False, True, 0)]
    if cell == "lstm":  # in bfloat16 its parts leave sums to the next, among them a projection's in two directions
        shapes.append((2, True, False, 7))
    for lanes, ids, ragged, projected in shapes:
        batch = 2 * BATCH if ragged else BATCH
        arguments = build(Case(cell, lanes, STEPS, batch, 9, units(cell, dtype), projected, ids, ragged), dtype)
        d_outputs = gradients_like(arguments, dtype)
        results.clear()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", arguments, d_outputs)[1])
            assert_same(results[-1], results[0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[3] + [1] * 2999, [2] * 2 + [1] * 2500, [600] + [1] * 3000], ids=["3", "2", "600"])
@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU"])
def test_steps_of_very_different_sizes(layer: str, lengths: list[int], bidirectional: bool) -> None:
    """Some parts are a single step, others hundreds, and some would have none."""
    hidden = units(LAYERS[layer], torch.float64)
    ours = getattr(rnnfast, layer)(2, hidden, backend="cpu", dtype=torch.float64, bidirectional=bidirectional)
    theirs = getattr(nn, layer)(2, hidden, dtype=torch.float64, bidirectional=bidirectional)
    theirs.load_state_dict(ours.state_dict())
    sequences = [torch.randn(length, 2, dtype=torch.float64) for length in lengths]
    packed = nn.utils.rnn.pack_sequence(sequences)
    found = []
    state = torch.randn(1 + bidirectional, len(lengths), hidden, dtype=torch.float64)
    for module in (ours, theirs):
        data, h_0, c_0 = (
            packed.data.clone().requires_grad_(),
            state.clone().requires_grad_(),
            state.cos().requires_grad_(),
        )
        before = [h_0, c_0] if layer == "LSTM" else [h_0]
        output, after = module(
            nn.utils.rnn.PackedSequence(data, packed.batch_sizes), tuple(before) if layer == "LSTM" else h_0
        )
        h_n = after[0] if isinstance(after, tuple) else after
        loss = output.data.square().sum() + h_n.sum()
        found.append(torch.autograd.grad(loss, [data, *before, *module.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU"])
def test_last_steps_without_rows(layer: str, bidirectional: bool, dtype: torch.dtype) -> None:
    """A PackedSequence may say so; no part may consist of them alone."""
    hidden = units(LAYERS[layer], dtype)
    module = getattr(rnnfast, layer)(2, hidden, backend="cpu", dtype=dtype, bidirectional=bidirectional)
    data = torch.randn(4000, 2, dtype=dtype)
    found = []
    for sizes in ([2500, 1500], [2500, 1500, 0, 0, 0]):
        output, _ = module(nn.utils.rnn.PackedSequence(data, torch.tensor(sizes)))
        found.append([output.data, *torch.autograd.grad(output.data.square().sum(), [*module.parameters()])])
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("ids", [False, True], ids=["dense", "ids"])
@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU"])
def test_gradients_of_biases_alone(layer: str, ids: bool) -> None:
    hidden = units(LAYERS[layer], torch.float64)
    module = getattr(rnnfast, layer)(4, hidden, backend="cpu", dtype=torch.float64)
    input = torch.randint(4, (STEPS, BATCH)) if ids else torch.randn(STEPS, BATCH, 4, dtype=torch.float64)
    d_output = torch.randn(STEPS, BATCH, hidden, dtype=torch.float64)

    def gradients(names: list[str]) -> dict[str, Tensor]:
        wanted = {name: parameter for name, parameter in module.named_parameters() if name in names}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in names)
        return dict(zip(wanted, torch.autograd.grad(module(input)[0], list(wanted.values()), d_output), strict=True))

    every = gradients([name for name, _ in module.named_parameters()])
    biases = gradients(["bias_ih_l0", "bias_hh_l0"])
    for name, gradient in biases.items():
        torch.testing.assert_close(gradient, every[name], rtol=1e-12, atol=1e-12)


def test_a_large_vocabulary_is_not_worth_parts() -> None:
    """The sums of its columns would take more memory than the gradients of the gates of all rows."""
    check(Case("gru", 1, STEPS, BATCH, 5000, units("gru", torch.float32), 0, True), torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", ["LSTM", "GRU"])
def test_a_backward_pass_holds_the_gates_of_few_rows(layer: str, dtype: str) -> None:
    code = f"""
import resource, torch, rnnfast
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layer = rnnfast.{layer}(8, 128, dtype=torch.{dtype})
for steps in (16, 1024):
    _, state = layer(torch.randint(8, (steps, 64)))
    before = most()
    (state[0] if isinstance(state, tuple) else state).sum().backward()
print(most() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    gates = 1024 * 64 * 4 * 128 * (4 if dtype == "float32" else 2) // 1024  # KB
    assert int(done.stdout) < gates / 4
