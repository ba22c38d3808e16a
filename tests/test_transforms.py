"""torch.func, vmap and forward-mode AD over the layers, against loops and against the reference's plain operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import rnnfast
from rnnfast import functional, scan
from rnnfast.backends import reference

Parameters = dict[str, Tensor]
LAYERS = ["RNN", "LSTM", "GRU", "projected LSTM"]
MEMBERS = 3


def build(name: str, bidirectional: bool, backend: str, **options: Any) -> Any:
    if name == "projected LSTM":
        options["proj_size"] = 2
    layer = getattr(rnnfast, name.split()[-1])
    return layer(2, 3, bidirectional=bidirectional, backend=backend, dtype=torch.float64, **options)


def parameters_of(layer: Any) -> Parameters:
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def ensemble_of(parameters: Parameters) -> Parameters:
    return {
        name: torch.stack([p + 0.1 * torch.randn_like(p) for _ in range(MEMBERS)]) for name, p in parameters.items()
    }


def loss_of(layer: Any) -> Callable[[Parameters, Tensor], Tensor]:
    def loss(parameters: Parameters, input: Tensor) -> Tensor:
        output, state = functional_call(layer, parameters, (input,))
        return output.pow(2).sum() + sum(s.sin().sum() for s in tree_leaves(state))

    return loss


def loop(function: Callable[..., Any], in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """What torch.vmap must give."""

    def of(member: int, argument: Any, dim: int | None) -> Any:
        return argument if dim is None else tree_map(lambda t: t[member], argument)

    results = [function(*[of(m, *pair) for pair in zip(arguments, in_dims, strict=True)]) for m in range(MEMBERS)]
    return tree_map(lambda *tensors: torch.stack(tensors), *results)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function with the scan replaced by the reference's operations, which torch transforms by itself."""

    def plain_scan(_: str, input: Tensor, lanes: Any, *others: Any) -> tuple[Tensor, ...]:
        h_0, c_0, batch_sizes, cell, bidirectional = others
        arguments = (input, *scan.stack_lanes(lanes), h_0, c_0, batch_sizes, cell, bidirectional, False)
        return reference.forward(*arguments)[:3]

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(functional, "scan_layer", plain_scan)
            return function()

    return run


