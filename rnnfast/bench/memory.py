"""Peak memory of one call, each contestant in a process of its own.

torch keeps no statistics of CPU memory, so the operating system is asked: Linux counts the most that a process has held
(VmHWM in /proc/self/status), and starts counting again when 5 is written to /proc/self/clear_refs. What is reported is
that maximum less what the process held before the call: the weights and the input are not in it; the results, what is
kept for the backward pass, and every temporary are. `python -m rnnfast.bench.memory CASE WHO BACKEND` is the child.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import rnnfast
from rnnfast.bench.layers import LayerCase, check_parity, contestants, set_up, torch_contestant
from rnnfast.bench.measure import sample
from rnnfast.bench.report import OURS, TORCH, Row
from rnnfast.errors import UserError

RUNS = 3
# Large blocks are given back to the system as soon as they are free; otherwise glibc adapts, and the figures jump.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(case: LayerCase, backend: str = "auto") -> Row:
    """Ours beside torch.nn's.

    Raises:
        Disagreement: they do not compute the same.
        UserError: this is not Linux, or a process failed.
    """
    setup = set_up(case, backend)
    check_parity(case, contestants(setup))
    samples = {who: sample([_child(case, who, backend) for _ in range(RUNS)]) for who in (OURS, TORCH)}
    choice = rnnfast.explain(setup.ours, setup.input)
    return Row(case.label, asdict(case), choice.backend, samples, unit="bytes")


def _child(case: LayerCase, who: str, backend: str) -> int:
    command = [sys.executable, "-m", __name__, json.dumps(asdict(case)), who, backend]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"the memory of {who} for {case.label} cannot be measured: {reason}")
    return int(done.stdout)


def _bytes_of(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def peak_of_call(case: LayerCase, who: str, backend: str) -> int:
    """Bytes that one call takes above what this process holds. Once in a process: a second call finds things kept."""
    _contestant(replace(case, hidden_size=8, batch=2, steps=2), who, backend)()  # loads libraries, starts threads
    call = _contestant(case, who, backend)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _bytes_of("VmRSS")
    result = call()  # held, so that the results are counted
    peak = _bytes_of("VmHWM") - before
    del result
    return peak


def _contestant(case: LayerCase, who: str, backend: str) -> Callable[[], Any]:
    setup = set_up(case, backend)
    return torch_contestant(setup.ours if who == OURS else setup.theirs, setup).call


if __name__ == "__main__":
    print(peak_of_call(LayerCase(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]))
