"""What the native operators refuse: exported programs call them without the checks in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
import rnnfast.lm.operators
from rnnfast.backends import cpu
from tests.cpu.harness import Case, build, gradients_like

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

Change = Callable[[Any], Any]
NAMES = ("input", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h_0", "c_0", "batch_sizes", "cell", "bidirectional")
EXTENSION = ("gain_ih", "gain_hh", "gain_c", "bias_c", "peepholes", "recurrent_mask", "zoneout_h", "zoneout_c")
PADDED, RAGGED, IDS = Case("lstm"), Case("lstm", ragged=True), Case("lstm", ids=True)
PROJECTED, GRU = Case("lstm", projected=5), Case("gru")


@pytest.fixture(autouse=True)
def _library() -> None:
    cpu.load()


def absent(_: Any) -> None:
    return None


def double(tensor: Tensor) -> Tensor:
    return tensor.double()


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def strided(tensor: Tensor) -> Tensor:
    """Of the same sizes, each element a cell apart."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def shorter(tensor: Tensor) -> Tensor:
    return tensor[..., :-1].contiguous()


def fewer_rows(tensor: Tensor) -> Tensor:
    return tensor[:-1]


def fewer_states(tensor: Tensor) -> Tensor:
    return tensor[:, :-1].contiguous()


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


# Which argument of which case is changed how, and what the error names.
LAYER: list[tuple[Case, str, Change, str]] = [
    (PADDED, "c_0", absent, "c_0 must be given for an lstm"),
    (GRU, "c_0", lambda _: torch.zeros(1, 3, 8), "c_0 must be given for an lstm, and for no other"),
    (PADDED, "b_hh", absent, "b_ih and b_hh must both"),
    (PADDED, "b_ih", absent, "b_ih and b_hh must both"),
    (PADDED, "cell", lambda _: "lstn", "unknown cell lstn"),
    (PADDED, "cell", lambda _: "gru", "column for each unit"),
    (GRU, "cell", lambda _: "rnn_tanh", "column for each unit"),
    (PROJECTED, "w_hr", absent, "column for each unit"),
    (PROJECTED, "w_hr", shorter, "w_hr must be"),
    (PROJECTED, "w_hr", double, "w_hr must be"),
    (PROJECTED, "h_0", lambda _: torch.zeros(1, 3, 8), "h_0 must be"),
    (PROJECTED, "c_0", lambda _: torch.zeros(1, 3, 5), "c_0 must be"),
    (GRU, "w_hr", lambda _: torch.zeros(1, 8, 8), "lstm with w_hr"),
    (PADDED, "input", double, r"input must be contiguous float32 of shape \(15, 4\), got float64 of shape \(15, 4\)"),
    (PADDED, "input", strided, "input must be .* got strided float32"),
    (PADDED, "input", shorter, r"input must be .* got float32 of shape \(15, 3\)"),
    (PADDED, "input", flat, "input must be"),
    (PADDED, "input", lambda _: torch.tensor(3), "input must have rows"),
    (PADDED, "input", fewer_rows, "no whole number of steps"),
    (PADDED, "input", lambda x: x[:0], "at least one step"),
    (RAGGED, "input", fewer_rows, "batch_sizes adds up to"),
    (IDS, "input", lambda ids: ids.int(), "input must be .* got another type"),
    (IDS, "input", strided, "input must be .* got strided int64"),
    (IDS, "input", lambda ids: ids.view(5, 3), "input must be"),
    (IDS, "input", lambda ids: ids - 4, "token id"),
    *[(PADDED, "w_ih", change, "w_ih") for change in (double, strided, flat)],
    *[(PADDED, "w_hh", change, "w_hh") for change in (strided, flat)],
    (PADDED, "w_hh", double, "w_ih must be contiguous float64"),
    *[(PADDED, name, change, name) for name in ("b_ih", "b_hh") for change in (double, strided, shorter, flat)],
    *[(PADDED, name, change, name) for name in ("h_0", "c_0") for change in (double, strided, shorter, flat)],
    (PADDED, "w_ih", fewer_states, "w_ih must be"),
    (PADDED, "w_hh", shorter, "column for each unit"),
    (PADDED, "w_hh", lambda _: torch.zeros(1, 33, 8), "w_hh must be"),
    (PADDED, "w_hh", lambda _: torch.zeros(0, 32, 8), "a direction and a unit"),
    (PROJECTED, "w_hh", lambda _: torch.zeros(1, 0, 5), "a direction and a unit"),
    (PROJECTED, "w_hh", lambda _: torch.zeros(1, 32, 0), "a direction and a unit"),
    (GRU, "h_0", fewer_states, "no whole number of steps"),
    (PADDED, "h_0", fewer_states, "c_0 must be"),
    (PADDED, "c_0", fewer_states, "c_0 must be"),
    (GRU, "h_0", lambda _: torch.zeros(1, 0, 8), "no whole number of steps"),
    (RAGGED, "batch_sizes", lambda sizes: sizes.int(), "batch_sizes must be contiguous int64"),
    (RAGGED, "batch_sizes", strided, "batch_sizes must be .* got strided"),
    (RAGGED, "batch_sizes", lambda sizes: sizes[None], "batch_sizes must be"),
    (RAGGED, "batch_sizes", lambda sizes: sizes[:0], "batch_sizes is empty"),
    (RAGGED, "batch_sizes", fewer_rows, "batch_sizes adds up to"),
]
FREED: list[tuple[Case, str, Change, str]] = [
    (PADDED, name, freed, f"{name} has no memory: its storage has been freed")
    for name in ("input", "w_ih", "w_hh", "h_0", "c_0")
]
RESULTS: list[tuple[Case, str, Change, str]] = [
    *[(PADDED, name, change, name) for name in ("d_output", "d_h_n", "d_c_n") for change in (double, strided, shorter)],
    *[(PADDED, "output", change, "output must be") for change in (double, strided, shorter, flat)],
    *[(PADDED, "tape", change, "save_tape=True") for change in (double, strided, shorter)],
]
EXTENSIONS: list[tuple[Case, str, Change, str]] = [
    (PADDED, name, change, name)
    for name in EXTENSION
    for change in (strided, shorter, flat, lambda tensor: tensor.to(torch.float16))
]


