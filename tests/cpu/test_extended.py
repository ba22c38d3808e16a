"""The native scan with an extended recurrence beside the reference: numbers, invariance, transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast import extended
from rnnfast.backends import cpu
from rnnfast.backends.cpu import packing
from rnnfast.cells import CELLS
from tests.cpu.harness import Case, build
from tests.scans import widened

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

OPTIONS = {
    "recurrent dropout": {"mask"},
    "zoneout": {"zones"},
    "expectation": {"shares"},
    "layer norm": {"norm"},
    "peepholes": {"peepholes"},
    "everything": {"mask", "zones", "norm", "peepholes"},
    "normalised expectation": {"shares", "norm"},
}
CELLS_AND_OPTIONS = [
    pytest.param(cell, option, id=f"{cell} {option}")
    for cell in CELLS
    for option, parts in OPTIONS.items()
    if (cell in ("lstm", "gru") or "norm" not in parts) and (cell == "lstm" or option != "peepholes")
]
OUTPUTS = ("output", "h_n", "c_n")
LEAVES = ["input", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h_0", "c_0"]
LEAVES += ["gain_ih", "gain_hh", "gain_c", "bias_c", "peepholes"]
MASK = len(LEAVES)  # where recurrent_mask stands in the arguments, and behind it zoneout_h and zoneout_c


@pytest.fixture(autouse=True)
def _library() -> None:
    cpu.load()


def extend(case: Case, option: str, dtype: torch.dtype = torch.float64) -> list[Any]:
    """The arguments of the operator but for save_tape."""
    *layer, batch_sizes, cell, bidirectional = build(case, dtype)
    input, _, w_hh, _, _, _, h_0, c_0 = layer
    parts, rows, lstm = OPTIONS[option], input.shape[0], cell == "lstm"

    def uniform(*shape: int) -> Tensor:
        return torch.rand(case.lanes, *shape, dtype=torch.float64).add(0.5).to(dtype)

    gains: list[Any] = [None] * 4
    if "norm" in parts:
        gains = [uniform(w_hh.shape[1]), uniform(w_hh.shape[1])] + [uniform(case.hidden) if lstm else None] * 2
    gains.append(uniform(3, case.hidden).sub(1).div(4) if "peepholes" in parts and lstm else None)
    mask = ((torch.rand(*h_0.shape) < 0.7) / 0.7).to(dtype) if "mask" in parts else None
    zones: list[Any] = [None, None]
    for i, (state, p) in enumerate(((h_0, 0.3), (c_0, 0.2))):
        if "zones" in parts and state is not None:
            zones[i] = torch.rand(case.lanes, rows, state.shape[2]) < p
    shares = (0.3, 0.2 * lstm) if "shares" in parts else (0.0, 0.0)
    return [*layer, *gains, mask, *zones, batch_sizes, *shares, cell, bidirectional]


def run(backend: str, arguments: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients by name; the loss weighs every output by random numbers."""
    before = torch.get_num_threads()
    if backend == "reference":  # many small operations, for which threads would wait where the machine is busy
        torch.set_num_threads(1)
    try:
        return _run(backend, arguments)
    finally:
        torch.set_num_threads(before)


