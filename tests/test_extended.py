"""The extended scan: against a loop over torch's operations, as the papers have it, with derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import rnnfast
from rnnfast.backends import cpu
from rnnfast.backends.reference import Extension, Norms
from rnnfast.cells import CELLS
from rnnfast.extended import scan_extended
from tests.test_stack import BATCH, HIDDEN, INPUTS, STEPS, input_of, make, random


@pytest.fixture(autouse=True)
def _library() -> None:
    if cpu.why_not() is None:
        cpu.load()


def normalise(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def loop(
    cell: str,
    input: Tensor,
    weights: rnnfast.functional.Weights,
    h: Tensor,
    c: Tensor,
    extension: Extension,
    backwards: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One lane, from the papers' formulas; the extension's masks are for padded rows."""
    w_ih, w_hh, b_ih, b_hh, _ = weights
    mask, zoneout_h, zoneout_c, norms, peepholes = extension
    outputs: list[Any] = [None] * len(input)
    for t in reversed(range(len(input))) if backwards else range(len(input)):
        x, r = input[t] @ w_ih.T, (h if mask is None else h * mask) @ w_hh.T
        if norms is not None and cell == "lstm":
            x, r = normalise(x) * norms.gain_ih, normalise(r) * norms.gain_hh
        if norms is not None and cell == "gru":
            cut = 2 * HIDDEN
            x = torch.cat((normalise(x[:, :cut]), normalise(x[:, cut:])), 1) * norms.gain_ih
            r = torch.cat((normalise(r[:, :cut]), normalise(r[:, cut:])), 1) * norms.gain_hh
        x, r = x + b_ih, r + b_hh
        if cell == "lstm":
            i, f, g, o = (x + r).chunk(4, 1)
            p_i, p_f, p_o = torch.zeros(3, HIDDEN) if peepholes is None else peepholes
            i, f = i + p_i * c, f + p_f * c
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            read = new_c if norms is None else normalise(new_c) * norms.gain_c + norms.bias_c
            new_h = (o + p_o * new_c).sigmoid() * read.tanh()
        elif cell == "gru":
            (x_r, x_z, x_n), (r_r, r_z, r_n) = x.chunk(3, 1), r.chunk(3, 1)
            z, n = (x_z + r_z).sigmoid(), (x_n + (x_r + r_r).sigmoid() * r_n).tanh()
            new_h, new_c = (1 - z) * n + z * h, c
        else:
            new_h, new_c = (torch.tanh if cell == "rnn_tanh" else torch.relu)(x + r), c
        d_h, d_c = (
            d.view(*input.shape[:2], -1)[t].double() if isinstance(d, Tensor) else d for d in (zoneout_h, zoneout_c)
        )
        h, c = d_h * h + (1 - d_h) * new_h, d_c * c + (1 - d_c) * new_c
        outputs[t] = h
    return torch.stack(outputs), h, c


def make_lane(cell: str) -> tuple[Tensor, rnnfast.functional.Weights, Tensor, Tensor]:
    rows = CELLS[cell].gates * HIDDEN
    weights = rnnfast.functional.Weights(random(rows, INPUTS), random(rows, HIDDEN), random(rows), random(rows))
    return input_of(), weights, random(BATCH, HIDDEN), random(BATCH, HIDDEN)


def norms_of(cell: str) -> Norms:
    of_cell = (random(HIDDEN), random(HIDDEN)) if cell == "lstm" else (None, None)
    return Norms(random(CELLS[cell].gates * HIDDEN), random(CELLS[cell].gates * HIDDEN), *of_cell)


