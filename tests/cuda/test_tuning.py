"""`rnnfast tune` with the emulator in the GPU's place: parity is real, only the times are made up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnfast
from rnnfast import dispatch, table, tuning
from rnnfast.backends import cuda
from rnnfast.backends.cuda import launch
from rnnfast.backends.cuda.launch import Plan
from rnnfast.table import Identity, Point, Regime

CARD = Identity("NVIDIA H200", "580.65", "2.11.0+cu130", {"cuda": "abc", "triton": "def"})
TEAMS = [Plan("block", 1, 8, 4), Plan("cluster", 2, 8, 4), Plan("grid", 2, 8, 4), Plan("steps", 0, 0, 0)]
SECONDS = {"block": 3e-6, "cluster": 1e-6, "grid": 2e-6, "steps": 9e-6, "torch": 5e-6}


class Clock:
    """In the place of `seconds_in_turns`: a call takes what SECONDS says of the kernel that it would run on."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, work: dict[str, Callable[[], object]], budget: float) -> dict[str, dict[str, float]]:
        self.calls.append(sorted(work))
        forward, backward = launch._used
        kernels = {"torch": "torch", "cuda": (backward or forward or TEAMS[0]).kernel}
        return {name: {"median": SECONDS[kernels[name]]} for name in work}


