"""ONNX export, run by onnxruntime and compared with the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import rnnfast
from rnnfast.backends import cpu
from tests.test_compile import CASES, Model

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'rnnfast[onnx]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter deprecates itself


def exported(model: Any, arguments: Any, **options: Any) -> Any:
    import rnnfast.onnx

    table = rnnfast.onnx.translation_table()
    return torch.onnx.export(model, arguments, verbose=False, custom_translation_table=table, **options)


@pytest.mark.parametrize("case", [case for case in CASES if "projected" not in case])
def test_onnx(case: str, backend: str, tmp_path: Any) -> None:
    make_layer, make_arguments = CASES[case]
    layer = make_layer()
    layer.backend = backend
    model, arguments = Model(layer).eval(), make_arguments(4, 3)
    program = exported(model, arguments)
    kinds = [node.op_type for node in program.model.graph]
    assert kinds.count(type(layer).__name__) == layer.num_layers
    assert not any(kind in kinds for kind in ("Loop", "Scan"))
    compare(program, model, arguments, tmp_path)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("bias", [False, True])
def test_onnx_with_dynamic_sizes(name: str, bias: bool, tmp_path: Any) -> None:
    options = {"nonlinearity": "relu"} if name == "RNN" else {}
    model = Model(getattr(rnnfast, name)(5, 7, bidirectional=True, num_layers=2, bias=bias, **options)).eval()
    sizes = {0: Dim("steps", min=1, max=4096), 1: Dim("batch", min=1, max=4096)}
    program = exported(model, (torch.randn(4, 3, 5),), dynamic_shapes=((sizes,),))
    compare(program, model, (torch.randn(9, 6, 5),), tmp_path)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_onnx_of_a_region_under_autocast(name: str, tmp_path: Any) -> None:
    class Region(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(rnnfast, name)(5, 7, bidirectional=True)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                output: torch.Tensor = self.layer(input)[0]
            return output.float()

    model, arguments = Region().eval(), (torch.randn(4, 3, 5),)
    compare(exported(model, arguments), model, arguments, tmp_path, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_the_older_exporter_takes_a_step(name: str, accelerated: bool, tmp_path: Any) -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(torch.nn if accelerated else rnnfast, name)(5, 7, batch_first=True)

        def forward(self, input: torch.Tensor, hx: Any) -> Any:
            return self.layer.step(input, hx)

    model, state = Step().eval(), torch.randn(1, 3, 7)
    rnnfast.accelerate(model)
    arguments = (torch.randn(3, 5), (state, torch.randn(1, 3, 7)) if name == "LSTM" else state)
    torch.onnx.export(model, arguments, tmp_path / "model.onnx", dynamo=False)
    compare_saved(model, arguments, tmp_path)


def refusal(model: Any, arguments: Any, **options: Any) -> str:
    """What the exporter's error is caused by."""
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        exported(model, arguments, **options)
    error: BaseException = raised.value
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def test_what_onnx_has_not_is_refused() -> None:
    input = torch.randn(4, 3, 5)
    assert "ONNX's LSTM has no projection" in refusal(Model(rnnfast.LSTM(5, 7, proj_size=3)), (input,))
    lengths = {"lengths": torch.tensor([4, 1, 2])}
    assert "export the model for padded input" in refusal(rnnfast.GRU(5, 7), (input,), kwargs=lengths)
    if cpu.why_not() is None:
        normalised = rnnfast.Stack("lstm", 5, [7], layer_norm=True, backend="cpu").eval()
        assert "no zoneout, layer normalisation" in refusal(normalised, (input,))

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnfast.LSTM(5, 7)

        def forward(self, input: torch.Tensor) -> Any:
            return self.layer.states(input)

    assert "a model that calls LSTM.states cannot be exported" in refusal(States(), (input,))


def test_an_accelerated_model_with_a_cell_and_a_stack(tmp_path: Any) -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower = torch.nn.LSTM(5, 7, bidirectional=True)
            self.stack = rnnfast.Stack("gru", 14, [7, 7], connection="residual", dropout=0.5)
            self.cell = torch.nn.LSTMCell(7, 4)

        def forward(self, input: torch.Tensor) -> Any:
            output, _ = self.stack(self.lower(input)[0])
            state = None
            for step in output:
                state = self.cell(step, state)
            return state

    model, arguments = Both().eval(), (torch.randn(3, 2, 5),)
    rnnfast.accelerate(model)
    program = exported(model, arguments)
    kinds = [node.op_type for node in program.model.graph]
    assert (kinds.count("LSTM"), kinds.count("GRU")) == (4, 2)  # a cell is a call with one step
    compare(program, model, arguments, tmp_path)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_the_older_exporter_finds_torchs_own_layers(name: str, accelerated: bool, tmp_path: Any) -> None:
    class Both(torch.nn.Module):
        def __init__(self, library: Any) -> None:
            super().__init__()
            self.layer = getattr(library, name)(5, 7, 2, bidirectional=True)
            self.cell = getattr(library, name + "Cell")(14, 4)

        def forward(self, input: torch.Tensor) -> Any:
            output, state = self.layer(input)
            return output, state, self.cell(output[-1])

    model = Both(torch.nn if accelerated else rnnfast).eval()
    if accelerated:
        rnnfast.accelerate(model)
    options: Any = {"dynamo": False, "input_names": ["input"], "dynamic_axes": {"input": {0: "steps", 1: "batch"}}}
    torch.onnx.export(model, (torch.randn(4, 3, 5),), tmp_path / "model.onnx", **options)
    compare_saved(model, (torch.randn(9, 6, 5),), tmp_path)


def compare(program: Any, model: Any, arguments: Any, folder: Any, **tolerance: float) -> None:
    program.save(folder / "model.onnx")
    compare_saved(model, arguments, folder, **tolerance)


def compare_saved(model: Any, arguments: Any, folder: Any, **tolerance: float) -> None:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [argument.name for argument in session.get_inputs()]
    results = session.run(None, dict(zip(names, (t.numpy() for t in tree_leaves(arguments)), strict=True)))
    with torch.no_grad():
        expected = tree_leaves(model(*arguments))
    torch.testing.assert_close([torch.from_numpy(result) for result in results], expected, **tolerance)


def test_a_changed_recurrence_on_the_reference_is_exported_step_by_step(tmp_path: Any) -> None:
    model = rnnfast.Stack("lstm", 5, [7], layer_norm=True, peepholes=True, backend="reference").eval()
    arguments = (torch.randn(3, 2, 5),)
    compare(exported(model, arguments), model, arguments, tmp_path)
