"""The examples in the documentation run as they stand: the code of a page, block after block, is one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnfast

DOCS = Path(__file__).parent.parent / "docs"


def run_page(page: str, kind: str = "python", **names: Any) -> dict[str, Any]:
    """Runs every block of a kind on a page, one after the other, and returns their names."""
    text = (DOCS / page).read_text()
    blocks = list(re.finditer(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    names["__name__"] = page
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), names)
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


SIZES = {0: torch.export.Dim("steps", min=1, max=4096), 1: torch.export.Dim("batch", min=1, max=512)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_example_of_aot_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layer = rnnfast.LSTM(5, 7)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(20, 4, 5),), dynamic_shapes=(SIZES,))
        run_page("transforms.md", "python aoti", torch=torch, layer=layer, program=program)
    assert (tmp_path / "layer.pt2").exists()


@pytest.mark.filterwarnings("ignore")  # torch's exporter deprecates itself
def test_example_of_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'rnnfast[onnx]'")
    monkeypatch.chdir(tmp_path)
    run_page("transforms.md", "python onnx", torch=torch, layer=rnnfast.LSTM(5, 7), sizes=SIZES)
    assert (tmp_path / "layer.onnx").exists()
