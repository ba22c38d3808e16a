"""Measures the GPU backends on this card, and writes the table that `auto` follows (rnnfast/table.py): `rnnfast tune`.

At each of a few hundred points (cell, arithmetic, hidden size, batch) every backend is first held against torch.nn in
float64; only what is right is timed, in turns with torch.nn's cuDNN. Of the CUDA scan, whose plan rests on a model, the
best teams of several kernels take part, and the fastest right one is kept for each direction.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rnnfast import dispatch, layers, table
from rnnfast.table import Point, Table

LAYERS = {"rnn_tanh": "RNN", "lstm": "LSTM", "gru": "GRU"}  # relu goes by tanh: they are one kernel
COMPUTE_TYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Most telling first, for a run that is cut short.
HIDDEN = (512, 256, 128, 1024, 64)
BATCHES = (32, 1, 128, 8, 512)
PARITY_STEPS = 16  # tell all that a longer sequence would, before rounding errors have grown
Key = tuple[str, str, int, int]  # of a point: cell, arithmetic, H, B
CHECKS = 2  # of a layer: what comes a second time may be replayed from a graph
TEAMS = 3  # of the CUDA scan, for each direction
SECONDS = 0.02  # for the times of one call

# The RMS of a result's error over the RMS of the truth may be so many times torch.nn's own in the same arithmetic.
TIMES_NN = {"float32": 2.0, "tf32": 2.0, "bfloat16": 1.5, "float16": 1.5}
# torch.nn's own counts as one rounding at least: of a few numbers it may hit every one.
ROUNDING = {"float32": 2.0**-23, "tf32": 2.0**-10}
HALF_FORWARD = 0.005  # half types' forward error must be below this besides
# The largest error of an element may be so many times torch.nn's own: one stale element hardly changes an RMS.
WORST_TIMES_NN = 6.0


def allowed_error(compute_type: str, of_nn: float, forward: bool) -> float:
    """The error, relative as RMS, up to which a result counts as right where torch.nn's own is `of_nn`."""
    allowed = TIMES_NN[compute_type] * max(of_nn, ROUNDING.get(compute_type, 0.0))
    return min(allowed, HALF_FORWARD) if forward and compute_type not in ROUNDING else allowed


def tune(
    device: torch.device | str | None = None,
    minutes: float = 5.0,
    backends: Sequence[str] | None = None,
    anew: bool = False,
    report: Callable[[str], None] = print,
) -> Table:
    """Measures the GPU backends on this card, and keeps the table in the user's cache, where `auto` then finds it.

    It continues where an earlier run with the same driver, torch and rnnfast stopped.

    Args:
        device: a CUDA device; default: the current one.
        minutes: start no new point after this.
        backends: those to measure, from "cuda" and "triton"; default: all that can run here.
        anew: discard what an earlier run measured.
        report: called with a line of text after each point.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: there is no GPU, no backend can run on it, or a kernel has broken the device; what was measured
            before is kept.
        UserError: the user's cache cannot be written.
    """
    start = time.perf_counter()
    place = _cuda_device(device)
    names = _available(backends)
    identity = table.identity(place.index or 0)
    path = table.path_of(identity)
    points: dict[Key, Point] = {}
    if path.exists() and not anew:
        try:
            points = {(p.cell, p.compute_type, p.hidden, p.batch): p for p in table.read(path).points}
        except (OSError, ValueError) as error:
            report(f"{path} is made anew: {error}")
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    # An earlier run may have measured some of the backends only.
    missing = {key: [name for name in names if not _is_known(points.get(key), name)] for key in grid()}
    wanted = [key for key in missing if missing[key]]
    with _on(place):
        for number, key in enumerate(wanted):
            if time.perf_counter() - start > 60 * minutes:
                report(f"the time is over; {len(wanted) - number} points are left for the next `rnnfast tune`")
                break
            before = points.get(key, Point(*key))
            point, broken = copy.deepcopy(before), None
            try:
                measure(point, missing[key], place)
            except torch.OutOfMemoryError:
                report(f"{_name(point)}: left out, it does not fit the card's memory")
                continue
            except RuntimeError as error:
                # Kept as a point where nothing more is right, so that the next run does not try it again.
                broken = error
                found = {name: why for name, why in point.failures.items() if name not in before.failures}
                point = before
                point.failures |= found or dict.fromkeys(missing[key], str(error))
            points[key] = point
            Table(identity, [*points.values()], made).write(path)
            if broken is not None:
                raise broken
            report(_summary(point))
    table.forget()
    return Table(identity, [*points.values()], made)


