"""One streaming step from Python: one sequence, one time step, one thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

import rnnfast
from rnnfast.bench.layers import FORWARD, LayerCase, outputs, set_up
from rnnfast.bench.measure import TOLERANCE, alternate, check_same, threads, timed
from rnnfast.bench.peers import ONNXRUNTIME, missing, onnx_session
from rnnfast.bench.report import OURS, TORCH, Row

CHECKED_STEPS = 20


Contestant = tuple[Callable[[], Any], Callable[[], Any]]
"""A step with the input that is always the same, which returns the output; and what tells the state it has come to."""
STEP, BOUND = "layer.step", "onnxruntime, bound"


def _fed_back(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Contestant:
    """One that is given the state and returns the next one."""

    def call() -> Any:
        nonlocal state
        output, state = step(state)
        return output

    return call, lambda: state


def _ours(layer: Any, x: Tensor) -> Contestant:
    stream = rnnfast.Stream(layer)
    return lambda: stream(x), lambda: stream.state


def _onnx(session: Any, x: Any, state: Any) -> Contestant:
    """As most call it: NumPy arrays go into it and come out."""

    def step(state: Any) -> tuple[Any, Any]:
        inputs = dict(zip(("h_0", "c_0"), state, strict=False))
        output, *state = session.run(None, {"X": x} | inputs)
        return output, state

    return _fed_back(step, state)


def _onnx_bound(session: Any, x: Any, state: Any) -> Contestant:
    """As it is quickest: the states stay in two places of its own, by turns, and only input and output are arrays."""
    from onnxruntime import OrtValue

    value = OrtValue.ortvalue_from_numpy
    (of_output, *of_states) = (output.name for output in session.get_outputs())
    output = value(session.run(None, {"X": x} | dict(zip(("h_0", "c_0"), state, strict=False)))[0])
    now, following = ([value(part.copy()) for part in state] for _ in range(2))
    bindings = []
    for begin, end in ((now, following), (following, now)):
        binding = session.io_binding()
        for name, part in zip(("h_0", "c_0"), begin, strict=False):
            binding.bind_ortvalue_input(name, part)
        for name, part in zip((of_output, *of_states), (output, *end), strict=True):
            binding.bind_ortvalue_output(name, part)
        bindings.append(binding)

    def call() -> Any:
        nonlocal now, following
        binding = bindings[0]
        binding.bind_cpu_input("X", x)
        session.run_with_iobinding(binding)
        bindings.reverse()
        now, following = following, now
        return output.numpy()

    return call, lambda: [part.numpy() for part in now]


def measure_stream(case: LayerCase, seconds: float, backend: str = "auto", peers: bool = True) -> Row:
    """Our streams and our layers' step beside torch.nn's layers and ONNX Runtime.

    Raises:
        Disagreement: after some steps they have not come to the same output and state.
    """
    with threads(1), torch.no_grad():
        setup = set_up(case, backend)
        ours, input, x = cast(Any, setup.ours), setup.input, setup.input[0]
        zero = torch.zeros(1, 1, case.hidden_size)
        state: Any = (zero, zero.clone()) if case.cell == "lstm" else zero
        contestants = {
            OURS: _ours(ours, x),
            STEP: _fed_back(lambda state: ours.step(x, state), state),
            TORCH: _fed_back(lambda state: setup.theirs(input, state), state),
        }
        if peers and not {"onnx", "onnxruntime"} & set(missing()):
            session = onnx_session(setup.theirs, steps=1, batch=1, with_state=True)
            arrays = [part.numpy() for part in (state if isinstance(state, tuple) else (state,))]
            contestants[ONNXRUNTIME] = _onnx(session, input.numpy(), arrays)
            contestants[BOUND] = _onnx_bound(session, input.numpy(), arrays)
        results = {name: _run(*contestant) for name, contestant in contestants.items()}
        for name in results.keys() - {TORCH}:
            check_same(name, results[name], results[TORCH], TOLERANCE[torch.float32], case.label)
        samples = alternate({name: timed(step) for name, (step, _) in contestants.items()}, seconds)
        choice = rnnfast.explain(setup.ours, input)
    return Row(case.label, asdict(case), choice.backend, samples)


def stream_case(cell: str, hidden_size: int, inputs: int = 28) -> LayerCase:
    """One step of one sequence."""
    return LayerCase(cell, hidden_size, batch=1, steps=1, direction=FORWARD, inputs=inputs)


def _run(step: Callable[[], Any], state: Callable[[], Any]) -> dict[str, Tensor]:
    """What a stream has come to after some steps."""
    for _ in range(CHECKED_STEPS):
        output = step()
    reached = state()
    parts = reached if isinstance(reached, tuple | list) else (reached,)
    return outputs(torch.as_tensor(output).view(1, 1, -1), tuple(map(torch.as_tensor, parts)))