def assert_same(actual: Any, expected: Any) -> None:
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    assert len(actual) == len(expected)
    assert any(t.abs().sum() > 0 for t in expected)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("in_dims", [(None, 0), (0, None), (0, 0)], ids=["inputs", "weights", "both"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_vmap(name: str, bidirectional: bool, in_dims: Any, backend: str) -> None:
    layer = build(name, bidirectional, backend, num_layers=2)
    parameters, input = parameters_of(layer), torch.randn(MEMBERS, 5, 4, 2, dtype=torch.float64)
    weights = parameters if in_dims[0] is None else ensemble_of(parameters)
    input = input if in_dims[1] == 0 else input[0]

    def outputs(parameters: Parameters, input: Tensor) -> Any:
        return functional_call(layer, parameters, (input,))

    loss = loss_of(layer)
    for function in (outputs, grad(loss), grad(loss, (0, 1))):
        assert_same(vmap(function, in_dims)(weights, input), loop(function, in_dims, weights, input))

    def summed(mapped: Any) -> Any:
        return grad(lambda weights, input: mapped(loss, in_dims)(weights, input).sum(), (0, 1))(weights, input)

    assert_same(summed(vmap), summed(lambda function, dims: lambda *arguments: loop(function, dims, *arguments)))


@pytest.mark.parametrize("in_dims", [(None, 0), (0, None), (0, 0)], ids=["ids", "weights", "both"])
def test_vmap_token_ids(in_dims: Any, backend: str) -> None:
    layer = build("GRU", True, backend)
    parameters, ids = parameters_of(layer), torch.randint(2, (MEMBERS, 5, 4))
    weights = parameters if in_dims[0] is None else ensemble_of(parameters)
    ids = ids if in_dims[1] == 0 else ids[0]
    function = grad(loss_of(layer))
    assert_same(vmap(function, in_dims)(weights, ids), loop(function, in_dims, weights, ids))
    ids[0] = 2  # of the first member, if it has its own: it must not reach what the second looks up
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)|outside"):
        vmap(function, in_dims)(weights, ids)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_vmap_over_states(name: str, backend: str) -> None:
    layer = build(name, False, backend)
    input, h_0 = torch.randn(5, 4, 2, dtype=torch.float64), torch.randn(MEMBERS, 1, 4, 3, dtype=torch.float64)

    def loss(h_0: Tensor) -> Tensor:
        output, _ = functional_call(layer, parameters_of(layer), (input, (h_0, h_0) if name == "LSTM" else h_0))
        return output.pow(2).sum()

    for function in (loss, grad(loss)):
        assert_same(vmap(function)(h_0), loop(function, (0,), h_0))


@pytest.mark.parametrize("in_dims", [(None, 0), (0, None), (0, 0)], ids=["inputs", "weights", "both"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_vmap_packed(name: str, in_dims: Any, backend: str) -> None:
    layer = build(name, True, backend)
    sizes, data = torch.tensor([3, 3, 1]), torch.randn(MEMBERS, 7, 2, dtype=torch.float64)
    weights = parameters_of(layer) if in_dims[0] is None else ensemble_of(parameters_of(layer))

    def loss(parameters: Parameters, data: Tensor) -> Tensor:
        output, state = functional_call(layer, parameters, (PackedSequence(data, sizes),))
        return output.data.pow(2).sum() + sum(s.sin().sum() for s in tree_leaves(state))

    data = data if in_dims[1] == 0 else data[0]
    function = grad(loss, (0, 1))
    assert_same(vmap(function, in_dims)(weights, data), loop(function, in_dims, weights, data))


def test_vmap_of_half_types_rounds_once(backend: str) -> None:
    layer = rnnfast.LSTM(2, 3, backend=backend, dtype=torch.bfloat16)
    parameters, input = parameters_of(layer), torch.randn(MEMBERS, 5, 4, 2, dtype=torch.bfloat16)
    ensemble, function = ensemble_of(parameters), grad(loss_of(layer), (0, 1))
    for in_dims, weights in (((None, 0), parameters), ((0, 0), ensemble)):
        actual = vmap(function, in_dims)(weights, input)
        expected = loop(function, in_dims, weights, input)
        assert all(t.dtype == torch.bfloat16 for t in tree_leaves(actual))
        torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0)], ids=["both", "inputs"])
def test_vmap_of_half_types_does_not_round_between_products(in_dims: Any, backend: str) -> None:
    """Neither a row's input product, 256.5, nor the gradient of its gate, -256.5, which are 256 in bfloat16."""
    layer = rnnfast.RNN(2, 1, nonlinearity="relu", backend=backend, dtype=torch.bfloat16)
    numbers = {"weight_ih_l0": [[256.0, 0.5]], "weight_hh_l0": [[0.5]], "bias_ih_l0": [-256.0], "bias_hh_l0": [0.0]}
    weights = {name: torch.tensor(value, dtype=torch.bfloat16) for name, value in numbers.items()}
    if in_dims[0] == 0:
        weights = {name: weight.expand(MEMBERS, *weight.shape) for name, weight in weights.items()}
    input = torch.ones(MEMBERS, 2, 2, 2, dtype=torch.bfloat16)  # two steps of two sequences
    d_output = torch.tensor([[-256.0, 256.0], [-1.0, 0.0]], dtype=torch.bfloat16).unsqueeze(2)

    def loss(weights: Parameters, input: Tensor) -> tuple[Tensor, Tensor]:
        output, _ = functional_call(layer, weights, (input,))
        return (output * d_output).sum(), output

    gradients, outputs = vmap(grad(loss, has_aux=True), in_dims)(weights, input)
    expected = torch.tensor([[0.5, 0.5], [0.75, 0.75]], dtype=torch.bfloat16).unsqueeze(2)
    assert torch.equal(outputs, expected.expand(MEMBERS, 2, 2, 1))
    assert gradients["weight_ih_l0"].tolist() == [[[-1.5, -1.5]]] * MEMBERS


