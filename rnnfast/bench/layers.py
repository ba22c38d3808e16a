"""Whole layers: ours beside torch.nn's and the peers, on the same weights and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast.bench.measure import TOLERANCE, Work, alternate_with_limits, check_same, timed
from rnnfast.bench.report import OURS, TORCH, Row
from rnnfast.cells import LAYERS, cell_named

FORWARD, BOTH = "forward", "forward+backward"
PEER_REST = 0.01  # seconds; see measure.alternate


@dataclass(frozen=True)
class LayerCase:
    """One layer, one direction, and what it is given.

    Attributes:
        direction: "forward" (no gradient is recorded) or "forward+backward" (of the parameters and the input).
        packed: a PackedSequence of lengths from `steps` down to an eighth of it, evenly spread.
        token_ids: ours takes ids, the others their one-hot rows, which they build in every call.
    """

    cell: str
    hidden_size: int
    batch: int
    steps: int
    direction: str = BOTH
    dtype: str = "float32"
    inputs: int = 28
    packed: bool = False
    token_ids: bool = False

    @property
    def label(self) -> str:
        extra = [self.dtype] if self.dtype != "float32" else []
        extra += ["packed"] if self.packed else []
        extra += ["ids"] if self.token_ids else []
        shape = f"{self.cell} H={self.hidden_size} B={self.batch} T={self.steps}"
        return " ".join([shape, self.direction.replace("forward", "fwd").replace("backward", "bwd"), *extra])

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def gates(self) -> int:
        return cell_named(self.cell).gates

    def lengths(self) -> list[int]:
        """Steps of each sequence, longest first."""
        shortest = max(1, self.steps // 8) if self.packed else self.steps
        return [round(length) for length in torch.linspace(self.steps, shortest, self.batch).tolist()]

    @property
    def work(self) -> Work:
        """The matrix products and the gates' own arithmetic.

        Forward: 2 G H H operations a row for the recurrent product and 2 G H I for the input's, which ids do not have.
        Backward: as many for the gradients of the states and inputs, and again for those of the weights.
        """
        units = float(sum(self.lengths()) * self.hidden_size)
        weights = self.gates * self.hidden_size**2
        recurrent = 2.0 * sum(self.lengths()) * weights
        inputs = 2 * units * self.gates * (0 if self.token_ids else self.inputs)
        sizes = self.cell, self.batch, self.hidden_size
        if self.direction == FORWARD:
            return Work(*sizes, recurrent, 4 * weights, self.steps, inputs, 0.0, units, 0.0)
        return Work(*sizes, 2 * recurrent, 4 * weights, 2 * self.steps, 2 * inputs, recurrent + inputs, units, units)


class Contestant(NamedTuple):
    """`call` is what is timed; `results` names what it returned, as tensors, for the comparison."""

    call: Callable[[], Any]
    results: Callable[[Any], Mapping[str, Tensor]]


class Setup(NamedTuple):
    """A case made real: two layers with the same weights, their input, and the gradient that comes from above.

    `input` is (T, B, I), or ids (T, B), or a PackedSequence of either; `d_output` is (T, B, H), or packed (N, H).
    """

    case: LayerCase
    ours: nn.RNNBase
    theirs: nn.RNNBase
    input: Any
    d_output: Tensor


def set_up(case: LayerCase, backend: str = "auto") -> Setup:
    """Build both layers and their inputs, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    dtype = case.torch_dtype
    layer, options = LAYERS[case.cell]
    theirs = getattr(nn, layer)(case.inputs, case.hidden_size, dtype=dtype, **options)
    bound = case.hidden_size**-0.5
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    ours = getattr(rnnfast, layer)(case.inputs, case.hidden_size, dtype=dtype, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())

    input: Any
    if case.token_ids:
        input = torch.randint(case.inputs, (case.steps, case.batch), generator=generator)
    else:
        input = torch.randn(case.steps, case.batch, case.inputs, generator=generator).to(dtype)
    if case.packed:
        input = pack_padded_sequence(input, torch.tensor(case.lengths()))
    rows = (sum(case.lengths()),) if case.packed else (case.steps, case.batch)
    d_output = torch.randn(*rows, case.hidden_size, generator=generator).to(dtype)
    return Setup(case, ours, theirs, input, d_output)


def torch_contestant(layer: nn.RNNBase, setup: Setup) -> Contestant:
    """A torch.nn layer, or ours, which is called the same way."""
    case, input = setup.case, setup.input
    one_hot = case.token_ids and layer is setup.theirs

    def prepare(input: Any) -> Any:
        if not one_hot:
            return input
        if isinstance(input, PackedSequence):
            return PackedSequence(F.one_hot(input.data, case.inputs).to(case.torch_dtype), *input[1:])
        return F.one_hot(input, case.inputs).to(case.torch_dtype)

    if case.direction == FORWARD:

        def forward() -> Any:
            with torch.no_grad():
                return layer(prepare(input))

        return Contestant(forward, lambda result: outputs(*result))

    leaves: dict[str, Tensor] = dict(layer.named_parameters())
    if not case.token_ids:
        data = input.data if isinstance(input, PackedSequence) else input
        leaves["input"] = data = data.detach().clone().requires_grad_()
        input = PackedSequence(data, *input[1:]) if isinstance(input, PackedSequence) else data
    tensors = list(leaves.values())

    def both() -> Any:
        output, state = layer(prepare(input))
        rows = output.data if case.packed else output
        return (output, state), torch.autograd.grad(rows, tensors, setup.d_output)

    return Contestant(both, lambda result: outputs(*result[0]) | _by_leaf(leaves, result[1]))


