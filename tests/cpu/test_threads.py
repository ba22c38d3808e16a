"""The native scan on several threads, in several Python threads, and after a fork: the same bits, and nobody waits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import Tensor

from rnnfast.cells import CELLS
from tests.cpu.harness import DTYPES, Case, assert_same, build, cpu, gradients_like, run
from tests.scans import OUTPUTS

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


@pytest.fixture(autouse=True)
def _library() -> None:
    cpu.load()


def with_threads(count: int, arguments: list, d_outputs: list) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run("cpu", arguments, d_outputs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "shape", [(1, 40, 1, 5, 256), (2, 6, 33, 40, 70), (1, 9, 200, 3, 40), (3, 6, 5, 9, 130)], ids=str
)
def test_runs_and_thread_counts_agree_bitwise(shape: tuple[int, ...], cell: str, dtype: torch.dtype) -> None:
    arguments = build(Case(cell, *shape, ragged=True), dtype)
    d_outputs = gradients_like(arguments, dtype)
    outputs, gradients = with_threads(1, arguments, d_outputs)
    for threads in (1, 2, 3, 5):
        again, again_gradients = with_threads(threads, arguments, d_outputs)
        assert_same(again, outputs)
        assert_same(again_gradients, gradients)


@pytest.mark.parametrize("shape", [(2, 4, 3, 24, 520), (1, 5, 37, 24, 640), (1, 4, 2, 24, 1030)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_dealt_pieces_agree_bitwise_with_one_thread(cell: str, shape: tuple[int, ...]) -> None:
    """Weights beyond a core's cache: threads walk together, and who computes what depends on how fast they are."""
    arguments = build(Case(cell, *shape, ragged=True), torch.float32)
    d_outputs = gradients_like(arguments, torch.float32)
    outputs, gradients = with_threads(1, arguments, d_outputs)
    stop = threading.Event()

    def disturb() -> None:  # something else to do for one of the cores, now and then
        while not stop.wait(2e-4):
            sum(range(20000))

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        for threads in (2, 3, 5):
            again, again_gradients = with_threads(threads, arguments, d_outputs)
            assert_same(again, outputs)
            assert_same(again_gradients, gradients)
    finally:
        stop.set()
        disturbing.join()


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(1, 9, 33, 40, 256), (2, 7, 40, 40, 130), (1, 8, 32, 9, 260)], ids=str)
def test_groups_of_rows_agree_bitwise_with_one_thread(
    shape: tuple[int, ...], cell: str, dtype: torch.dtype, ragged: bool
) -> None:
    """More threads than a step has panels: some share a panel's rows."""
    for ids in (False, True):
        arguments = build(Case(cell, *shape, ids=ids, ragged=ragged), dtype)
        d_outputs = gradients_like(arguments, dtype)
        outputs, gradients = with_threads(1, arguments, d_outputs)
        for threads in (8, 13, 16):
            again, again_gradients = with_threads(threads, arguments, d_outputs)
            assert_same(again, outputs)
            assert_same(again_gradients, gradients)


