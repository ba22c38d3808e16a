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

# torch's own, raised by its compiler.
pytestmark = [
    pytest.mark.usefixtures("reset_dynamo"),
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


class Ragged(nn.Module):
    """A layer that is called with lengths and resets."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor, hx: Any, lengths: Tensor, reset: Tensor, reset_to: Any) -> Any:
        return self.layer(input, hx, lengths=lengths, reset=reset, reset_to=reset_to)


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
        hx = torch.randn(2, sizes[0], 7), torch.randn(2, sizes[0], 7)
        torch.testing.assert_close(tree_leaves(compiled(packed, hx)), tree_leaves(layer(packed, hx)))


def ragged(layer: Any, steps: int, lengths: list[int], rate: float = 0.3) -> tuple[Any, ...]:
    """Arguments of `Ragged`."""
    batch, lanes = len(lengths), layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.hidden_size] * (2 if layer.mode == "LSTM" else 1)
    states = [tuple(torch.randn(lanes, b, size, requires_grad=True) for size in sizes) for b in (batch, 1)]
    hx, reset_to = states if layer.mode == "LSTM" else [state for (state,) in states]
    input = torch.randn(steps, batch, layer.input_size, requires_grad=True)
    return input, hx, torch.tensor(lengths), torch.rand(steps, batch) < rate, reset_to


# Among them every sequence empty, one row in all, resets everywhere and nowhere.
LENGTHS = [(8, [2, 8, 4], 0.3), (9, [9, 0], 0.5), (9, [0, 0], 0.3), (3, [1, 0], 1.0), (7, [1, 7, 7, 3], 0.0)]


@pytest.mark.parametrize(("name", "options"), [("LSTM", {"num_layers": 2}), ("GRU", {"bidirectional": True})])
def test_lengths_and_resets_in_a_graph(name: str, options: Any, backend: str) -> None:
    layer = getattr(rnnfast, name)(5, 7, backend=backend, **options)
    model, graphs = Ragged(layer), Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for steps, lengths, rate in LENGTHS:
        arguments = ragged(layer, steps, lengths, rate)
        leaves = [*(t for t in tree_leaves(arguments) if t.requires_grad), *model.parameters()]
        results = []
        for function in (model, compiled):
            outputs = tree_leaves(function(*arguments))
            loss = sum(out.square().sum() for out in outputs)
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
            results.append([*outputs, *gradients])
        torch.testing.assert_close(results[1], results[0])
    assert graphs.operators() == ["rnnfast::cut"] + [f"rnnfast::scan_{backend}"] * layer.num_layers


def test_lengths_and_resets_where_the_graph_breaks() -> None:
    """Without fullgraph Dynamo breaks the graph at the plan, which then runs as it does outside of graphs."""
    model = Ragged(rnnfast.GRU(5, 7))
    compiled = torch.compile(model, backend="aot_eager")
    for steps, lengths, rate in LENGTHS[:2]:
        arguments = ragged(model.layer, steps, lengths, rate)
        expected = outputs_and_gradients(model, list(model.parameters()), arguments)
        torch.testing.assert_close(outputs_and_gradients(compiled, list(model.parameters()), arguments), expected)


def test_lengths_in_a_graph_come_in_many_forms() -> None:
    layer, ids = rnnfast.GRU(5, 7, batch_first=True), torch.randint(5, (3, 6))
    ids[0, 2:] = -1  # padding
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in (torch.tensor([2, 6, 1]), torch.tensor([2, 5, 0], dtype=torch.uint8), [1, 2, 3]):
        torch.testing.assert_close(compiled(ids, lengths=lengths), layer(ids, lengths=lengths), rtol=0, atol=0)
    input, reset = torch.randn(6, 5), torch.rand(6) < 0.5  # unbatched
    torch.testing.assert_close(compiled(input, reset=reset), layer(input, reset=reset), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 6\], the steps of the input, got \[7, 1, 1\]"):
        compiled(ids, lengths=torch.tensor([7, 1, 1]))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="lengths must be integers"):
        compiled(ids, lengths=torch.ones(3))


def test_the_plan_is_an_operator() -> None:
    for reset in (None, torch.rand(6, 3) < 0.5):
        arguments = (torch.tensor([2, 6, 1]), reset, 6, 3, torch.device("cpu"))
        torch.library.opcheck(torch.ops.rnnfast.cut.default, arguments)


def test_inductor_of_lengths() -> None:
    model = Ragged(rnnfast.GRU(5, 7))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for steps, lengths, rate in LENGTHS[:3]:
        arguments = ragged(model.layer, steps, lengths, rate)
        expected = outputs_and_gradients(model, list(model.parameters()), arguments)
        torch.testing.assert_close(outputs_and_gradients(compiled, list(model.parameters()), arguments), expected)


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


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_cell_in_a_loop_in_a_graph(name: str, backend: str) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(rnnfast, name)(5, 7, backend=backend)

        def forward(self, input: Tensor, state: Any = None) -> Any:
            for x in input:
                state = self.cell(x, state)
            return state

    model, graphs = Loop(), Graphs()
    compiled, input = torch.compile(model, fullgraph=True, backend=graphs), torch.randn(3, 2, 5)
    with torch.no_grad():
        state = model(input)
    for arguments in ((input,), (torch.randint(5, (3, 2)),), (input, state)):
        expected = outputs_and_gradients(model, list(model.parameters()), arguments)
        torch.testing.assert_close(outputs_and_gradients(compiled, list(model.parameters()), arguments), expected)
    assert set(graphs.operators()) == {f"rnnfast::scan_{backend}"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(input), model(input))


def test_per_sample_gradients_in_a_graph(backend: str) -> None:
    layer = rnnfast.GRU(5, 7, backend=backend)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], input: Tensor) -> Tensor:
        return functional_call(layer, parameters, (input,))[0].pow(2).sum()

    function, input = vmap(grad(loss), (None, 0)), torch.randn(6, 4, 1, 5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(parameters, input), function(parameters, input))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
@pytest.mark.parametrize("hidden_size", [8, 200], ids=["small", "kept"])  # of the latter the library has the memory
@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_compiled_autograd_of_an_eager_layer(name: str, hidden_size: int) -> None:
    layer = getattr(rnnfast, name)(4, hidden_size)

    def gradients(x: Tensor) -> list[Tensor]:
        layer.zero_grad()
        layer(x)[0].square().sum().backward()
        return [parameter.grad.clone() for parameter in layer.parameters()]

    for batch in (2, 2, 3):
        x = torch.randn(5, batch, 4)
        expected = gradients(x)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            torch.testing.assert_close(gradients(x), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_autograd_of_an_eager_loop_of_cells() -> None:
    cell, steps = rnnfast.LSTMCell(4, 8), torch.randn(5, 2, 4)

    def gradients() -> list[Tensor]:
        cell.zero_grad()
        state = None
        for step in steps:
            state = cell(step, state)
        state[0].square().sum().backward()
        return [parameter.grad.clone() for parameter in cell.parameters()]

    for _ in range(2):
        expected = gradients()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            torch.testing.assert_close(gradients(), expected)


def test_subclasses_are_traced_and_torchs_own_layers_left_alone() -> None:
    class Mine(rnnfast.LSTM):
        pass

    model, input = Model(Mine(5, 7)), torch.randn(4, 3, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tree_leaves(compiled(input)), tree_leaves(model(input)))
    assert torch._dynamo.config.allow_rnn is False
    with pytest.raises(torch._dynamo.exc.Unsupported):
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


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_lengths_and_resets(strict: bool, backend: str) -> None:
    model = Ragged(rnnfast.LSTM(5, 7, num_layers=2, backend=backend)).eval()
    steps, batch = Dim("steps", min=1, max=4096), Dim("batch", min=1, max=4096)
    sizes, states = {0: steps, 1: batch}, ({1: batch}, {1: batch})
    dynamic = (sizes, states, {0: batch}, sizes, ({}, {}))
    with torch.no_grad():
        program = export(model, ragged(model.layer, 6, [2, 6, 3]), dynamic_shapes=dynamic, strict=strict)
        for steps_, lengths, rate in LENGTHS:
            arguments = ragged(model.layer, steps_, lengths, rate)
            torch.testing.assert_close(tree_leaves(program.module()(*arguments)), tree_leaves(model(*arguments)))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_packed_sequence(strict: bool) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnfast.GRU(5, 7)

        def forward(self, data: Tensor, batch_sizes: Tensor) -> Tensor:
            output, _ = self.layer(PackedSequence(data, batch_sizes))
            return output.data

    model, sizes = Packed().eval(), ({0: Dim("rows", min=1, max=4096)}, {0: Dim("steps", min=1, max=4096)})
    program = export(model, (torch.randn(6, 5), torch.tensor([3, 2, 1])), dynamic_shapes=sizes, strict=strict)
    arguments = torch.randn(9, 5), torch.tensor([4, 4, 1])
    torch.testing.assert_close(program.module()(*arguments), model(*arguments))


def test_aot_inductor(tmp_path: Any) -> None:
    model = Ragged(rnnfast.LSTM(5, 7)).eval()
    steps, batch = Dim("steps", min=1, max=4096), Dim("batch", min=1, max=4096)
    dynamic = ({0: steps, 1: batch}, ({1: batch}, {1: batch}), {0: batch}, {0: steps, 1: batch}, ({}, {}))
    with torch.no_grad():
        program = export(model, ragged(model.layer, 6, [2, 6, 3]), dynamic_shapes=dynamic)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for case in LENGTHS:
            arguments = ragged(model.layer, *case)
            torch.testing.assert_close(tree_leaves(compiled(*arguments)), tree_leaves(model(*arguments)))


def test_aot_inductor_of_an_accelerated_model(tmp_path: Any) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower = nn.LSTM(5, 7, bidirectional=True, batch_first=True)
            self.upper = nn.GRU(14, 6, batch_first=True)
            self.cell = nn.LSTMCell(6, 4)

        def forward(self, input: Tensor) -> Tensor:
            output, _ = self.upper(self.lower(input)[0])
            state = None
            for t in range(2):
                state = self.cell(output[:, t], state)
            assert state is not None
            return state[0]

    model = Tagger().eval()
    rnnfast.accelerate(model)
    sizes = {0: Dim("batch", min=2, max=4096), 1: Dim("steps", min=2, max=4096)}
    with torch.no_grad():
        program = export(model, (torch.randn(3, 6, 5),), dynamic_shapes=(sizes,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for shape in ((3, 6, 5), (8, 11, 5)):
            input = torch.randn(shape)
            torch.testing.assert_close(compiled(input), model(input))


@pytest.mark.parametrize(
    ("cell", "options"), [("gru", {"layer_norm": True, "dropout": 0.2}), ("lstm", {"proj_size": 4})]
)
def test_a_stack_with_an_extended_recurrence_is_one_operator_a_layer(cell: str, options: Any, backend: str) -> None:
    stack = rnnfast.Stack(cell, 5, [7, 6], zoneout=0.2, recurrent_dropout=0.3, backend=backend, **options)
    graphs = Graphs()
    compiled = torch.compile(stack, fullgraph=True, dynamic=True, backend=graphs)
    for steps, batch in ((6, 3), (9, 4)):
        arguments = (torch.randn(steps, batch, 5),)
        found, expected = (outputs_and_gradients(f, list(stack.parameters()), arguments) for f in (compiled, stack))
        torch.testing.assert_close(found, expected)
    assert graphs.operators() == [f"rnnfast::scan_extended_{backend}"] * 2


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_stack_with_an_extended_recurrence(strict: bool, backend: str) -> None:
    stack = rnnfast.Stack("lstm", 5, [7, 6], layer_norm=True, peepholes=True, zoneout=0.2, backend=backend).eval()
    sizes = {0: Dim("steps", min=2, max=4096), 1: Dim("batch", min=2, max=4096)}
    program = export(stack, (torch.randn(6, 3, 5),), dynamic_shapes={"input": sizes}, strict=strict)
    input = torch.randn(9, 4, 5)
    torch.testing.assert_close(tree_leaves(program.module()(input)), tree_leaves(stack(input)))