def operators(case: Case) -> dict[str, dict[str, Any]]:
    """Right arguments of every operator that can run the case, by name."""
    layer = dict(zip(NAMES, build(case, torch.float32), strict=True))
    weights = {name: layer[name] for name in NAMES[1:6]} | {"cell": case.cell, "ids": case.ids}
    gradients = gradients_like([*layer.values()], torch.float32)
    before = dict(zip(("d_output", "d_h_n", "d_c_n"), gradients, strict=True))
    packed = torch.ops.rnnfast.scan_cpu_pack(*weights.values())
    calls = {
        "scan_cpu": layer | {"save_tape": True},
        "scan_cpu_backward": before | layer | behind(torch.ops.rnnfast.scan_cpu(*layer.values(), True)),
        "scan_cpu_pack": weights,
        "scan_cpu_packed": {
            "input": layer["input"],
            "packed": packed,
            **{name: layer[name] for name in ("h_0", "c_0", "batch_sizes", "bidirectional")},
        },
        "scan_extended_cpu_pack": {name: weights[name] for name in ("w_ih", "w_hh", "w_hr", "cell", "ids")},
    }
    if case.cell == "lstm":
        lanes, rows, hidden, state = case.lanes, len(layer["input"]), case.hidden, layer["h_0"].shape[2]
        sizes: dict[str, tuple[int, ...]] = {"gain_ih": (4 * hidden,), "gain_hh": (4 * hidden,)}
        sizes |= {"gain_c": (hidden,), "bias_c": (hidden,), "peepholes": (3, hidden)}
        sizes |= {"recurrent_mask": (case.batch, state)}
        extension = {name: torch.rand(lanes, *shape) for name, shape in sizes.items()}
        extension["zoneout_h"] = torch.rand(lanes, rows, state) < 0.5
        extension["zoneout_c"] = torch.rand(lanes, rows, hidden) < 0.5
        shares = {"batch_sizes": layer["batch_sizes"], "share_h": 0.0, "share_c": 0.0}
        extended = {name: layer[name] for name in NAMES[:8]} | extension | shares
        extended |= {"cell": case.cell, "bidirectional": layer["bidirectional"]}
        results = torch.ops.rnnfast.scan_extended_cpu(*extended.values(), True)
        calls["scan_extended_cpu"] = extended | {"save_tape": True}
        calls["scan_extended_cpu_backward"] = before | extended | behind(results)
        cells = {"d_output": before["d_output"], "d_cells": torch.randn(lanes, rows, hidden), "d_c_n": before["d_c_n"]}
        results = torch.ops.rnnfast.scan_cpu(*layer.values(), True)
        calls["scan_cpu_states_backward"] = cells | layer | behind(results)
    return calls