def ragged_loss_of(layer: Any) -> Callable[..., Tensor]:
    def loss(parameters: Parameters, input: Tensor, lengths: Tensor, reset: Tensor) -> Tensor:
        output, state = functional_call(layer, parameters, (input,), {"lengths": lengths, "reset": reset})
        return output.pow(2).sum() + sum(s.sin().sum() for s in tree_leaves(state))

    return loss


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_vmap_over_lengths_and_resets_of_a_stack(cell: str, backend: str) -> None:
    stack = rnnfast.Stack(cell, 2, [3], layer_norm=True, zoneout=0.2, backend=backend, dtype=torch.float64).eval()
    input, lengths = torch.randn(MEMBERS, 5, 4, 2, dtype=torch.float64), torch.randint(6, (MEMBERS, 4))
    reset = torch.rand(MEMBERS, 5, 4) < 0.3

    def output(input: Tensor, lengths: Tensor, reset: Tensor) -> Tensor:
        return torch.as_tensor(stack(input, lengths=lengths, reset=reset)[0])

    def loss(*arguments: Tensor) -> Tensor:
        return output(*arguments).pow(2).sum()

    for function in (output, grad(loss)):
        assert_same(vmap(function)(input, lengths, reset), loop(function, (0, 0, 0), input, lengths, reset))


@pytest.mark.parametrize("in_dims", [(None, 0, 0, 0), (0, 0, 0, 0), (None, None, 0, None), (None, 0, None, 0)])
@pytest.mark.parametrize("name", LAYERS)
def test_vmap_over_lengths_and_resets(name: str, in_dims: Any, backend: str) -> None:
    layer = build(name, True, backend, num_layers=2)
    parameters, input = parameters_of(layer), torch.randn(MEMBERS, 5, 4, 2, dtype=torch.float64)
    lengths = torch.tensor([[2, 5, 0, 1], [0, 0, 0, 0], [5, 5, 5, 5]])  # all empty, and all full, among them
    whole = (ensemble_of(parameters), input, lengths, torch.rand(MEMBERS, 5, 4) < 0.3)
    shared = (parameters, *(argument[0] for argument in whole[1:]))
    arguments = [one if dim is None else all_ for one, all_, dim in zip(shared, whole, in_dims, strict=True)]

    def outputs(parameters: Parameters, input: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        return functional_call(layer, parameters, (input,), {"lengths": lengths, "reset": reset})

    loss = ragged_loss_of(layer)
    for function in (outputs, grad(loss), grad(loss, 1)):
        assert_same(vmap(function, in_dims)(*arguments), loop(function, in_dims, *arguments))

    def summed(mapped: Any) -> Any:
        return grad(lambda *arguments: mapped(loss, in_dims)(*arguments).sum(), (0, 1))(*arguments)

    assert_same(summed(vmap), summed(lambda function, dims: lambda *arguments: loop(function, dims, *arguments)))


def test_vmap_over_lengths_of_states_and_token_ids(backend: str) -> None:
    layer, lengths = build("LSTM", False, backend), torch.tensor([[2, 5], [0, 3], [4, 4]])
    ids = torch.randint(2, (MEMBERS, 5, 2))

    def loss(parameters: Parameters, ids: Tensor, lengths: Tensor) -> Tensor:
        class Sum(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self) -> Tensor:
                h, c = layer.states(ids, lengths=lengths)
                return h.sin().sum() + c.pow(2).sum()

        return functional_call(Sum(), {f"layer.{name}": value for name, value in parameters.items()}, ())

    parameters = parameters_of(layer)
    for function in (loss, grad(loss)):
        arguments = (None, 0, 0), parameters, ids, lengths
        assert_same(vmap(function, arguments[0])(*arguments[1:]), loop(function, *arguments))


@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "peepholes": True, "proj_size": 1}])
def test_vmap_over_lengths_of_a_stack(options: Any) -> None:
    stack = rnnfast.Stack("lstm", 2, [3, 2], dtype=torch.float64, **options)
    lengths, input = torch.tensor([[2, 5], [0, 3], [4, 4]]), torch.randn(MEMBERS, 5, 2, 2, dtype=torch.float64)
    arguments = parameters_of(stack), input, lengths, torch.rand(MEMBERS, 5, 2) < 0.3
    in_dims, loss = (None, 0, 0, 0), ragged_loss_of(stack)
    expected = loop(grad(loss), in_dims, *arguments)
    assert_same(vmap(grad(loss), in_dims)(*arguments), expected)
    total = grad(lambda parameters: vmap(loss, in_dims)(parameters, *arguments[1:]).sum())(arguments[0])
    assert_same(total, tree_map(lambda t: t.sum(0), expected))
    of_inputs = grad(lambda input: vmap(loss, in_dims)(arguments[0], input, *arguments[2:]).sum())(input)
    assert_same(of_inputs, loop(grad(loss, 1), in_dims, *arguments))


