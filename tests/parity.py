"""Runs a torch.nn layer and ours on the same inputs and weights, and gathers all that they compute."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast


class Case(NamedTuple):
    """A layer and the shape of what it is given."""

    layer: str = "LSTM"
    hidden_size: int = 7
    input_size: int = 5
    batch: int = 4
    steps: int = 6
    kind: str = "padded"  # "padded", "unbatched", "packed"
    with_state: bool = True
    token_ids: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def build(self, module: Any, dtype: torch.dtype, **extra: Any) -> Any:
        kwargs = dict(self.options) | extra
        return getattr(module, self.layer)(self.input_size, self.hidden_size, dtype=dtype, **kwargs)


class Run(NamedTuple):
    """Outputs and gradients by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def parts(state: Any) -> tuple[Tensor, ...]:
    """h, and c of an LSTM."""
    return state if isinstance(state, tuple) else (state,)


def make_inputs(case: Case, layer: nn.RNNBase, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Input for ours, its floating equivalent for torch.nn, and the initial state (or None)."""
    lengths = torch.randint(1, case.steps + 1, (case.batch,))
    lengths[case.batch // 2] = case.steps
    shape = [case.steps] if case.kind == "unbatched" else [case.steps, case.batch]
    if layer.batch_first and case.kind != "unbatched":
        shape.reverse()
    if case.token_ids:
        ours: Any = torch.randint(case.input_size, shape)
        theirs: Any = nn.functional.one_hot(ours, case.input_size).to(dtype)
    else:
        ours = theirs = torch.randn(*shape, case.input_size, dtype=torch.float64).to(dtype)
    if case.kind == "packed":
        pack = {"lengths": lengths, "batch_first": layer.batch_first, "enforce_sorted": False}
        ours, theirs = pack_padded_sequence(ours, **pack), pack_padded_sequence(theirs, **pack)
    if not case.with_state:
        return ours, theirs, None
    lanes = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = [] if case.kind == "unbatched" else [case.batch]
    h_0 = torch.randn(lanes, *batch, layer.proj_size or case.hidden_size, dtype=torch.float64).to(dtype)
    c_0 = torch.randn(lanes, *batch, case.hidden_size, dtype=torch.float64).to(dtype)
    return ours, theirs, (h_0, c_0) if case.layer == "LSTM" else h_0


def run(layer: nn.RNNBase, input: Any, hx: Any, seed: int = 0) -> Run:
    """One forward and backward pass; the loss weighs every output by fixed random numbers."""
    data = input.data if isinstance(input, PackedSequence) else input
    leaves: dict[str, Tensor] = dict(layer.named_parameters())
    if data.is_floating_point():
        data = leaves["input"] = data.detach().clone().requires_grad_()
        input = PackedSequence(data, *input[1:]) if isinstance(input, PackedSequence) else data
    if hx is not None:
        states = tuple(state.detach().clone().requires_grad_() for state in parts(hx))
        leaves |= dict(zip(("h_0", "c_0"), states, strict=False))
        hx = states if isinstance(hx, tuple) else states[0]
    torch.default_generator.manual_seed(seed)  # the CPU's; torch.manual_seed takes longer than a small layer
    output, final = layer(input, hx)
    output = output.data if isinstance(output, PackedSequence) else output
    outputs = {"output": output} | dict(zip(("h_n", "c_n"), parts(final), strict=False))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return Run(outputs, dict(zip(leaves, gradients, strict=True)))


def run_both(case: Case, backend: str, dtype: torch.dtype = torch.float64) -> tuple[Run, Run]:
    """torch.nn's run and ours, with the same weights and inputs."""
    theirs = case.build(nn, dtype)
    ours = case.build(rnnfast, dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    our_input, their_input, hx = make_inputs(case, theirs, dtype)
    expected, actual = run(theirs, their_input, hx), run(ours, our_input, hx)
    if case.token_ids:
        expected.gradients.pop("input")
    return expected, actual


def assert_same(expected: Run, actual: Run, **tolerance: float) -> None:
    """Compares every output and gradient by name."""
    for theirs, ours in zip(expected, actual, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