def _run(backend: str, arguments: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    leaves = {}
    for i, name in enumerate(LEAVES):
        if arguments[i] is not None and arguments[i].is_floating_point():
            leaves[name] = arguments[i].detach().clone().requires_grad_()
    arguments = [leaves.get(name, value) for name, value in zip(LEAVES, arguments, strict=False)] + arguments[MASK:]
    results = (
        extended.definition(*arguments)
        if backend == "reference"
        else torch.ops.rnnfast.scan_extended_cpu.default(*arguments, True)
    )
    outputs = {name: out for name, out in zip(OUTPUTS, results, strict=False) if out.numel()}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return {name: out.detach() for name, out in outputs.items()}, dict(zip(leaves, gradients, strict=True))


SHAPES = [(1, 5, 3, 4, 33), (2, 6, 7, 5, 17), (1, 1, 1, 1, 1), (2, 12, 1, 3, 20)]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("cell", "option"), CELLS_AND_OPTIONS)
def test_float64_is_the_reference(cell: str, option: str, ragged: bool) -> None:
    for i, shape in enumerate(SHAPES):
        hidden = shape[-1]
        for projected in (0, (1 + hidden) // 2) if cell == "lstm" else (0,):
            case = Case(cell, *shape, projected, ragged=ragged, ids=i == 1, bias=i != 3)
            arguments = extend(case, option)
            torch.testing.assert_close(run("cpu", arguments), run("reference", arguments))


@pytest.mark.parametrize("option", ["layer norm", "peepholes"])
def test_gains_and_peepholes_beyond_a_block_of_sums(option: str) -> None:
    """Of 256 columns; tasks with one each share the units."""
    arguments = extend(Case("lstm", 2, 3, 4, 3, 300, ragged=True), option)
    for ours, theirs in zip(run("cpu", arguments), run("reference", arguments), strict=True):
        for name, tensor in ours.items():
            torch.testing.assert_close(
                tensor, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("projected", [11, 40])
def test_projected_beyond_a_panel_by_a_team_and_alone(projected: int) -> None:
    before = torch.get_num_threads()
    try:
        for batch, threads in ((1, 2), (70, 2), (9, 1)):
            torch.set_num_threads(threads)
            arguments = extend(Case("lstm", 2, 6, batch, 5, 130, projected, ragged=True), "everything")
            torch.testing.assert_close(run("cpu", arguments), run("reference", arguments))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("cell", "option"), CELLS_AND_OPTIONS)
def test_float32_error_is_at_most_twice_that_of_the_reference(cell: str, option: str) -> None:
    squares: dict[str, Tensor] = {}
    for _ in range(3):  # one draw may be a lucky one
        projected = 40 if cell == "lstm" and option == "everything" else 0
        arguments = extend(Case(cell, 2, 20, 16, 11, 64, projected, ragged=True), option, torch.float32)
        truth, theirs, ours = (
            {name: tensor.double() for part in run(backend, values) for name, tensor in part.items()}
            for backend, values in (("reference", widened(arguments)), ("reference", arguments), ("cpu", arguments))
        )
        for name, true in truth.items():
            errors = torch.stack([part.square().sum() for part in (true, theirs[name] - true, ours[name] - true)])
            squares[name] = squares.get(name, 0) + errors
    for name, sums in squares.items():
        true, their, mine = sums.sqrt().tolist()
        allowed = 2 * their + 2 * torch.finfo(torch.float32).eps * true
        assert mine <= allowed, f"{name}: error {mine:.2e}, the reference's {their:.2e}"


def assert_near_the_truth(case: Case, option: str, dtype: torch.dtype, limit: float, gradient_limit: float) -> None:
    arguments = extend(case, option, dtype)
    (truth, true_gradients), (outputs, gradients) = run("reference", widened(arguments)), run("cpu", arguments)

    def error(found: Tensor, true: Tensor) -> float:
        return ((found.double() - true).square().sum() / true.square().sum()).sqrt().item()

    assert max(error(outputs[name], truth[name]) for name in truth) < limit
    assert max(error(gradients[name], true_gradients[name]) for name in true_gradients) < gradient_limit


@pytest.mark.parametrize(
    ("cell", "option", "projected"),
    [
        *((cell, option, 0) for cell in ("lstm", "gru") for option in ("everything", "normalised expectation")),
        # A normalisation enlarges the rounding of two products' operands in a row: see check_an_instruction_set.
        *(("lstm", option, 31) for option in ("recurrent dropout", "expectation", "peepholes")),
    ],
)
def test_bfloat16_is_near_the_truth(cell: str, option: str, projected: int) -> None:
    case = Case(cell, 1, 35, 8, 32, 49, projected, ragged=True)
    assert_near_the_truth(case, option, torch.bfloat16, 0.005, 0.03)


def check_an_instruction_set() -> None:
    """For tests/cpu/test_parity.py, in a process of its own."""
    for cell, option in (("lstm", "everything"), ("gru", "normalised expectation"), ("rnn_tanh", "zoneout")):
        projected = (0, 0, 21) if cell == "lstm" else (0, 0)
        for shape in zip(((2, 6, 19, 7, 37), (1, 9, 1, 5, 130), (1, 9, 3, 5, 37)), projected, strict=False):
            case = Case(cell, *shape[0], shape[1], ragged=True)
            for dtype, *limits in (
                (torch.float64, 1e-12, 1e-12),
                (torch.float32, 2e-6, 1e-5),
                (torch.bfloat16, 0.005, 0.03),
            ):
                assert_near_the_truth(case, option, dtype, *limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["everything", "expectation"])
@pytest.mark.parametrize("cell", CELLS)
def test_runs_and_thread_counts_agree_bitwise(cell: str, option: str, dtype: torch.dtype) -> None:
    if "norm" in OPTIONS[option] and cell not in ("lstm", "gru"):
        option = "recurrent dropout"
    before = torch.get_num_threads()
    try:
        shapes = [(1, 20, 1, 5, 256), (2, 6, 33, 40, 70), (1, 3, 150, 3, 40)]
        for shape in [*shapes, (1, 20, 1, 5, 256, 100)] if cell == "lstm" else shapes:
            arguments = extend(Case(cell, *shape, ragged=True), option, dtype)
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(run("cpu", arguments))
            for outputs, gradients in results[1:]:
                assert all(torch.equal(outputs[name], tensor) for name, tensor in results[0][0].items())
                assert all(torch.equal(gradients[name], tensor) for name, tensor in results[0][1].items())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("cell", "option"), CELLS_AND_OPTIONS)
