"""What a drop-in layer must keep of torch.nn besides the numbers, and what it adds."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from tests.parity import Case, assert_same, run

LAYERS = ["RNN", "LSTM", "GRU"]


@pytest.mark.parametrize("name", LAYERS)
def test_weights_made_in_inference_mode_are_not_silently_left_untrained(name: str) -> None:
    layer, input = getattr(rnnfast, name)(3, 4, num_layers=2), torch.randn(5, 2, 3)
    with torch.inference_mode():
        layer.load_state_dict({key: w.clone() for key, w in layer.state_dict().items()}, assign=True)
        expected = layer(input)
    for call in (layer, lambda input: layer.step(input[0])):
        with pytest.raises(RuntimeError, match="made in inference mode"):
            call(input)
    with torch.no_grad():
        torch.testing.assert_close(layer(input), expected)
        layer.step(input[0])
    layer.requires_grad_(False)
    torch.testing.assert_close(layer(input), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_is_a_torch_layer(name: str) -> None:
    layer = getattr(rnnfast, name)(3, 4, num_layers=2, bidirectional=True)
    assert isinstance(layer, getattr(nn, name))
    assert repr(layer) == repr(getattr(nn, name)(3, 4, num_layers=2, bidirectional=True))
    layer.flatten_parameters()


@pytest.mark.parametrize("name", LAYERS)
def test_weights_move_both_ways(name: str) -> None:
    ours, theirs = getattr(rnnfast, name)(3, 4, 2), getattr(nn, name)(3, 4, 2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_same_seed_gives_the_same_weights_as_torch(name: str) -> None:
    torch.manual_seed(3)
    theirs = getattr(nn, name)(3, 4, 2)
    torch.manual_seed(3)
    ours = getattr(rnnfast, name)(3, 4, 2)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_compute_the_same(name: str, backend: str) -> None:
    layer = getattr(rnnfast, name)(3, 4, backend=backend)
    input = torch.randn(5, 2, 3)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    for other in copies:
        assert other.backend == backend
        assert_same(run(layer, input, None), run(other, input, None), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_final_state_is_no_view_of_the_output(name: str, backend: str) -> None:
    layer = getattr(rnnfast, name)(3, 4, backend=backend)
    output, final = layer(torch.randn(5, 2, 3))
    for state in final if isinstance(final, tuple) else (final,):
        assert not state._is_view()
        assert state.untyped_storage().data_ptr() != output.untyped_storage().data_ptr()
        state.detach_()


@pytest.mark.parametrize("name", LAYERS)
def test_no_one_hot_is_ever_built(name: str, backend: str) -> None:
    """No operation, forward or backward, makes a tensor as large as rows x vocabulary."""
    vocabulary, rows = 4001, 64 * 8
    layer = getattr(rnnfast, name)(vocabulary, 2, backend=backend)
    weight = layer.weight_ih_l0.numel()
    assert weight < rows * vocabulary // 10

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    with Largest() as largest:
        output, _ = layer(torch.randint(vocabulary, (64, 8)))
        output.sum().backward()
    assert 0 < largest.numel <= weight


def test_token_ids_of_any_integer_type() -> None:
    layer = rnnfast.GRU(7, 4)
    ids = torch.randint(7, (5, 2))
    expected = layer(ids)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        torch.testing.assert_close(layer(ids.to(dtype)), expected, rtol=0, atol=0)


def test_token_ids_of_no_sequences(backend: str) -> None:
    layer = rnnfast.GRU(7, 4, backend=backend)
    for _ in range(2):
        output, state = layer(torch.zeros(5, 0, dtype=torch.long))
        assert output.shape == (5, 0, 4)
        assert state.shape == (1, 0, 4)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_batch_sizes_that_are_strided(name: str, backend: str) -> None:
    """torch.nn's kernels would read others."""
    layer, rows = getattr(rnnfast, name)(3, 4, backend=backend), torch.randn(9, 3)
    sizes = torch.tensor([3, 3, 2, 1, 2, 0, 2])[::2]
    expected = layer(PackedSequence(rows, sizes.clone(memory_format=torch.contiguous_format)))
    found = layer(PackedSequence(rows, sizes))
    torch.testing.assert_close(found[0].data, expected[0].data, rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    stack = rnnfast.Stack("lstm", 3, [4], layer_norm=True)
    packed = PackedSequence(rows, sizes.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(stack(PackedSequence(rows, sizes))[0].data, stack(packed)[0].data, rtol=0, atol=0)


def test_packed_token_ids() -> None:
    layer = rnnfast.GRU(7, 4)
    sequences = [torch.randint(7, (length,)) for length in (5, 3, 1)]
    packed, _ = layer(pack_sequence(sequences))
    one_hot, _ = layer(pack_sequence([nn.functional.one_hot(s, 7).float() for s in sequences]))
    torch.testing.assert_close(packed.data, one_hot.data)


@pytest.mark.parametrize("name", LAYERS)
def test_functional_call_uses_the_weights_it_is_given(name: str, backend: str) -> None:
    layer, other = getattr(rnnfast, name)(3, 4, backend=backend), getattr(rnnfast, name)(3, 4)
    input = torch.randn(5, 2, 3)
    result = torch.func.functional_call(layer, dict(other.named_parameters()), (input,))
    torch.testing.assert_close(result, other(input))


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name: str, backend: str) -> None:
    result = run(getattr(rnnfast, name)(3, 4, bidirectional=True, backend=backend), torch.randn(5, 0, 3), None)
    assert result.outputs["output"].shape == (5, 0, 8)
    assert result.outputs["h_n"].shape == (2, 0, 4)
    assert all(not gradient.any() for gradient in result.gradients.values())


def test_empty_batch_with_a_projection_and_all_states(backend: str) -> None:
    layer = rnnfast.LSTM(3, 4, bidirectional=True, proj_size=2, backend=backend)
    input = torch.randn(5, 0, 3, requires_grad=True)
    result = run(layer, input, None)
    assert result.outputs["output"].shape == (5, 0, 4)
    assert result.outputs["c_n"].shape == (2, 0, 4)
    h, c = layer.states(input)
    assert h.shape == (5, 2, 0, 2)
    assert c.shape == (5, 2, 0, 4)
    gradients = torch.autograd.grad([h.sum() + c.sum()], list(layer.parameters()))
    assert all(not gradient.any() for gradient in (*result.gradients.values(), *gradients))


@pytest.mark.parametrize("name", LAYERS)
def test_non_contiguous_input_and_state(name: str, backend: str) -> None:
    layer = getattr(rnnfast, name)(3, 4, backend=backend)
    input, state = torch.randn(3, 2, 5).permute(2, 1, 0), torch.randn(4, 2, 1).permute(2, 1, 0)
    hx, packed_hx = ((state, state), (state.contiguous(),) * 2) if name == "LSTM" else (state, state.contiguous())
    torch.testing.assert_close(layer(input, hx), layer(input.contiguous(), packed_hx), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_nan_stays_in_its_row(name: str, backend: str) -> None:
    layer = getattr(rnnfast, name)(3, 4, bidirectional=True, backend=backend)
    input = torch.randn(6, 5, 3)
    clean = layer(input)[0]
    input[2, 3] = float("nan")
    output = layer(input)[0]
    assert output[:, 3].isnan().any()
    others = [0, 1, 2, 4]
    torch.testing.assert_close(output[:, others], clean[:, others], rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_only_part_of_the_results_is_used(name: str, backend: str) -> None:
    """A loss on the final state alone, and frozen weights, give the gradients torch.nn gives."""
    case = Case(name)
    theirs, ours = case.build(nn, torch.float64), case.build(rnnfast, torch.float64, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(6, 4, 5, dtype=torch.float64)
    gradients = []
    for layer in (theirs, ours):
        leaf = input.clone().requires_grad_()
        layer.requires_grad_(False)
        final = layer(leaf)[1]
        (final[0] if isinstance(final, tuple) else final).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_runs_in_the_lower_precision(name: str, backend: str) -> None:
    layer = getattr(rnnfast, name)(8, 16, backend=backend)
    input = torch.randn(5, 2, 8)
    expected = layer(input)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(input)[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02)
    output.sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


def errors() -> list[Any]:
    x = torch.randn(5, 2, 3)
    ids = torch.randint(3, (5, 2))
    return [
        pytest.param(torch.randn(3), None, ValueError, "Expected input to be 2D or 3D, got 1D", id="1-D input"),
        pytest.param(torch.randn(5, 2, 3, 1), None, ValueError, "got 4D", id="4-D input"),
        pytest.param(torch.randn(5, 2, 4), None, RuntimeError, "Expected 3, got 4", id="wrong features"),
        pytest.param(x.double(), None, ValueError, "match weight dtype|must have the type", id="wrong dtype"),
        pytest.param(x[:0], None, RuntimeError, "length to be larger than 0", id="no steps"),
        pytest.param(x, torch.randn(1, 3, 4), RuntimeError, r"Expected hidden(\[0\])? size", id="wrong batch"),
        pytest.param(x, torch.randn(2, 4), RuntimeError, "For batched 3-D input", id="2-D state"),
        pytest.param(x[:, 0], torch.randn(1, 1, 4), RuntimeError, "For unbatched 2-D input", id="3-D state"),
        pytest.param(x, torch.randn(1, 2, 4).double(), RuntimeError, "h_0 has dtype torch.float64", id="state dtype"),
        pytest.param(ids + 1, None, IndexError, r"token ids must be in \[0, 3\), got 3", id="id too large"),
        pytest.param(ids - 3, None, IndexError, r"must be in \[0, 3\), got -", id="negative id"),
        pytest.param(ids[None], None, ValueError, "Expected token ids to be 1D or 2D, got 3D", id="3-D ids"),
        pytest.param(ids.bool(), None, RuntimeError, "torch.bool", id="booleans"),
    ]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_subclass_makes_its_own_checks_in_every_call(name: str, batch_first: bool) -> None:
    class Checked(getattr(rnnfast, name)):  # type: ignore[misc]
        def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
            super().check_forward_args(input, hidden, batch_sizes)
            seen.append(input.shape)
            if not input.isfinite().all():
                raise ValueError("infinite input")

    seen: list[torch.Size] = []
    layer, input = Checked(3, 4, batch_first=batch_first), torch.randn(5, 2, 3)
    packed, of_infinities = (pack_padded_sequence(x, torch.tensor([2, 1, 1, 1, 1]), True) for x in (input, input / 0))
    for _ in range(3):
        layer(input)
        layer(input[0])
        layer(packed)
        layer(torch.zeros(5, 2, dtype=torch.long))
        with torch.no_grad():
            layer(input)
        for wrong in (input / 0, of_infinities):
            with pytest.raises(ValueError, match="infinite input"):
                layer(wrong)
    unbatched = (1, 2, 3) if batch_first else (2, 1, 3)
    assert seen == 3 * [input.shape, unbatched, packed.data.shape, input.shape, input.shape, packed.data.shape]
    # Within a transform the weights may have another type than the layer's, as torch's check of the input sees it.
    weights = {key: value.double() for key, value in layer.named_parameters()}
    torch.func.grad(lambda w: torch.func.functional_call(layer, w, (input.double(),))[0].sum())(weights)


@pytest.mark.parametrize(("input", "state", "error", "message"), errors())
@pytest.mark.parametrize("name", LAYERS)
def test_errors_are_clear(name: str, input: Any, state: Any, error: type[Exception], message: str) -> None:
    layer = getattr(rnnfast, name)(3, 4)
    hx = (state, torch.zeros_like(state, dtype=torch.float32)) if name == "LSTM" and state is not None else state
    with pytest.raises(error, match=message):
        layer(input, hx)


@pytest.mark.parametrize("name", LAYERS)
def test_dimension_errors_are_those_of_torch(name: str) -> None:
    ours, theirs = getattr(rnnfast, name)(3, 4), getattr(nn, name)(3, 4)
    state = torch.randn(2, 4)
    for input, hx in [(torch.randn(3), None), (torch.randn(5, 2, 3), (state, state) if name == "LSTM" else state)]:
        with pytest.raises((ValueError, RuntimeError)) as expected:
            theirs(input, hx)
        with pytest.raises(expected.type) as actual:
            ours(input, hx)
        assert str(actual.value) == str(expected.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        lambda: rnnfast.RNN(3, 4),
        lambda: rnnfast.LSTM(3, 4, num_layers=2, bidirectional=True),
        lambda: rnnfast.Stack("gru", 3, [4, 5], layer_norm=True),
    ],
)
def test_a_trace_can_be_trained(build: Any, direct: bool, tmp_path: Path) -> None:
    """With gradients on, as is torch's default; saved, loaded, and differentiated."""
    layer, input = build(), torch.randn(5, 2, 3)
    if direct:
        layer(input)
    torch.jit.trace(layer, input).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    results = [(each(input)[0], dict(each.named_parameters())) for each in (layer, traced)]
    gradients = [torch.autograd.grad(output.sin().sum(), list(weights.values())) for output, weights in results]
    assert results[0][1].keys() == results[1][1].keys()
    assert torch.equal(results[0][0], results[1][0])
    for ours, of_trace in zip(*gradients, strict=True):
        assert torch.equal(ours, of_trace)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_trace_with_packed_sequences_serves_any_batch(name: str) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(rnnfast, name)(3, 4, num_layers=2, bidirectional=True)

        def forward(self, padded: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
            output, state = self.layer(pack_padded_sequence(padded, lengths, enforce_sorted=False))
            return pad_packed_sequence(output)[0], state

    model = Encoder().eval()
    traced = torch.jit.trace(model, (torch.randn(5, 3, 3), torch.tensor([5, 2, 3])))
    for padded, lengths in ((torch.randn(7, 4, 3), [2, 7, 1, 4]), (torch.randn(2, 1, 3), [2])):
        given = padded, torch.tensor(lengths)
        torch.testing.assert_close(traced(*given), model(*given), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("cuts", [{"lengths": torch.tensor([5, 5])}, {"reset": torch.zeros(5, 2, dtype=torch.bool)}])
@pytest.mark.parametrize("layer", [rnnfast.GRU(3, 4), rnnfast.Stack("gru", 3, [4])], ids=["GRU", "Stack"])
def test_a_trace_of_what_lengths_and_resets_decide_is_refused(layer: Any, cuts: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot record .*: use torch.export, or a PackedSequence"):
        torch.jit.trace(lambda input: layer(input, **cuts)[0], torch.randn(5, 2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trace_warns_of_no_check_of_ours() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", torch.jit.TracerWarning)
        torch.jit.trace(rnnfast.LSTM(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3))
    assert not [each for each in caught if "rnnfast" in each.filename]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_weights_and_no_packed_copy_of_them() -> None:
    layer, input = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad():
        traced = torch.jit.trace(layer, input)  # traces twice and compares
        for weight in traced.parameters():
            weight.mul_(0.5)
        assert torch.equal(traced(input)[0], layer(input)[0])


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_torch_fx_keeps_it_whole_with_its_hooks(name: str, accelerated: bool) -> None:
    model = nn.Sequential(getattr(nn if accelerated else rnnfast, name)(3, 4), nn.Identity())
    if accelerated:
        rnnfast.accelerate(model)
    model[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    traced, input = torch.fx.symbolic_trace(model), torch.randn(2, 3)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    torch.testing.assert_close(traced(input), model(input), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_torch_jit_script_is_told_what_to_do(name: str, accelerated: bool) -> None:
    model = nn.Sequential(getattr(nn if accelerated else rnnfast, name)(3, 4))
    if accelerated:
        rnnfast.accelerate(model)
    with pytest.raises(RuntimeError, match=r"cannot compile rnnfast's layers: use torch\.export"):
        torch.jit.script(model)
    if accelerated:
        rnnfast.restore(model)
        torch.jit.script(model)
