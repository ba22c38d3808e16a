"""Training: it learns, it is reproducible, and it resumes bit for bit."""

import importlib
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rnnfast.lm import Interrupted, TrainConfig, UserError, load_corpus, train, train_steps
from rnnfast.lm.checkpoint import FILE_NAME, load
from rnnfast.lm.trainer import Trainer

checkpoint_module = importlib.import_module("rnnfast.lm.checkpoint")
train_module = importlib.import_module("rnnfast.lm.train")
trainer_module = importlib.import_module("rnnfast.lm.trainer")
SMALL = TrainConfig(corpus="pydoc", max_tokens=1500, hidden_size=16, batch_size=4, steps=10, epochs=4, sample_every=0)

# Every part of a run's state is in at least one of these.
RUNS = {
    # Its weights lie column by column, and so do their states in the optimizer.
    "scratch, adamw": replace(SMALL, scratch=True, optimizer="adamw", lr=0.01),
    "lstm, sequential": replace(SMALL, cell="lstm"),
    "gru, random batches": replace(SMALL, cell="gru", random_batches=True),
    "adamw, cosine, dropout, layers, validation": replace(
        SMALL,
        cell="gru",
        num_layers=2,
        dropout=0.3,
        embedding_size=16,
        tie_weights=True,
        optimizer="adamw",
        lr=0.01,
        schedule="cosine",
        warmup=5,
        weight_decay=0.1,
        validation=0.2,
    ),
    "words, raw": replace(SMALL, tokens="word", raw=True, min_freq=2, random_batches=True, prefix="the"),
    "bidirectional": replace(SMALL, bidirectional=True),
    "bfloat16": replace(SMALL, cell="lstm", precision="bfloat16", validation=0.2),
}
runs = pytest.mark.parametrize("config", RUNS.values(), ids=RUNS.keys())


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def without_speed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]


@runs
def test_a_seed_reproduces_a_run_exactly(config: TrainConfig) -> None:
    first, again = train(config), train(config)
    assert_same_parameters(first.model, again.model)
    assert without_speed(first.records) == without_speed(again.records)
    other = train(replace(config, seed=1))
    assert other.perplexity != first.perplexity


