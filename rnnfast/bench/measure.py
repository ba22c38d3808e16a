"""How things are timed: in turns, medians of many, beside the machine's own limits."""

from __future__ import annotations

import functools
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast.backends import cpu
from rnnfast.cells import cell_named
from rnnfast.errors import UserError, note

Turn = Callable[[int], float]
"""Does its work so many times, and returns the seconds that took."""

MIN_TURNS, MAX_TURNS = 3, 101
TURN_SECONDS = 0.002  # short work is repeated within a turn until it takes this long
SLOW_CALL = 0.1  # seconds; such a call is its own warm-up
# A few milliseconds each on any processor.
FMA_ROUNDS, PRODUCT_ROUNDS, GATE_ROUNDS = 500_000, 2_000_000, 2_000
READ_BYTES, LEAST_READS = 200e6, 4  # of weights, in all, but each so many times
FULL_BATCH = 48  # rows that a product runs at full speed with
NEAR_DEPTH = 256  # of a panel of weights that stays in the second-level cache

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""The largest RMS of an error over the RMS of the truth at which two results are still the same computation."""


class Sample(NamedTuple):
    """A quantity measured several times: its median and quartiles. `calls` were averaged over in each turn."""

    median: float
    lower: float
    upper: float
    turns: int
    calls: int

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        return (self.upper - self.lower) / 2 / self.median if self.median else 0.0


def sample(values: Sequence[float], calls: int = 1) -> Sample:
    """Median and quartiles of measured values."""
    if len(values) == 1:
        return Sample(values[0], values[0], values[0], 1, calls)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Sample(median, lower, upper, len(values), calls)


def timed(work: Callable[[], object]) -> Turn:
    """The turn of a plain function."""

    def turn(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return time.perf_counter() - start

    return turn


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Run torch on so many threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternate(turns: Mapping[str, Turn], seconds: float, rest: float = 0.0) -> dict[str, Sample]:
    """Time contestants in turn: A B C A B C ..., after a warm-up of each.

    Args:
        turns: the contestants by name.
        seconds: about how long to go on, all contestants together; there are at least `MIN_TURNS` rounds.
        rest: seconds of silence, and one call that does not count, in front of each turn. Contestants with thread
            pools of their own need it: a pool's threads spin for a while after their work, on cores that the next
            contestant would have to itself in a program of its own.

    Returns:
        Seconds a call, by name.
    """
    calls = {name: _calls_in_a_turn(turn) for name, turn in turns.items()}
    times: dict[str, list[float]] = {name: [] for name in turns}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(MAX_TURNS):
            if done >= MIN_TURNS and time.perf_counter() - start > seconds:
                break
            for name, turn in turns.items():
                if rest:
                    time.sleep(rest)
                    turn(1)
                times[name].append(turn(calls[name]) / calls[name])
    finally:
        if collecting:
            gc.enable()
    return {name: sample(values, calls[name]) for name, values in times.items()}


def _calls_in_a_turn(turn: Turn) -> int:
    """Warms up, and finds how many calls make a turn long enough for the clock."""
    calls, taken = 1, turn(1)
    if taken < SLOW_CALL:
        taken = turn(1)
    while taken < TURN_SECONDS:
        calls = max(calls + 1, math.ceil(1.2 * calls * TURN_SECONDS / max(taken, 1e-9)))
        taken = turn(calls)
    return calls


@dataclass(frozen=True)
class Work:
    """What a call in float32 cannot do without, by which its limit is reckoned.

    Attributes:
        batch, depth: rows of a step, and how long the sums of its product are.
        recurrent_flops: operations of the products that go step by step.
        recurrent_bytes: of the weights that each of these steps reads.
        reads: how many steps read them.
        parallel_flops: of those that take all steps at once, but for the next.
        weight_flops: of the gradients of weights.
        forward_units, backward_units: units whose gate math is done.
    """

    cell: str
    batch: int
    depth: int
    recurrent_flops: float
    recurrent_bytes: int
    reads: int
    parallel_flops: float
    weight_flops: float
    forward_units: float
    backward_units: float

    @property
    def flops(self) -> float:
        return self.recurrent_flops + self.parallel_flops + self.weight_flops


class Limits(NamedTuple):
    """What the machine allowed in the seconds of a measurement: see docs/benchmarks.md.

    Attributes:
        fma_peak: GFLOP/s in float32, or None without the compiled library, which holds the loops.
        seconds: the least that the work could have taken; None where it was not asked for.
        reading: GB/s that weights as large as the work's were read with; None where none are read step by step.
    """

    fma_peak: float | None
    seconds: float | None
    reading: float | None = None


NO_LIMITS = Limits(None, None)


def alternate_with_limits(
    turns: Mapping[str, Turn], seconds: float, rest: float = 0.0, work: Work | None = None
) -> tuple[dict[str, Sample], Limits]:
    """As `alternate`, with the loops that find the machine's limits as one more contestant, in the very same seconds.

    Returns:
        Seconds a call, by name, and the limits, of `work` where it is given.
    """
    operators = _limit_operators()
    if operators is None:
        return alternate(turns, seconds, rest), NO_LIMITS
    peaks: list[float] = []
    least: list[float] = []
    readings: list[float] = []

    def find() -> None:
        peaks.append(operators.fma_peak_cpu(FMA_ROUNDS))
        if work is None:
            return
        if work.reads:
            rounds = max(LEAST_READS, math.ceil(READ_BYTES / work.recurrent_bytes))
            readings.append(operators.read_limit_cpu(work.recurrent_bytes, rounds))
        least.append(_least_seconds(work, operators, readings[-1] if readings else math.inf))

    samples = alternate({**turns, "limits": timed(find)}, seconds, rest)
    del samples["limits"]
    return samples, Limits(*(statistics.median(found) if found else None for found in (peaks, least, readings)))


def _least_seconds(work: Work, operators: Any, reading: float) -> float:
    """The work at the speed of products and gate math whose operands are near; or of reading its weights, in GB/s."""

    def seconds_of(flops: float, limit: Any, batch: int) -> float:
        if not flops:
            return 0.0
        depth = min(work.depth, NEAR_DEPTH)
        return flops / (1e9 * float(limit(batch, depth, math.ceil(PRODUCT_ROUNDS / (batch * depth)))))

    def gates(units: float, backward: bool) -> float:
        cell = cell_named(work.cell).name
        return units / float(operators.gate_limit_cpu(cell, backward, GATE_ROUNDS)) if units else 0.0

    recurrent = seconds_of(work.recurrent_flops, operators.product_limit_cpu, min(work.batch, FULL_BATCH))
    # Weights can be read while others are multiplied.
    seconds = max(recurrent, work.reads * work.recurrent_bytes / (1e9 * reading))
    seconds += seconds_of(work.parallel_flops, operators.product_limit_cpu, FULL_BATCH)
    seconds += seconds_of(work.weight_flops, operators.weight_limit_cpu, FULL_BATCH)
    return seconds + gates(work.forward_units, False) + gates(work.backward_units, True)


class Disagreement(UserError):
    """Two contestants do not compute the same, so there is nothing to time."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of `expected`, in float64; 0 for tensors of no elements."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.double(), expected.double()
    size = expected.square().mean().sqrt().item()
    return (actual - expected).square().mean().sqrt().item() / (size or 1.0)


