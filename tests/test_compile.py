"""torch.compile and torch.export of models that hold the layers: one operator a layer, whatever T and B."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import rnnfast
from rnnfast.backends import native

# torch's own, raised by its compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Model(nn.Module):
    """A layer and a head, as users have them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear((layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional), 3)

    def forward(self, *arguments: Any) -> Any:
        assert isinstance(self.layer, nn.RNN | nn.LSTM | nn.GRU)
        output, state = self.layer(*arguments)
        return self.head(output), state


class Graphs:
    """A compiler that keeps the graphs it is given, and hands them to AOTAutograd."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, module: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs.append(module.graph)
        return aot_eager(module, inputs)

    def operators(self) -> list[str]:
        return [
            node.target._schema.name for graph in self.graphs for node in graph.nodes if "rnnfast" in str(node.target)
        ]


@pytest.fixture(autouse=True)
def _reset() -> Any:
    yield
    torch._dynamo.reset()


def outputs_and_gradients(model: Any, parameters: list[Tensor], arguments: Any) -> list[Tensor]:
    torch.manual_seed(0)
    outputs = tree_leaves(model(*arguments))
    return [*outputs, *torch.autograd.grad(sum(out.pow(2).sum() for out in outputs), parameters)]


CASES = {
    "RNN": (lambda: rnnfast.RNN(5, 7, nonlinearity="relu"), lambda t, b: (torch.randn(t, b, 5),)),
    "GRU, batch first": (lambda: rnnfast.GRU(5, 7, batch_first=True), lambda t, b: (torch.randn(b, t, 5),)),
    "LSTM, bidirectional": (
        lambda: rnnfast.LSTM(5, 7, num_layers=2, bidirectional=True),
        lambda t, b: (torch.randn(t, b, 5),),
    ),
    "LSTM, projected": (lambda: rnnfast.LSTM(5, 7, proj_size=3), lambda t, b: (torch.randn(t, b, 5),)),
    "GRU, token ids": (lambda: rnnfast.GRU(5, 7), lambda t, b: (torch.randint(5, (t, b)),)),
    "GRU, unbatched": (lambda: rnnfast.GRU(5, 7), lambda t, b: (torch.randn(t * b, 5),)),
    "LSTM, state": (
        lambda: rnnfast.LSTM(5, 7),
        lambda t, b: (torch.randn(t, b, 5), (torch.randn(1, b, 7), torch.randn(1, b, 7))),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_fullgraph_with_dynamic_sizes(case: str, backend: str) -> None:
    make_layer, make_arguments = CASES[case]
    layer = make_layer()
    layer.backend = backend
    model, graphs = Model(layer), Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for steps, batch in ((4, 3), (40, 6), (9, 5)):
        arguments = make_arguments(steps, batch)
        expected = outputs_and_gradients(model, list(model.parameters()), arguments)
        torch.testing.assert_close(outputs_and_gradients(compiled, list(model.parameters()), arguments), expected)
    assert graphs.operators() == [f"rnnfast::scan_{backend}"] * layer.num_layers
    # Dynamo traces a model with a float attribute (dropout) twice and leaves its first graph empty.
    assert sum(bool(len(graph.nodes)) for graph in graphs.graphs) == 1


def test_dropout_in_a_graph() -> None:
    model = Model(rnnfast.LSTM(5, 7, num_layers=3, dropout=0.5))
    compiled, input = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(4, 3, 5)
    expected = outputs_and_gradients(model, list(model.parameters()), (input,))
    torch.testing.assert_close(outputs_and_gradients(compiled, list(model.parameters()), (input,)), expected)


def test_packed_sequence_in_a_graph(backend: str) -> None:
    layer = rnnfast.LSTM(5, 7, bidirectional=True, backend=backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ([3, 2, 1], [4, 4, 4, 1]):
        packed = PackedSequence(torch.randn(sum(sizes), 5), torch.tensor(sizes))
        torch.testing.assert_close(tree_leaves(compiled(packed)), tree_leaves(layer(packed)))


def test_inductor() -> None:
    model, input = Model(rnnfast.GRU(5, 7)), torch.randn(4, 3, 5)
    expected = outputs_and_gradients(model, list(model.parameters()), (input,))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(outputs_and_gradients(compiled, list(model.parameters()), (input,)), expected)


def test_inference_and_step_and_autocast_in_a_graph() -> None:
    layer, input = rnnfast.LSTM(5, 7), torch.randn(4, 3, 5)
    step = torch.compile(lambda x, state=None: layer.step(x, state), fullgraph=True, backend="aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(tree_leaves(compiled(input)), tree_leaves(layer(input)), rtol=0, atol=0)
        torch.testing.assert_close(tree_leaves(step(input[0])), tree_leaves(layer.step(input[0])))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compiled(input)[0]
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, layer(input)[0])


def test_per_sample_gradients_in_a_graph(backend: str) -> None:
    layer = rnnfast.GRU(5, 7, backend=backend)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], input: Tensor) -> Tensor:
        return functional_call(layer, parameters, (input,))[0].pow(2).sum()

    function, input = vmap(grad(loss), (None, 0)), torch.randn(6, 4, 1, 5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(parameters, input), function(parameters, input))


def test_subclasses_are_traced_and_torchs_own_layers_left_alone() -> None:
    class Mine(rnnfast.LSTM):
        pass

    model, input = Model(Mine(5, 7)), torch.randn(4, 3, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tree_leaves(compiled(input)), tree_leaves(model(input)))
    assert torch._dynamo.config.allow_rnn is False
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(Model(nn.LSTM(5, 7)), fullgraph=True, backend="aot_eager")(input)


def test_dynamo_imported_before_us() -> None:
    program = """
