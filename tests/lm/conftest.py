"""The pipeline's tests read The Time Machine where RNNFAST_DATA has it, else the built-in text, and use no network."""

import os
import signal
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rnnfast import files
from rnnfast.lm import data
from rnnfast.lm.config import check_backend


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and no download."""

    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)


@pytest.fixture(autouse=True, scope="package")
def _signals() -> Iterator[None]:
    """A shell lets what it starts in the background ignore Ctrl-C, which a run then does, too."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Models this small lose by threads, most of all on a busy machine."""
    check_backend("auto", torch.device("cpu"))  # if the native scan is yet to be compiled, it is now, outside any test
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def time_machine(monkeypatch: pytest.MonkeyPatch) -> str:
    """The Time Machine, or the built-in text in its place."""
    if not os.environ.get("RNNFAST_DATA"):
        monkeypatch.setattr(data, "time_machine", data.builtin_text)
    return data.time_machine()