def test_a_row_depends_neither_on_its_batch_nor_on_how_time_is_cut(cell: str, option: str) -> None:
    steps, batch, hidden = 7, 23, 67
    arguments = extend(Case(cell, 1, steps, batch, 5, hidden), option, torch.float32)
    whole = torch.ops.rnnfast.scan_extended_cpu.default(*arguments, False)[:3]

    def part(times: slice, rows: slice, states: Any) -> Any:
        def of_rows(tensor: Any, dim: int) -> Any:
            if tensor is None:
                return None
            tensor = tensor.unflatten(dim, (steps, batch))
            tensor = tensor[times, rows] if dim == 0 else tensor[:, times, rows]
            return tensor.flatten(dim, dim + 1).contiguous()

        def of_batch(tensor: Any) -> Any:
            return None if tensor is None or not tensor.numel() else tensor[:, rows].contiguous()

        some = list(arguments)
        some[0] = of_rows(arguments[0], 0)
        some[6:8] = map(of_batch, states)
        some[MASK] = of_batch(arguments[MASK])
        some[MASK + 1 : MASK + 3] = [of_rows(tensor, 1) for tensor in arguments[MASK + 1 : MASK + 3]]
        return torch.ops.rnnfast.scan_extended_cpu.default(*some, False)[:3]

    for rows in (slice(0, 1), slice(3, 9)):
        output, h_n, c_n = part(slice(0, steps), rows, arguments[6:8])
        assert torch.equal(output, whole[0].view(steps, batch, -1)[:, rows].flatten(0, 1))
        assert torch.equal(h_n, whole[1][:, rows])
        assert not c_n.numel() or torch.equal(c_n, whole[2][:, rows])
    first, *states = part(slice(0, 3), slice(0, batch), arguments[6:8])
    rest, h_n, _ = part(slice(3, steps), slice(0, batch), states)
    assert torch.equal(torch.cat((first, rest)), whole[0])
    assert torch.equal(h_n, whole[1])


@pytest.mark.parametrize(("cell", "option"), CELLS_AND_OPTIONS)
def test_nan_in_one_row_stays_there(cell: str, option: str) -> None:
    arguments = extend(Case(cell, 1, 4, 9, 5, 19), option, torch.float32)
    arguments[6][:, 4] = float("nan")
    outputs, gradients = run("cpu", arguments)
    others = [b for b in range(9) if b != 4]
    for tensor in (outputs["output"], gradients["input"]):
        assert tensor.view(4, 9, -1)[:, others].isfinite().all()
    assert outputs["output"].view(4, 9, -1)[:, 4].isnan().any()
    assert gradients["h_0"][:, others].isfinite().all()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_an_empty_batch(cell: str) -> None:
    arguments = extend(Case(cell, 2, 3, 0, 4, 5), "everything")
    outputs = torch.ops.rnnfast.scan_extended_cpu.default(*arguments, True)
    assert [tuple(out.shape) for out in outputs[:2]] == [(0, 10), (2, 0, 5)]
    leaves = [tensor.requires_grad_() for tensor in arguments[1:5]]
    results = torch.ops.rnnfast.scan_extended_cpu.default(*arguments, True)
    gradients = torch.autograd.grad(results[0].sum() + results[1].sum(), leaves)
    assert not any(gradient.any() for gradient in gradients)