def extensions() -> list[Any]:
    cases = []
    for cell in CELLS:
        torch.manual_seed(1)
        mask, zones = (torch.rand(BATCH, HIDDEN) < 0.5) * 2.0, [torch.rand(STEPS * BATCH, HIDDEN) < 0.4 for _ in "hc"]
        zoneout_c = [zones[1], 0.25] if cell == "lstm" else [0.0, 0.0]
        cases += [
            pytest.param(cell, Extension(mask.double()), id=f"{cell} recurrent dropout"),
            pytest.param(cell, Extension(None, zones[0], zoneout_c[0]), id=f"{cell} zoneout"),
            pytest.param(cell, Extension(None, 0.5, zoneout_c[1]), id=f"{cell} zoneout's expectation"),
        ]
        if cell in ("lstm", "gru"):
            norms = norms_of(cell)
            cases.append(pytest.param(cell, Extension(None, 0.0, 0.0, norms), id=f"{cell} layer norm"))
            peepholes = random(3, HIDDEN) if cell == "lstm" else None
            everything = Extension(mask.double(), zones[0], zoneout_c[0], norms, peepholes)
            cases.append(pytest.param(cell, everything, id=f"{cell} everything"))
    return cases


@pytest.mark.parametrize(("cell", "extension"), extensions())
def test_the_extended_scan_is_the_papers_loop(cell: str, extension: Extension, backend: str) -> None:
    input, weights, h, c = make_lane(cell)
    norms = extension.norms or ()
    leaves = [input, *weights[:4], h, *([c] if cell == "lstm" else []), *norms, extension.peepholes]
    leaves = [leaf for leaf in leaves if leaf is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    states = h[None], c[None] if cell == "lstm" else None
    output, h_n, c_n = scan_extended(backend, input.flatten(0, 1), [weights], [extension], *states, None, cell, False)
    expected = loop(cell, input, weights, h, c, extension)
    actual = (output.view_as(expected[0]), h_n[0], c_n[0] if cell == "lstm" else c)
    torch.testing.assert_close(actual, expected)
    losses = [sum(result.sin().sum() for result in results) for results in (actual, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


@pytest.mark.parametrize(("cell", "extension"), [case for case in extensions() if "everything" in str(case.id)])
def test_derivatives_of_the_extended_scan(cell: str, extension: Extension, backend: str) -> None:
    input, weights, h, c = make_lane(cell)
    assert extension.norms is not None
    norms = [norm.clone() for norm in (*extension.norms, extension.peepholes) if norm is not None]
    state = [h, c] if cell == "lstm" else [h]

    def function(input: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        lane, parts, gains = others[:4], others[4 : 4 + len(state)], others[4 + len(state) :]
        h_0, c_0 = parts[0][None], parts[1][None] if cell == "lstm" else None
        weights = rnnfast.functional.Weights(*lane)
        changed = extension._replace(norms=Norms(*gains[:4]), peepholes=gains[4] if cell == "lstm" else None)
        results = scan_extended(backend, input.flatten(0, 1), [weights], [changed], h_0, c_0, None, cell, False)
        return results[: 1 + len(state)]

    inputs = [leaf.requires_grad_() for leaf in (input, *weights[:4], *state, *norms)]
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_directions_of_an_extended_layer() -> None:
    stack, input = make("lstm", bidirectional=True, layer_norm=True, zoneout=(0.3, 0.1)).eval(), input_of()
    output, ((h_n, c_n),) = stack(input)
    for d, suffix in enumerate(("_l0", "_l0_reverse")):
        parameters = {name: getattr(stack, name + suffix) for name in stack._lane_shapes(INPUTS, HIDDEN)}
        *lane, gain_ih, gain_hh, gain_c, bias_c = parameters.values()
        extension = Extension(None, 0.3, 0.1, Norms(gain_ih, gain_hh, gain_c, bias_c))
        zeros, weights = torch.zeros(BATCH, HIDDEN).double(), rnnfast.functional.Weights(*lane)
        expected = loop("lstm", input, weights, zeros, zeros, extension, backwards=d == 1)
        torch.testing.assert_close((output.chunk(2, 2)[d], h_n[d], c_n[d]), expected)
