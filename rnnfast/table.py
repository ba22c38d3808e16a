"""What was measured on a card: which backend is fastest for a layer there, and which team its CUDA scan runs on.

`rnnfast tune` makes such a table on the user's own card and keeps it in the cache folder; tables of cards that were
measured are shipped in rnnfast/tables (none yet). `auto` follows the user's own, else the shipped one, and leaves a
kernel alone that neither has verified. A table holds for one card and one state of each backend's sources; the user's
own, besides, for one driver and one torch, whose cuDNN it was measured beside.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rnnfast import building
from rnnfast.files import atomic_write, cache_folder
from rnnfast.tracing import constant_in_graphs

FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
# The backends that a table decides about; "torch" is what they are measured beside.
TUNED = ("cuda", "triton")
KERNELS = ("block", "cluster", "grid", "steps")  # of the CUDA scan, in the order of csrc/cuda/plan.h
# Calls are measured at these numbers of steps; one in between goes by the next smaller. Training has two at least.
STEPS = (1, 16, 128)


def compute_type_of(dtype: torch.dtype, settings: Any = torch.backends.cuda.matmul) -> str:
    """What a scan of this dtype computes in: the dtype's name, or tf32 where torch's GEMMs, or cuDNN, may use that."""
    # It follows `allow_tf32`, too, which itself raises once a program has set the precision in the newer way.
    if dtype is torch.float32 and settings.fp32_precision == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


class Regime(NamedTuple):
    """What the speed of a layer's call depends on."""

    cell: str
    compute_type: str  # how our scan computes: float32, tf32, bfloat16, float16 or float64
    torch_compute_type: str  # how torch.nn would
    hidden: int
    rows: int  # of the batch, times the directions
    steps: int
    training: bool  # a backward pass will follow

    @classmethod
    def of(cls, cell: str, dtype: torch.dtype, hidden: int, rows: int, steps: int, training: bool) -> Regime:
        """The regime under torch's present settings of TF32: that of its products is ours, cuDNN has its own."""
        torch_compute_type = compute_type_of(dtype, torch.backends.cudnn.rnn)
        return cls(cell, compute_type_of(dtype), torch_compute_type, hidden, rows, steps, training)

    @property
    def call(self) -> str | None:
        """The name of the measured call that stands for it, such as "forward 16"; None if none does."""
        measured = max((steps for steps in STEPS if steps <= self.steps), default=STEPS[0])
        if not self.training:
            return f"forward {measured}"
        return f"training {measured}" if measured > 1 else None


@dataclass
class Point:
    """What was measured of layers with one size and arithmetic.

    `teams` gives for "forward" and "backward" the fastest right team of the CUDA scan: kernel, blocks, rows and warps;
    `kernel` is the one that the Triton scan took.
    `microseconds` gives for each call, such as "training 128", what each backend took that was found right. `failures`
    tells what a backend got wrong here, all of it or some teams.
    """

    cell: str
    compute_type: str
    hidden: int
    batch: int
    teams: dict[str, list[Any]] = field(default_factory=dict)
    microseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    kernel: str = ""


class Identity(NamedTuple):
    """What a table holds for. `sources` has for each backend a hash of its kernels' sources."""

    card: str
    driver: str
    torch: str
    sources: dict[str, str]