def _loop(cell: nn.RNNCellBase, setup: Setup) -> Contestant:
    """A cell called for each step of the input in turn, and differentiated through all of them."""
    input = setup.input.detach().clone().requires_grad_()
    leaves: dict[str, Tensor] = {**dict(cell.named_parameters()), "input": input}

    def call() -> Any:
        state, steps = None, []
        for x in input:
            state = cell(x, state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        output = torch.stack(steps)
        return (output, state), torch.autograd.grad(output, list(leaves.values()), setup.d_output)

    return Contestant(call, lambda result: outputs(*result[0]) | _by_leaf(leaves, result[1]))


def _by_leaf(leaves: Iterable[str], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def outputs(output: Any, state: Any) -> dict[str, Tensor]:
    """A layer's outputs by name."""
    states = state if isinstance(state, tuple) else (state,)
    output = output.data if isinstance(output, PackedSequence) else output
    return {"output": output.detach()} | {
        name: part.detach() for name, part in zip(("h_n", "c_n"), states, strict=False)
    }


def contestants(setup: Setup, peers: bool = False) -> dict[str, Contestant]:
    """Ours, torch.nn's, and the peers that are installed and can do this case."""
    found = {
        OURS: torch_contestant(setup.ours, setup),
        TORCH: torch_contestant(setup.theirs, setup),
    }
    if peers:
        from rnnfast.bench.peers import layer_peers

        found |= layer_peers(setup)
    return found


def check_parity(case: LayerCase, contestants: Mapping[str, Contestant], truth: str = TORCH) -> None:
    """Assert that all contestants compute what `truth` computes.

    Raises:
        Disagreement: one of them does not.
    """
    results = {name: contestant.results(contestant.call()) for name, contestant in contestants.items()}
    for name, result in results.items():
        if name != truth:
            check_same(name, result, results[truth], TOLERANCE[case.torch_dtype], case.label)


def measure_layer(case: LayerCase, seconds: float, backend: str = "auto", peers: bool = False) -> Row:
    """Ours beside torch.nn's and, if asked for, the other libraries.

    Raises:
        Disagreement: they do not compute the same.
    """
    setup = set_up(case, backend)
    return _measure(setup, contestants(setup, peers), TORCH, seconds)


def measure_dtype(case: LayerCase, seconds: float, backend: str = "auto") -> Row:
    """Ours in the case's dtype beside ours in float32."""
    setup = set_up(case, backend)
    full = set_up(LayerCase(**(asdict(case) | {"dtype": "float32"})), backend)
    with torch.no_grad():  # both start from what the smaller type can hold
        for ours, theirs in zip(full.ours.parameters(), setup.ours.parameters(), strict=True):
            ours.copy_(theirs)
    input = setup.input if case.token_ids else setup.input.float()
    full = full._replace(input=input, d_output=setup.d_output.float())
    both = {OURS: torch_contestant(setup.ours, setup), "our float32": torch_contestant(full.ours, full)}
    return _measure(setup, both, "our float32", seconds)


def measure_loop(case: LayerCase, seconds: float, backend: str = "auto") -> Row:
    """A loop of our cell beside one of torch.nn's, forward and backward.

    Raises:
        Disagreement: they do not compute the same.
    """
    setup = set_up(case, backend)
    weights = {name.removesuffix("_l0"): weight for name, weight in setup.theirs.state_dict().items()}
    layer, options = LAYERS[case.cell]
    name, sizes, dtype = f"{layer}Cell", (case.inputs, case.hidden_size), case.torch_dtype
    cells = {
        OURS: getattr(rnnfast, name)(*sizes, dtype=dtype, backend=backend, **options),
        TORCH: getattr(nn, name)(*sizes, dtype=dtype, **options),
    }
    for cell in cells.values():
        cell.load_state_dict(weights)
    return _measure(setup, {library: _loop(cell, setup) for library, cell in cells.items()}, TORCH, seconds)


def _measure(setup: Setup, contestants: Mapping[str, Contestant], truth: str, seconds: float) -> Row:
    case = setup.case
    check_parity(case, contestants, truth)
    rest = PEER_REST if len(contestants) > 2 else 0.0
    turns = {name: timed(one.call) for name, one in contestants.items()}
    work = case.work if case.torch_dtype is torch.float32 else None
    samples, limits = alternate_with_limits(turns | {"empty": timed(_empty_call(setup))}, seconds, rest, work)
    empty = samples.pop("empty")
    if limits.seconds is not None:
        limits = limits._replace(seconds=limits.seconds + empty.median)
    choice = rnnfast.explain(setup.ours, setup.input)
    return Row(case.label, asdict(case), choice.backend, samples, flops=case.work.flops, limits=limits)


def _empty_call(setup: Setup) -> Callable[[], Any]:
    """What torch takes to record and differentiate any one function of the case's tensors: it is part of the limit."""
    if setup.case.direction == FORWARD:
        return lambda: None
    leaves = [torch.zeros(1, requires_grad=True) for _ in range(len(list(setup.ours.parameters())) + 1)]
    d_output = torch.zeros(1)
    return lambda: torch.autograd.grad(_Empty.apply(*leaves), leaves, d_output)


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return leaves[0].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors))
