"""Random layers as the scan operators take them, and the comparison of results with the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnfast.backends import reference
from rnnfast.cells import CELLS

OUTPUTS = ("output", "h_n", "c_n", "tape")
GRADIENTS = ("d_input", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh", "d_w_hr", "d_h_0", "d_c_0")
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# The RMS of the error over the RMS of the truth: a few roundings in float32 and float64, 2^-11 a factor in TF32.
FORWARD_BOUND = {"float32": 1e-6, "tf32": 1e-3, "bfloat16": 5e-3, "float16": 1e-3, "float64": 2e-15}
BACKWARD_BOUND = {"float32": 2e-6, "tf32": 2e-3, "bfloat16": 8e-3, "float16": 2e-3, "float64": 4e-15}


def random_layer(
    cell: str,
    hidden: int,
    batch: int,
    steps: int,
    dtype: torch.dtype,
    *,
    lanes: int = 1,
    inputs: int = 3,
    token_ids: bool = False,
    ragged: bool = False,
    bias: bool = True,
    device: str = "cpu",
) -> list[Any]:
    """The arguments of a forward scan but `save_tape`: two lanes are the two directions of a layer."""
    generator = torch.Generator().manual_seed(hidden + 7 * batch)

    def uniform(*shape: int, scale: float = 1.0) -> Tensor:
        return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale).to(device, dtype)

    rows, batch_sizes = steps * batch, None
    if ragged:
        lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
        lengths[0] = steps
        batch_sizes = (lengths[None, :] > torch.arange(steps)[:, None]).sum(1)
        rows = int(batch_sizes.sum())
    input = torch.randint(inputs, (rows,), generator=generator).to(device) if token_ids else uniform(rows, inputs)
    scale, gate_rows = hidden**-0.5, CELLS[cell].gates * hidden
    biases = [uniform(lanes, gate_rows, scale=scale) if bias else None for _ in range(2)]
    w_ih, w_hh = uniform(lanes, gate_rows, inputs, scale=scale), uniform(lanes, gate_rows, hidden, scale=scale)
    h_0 = uniform(lanes, batch, hidden)
    c_0 = uniform(lanes, batch, hidden) if CELLS[cell].has_cell_state else None
    return [input, w_ih, w_hh, *biases, None, h_0, c_0, batch_sizes, cell, lanes > 1]


def random_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients of output, h_n and (where the cell has one) c_n."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(o) if o.numel() else None for o in outputs[:3]]


def _widened(values: list[Any]) -> list[Any]:
    return [x.cpu().double() if isinstance(x, Tensor) and x.is_floating_point() else _cpu(x) for x in values]


def _cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def check_against_reference(forward: Any, backward: Any, layer: list[Any], numbers: str) -> None:
    """Runs both directions; each backward reads the other's tape as well as its own.

    An error passes below the bound, or below 1.5 times the reference's own in the same dtype.
    """
    wide = _widened(layer)
    truth = reference.forward(*wide, True)
    ours, theirs = forward(*layer, True), reference.forward(*layer, True)
    _assert_near("", OUTPUTS, ours, truth, theirs, FORWARD_BOUND[numbers])
    without_tape = forward(*layer, False)
    assert torch.equal(without_tape[0], ours[0])
    assert without_tape[3].numel() == 0

    d_outputs = random_gradients(ours)
    truth = reference.backward(*_widened(d_outputs), *wide, truth[0], truth[3], True, True)
    own = reference.backward(*d_outputs, *layer, theirs[0], theirs[3], True, True)
    for way, run, used in (
        ("", ours, backward),
        ("after the reference: ", theirs, backward),
        ("the reference after ours: ", ours, reference.backward),
    ):
        gradients = used(*d_outputs, *layer, run[0], run[3], True, True)
        _assert_near(way, GRADIENTS, gradients, truth, own, BACKWARD_BOUND[numbers])


def _assert_near(way: str, names: tuple[str, ...], actual: Any, truth: Any, theirs: Any, bound: float) -> None:
    for name, a, t, r in zip(names, actual, truth, theirs, strict=True):
        assert a.shape == t.shape, f"{way}{name}: {tuple(a.shape)} where {tuple(t.shape)} is right"
        if t.numel():
            error, allowed = _relative_rms(a, t), max(bound, 1.5 * _relative_rms(r, t))
            assert error <= allowed, f"{way}{name}: relative RMS error {error:.1e}, above {allowed:.0e}"


def _relative_rms(value: Tensor, truth: Tensor) -> float:
    return ((value.cpu().double() - truth).square().mean() / truth.square().mean()).sqrt().item()
