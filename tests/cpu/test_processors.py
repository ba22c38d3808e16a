"""How many threads a scan takes: no more than there are processors, and no more than have something to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from rnnfast.backends import cpu
from rnnfast.backends.cpu import build
from tests.cpu.programs import COMPILER, CSRC, HERE, THREADS, compile_program
from tests.cpu.test_threads import GROUPED, GROUPED_THREADS

pytestmark = pytest.mark.skipif(
    not COMPILER or sys.platform != "linux", reason="no C++ compiler was found, or this is not Linux"
)
needs_library = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


def output_of(program: Path, *arguments: object, processors: int | None = None) -> str:
    environment = os.environ | {"RNNFAST_CPU_PROCESSORS": "" if processors is None else str(processors)}
    done = subprocess.run([program, *map(str, arguments)], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(tmp_path_factory.mktemp("program"), "", HERE / "processors.cpp", CSRC / "processors.cpp")


def test_processors_that_the_process_may_use(processors: Path) -> None:
    assert 1 <= int(output_of(processors)) <= len(os.sched_getaffinity(0))
    assert int(output_of(processors, processors=7)) == 7
    pinned = subprocess.run(
        [processors],
        env=os.environ | {"RNNFAST_CPU_PROCESSORS": ""},
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(pinned.stdout) == 1


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {}, 0),
        ("0::/\n", {"cpu.max": "max 100000"}, 0),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/user/job\n", {"user/cpu.max": "400000 100000", "user/job/cpu.max": "max 100000"}, 4),
        ("0::/user/job\n", {"user/cpu.max": "400000 100000", "user/job/cpu.max": "50000 100000"}, 0.5),
        # A container that sees its own group as the root.
        (
            "5:memory:/m\n4:cpu,cpuacct:/docker/1\n",
            {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("4:cpu:/job\n0::/\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 0),
        ("4:cpuset:/job\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 0),
        ("nonsense\n", {"cpu.max": "100000 100000"}, 0),
    ],
)
def test_quota_of_control_groups(
    processors: Path, tmp_path: Path, groups: str, files: dict[str, str], quota: float
) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert float(output_of(processors, tmp_path / "groups", tmp_path / "root")) == quota


def test_no_quota_where_there_are_no_control_groups(processors: Path, tmp_path: Path) -> None:
    assert float(output_of(processors, tmp_path / "missing", tmp_path)) == 0


@pytest.mark.parametrize(
    ("size", "shared", "bytes_of_a_core"),
    [
        ("2048K", "0", 2 << 20),
        ("1M", "0-3", 1 << 18),
        ("1024K", "0-1,4-5,9", (1 << 20) // 5),
        ("512K", None, 1 << 19),
        (None, "0", 0),
    ],
)
def test_the_cache_of_a_core(
    processors: Path, tmp_path: Path, size: str | None, shared: str | None, bytes_of_a_core: int
) -> None:
    for name, text in (("size", size), ("shared_cpu_list", shared)):
        if text is not None:
            (tmp_path / name).write_text(text + "\n")
    assert int(output_of(processors, tmp_path)) == bytes_of_a_core


def run_python(code: str, processors: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RNNFAST_CPU_PROCESSORS": processors}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


class Split(NamedTuple):
    threads: int
    kind: str
    groups: int
    panels: int


def isa_of_this_machine() -> str:
    """The one whose vectors the library uses here."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512" if "avx512vl" in flags else "avx2" if "avx2" in flags else "generic"


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    isa = isa_of_this_machine()
    flags = f"-DRNNFAST_ISA={isa} {build._INSTRUCTION_SETS[isa]}"
    return compile_program(tmp_path_factory.mktemp("program"), flags, HERE / "split.cpp", *THREADS, CSRC / "memory.cpp")