@pytest.mark.parametrize("in_dims", [(None, 0, 0), (0, None, None), (0, 0, 0)], ids=["inputs", "weights", "both"])
@pytest.mark.parametrize("name", LAYERS)
def test_vmap_over_no_members(name: str, in_dims: Any, backend: str) -> None:
    """As in a step of differentially private training whose Poisson sample came out empty."""
    layer, lengths = build(name, True, backend), torch.tensor([[2, 5, 0, 1]])
    parameters, input = parameters_of(layer), torch.randn(1, 5, 4, 2, dtype=torch.float64)
    whole = ({key: p[None] for key, p in parameters.items()}, input, lengths)
    shared = (parameters, input[0], lengths[0])
    arguments = [one if dim is None else all_ for one, all_, dim in zip(shared, whole, in_dims, strict=True)]
    none = [a if dim is None else tree_map(lambda t: t[:0], a) for a, dim in zip(arguments, in_dims, strict=True)]

    def loss(ragged: bool, parameters: Parameters, input: Tensor, lengths: Tensor) -> Tensor:
        results = functional_call(layer, parameters, (input,), {"lengths": lengths} if ragged else {})
        # torch itself cannot add two numbers over no members.
        return torch.cat([t.flatten() for t in tree_leaves(results[0] if ragged else results)]).square().sum()

    plain, ragged = partial(loss, False), partial(loss, True)
    # Nor has its index_select, with indices of each member's own, a gradient over none: no ragged input's, or state's.
    for function in (plain, grad(plain), grad(plain, 1), ragged, grad(ragged)):
        of_none, of_one = (tree_leaves(vmap(function, in_dims)(*which)) for which in (none, arguments))
        assert [t.shape for t in of_none] == [(0, *t.shape[1:]) for t in of_one]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_vmap_of_a_stack_over_no_members(cell: str, backend: str) -> None:
    stack = rnnfast.Stack(cell, 2, [3, 2], layer_norm=True, backend=backend)
    assert vmap(lambda input: stack(input)[0])(torch.randn(0, 5, 4, 2)).shape == (0, 5, 4, 2)


def test_what_vmap_over_lengths_does_not_do() -> None:
    layer, lengths = build("GRU", False, "auto"), torch.tensor([[2, 5], [0, 3]])
    input = torch.randn(5, 2, 2, dtype=torch.float64)

    def tangent(lengths: Tensor) -> Tensor:
        return jvp(lambda x: layer(x, lengths=lengths)[0], (input,), (input,))[1]

    def penalty_of(lengths: Tensor) -> Tensor:
        return grad(lambda x: grad(lambda x: layer(x, lengths=lengths)[0].sin().sum())(x).pow(2).sum())(input)

    for function in (tangent, penalty_of):
        with pytest.raises(RuntimeError, match="forward-mode and second derivatives take no vmap over lengths"):
            vmap(function)(lengths)
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 5\], the steps of the input, got \[7, 10\]"):
        vmap(lambda lengths: layer(input, lengths=lengths)[0])(lengths + 5)


def test_vmap_over_batch_sizes(backend: str) -> None:
    layer = build("GRU", False, backend)
    data, sizes = torch.randn(7, 2, dtype=torch.float64), torch.tensor([[3, 3, 1], [3, 2, 2], [3, 3, 1]])
    actual = vmap(lambda sizes: scan_of(layer, data, sizes))(sizes)
    torch.testing.assert_close(actual, torch.stack([scan_of(layer, data, own) for own in sizes]))


def scan_of(layer: Any, data: Tensor, sizes: Tensor) -> Tensor:
    h_0 = torch.zeros(1, 3, 3, dtype=torch.float64)
    return scan.scan_layer(layer.backend, data, functional.lane_weights(layer), h_0, None, sizes, "gru", False)[0]


