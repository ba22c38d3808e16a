"""One streaming step from Python: one sequence, one time step, the state handed in and out, one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast.bench.layers import FORWARD, LayerCase, Setup, outputs, set_up
from rnnfast.bench.measure import TOLERANCE, Turn, alternate, check_same, timed
from rnnfast.bench.report import OURS, TORCH, Row

CHECKED_STEPS = 20


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Run torch on so many threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Step = Callable[[Any], tuple[Any, Any]]
"""From a state to an output and the next state, on an input that stays the same."""


def _torch(layer: nn.RNNBase, setup: Setup) -> Step:
    return lambda state: layer(setup.input, state)


def _ours(layer: Any, setup: Setup) -> Step:
    x = setup.input[0]
    return lambda state: layer.step(x, state)


def _onnx(setup: Setup) -> Step:
    from rnnfast.bench.peers import onnx_session

    session = onnx_session(setup.theirs, steps=1, batch=1, with_state=True)
    x = setup.input.numpy()

    def step(state: Any) -> tuple[Any, Any]:
        inputs = dict(zip(("h_0", "c_0"), state, strict=False))
        output, *state = session.run(None, {"X": x} | inputs)
        return output, state

    return step


def _turn(step: Step, state: Any) -> Turn:
    """A stream that goes on from call to call."""

    def call() -> None:
        nonlocal state
        _, state = step(state)

    return timed(call)


def measure_stream(case: LayerCase, seconds: float, backend: str = "auto", peers: bool = True) -> Row:
    """Ours beside torch.nn's and ONNX Runtime's; NumPy arrays go into and out of the latter, as it likes them.

    Raises:
        Disagreement: after some steps they have not come to the same output and state.
    """
    from rnnfast.bench.peers import ONNXRUNTIME, missing

    with threads(1), torch.no_grad():
        setup = set_up(case, backend)
        zero = torch.zeros(1, 1, case.hidden_size)
        state: Any = (zero, zero.clone()) if case.cell == "lstm" else zero
        steps: dict[str, tuple[Step, Any]] = {
            OURS: (_ours(setup.ours, setup), state),
            TORCH: (_torch(setup.theirs, setup), state),
        }
        if peers and not {"onnx", "onnxruntime"} & set(missing()):
            arrays = [part.numpy() for part in (state if isinstance(state, tuple) else (state,))]
            steps[ONNXRUNTIME] = (_onnx(setup), arrays)
        results = {name: _run(*start) for name, start in steps.items()}
        for name in results.keys() - {TORCH}:
            check_same(name, results[name], results[TORCH], TOLERANCE[torch.float32], case.label)
        samples = alternate({name: _turn(*start) for name, start in steps.items()}, seconds)
        choice = rnnfast.explain(setup.ours, setup.input)
    return Row(case.label, asdict(case), choice.backend, samples)


def stream_case(cell: str, hidden_size: int, inputs: int = 28) -> LayerCase:
    """One step of one sequence."""
    return LayerCase(cell, hidden_size, batch=1, steps=1, direction=FORWARD, inputs=inputs)


def _run(step: Step, state: Any) -> dict[str, Tensor]:
    """What a stream has come to after some steps."""
    for _ in range(CHECKED_STEPS):
        output, state = step(state)
    if isinstance(output, Tensor):
        return outputs(output.view(1, 1, -1), state)
    output, *state = (torch.from_numpy(array) for array in (output[:, 0], *state))
    return outputs(output, tuple(state))
