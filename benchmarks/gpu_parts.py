"""What `make gpu` measures, as tasks: each a label and a function that measures one row, the most telling first.

A task knows nothing of the time or of the others; benchmarks/gpu.py runs them in processes and keeps what they give.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast
from rnnfast import dispatch, table, tuning
from rnnfast.backends import cuda
from rnnfast.backends.cuda import launch
from rnnfast.backends.cuda.launch import Plan
from rnnfast.tuning import COMPUTE_TYPES, LAYERS, arithmetic, seconds_in_turns

Report = dict[str, Any]
Task = tuple[Report, Callable[[], Report]]
Work = dict[str, Callable[[], object]]
DEVICE = "cuda"

# What a step may take, in microseconds: the goals for an H200 at H=512, B=32.
GOALS = {("lstm", "bfloat16"): 0.8, ("lstm", "tf32"): 1.0, ("lstm", "float32"): 1.9, ("rnn_tanh", "float32"): 0.9}
BACKWARD_GOAL = 1.6  # times the forward
NEAR_MISS = 10  # times the error that is allowed
# How many times as fast as cuDNN, by the algorithm that PyTorch has it use.
RATIO_GOALS = {"STANDARD": 4.0, "PERSIST_STATIC": 1.5, "PERSIST_STATIC_SMALL_H": 1.0}
PIPELINE_GOALS = {("rnn_tanh", 512): {"tokens_per_s": 2_000_000, "characters_per_s": 100_000}}
CUDNN_LAYERS = {  # one for each algorithm; the input has 128 features
    "PERSIST_STATIC_SMALL_H": ("rnn_tanh", 256, "float32"),
    "PERSIST_STATIC": ("lstm", 512, "float16"),
    "STANDARD": ("lstm", 512, "float32"),
}


def cudnn_algorithm(cell: str, hidden: int, batch: int, compute_type: str, inputs: int, training: bool) -> str:
    """The algorithm that PyTorch picks for one unpacked layer (aten/src/ATen/native/cudnn/RNN.cpp, get_algo)."""
    small = (384 if cell == "rnn_tanh" else 192) if not training else (256 if cell == "rnn_tanh" else 128)
    if hidden <= small:
        return "PERSIST_STATIC_SMALL_H"
    fits = hidden <= 1024 and hidden % 128 == 0 and inputs % 128 == 0 and batch % 8 == 0 and batch <= 128
    if compute_type == "float16" and cell != "gru" and fits and (cell != "rnn_tanh" or batch < 96 or hidden < 896):
        return "PERSIST_STATIC"
    return "STANDARD"


def goals() -> list[Task]:
    """The step times that were set as goals, of the scan alone, products apart; after the layer was found right."""

    def measure(cell: str, compute_type: str, goal: float) -> Report:
        with arithmetic(compute_type):
            h_0 = torch.empty(1, 32, 512, device=DEVICE, dtype=COMPUTE_TYPES[compute_type])
            plans = {way: launch.plan(h_0, cell, way == "backward")._asdict() for way in ("forward", "backward")}
            ours, theirs = _layers(cell, 512, 128, compute_type, "cuda")
            row = {"plans": plans, **_found_right(ours, tuning.Parity(theirs, 32, compute_type))}
        if not _is_worth_timing(row):
            return row
        measured = _scan_step_us(cell, 512, 32, compute_type, None)
        goals = {"forward": goal, "backward": BACKWARD_GOAL * goal}
        of_goal = {way: measured[way] / goals[way] for way in goals}
        return {**row, "us_a_step": measured, "goals": goals, "of_goal": of_goal}

    return [
        ({"cell": cell, "compute_type": compute_type}, partial(measure, cell, compute_type, goal))
        for (cell, compute_type), goal in GOALS.items()
    ]


def calibration() -> list[Task]:
    """Microseconds a step of a layer so small that the exchange is all it does, and cuDNN's a step."""

    def exchange(cell: str, plan: Plan, compute_type: str) -> Report:
        # Eight units a block on plain arithmetic, sixteen on tensor cores: the least a block can own.
        hidden = plan.blocks * (8 if compute_type == "float32" else 16)
        check = partial(torch.ops.rnnfast_cuda.check, cell, hidden, 8, 1, compute_type)
        refusal = check(False, limits(), plan.team) or check(True, limits(), plan.team)
        return {"not_run": refusal} if refusal else {"us": _scan_step_us(cell, hidden, 8, compute_type, plan)}

    def cudnn(algorithm: str) -> Report:
        cell, hidden, compute_type = CUDNN_LAYERS[algorithm]
        with arithmetic(compute_type):
            layer = getattr(nn, LAYERS[cell])(128, hidden).to(DEVICE, COMPUTE_TYPES[compute_type])
            return {
                "us": _layer_step_us(layer, 32, COMPUTE_TYPES[compute_type]),
                "layer": f"{cell} {hidden} {compute_type}, B=32",
            }

    clusters = [Plan("cluster", blocks, 8, 16) for blocks in (16, 8, 4, 2)]
    others = [Plan("block", 1, 8, 16), *(Plan("grid", blocks, 8, 16) for blocks in (128, 64, 16, 2))]
    # Of a cluster the LSTM's backward exchanges sums, all else operands.
    teams = [*(("rnn_tanh", plan) for plan in (*clusters, *others)), *(("lstm", plan) for plan in clusters)]
    return [
        *(({"of": f"cuDNN {algorithm}"}, partial(cudnn, algorithm)) for algorithm in CUDNN_LAYERS),
        *(
            (
                {"of": f"{cell} on a {plan.kernel} of {plan.blocks}, {compute_type}"},
                partial(exchange, cell, plan, compute_type),
            )
            for (cell, plan), compute_type in itertools.product(teams, ("float32", "bfloat16"))
        ),
    ]


