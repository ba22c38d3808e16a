"""Stack: against torch.nn where nothing is extended; tests/test_extended.py has the recurrences that are."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast.backends import cpu
from rnnfast.cells import CELLS
from rnnfast.regularisation import variational_dropout

STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def input_of(steps: int = STEPS) -> Tensor:
    return random(steps, BATCH, INPUTS)


def make(cell: str, sizes: Any = (HIDDEN,), **options: Any) -> Any:
    stack = rnnfast.Stack(cell, INPUTS, sizes, dtype=torch.float64, **options)
    with torch.no_grad():  # gains and shifts that a test would miss if they were left out
        for name, parameter in stack.named_parameters():
            if name.startswith(("gain", "bias_c")):
                parameter.uniform_(0.5, 1.5)
    return stack


def seeded(stack: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    return stack(*args, generator=torch.Generator().manual_seed(seed), **kwargs)


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [tensor for part in results for tensor in flat(part)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_without_options_it_is_torch_nn(cell: str, bidirectional: bool, backend: str) -> None:
    kind, _, nonlinearity = cell.partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    layer = getattr(nn, kind.upper())(
        INPUTS, HIDDEN, 2, bidirectional=bidirectional, batch_first=True, dtype=torch.float64, **options
    )
    stack = make(cell, [HIDDEN] * 2, bidirectional=bidirectional, batch_first=True, backend=backend)
    stack.load_state_dict(layer.state_dict())
    input = random(BATCH, STEPS, INPUTS)
    expected, state = layer(input)
    output, states = stack(input)
    torch.testing.assert_close(output, expected)
    joined = [torch.cat(part) for part in zip(*states, strict=True)] if cell == "lstm" else [torch.cat(states)]
    torch.testing.assert_close(joined, list(state) if cell == "lstm" else [state])
    torch.testing.assert_close(stack(input, states)[0], layer(input, state)[0])


def test_layers_have_their_own_sizes_and_take_token_ids(backend: str) -> None:
    stack, normalised = make("gru", [7, 3], backend=backend), make("lstm", [7, 3], layer_norm=True)
    ids = torch.randint(INPUTS, (STEPS, BATCH))
    output, states = stack(ids)
    assert output.shape == (STEPS, BATCH, 3)
    assert [state.shape[2] for state in states] == [7, 3]
    one_hot = F.one_hot(ids, INPUTS).double()
    torch.testing.assert_close((output, states), stack(one_hot))
    torch.testing.assert_close(normalised(ids), normalised(one_hot))
    for narrow in (torch.int32, torch.uint8):
        torch.testing.assert_close(normalised(ids.to(narrow)), normalised(ids), rtol=0, atol=0)


@pytest.mark.parametrize("connection", ["residual", "highway"])
def test_connections(connection: str, backend: str) -> None:
    stack, input = make("lstm", [HIDDEN] * 3, connection=connection, backend=backend), input_of()
    rows = input
    for layer in range(3):
        single = nn.LSTM(INPUTS if layer == 0 else HIDDEN, HIDDEN, dtype=torch.float64)
        single.load_state_dict(
            {
                k.replace(f"_l{layer}", "_l0"): v
                for k, v in stack.state_dict().items()
                if k[-1] == str(layer) and "highway" not in k
            }
        )
        output = single(rows)[0]
        if layer and connection == "residual":
            output = output + rows
        elif layer:
            gate = (
                rows @ getattr(stack, f"highway_weight_l{layer}").T + getattr(stack, f"highway_bias_l{layer}")
            ).sigmoid()
            output = gate * output + (1 - gate) * rows
        rows = output
    torch.testing.assert_close(stack(input)[0], rows)


def test_highway_connections_begin_by_carrying_the_input_on() -> None:
    stack = make("gru", [HIDDEN] * 3, connection="highway")
    for _ in range(2):
        assert torch.equal(stack.highway_bias_l1, torch.full((HIDDEN,), -1.0).double())
        assert torch.equal(stack.highway_bias_l2, torch.full((HIDDEN,), -1.0).double())
        stack.reset_parameters()


def test_weight_drop_masks_the_recurrent_weights_for_a_call(backend: str) -> None:
    stack, input = make("lstm", weight_dropout=0.5, backend=backend), torch.zeros(2, 1, INPUTS).double()
    output, _ = seeded(stack, input)
    output.sum().backward()
    gradient = stack.weight_hh_l0.grad
    mask = torch.rand(4 * HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)) >= 0.5
    assert torch.equal(gradient != 0, mask)
    plain = copy.deepcopy(stack).eval()
    with torch.no_grad():
        plain.weight_hh_l0.mul_(mask.double() * 2)
        torch.testing.assert_close(seeded(stack, input)[0], plain(input)[0], rtol=0, atol=0)
        assert not torch.equal(seeded(stack, input, seed=1)[0], output)


@pytest.mark.parametrize("option", ["input_dropout", "dropout"])
def test_variational_dropout_has_one_mask_a_sequence(option: str, backend: str) -> None:
    stack = make("rnn_relu", [HIDDEN, HIDDEN], bias=False, backend=backend, **{option: 0.5})
    with torch.no_grad():  # layers that pass on what they are given, but for the first of which the input is narrower
        for layer in range(2):
            getattr(stack, f"weight_hh_l{layer}").zero_()
            weight = getattr(stack, f"weight_ih_l{layer}")
            weight.copy_(torch.eye(*weight.shape))
    output, _ = seeded(stack, torch.ones(STEPS, BATCH, INPUTS).double())
    seen = output[:, :, :INPUTS]
    assert set(seen.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(seen, seen[:1].expand_as(seen))
    assert not torch.equal(seen[:, 0], seen[:, 1])
    torch.testing.assert_close(stack.eval()(torch.ones(1, 1, INPUTS).double())[0][..., :INPUTS].mean().item(), 1.0)


ALL = {"input_dropout": 0.2, "dropout": 0.3, "recurrent_dropout": 0.4, "weight_dropout": 0.5, "zoneout": (0.1, 0.2)}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_lengths_packing_and_a_loop_draw_the_same_masks(cell: str, bidirectional: bool) -> None:
    options = ALL if cell == "lstm" else ALL | {"zoneout": 0.1}
    stack = make(cell, [HIDDEN, HIDDEN], bidirectional=bidirectional, layer_norm=True, connection="highway", **options)
    input, lengths = input_of(), [2, STEPS, 4]
    output, states = seeded(stack, input, lengths=lengths)
    packed = pack_padded_sequence(input, torch.tensor(lengths), enforce_sorted=False)
    packed_output, packed_states = seeded(stack, packed)
    torch.testing.assert_close((pad_packed_sequence(packed_output)[0], packed_states), (output, states))
    whole, whole_states = seeded(stack, input)
    torch.testing.assert_close(output[:, 1], whole[:, 1])
    pairs = zip(flat(states), flat(whole_states), strict=True)
    assert all(torch.allclose(a[:, 1], b[:, 1]) for a, b in pairs)
    if not bidirectional:
        torch.testing.assert_close(output[:2, 0], whole[:2, 0])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_empty_sequences(cell: str) -> None:
    stack, input = make(cell, [HIDDEN, 3], bidirectional=True, layer_norm=True), input_of()
    _, hx = stack(input)
    output, states = stack(input, hx, lengths=[0, 0, 0])
    assert output.shape == (STEPS, BATCH, 6)
    assert not output.any()
    torch.testing.assert_close(flat(states), flat(hx))
    output, states = stack(input, hx, lengths=[0, 3, 0])
    torch.testing.assert_close([part[:, 0] for part in flat(states)], [part[:, 0] for part in flat(hx)])


def test_a_reset_forgets_and_keeps_the_masks() -> None:
    stack, input = make("lstm", [HIDDEN, 4], recurrent_dropout=0.5, dropout=0.5), input_of(4)
    input[2:] = input[:2]
    reset = torch.zeros(4, BATCH, dtype=torch.bool)
    reset[2] = True
    output, _ = seeded(stack, input, reset=reset)
    torch.testing.assert_close(output[2:], output[:2])
    assert not torch.allclose(seeded(stack, input)[0][2:], output[2:])


def test_masks_come_from_the_generator_whatever_the_dtype() -> None:
    stack, input = make("lstm", [HIDDEN, HIDDEN], layer_norm=True, **ALL), input_of()
    output = seeded(stack, input)[0]
    assert torch.equal(seeded(stack, input)[0], output)
    assert not torch.equal(seeded(stack, input, seed=1)[0], output)
    torch.manual_seed(3)
    first = stack(input)[0]
    torch.manual_seed(3)
    assert torch.equal(stack(input)[0], first)
    torch.testing.assert_close(seeded(stack.float(), input.float())[0], output.float(), rtol=1e-4, atol=1e-5)


def test_zoneout_of_one_keeps_the_state() -> None:
    for stack in (make("lstm", zoneout=1.0), make("lstm", zoneout=1.0).eval()):
        state = [(random(1, BATCH, HIDDEN), random(1, BATCH, HIDDEN))]
        torch.testing.assert_close(flat(stack(input_of(), state)[1]), flat(state))


@pytest.mark.parametrize("zoneout", [(1.0, 0.0), (0.0, 1.0)])
def test_zoneout_of_one_part_alone(zoneout: tuple[float, float]) -> None:
    for stack in (make("lstm", zoneout=zoneout), make("lstm", zoneout=zoneout).eval()):
        before = random(1, BATCH, HIDDEN), random(1, BATCH, HIDDEN)
        (after,) = stack(input_of(), [before])[1]
        assert [torch.allclose(*parts) for parts in zip(before, after, strict=True)] == [p == 1 for p in zoneout]


def test_explain_tells_who_runs_it_and_why() -> None:
    input = input_of()
    plain = rnnfast.explain(make("lstm"), input).backend
    stack = make("lstm", recurrent_dropout=0.5, weight_dropout=0.5, dropout=0.5)
    choice = rnnfast.explain(stack, input)
    assert choice.backend == ("cpu" if cpu.why_not() is None else "reference")
    assert rnnfast.explain(stack.eval(), input).backend == plain
    masked = make("lstm", recurrent_dropout=0.5, backend="torch").eval()
    assert rnnfast.explain(masked, input).backend == "torch"
    masked(input)
    half = rnnfast.explain(stack.train().half(), input.half())
    assert half.backend == "reference"
    assert dict(half.passed_over)["torch"] == "it has no recurrent dropout, which the reference has"
    named = make("gru", zoneout=0.1, backend="torch")
    with pytest.raises(RuntimeError, match="'torch' cannot run this gru: it has no zoneout"):
        named(input)
    with rnnfast.use_backend("torch"), pytest.raises(RuntimeError, match="layer normalisation"):
        make("gru", layer_norm=True)(input)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_projections_of_an_extended_recurrence(bidirectional: bool, training: bool) -> None:
    options = ALL | {"proj_size": 3, "layer_norm": True, "peepholes": True, "bidirectional": bidirectional}
    stack, input = make("lstm", [HIDDEN, HIDDEN + 1], **options).train(training), input_of()
    assert rnnfast.explain(stack, input).backend == ("cpu" if cpu.why_not() is None else "reference")
    mask = torch.rand(STEPS, BATCH) < 0.3
    results = []
    for name in (stack.backend, "reference"):
        stack.backend = name
        output, states = seeded(stack, input, lengths=[2, STEPS, 4], reset=mask)
        loss = output.sin().sum() + sum(part.square().sum() for part in flat(states))
        results.append([output, *flat(states), *torch.autograd.grad(loss, list(stack.parameters()))])
    torch.testing.assert_close(*results)
    assert results[0][0].shape == (STEPS, BATCH, 3 * (1 + bidirectional))
    if training or bidirectional:
        return
    stack.backend = "auto"
    state, outputs = None, []
    with torch.no_grad():
        for x in input:
            output, state = stack.step(x, state)
            outputs.append(output)
        torch.testing.assert_close(torch.stack(outputs), stack(input)[0], rtol=0, atol=0)


def test_zoneout_of_a_projection_is_of_what_it_puts_out() -> None:
    stack = make("lstm", proj_size=2, zoneout=1.0)
    state = [(random(1, BATCH, 2), random(1, BATCH, HIDDEN))]
    output, after = stack(input_of(), state)
    torch.testing.assert_close(flat(after), flat(state))
    torch.testing.assert_close(output, state[0][0].expand_as(output))


def test_peepholes_are_parameters_of_each_direction(backend: str) -> None:
    stack, input = make("lstm", peepholes=True, bidirectional=True, backend=backend), input_of()
    plain = make("lstm", bidirectional=True, backend=backend)
    plain.load_state_dict({name: value for name, value in stack.state_dict().items() if "peephole" not in name})
    assert not torch.allclose(stack(input)[0], plain(input)[0])
    stack(input)[0].sum().backward()
    for suffix in ("_l0", "_l0_reverse"):
        weight = getattr(stack, "weight_peephole" + suffix)
        assert weight.shape == (3, HIDDEN)
        assert weight.grad.any()
        nn.init.zeros_(weight)
    torch.testing.assert_close(stack(input), plain(input))


def test_copies_pickles_and_parametrizations() -> None:
    stack, input = make("gru", [HIDDEN, HIDDEN], zoneout=0.1, connection="highway"), input_of()
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(seeded(other, input)[0], seeded(stack, input)[0])
    assert repr(stack) == "Stack('gru', 4, [6, 6], zoneout=(0.1, 0.0), connection='highway')"
    nn.utils.parametrizations.weight_norm(stack, "weight_hh_l0")
    torch.testing.assert_close(seeded(stack, input)[0], seeded(other, input)[0])


def test_parameters_are_drawn_anew_in_whatever_form_they_are() -> None:
    class Tagger(rnnfast.Stack):
        def __init__(self) -> None:
            super().__init__("lstm", INPUTS, [HIDDEN, 9], layer_norm=True, bidirectional=True)
            self.head = nn.Linear(18, 2)

    stack = Tagger()
    nn.utils.parametrizations.weight_norm(stack, "weight_hh_l0")
    prune.l1_unstructured(stack, "weight_ih_l1_reverse", 0.5)
    prune.l1_unstructured(stack, "gain_ih_l0", 0.5)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.fill_(7)
    stack.reset_parameters()
    assert (stack.head.weight == 7).all()  # of a module of its own
    for name, parameter in stack.named_parameters():
        if name.startswith("gain"):
            assert (parameter == 1).all()
        elif not name.startswith(("head", "bias_c")):
            assert 0 < parameter.abs().max() <= (9 if "_l1" in name else HIDDEN) ** -0.5


def test_what_code_for_torch_s_layers_asks_for() -> None:
    stack = rnnfast.Stack("gru", INPUTS, np.array([4, 5]))
    assert stack.num_layers == 2
    assert stack.hidden_sizes == (4, 5)
    stack.flatten_parameters()


def test_what_is_reset_to_may_have_one_column_for_all_part_by_part() -> None:
    stack, input = rnnfast.Stack("lstm", INPUTS, [HIDDEN]), input_of().float()
    steps, batch = input.shape[:2]
    reset = torch.rand(steps, batch) < 0.3
    one, each = torch.randn(1, 1, HIDDEN), torch.randn(1, batch, HIDDEN)
    expected = stack(input, reset=reset, reset_to=[(one.expand(-1, batch, -1), each)])
    found = stack(input, reset=reset, reset_to=[(one, each)])
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"\(h, c\) of shapes .*, or with one column for all, got "):
        stack(input, reset=reset, reset_to=[(one, torch.randn(1, batch + 1, HIDDEN))])


def test_autocast() -> None:
    for options in ({}, {"layer_norm": True, "zoneout": 0.1, "connection": "highway"}):
        stack, input = rnnfast.Stack("lstm", INPUTS, [HIDDEN, HIDDEN], **options), input_of().float()
        with torch.autocast("cpu", torch.bfloat16):
            output, states = seeded(stack, input)
            reset = torch.ones(input.shape[:2], dtype=torch.bool)  # to states of the weights' type
            again = seeded(stack, input, reset=reset, reset_to=[(torch.zeros(1, 1, HIDDEN),) * 2] * 2)
            assert torch.equal(again[0], seeded(stack, input, reset=reset)[0])
        assert {tensor.dtype for tensor in flat((output, states))} == {torch.bfloat16}
        torch.testing.assert_close(output.float(), seeded(stack, input)[0], rtol=0.05, atol=0.05)
        output.float().sum().backward()
        assert stack.weight_hh_l0.grad.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="float64"):
            stack(input.double())  # which autocast never casts
        half = copy.deepcopy(stack).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            casts = seeded(half, input)[0]
        torch.testing.assert_close(casts, seeded(half, input.bfloat16())[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32_and_rounded_once_a_layer(dtype: torch.dtype) -> None:
    stack = make("lstm", layer_norm=True, zoneout=0.2, recurrent_dropout=0.5, backend="reference").to(dtype)
    input = input_of().to(dtype)
    output, states = seeded(stack, input)
    expected, expected_states = seeded(copy.deepcopy(stack).float(), input.float())
    torch.testing.assert_close(output, expected.to(dtype))
    torch.testing.assert_close(flat(states), [state.to(dtype) for state in flat(expected_states)])
    output.float().sum().backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_stack_streams(cell: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = make(cell, [HIDDEN, 3], layer_norm=True, zoneout=0.2)

        def forward(self, input: Tensor) -> Tensor:
            output: Tensor = self.stack(input)[0]
            return output * 2

    model, input = Model().eval(), input_of()
    whole = model(input)
    stream = rnnfast.Stream(model)
    torch.testing.assert_close(torch.cat([stream(input[:2]), stream(input[2:])]), whole)
    stream.reset([1])
    torch.testing.assert_close(stream(input[:1])[:, 1], whole[:1, 1])
    stream.detach()
    alone = rnnfast.Stream(model.stack)
    torch.testing.assert_close(torch.cat([alone(input[:2]), alone(input[2])[None], alone(input[3:])]) * 2, whole)
    torch.testing.assert_close(flat(alone.state), flat(model.stack(input)[1]))
    alone.reset([1])
    torch.testing.assert_close(alone(input[0])[1] * 2, whole[0, 1])
    with pytest.raises(RuntimeError, match="bidirectional"):
        rnnfast.Stream(make(cell, bidirectional=True))


def test_variational_dropout_of_any_sequence() -> None:
    input = torch.ones(STEPS, BATCH, 50)
    dropped = variational_dropout(input, 0.5, generator=torch.Generator().manual_seed(0))
    other = variational_dropout(
        input.transpose(0, 1), 0.5, batch_first=True, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(dropped, other.transpose(0, 1))
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert variational_dropout(input, 0.5, training=False) is input
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        variational_dropout(input, 1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("elman", 3, [4]), {}, "unknown cell"),
        (("lstm", 3, []), {}, "hidden_sizes must be positive"),
        (("lstm", 3, 4), {}, "hidden_sizes must be a list, the number of units of each layer, got 4"),
        (("lstm", 3, ["4"]), {}, "hidden_sizes must be a list, the number of units of each layer, got"),
        (("lstm", 3, [4]), {"zoneout": (0.1, 0.2, 0.3)}, "a pair for h and for c"),
        (("lstm", 3, [4]), {"zoneout": None}, "a pair for h and for c, got None"),
        (("lstm", 3, [4]), {"dropout": 1.0}, r"dropout is a probability in \[0, 1\)"),
        (("lstm", 3, [4]), {"zoneout": 1.5}, "zoneout is a probability"),
        (("gru", 3, [4]), {"zoneout": (0.1, 0.1)}, "no cell state"),
        (("rnn_tanh", 3, [4]), {"layer_norm": True}, "for lstm and gru"),
        (("gru", 3, [4]), {"peepholes": True}, "for lstm"),
        (("gru", 3, [4, 5]), {"connection": "residual"}, "layers of one size"),
        (("gru", 3, [4, 4]), {"connection": "dense"}, "unknown connection"),
        (("gru", 3, [4]), {"backend": "gpu"}, "unknown rnnfast backend"),
        (("gru", 3, [4]), {"proj_size": 2}, "proj_size is for lstm"),
        (("lstm", 3, [8, 4]), {"proj_size": 4}, "below every one of hidden_sizes"),
    ],
)
def test_mistaken_options(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rnnfast.Stack(*arguments, **options)


def test_mistaken_calls() -> None:
    stack, input = make("lstm", [HIDDEN, 3], zoneout=0.1), input_of()
    with pytest.raises(ValueError, match="one state for each of the 2 layers"):
        stack(input, torch.zeros(1, BATCH, HIDDEN))
    with pytest.raises(RuntimeError, match=r"hx\[1\] must be \(h, c\) of shapes \[\(1, 3, 3\), \(1, 3, 3\)\]"):
        stack(input, [(torch.zeros(1, BATCH, HIDDEN),) * 2] * 2)
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 4D"):
        stack(input[None])
    with pytest.raises(RuntimeError, match="h_0 has dtype"):
        stack(input, [tuple(part.float() for part in state) for state in stack(input)[1]])
    with pytest.raises(RuntimeError, match="input has dtype"):
        stack(input.float())
    with pytest.raises(ValueError, match="embedded token ids"):
        make("gru", input_dropout=0.1)(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="input's shape without features"):
        stack(input, reset=torch.zeros(BATCH, STEPS, dtype=torch.bool))
    with pytest.raises(ValueError, match="lengths of its own"):
        stack(pack_padded_sequence(input, torch.tensor([5, 4, 3])), lengths=[1, 2, 3])
