"""Cases: they are compared before they are timed, their operations are counted right, and the peers agree."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rnnfast import lm
from rnnfast.bench import chapter, layers, measure, pipeline
from rnnfast.bench.layers import (
    BOTH,
    FORWARD,
    Contestant,
    LayerCase,
    check_parity,
    contestants,
    measure_loop,
    set_up,
)
from rnnfast.bench.measure import Disagreement
from rnnfast.bench.report import OURS, TORCH
from rnnfast.bench.scan import ScanCase, measure_scan
from rnnfast.bench.stream import measure_stream, stream_case

CASE = LayerCase("lstm", hidden_size=8, batch=3, steps=5, inputs=4)


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("kind", [{}, {"packed": True}, {"token_ids": True}, {"packed": True, "token_ids": True}])
def test_ours_agrees_with_torch(cell: str, direction: str, kind: dict[str, Any]) -> None:
    case = replace(CASE, cell=cell, direction=direction, **kind)
    setup = set_up(case, "reference")
    check_parity(case, contestants(setup))


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_results_are_all_outputs_and_gradients(direction: str) -> None:
    found = contestants(set_up(replace(CASE, direction=direction), "reference"))[OURS]
    names = {"output", "h_n", "c_n"}
    if direction == BOTH:
        names |= {f"d_{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")} | {"d_input"}
    assert found.results(found.call()).keys() == names


@pytest.mark.parametrize("what", ["output", "h_n", "c_n", "d_weight_ih_l0", "d_bias_hh_l0", "d_input"])
def test_a_wrong_peer_is_not_timed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is wrong in a single number of a single result stops the benchmark, before any timing."""
    setup = set_up(CASE, "reference")
    right = contestants(setup)[TORCH]

    def wrong(result: object) -> dict[str, torch.Tensor]:
        results = {name: tensor.clone() for name, tensor in right.results(result).items()}
        results[what].view(-1)[0] += 1.0
        return results

    def never(*_: object, **__: object) -> None:
        raise AssertionError("timed all the same")

    monkeypatch.setattr(layers, "alternate_with_limits", never)
    monkeypatch.setattr(layers, "contestants", lambda *_: {TORCH: right, "peer": Contestant(right.call, wrong)})
    with pytest.raises(Disagreement, match=f"peer's {what} differs"):
        layers.measure_layer(CASE, 0.0)


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize(("package", "direction"), [("onnxruntime", FORWARD), ("jax", FORWARD), ("jax", BOTH)])
def test_peers_agree(package: str, direction: str, cell: str) -> None:
    pytest.importorskip(package)
    case = replace(CASE, cell=cell, direction=direction)
    found = contestants(set_up(case, "reference"), peers=True)
    if package not in found:
        pytest.skip("JAX takes part only where torch has as many threads as there are cores")
    check_parity(case, {name: found[name] for name in (TORCH, package)})


def test_peers_do_not_enter_what_they_cannot_do() -> None:
    for case in (replace(CASE, packed=True), replace(CASE, dtype="bfloat16"), replace(CASE, token_ids=True)):
        assert contestants(set_up(case, "reference"), peers=True).keys() == {OURS, TORCH}


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
def test_loops_of_cells_agree(cell: str) -> None:
    row = measure_loop(replace(CASE, cell=cell), seconds=0.0, backend="reference")
    assert row.samples.keys() == {OURS, TORCH}


def test_operations_are_counted() -> None:
    case = LayerCase("gru", hidden_size=10, batch=2, steps=3, direction=FORWARD, inputs=4)
    assert case.work.flops == 2 * 6 * 3 * 10 * (10 + 4)
    assert replace(case, token_ids=True).work.flops == 2 * 6 * 3 * 10 * 10
    assert replace(case, direction=BOTH).work.flops == 3 * case.work.flops
    assert replace(case, steps=8, packed=True).lengths() == [8, 1]
    assert replace(case, steps=8, packed=True).work.flops == case.work.flops / 6 * 9
    assert ScanCase("lstm", 10, 2, 3, "backward").work.flops == 2 * 6 * 4 * 10 * 10


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_scan_alone(direction: str) -> None:
    row = measure_scan(ScanCase("lstm", 8, 2, 3, direction), seconds=0.0, backend="reference")
    assert row.backend == "reference"
    assert row.samples[OURS].median > 0
    assert row.gflops == pytest.approx(2 * 6 * 4 * 64 / row.samples[OURS].median / 1e9)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_streams_come_to_the_same_state(cell: str) -> None:
    row = measure_stream(stream_case(cell, 8), seconds=0.0, backend="reference")
    assert {OURS, TORCH} <= row.samples.keys()


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> lm.Corpus:
    corpus = lm.load_corpus("pydoc", max_tokens=1_300)  # a batch
    monkeypatch.setattr(pipeline, "load_text", lambda: corpus)
    return corpus


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_the_chapter_trains_the_same_model(cell: str, text: lm.Corpus) -> None:
    case = pipeline.PipelineCase(cell, 16, "training")
    pipeline.check_training(case, text, "reference")


def test_another_step_is_another_model(text: lm.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def halve_gradients(model: chapter.ChapterModel, _: float) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= 2

    monkeypatch.setattr(chapter, "clip_gradients", halve_gradients)
    with pytest.raises(Disagreement, match=r"rnnfast's (loss|parameter .) differs"):
        pipeline.check_training(pipeline.PipelineCase("rnn", 16, "training"), text, "reference")


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_generation_is_compared_and_timed(cell: str, text: lm.Corpus) -> None:
    case = pipeline.PipelineCase(cell, 16, "generation", length=5)
    row = pipeline.measure_generation(case, seconds=0.0, backend="reference")
    assert row.rate == pytest.approx(5 / row.samples[OURS].median)
    assert row.backend == "reference"


def test_training_is_timed_in_tokens(text: lm.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.PipelineCase, "config", _short_config)
    monkeypatch.setattr(pipeline, "EPOCHS", 1)
    monkeypatch.setattr(measure, "MIN_TURNS", 1)
    row = pipeline.measure_training(pipeline.PipelineCase("rnn", 8, "training"), 0.0, "reference")
    assert row.tokens == 32 * 35


def _short_config(case: pipeline.PipelineCase, corpus: str, backend: str) -> lm.TrainConfig:
    options = {"cell": case.cell, "hidden_size": case.hidden_size, "backend": backend, "max_tokens": 1_300}
    return lm.TrainConfig(corpus=corpus, device="cpu", sample_every=0, epochs=pipeline.EPOCHS, **options)  # type: ignore[arg-type]