def penalty(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: grad(loss, 1)(*arguments).pow(2).sum()


def norm(gradients: Parameters) -> Tensor:
    return sum((g.pow(2).sum() for g in gradients.values()), torch.zeros(()))


COMPOSITIONS: dict[str, Callable[..., Any]] = {
    "jvp": lambda loss, p, e, x, xs: jvp(lambda p: loss(p, x), (p,), (tree_map(torch.ones_like, p),)),
    "vjp": lambda loss, p, e, x, xs: vjp(lambda p: loss(p, x), p)[1](torch.ones((), dtype=torch.float64)),
    "jacrev": lambda loss, p, e, x, xs: jacrev(grad(loss, 1), 1)(p, x),
    "jacfwd": lambda loss, p, e, x, xs: jacfwd(loss, 1)(p, x),
    "hessian": lambda loss, p, e, x, xs: hessian(loss, 1)(p, x),
    "reverse over reverse": lambda loss, p, e, x, xs: jacrev(jacrev(loss))(p, x)["weight_ih_l0"],
    "reverse over forward": lambda loss, p, e, x, xs: jacrev(jacfwd(loss, 1), 1)(p, x),
    "gradient penalty": lambda loss, p, e, x, xs: grad(penalty(loss), (0, 1))(p, x),
    "penalty a sample": lambda loss, p, e, x, xs: vmap(grad(penalty(loss), (0, 1)), (None, 0))(p, xs),
    "penalty a member": lambda loss, p, e, x, xs: vmap(grad(penalty(loss), (0, 1)), (0, None))(e, x),
    "penalty of both": lambda loss, p, e, x, xs: vmap(grad(penalty(loss), (0, 1)))(e, xs),
    "through per-sample": lambda loss, p, e, x, xs: grad(lambda p: norm(vmap(grad(loss), (None, 0))(p, xs)))(p),
    "through an ensemble": lambda loss, p, e, x, xs: grad(lambda e: norm(vmap(grad(loss), (0, None))(e, x)))(e),
    "vmap of vmap": lambda loss, p, e, x, xs: grad(lambda e: norm(vmap(vmap(grad(loss), (None, 0)), (0, None))(e, xs)))(
        e
    ),
    "third derivative": lambda loss, p, e, x, xs: grad(lambda p: norm(grad(penalty(loss))(p, x)))(p),
}


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize(("name", "bidirectional"), [("RNN", True), ("LSTM", False), ("GRU", True), (LAYERS[3], True)])
def test_compositions(name: str, bidirectional: bool, composition: str, backend: str, plain: Any) -> None:
    layer = build(name, bidirectional, backend)
    parameters = parameters_of(layer)
    inputs = torch.randn(MEMBERS, 3, 2, 2, dtype=torch.float64)
    arguments = (loss_of(layer), parameters, ensemble_of(parameters), inputs[0], inputs)
    function = COMPOSITIONS[composition]
    assert_same(function(*arguments), plain(lambda: function(*arguments)))


@pytest.mark.parametrize("name", LAYERS)
def test_dual_numbers(name: str, backend: str, plain: Any) -> None:
    layer = build(name, True, backend).requires_grad_(False)
    input, tangent = torch.randn(2, 3, 2, 2, dtype=torch.float64)

    def dual() -> Any:
        with forward_ad.dual_level():
            return [forward_ad.unpack_dual(t) for t in tree_leaves(layer(forward_ad.make_dual(input, tangent)))]

    assert_same(dual(), plain(dual))


def test_penalty_in_eager_autograd(backend: str, plain: Any) -> None:
    """create_graph=True: the first gradient by the backend, its derivative by the reference."""
    layer = build("LSTM", True, backend)
    input = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(layer(input)[0].pow(2).sum(), input, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), [input, *layer.parameters()])

    assert_same(gradients(), plain(gradients))


