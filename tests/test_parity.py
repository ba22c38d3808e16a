"""Our layers against torch.nn's: every option, alone and combined, outputs and all gradients."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import rnnfast
from tests.parity import Case, assert_same, make_inputs, run, run_both

LAYERS = ["RNN", "LSTM", "GRU"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "two layers, bidirectional": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "dropout": {"num_layers": 3, "dropout": 0.4},
    "relu": {"nonlinearity": "relu"},
    "projection": {"proj_size": 3},
    "projection, all": {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False},
}


def options_for(layer: str, name: str) -> tuple[tuple[str, Any], ...]:
    options = OPTIONS[name]
    if ("nonlinearity" in options and layer != "RNN") or ("proj_size" in options and layer != "LSTM"):
        pytest.skip(f"torch.nn.{layer} has no such option")
    return tuple(options.items())


@pytest.mark.parametrize("kind", ["padded", "unbatched", "packed"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_option(layer: str, option: str, kind: str, backend: str) -> None:
    case = Case(layer, kind=kind, options=options_for(layer, option))
    assert_same(*run_both(case, backend))
    assert_same(*run_both(case._replace(with_state=False), backend))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("option", ["plain", "two layers, bidirectional", "batch first", "no bias"])
@pytest.mark.parametrize("kind", ["padded", "unbatched", "packed"])
def test_token_ids_equal_one_hot_input(layer: str, option: str, kind: str, backend: str) -> None:
    case = Case(layer, kind=kind, token_ids=True, options=options_for(layer, option))
    assert_same(*run_both(case, backend))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layer = draw(st.sampled_from(LAYERS))
    hidden_size = draw(st.integers(1, 9))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    if options["num_layers"] > 1:
        options["dropout"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
    if layer == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if layer == "LSTM" and hidden_size > 1:
        options["proj_size"] = draw(st.integers(0, hidden_size - 1))
    return Case(
        layer,
        hidden_size=hidden_size,
        input_size=draw(st.integers(1, 6)),
        batch=draw(st.integers(1, 5)),
        steps=draw(st.integers(1, 7)),
        kind=draw(st.sampled_from(["padded", "unbatched", "packed"])),
        with_state=draw(st.booleans()),
        token_ids=draw(st.booleans()),
        options=tuple(options.items()),
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@hypothesis.given(case=cases(), double=st.booleans())
@hypothesis.settings(max_examples=120, suppress_health_check=list(hypothesis.HealthCheck))
def test_combined_options(case: Case, double: bool, backend: str) -> None:
    if double:
        assert_same(*run_both(case, backend))
    else:
        assert_same(*run_both(case, backend, torch.float32), rtol=1e-4, atol=1e-5)


def errors(case: Case, dtype: torch.dtype, backend: str, draws: int) -> dict[str, tuple[float, float]]:
    """Errors of torch.nn and of ours in `dtype`, against torch.nn in float64, for every output and gradient.

    RMS of the error over RMS of the truth, over `draws` of weights and inputs: one draw of a small tensor may be lucky.
    """
    squares: dict[str, list[float]] = {}
    for draw in range(draws):
        torch.manual_seed(draw)  # `run` sets a seed as well
        theirs, ours = case.build(nn, dtype), case.build(rnnfast, dtype, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        wide = case.build(nn, torch.float64)
        wide.load_state_dict(theirs.state_dict())
        input, _, hx = make_inputs(case, ours, dtype)
        wide_hx = tuple(state.double() for state in hx) if isinstance(hx, tuple) else hx.double()
        truth = run(wide, input.double(), wide_hx)
        for true, their, mine in zip(truth, run(theirs, input, hx), run(ours, input, hx), strict=True):
            for name, value in true.items():
                sums = squares.setdefault(name, [0.0, 0.0, 0.0])
                for k, tensor in enumerate((value, their[name] - value, mine[name] - value)):
                    sums[k] += tensor.detach().square().sum().item()
    return {name: ((their / true) ** 0.5, (mine / true) ** 0.5) for name, (true, their, mine) in squares.items()}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("steps", [1, 2, 35, 1024])
@pytest.mark.parametrize(("hidden_size", "batch"), [(1, 1), (33, 3), (64, 16)])
def test_float32_error_is_at_most_twice_that_of_torch(
    layer: str, steps: int, hidden_size: int, batch: int, backend: str
) -> None:
    if steps == 1024 and (hidden_size == 64 or (hidden_size == 1 and backend == "reference")):
        steps = 128  # the same tiles at an eighth of the time; the reference has none
    case = Case(layer, hidden_size=hidden_size, input_size=11, batch=batch, steps=steps)
    # A bias, or the state of one row, has hidden_size numbers, however many steps there are.
    draws = max(1, 512 // (hidden_size * steps), 16 // hidden_size)
    for name, (theirs, ours) in errors(case, torch.float32, backend, draws).items():
        allowed = 2 * theirs + 2 * torch.finfo(torch.float32).eps
        assert ours <= allowed, f"{name}: relative error {ours:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("layer", LAYERS)
def test_float32_error_of_long_sums_is_at_most_twice_that_of_torch(layer: str, backend: str) -> None:
    case = Case(layer, hidden_size=1500, input_size=11, batch=2, steps=2)
    for name, (theirs, ours) in errors(case, torch.float32, backend, draws=1).items():
        allowed = 2 * theirs + torch.finfo(torch.float32).eps / 2
        assert ours <= allowed, f"{name}: relative error {ours:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16_is_as_good_as_torch(layer: str, backend: str) -> None:
    case = Case(layer, hidden_size=48, input_size=32, batch=8, steps=35)
    for name, (theirs, ours) in errors(case, torch.bfloat16, backend, draws=1).items():
        assert ours <= 1.5 * theirs, f"{name}: relative error {ours:.2e}, torch.nn's {theirs:.2e}"
        if name in ("output", "h_n", "c_n"):
            assert ours < 0.005, f"{name}: relative error {ours:.2e}"
