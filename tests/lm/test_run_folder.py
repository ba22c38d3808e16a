"""The folder of a run: what is in it is never lost unasked, and nothing half done is left there."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rnnfast.lm import UserError, train
from rnnfast.lm.checkpoint import FILE_NAME, load
from tests.lm.test_train import SMALL, checkpoint_module, trainer_module


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "perplexity.png"])
def test_files_that_are_no_runs_are_not_replaced(name: str, tmp_path: Path) -> None:
    train(replace(SMALL, epochs=1), tmp_path / "run")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    (folder / "copy.safetensors").write_bytes((tmp_path / "run" / FILE_NAME).read_bytes())
    for out, resume in ((folder, False), (folder / "copy.safetensors", True)):
        with pytest.raises(UserError, match=f"mine holds a {name} but no run, which would replace it: choose another"):
            train(SMALL, out, resume=resume)
    assert (folder / name).read_text() == "mine"
    train(replace(SMALL, epochs=1), folder, overwrite=True)


def test_a_run_goes_on_from_a_copy_of_its_lost_checkpoint(tmp_path: Path) -> None:
    train(replace(SMALL, epochs=1), tmp_path)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((tmp_path / FILE_NAME).read_bytes())
    train(replace(SMALL, epochs=2), tmp_path, resume=True)
    (tmp_path / FILE_NAME).unlink()
    assert len(train(SMALL, copy, resume=True).records) == 4
    (tmp_path / FILE_NAME).unlink()
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"holds a config\.json but no run"):
        train(SMALL, copy, resume=True)


def test_a_log_that_cannot_be_read_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(SMALL, epochs=1), tmp_path)
    (tmp_path / "log.jsonl").unlink()
    train(replace(SMALL, epochs=2), tmp_path, resume=True)
    assert "there is no" in capsys.readouterr().err
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*log\.jsonl: .*; make it readable, or move it away"):
        train(SMALL, tmp_path, resume=True)


def test_a_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    train(replace(SMALL, epochs=1), tmp_path)
    with pytest.raises(UserError, match="--overwrite"):
        train(SMALL, tmp_path)
    with pytest.raises(UserError, match="--resume continues a run, --overwrite replaces it"):
        train(SMALL, tmp_path, resume=True, overwrite=True)
    assert len(train(SMALL, tmp_path, overwrite=True).records) == 4


def test_a_folder_holds_one_run_at_a_time(tmp_path: Path) -> None:
    refused: list[str] = []

    def another_run(line: str) -> None:
        for how in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(UserError, match=r"another run is training in .*: wait until it has ended") as error:
                train(replace(SMALL, hidden_size=9), tmp_path, **how)
            refused.append(str(error.value))

    train(replace(SMALL, epochs=2, sample_every=1), tmp_path, report=another_run)
    assert len(refused) == 6
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert len(train(SMALL, tmp_path, resume=True).records) == 4  # it has ended


KILLED_IN_A_SAVE = """
import os, signal, sys
from pathlib import Path
from rnnfast.files import atomic_write
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
atomic_write(Path(sys.argv[1]), b"half")
"""


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the text"):
        train(replace(SMALL, corpus=str(tmp_path / "none.txt")), tmp_path / "runs" / "mine")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_without_room_for_a_checkpoint_costs_no_training(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        train(replace(SMALL, epochs=1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, data: bytes) -> None:
        raise UserError(f"cannot write {path}")

    steps: list[Any] = []
    monkeypatch.setattr(checkpoint_module, "atomic_write", full)
    monkeypatch.setattr(trainer_module, "train_steps", lambda *args, **options: steps.append(args))
    with pytest.raises(UserError, match=f"cannot write .*{FILE_NAME}"):
        train(replace(SMALL, cell="gru"), tmp_path, overwrite=overwrite)
    assert not steps
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("matplotlib")
def test_a_replaced_run_leaves_nothing_beside_the_new_ones_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(SMALL, epochs=1), tmp_path)

    def crash(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "train_steps", crash)
        with pytest.raises(ZeroDivisionError):
            train(replace(SMALL, cell="gru"), tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {FILE_NAME, "config.json", "log.jsonl"}
    assert load(tmp_path).config["cell"] == json.loads((tmp_path / "config.json").read_text())["cell"] == "gru"
    # A checkpoint that is named goes on as the folder's from the start, too.
    train(replace(SMALL, epochs=1), tmp_path / "other")
    (tmp_path / "other" / FILE_NAME).rename(tmp_path / "rnn.safetensors")
    train(replace(SMALL, epochs=2, cell="gru"), tmp_path, overwrite=True)
    monkeypatch.setattr(trainer_module, "train_steps", crash)
    with pytest.raises(ZeroDivisionError):
        train(SMALL, tmp_path / "rnn.safetensors", resume=True, overwrite=True)
    assert load(tmp_path).config["cell"] == json.loads((tmp_path / "config.json").read_text())["cell"] == "rnn"


def test_what_a_killed_save_leaves_is_removed_by_the_folders_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (FILE_NAME, "results.json"):
        killed = subprocess.run([sys.executable, "-c", KILLED_IN_A_SAVE, str(tmp_path / name)], check=False)
        assert killed.returncode == -signal.SIGKILL
    checkpoint, other = sorted(tmp_path.iterdir())
    assert checkpoint.read_bytes() == other.read_bytes() == b"half"
    with monkeypatch.context() as patch:

        def fail(*arguments: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        patch.setattr("fcntl.flock", fail)
        train(replace(SMALL, epochs=1), tmp_path)
    assert "cannot be locked" in capsys.readouterr().err
    assert checkpoint.exists()  # another run may be writing it
    train(replace(SMALL, epochs=2), tmp_path, resume=True)
    assert not checkpoint.exists()
    assert other.exists()  # other programs may write other files here
