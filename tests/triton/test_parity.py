"""The Triton kernels against the reference in float64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from rnnfast.backends import reference
from rnnfast.backends.triton.plan import Plan
from rnnfast.cells import CELLS
from rnnfast.scan import Weights, scan
from tests.scans import GRADIENTS, OUTPUTS, random_gradients, random_layer, widened

from .layers import assert_near

# One plan for every kernel, with tiles small enough that little layers take several of them.
KERNELS = {
    "registers": lambda hidden: Plan("registers", 1, _power_of_two(hidden), 4),
    "shared": lambda hidden: Plan("shared", 16, _power_of_two(hidden), 4),
    "step": lambda hidden: Plan("step", 16, 16, 4, depth=16, stages=2),
    "resident": lambda hidden: Plan("resident", 16, 16, 4, depth=_power_of_two(hidden)),
    "gates": lambda hidden: Plan("gates", 8, 16, 4),
}
SHAPES = {
    "one unit": {"hidden": 1, "batch": 3, "steps": 2, "seed": 1},
    "odd sizes": {"hidden": 17, "batch": 3, "steps": 2, "lanes": 2, "bias": False},
    "ragged": {"hidden": 9, "batch": 3, "steps": 3, "lanes": 2, "ragged": True, "seed": 4},
    "ragged token ids": {"hidden": 5, "batch": 2, "steps": 3, "lanes": 2, "ragged": True, "token_ids": True},
    "two row tiles": {"hidden": 18, "batch": 17, "steps": 2, "token_ids": True, "inputs": 40},
}
HALF_TYPES = [
    ("odd sizes", torch.float16),
    ("ragged", torch.bfloat16),
    ("ragged token ids", torch.float16),
    ("two row tiles", torch.bfloat16),
]
# The plain RNN's two activations differ in one line. A kernel with one batch row always has many row tiles.
CASES = [
    (cell, kernel, shape, dtype)
    for kernel in ("registers", "shared", "step", "gates")
    for cell in ("rnn_tanh", "lstm", "gru")
    for shape, dtype in [*((shape, torch.float32) for shape in SHAPES), *HALF_TYPES]
    if (kernel, shape) != ("registers", "two row tiles")
]
CASES += [
    (cell, "resident", shape, dtype)
    for cell in ("lstm", "gru")
    for shape, dtype in (("odd sizes", torch.float32), ("ragged", torch.bfloat16))
]
CASES += [("rnn_relu", kernel, "ragged", torch.float32) for kernel in KERNELS]
# Roundings of half an eps, RMS: a result rounded once stays below 1. In half types 1.28 is DESIGN's bound of 0.005 for
# bfloat16; a gradient passes through rounded gate gradients on its way.
FORWARD_ROUNDINGS = {torch.float32: 6.0, torch.bfloat16: 1.28, torch.float16: 1.28}
BACKWARD_ROUNDINGS = {torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def _power_of_two(hidden: int) -> int:
    return max(16, 1 << (hidden - 1).bit_length())


@pytest.fixture
def launch(device: torch.device):
    from rnnfast.backends.triton import launch

    return launch


@pytest.mark.parametrize(("cell", "kernel", "shape", "dtype"), CASES)
def test_matches_the_reference(launch, monkeypatch, device, cell, kernel, shape, dtype):
    """Forward and all gradients; each side's backward reads its own tape and the other's."""
    monkeypatch.setattr(launch, "plan", lambda cell, hidden, *_: KERNELS[kernel](hidden))
    layer = random_layer(cell, **SHAPES[shape], dtype=dtype, device=device)
    wide = widened(layer)
    truth = reference.forward(*wide, True)
    ours = launch.forward(*layer, True)
    for name, a, t in zip(OUTPUTS, ours, truth, strict=True):
        assert_near(name, a, t, dtype, FORWARD_ROUNDINGS[dtype])

    gradients = random_gradients(ours)
    ways = [(ours, {"ours after ours": launch.backward, "the reference after ours": reference.backward})]
    if dtype is torch.float32 or shape == "ragged":  # half types are loaded alike in all shapes
        ways.append((reference.forward(*layer, True), {"ours after the reference": launch.backward}))
    for run, backwards in ways:
        truth = reference.backward(*widened(gradients), *wide, *widened([run[0], run[3]]), True, True)
        for way, backward in backwards.items():
            results = backward(*gradients, *layer, run[0], run[3], True, True)
            for name, a, t in zip(GRADIENTS, results, truth, strict=True):
                assert_near(f"{way}: {name}", a, t, dtype, BACKWARD_ROUNDINGS[dtype])


@pytest.mark.parametrize(("cell", "hidden", "dtype"), [("lstm", 40, torch.float32), ("gru", 112, torch.bfloat16),
                                                        ("rnn_tanh", 130, torch.float32)])  # fmt: skip
def test_planned_kernels(launch, device, cell, hidden, dtype):
    """A size for each kernel that `plan` chooses among, as it chooses."""
    layer = random_layer(cell, hidden, 2, 2, dtype, device=device)
    truth = reference.forward(*widened(layer), False)
    for a, t in zip(launch.forward(*layer, False)[:3], truth, strict=False):
        assert_near("output", a, t, dtype, FORWARD_ROUNDINGS[dtype])


@pytest.fixture
def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("kernel", ["step", "resident"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_operands_are_rounded_to_tf32(launch, monkeypatch, device, allow_tf32, cell, kernel):
    """Once allowed, of every step's product forward and backward, to the nearest: tensor cores would cut bits off."""
    monkeypatch.setattr(launch, "plan", lambda cell, hidden, *_: KERNELS[kernel](hidden))
    layer = random_layer(cell, 18, 17, 3, torch.float32, lanes=2, ragged=True, token_ids=True, device=device)
    wide = widened(layer)
    truth = reference.forward(*wide, True)
    ours = launch.forward(*layer, True)
    gradients = random_gradients(ours)
    back = reference.backward(*widened(gradients), *wide, *widened([ours[0], ours[3]]), True, True)
    found = launch.backward(*gradients, *layer, ours[0], ours[3], True, True)
    for name, a, t in [("output", ours[0], truth[0]), ("d_h_0", found[6], back[6])]:
        error = float((a.double() - t).norm() / t.norm())
        # Rounded, both operands of a product are off by 2^-11 / sqrt(3) as RMS at most; cut off, by twice as much.
        assert 2**-16 < error < 2**-11, f"{name}: {error:.1e}"

    # What is rounded already is not changed: a step's product is that of rounded weights and state.
    def one_step(h_0: Tensor, w_hh: Tensor) -> Tensor:
        input, w_ih, _, *biases, _, c_0, _, name, bidirectional = layer
        return launch.forward(input[:17], w_ih, w_hh, *biases, h_0, c_0, None, name, bidirectional, False)[0]

    if cell != "gru":  # whose gates add h itself
        h_0, w_hh = layer[6], layer[2]
        rounded = launch._rounded_to_tf32
        assert torch.equal(one_step(h_0, w_hh), one_step(rounded(h_0), rounded(w_hh)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_does_not_depend_on_the_batch_or_on_chunks(launch, monkeypatch, device, kernel):
    """Bit for bit, but where torch's GEMM takes a row otherwise among others; and NaN in one row stays in that row."""
    monkeypatch.setattr(launch, "plan", lambda cell, hidden, *_: KERNELS[kernel](hidden))
    batch, steps = 3, 4
    layer = random_layer("lstm", 10, batch, steps, torch.float32, device=device)
    input, *weights, h_0, c_0, _, cell, bidirectional = layer
    # Row by row: token ids need no product over the input, whose own rounding may depend on the number of rows.
    input = torch.randint(3, (steps * batch,), device=device)
    output, h_n, c_n, _ = launch.forward(input, *weights, h_0, c_0, None, cell, bidirectional, False)
    row = (input[1::batch].contiguous(), *weights, h_0[:, 1:2].contiguous(), c_0[:, 1:2].contiguous())
    alone = launch.forward(*row, None, cell, bidirectional, False)
    if kernel == "gates":
        torch.testing.assert_close(alone[0], output[1::batch], rtol=0, atol=1e-6)
    else:
        assert torch.equal(alone[0], output[1::batch])

    half = steps // 2 * batch
    first = launch.forward(input[:half], *weights, h_0, c_0, None, cell, bidirectional, False)
    second = launch.forward(input[half:], *weights, *first[1:3], None, cell, bidirectional, False)
    assert torch.equal(torch.cat((first[0], second[0])), output)
    assert torch.equal(second[1], h_n)
    assert torch.equal(second[2], c_n)

    h_0 = h_0.clone()
    h_0[:, 0, 0] = float("nan")
    spoilt = launch.forward(input, *weights, h_0, c_0, None, cell, bidirectional, False)[0]
    assert spoilt[0::batch].isnan().all()
    assert torch.equal(spoilt[1::batch], output[1::batch])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("batch", "steps"), [(0, 0), (3, 0)])
def test_nothing_to_scan(launch, device, cell, batch, steps):
    layer = random_layer(cell, 5, batch, steps, torch.float32, lanes=2, device=device)
    truth = reference.forward(*layer, True) if batch else None
    ours = launch.forward(*layer, True)
    assert torch.equal(ours[1], layer[6])
    gradients = [None, torch.ones_like(ours[1]), None]
    results = launch.backward(*gradients, *layer, ours[0], ours[3], True, True)
    assert torch.equal(results[6], torch.ones_like(ours[1]))
    assert not results[2].any()
    if truth is not None:
        assert [a.shape for a in ours[:3]] == [t.shape for t in truth[:3]]


def test_what_is_not_needed_is_empty(launch, device):
    layer = random_layer("gru", 5, 2, 2, torch.float32, device=device)
    output, _, c_n, tape = launch.forward(*layer, False)
    assert c_n.shape == tape.shape == (0,)
    tape = launch.forward(*layer, True)[3]
    results = launch.backward(None, None, None, *layer, output, tape, False, False)
    assert [r.numel() for r in results] == [0, 0, 0, 0, 0, 0, 10, 0]
    assert not results[6].any()


@pytest.mark.parametrize(("cell", "kernel"), [*((cell, "registers") for cell in CELLS), ("lstm", "gates")])
def test_through_autograd(device, launch, monkeypatch, cell, kernel):
    """The registered operator gives the reference's gradients, h_n and c_n alone included."""
    monkeypatch.setattr(launch, "plan", lambda cell, hidden, *_: KERNELS[kernel](hidden))

    def gradients(backend: str) -> tuple[Tensor, ...]:
        layer = random_layer(cell, 6, 3, 3, torch.float32, lanes=2, device=device)
        leaves = [x.requires_grad_() for x in layer if isinstance(x, Tensor) and x.is_floating_point()]
        input, *weights, h_0, c_0, sizes, cell_name, bidirectional = layer
        _, h_n, c_n = scan(backend, input, Weights(*weights), h_0, c_0, sizes, cell_name, bidirectional)
        return torch.autograd.grad(h_n.square().sum() + c_n.square().sum(), leaves)

    for ours, theirs in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("cell", "kernel"), [("rnn_tanh", "registers"), ("lstm", "registers"), ("gru", "registers"), ("gru", "gates")]
)
def test_operator_check(device, launch, monkeypatch, cell, kernel):
    """The implementation honours its schema (nothing mutated, nothing aliased) and the fakes its shapes."""
    monkeypatch.setattr(launch, "plan", lambda cell, hidden, *_: KERNELS[kernel](hidden))
    checks = ("test_schema", "test_faketensor")
    layer = random_layer(cell, 3, 2, 2, torch.float32, device=device)
    torch.library.opcheck(torch.ops.rnnfast.scan_triton.default, (*layer, True), test_utils=checks)
    ours = launch.forward(*layer, True)
    arguments = (*random_gradients(ours), *layer, ours[0], ours[3], True, True)
    torch.library.opcheck(torch.ops.rnnfast.scan_triton_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize("token_id", [-1, 3])
@pytest.mark.parametrize("rows", [2, 4])
def test_a_token_id_outside_the_vocabulary_is_an_error(launch, device, rows, token_id):
    """Whether the ids are looked up in the table of all ids, or beforehand."""
    if device.type == "cuda":
        pytest.skip("there the error ends the use of the device")
    layer = random_layer("gru", 4, 1, rows, torch.float32, token_ids=True, inputs=3)
    layer[0][1] = token_id
    with pytest.raises(IndexError):
        launch.forward(*layer, False)


@pytest.mark.parametrize("sizes", [[3, 2, 1], [3, 5, 1], [3, 7, -1], [2, 3, 3, 1], [3, 3, 3, 3], [9]], ids=str)
def test_sizes_that_no_ragged_batch_has_are_refused(launch, device, sizes):
    layer = random_layer("gru", 4, 3, 3, torch.float32, device=device)
    output, _, _, tape = launch.forward(*layer, True)
    layer[8] = torch.tensor(sizes)
    with pytest.raises(RuntimeError, match="batch_sizes must start with the batch size of the states, 3, never rise"):
        launch.forward(*layer, False)
    with pytest.raises(RuntimeError, match="batch_sizes must start with"):
        launch.backward(torch.ones_like(output), None, None, *layer, output, tape, True, True)


def test_strided_tensors_are_refused(launch, device):
    """As an exported program may pass them, which makes none contiguous that was so in its example."""
    layer = random_layer("gru", 4, 3, 2, torch.float32, device=device)
    layer[6] = layer[6].mT.contiguous().mT
    with pytest.raises(RuntimeError, match="h_0 must be contiguous"):
        launch.forward(*layer, False)
    layer[6] = layer[6].contiguous()
    output, _, _, tape = launch.forward(*layer, True)
    with pytest.raises(RuntimeError, match="d_output must be contiguous"):
        launch.backward(output.t().contiguous().t(), None, None, *layer, output, tape, True, True)


def test_unsupported(launch, device):
    layer = random_layer("lstm", 4, 2, 2, torch.float32, device=device)
    with pytest.raises(NotImplementedError, match="float64"):
        launch.forward(*widened(layer), False)
    layer[5] = torch.zeros(1, 2, 4, device=device)
    with pytest.raises(NotImplementedError, match="proj_size"):
        launch.forward(*layer, False)
