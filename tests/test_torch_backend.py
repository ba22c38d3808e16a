"""torch.nn's own path as a backend: its operator, token ids, and what a compiled layer takes on a GPU without a table.

The operator calls the same functions on every device; here they are ATen's and oneDNN's, on a GPU cuDNN's.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves

import rnnfast
from rnnfast import dispatch, table
from rnnfast.cells import CELLS
from rnnfast.dispatch import Request, Size
from tests.test_compile import CASES, Graphs, Model, outputs_and_gradients
from tests.test_scan import VARIANTS, arguments, backward_arguments, detached, operator

# torch's own, raised by its compiler.
pytestmark = [
    pytest.mark.usefixtures("reset_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
]


@pytest.mark.parametrize(("cell", "bidirectional", "ragged", "token_ids"), VARIANTS)
def test_the_operator_gives_what_the_reference_gives(
    cell: str, bidirectional: bool, ragged: bool, token_ids: bool
) -> None:
    values = arguments(cell, bidirectional, ragged, token_ids, projected=2 if cell == "lstm" and ragged else 0)
    expected = operator("reference")(*detached(values).values())
    results = operator("torch")(*detached(values).values())
    torch.testing.assert_close(results[:3], expected[:3])
    assert results[3].shape == (*expected[3].shape[:2], 0)
    expected = operator("reference", backward=True)(*(inputs := backward_arguments(values, *expected)))
    inputs[-3] = results[3]
    torch.testing.assert_close(operator("torch", backward=True)(*inputs), expected)
    inputs[1:3] = None, None
    inputs[-2:] = False, False
    unneeded = operator("torch", backward=True)(*inputs)
    assert [r.numel() > 0 for r in unneeded] == [*[False] * 6, True, cell == "lstm"]


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str) -> None:
    values = arguments(cell, True, False, False)
    torch.library.opcheck(operator("torch"), tuple(values.values()))
    results = operator("torch")(*detached(values).values())
    torch.library.opcheck(operator("torch", backward=True), tuple(backward_arguments(values, *results)))


def test_lanes_that_are_no_directions_and_no_rows() -> None:
    values = detached(arguments("lstm", True, False, False)) | {"bidirectional": False}
    torch.testing.assert_close(operator("torch")(*values.values())[:3], operator("reference")(*values.values())[:3])
    values["input"] = values["input"][:0]
    output, h_n, _, tape = operator("torch")(*values.values())
    assert (output.shape, tape.shape) == ((0, 8), (2, 0, 0))
    gradients = operator("torch", backward=True)(None, h_n, None, *list(values.values())[:-1], output, tape, True, True)
    assert torch.equal(gradients[6], h_n)
    assert gradients[6].data_ptr() != h_n.data_ptr()  # an operator's results share no memory with what it is given
    assert not any(gradient.any() for i, gradient in enumerate(gradients) if i != 6)


def test_a_second_derivative_is_the_references() -> None:
    values = arguments("gru", False, False, False)
    names = [name for name, value in values.items() if isinstance(value, Tensor)]

    def second(backend: str) -> tuple[Tensor, ...]:
        leaves = [values[name] for name in names]
        output = operator(backend)(*values.values())[0]
        (first,) = torch.autograd.grad(output.square().sum(), values["input"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves)

    torch.testing.assert_close(second("torch"), second("reference"))


@pytest.mark.parametrize("vocabulary", [3, 40])  # one-hot rows; the looked-up products
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_token_ids(name: str, vocabulary: int) -> None:
    layer, ids = (
        getattr(rnnfast, name)(vocabulary, 5, 2, bidirectional=True).double(),
        torch.randint(vocabulary, (4, 3)),
    )

    def run(backend: str) -> list[Tensor]:
        layer.backend = backend
        outputs = tree_leaves(layer(ids))
        return [*outputs, *torch.autograd.grad(sum(out.pow(2).sum() for out in outputs), list(layer.parameters()))]

    torch.testing.assert_close(run("torch"), run("reference"))
    cell = getattr(rnnfast, f"{name}Cell")(vocabulary, 5, backend="torch")
    expected = getattr(rnnfast, f"{name}Cell")(vocabulary, 5, backend="reference")
    expected.load_state_dict(cell.state_dict())
    torch.testing.assert_close(cell(ids[0]), expected(ids[0]))


@pytest.mark.parametrize("case", ["LSTM, bidirectional", "LSTM, projected", "GRU, token ids"])
def test_in_a_compiled_graph_it_is_one_operator_a_layer(case: str) -> None:
    make_layer, make_arguments = CASES[case]
    layer = make_layer()
    layer.backend = "torch"
    model, graphs = Model(layer), Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for steps, batch in ((4, 3), (9, 5)):
        arguments = make_arguments(steps, batch)
        expected = outputs_and_gradients(model, list(model.parameters()), arguments)
        torch.testing.assert_close(outputs_and_gradients(compiled, list(model.parameters()), arguments), expected)
    assert graphs.operators() == ["rnnfast::scan_torch"] * layer.num_layers


def test_it_is_exported_and_compiled_by_inductor() -> None:
    model, input = Model(rnnfast.GRU(5, 7, backend="torch")), torch.randn(4, 3, 5)
    expected = outputs_and_gradients(model, list(model.parameters()), (input,))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(outputs_and_gradients(compiled, list(model.parameters()), (input,)), expected)
    sizes = {0: Dim("steps", min=1, max=4096), 1: Dim("rows", min=1, max=4096)}
    program = export(model, (input,), dynamic_shapes=((sizes,),))
    assert "rnnfast.scan_torch.default" in [str(node.target) for node in program.graph.nodes]
    torch.testing.assert_close(tree_leaves(program.module()(input[:2])), tree_leaves(model(input[:2])))


def test_a_transform_within_a_compiled_graph_passes_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no rule for vmap."""
    monkeypatch.setitem(dispatch._AUTO, "cpu", ("torch", "reference"))
    layer, graphs = rnnfast.RNN(5, 7), Graphs()
    input = torch.randn(6, 4, 3, 5)
    torch.compile(lambda x: layer(x)[0], fullgraph=True, backend=graphs)(input[0])
    compiled = torch.compile(torch.vmap(lambda x: layer(x)[0]), fullgraph=True, backend=graphs)
    torch.testing.assert_close(compiled(input), torch.stack([layer(x)[0] for x in input]))
    assert graphs.operators() == ["rnnfast::scan_torch", "rnnfast::scan_reference"]