def test_many_token_ids() -> None:
    # Beyond 4096 there is no table of products.
    arguments = extend(Case("lstm", 2, 4, 3, 5000, 9, ids=True, ragged=True), "everything")
    torch.testing.assert_close(run("cpu", arguments), run("reference", arguments))


def test_the_operator_is_what_torch_expects() -> None:
    for cell, option, projected in (("lstm", "everything", 3), ("gru", "expectation", 0), ("rnn_tanh", "zoneout", 0)):
        arguments = extend(Case(cell, 2, 3, 2, 4, 5, projected, ragged=True), option)
        arguments = [a.requires_grad_() if i in (0, 2, 6) else a for i, a in enumerate(arguments)]
        torch.library.opcheck(torch.ops.rnnfast.scan_extended_cpu.default, (*arguments, True))
        torch.library.opcheck(torch.ops.rnnfast.scan_extended_reference.default, (*arguments, True))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_transforms_are_the_references(cell: str) -> None:
    arguments = extend(Case(cell, 1, 3, 2, 4, 3), "everything")

    def of(backend: str) -> Any:
        def function(input: Tensor, w_hh: Tensor, gain: Tensor) -> Tensor:
            some = [input, arguments[1], w_hh, *arguments[3:8], gain, *arguments[9:]]
            results = (
                extended.definition(*some)
                if backend == "reference"
                else torch.ops.rnnfast.scan_extended_cpu.default(*some, True)
            )
            return results[0].sin().sum() + results[1].square().sum()

        return function

    where = 0, 2, 8
    point = [arguments[i] for i in where]
    members = [torch.stack([tensor, tensor * 0.5, tensor + 1]) for tensor in point]

    def transformed(function: Any) -> Any:
        gradient = torch.func.grad(function, (0, 1, 2))
        return (
            torch.vmap(function)(*members),
            torch.vmap(gradient)(*members),
            torch.vmap(gradient, (0, None, None))(members[0], *point[1:]),
            torch.func.jacrev(gradient)(*point),
            torch.func.grad(lambda *tensors: torch.vmap(function)(*tensors).sum(), (0, 1, 2))(*members),
        )

    torch.testing.assert_close(transformed(of("cpu")), transformed(of("reference")))


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_inference_keeps_packed_weights_and_has_the_bits_of_training(cell: str, ids: bool) -> None:
    options = {"layer_norm": True, "zoneout": 0.2, "peepholes": cell == "lstm", "bidirectional": ids}
    options |= {"proj_size": 9} if cell == "lstm" else {}
    stack = rnnfast.Stack(cell, 5, [37, 11], backend="cpu", **options).eval()
    input = torch.randint(5, (6, 3)) if ids else torch.randn(6, 3, 5)
    rnnfast.forget_packed_weights()
    for _ in range(2):
        expected = stack(input)[0].detach()
        with torch.no_grad():
            assert torch.equal(stack(input)[0], expected)
            kept = {key: entry.weights for key, entry in packing.packings.items()}
            assert torch.equal(stack(input)[0], expected)
            assert len(kept) == 2
            assert all(packing.packings[key].weights is weights for key, weights in kept.items())
            stack.weight_hh_l0.mul_(0.5)
            stack.weight_ih_l1.add_(0.1)


@pytest.mark.parametrize(
    ("cell", "option", "changes"),
    [
        ("lstm", "layer norm", {"gain_c": None, "bias_c": None}),
        ("lstm", "layer norm", {"bias_c": None}),
        ("lstm", "layer norm", {"gain_hh": None}),
        ("lstm", "peepholes", {"gain_c": torch.ones(1, 8), "bias_c": torch.ones(1, 8)}),
        ("gru", "layer norm", {"gain_ih": None}),
        ("gru", "layer norm", {"peepholes": torch.ones(1, 3, 8)}),
    ],
)
def test_parts_that_do_not_belong_together(cell: str, option: str, changes: dict[str, Any]) -> None:
    arguments = extend(Case(cell), option, torch.float32)
    torch.ops.rnnfast.scan_extended_cpu.default(*arguments, False)
    for name, part in changes.items():
        arguments[LEAVES.index(name)] = part
    with pytest.raises(RuntimeError, match="of an lstm gain_c and bias_c as well"):
        torch.ops.rnnfast.scan_extended_cpu.default(*arguments, False)