def pipeline() -> list[Task]:
    """The chapter's training (B=32, T=35, SGD, clipping) and greedy generation at B=1, each a replayed CUDA graph."""

    def measure(cell: str, hidden: int, backend: str) -> Report:
        torch.manual_seed(0)
        model = _Model(cell, hidden, backend).to(DEVICE)
        row = {"tokens_per_s": 32 * 35 / _training_step_s(model), "characters_per_s": 1 / _character_s(model)}
        goals = PIPELINE_GOALS.get((cell, hidden), {}) if backend == "cuda" else {}
        return {**row, "of_goal": {what: row[what] / goal for what, goal in goals.items()}}

    return [
        ({"cell": cell, "hidden": hidden, "backend": backend}, partial(measure, cell, hidden, backend))
        for hidden, cell, backend in itertools.product((512, 256), ("rnn_tanh", "lstm", "gru"), ("cuda", "torch"))
    ]


def grid(backend: str) -> list[Task]:
    """Whole layers on a backend beside cuDNN, after they were found right."""
    shapes = [(32, 35), (32, 1024), (1, 128), (128, 128)]
    sizes = itertools.product(shapes, (512, 256, 128, 1024, 64, 32, 2048), LAYERS, COMPUTE_TYPES)
    return [
        (
            {"cell": cell, "hidden": hidden, "batch": batch, "steps": steps, "compute_type": compute_type},
            partial(compare, backend, cell, hidden, batch, steps, compute_type),
        )
        for (batch, steps), hidden, cell, compute_type in sizes
    ]


def compare(
    backend: str, cell: str, hidden: int, batch: int, steps: int, compute_type: str, inputs: int = 128
) -> Report:
    """Parity with torch.nn in float64 first; then the time of the whole call, in turns with torch.nn."""
    with arithmetic(compute_type):
        dtype = COMPUTE_TYPES[compute_type]
        ours, theirs = _layers(cell, hidden, inputs, compute_type, backend)
        row: Report = {
            "kernel": _kernel(backend, cell, hidden, batch, dtype),
            **_found_right(ours, tuning.Parity(theirs, batch, compute_type)),
        }
        if not _is_worth_timing(row):
            return row
        input = torch.randn(steps, batch, inputs, device=DEVICE, dtype=dtype)
        gradient = torch.randn(steps, batch, hidden, device=DEVICE, dtype=dtype)

        def forward(layer: nn.Module) -> None:
            with torch.no_grad():
                layer(input)

        def both(layer: nn.Module) -> None:
            output, _ = layer(input)
            torch.autograd.grad(output, list(layer.parameters()), gradient)

        for way, call in (("forward", forward), ("both", both)):
            times = seconds_in_turns({"rnnfast": partial(call, ours), "nn": partial(call, theirs)}, 0.08)
            ratio = times["nn"]["median"] / times["rnnfast"]["median"]
            algorithm = cudnn_algorithm(cell, hidden, batch, compute_type, inputs, training=way == "both")
            row[way] = {**times, "ratio": ratio, "cudnn": algorithm}
            if backend == "cuda":
                row[way]["of_goal"] = ratio / RATIO_GOALS[algorithm]
    return row