def _is_known(point: Point | None, backend: str) -> bool:
    """Whether a backend has been measured at a point, or found wrong."""
    if point is None:
        return False
    return backend in point.failures or any(backend in times for times in point.microseconds.values())


def measure(point: Point, backends: Sequence[str], device: torch.device) -> None:
    """Fills a point in.

    Raises:
        torch.OutOfMemoryError: torch.nn itself does not fit.
        RuntimeError: a kernel has broken the device; `failures` tells which, if it was found while checking.
    """
    torch.manual_seed(0)
    dtype, name = COMPUTE_TYPES[point.compute_type], LAYERS[point.cell]
    with arithmetic(point.compute_type):
        nn_layer = getattr(nn, name)(point.hidden, point.hidden, device=device, dtype=dtype)
        parity = Parity(nn_layer, point.batch, point.compute_type)
        right: dict[str, nn.Module] = {"torch": nn_layer}
        for backend in backends:
            layer = _ours(name, point.hidden, backend, nn_layer)
            request = dispatch.Request(point.cell, device.type, dtype, False, False)
            refusal = dispatch.BACKENDS[backend].refusal(request)
            if refusal is not None:
                point.failures[backend] = refusal
                continue
            try:
                if backend == "cuda":
                    _choose_teams(point, layer, parity)
                else:
                    from rnnfast.backends.triton.plan import kernel_on

                    point.kernel = kernel_on(device, point.cell, point.hidden, point.batch, 1, point.compute_type)
                    parity.check_all(layer)
                right[backend] = layer
            except Wrong as error:
                point.failures[backend] = str(error)
            except Exception as error:  # Triton's own are of no kind in common
                point.failures[backend] = f"it failed: {error}"
                _require_alive(device, _name(point), backend)
        for call in _calls():
            takes_part = {
                backend: layer
                for backend, layer in right.items()
                if backend != "cuda" or _direction(call) in point.teams
            }
            work = {backend: _work(call, layer, point.batch) for backend, layer in takes_part.items()}
            with _teams_of(point):
                for backend in [name for name in work if name != "torch"]:
                    try:
                        work[backend]()
                    except Exception as error:  # a call that is longer than what was checked may fail all the same
                        point.failures[backend] = f"{call} failed: {error}"
                        del work[backend], right[backend]
                        _require_alive(device, f"{_name(point)}, {call}", backend)
                times = seconds_in_turns(work, SECONDS)
            point.microseconds.setdefault(call, {}).update({name: 1e6 * times[name]["median"] for name in work})


class Wrong(Exception):
    """A result that is not near enough to the truth; the message says which, and by how much.

    `times_allowed`: its error over what is allowed.
    """

    def __init__(self, message: str, times_allowed: float = math.nan) -> None:
        super().__init__(message)
        self.times_allowed = times_allowed


class Parity:
    """Holds a layer against torch.nn in float64 on one input, its errors beside those of torch.nn in the same dtype."""

    def __init__(self, nn_layer: nn.RNNBase, batch: int, compute_type: str) -> None:
        weight = nn_layer.weight_hh_l0
        assert isinstance(weight, Tensor)
        self.compute_type = compute_type
        self.input = torch.randn(PARITY_STEPS, batch, nn_layer.input_size, device=weight.device, dtype=weight.dtype)
        self.truth = results(copy.deepcopy(nn_layer).double(), self.input.double())
        self.of_nn = self.errors(nn_layer)

    def errors(self, layer: nn.RNNBase, gradients: bool = True) -> dict[str, tuple[float, float]]:
        """The RMS of each result's error, and its largest element, over the RMS of the truth."""
        errors = {}
        for name, value in results(layer, self.input, gradients).items():
            error, truth = value.double() - self.truth[name], self.truth[name].square().mean().sqrt()
            errors[name] = (float(error.square().mean().sqrt() / truth), float(error.abs().max() / truth))
        return errors

    def check(self, layer: nn.RNNBase, gradients: bool = True) -> dict[str, float]:
        """Returns the errors as RMS; raises Wrong for the first that is above what is allowed, or not a number."""
        errors = self.errors(layer, gradients)
        for name, (error, worst) in errors.items():
            of_nn, worst_of_nn = self.of_nn[name]
            allowed = allowed_error(self.compute_type, of_nn, forward=not name.startswith("d_"))
            if not error <= allowed:
                raise Wrong(f"{name} is off by {error:.1e}, allowed are {allowed:.1e}", error / allowed)
            allowed = WORST_TIMES_NN * max(worst_of_nn, ROUNDING.get(self.compute_type, 0.0))
            if not worst <= allowed:
                raise Wrong(f"an element of {name} is off by {worst:.1e}, allowed are {allowed:.1e}", worst / allowed)
        return {name: error for name, (error, _) in errors.items()}

    def check_all(self, layer: nn.RNNBase) -> list[float]:
        """Checks calls with gradients and those without, which are kernels of their own; returns the errors."""
        return [
            error
            for gradients in (True, False)
            for _ in range(CHECKS)
            for error in self.check(layer, gradients).values()
        ]