def behind(results: tuple[Tensor, ...]) -> dict[str, Any]:
    """What a backward scan is given behind the layer."""
    return {"output": results[0], "tape": results[3], "need_input": True, "need_weights": True}


@pytest.mark.parametrize(("case", "name", "change", "message"), [*LAYER, *FREED, *RESULTS, *EXTENSIONS])
def test_a_wrong_argument_is_refused_by_every_operator(case: Case, name: str, change: Change, message: str) -> None:
    tried = 0
    for operator, arguments in operators(case).items():
        if name in arguments:
            getattr(torch.ops.rnnfast, operator)(*arguments.values())
            with pytest.raises(RuntimeError, match=message):
                getattr(torch.ops.rnnfast, operator)(*(arguments | {name: change(arguments[name])}).values())
            tried += 1
    assert tried


def test_a_weight_whose_storage_has_been_freed_is_refused() -> None:
    layer, input = rnnfast.GRU(5, 7), torch.randn(6, 3, 5)
    layer.weight_hh_l0.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="its storage has been freed"):
        layer(input)


@pytest.mark.parametrize("sizes", [[2**60 + 2**17, 4], [2**62, 8], [-1], [-1, 0]], ids=str)
def test_there_is_no_tensor_of_more_bytes_than_64_bits_count(sizes: list[int]) -> None:
    with pytest.raises(RuntimeError, match="there is no tensor of shape"):
        torch.ops.rnnfast.direct_empty_cpu(torch.zeros(1), sizes)


def test_what_is_no_packed_weight_is_refused() -> None:
    for case in (GRU, Case("gru", hidden=600)):  # a large one begins with a huge page
        arguments = operators(case)["scan_cpu_packed"]
        packed = arguments["packed"]
        half = len(packed) // 2
        for weights in (packed[:half], packed[:100], packed[:0], packed[::2], packed.view(torch.int8), packed[half:]):
            with pytest.raises(RuntimeError, match="not weights that scan_cpu_pack has packed"):
                torch.ops.rnnfast.scan_cpu_packed(*(arguments | {"packed": weights}).values())
    arguments = operators(PADDED)["scan_extended_cpu"]
    packed = torch.ops.rnnfast.scan_extended_cpu_pack(arguments["w_ih"], arguments["w_hh"], None, "lstm", False)
    for weights in (packed[:-1], packed.float(), strided(packed)):
        with pytest.raises(RuntimeError, match="packed must be contiguous uint8"):
            torch.ops.rnnfast.scan_extended_cpu(*arguments.values(), weights)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("packed", lambda _: [], "a layer at least"),
        ("packed", lambda packed: packed[:1], "h_0 must be"),
        ("embedding", flat, "an embedding"),
        ("embedding", double, "embedding must be"),
        ("embedding", strided, "embedding must be"),
        ("embedding", shorter, "does not fit"),
        ("head_weight", flat, "a head"),
        ("head_weight", strided, "head_weight must be"),
        ("head_weight", shorter, "h_0 must be"),
        ("head_weight", lambda weight: weight[:0], "a head"),
        ("head_weight", lambda weight: weight.bfloat16(), "float32 or float64"),
        ("head_bias", double, "head_bias must be"),
        ("head_bias", shorter, "head_bias must be"),
        ("head_bias", strided, "head_bias must be"),
        *[(name, change, f"{name} must be") for name in ("h_0", "c_0") for change in (double, strided, shorter, flat)],
        ("h_0", fewer_rows, "h_0 must be"),
        ("h_0", lambda h: h.repeat(1, 2, 1), "h_0 must be"),
        ("c_0", absent, "does not fit"),
        ("c_0", lambda _: torch.zeros(1), "c_0 must be"),
        ("token", lambda _: 7, "outside the vocabulary"),
        ("token", lambda _: -1, "outside the vocabulary"),
        ("length", lambda _: -1, "length must not be negative"),
        ("uniforms", shorter, "a draw for each token"),
        ("uniforms", strided, "a draw for each token"),
        ("uniforms", lambda uniforms: uniforms.float(), "a draw for each token"),
        ("top_k", lambda _: 0, "top_k must be positive"),
        ("top_p", lambda _: 0.0, r"top_p in \(0, 1\]"),
        ("top_p", lambda _: 1.5, r"top_p in \(0, 1\]"),
    ],
)
def test_generation_refuses_parts_that_do_not_fit(name: str, change: Change, message: str) -> None:
    arguments = generation()
    assert len(torch.ops.rnnfast.generate_cpu(*arguments.values())[0]) == 9
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rnnfast.generate_cpu(*(arguments | {name: change(arguments[name])}).values())