def small_layers(kernel: str) -> None:
    """What compute-sanitizer watches: layers on a kernel, forward and backward.

    Each has more rows than one tile of them and so many steps that both buffers of an exchange are used thrice.
    """
    cuda.load()
    if kernel == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        return
    plan = Plan(kernel, {"block": 1, "cluster": 2, "grid": 2, "steps": 0}[kernel], 16, 16)
    for compute_type in COMPUTE_TYPES:
        with arithmetic(compute_type), launch.use_plans(plan, plan):
            # A cluster's backward gathers for an RNN and scatters for an LSTM.
            for cell, ragged in (("rnn_tanh", False), ("lstm", False), ("gru", True)):
                layer = _scan_arguments(cell, 24, 19, 7, COMPUTE_TYPES[compute_type], ragged)
                output, _, _, tape = _forward(layer)
                _backward(output, layer, output, tape, True)
    torch.cuda.synchronize()


def limits() -> list[int]:
    """What the plan knows of the current device."""
    return list(torch.ops.rnnfast_cuda.limits(torch.cuda.current_device()))


def _layers(cell: str, hidden: int, inputs: int, compute_type: str, backend: str) -> tuple[nn.RNNBase, nn.RNNBase]:
    """Ours on the backend, and torch.nn's with the same weights."""
    torch.manual_seed(0)
    name, dtype = LAYERS[cell], COMPUTE_TYPES[compute_type]
    theirs = getattr(nn, name)(inputs, hidden).to(DEVICE, dtype)
    ours = getattr(rnnfast, name)(inputs, hidden, backend=backend).to(DEVICE, dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _found_right(layer: nn.RNNBase, parity: tuning.Parity) -> Report:
    try:
        return {"right": True, "worst_error": max(parity.check_all(layer))}
    except tuning.Wrong as wrong:
        return {"right": False, "failure": str(wrong), "times_allowed": wrong.times_allowed}


def _is_worth_timing(row: Report) -> bool:
    """What is right, and what is nearly so: that stays a failure, but its time tells what it is worth to mend it."""
    return bool(row["right"] or row["times_allowed"] < NEAR_MISS)


def _kernel(backend: str, cell: str, hidden: int, batch: int, dtype: torch.dtype) -> str:
    """The forward kernel that the backend plans for a layer."""
    if backend == "cuda":
        return launch.plan(torch.empty(1, batch, hidden, device=DEVICE, dtype=dtype), cell, backward=False).kernel
    from rnnfast.backends.triton.plan import kernel_on

    return kernel_on(torch.device(DEVICE), cell, hidden, batch, 1, table.compute_type_of(dtype))


class _Model(nn.Module):
    """A character model over 28 symbols. torch.nn's layers take one-hot rows, ours the ids themselves."""

    def __init__(self, cell: str, hidden: int, backend: str) -> None:
        super().__init__()
        self.ids = backend != "torch"
        options: Report = {"backend": backend} if self.ids else {}
        self.rnn = getattr(rnnfast if self.ids else nn, LAYERS[cell])(28, hidden, **options)
        self.head = nn.Linear(hidden, 28)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.rnn(ids if self.ids else F.one_hot(ids, 28).float(), state)
        return self.head(output), state


def _training_step_s(model: _Model) -> float:
    inputs, targets = (torch.randint(28, (35, 32), device=DEVICE) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        logits, _ = model(inputs)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return _replayed_s(step)


def _character_s(model: _Model, characters: int = 32) -> float:
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)

    @torch.no_grad()
    def generate() -> None:
        token, state = ids, None
        for _ in range(characters):
            logits, state = model(token, state)
            token = logits.argmax(-1)
        ids.copy_(token)

    return _replayed_s(generate) / characters


def _replayed_s(work: Callable[[], None]) -> float:
    """Median seconds of a replay of `work`, captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return seconds_in_turns({"replay": graph.replay}, 0.3)["replay"]["median"]


def _scan_step_us(cell: str, hidden: int, batch: int, compute_type: str, plan: Plan | None) -> dict[str, float]:
    """Microseconds a step of the scan operators alone."""

    def work(steps: int) -> Work:
        layer = _scan_arguments(cell, hidden, batch, steps, COMPUTE_TYPES[compute_type])
        layer[0] = torch.randint(1, (steps * batch,), device=DEVICE)  # ids: no input product
        output, _, _, tape = _forward(layer)
        backward = partial(_backward, torch.ones_like(output), layer, output, tape, False)
        return {"forward": partial(_forward, layer), "backward": backward}

    with arithmetic(compute_type), launch.use_plans(plan, plan):
        return _slope_us(work)


def _layer_step_us(layer: nn.Module, batch: int, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds a step of a whole layer, input product included."""

    def work(steps: int) -> Work:
        input = torch.randn(steps, batch, 128, device=DEVICE, dtype=dtype)

        def forward() -> None:
            with torch.no_grad():
                layer(input)

        def both() -> None:
            output, _ = layer(input)
            torch.autograd.grad(output, list(layer.parameters()), torch.ones_like(output))

        return {"forward": forward, "both": both}

    return _slope_us(work)


def _slope_us(work: Callable[[int], Work]) -> dict[str, float]:
    """Microseconds a step: the slope between two lengths, which take turns, as the card's clock changes meanwhile."""
    short, long = 256, 1280
    of_short, of_long = work(short), work(long)
    calls = {f"{way}, short": call for way, call in of_short.items()}
    calls |= {f"{way}, long": call for way, call in of_long.items()}
    times = {name: values["median"] for name, values in seconds_in_turns(calls, 0.1).items()}
    return {way: 1e6 * (times[f"{way}, long"] - times[f"{way}, short"]) / (long - short) for way in of_short}


def _scan_arguments(
    cell: str, hidden: int, batch: int, steps: int, dtype: torch.dtype, ragged: bool = False
) -> list[Any]:
    """Of one direction over sequences of one length; `ragged`: of both, over ids of sequences that differ in length."""
    torch.manual_seed(0)
    gates, lanes = rnnfast.cells.CELLS[cell].gates, 2 if ragged else 1

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, device=DEVICE, dtype=dtype).uniform_(-(hidden**-0.5), hidden**-0.5)

    weights = [
        uniform(lanes, gates * hidden, 4),
        uniform(lanes, gates * hidden, hidden),
        uniform(lanes, gates * hidden),
    ]
    states = [uniform(lanes, batch, hidden), uniform(lanes, batch, hidden) if cell == "lstm" else None]
    batch_sizes = torch.arange(steps, 0, -1) * batch // steps if ragged else None
    rows = steps * batch if batch_sizes is None else int(batch_sizes.sum())
    input = torch.randint(4, (rows,), device=DEVICE) if ragged else uniform(rows, 4)
    return [input, *weights, weights[2].clone(), None, *states, batch_sizes, cell, ragged]


def _forward(layer: list[Any]) -> tuple[Tensor, ...]:
    arguments: Any = (*layer, True)
    return launch.forward(*arguments)


def _backward(d_output: Tensor, layer: list[Any], output: Tensor, tape: Tensor, products: bool) -> tuple[Tensor, ...]:
    """With or without the products that follow the scan."""
    arguments: Any = (d_output, None, None, *layer, output, tape, products, products)
    return launch.backward(*arguments)


def load(backend: str) -> None:
    """Makes a GPU backend ready. Raises RuntimeError where it cannot be."""
    reason = dispatch.BACKENDS[backend].why_not()
    if reason is not None:
        raise RuntimeError(f"the {backend} backend is not available: {reason}")
    dispatch.BACKENDS[backend].load()
