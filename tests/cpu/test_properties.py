"""What the native scan promises beyond the right numbers: invariance, isolation of rows, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor

from rnnfast.backends.cpu import packing
from rnnfast.cells import CELLS
from tests.cpu import test_extended
from tests.cpu.harness import DTYPES, Case, build, cpu, gradients_like, run

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


@pytest.fixture(autouse=True)
def _library() -> None:
    cpu.load()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
# The backward products pack weights for a large batch and not for a few rows, where there are whole vectors of them.
@pytest.mark.parametrize("sizes", [(7, 23, 37, 130), (3, 700, 48, 64), (3, 700, 48, 256)], ids=str)
def test_a_row_does_not_depend_on_its_batch(cell: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    steps, batch, inputs, hidden = sizes
    arguments = build(Case(cell, 1, steps, batch, inputs, hidden), dtype)
    d_outputs = gradients_like(arguments, dtype)
    outputs, gradients = run("cpu", arguments, d_outputs)
    for rows in (slice(0, 1), slice(3, 9), slice(22, 23)):

        def part(tensor: Tensor | None, rows: slice = rows) -> Tensor | None:
            if tensor is None:
                return None
            if tensor.dim() == 3:  # a state: (1, B, H)
                return tensor[:, rows].contiguous()
            return tensor.view(steps, batch, -1)[:, rows].flatten(0, 1).contiguous()

        some = [part(arguments[0]), *arguments[1:6], part(arguments[6]), part(arguments[7]), *arguments[8:]]
        some_outputs, some_gradients = run("cpu", some, [part(d) for d in d_outputs])
        for name in ("output", "h_n"):
            assert torch.equal(some_outputs[name], part(outputs[name])), name
        for name in ("d_input", "d_h_0"):
            assert torch.equal(some_gradients[name], part(gradients[name])), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ids", [False, True])
def test_chunks_and_single_steps_agree_bitwise_with_the_whole(cell: str, dtype: torch.dtype, ids: bool) -> None:
    steps, batch = 37, 3
    arguments = build(Case(cell, 1, steps, batch, 11, 70, ids=ids), dtype)
    whole = torch.ops.rnnfast.scan_cpu(*arguments, False)
    for chunk in (1, 5, 36):
        h, c, outputs = arguments[6], arguments[7], []
        for rows in arguments[0].split(chunk * batch):
            output, h, c_n, _ = torch.ops.rnnfast.scan_cpu(rows, *arguments[1:6], h, c, *arguments[8:], False)
            c = c if c is None else c_n
            outputs.append(output)
        assert torch.equal(torch.cat(outputs), whole[0])
        assert torch.equal(h, whole[1])
        assert c is None or torch.equal(c, whole[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ids", [False, True])
def test_packed_weights_give_the_same_bits(cell: str, dtype: torch.dtype, ids: bool) -> None:
    for projected in (0, 5) if cell == "lstm" else (0,):
        arguments = build(Case(cell, 2, 6, 5, 9, 37, projected, ids, ragged=True), dtype)
        lanes = [[None if w is None else w[lane].clone() for w in arguments[1:6]] for lane in range(2)]
        packed = packing.packed_weights(lanes, cell, ids)
        assert packing.packed_weights(lanes, cell, ids) is packed
        got = packing.scan_packed(arguments[0], packed, *arguments[6:9], bidirectional=True)
        assert all(map(torch.equal, got, torch.ops.rnnfast.scan_cpu(*arguments, False)))

        lanes[1][1].mul_(2)  # seen by its version
        arguments[2][1].mul_(2)
        changed = packing.packed_weights(lanes, cell, ids)
        assert changed is not packed
        got = packing.scan_packed(arguments[0], changed, *arguments[6:9], bidirectional=True)
        assert all(map(torch.equal, got, torch.ops.rnnfast.scan_cpu(*arguments, False)))

        kept = len(packing.packings)
        del lanes
        assert len(packing.packings) == kept - 1


def test_weights_that_become_a_transpose_of_their_memory_are_packed_anew() -> None:
    """As by an assignment to `.data`, which changes no version; nor are shape and address others, of a square."""
    w_ih, w_hh = torch.randn(9, 5), torch.randn(9, 9)
    lanes = [[w_ih, w_hh, None, None, None]]
    packing.packed_weights(lanes, "rnn_tanh", False)
    before = w_hh.shape, w_hh.data_ptr(), w_hh._version
    w_hh.data = w_hh.data.t()
    assert (w_hh.shape, w_hh.data_ptr(), w_hh._version) == before
    packed = packing.packed_weights(lanes, "rnn_tanh", False)
    input, h_0 = torch.randn(6, 5), torch.randn(1, 3, 9)
    output, _, _ = packing.scan_packed(input, packed, h_0, None)
    layer = (input, w_ih[None], w_hh.contiguous()[None], None, None, None, h_0, None, None, "rnn_tanh", False)
    assert torch.equal(output, torch.ops.rnnfast.scan_cpu(*layer, False)[0])


def test_lasting_weights_remember_nothing_of_those_that_are_gone() -> None:
    """As where one weight of a layer is computed anew in every call."""
    lasting = torch.randn(12, 5)

    def count() -> tuple[int, int, int]:
        return len(packing.packings), len(weakref.getweakrefs(lasting)), len(weakref.finalize._registry)

    counts = []
    for _ in range(5):
        packing.packed_weights([[lasting, torch.randn(12, 4), None, None, None]], "gru", False)
        counts.append(count())
    assert counts[1:] == counts[:1] * 4


def test_forgotten_weights_can_be_swapped() -> None:
    weights, other = [torch.randn(12, 5), torch.randn(12, 4)], torch.randn(12, 5)
    packing.packed_weights([[*weights, None, None, None]], "gru", False)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(weights[0], other)
    packing.forget()
    expected = other.clone()
    torch.utils.swap_tensors(weights[0], other)
    assert torch.equal(weights[0], expected)
    packed = packing.packed_weights([[*weights, None, None, None]], "gru", False)
    input, h_0 = torch.randn(6, 5), torch.zeros(1, 3, 4)
    output, _, _ = packing.scan_packed(input, packed, h_0, None)
    layer = (input, expected[None], weights[1][None], None, None, None, h_0, None, None, "gru", False)
    assert torch.equal(output, torch.ops.rnnfast.scan_cpu(*layer, False)[0])


def test_packed_weights_that_do_not_fit() -> None:
    w_ih, w_hh, *_ = build(Case("gru"), torch.float32)[1:6]
    packed = packing.packed_weights([[w_ih[0], w_hh[0], None, None, None]], "gru", False)
    with pytest.raises(RuntimeError, match=r"input must be contiguous float32 of shape \(3, 4\)"):
        packing.scan_packed(torch.zeros(3, 5), packed, torch.zeros(1, 3, 8), None)
    with pytest.raises(RuntimeError, match="not weights that scan_cpu_pack has packed"):
        packing.scan_packed(torch.zeros(3, 4), torch.zeros(1000, dtype=torch.uint8), torch.zeros(1, 3, 8), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_stay_in_their_row(cell: str, dtype: torch.dtype) -> None:
    steps, batch = 4, 9
    arguments = build(Case(cell, 1, steps, batch, 5, 33), dtype)
    d_outputs = gradients_like(arguments, dtype)
    clean = run("cpu", arguments, d_outputs)
    arguments[0] = arguments[0].clone()
    arguments[0][batch + 3, 2] = float("nan")
    arguments[0][batch + 5, 2] = float("inf")
    outputs, gradients = run("cpu", arguments, d_outputs)
    good = [row for row in range(batch) if row not in (3, 5)]
    for got, expected in zip(
        (outputs["output"], gradients["d_input"]), (clean[0]["output"], clean[1]["d_input"]), strict=True
    ):
        assert torch.equal(got.view(steps, batch, -1)[:, good], expected.view(steps, batch, -1)[:, good])
    assert outputs["output"].view(steps, batch, -1)[1:, 3].isnan().all()
    assert torch.equal(outputs["output"].view(steps, batch, -1)[0], clean[0]["output"].view(steps, batch, -1)[0])
    assert cell == "rnn_relu" or gradients["d_h_0"][0, 3].isnan().any()  # relu's gradient does not read its argument


@pytest.mark.parametrize("ids", [False, True])
def test_an_infinite_gradient_makes_an_infinite_sum(ids: bool) -> None:
    """And no NaN, though what each addition rounds off is kept for the next one."""
    arguments = build(Case("rnn_relu", 1, 1, 300, 4, 5, ids=ids), torch.float32)
    d_outputs = gradients_like(arguments, torch.float32)
    unit = int(run("cpu", arguments, d_outputs)[0]["output"][0].argmax())  # one that relu lets through
    d_outputs[0][0, unit] = torch.inf
    _, gradients = run("cpu", arguments, d_outputs)
    assert gradients["d_b_ih"][0, unit] == torch.inf
    assert not ids or gradients["d_w_ih"][0, unit, arguments[0][0]] == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_over_the_whole_range(dtype: torch.dtype) -> None:
    """A unit with weight 1 and zero state shows tanh and, through an LSTM's forget gate, sigmoid."""
    tiny = torch.logspace(-300 if dtype is torch.float64 else -37, 0, 400, dtype=dtype)
    x = torch.cat(
        [tiny, torch.linspace(-110, 110, 4001, dtype=dtype), torch.tensor([0.0, -0.0, float("inf"), 1e30], dtype=dtype)]
    )
    x = torch.cat([x, -x])[:, None]
    one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
    h_0 = torch.zeros(1, len(x), 1, dtype=dtype)
    tanh = torch.ops.rnnfast.scan_cpu(x, one, zero, None, None, None, h_0, None, None, "rnn_tanh", False, False)[0]
    w = torch.tensor([-0.0, 1.0, 0.0, 0.0], dtype=dtype).view(1, 4, 1)
    finite = x.isfinite().all(1)  # 0 * inf is NaN in the other gates
    tape = torch.ops.rnnfast.scan_cpu(
        x[finite],
        w,
        0 * w,
        None,
        None,
        None,
        h_0[:, finite].contiguous(),
        h_0[:, finite].contiguous(),
        None,
        "lstm",
        False,
        True,
    )[3]
    eps = torch.finfo(dtype).eps
    exact = x.double().tanh()
    assert ((tanh.double() - exact).abs() <= 3 * eps * exact.abs()).all()
    assert torch.equal(torch.signbit(tanh[x != 0]), torch.signbit(x[x != 0]))
    exact = x[finite].double().sigmoid()
    smallest = torch.finfo(dtype).tiny * 2
    assert ((tape[0, :, 1:2].double() - exact).abs() <= 3 * eps * exact + smallest).all()


