"""The benchmarks by name: what each measures, and the cases it goes through unless the command line says otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from rnnfast.bench.layers import BOTH, FORWARD, LayerCase, measure_dtype, measure_layer, measure_loop
from rnnfast.bench.memory import measure_memory
from rnnfast.bench.pipeline import PipelineCase, measure_generation, measure_training
from rnnfast.bench.report import Row
from rnnfast.bench.scan import ScanCase, measure_scan
from rnnfast.bench.stream import measure_stream, stream_case


@dataclass(frozen=True)
class Grid:
    """The cases of a benchmark, and how long each is measured; every field but `measures` is a flag."""

    measures: str
    cells: Sequence[str] = ("rnn", "lstm", "gru")
    hidden_sizes: Sequence[int] = (64, 256, 512, 1024)
    batches: Sequence[int] = (1, 32)
    steps: Sequence[int] = (35, 128)
    directions: Sequence[str] = (BOTH,)
    dtypes: Sequence[str] = ("float32",)
    inputs: int = 28
    packed: bool = False
    token_ids: bool = False
    peers: bool = False
    backend: str = "auto"
    seconds: float = 0.5

    def quick(self) -> Grid:
        """A few small cases, to see that all works."""
        return replace(
            self,
            hidden_sizes=self.hidden_sizes[:2],
            batches=self.batches[:2],
            steps=self.steps[:1],
            seconds=self.seconds / 5,
        )


class Preset(NamedTuple):
    """A benchmark by name: its line in the help, and its grid."""

    title: str
    grid: Grid


PRESETS = {
    "scan": Preset(
        "the scan alone, forward and backward: its share of the machine's FMA peak",
        Grid("scan", hidden_sizes=(256, 512, 1024), batches=(16, 32, 128), steps=(35,)),
    ),
    "layers": Preset("layers, forward+backward, against torch.nn", Grid("layer", batches=(1, 8, 32, 128), seconds=0.3)),
    "peers-forward": Preset(
        "layers, forward, against the best of torch.nn, ONNX Runtime and JAX",
        Grid("layer", directions=(FORWARD,), peers=True),
    ),
    "peers": Preset("layers, forward+backward, against the best of torch.nn and JAX", Grid("layer", peers=True)),
    "packed": Preset(
        "layers on ragged PackedSequences, forward+backward, against torch.nn",
        Grid("layer", hidden_sizes=(256, 512), batches=(8, 32, 128), packed=True),
    ),
    "loop": Preset(
        "a loop of cells, one step per call, forward+backward, against torch.nn's cells",
        Grid("loop", hidden_sizes=(64, 256, 512), batches=(1, 8, 32), steps=(35,)),
    ),
    "stream": Preset(
        "one streaming step from Python, one sequence, one thread, against torch.nn and ONNX Runtime",
        Grid("stream", hidden_sizes=(64, 256), batches=(1,), steps=(1,), directions=(FORWARD,), peers=True),
    ),
    "memory": Preset(
        "peak memory against torch.nn, of forward+backward with dense input and with token ids, and of inference",
        Grid("memory", hidden_sizes=(512,), batches=(32,), steps=(128,)),
    ),
    "bfloat16": Preset(
        "bfloat16 against our own float32, forward+backward",
        Grid("dtype", hidden_sizes=(512, 1024), batches=(32, 128), steps=(35,), dtypes=("bfloat16",)),
    ),
    "training": Preset(
        "the whole training loop against the d2l chapter's over torch.nn layers, tokens/s",
        Grid("training", hidden_sizes=(256, 512), batches=(32,), steps=(35,), seconds=4),
    ),
    "training-bfloat16": Preset(
        "the same loop with the chapter's RNN of 512 units, in float32 and in bfloat16",
        Grid("training", ("rnn",), (512,), batches=(32,), steps=(35,), dtypes=("float32", "bfloat16"), seconds=4),
    ),
    "generation": Preset(
        "greedy generation against the d2l chapter's over torch.nn layers, characters/s",
        Grid("generation", hidden_sizes=(256, 512), batches=(1,), steps=(1,), seconds=1),
    ),
}

_LAYER_FLAGS = {"cells", "hidden_sizes", "batches", "steps", "dtypes", "inputs", "backend"}
# For what a grid measures, the flags that have a meaning there.
FLAGS = {
    "layer": _LAYER_FLAGS | {"directions", "packed", "token_ids", "peers", "seconds"},
    "dtype": _LAYER_FLAGS | {"directions", "packed", "token_ids", "seconds"},
    "loop": _LAYER_FLAGS | {"seconds"},
    "memory": _LAYER_FLAGS | {"directions", "packed"},
    "scan": {"cells", "hidden_sizes", "batches", "steps", "dtypes", "backend", "seconds"},
    "stream": {"cells", "hidden_sizes", "inputs", "peers", "backend", "seconds"},
    "training": {"cells", "hidden_sizes", "dtypes", "backend", "seconds"},
    "generation": {"cells", "hidden_sizes", "backend", "seconds"},
}

Case = tuple[str, Callable[[], Row]]
"""A label, and what measures the case."""


def cases(grid: Grid) -> list[Case]:
    """The cases of a grid, in order."""
    timing = (grid.seconds, grid.backend)
    models = list(itertools.product(grid.hidden_sizes, grid.cells))
    found: list[tuple[Any, Callable[[], Row]]]
    match grid.measures:
        case "layer":
            found = [(case, partial(measure_layer, case, *timing, grid.peers)) for case in _layers(grid)]
        case "dtype":
            found = [(case, partial(measure_dtype, case, *timing)) for case in _layers(grid)]
        case "loop":
            found = [(case, partial(measure_loop, case, *timing)) for case in _layers(grid)]
        case "memory":  # dense input and token ids, and inference on token ids
            ids = replace(grid, token_ids=True, directions=(*grid.directions, FORWARD))
            layers = dict.fromkeys([*_layers(grid), *_layers(ids)])
            found = [(case, partial(measure_memory, case, grid.backend)) for case in layers]
        case "scan":
            axes = (grid.dtypes, ("forward", "backward"), grid.cells, grid.hidden_sizes, grid.batches, grid.steps)
            scans = [ScanCase(c, h, b, t, direction, d) for d, direction, c, h, b, t in itertools.product(*axes)]
            found = [(case, partial(measure_scan, case, *timing)) for case in scans]
        case "stream":
            steps = [stream_case(cell, hidden, grid.inputs) for hidden, cell in models]
            found = [(case, partial(measure_stream, case, *timing, grid.peers)) for case in steps]
        case "training":
            loops = [PipelineCase(cell, hidden, "training", d) for d in grid.dtypes for hidden, cell in models]
            found = [(case, partial(measure_training, case, *timing)) for case in loops]
        case "generation":
            loops = [PipelineCase(cell, hidden, "generation") for hidden, cell in models]
            found = [(case, partial(measure_generation, case, *timing)) for case in loops]
        case other:
            raise ValueError(f"nothing measures {other!r}")
    return [(case.label, measure) for case, measure in found]


def _layers(grid: Grid) -> list[LayerCase]:
    axes = (grid.dtypes, grid.directions, grid.cells, grid.hidden_sizes, grid.batches, grid.steps)
    return [
        LayerCase(cell, hidden, batch, steps, direction, dtype, grid.inputs, grid.packed, grid.token_ids)
        for dtype, direction, cell, hidden, batch, steps in itertools.product(*axes)
    ]
