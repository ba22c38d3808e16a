"""Inputs for the scan operators, and the native scan beside the reference in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import rnnfast.scan  # noqa: F401  (defines the operators)
from rnnfast.backends import cpu
from rnnfast.cells import CELLS
from tests.scans import GRADIENTS, OUTPUTS, widened

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
ARGUMENTS = ("input", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h_0", "c_0")


class Case(NamedTuple):
    """The shape of one call: D lanes, T steps, B rows, I inputs, H units, P projected."""

    cell: str
    lanes: int = 1
    steps: int = 5
    batch: int = 3
    inputs: int = 4
    hidden: int = 8
    projected: int = 0
    ids: bool = False
    ragged: bool = False
    bias: bool = True


def build(case: Case, dtype: torch.dtype) -> list[Any]:
    """The first eleven arguments of the operator, drawn in float64 and rounded."""
    cell, lanes, steps, batch, inputs, hidden, projected, ids, ragged, bias = case
    gate_rows, state = CELLS[cell].gates * hidden, projected or hidden

    def weight(*shape: int) -> Tensor:
        return ((torch.rand(*shape, dtype=torch.float64) * 2 - 1) * hidden**-0.5).to(dtype)

    batch_sizes, rows = None, steps * batch
    if ragged:
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[0] = steps
        batch_sizes = (lengths[None] > torch.arange(steps)[:, None]).sum(1)
        rows = int(batch_sizes.sum())
    x = torch.randint(inputs, (rows,)) if ids else torch.randn(rows, inputs, dtype=torch.float64).to(dtype)
    return [
        x,
        weight(lanes, gate_rows, inputs),
        weight(lanes, gate_rows, state),
        weight(lanes, gate_rows) if bias else None,
        weight(lanes, gate_rows) if bias else None,
        weight(lanes, projected, hidden) if projected else None,
        torch.randn(lanes, batch, state, dtype=torch.float64).mul(0.5).to(dtype),
        torch.randn(lanes, batch, hidden, dtype=torch.float64).mul(0.5).to(dtype) if cell == "lstm" else None,
        batch_sizes,
        cell,
        lanes > 1,
    ]


def run(
    backend: str, arguments: list[Any], d_outputs: list[Any], save_tape: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All outputs and all gradients of one backend, by name."""
    outputs = getattr(torch.ops.rnnfast, f"scan_{backend}")(*arguments, save_tape)
    gradients = ()
    if save_tape:
        backward = getattr(torch.ops.rnnfast, f"scan_{backend}_backward")
        gradients = backward(*d_outputs, *arguments, outputs[0], outputs[3], True, True)
    return dict(zip(OUTPUTS, outputs, strict=True)), dict(zip(GRADIENTS, gradients, strict=False))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(got[name].nan_to_num(nan=7), tensor.nan_to_num(nan=7)), name


def gradients_like(arguments: list[Any], dtype: torch.dtype) -> list[Any]:
    """Random gradients of output, h_n and c_n."""
    h_0, c_0, lanes = arguments[6], arguments[7], arguments[6].shape[0]
    shapes = [(arguments[0].shape[0], lanes * h_0.shape[2]), h_0.shape, None if c_0 is None else c_0.shape]
    return [None if s is None else torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]


def rms(tensor: Tensor) -> float:
    """Root of the mean square; infinite if anything is not finite."""
    value = float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
    return value if value == value else float("inf")


def in_reverse(name: str, tensor: Tensor | None, case: Case) -> Tensor | None:
    """An argument, an output or a gradient (d_...) of the case with its units and states in reverse order."""
    name = name.removeprefix("d_")
    if tensor is None or name == "input" or not tensor.numel():
        return tensor
    if name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        tensor = tensor.unflatten(1, (-1, case.hidden)).flip(2).flatten(1, 2)
        return tensor.flip(2) if name == "w_hh" else tensor
    if name == "w_hr":
        return tensor.flip(1, 2)
    if name == "output":
        return tensor.unflatten(1, (-1, case.projected or case.hidden)).flip(2).flatten(1)
    if name == "tape":
        return tensor.unflatten(2, (-1, case.hidden)).flip(3).flatten(2)
    return tensor.flip(2)


def reference(
    case: Case, arguments: list[Any], d_outputs: list[Any], saved: list[Tensor], reverse: bool = False
) -> dict[str, Tensor]:
    """All that the reference computes, with its sums in their order or the other way round.

    Gradients from the same output and tape: the two backends' tapes can be exchanged, and a relu's kink is no matter.
    """

    def turn(names: tuple[str, ...], tensors: list[Any]) -> list[Any]:
        if not reverse:
            return tensors
        turned = (in_reverse(name, tensor, case) for name, tensor in zip(names, tensors, strict=False))
        return [*(t if t is None else t.contiguous() for t in turned), *tensors[len(names) :]]

    arguments, d_outputs = turn(ARGUMENTS, arguments), turn(OUTPUTS, d_outputs)
    saved = turn(("output", "tape"), saved)
    outputs = torch.ops.rnnfast.scan_reference(*arguments, True)
    gradients = torch.ops.rnnfast.scan_reference_backward(*d_outputs, *arguments, *saved, True, True)
    names = OUTPUTS + GRADIENTS
    return dict(zip(names, turn(names, [*outputs, *gradients]), strict=True))


class Error(NamedTuple):
    """RMS errors against float64 of the native scan and of the reference in the same type, and RMS of the truth.

    In float64 the reference's is the difference that the order of its sums makes.
    """

    native: float
    reference: float
    truth: float


def compare(case: Case, dtype: torch.dtype) -> dict[str, Error]:
    """The errors of everything the native scan computes."""
    cpu.load()
    arguments = build(case, dtype)
    d_outputs = gradients_like(arguments, dtype)
    outputs, gradients = run("cpu", arguments, d_outputs)
    for tensor in (outputs | gradients).values():
        assert tensor.dtype is dtype
        assert tensor.is_contiguous()
    without_tape, _ = run("cpu", arguments, d_outputs, save_tape=False)
    for name in OUTPUTS[:3]:
        assert torch.equal(outputs[name], without_tape[name])
    saved = [outputs["output"], outputs["tape"]]
    truth = reference(case, widened(arguments), widened(d_outputs), widened(saved))
    eager = reference(case, arguments, d_outputs, saved, reverse=dtype is torch.float64)
    errors = {}
    for name, tensor in (outputs | gradients).items():
        assert tensor.shape == truth[name].shape, name
        errors[name] = Error(rms(tensor - truth[name]), rms(eager[name] - truth[name]), rms(truth[name]))
    return errors