# On a GPU


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("size", [None, Size(0, 512, 32, 35, True)])
def test_without_a_table_a_gpu_has_torchs_path(
    monkeypatch: pytest.MonkeyPatch, size: Size | None, token_ids: bool
) -> None:
    monkeypatch.setattr(table, "of", lambda device: table.Found(None, "nothing has been measured"))
    request = Request("lstm", "cuda", torch.float32, token_ids, False, size=size)
    assert dispatch.choose(request).backend == "torch"
    assert dispatch.choose(request._replace(transformed=True)).backend == "reference"


def test_a_graph_goes_by_the_sizes_it_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the GPU's place: by usual sizes only where a size is not known."""
    asked: list[Any] = []
    original = dispatch.choose

    def choose(request: Request, backend: str = dispatch.AUTO) -> Any:
        asked.append(request.size)
        return original(request._replace(size=None), backend)

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(dispatch, "TABLED", ("cpu",))
    layer = rnnfast.LSTM(4, 6, bidirectional=True, backend="reference")
    with torch.no_grad():
        for dynamic in (False, None, True):
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
            for steps, rows in ((5, 3), (7, 3)):
                compiled(torch.randn(steps, rows, 4))
            compiled(torch.randn(7, 9, 4))
    sizes = [(size.rows, size.steps) for size, _ in itertools.groupby(asked)]
    assert sizes == [(6, 5), (6, 7), (18, 7), (6, 5), (6, 128), (32, 128)]