def fill_kept_memory(byte: int) -> None:
    """Leaves the blocks of memory that the next calls take for their scratch full of this byte."""
    sizes = [2 << 20] * 32 + [4 << 20] * 8
    blocks = [torch.ops.rnnfast.direct_empty_cpu(torch.empty(0, dtype=torch.uint8), [size]) for size in sizes]
    for block in blocks:
        block.fill_(byte)


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 11), reason="this torch takes no memory of the library's"
)
@pytest.mark.parametrize("projected", [0, 129])
@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_depend_on_what_the_scratch_held(cell: str, projected: int) -> None:
    """In bfloat16 products take pairs: a last, odd, half is padded, as what lies behind it, times 0, may be NaN."""
    if projected and cell != "lstm":
        pytest.skip("projections are an LSTM's")
    case, dtype = Case(cell, 1, 3, 50, 35, 331, projected, ragged=True), torch.bfloat16
    arguments = build(case, dtype)
    d_outputs = gradients_like(arguments, dtype)
    extended = test_extended.extend(case, "everything" if cell in ("lstm", "gru") else "zoneout", dtype)
    found = []
    for byte in (0, 0xFF):  # the latter makes a NaN of any type
        results: list[Tensor] = []
        for call in (lambda: run("cpu", arguments, d_outputs), lambda: test_extended.run("cpu", extended)):
            fill_kept_memory(byte)
            for tensors in call():
                results += tensors.values()
        found.append(results)
    for clean, other in zip(*found, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, other)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell: str) -> None:
    arguments = build(Case(cell, 2, 3, 0, 4, 5), torch.float32)
    outputs, gradients = run("cpu", arguments, gradients_like(arguments, torch.float32))
    assert outputs["output"].shape == (0, 10)
    assert outputs["h_n"].shape == (2, 0, 5)
    assert not gradients["d_w_hh"].any()
    assert gradients["d_h_0"].shape == (2, 0, 5)


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_without_features(cell: str) -> None:
    """The bias beside w_ih has a gradient all the same."""
    arguments = build(Case(cell, 2, 5, 3, 0, 8), torch.float64)
    d_outputs = gradients_like(arguments, torch.float64)
    for ours, theirs in zip(run("cpu", arguments, d_outputs), run("reference", arguments, d_outputs), strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


def test_outputs_that_are_not_wanted_are_empty() -> None:
    arguments = build(Case("lstm"), torch.float32)
    d_outputs = gradients_like(arguments, torch.float32)
    output, _, _, tape = torch.ops.rnnfast.scan_cpu(*arguments, True)
    full = torch.ops.rnnfast.scan_cpu_backward(*d_outputs, *arguments, output, tape, True, True)
    none = torch.ops.rnnfast.scan_cpu_backward(*d_outputs, *arguments, output, tape, False, False)
    assert [tuple(d.shape) for d in none[:6]] == [(0,)] * 6
    assert all(torch.equal(a, b) for a, b in zip(full[6:], none[6:], strict=True))
    d_h_n = torch.ops.rnnfast.scan_cpu_backward(None, d_outputs[1], None, *arguments, output, tape, True, True)
    zeros = [torch.zeros_like(d) for d in d_outputs]
    same = torch.ops.rnnfast.scan_cpu_backward(zeros[0], d_outputs[1], zeros[2], *arguments, output, tape, True, True)
    assert all(torch.equal(a, b) for a, b in zip(d_h_n, same, strict=True))


def test_a_hundred_thousand_steps() -> None:
    arguments = build(Case("gru", 2, 100_000, 1, 2, 3), torch.float64)
    outputs, gradients = run("cpu", arguments, gradients_like(arguments, torch.float64))
    assert outputs["output"].isfinite().all()
    assert gradients["d_w_hh"].isfinite().all()
    forward = torch.ops.rnnfast.scan_cpu(arguments[0][-50:], *arguments[1:], False)[0]
    assert torch.allclose(forward[-1, :3], outputs["output"][-1, :3], atol=1e-6)  # 50 steps forget where they began


@pytest.mark.parametrize("sizes", [[2, 2], [3, 1, 1], [2, 3], [2, 4, -1], [2, 2, 2, -1]])
def test_batch_sizes_that_do_not_fit(sizes: list[int]) -> None:
    arguments = [
        torch.randn(5, 4),
        torch.randn(1, 3, 4),
        torch.randn(1, 3, 3),
        None,
        None,
        None,
        torch.zeros(1, 2, 3),
        None,
    ]
    with pytest.raises(RuntimeError, match="batch_sizes"):
        torch.ops.rnnfast.scan_cpu(*arguments, torch.tensor(sizes), "rnn_tanh", False, False)


def test_backward_without_a_tape() -> None:
    arguments = [torch.randn(6, 4), torch.randn(1, 12, 4), torch.randn(1, 12, 3), None, None, None]
    arguments += [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), None, "lstm", False]
    output, _, _, tape = torch.ops.rnnfast.scan_cpu(*arguments, False)
    with pytest.raises(RuntimeError, match="save_tape=True"):
        torch.ops.rnnfast.scan_cpu_backward(output, None, None, *arguments, output, tape, True, True)


