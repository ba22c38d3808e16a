"""Checkpoints: what is written comes back, and nothing else is opened."""

import errno
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

import rnnfast
from rnnfast.lm import TrainConfig, UserError, load_model, train
from rnnfast.lm.checkpoint import FILE_NAME, load

CONFIG = TrainConfig(corpus="pydoc", max_tokens=500, hidden_size=8, batch_size=4, steps=10, epochs=1, sample_every=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train(CONFIG, tmp_path / "run")
    return tmp_path / "run"


def rewrite(path: Path, metadata: dict[str, str | None], **tensors: torch.Tensor) -> None:
    """The same checkpoint with other metadata (None: without that entry) and tensors."""
    with safetensors.safe_open(path, "pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        new = {key: value for key, value in (file.metadata() | metadata).items() if value is not None}
    path.write_bytes(safetensors.torch.save(old | tensors, new))


@pytest.mark.parametrize(
    "settings",
    [
        {"scratch": True},
        {"cell": "lstm", "num_layers": 2},
        {"cell": "gru", "embedding_size": 8, "tie_weights": True},
        {"bidirectional": True},
    ],
    ids=str,
)
def test_a_model_comes_back(settings: dict[str, Any], tmp_path: Path) -> None:
    result = train(replace(CONFIG, **settings), tmp_path)
    before = torch.get_rng_state()
    for path in (tmp_path, str(tmp_path / FILE_NAME)):
        model, vocab, config, progress = load_model(path)
        assert {k: v.tolist() for k, v in model.state_dict().items()} == {
            k: v.tolist() for k, v in result.model.state_dict().items()
        }
        assert vocab.idx_to_token == result.vocab.idx_to_token
        assert config == result.config
        assert progress["epoch"] == 1
        assert not model.training
    assert torch.equal(before, torch.get_rng_state())
    if settings.get("tie_weights"):
        assert model.head.weight is model.embedding.weight


def test_it_is_plain_safetensors_with_a_json_header(run: Path) -> None:
    with safetensors.safe_open(run / FILE_NAME, "pt") as file:
        assert json.loads(file.metadata()["config"])["hidden_size"] == 8
        assert file.get_tensor("model.rnn.weight_hh_l0").shape == (8, 8)


def test_letters_of_a_vocabulary_are_no_escapes(run: Path) -> None:
    saved = load(run)
    saved.vocab[1:3] = ["語", '"\\\n']
    saved.config["prefix"] = "\udcff"  # a byte of the command line that is not UTF-8
    saved.save(run / FILE_NAME)
    assert "語".encode() in (run / FILE_NAME).read_bytes()
    assert load(run).vocab == saved.vocab
    assert load(run).config == saved.config
    rewrite(run / FILE_NAME, {"vocab": json.dumps(saved.vocab)})  # as earlier ones were written
    assert load(run).vocab == saved.vocab


def test_a_vocabulary_too_large_for_a_header(run: Path) -> None:
    before = (run / FILE_NAME).read_bytes()
    saved = load(run)
    saved.vocab += ["a" * 50_000_000, "b" * 50_000_000]
    with pytest.raises(
        UserError, match=r"vocabulary of \d+ tokens is too large .*: .*--min-freq, or take --tokens char"
    ):
        saved.save(run / FILE_NAME)
    assert (run / FILE_NAME).read_bytes() == before


def test_missing(tmp_path: Path) -> None:
    assert UserError is rnnfast.UserError
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*No such file"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match=FILE_NAME):
        load(tmp_path)  # a folder without one
    with pytest.raises(UserError, match="begins with a home folder that cannot be found"):
        load("~nosuch/run")
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*null byte"):
        load("a\0b")


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.1, 0.5, 0.99])
def test_truncated(run: Path, share: float) -> None:
    path = run / FILE_NAME
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_model(run)


def test_truncated_where_its_first_byte_is_a_pickles(tmp_path: Path) -> None:
    """The low byte of its header's length, which safetensors makes a multiple of eight."""
    (tmp_path / FILE_NAME).write_bytes((0x880).to_bytes(8, "little") + b'{"weight": ')
    with pytest.raises(UserError, match="truncated or damaged"):
        load_model(tmp_path)


def test_another_format_version(run: Path) -> None:
    rewrite(run / FILE_NAME, {"version": "99"})
    with pytest.raises(UserError, match="format version 99, this rnnfast reads version 1"):
        load_model(run)


def test_a_stranger(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no rnnfast checkpoint"):
        load_model(tmp_path / "model.safetensors")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["pickle", "old pickle", "torch", "torch, legacy"])
