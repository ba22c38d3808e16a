"""Shared by all tests: which scan backends this machine can run, and the settings of the property-based tests."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rnnfast
from rnnfast.backends import cpu

if importlib.util.find_spec("hypothesis") is not None:  # the tests that need a GPU run where it is not, too
    from hypothesis import HealthCheck, settings

    settings.register_profile("rnnfast", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    settings.load_profile("rnnfast")

# So that tests with more threads than this machine has processors use them all. Read when the library is first used.
os.environ.setdefault("RNNFAST_CPU_PROCESSORS", "128")

WHY_NOT = {status.name: status.note for status in rnnfast.backends() if not status.available}
SCAN_BACKENDS = [
    pytest.param(
        name, marks=pytest.mark.skipif(name in WHY_NOT, reason=f"backend {name} not available: {WHY_NOT.get(name)}")
    )
    for name in ("reference", "cpu")
    if name in {status.name for status in rnnfast.backends()}
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(params=SCAN_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each scan backend in turn that runs on the CPU."""
    return str(request.param)


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The status of every direct call so far."""
    cpu.load()
    function, calls = cpu.infer, []

    def counted(*args: Any) -> int:
        calls.append(function(*args))
        return calls[-1]

    monkeypatch.setattr(cpu, "infer", counted)
    with torch.no_grad():
        yield calls


@pytest.fixture
def direct_call_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the direct calls that were done so far, with gradients as well."""
    cpu.load()
    names: list[str] = []
    for name in ("forward", "backward", "weight_gradients", "infer"):
        monkeypatch.setattr(cpu, name, _noted(name, getattr(cpu, name), names))
    return names


def _noted(name: str, function: Any, names: list[str]) -> Any:
    def noted(*fields: Any) -> int:
        status: int = function(*fields)
        names.extend([name] if status == 0 else [])
        return status

    return noted


@pytest.fixture
def reset_dynamo() -> Iterator[None]:
    """For tests that compile: nothing of it is left for the next one."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def matplotlib() -> None:
    """For tests that draw."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'rnnfast[plot]'")


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the CPU's generator alone: the others' keep the seed and a traceback for a device that never comes
        torch.default_generator.manual_seed(0)
    # torch's own test helpers, once imported, forbid the whole process to set torch.backends' flags as users do.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