@pytest.fixture
def clock(schedule: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    """A card of few points, where the cuda backend is the emulator."""
    clock, cpu = Clock(), torch.device("cpu")
    monkeypatch.setenv("RNNFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "identity", lambda device: CARD)
    monkeypatch.setattr(tuning, "seconds_in_turns", clock)
    monkeypatch.setattr(tuning, "_cuda_device", lambda device: cpu)
    monkeypatch.setattr(tuning, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tuning, "_synchronize", lambda device: None)
    monkeypatch.setattr(tuning, "HIDDEN", (16,))
    monkeypatch.setattr(tuning, "BATCHES", (3,))
    monkeypatch.setattr(tuning, "COMPUTE_TYPES", {"float32": torch.float32, "bfloat16": torch.bfloat16})
    monkeypatch.setattr(launch, "plans", lambda h_0, cell, backward: TEAMS)
    monkeypatch.setattr(dispatch, "_loaded", set())
    faked = dispatch.BACKENDS["cuda"]._replace(devices=("cpu",), why_not=lambda: None, load=lambda: None)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", faked)
    absent = dispatch.BACKENDS["triton"]._replace(why_not=lambda: "Triton is not installed")
    monkeypatch.setitem(dispatch.BACKENDS, "triton", absent)
    table.forget()
    library = cuda.register("CPU")
    yield clock
    library._destroy()
    table.forget()


def tune(**options: Any) -> tuple[table.Table, list[str]]:
    said: list[str] = []
    return rnnfast.tune(report=said.append, **options), said


def test_the_fastest_right_team_of_each_direction_is_kept(clock: Clock) -> None:
    assert table.of(0).table is None
    made, said = tune()
    assert [(p.cell, p.compute_type) for p in made.points] == [
        (cell, compute_type) for compute_type in ("float32", "bfloat16") for cell in ("rnn_tanh", "lstm", "gru")
    ]
    for point in made.points:
        assert point.failures == {}
        assert point.teams == {"forward": ["cluster", 2, 8, 4], "backward": ["cluster", 2, 8, 4]}
        assert point.microseconds.keys() == {"forward 1", "forward 16", "forward 128", "training 16", "training 128"}
        for times in point.microseconds.values():
            assert times == pytest.approx({"torch": 5.0, "cuda": 1.0})
    assert len(said) == 6
    assert "training 128: cuda  5.00x" in said[0]
    # It is kept, found, and followed: by auto, and by the plan of a backend asked for by name.
    assert table.read(table.path_of(CARD)).points == made.points
    found = table.of(0).table
    assert found is not None
    assert found.ranking(Regime("lstm", "float32", "float32", 16, 3, 20, True)) == ("cuda", "torch")
    problem = ("lstm", 16, 3, 1, "float32")
    assert launch._plan(*problem, False, -1, found)[:4] == TEAMS[1][:4]
    # Beyond what was measured the model decides.
    assert launch._plan("lstm", 4096, 3, 1, "float32", False, -1, found).kernel == "steps"


def lie(monkeypatch: pytest.MonkeyPatch, about: Callable[[str], float]) -> None:
    """Multiplies the output, and the gradient of w_hh, by what `about` says of the kernel that gave them."""
    original = tuning.results

    def results(layer: Any, input: torch.Tensor, gradients: bool = True) -> dict[str, torch.Tensor]:
        found = original(layer, input, gradients)
        if type(layer).__module__.startswith("rnnfast"):
            for name, plan in zip(("output", "d_weight_hh_l0"), launch._used, strict=True):
                if name in found and plan is not None:
                    found[name] = found[name] * about(plan.kernel)
        return found

    monkeypatch.setattr(tuning, "results", results)


def test_a_team_that_is_wrong_is_not_used_however_fast(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lie(monkeypatch, lambda kernel: 1.05 if kernel == "cluster" else 1.0)
    point = Point("gru", "float32", 16, 3)
    tuning.measure(point, ["cuda"], torch.device("cpu"))
    assert point.teams == {"forward": ["grid", 2, 8, 4], "backward": ["grid", 2, 8, 4]}
    assert "cluster of 2: output is off by 5" in point.failures["cuda"]
    assert "cluster of 2: d_weight_hh_l0 is off by 5" in point.failures["cuda"]
    assert point.microseconds["forward 16"] == pytest.approx({"torch": 5.0, "cuda": 2.0})


def test_a_team_that_the_card_refuses_costs_no_other(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "plans", lambda h_0, cell, backward: [Plan("cluster", 2, 8, 99), *TEAMS])
    point = Point("gru", "float32", 16, 3)
    tuning.measure(point, ["cuda"], torch.device("cpu"))
    assert point.teams == {"forward": ["cluster", 2, 8, 4], "backward": ["cluster", 2, 8, 4]}
    assert point.failures["cuda"].count("cluster of 2: it failed: ") == 2
    assert point.microseconds["training 128"] == pytest.approx({"torch": 5.0, "cuda": 1.0})


@pytest.mark.parametrize("factor", [1.05, torch.nan])
def test_a_backend_that_is_wrong_is_not_timed(clock: Clock, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    lie(monkeypatch, lambda kernel: factor)
    point = Point("lstm", "bfloat16", 16, 3)
    tuning.measure(point, ["cuda"], torch.device("cpu"))
    assert point.teams == {}
    assert "off by" in point.failures["cuda"]
    assert all(times.keys() == {"torch"} for times in point.microseconds.values())
    assert clock.calls == [["torch"]] * 5


def test_a_backward_that_is_wrong_leaves_the_forward(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tuning.results

    def results(layer: Any, input: torch.Tensor, gradients: bool = True) -> dict[str, torch.Tensor]:
        found = original(layer, input, gradients)
        if type(layer).__module__.startswith("rnnfast") and gradients:
            found["d_input"] = -found["d_input"]
        return found

    monkeypatch.setattr(tuning, "results", results)
    point = Point("rnn_tanh", "float32", 16, 3)
    tuning.measure(point, ["cuda"], torch.device("cpu"))
    assert point.teams == {"forward": ["cluster", 2, 8, 4]}
    takes_part = {call: set(times) for call, times in point.microseconds.items()}
    assert takes_part["forward 128"] == {"torch", "cuda"}
    assert takes_part["training 128"] == {"torch"}


def test_one_stale_element_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    nn_layer = torch.nn.LSTM(256, 256).bfloat16()
    parity = tuning.Parity(nn_layer, 128, "bfloat16")
    parity.check(nn_layer)
    original = tuning.results
    # Too little to be seen in the RMS. Which element has changed so much depends on the processor: random numbers do.
    too_much = 1.2 * tuning.WORST_TIMES_NN * parity.of_nn["output"][1] * parity.truth["output"].square().mean().sqrt()

    def results(layer: Any, input: torch.Tensor, gradients: bool = True) -> dict[str, torch.Tensor]:
        found = original(layer, input, gradients)
        before, after = found["output"][8], found["output"][9]
        row, unit = divmod(int(((after - before).abs().double() - too_much).abs().argmin()), 256)
        after[row, unit] = before[row, unit]
        return found

    monkeypatch.setattr(tuning, "results", results)
    with pytest.raises(tuning.Wrong, match="an element of output is off by"):
        parity.check(nn_layer)


def test_calls_without_gradients_are_checked_and_each_kind_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    nn_layer, seen = torch.nn.GRU(4, 4), []
    parity = tuning.Parity(nn_layer, 2, "float32")
    monkeypatch.setattr(parity, "check", lambda layer, gradients: seen.append(gradients) or {"output": 0.5})
    assert parity.check_all(nn_layer) == [0.5] * 4
    assert sorted(seen) == [False, False, True, True]


def test_where_torchs_own_errors_are_none_a_few_roundings_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    nn_layer = torch.nn.GRU(4, 4)
    parity = tuning.Parity(nn_layer, 2, "float32")
    parity.of_nn = dict.fromkeys(parity.of_nn, (0.0, 0.0))
    monkeypatch.setattr(parity, "errors", lambda *_: {"output": (2.0**-23, 4 * 2.0**-23)})
    assert parity.check(nn_layer) == {"output": 2.0**-23}
    monkeypatch.setattr(parity, "errors", lambda *_: {"output": (2.0**-23, 8 * 2.0**-23)})
    with pytest.raises(tuning.Wrong, match="an element of output is off by"):
        parity.check(nn_layer)


def test_of_triton_the_kernel_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = lambda *_: None  # noqa: E731
    ready = {"devices": ("cpu",), "why_not": nothing, "load": nothing, "declines": nothing}
    monkeypatch.setitem(dispatch.BACKENDS, "triton", dispatch.BACKENDS["triton"]._replace(**ready))
    monkeypatch.setattr(tuning, "_ours", lambda name, hidden, backend, nn_layer: nn_layer)
    monkeypatch.setattr(tuning, "seconds_in_turns", lambda work, _: {name: {"median": 1e-6} for name in work})
    for hidden, kernel in ((16, "registers"), (300, "resident")):
        point = Point("rnn_tanh", "float32", hidden, 3)
        tuning.measure(point, ["triton"], torch.device("cpu"))
        assert (point.kernel, point.failures) == (kernel, {})
        assert point.microseconds["training 128"] == pytest.approx({"torch": 1.0, "triton": 1.0})


def test_an_error_of_any_kind_costs_the_backend_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own errors are no RuntimeErrors, nor is that of a compiler that fails."""

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("out of resources")

    monkeypatch.setattr(tuning.Parity, "check", fail)
    point = Point("gru", "float32", 16, 3)
    tuning.measure(point, ["cuda"], torch.device("cpu"))
    assert point.failures == {"cuda": "it failed: out of resources"}
    assert all(times.keys() == {"torch"} for times in point.microseconds.values())


def test_a_call_that_fails_when_it_is_timed_costs_the_backend_alone(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tuning._work

    def work(call: str, layer: Any, batch: int) -> Callable[[], object]:
        def fail() -> None:
            raise ValueError("too long")

        is_ours = type(layer).__module__.startswith("rnnfast")
        return fail if is_ours and call == "training 16" else original(call, layer, batch)

    monkeypatch.setattr(tuning, "_work", work)
    point = Point("gru", "float32", 16, 3)
    tuning.measure(point, ["cuda"], torch.device("cpu"))
    assert point.failures == {"cuda": "training 16 failed: too long"}
    takes_part = {call: set(times) for call, times in point.microseconds.items()}
    assert takes_part["forward 16"] == {"torch", "cuda"}
    assert takes_part["training 16"] == takes_part["forward 128"] == {"torch"}


def test_a_backend_that_an_earlier_run_left_out_is_measured_later(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = tune()
    for point in made.points:
        for times in point.microseconds.values():
            del times["cuda"]
        point.teams = {}
    made.points[0].failures["cuda"] = "it did not end"
    made.points[1].microseconds["forward 1"]["triton"] = 3.0
    made.write(table.path_of(CARD))
    again, said = tune()
    assert len(said) == 5  # and not the one that was left out
    assert again.points[0].failures == {"cuda": "it did not end"}
    assert again.points[1].microseconds["forward 1"] == pytest.approx({"torch": 5.0, "cuda": 1.0, "triton": 3.0})
    assert len(again.points) == 6
    assert all(point.teams for point in again.points[1:])


def test_it_goes_on_where_it_stopped(clock: Clock) -> None:
    made, said = tune(minutes=0)
    assert made.points == []
    assert said == ["the time is over; 6 points are left for the next `rnnfast tune`"]
    first, _ = tune()
    first.points.pop()
    first.points[0] = replace(first.points[0], failures={"cuda": "kept"})
    first.write(table.path_of(CARD))
    second, said = tune()
    assert len(said) == 1
    assert second.points[0].failures == {"cuda": "kept"}
    assert len(second.points) == 6
    again, said = tune(anew=True, minutes=0)
    assert again.points == []


def test_a_kernel_that_breaks_the_device_is_not_tried_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    original = tuning._choose_teams

    def choose(point: Point, layer: Any, parity: Any) -> None:
        if point.cell == "lstm":
            monkeypatch.setattr(tuning, "_synchronize", dead)
            dead()
        original(point, layer, parity)

    monkeypatch.setattr(tuning, "_choose_teams", choose)
    with pytest.raises(RuntimeError, match=r"lstm +float32 .* has broken the device .* is kept"):
        tune()
    kept = table.read(table.path_of(CARD)).points
    assert [p.cell for p in kept] == ["rnn_tanh", "lstm"]
    assert "illegal memory access" in kept[1].failures["cuda"]
    assert kept[1].microseconds == {}
    monkeypatch.setattr(tuning, "_synchronize", lambda device: None)
    monkeypatch.setattr(tuning, "_choose_teams", original)
    made, _ = tune()
    assert len(made.points) == 6
    assert made.points[:2] == kept


def test_of_a_point_where_the_device_broke_nothing_is_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever broke it: no backend is tried there again."""

    def measure(point: Point, *_: object) -> None:
        point.teams["forward"] = ["block", 1, 8, 4]
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(tuning, "measure", measure)
    for count in (1, 2):
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            tune()
        kept = table.read(table.path_of(CARD)).points
        assert len(kept) == count
        assert kept[-1].teams == {}
        assert kept[-1].failures == {"cuda": "CUDA error: unspecified launch failure"}


def test_what_torch_itself_has_no_memory_for_is_left_out(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(point: Point, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "measure", measure)
    made, said = tune()
    assert made.points == []
    assert all("left out, it does not fit the card's memory" in line for line in said)


def test_a_damaged_table_is_made_anew(clock: Clock) -> None:
    path = table.path_of(CARD)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    made, said = tune()
    assert said[0].startswith(f"{path} is made anew")
    assert len(made.points) == 6


def test_what_cannot_be_measured_is_an_error(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="only cuda and triton can be tuned, not 'cpu'"):
        tune(backends=["cpu"])
    with pytest.raises(RuntimeError, match="nothing to tune; triton: Triton is not installed"):
        tune(backends=["cuda", "triton"])
    absent = dispatch.BACKENDS["cuda"]._replace(why_not=lambda: "nvcc was not found")
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", absent)
    with pytest.raises(RuntimeError, match="cuda: nvcc was not found; triton: Triton is not installed"):
        tune()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli = pytest.importorskip("rnnfast.cli")
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err == ("rnnfast: error: tuning measures kernels on a GPU, and PyTorch sees none here\n")
    with pytest.raises(RuntimeError, match="sees none here"):
        rnnfast.tune()


def test_the_command(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    cli = pytest.importorskip("rnnfast.cli")
    assert cli.main(["tune", "--minutes", "1", "--backends", "cuda"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7
    assert printed[-1] == ("of 30 calls measured on NVIDIA H200 fastest: cuda in 30, triton in 0; auto follows this")


@pytest.mark.parametrize(
    ("compute_type", "of_nn", "forward", "allowed"),
    [
        ("float32", 1e-6, True, 2e-6),
        ("float32", 0.0, False, 2.0**-22),
        ("tf32", 0.0, True, 2.0**-9),
        ("bfloat16", 0.002, True, 0.003),
        ("bfloat16", 0.004, True, 0.005),
        ("bfloat16", 0.004, False, 0.006),
        ("float16", 0.0, False, 0.0),
    ],
)
def test_the_error_allowed(compute_type: str, of_nn: float, forward: bool, allowed: float) -> None:
    assert tuning.allowed_error(compute_type, of_nn, forward) == pytest.approx(allowed)
