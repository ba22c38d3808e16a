"""The operator `rnnfast::scan_cuda` and the layers on it, with the emulator in the GPU's place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rnnfast.backends import cuda
from rnnfast.backends.cuda.launch import Plan
from rnnfast.scan import Weights, scan
from tests.scans import random_layer

from .test_scan import use


@pytest.fixture
def _on_the_cpu(schedule, monkeypatch) -> Iterator[None]:
    use(monkeypatch, Plan("cluster", 2, 5, 4), "float32")
    library = cuda.register("CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_gradients_through_autograd(cell):
    input, w_ih, w_hh, b_ih, b_hh, _, h_0, c_0, sizes, _, both = random_layer(
        cell, 9, 4, 5, torch.float32, lanes=2, ragged=True
    )
    leaves = [t.requires_grad_() for t in (input, w_ih, w_hh, b_ih, b_hh, h_0, c_0) if t is not None]

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        outputs = scan(backend, input, Weights(w_ih, w_hh, b_ih, b_hh), h_0, c_0, sizes, cell, both)
        return torch.autograd.grad(sum(out.square().sum() for out in outputs), leaves)

    for ours, theirs in zip(gradients("cuda"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("_on_the_cpu")
def test_autocast_does_not_reach_into_it():
    *layer, cell, both = random_layer("gru", 9, 4, 3, torch.float32)
    arguments = "cuda", layer[0], Weights(*layer[1:6]), *layer[6:], cell, both
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = scan(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(under_autocast, scan(*arguments), strict=True))


@pytest.mark.usefixtures("_on_the_cpu")
def test_opcheck():
    layer = random_layer("lstm", 9, 4, 3, torch.float32, lanes=2)
    layer = [t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in layer]
    torch.library.opcheck(torch.ops.rnnfast.scan_cuda.default, (*layer, True))


@pytest.mark.parametrize(
    "team",
    [
        *(Plan("cluster", *numbers) for numbers in ((0, 1, 4), (1, 1, 4), (3, 1, 4), (32, 1, 4), (2, 0, 4), (2, 1, 0))),
        Plan("block", 1, 999, 1),
    ],
)
def test_a_team_that_no_device_can_run_is_refused(schedule, monkeypatch, team):
    use(monkeypatch, team, "float32")
    library = cuda.register("CPU")
    *layer, cell, both = random_layer("gru", 9, 4, 3, torch.float32)
    with pytest.raises(RuntimeError, match="no scan can be run so: "):
        scan("cuda", layer[0], Weights(*layer[1:6]), *layer[6:], cell, both)
    library._destroy()