GROUPED = [  # cell, lanes, steps, batch, inputs, units: with so many threads, groups of rows both ways
    ("lstm", 1, 35, 16, 40, 512),
    ("gru", 1, 35, 32, 40, 512),
    ("rnn_tanh", 1, 35, 16, 40, 1024),
]
GROUPED_THREADS = 128


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("ids", [0, 40, 5000], ids=["vectors", "ids", "many ids"])
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_groups_of_rows_both_ways_agree_bitwise_with_one_thread(case: tuple, ids: int, ragged: bool) -> None:
    cell, lanes, steps, batch, inputs, hidden = case
    arguments = build(Case(cell, lanes, steps, batch, ids or inputs, hidden, ids=ids > 0, ragged=ragged), torch.float32)
    d_outputs = gradients_like(arguments, torch.float32)
    outputs, gradients = with_threads(1, arguments, d_outputs)
    again, again_gradients = with_threads(GROUPED_THREADS, arguments, d_outputs)
    assert_same(again, outputs)
    assert_same(again_gradients, gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_taken_over_in_the_middle_agree_bitwise_with_one_thread(cell: str, dtype: torch.dtype) -> None:
    """Threads walk alone, and the one whose rows end early goes on with some of the other's, from whatever step."""
    arguments = build(Case(cell, 1, 61, 16, 9, 128), dtype)
    arguments[8] = torch.tensor([16] + [8] * 60)
    arguments[0] = arguments[0][: int(arguments[8].sum())].contiguous()
    d_outputs = gradients_like(arguments, dtype)
    outputs, gradients = with_threads(1, arguments, d_outputs)
    for _ in range(10):
        again, again_gradients = with_threads(2, arguments, d_outputs)
        assert_same(again, outputs)
        assert_same(again_gradients, gradients)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the OpenMP library in /proc")
@pytest.mark.parametrize("active_levels", [0, 1])
def test_fewer_threads_than_were_asked_for(active_levels: int) -> None:
    """Where OpenMP gives one (in a parallel region, or as OMP_DYNAMIC has it), a scan split for four is whole."""
    code = f"""
import ctypes, torch
from tests.cpu.test_threads import (
    GROUPED, GROUPED_THREADS, Case, assert_same, build, cpu, gradients_like, with_threads
)

cpu.load()
openmp = {{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}}
for library in openmp:
    ctypes.CDLL(library).omp_set_max_active_levels({active_levels})
for case, many in (
    (Case("lstm", 1, 4, 3, 24, 640), 4),
    (Case("gru", 2, 3, 20, 24, 520), 4),
    (Case("lstm", 1, 5, 40, 5, 70), 4),
    (Case(*GROUPED[0]), GROUPED_THREADS),
):
    arguments = build(case, torch.float32)
    d_outputs = gradients_like(arguments, torch.float32)
    expected, found = (with_threads(threads, arguments, d_outputs) for threads in (1, many))
    for one, other in zip(found, expected):
        assert_same(one, other)
print(len(openmp))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0


def test_several_python_threads_at_once() -> None:
    arguments = build(Case("lstm", 1, 20, 16, 8, 96), torch.float32)
    d_outputs = gradients_like(arguments, torch.float32)
    expected = run("cpu", arguments, d_outputs)
    failures = []

    def work() -> None:
        for _ in range(10):
            outputs, gradients = run("cpu", arguments, d_outputs)
            if not all(torch.equal(outputs[name], expected[0][name]) for name in OUTPUTS):
                failures.append("outputs")
            if not torch.equal(gradients["d_w_hh"], expected[1]["d_w_hh"]):
                failures.append("gradients")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures


def test_the_gil_is_released() -> None:
    arguments = build(Case("lstm", 1, 600, 16, 8, 256), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ticks, running = [], threading.Event()

        def tick() -> None:
            while not running.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0.001)

        thread = threading.Thread(target=tick)
        thread.start()
        time.sleep(0.01)
        start = time.perf_counter()
        torch.ops.rnnfast.scan_cpu(*arguments, False)
        end = time.perf_counter()
        running.set()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert sum(start < tick < end for tick in ticks) >= 3, f"{end - start:.3f} s without a Python thread running"


def test_after_fork() -> None:
    code = """
import os, sys, warnings, torch
warnings.simplefilter("ignore")
from tests.cpu.harness import DTYPES, Case, build, cpu, gradients_like, run
cpu.load()
torch.set_num_threads(2)
arguments = build(Case("lstm", 1, 50, 16, 8, 128), torch.float32)
d_outputs = gradients_like(arguments, torch.float32)
expected = run("cpu", arguments, d_outputs)
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        got = run("cpu", arguments, d_outputs)
        # torch's own parallel operations hang here, so NumPy compares.
        same = all((got[i][n].numpy() == expected[i][n].numpy()).all() for i in (0, 1) for n in got[i])
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
assert torch.equal(run("cpu", arguments, d_outputs)[0]["output"], expected[0]["output"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