@pytest.mark.parametrize(
    "layer",
    [
        {"lanes": 2},
        {"dtype": torch.float64},
        {"hidden": 16, "projected": 8},
        {"projected": 5},
        {"ids": True},
        {"inputs": 7},
        {"cell": "gru"},
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 1])
def test_generation_refuses_a_layer_that_does_not_fit(place: int, layer: dict[str, Any]) -> None:
    arguments = generation()
    fitting = {"inputs": 8 if place else 5}
    arguments["packed"][place] = packed_layer(**fitting)
    torch.ops.rnnfast.generate_cpu(*arguments.values())
    arguments["packed"][place] = packed_layer(**fitting | layer)
    with pytest.raises(RuntimeError, match=f"layer {place} does not fit"):
        torch.ops.rnnfast.generate_cpu(*arguments.values())


@pytest.mark.parametrize("embedded", [True, False])
def test_generation_refuses_a_head_of_more_tokens_than_the_first_layer_knows(embedded: bool) -> None:
    arguments = generation()
    if not embedded:
        arguments |= {"embedding": None, "packed": [packed_layer(7, ids=True), packed_layer(8)]}
    torch.ops.rnnfast.generate_cpu(*arguments.values())
    arguments |= {"head_weight": torch.randn(8, 8), "head_bias": torch.randn(8)}
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        torch.ops.rnnfast.generate_cpu(*arguments.values())


def generation() -> dict[str, Any]:
    """Right arguments of the generation loop: two LSTMs between an embedding and a head."""
    arguments: dict[str, Any] = {"packed": [packed_layer(5), packed_layer(8)], "embedding": torch.randn(7, 5)}
    arguments |= {"head_weight": torch.randn(7, 8), "head_bias": torch.randn(7)}
    arguments |= {"h_0": torch.zeros(2, 1, 8), "c_0": torch.zeros(2, 1, 8), "token": 1, "length": 9}
    return arguments | {
        "uniforms": torch.rand(9, dtype=torch.float64),
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
    }


def packed_layer(
    inputs: int,
    hidden: int = 8,
    projected: int = 0,
    cell: str = "lstm",
    lanes: int = 1,
    ids: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    gate_rows, state = (4 if cell == "lstm" else 3) * hidden, projected or hidden
    w_ih = torch.randn(lanes, gate_rows, inputs, dtype=dtype)
    w_hh = torch.randn(lanes, gate_rows, state, dtype=dtype)
    w_hr = torch.randn(lanes, projected, hidden, dtype=dtype) if projected else None
    return torch.ops.rnnfast.scan_cpu_pack(w_ih, w_hh, None, None, w_hr, cell, ids)