import torch, torch._dynamo, rnnfast
layer = rnnfast.GRU(2, 3, backend="reference")
torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(4, 1, 2))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_dynamo_is_not_imported_by_us() -> None:
    program = "import rnnfast, sys; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", ["GRU, batch first", "LSTM, bidirectional", "GRU, token ids"])
def test_export_with_dynamic_sizes(case: str, strict: bool, backend: str, tmp_path: Any) -> None:
    make_layer, make_arguments = CASES[case]
    layer = make_layer()
    layer.backend = backend
    model = Model(layer).eval()
    sizes = {0: Dim("first", min=1, max=4096), 1: Dim("second", min=1, max=4096)}
    program = export(model, make_arguments(4, 3), dynamic_shapes=((sizes,),), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if "rnnfast" in str(node.target)]
    assert called == [f"rnnfast.scan_{backend}.default"] * layer.num_layers
    torch.export.save(program, tmp_path / "model.pt2")
    loaded, arguments = torch.export.load(tmp_path / "model.pt2").module(), make_arguments(9, 6)
    torch.testing.assert_close(tree_leaves(loaded(*arguments)), tree_leaves(model(*arguments)))


def test_aot_inductor(tmp_path: Any) -> None:
    model = Model(rnnfast.LSTM(5, 7)).eval()
    sizes = {0: Dim("steps", min=1, max=4096), 1: Dim("batch", min=1, max=4096)}
    with torch.no_grad():
        program = export(model, (torch.randn(4, 3, 5),), dynamic_shapes=((sizes,),))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled, input = torch._inductor.aoti_load_package(path), torch.randn(9, 6, 5)
        torch.testing.assert_close(tree_leaves(compiled(input)), tree_leaves(model(input)))


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_a_stack_with_an_extended_recurrence_is_one_operator_a_layer() -> None:
    stack = rnnfast.Stack("gru", 5, [7, 6], layer_norm=True, zoneout=0.2, recurrent_dropout=0.3, dropout=0.2)
    graphs = Graphs()
    compiled = torch.compile(stack, fullgraph=True, dynamic=True, backend=graphs)
    for steps, batch in ((6, 3), (9, 4)):
        arguments = (torch.randn(steps, batch, 5),)
        found, expected = (outputs_and_gradients(f, list(stack.parameters()), arguments) for f in (compiled, stack))
        torch.testing.assert_close(found, expected)
    assert graphs.operators() == ["rnnfast::scan_extended_cpu"] * 2
