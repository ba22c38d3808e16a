"""The examples of docs/transforms.md, run as they stand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "transforms.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_examples(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with_onnx = importlib.util.find_spec("onnxscript") is not None
    blocks = re.findall(r"^```python( onnx)?\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    names: dict[str, Any] = {}
    for needs_onnx, block in blocks:
        if with_onnx or not needs_onnx:
            exec(compile(block, str(PAGE), "exec"), names)
    torch._dynamo.reset()
    assert names["layer"].weight_hh_l0.grad is not None