def test_token_id_out_of_range() -> None:
    arguments = build(Case("gru", ids=True), torch.float32)
    arguments[0][2] = 4
    with pytest.raises(RuntimeError, match=r"token id 4 in row 2 is outside \[0, 4\)"):
        torch.ops.rnnfast.scan_cpu(*arguments, False)


def test_unsupported_dtype() -> None:
    with pytest.raises(RuntimeError, match="float32, float64 and bfloat16"):
        torch.ops.rnnfast.scan_cpu(*build(Case("gru"), torch.float16), False)


def test_a_missing_compiler_is_a_reason(tmp_path: object) -> None:
    code = """
import torch
import rnnfast.scan
from rnnfast.backends import cpu
from rnnfast.backends.cpu import build
build.installed = lambda: None
print(cpu.why_not())
try:
    cpu.load()
except RuntimeError as error:
    print(error)
"""
    for given, reason in (
        ({"CXX": "no-such-compiler -O1"}, "CXX is 'no-such-compiler -O1', which is no program"),
        ({"CXX": "", "PATH": str(tmp_path)}, "no C++ compiler was found"),
    ):
        env = os.environ | {"RNNFAST_CACHE": str(tmp_path)} | given
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.count(reason) == 2


def test_a_failing_compiler_is_a_reason(tmp_path: object) -> None:
    code = """
import rnnfast.scan
from rnnfast.backends import cpu
from rnnfast.backends.cpu import build
build.installed = lambda: None
assert cpu.why_not() is None
try:
    cpu.load()
except RuntimeError as error:
    print(error)
print(cpu.why_not())
"""
    env = os.environ | {"CXX": "false", "RNNFAST_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.count("failed to compile or load") == 2
    assert done.stderr.count("failed to compile or load") == 1