def check_same(
    who: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, where: str
) -> None:
    """Assert that a contestant's results, by name, are the expected ones.

    Raises:
        Disagreement: names, a shape or a value differ; NaN differs from everything.
    """
    if actual.keys() != expected.keys():
        raise Disagreement(f"{where}: {who} returns {', '.join(actual)} in place of {', '.join(expected)}: not timed")
    for name, tensor in expected.items():
        if actual[name].shape != tensor.shape:
            shapes = f"{tuple(actual[name].shape)}, not {tuple(tensor.shape)}"
            raise Disagreement(f"{where}: {who}'s {name} has shape {shapes}: not timed")
        error = relative_error(actual[name], tensor)
        if not error <= tolerance:
            raise Disagreement(
                f"{where}: {who}'s {name} differs by {error:.1e} (RMS, relative; {tolerance:.0e} is allowed): not timed"
            )


# The machine


def fma_peak() -> float | None:
    """GFLOP/s in float32 of a loop of multiply-adds on registers alone, on every thread torch uses; the best of three.

    None where the compiled library, which holds the loop, is not available.
    """
    operators = _limit_operators()
    return None if operators is None else max(float(operators.fma_peak_cpu(FMA_ROUNDS)) for _ in range(3))


def copy_bandwidth() -> float:
    """GB/s of copying a tensor that no cache holds, of 256 MiB; a byte read and written counts as two."""
    source = torch.ones(256 << 18)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source))(1) for _ in range(7)]
    return 2 * source.numel() * source.element_size() / statistics.median(times[1:]) / 1e9


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()  # ARM's has no name there


@functools.cache
def _limit_operators() -> Any:
    """The namespace with the operators of csrc/cpu/limits.cpp, or None."""
    try:
        cpu.load()
    except RuntimeError as error:
        note(f"the machine's limits are not measured: {error}")
        return None
    _library.define("fma_peak_cpu(int rounds) -> float")
    _library.define("product_limit_cpu(int batch, int depth, int rounds) -> float")
    _library.define("weight_limit_cpu(int batch, int depth, int rounds) -> float")
    _library.define("read_limit_cpu(int bytes, int rounds) -> float")
    _library.define("gate_limit_cpu(str cell, bool backward, int rounds) -> float")
    return torch.ops.rnnfast


_library = torch.library.Library("rnnfast", "FRAGMENT")