@runs
def test_interrupted_anywhere_it_resumes_bit_for_bit(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(config, tmp_path / "straight")
    assert len(straight.records) == 4
    # Ctrl-C once in the middle of an epoch and once behind an epoch's last step.
    num_steps = []

    def interrupting(*args: Any, **options: Any) -> Any:
        num_steps.append(1)
        if len(num_steps) in (stop_at, 2 * stop_at):
            os.kill(os.getpid(), signal.SIGINT)
        return train_steps(*args, **options)

    monkeypatch.setattr(trainer_module, "train_steps", interrupting)
    monkeypatch.setattr(trainer_module, "SECONDS_AT_ONCE", 0.0)  # one at a time, as they were not before
    stop_at, handler = 35, signal.getsignal(signal.SIGINT)
    for resume in (False, True):
        with pytest.raises(Interrupted, match="--resume") as caught:
            train(config, tmp_path / "parts", resume=resume)
        assert caught.value.signum == signal.SIGINT
    parts = train(config, tmp_path / "parts", resume=True)
    assert_same_parameters(straight.model, parts.model)
    assert without_speed(straight.records) == without_speed(parts.records)
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert without_speed(log) == without_speed(straight.records)
    assert load(tmp_path / "parts").progress["tokens"] == load(tmp_path / "straight").progress["tokens"]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("name", ["scratch, adamw", "lstm, sequential", "gru, random batches"])
def test_four_epochs_equal_two_and_two(name: str, tmp_path: Path) -> None:
    config = RUNS[name]
    straight = train(config)
    train(replace(config, epochs=2), tmp_path)
    resumed = train(config, tmp_path, resume=True)
    assert_same_parameters(straight.model, resumed.model)
    with pytest.raises(UserError, match="finished its 4 epochs"):
        train(config, tmp_path, resume=True)


def test_a_checkpoint_named_by_its_file_is_the_one_that_goes_on(tmp_path: Path) -> None:
    straight = train(SMALL, tmp_path)
    two_epochs = tmp_path / "two.safetensors"
    train(replace(SMALL, epochs=2), tmp_path / "other")
    (tmp_path / "other" / FILE_NAME).rename(two_epochs)
    with pytest.raises(
        UserError, match=r"holds a run already: --overwrite replaces it by the one that two\.safetensors"
    ):
        train(SMALL, two_epochs, resume=True)
    assert load(tmp_path).progress["epoch"] == 4
    resumed = train(SMALL, two_epochs, resume=True, overwrite=True)
    assert_same_parameters(straight.model, resumed.model)
    assert [record["epoch"] for record in resumed.records] == [1, 2, 3, 4]  # the log is the folder's
    assert load(tmp_path).progress["epoch"] == 4
    assert load(two_epochs).progress["epoch"] == 2


def test_a_run_that_replaces_another_has_a_log_of_its_own(tmp_path: Path) -> None:
    train(replace(SMALL, epochs=3), tmp_path / "a")
    train(replace(SMALL, cell="gru", epochs=2), tmp_path / "b")
    copy = (tmp_path / "b" / FILE_NAME).rename(tmp_path / "a" / "copy.safetensors")
    resumed = train(replace(SMALL, cell="gru"), copy, resume=True, overwrite=True)
    assert [record["epoch"] for record in resumed.records] == [3, 4]
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [3, 4]
    assert load(tmp_path / "a").config["cell"] == "gru"


def test_a_log_of_the_same_settings_and_another_text_is_another_runs(tmp_path: Path) -> None:
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for text, words in zip(texts, ("some words of a text ", "other words, and a text "), strict=True):
        text.write_text(words * 60)
    one, two = (replace(SMALL, corpus=str(text), epochs=2) for text in texts)
    train(one, tmp_path / "a")
    train(two, tmp_path / "b")
    copy = (tmp_path / "b" / FILE_NAME).rename(tmp_path / "a" / "copy.safetensors")
    resumed = train(replace(two, epochs=3), copy, resume=True, overwrite=True)
    assert [record["epoch"] for record in resumed.records] == [3]


def test_a_copy_that_was_killed_as_it_replaced_a_run_takes_no_log_of_it(tmp_path: Path) -> None:
    train(replace(SMALL, epochs=2), tmp_path / "a")
    train(replace(SMALL, cell="gru", epochs=2), tmp_path / "b")
    (tmp_path / "b" / FILE_NAME).replace(tmp_path / "a" / FILE_NAME)  # as far as it had come
    resumed = train(replace(SMALL, cell="gru"), tmp_path / "a", resume=True)
    assert [record["epoch"] for record in resumed.records] == [3, 4]


def test_a_copy_replaces_a_damaged_checkpoint(tmp_path: Path) -> None:
    train(replace(SMALL, epochs=2), tmp_path)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((tmp_path / FILE_NAME).read_bytes())
    (tmp_path / FILE_NAME).write_bytes(copy.read_bytes()[:1000])
    with pytest.raises(UserError, match="holds a run already"):
        train(SMALL, copy, resume=True)
    assert len(train(SMALL, copy, resume=True, overwrite=True).records) == 2
    assert load(tmp_path).progress["epoch"] == 4


def test_a_checkpoint_that_does_not_know_the_time_of_its_epoch(tmp_path: Path) -> None:
    train(replace(SMALL, epochs=2), tmp_path)
    saved = load(tmp_path)
    del saved.progress["epoch_seconds"]
    saved.save(tmp_path / FILE_NAME)
    assert len(train(SMALL, tmp_path, resume=True).records) == 4


def test_the_speed_of_an_epoch_is_of_all_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it was interrupted behind its last step, as that of a small model always is."""
    calls = []

    def interrupting(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # all steps but the first
            os.kill(os.getpid(), signal.SIGINT)
        return train_steps(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "train_steps", interrupting)
        patch.setattr(trainer_module, "LOOK_EVERY", 10**6)
        patch.setattr(trainer_module, "SECONDS_AT_ONCE", 1000.0)
        with pytest.raises(Interrupted):
            train(SMALL, tmp_path)
    progress = load(tmp_path).progress
    assert progress["epoch"] == 0
    assert 0 < progress["epoch_seconds"] == progress["seconds"]
    first, *_ = train(SMALL, tmp_path, resume=True).records
    assert 0 < first["tokens_per_second"] < 1.01 * progress["tokens"] / progress["epoch_seconds"]


@pytest.mark.usefixtures("matplotlib")
def test_a_warm_up_longer_than_the_run_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(SMALL, epochs=1, warmup=10_000))
    assert re.search(r"--warmup 10,000 is longer than the run, of \d+ steps: it never reaches", capsys.readouterr().err)
    train(replace(SMALL, epochs=1, warmup=2))
    assert "warmup" not in capsys.readouterr().err


def test_a_log_ahead_of_its_checkpoint_is_cut_back(tmp_path: Path) -> None:
    train(replace(SMALL, epochs=2), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:  # as a crash behind epoch 3, before its checkpoint, leaves it
        file.write('{"epoch": 3, "perplexity": 1.0}\n')
    records = train(SMALL, tmp_path, resume=True).records
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert records[2]["perplexity"] > 1.0


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("torn", ['{"epoch": 2, "perpl', "3", '"epoch"', "{}", '{"epoch": "2"}', "\xff"])
def test_a_torn_line_of_the_log_costs_only_what_follows(
    torn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(SMALL, epochs=3), tmp_path)
    log = tmp_path / "log.jsonl"
    first, _, third = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([first, torn.encode("latin1"), third]))
    records = train(SMALL, tmp_path, resume=True).records
    assert [record["epoch"] for record in records] == [1, 4]
    message = f"line 2 of {log} is damaged: the log continues from the lines before it"
    assert capsys.readouterr().err == f"rnnfast: {message}\n"


@pytest.mark.usefixtures("matplotlib")
def test_an_infinite_perplexity_is_null_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    config = replace(SMALL, validation=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "evaluate", lambda *args: math.inf)
        patch.setattr(trainer_module, "perplexity", lambda loss: math.inf)
        train(replace(config, epochs=2), tmp_path)
    records = train(config, tmp_path, resume=True).records
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    for key in ("perplexity", "validation_perplexity"):
        logged = [json.loads(line, parse_constant=refuse)[key] for line in lines]
        assert logged[:2] == [None, None]
        assert [record[key] for record in records] == [math.inf, math.inf, *logged[2:]]


def test_only_the_same_run_resumes(tmp_path: Path) -> None:
    train(replace(SMALL, epochs=1), tmp_path)
    with pytest.raises(UserError, match="--hidden-size, --lr"):
        train(replace(SMALL, lr=0.5, hidden_size=8), tmp_path, resume=True)
    train(replace(SMALL, epochs=1, schedule="cosine"), tmp_path / "cosine")
    with pytest.raises(UserError, match=r"--epochs decides every learning rate .* began with 1:"):
        train(replace(SMALL, schedule="cosine"), tmp_path / "cosine", resume=True)
    with pytest.raises(UserError, match="finished its 1 epochs: start a new run"):
        train(replace(SMALL, epochs=1, schedule="cosine"), tmp_path / "cosine", resume=True)
    text = tmp_path / "text.txt"
    text.write_text("another text " * 500)
    with pytest.raises(UserError, match="not the one this run was trained on"):
        train(replace(SMALL, corpus=str(text)), tmp_path, resume=True)


def test_what_is_held_out_is_part_of_the_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 60 + "of words some text a " * 20)
    config = replace(SMALL, corpus=str(text), max_tokens=-1, validation=0.25)
    train(replace(config, epochs=1), tmp_path / "run")
    text.write_text("some words of a text " * 60 + "text a of some words " * 20)
    with pytest.raises(UserError, match="not the one this run was trained on"):
        train(config, tmp_path / "run", resume=True)


def test_a_carried_state_comes_back_into_memory_of_its_own() -> None:
    """In that of a file, which is aligned to 8 bytes, the products of other libraries may round otherwise."""
    config = replace(SMALL, cell="gru")
    trainer = Trainer(config, load_corpus("pydoc", max_tokens=config.max_tokens))
    trainer.carry, trainer.step = torch.randn(1, config.batch_size, config.hidden_size), 1
    saved = trainer.checkpoint()
    memory = torch.empty(trainer.carry.numel() + 2)[2:].view_as(trainer.carry)
    saved.tensors["carry.0"] = memory.copy_(trainer.carry)
    trainer.restore(saved, Path("here"))
    assert torch.equal(trainer.carry, memory)
    assert trainer.carry.data_ptr() % 64 == 0


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return train_steps(*args, **options)

    monkeypatch.setattr(trainer_module, "train_steps", signalled)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(train(replace(SMALL, epochs=1), tmp_path).records) == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_log_has_the_rate_that_an_epoch_ended_with() -> None:
    records = train(replace(SMALL, schedule="cosine", lr=0.5)).records
    assert 0.5 > records[0]["lr"] > records[1]["lr"] > records[2]["lr"] > records[3]["lr"] > 0


def test_numbers_of_numpy_are_settings() -> None:
    numpy = pytest.importorskip("numpy")
    config = replace(SMALL, hidden_size=numpy.int64(8), lr=numpy.float32(0.5), clip=numpy.float64(1.0))
    assert config == replace(SMALL, hidden_size=8, lr=0.5, clip=1.0)
    assert json.loads(json.dumps(config.to_json()))["hidden_size"] == 8


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(scratch=True, hidden_size=64, epochs=35),
        TrainConfig(cell="gru", hidden_size=32, epochs=12, optimizer="adamw", lr=0.02, schedule="cosine"),
    ],
    ids=["scratch", "gru, adamw"],
)
@pytest.mark.usefixtures("matplotlib")
def test_it_learns(config: TrainConfig, time_machine: str, tmp_path: Path) -> None:
    config = replace(config, corpus="timemachine", max_tokens=3000, batch_size=8, steps=20, sample_every=0)
    result = train(config, tmp_path)
    assert result.records[0]["perplexity"] > 15
    assert result.perplexity < 9
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == config.hidden_size


def test_validation_and_sample_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    result = train(replace(SMALL, epochs=2, sample_every=2, validation=0.2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert all(part in lines[0] for part in ("validation", "tokens/s", "time traveller"))
    assert result.records[1]["sample"].startswith("time traveller")
    assert all(record["validation_perplexity"] > 1 for record in result.records)


@pytest.mark.parametrize(("clip", "advice"), [(1e30, r"a smaller --clip \(now 1e\+30\)"), (0.0, "a --clip above 0")])
def test_a_loss_that_is_not_finite_stops_with_what_to_try(tmp_path: Path, clip: float, advice: str) -> None:
    config = replace(SMALL, cell="rnn_relu", lr=1e30, clip=clip)
    with pytest.raises(UserError, match=rf"epoch 1: try a smaller --lr \(now 1e\+30\), {advice}, or"):
        train(config, tmp_path)
    train(replace(SMALL, epochs=1), tmp_path)  # a run that took no step is replaced unasked


def test_parameters_that_are_not_finite_replace_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(replace(SMALL, epochs=1), tmp_path)

    class Diverging(torch.optim.SGD):
        """Of what the epoch's last step does to the parameters no loss knows yet."""

        steps = 0

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.steps += 1
            if self.steps == num_steps:
                self.param_groups[0]["params"][0].data.fill_(math.nan)

    num_steps = len(Trainer(SMALL, load_corpus("pydoc", max_tokens=1500)).batches)
    monkeypatch.setattr(torch.optim, "SGD", Diverging)
    with pytest.raises(UserError, match="parameters are no longer finite in epoch 2: try a smaller --lr"):
        train(replace(SMALL, epochs=2), tmp_path, resume=True)
    assert all(tensor.isfinite().all() for tensor in load(tmp_path).tensors.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "--hidden-size must be at least 1"),
        ({"hidden_size": 10**23}, r"--hidden-size must be below 2\^40"),
        ({"embedding_size": 10**23}, r"--embedding-size must be below 2\^40"),
        ({"hidden_size": None}, "--hidden-size must be of type int, not None"),
        ({"cell": "cnn"}, r"--cell must be of type Literal\['rnn', .*\], not 'cnn'"),
        ({"lr": float("nan")}, "--lr must be a positive number"),
        ({"lr": float("inf")}, "--lr must be a positive number"),
        ({"lr": 4e38}, "--lr must be a positive number below 3.4e38"),
        ({"weight_decay": 4e38}, "--weight-decay must be below 3.4e38"),
        ({"clip": -1.0}, "--clip must be a norm, or 0 for none"),
        ({"clip": float("inf")}, "--clip"),
        ({"save_every": -1.0}, "--save-every must be 0 or more"),
        ({"dropout": 1.0}, "--dropout"),
        ({"validation": 1.0}, "--validation"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"scratch": True, "cell": "gru"}, "--scratch .* --cell"),
        ({"scratch": True, "num_layers": 2}, "--scratch .* --num-layers"),
        ({"scratch": True, "dropout": 0.5}, "--scratch .* --dropout"),
        ({"scratch": True, "embedding_size": 8}, "--scratch .* --embedding-size"),
        ({"scratch": True, "tie_weights": True}, "--scratch .* --tie-weights"),
        ({"scratch": True, "bidirectional": True}, "--scratch .* --bidirectional"),
    ],
)
def test_settings_outside_their_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_texts_that_are_too_short() -> None:
    with pytest.raises(UserError, match=r"there are 40 tokens.*needs 51"):
        train(replace(SMALL, max_tokens=40))
    for share, held_out in ((0.006, 9), (0.0001, 0)):
        with pytest.raises(UserError, match=rf"holds out {held_out} tokens.*needs 11: hold out more, .*--max-tokens"):
            train(replace(SMALL, validation=share))