def results(layer: nn.RNNBase, input: Tensor, gradients: bool = True) -> dict[str, Tensor]:
    """Output, final states and, named d_..., every gradient of the sum of squares of them all."""
    input = input.detach().requires_grad_()
    with torch.set_grad_enabled(gradients):
        output, state = layer(input)
    states = state if isinstance(state, tuple) else (state,)
    found = {"output": output, **dict(zip(("h_n", "c_n"), states, strict=False))}
    if gradients:
        loss = torch.stack([x.float().square().sum() for x in found.values()]).sum()
        leaves = {"d_input": input, **{f"d_{name}": parameter for name, parameter in layer.named_parameters()}}
        found.update(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return {name: value.detach() for name, value in found.items()}


def seconds_in_turns(work: dict[str, Callable[[], object]], budget: float) -> dict[str, dict[str, float]]:
    """Median and quartiles of the seconds of a call, the contestants taking turns for about `budget` seconds.

    Between two events on the current stream, which is otherwise idle: what the host takes to launch is included.
    """
    for function in work.values():
        for _ in range(3):
            function()
    samples: dict[str, list[float]] = {name: [] for name in work}
    start = time.perf_counter()
    while len(samples[next(iter(work))]) < 5 or time.perf_counter() - start < budget:
        for name, function in work.items():
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            before.record()
            function()
            after.record()
            after.synchronize()
            samples[name].append(before.elapsed_time(after) / 1e3)
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in samples.items()}
    return {
        name: {"median": q[1], "lower": q[0], "upper": q[2], "calls": float(len(samples[name]))}
        for name, q in quartiles.items()
    }