@pytest.mark.parametrize("in_dims", [(None, 0, None), (None, 0, 0), (0, 0, None), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_through_vmap(name: str, in_dims: tuple[int | None, ...], backend: str) -> None:
    """That they are wanted shows only below vmap: what it is given does not say so."""
    layer = build(name, False, backend)
    own = (
        ensemble_of(parameters_of(layer)),
        torch.randn(MEMBERS, 4, 2, 2).double(),
        torch.tensor([[4, 1], [2, 3], [0, 4]]),
    )

    def member(m: int) -> Any:
        return tree_map(lambda tensor: tensor[m], own)

    def loss(parameters: Parameters, input: Tensor, lengths: Tensor) -> Tensor:
        result: Tensor = functional_call(layer, parameters, (input,), {"lengths": lengths})[0].square().sum()
        return result

    given = [mine if dim == 0 else first for mine, first, dim in zip(own, member(0), in_dims, strict=True)]
    members = [
        [mine if dim == 0 else first for mine, first, dim in zip(member(m), member(0), in_dims, strict=True)]
        for m in range(MEMBERS)
    ]
    actual = grad(lambda input: vmap(loss, in_dims)(given[0], input, given[2]).sum())(given[1])
    torch.testing.assert_close(actual, torch.stack([grad(loss, 1)(*each) for each in members]))


@pytest.mark.parametrize("name", ["reference", "cpu", "torch"])
def test_backward_in_eval_mode(name: str) -> None:
    layer, input = rnnfast.LSTM(2, 3, num_layers=2, dropout=0.5, backend=name).eval(), torch.randn(4, 2, 2)
    output = layer(input)[0]
    torch.testing.assert_close(output, layer(input)[0])
    gradients = torch.autograd.grad(output.sum(), list(layer.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_a_transform_leaves_nothing_in_the_module(backend: str) -> None:
    layer = build("LSTM", False, backend)
    before = list(layer._flat_weights)
    vmap(grad(loss_of(layer)), (None, 0))(parameters_of(layer), torch.randn(MEMBERS, 3, 2, 2, dtype=torch.float64))
    assert all(a is b for a, b in zip(layer._flat_weights, before, strict=True))


def test_explain_tells_what_runs_elsewhere() -> None:
    input = torch.randn(4, 2, 2)
    text = str(rnnfast.explain(rnnfast.LSTM(2, 3, backend="cpu"), input))
    assert "second and higher derivatives: reference" in text
    assert "forward-mode derivatives: reference" in text
    assert "refused" in str(rnnfast.explain(rnnfast.LSTM(2, 3, backend="torch"), input))
    half = rnnfast.explain(rnnfast.LSTM(2, 3, dtype=torch.float16), input.half())
    assert half.backend == "torch"
    assert half.elsewhere == (
        ("gradients under torch.compile", "torch, which runs forward once more"),
        ("torch.func and forward-mode AD", "reference"),
        ("states() with gradients", "reference"),
    )


def test_transforms_pass_over_torch() -> None:
    """float16 on a CPU runs on torch.nn's kernels, which have no vmap."""
    layer = rnnfast.GRU(2, 3, dtype=torch.float16)
    input = torch.randn(MEMBERS, 3, 2, 2, dtype=torch.float16)
    function = grad(loss_of(layer))
    expected = loop(function, (None, 0), parameters_of(layer), input)
    actual = vmap(function, (None, 0))(parameters_of(layer), input)
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected), rtol=2**-7, atol=2**-7)
    layer.backend = "torch"
    with pytest.raises(RuntimeError, match="no vmap"):
        vmap(function, (None, 0))(parameters_of(layer), input)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_of_another_dtype(name: str, form: str) -> None:
    """functional_call may give a float32 layer the weights of a float64 one."""
    layer = build(name, False, "auto")
    given, x = parameters_of(layer), torch.randn(4, 2, 2, dtype=torch.float64)
    input = x if form == "padded" else PackedSequence(x.flatten(0, 1), torch.full((4,), 2))

    def loss(parameters: Parameters) -> Tensor:
        output, _ = functional_call(layer, parameters, (input,))
        return (output if form == "padded" else output.data).pow(2).sum()

    expected = grad(loss)(given)
    layer.float()
    torch.testing.assert_close(grad(loss)(given), expected, rtol=0, atol=0)
    ensemble = {weight: torch.stack([value] * MEMBERS) for weight, value in given.items()}
    torch.testing.assert_close(vmap(loss)(ensemble), loss(given).expand(MEMBERS))
    with pytest.raises((ValueError, RuntimeError), match="dtype"):
        grad(loss)(parameters_of(layer))


@pytest.mark.parametrize("name", LAYERS)
def test_eager_autograd_through_two_vmaps(name: str, backend: str, plain: Any) -> None:
    """Behind the outer one what the inner one is given does not say that a gradient is wanted."""
    layer = build(name, False, backend)
    members = ensemble_of(parameters_of(layer))
    leaves = [parameter.requires_grad_() for parameter in members.values()]
    inputs = torch.randn(MEMBERS, 3, 2, 2, dtype=torch.float64)
    per_sample = vmap(vmap(grad(loss_of(layer)), (None, 0)), (0, None))

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(norm(per_sample(members, inputs)), leaves)

    assert_same(gradients(), plain(gradients))