def test_a_short_validation_text_is_read_in_fewer_rows() -> None:
    config, corpus = replace(SMALL, validation=0.025), load_corpus("pydoc", max_tokens=1500, validation=0.025)
    trainer = Trainer(config, corpus)
    assert trainer.validation is not None
    inputs, targets = trainer.validation
    assert torch.equal(inputs[0].t(), corpus.validation[:36].view(3, 12)[:, :10])
    assert torch.equal(targets[0].t(), corpus.validation[1:].view(3, 12)[:, :10])
    chapters = TrainConfig(corpus="pydoc", validation=0.1, hidden_size=8, epochs=1, sample_every=0)
    assert train(chapters).records[0]["validation_perplexity"] > 1


def test_a_users_text_is_not_cut_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("sixteen letters " * 100)
    config = replace(SMALL, corpus=str(text), max_tokens=1000, epochs=1, prefix="letters")
    message = "rnnfast: using the first 1,000 of 1,599 tokens; --max-tokens -1 takes all\n"
    for settings, said in (({}, message), ({"max_tokens": -1}, ""), ({"corpus": "pydoc"}, "")):
        train(replace(config, **settings))
        assert capsys.readouterr().err == said


def test_without_matplotlib_it_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    train(replace(SMALL, epochs=1), tmp_path)
    assert "rnnfast[plot]" in capsys.readouterr().err
    assert not (tmp_path / "perplexity.png").exists()


