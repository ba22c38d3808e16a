"""The examples in the documentation run as they stand: the code of a page, block after block, is one program."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def run_page(page: str) -> dict[str, Any]:
    """Runs every block of Python on a page, but for those marked "onnx" where ONNX is not installed."""
    text, with_onnx = (DOCS / page).read_text(), importlib.util.find_spec("onnxscript") is not None
    blocks = list(re.finditer(r"^```python( onnx)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    names: dict[str, Any] = {"__name__": page}
    for block in blocks:
        if with_onnx or not block[1]:
            line = text[: block.start(2)].count("\n")
            exec(compile("\n" * line + block[2], str(DOCS / page), "exec"), names)
    return names


@pytest.mark.parametrize("page", ["sequences.md", "modules.md", "regularisation.md"])
def test_examples_run(page: str) -> None:
    run_page(page)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_examples_of_transforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("transforms.md")
    torch._dynamo.reset()
    assert names["layer"].weight_hh_l0.grad is not None