@contextmanager
def arithmetic(compute_type: str) -> Iterator[None]:
    """Allows TF32, in torch's products and cuDNN, for "tf32" alone."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    settings = (matmul, cudnn.rnn, cudnn.conv)

    def allow(precisions: Sequence[str]) -> None:
        # torch keeps a setting of the older way and one of the newer, and refuses some calls where they disagree.
        matmul.allow_tf32, cudnn.allow_tf32 = (precision == "tf32" for precision in precisions[:2])
        for setting, precision in zip(settings, precisions, strict=True):
            setting.fp32_precision = precision

    before = [setting.fp32_precision for setting in settings]
    allow(["tf32" if compute_type == "tf32" else "ieee"] * 3)
    try:
        yield
    finally:
        allow(before)


def grid() -> Iterator[Key]:
    for batch, hidden, compute_type, cell in itertools.product(BATCHES, HIDDEN, COMPUTE_TYPES, LAYERS):
        yield cell, compute_type, hidden, batch


def _calls() -> Iterator[str]:
    for steps in table.STEPS:
        yield f"forward {steps}"
        if steps > 1:
            yield f"training {steps}"


def _direction(call: str) -> str:
    """The last direction that a call needs a team for."""
    return "backward" if call.startswith("training") else "forward"


def _work(call: str, layer: nn.Module, batch: int) -> Callable[[], object]:
    weights = list(layer.parameters())
    input_size: Any = layer.input_size
    input = torch.randn(int(call.split()[1]), batch, input_size, device=weights[0].device, dtype=weights[0].dtype)
    gradient = torch.ones_like(input)  # the output is as large as the input

    def forward() -> None:
        with torch.no_grad():
            layer(input)

    def training() -> None:
        output, _ = layer(input)
        torch.autograd.grad(output, weights, gradient)

    return forward if _direction(call) == "forward" else training


def _ours(name: str, hidden: int, backend: str, nn_layer: nn.RNNBase) -> nn.RNNBase:
    weight = next(nn_layer.parameters())
    layer: nn.RNNBase = getattr(layers, name)(hidden, hidden, backend=backend, device=weight.device, dtype=weight.dtype)
    layer.load_state_dict(nn_layer.state_dict())
    return layer


def _choose_teams(point: Point, layer: nn.RNNBase, parity: Parity) -> None:
    """Puts the fastest right team of each direction into the point. Raises Wrong where forward has none."""
    from rnnfast.backends.cuda import launch

    weight = next(layer.parameters())
    h_0 = torch.empty(1, point.batch, point.hidden, device=weight.device, dtype=weight.dtype)
    chosen: list[Any] = []
    for direction in ("forward", "backward"):
        times, wrong = {}, []
        for plan in launch.plans(h_0, point.cell, backward=direction == "backward")[:TEAMS]:
            forward, backward = (plan, None) if direction == "forward" else (chosen[0], plan)
            with launch.use_plans(forward, backward):
                try:
                    parity.check(layer, gradients=direction == "backward")
                except Wrong as error:
                    wrong.append(f"{plan.kernel} of {plan.blocks}: {error}")
                    continue
                except RuntimeError as error:  # such as a launch that the card refuses, which concerns no other team
                    _require_alive(weight.device, f"{_name(point)} on a {plan.kernel} of {plan.blocks}", "cuda")
                    wrong.append(f"{plan.kernel} of {plan.blocks}: it failed: {error}")
                    continue
                call = f"{'forward' if direction == 'forward' else 'training'} {table.STEPS[-1]}"
                work = {"cuda": _work(call, layer, point.batch)}
                times[plan] = seconds_in_turns(work, SECONDS)["cuda"]["median"]
        if wrong:
            point.failures["cuda"] = "; ".join([*filter(None, [point.failures.get("cuda")]), *wrong])
        if not times:
            if direction == "forward":
                raise Wrong(point.failures["cuda"])
            return
        chosen.append(min(times, key=lambda plan: times[plan]))
        point.teams[direction] = list(chosen[-1][:4])


def _teams_of(point: Point) -> Any:
    from rnnfast.backends.cuda import launch

    teams = {direction: launch.Plan(*team) for direction, team in point.teams.items()}
    return launch.use_plans(**teams)


def _require_alive(device: torch.device, where: str, backend: str) -> None:
    """Raises RuntimeError if the device answers no more: after a fault of a kernel, all that follows would fail."""
    try:
        _synchronize(device)
    except RuntimeError as error:
        message = f"{where}: the {backend} backend has broken the device ({error}); what was measured before is kept"
        raise RuntimeError(f"{message}, and the next `rnnfast tune` continues after this point") from error


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


def _cuda_device(device: torch.device | str | None) -> torch.device:
    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures kernels on a GPU, and PyTorch sees none here")
    place = torch.device(device if device is not None else "cuda")
    if place.type != "cuda":
        raise RuntimeError(f"tuning measures kernels on a GPU, not on {place}")
    return torch.device("cuda", place.index if place.index is not None else torch.cuda.current_device())


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device)


def _available(backends: Sequence[str] | None) -> list[str]:
    """The backends to measure, loaded. Raises RuntimeError for one that was named and cannot run, or if none can."""
    missing = {}
    for name in table.TUNED if backends is None else backends:
        if name not in table.TUNED:
            raise ValueError(f"only {' and '.join(table.TUNED)} can be tuned, not '{name}'")
        backend = dispatch.BACKENDS[name]
        missing[name] = backend.why_not()
        if missing[name] is None:
            try:
                backend.load()
            except RuntimeError as error:
                missing[name] = str(error)
    unavailable = [f"{name}: {why}" for name, why in missing.items() if why is not None]
    if unavailable and (backends is not None or len(unavailable) == len(missing)):
        raise RuntimeError("; ".join(["nothing to tune", *unavailable]))
    return [name for name, why in missing.items() if why is None]


def _name(point: Point) -> str:
    return f"{point.cell:8} {point.compute_type:8} H={point.hidden:<4} B={point.batch:<3}"


def _summary(point: Point) -> str:
    parts = [_name(point)]
    for call in (f"forward {table.STEPS[-1]}", f"training {table.STEPS[-1]}"):
        times = point.microseconds.get(call, {})
        if times:
            best = min(times, key=lambda name: times[name])
            parts.append(f"{call}: {best} {times['torch'] / times[best]:5.2f}x torch's {times['torch']:.0f} us")
    return "  ".join([*parts, *(f"[{name}: {why}]" for name, why in point.failures.items())])