def splits(program: Path, threads: int, processors: int) -> dict[str, Split]:
    found = {}
    for line in output_of(program, threads, processors=processors).splitlines():
        call, how = line.split(": ")
        n, kind, groups, panels = how.split()
        found[call] = Split(int(n), kind, int(groups), int(panels))
    return found


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 6, 8, 16, 24, 32, 64, 128])
def test_threads_have_something_to_do(split: Path, threads: int) -> None:
    for call, how in splits(split, threads, 128).items():
        batch = int(call.split()[2])
        assert how.threads <= threads, call
        assert how.kind != "rows" or how.threads <= batch, call
        assert how.kind != "panels" or how.threads <= how.panels * how.groups, call
        assert how.kind != "panels" or how.groups == 1 or how.threads == how.panels * how.groups, call
        assert how.groups == 1 or how.kind in ("panels", "dealt"), call
        assert how.groups <= max(1, batch // 8), call


def test_rows_of_a_panel_are_shared(split: Path) -> None:
    """The calls that tests/cpu/test_threads.py compares have groups of rows here, forward and backward."""
    found = splits(split, GROUPED_THREADS, 128)
    for cell, *_, batch, _, hidden in GROUPED:
        for direction in ("forward", "backward"):
            assert found[f"{cell.partition('_')[0]} {hidden} {batch} {direction}"].groups > 1


def test_more_threads_for_larger_calls(split: Path) -> None:
    found = splits(split, 32, 128)
    assert found["lstm 16 1 forward"].threads == 1
    for cell in ("rnn", "lstm", "gru"):
        for direction in ("forward", "backward"):
            for batch in (1, 8, 32, 128):
                counts = [found[f"{cell} {hidden} {batch} {direction}"].threads for hidden in (16, 64, 256, 512, 1024)]
                assert counts == sorted(counts), (cell, batch, direction)
            assert found[f"{cell} 1024 128 {direction}"].threads == 32


def test_threads_without_processors_are_left_out(split: Path) -> None:
    few, many = splits(split, 2, 2), splits(split, 64, 2)
    assert all(many[call].threads <= 2 for call in many)
    # Calling all of torch's threads takes long where they have no processors: only the largest calls are shared.
    assert few["lstm 64 8 forward"].threads == 2
    assert many["lstm 64 8 forward"].threads == 1
    assert many["lstm 1024 128 forward"].threads == 2


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("number", ["many", "0", "-2", "2.5", "2 "])
def test_no_number_of_processors(number: str, threads: int) -> None:
    call = "rnnfast.GRU(2, 3, backend='cpu')(torch.randn(4, 2))"
    code = f"import torch, rnnfast; torch.set_num_threads({threads}); {call}"
    done = run_python(code, number)
    assert done.returncode == 1
    assert f"RNNFAST_CPU_PROCESSORS={number}: give a number of processors, 1 or more" in done.stderr


@needs_library
def test_the_threads_of_torch_stay() -> None:
    """OpenMP's libgomp ends those that a team leaves out, and starts new ones for the next team."""
    code = """
import os, torch, rnnfast, rnnfast.lm.operators
from rnnfast.backends import cpu
torch.set_num_threads(6)
cpu.load()
layer, x = rnnfast.LSTM(8, 48, backend="cpu"), torch.randn(20, 64, 8)
gradients = [torch.randn(100_000)]
big = torch.randn(1_000_000)
def work():
    layer(x)[0].sum().backward()
    torch.ops.rnnfast.clip_gradients_cpu(gradients, 1.0)
    big.exp()
work()
before = set(os.listdir("/proc/self/task"))
for _ in range(20):
    work()
assert len(before) >= 6
assert set(os.listdir("/proc/self/task")) == before
"""
    done = run_python(code, "6")
    assert done.returncode == 0, done.stderr[-3000:]


@needs_library
def test_more_threads_than_processors_agree_bitwise_with_one() -> None:
    code = """
import torch
from tests.cpu.test_threads import Case, assert_same, build, cpu, gradients_like, with_threads
cpu.load()
for case in (Case("lstm", 1, 12, 32, 24, 256), Case("gru", 2, 9, 40, 24, 130), Case("rnn_tanh", 1, 50, 64, 9, 200)):
    arguments = build(case, torch.float32)
    d_outputs = gradients_like(arguments, torch.float32)
    expected, found = (with_threads(threads, arguments, d_outputs) for threads in (1, 7))
    for one, other in zip(found, expected):
        assert_same(one, other)
"""
    done = run_python(code, "2")
    assert done.returncode == 0, done.stderr[-3000:]