@dataclass(eq=False)
class Table:
    """The measurements of one card."""

    identity: Identity
    points: list[Point]
    time: str = ""
    origin: str = "this machine's own"
    _by_kind: dict[tuple[str, str], list[Point]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for point in sorted(self.points, key=lambda p: (p.hidden, p.batch)):
            self._by_kind.setdefault((point.cell, point.compute_type), []).append(point)

    def nearest(self, cell: str, compute_type: str, hidden: int, rows: int) -> Point | None:
        """The smallest measured point that is at or above both sizes."""
        kind = ("rnn_tanh" if cell == "rnn_relu" else cell, compute_type)
        for point in self._by_kind.get(kind, ()):
            if point.hidden >= hidden and point.batch >= rows:
                return point
        return None

    def ranking(self, regime: Regime, device: int = -1) -> tuple[str, ...]:
        """The backends that were right at the nearest point, "torch" among them, fastest first.

        Without Triton's where that would take another kernel on this CUDA device than the one measured at the point.
        """
        cell, compute_type, torch_compute_type, hidden, rows, *_ = regime
        ours, theirs = (self.nearest(cell, kind, hidden, rows) for kind in (compute_type, torch_compute_type))
        call = regime.call
        if ours is None or theirs is None or call is None:
            return ()
        times = dict(ours.microseconds.get(call, {}))
        beside = theirs.microseconds.get(call, {}).get("torch")
        if beside is None:
            return ()
        times["torch"] = beside
        if "triton" in times and device >= 0 and _kernels(cell, compute_type, hidden, rows, device) != [ours.kernel]:
            del times["triton"]
        return tuple(sorted(times, key=lambda name: times[name]))

    def wins(self, backend: str) -> tuple[int, int]:
        """In how many of all measured calls the backend was the fastest."""
        calls = [times for point in self.points for times in point.microseconds.values() if times]
        return sum(min(times, key=lambda name: times[name]) == backend for times in calls), len(calls)

    def write(self, path: Path) -> None:
        """Writes the table, whole or not at all.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        head = {"format": FORMAT, **self.identity._asdict(), "time": self.time}
        points = ",\n".join(json.dumps(asdict(point)) for point in self.points)
        atomic_write(path, f'{json.dumps(head)[:-1]}, "points": [\n{points}\n]}}\n'.encode())


class Found(NamedTuple):
    """The table that holds for a device, or in a few words why there is none."""

    table: Table | None
    why_not: str


NOWHERE = Found(None, "there is no card")


def of(device: int) -> Found:
    """Returns the table for a CUDA device, by its index; negative: no device."""
    if device < 0:
        return NOWHERE
    _read_once(device)
    return _found[device]


def forget() -> None:
    """Has tables read anew, after one was written."""
    _found.clear()


_found: dict[int, Found] = {}


@constant_in_graphs  # the reading of files cannot be traced, but what was read can
def _read_once(device: int) -> None:
    if device not in _found:
        _found[device] = _find(device)


@constant_in_graphs
def _kernels(cell: str, compute_type: str, hidden: int, rows: int, device: int) -> list[str]:
    """Those that the Triton scan may take for so many rows: in one direction or in two."""
    from rnnfast.backends.triton.plan import kernel_on

    card, splits = torch.device("cuda", device), [(rows // lanes, lanes) for lanes in (1, 2) if rows % lanes == 0]
    return sorted({kernel_on(card, cell, hidden, *split, compute_type) for split in splits})


def _find(device: int) -> Found:
    wanted = identity(device)
    own, problems = path_of(wanted), []
    if own.exists():
        try:
            found = read(own)
            if found.identity == wanted:
                return Found(found, "")
            problems.append(f"{own} is a table of something else")
        except (OSError, ValueError) as error:
            problems.append(f"{own} cannot be read: {error}")
    for path in sorted(SHIPPED.glob("*.json")):
        try:
            shipped = read(path)
        except (OSError, ValueError) as error:
            problems.append(f"the shipped {path.name} cannot be read: {error}")
            continue
        if shipped.identity.card == wanted.card:
            shipped.origin = "; ".join(["shipped", *problems])
            if _drop_stale(shipped, wanted):
                return Found(shipped, "")
            problems.append(f"the shipped {path.name} is of other kernels than these")
    if not problems and any(own.parent.glob(f"{_slug(wanted.card)}-*.json")):
        problems.append("its table is of another driver, torch or rnnfast")
    return Found(None, "; ".join(problems) or f"nothing has been measured on this {wanted.card}")


def read(path: Path) -> Table:
    """Reads a table.

    Raises:
        OSError, ValueError: there is none, or it is damaged or of another format.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this rnnfast reads {FORMAT}")
        head = Identity(*(content[name] for name in Identity._fields))
        points = [Point(**point) for point in content["points"]]
        for point in points:
            if not isinstance(point.hidden, int) or not isinstance(point.batch, int):
                raise ValueError("a size is no number")
            for times in point.microseconds.values():
                if not all(isinstance(time, (int, float)) for time in times.values()):
                    raise ValueError("a time is no number")
            for kernel, *sizes in point.teams.values():
                if kernel not in KERNELS or len(sizes) != 3 or (kernel != "steps" and min(sizes) < 1):
                    raise ValueError("a team is none of the CUDA scan's")
        return Table(head, points, content["time"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is damaged: {type(error).__name__} {error}") from error


def path_of(wanted: Identity) -> Path:
    """Where the user's own table is kept: a file for each card, driver, torch and state of the sources."""
    stamp = hashlib.sha256(repr((wanted.driver, wanted.torch, sorted(wanted.sources.items()))).encode()).hexdigest()
    return cache_folder() / "tables" / f"{_slug(wanted.card)}-{stamp[:12]}.json"


def identity(device: int) -> Identity:
    """What a table made now on this device would hold for."""
    return Identity(torch.cuda.get_device_name(device), _driver(), torch.__version__, sources())


def _drop_stale(table: Table, wanted: Identity) -> bool:
    """Drops what was measured of a backend whose sources have changed since; False if that is all."""
    stale = [name for name in TUNED if table.identity.sources.get(name) != wanted.sources[name]]
    for point in table.points:
        if "cuda" in stale:
            point.teams = {}
        for times in point.microseconds.values():
            for name in stale:
                times.pop(name, None)
    return len(stale) < len(TUNED)


def _slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def _driver() -> str:
    """The version of the GPU's driver, as far as it can be told without asking the device."""
    try:
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\S+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    if found is not None:
        return found[1]
    return f"ROCm {torch.version.hip}" if torch.version.hip else f"for CUDA {_driver_interface()}"


def _driver_interface() -> int:
    return int(getattr(torch._C, "_cuda_getDriverVersion")())  # noqa: B009, only a torch for CUDA has it


@cache
def sources() -> dict[str, str]:
    from rnnfast.backends.cuda import build

    backends = Path(__file__).parent / "backends"
    of_both = [backends / "gpu_scan.py", backends / "products.py"]
    kernels = sorted((backends / "triton").glob("*.py"))
    return {
        "cuda": building.hash_of([*of_both, backends / "cuda" / "launch.py"], build.source_hash()),
        "triton": building.hash_of([*of_both, *kernels], _triton_version()),
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)