@pytest.mark.usefixtures("matplotlib")
def test_a_text_may_have_any_name(tmp_path: Path) -> None:
    text = tmp_path / "$a$ $\\frac$.txt"
    text.write_text("time traveller " * 20)
    train(replace(SMALL, corpus=str(text), epochs=1), tmp_path)
    assert (tmp_path / "perplexity.png").exists()


def test_a_curve_that_cannot_be_drawn_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("no pen")

    monkeypatch.setattr(train_module, "plot", fail)
    train(replace(SMALL, epochs=1), tmp_path)
    assert capsys.readouterr().err == "rnnfast: no perplexity.png: no pen\n"
    assert load(tmp_path).progress["epoch"] == 1


def test_the_defaults_are_the_chapters() -> None:
    c = TrainConfig()
    assert (c.cell, c.hidden_size, c.batch_size, c.steps, c.epochs) == ("rnn", 512, 32, 35, 500)
    assert (c.optimizer, c.lr, c.schedule, c.clip, c.max_tokens) == ("sgd", 1.0, "constant", 1.0, 10_000)


def test_device_and_backend_are_checked_before_the_text_is_read() -> None:
    devices = [({"device": name}, f"--device {name}") for name in ("foo", "meta", "privateuseone")]
    for wrong, message in (*devices, ({"backend": "foo"}, "foo")):
        with pytest.raises(UserError, match=message):
            train(replace(SMALL, corpus="no/such/text.txt", **wrong))