def test_pickled_code_is_never_executed(kind: str, tmp_path: Path) -> None:
    path, witness = tmp_path / FILE_NAME, tmp_path / "executed"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(witness)))
    elif kind == "old pickle":
        path.write_bytes(pickle.dumps(Payload(witness), protocol=0))
    else:
        torch.save(Payload(witness), path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(UserError, match="is no checkpoint" if kind == "old pickle" else "pickle"):
        load_model(tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": "{"}, "damaged"),
        ({"config": "[]"}, "damaged"),
        ({"config": "{}"}, "does not fit"),
        ({"config": "[" * 10**5}, "damaged"),
        ({"config": '{"hidden_size": 1' + "0" * 30 + "}"}, "--hidden-size must be below 2\\^40"),
        ({"config": '{"speed": 3, "another": 4}'}, r"does not know \(another, speed\)"),
        ({"config": None}, "damaged"),
        ({"vocab": '["<unk>", 3]'}, "vocabulary"),
        ({"vocab": '["<unk>"]'}, "does not fit"),
        ({"vocab": '["a", "<unk>"]'}, "vocabulary"),
        ({"vocab": '["<unk>", "a", "a"]'}, "vocabulary"),
        ({"progress": "3"}, "damaged"),
    ],
)
def test_damaged_headers(run: Path, metadata: dict[str, str | None], message: str) -> None:
    rewrite(run / FILE_NAME, metadata)
    with pytest.raises(UserError, match=message):
        load_model(run)


def test_settings_from_elsewhere_are_checked(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    for changed in (
        {"hidden_size": 10**12},
        {"num_layers": "8"},
        {"cell": "cnn"},
        {"dropout": None},
        {"corpus": "\ud800"},
    ):
        rewrite(run / FILE_NAME, {"config": json.dumps(config | changed)})
        with pytest.raises(UserError, match=r"cannot be built|settings"):
            load_model(run)


def test_a_size_from_a_damaged_file_takes_no_memory(run: Path) -> None:
    config = CONFIG.to_json() | {"hidden_size": 1 << 30}  # its weights would be 4 EiB
    rewrite(run / FILE_NAME, {"config": json.dumps(config)})
    with pytest.raises(UserError, match="does not fit its own configuration"):
        load_model(run)


def test_a_setting_that_a_file_lacks_has_its_default(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config.pop("precision") == "float32"
    rewrite(run / FILE_NAME, {"config": json.dumps(config)})
    assert load_model(run).config.precision == "float32"
    assert len(train(replace(CONFIG, epochs=2), run, resume=True).records) == 2


def test_tensors_that_do_not_fit(run: Path) -> None:
    rewrite(run / FILE_NAME, {}, **{"model.head.bias": torch.zeros(3)})
    with pytest.raises(UserError, match=r"shape of head\.bias"):
        load_model(run)
    rewrite(run / FILE_NAME, {}, **{"model.more": torch.zeros(3)})
    with pytest.raises(UserError, match="more"):
        load_model(run)


def test_missing_progress_does_not_resume(run: Path) -> None:
    rewrite(run / FILE_NAME, {"progress": "{}"})
    with pytest.raises(UserError, match="cannot be resumed"):
        train(replace(CONFIG, epochs=2), run, resume=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"epoch": "1"},
        {"epoch": -1},
        {"epoch": True},
        {"step": -3},
        {"step": 1000},
        {"step": 0.5},
        {"tokens": "a"},
        {"tokens": 10**20},
        {"seconds": "a"},
        {"seconds": float("nan")},
        {"seconds": 2**62},
        {"scheduler_steps": "x"},
        {"step": 1},  # without a carried state
    ],
    ids=str,
)
def test_damaged_progress_does_not_resume(changed: dict[str, Any], tmp_path: Path) -> None:
    config = replace(CONFIG, warmup=3)
    train(config, tmp_path)
    rewrite(tmp_path / FILE_NAME, {"progress": json.dumps(load(tmp_path).progress | changed)})
    with pytest.raises(UserError, match="cannot be resumed"):
        train(replace(config, epochs=2), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("cell", "tensors"),
    [
        ("gru", {"carry.0": torch.zeros(1, 4, 9)}),
        ("gru", {"carry.0": torch.zeros(1, 4, 8, dtype=torch.int64)}),
        ("lstm", {"carry.0": torch.zeros(1, 4, 8)}),
        ("gru", {"optimizer.0.exp_avg": torch.zeros(3), "carry.0": torch.zeros(1, 4, 8)}),
        ("gru", {"loss_sum": torch.zeros(2), "carry.0": torch.zeros(1, 4, 8)}),
    ],
)
def test_damaged_state_does_not_resume(cell: Any, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    config = replace(CONFIG, cell=cell, optimizer="adamw")
    train(config, tmp_path)
    rewrite(tmp_path / FILE_NAME, {"progress": json.dumps(load(tmp_path).progress | {"step": 1})}, **tensors)
    with pytest.raises(UserError, match="cannot be resumed"):
        train(replace(config, epochs=2), tmp_path, resume=True)


@pytest.mark.parametrize("name", ["optimizer.0.exp_avg", "optimizer.2.step"])
def test_a_missing_state_of_the_optimizer_does_not_resume(name: str, tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="adamw")
    train(config, tmp_path)
    saved = load(tmp_path)
    del saved.tensors[name]
    saved.save(tmp_path / FILE_NAME)
    with pytest.raises(UserError, match=r"cannot be resumed from it \(of the optimizer's states some are missing\)"):
        train(replace(config, epochs=2), tmp_path, resume=True)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_keeps_the_previous_checkpoint(run: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    saved = load(run)
    saved.config["hidden_size"] = 99

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(UserError, match=r"No space left on device .*still the previous one"):
            saved.save(run / FILE_NAME)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    saved.save(run / FILE_NAME)
    assert load(run).config["hidden_size"] == 99


def test_files_have_the_users_permissions(run: Path) -> None:
    (run / "plain").touch()
    assert (run / FILE_NAME).stat().st_mode == (run / "plain").stat().st_mode
