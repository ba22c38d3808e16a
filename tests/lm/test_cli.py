"""The command line: what it prints, and one clear line for bad input."""

import errno
import importlib
import io
import os
import pickle
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnfast
from rnnfast import cli
from rnnfast.cli import main
from rnnfast.lm import TrainConfig
from rnnfast.lm.checkpoint import FILE_NAME, Checkpoint, load

TINY = ["--corpus", "pydoc", "--max-tokens", "500", "--hidden-size", "8", "--batch-size", "4", "--steps", "10"]
TRAIN = ["train", *TINY, "--epochs", "1"]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of a small trained model."""
    assert main([*TRAIN, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that fails."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("rnnfast: error: ")
    return lines[0]


# What works


@pytest.mark.usefixtures("matplotlib")
def test_train_generate_info(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in run.iterdir()} == {FILE_NAME, "config.json", "log.jsonl", "perplexity.png"}
    assert main(["generate", str(run), "--prefix", "the", "--num-chars", "20"]) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("the")
    assert len(greedy) == 3 + 20 + 1
    sampled = ["generate", str(run), "--temperature", "1", "--top-k", "9", "--top-p", "0.9", "--seed", "5"]
    assert main(sampled) == main(sampled) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert len(first) == len("time traveller") + 50
    assert main(["info", str(run)]) == 0
    info = capsys.readouterr().out
    assert "rnn.weight_hh_l0" in info
    assert "8x8" in info
    assert f"{28 * 8 + 8 * 8 + 2 * 8 + 28 * 8 + 28:,}" in info  # the total
    assert "1 epochs, 480 tokens" in info
    assert "hidden_size=8" in info


def test_info_lists_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert str(rnnfast.backends()) in out


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--cell {rnn,rnn_relu,lstm,gru}", "--hidden-size", "--batch-size", "--steps", "--lr", "--config"):
        assert flag in out


@pytest.mark.usefixtures("matplotlib")
def test_a_config_file_sets_defaults_and_flags_override(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("cell: gru\nhidden_size: 12\nscratch: false\nembedding_size: 5\nepochs: 7\n")
    argv = ["train", "--config", str(config), *TINY, "--epochs", "1", "--out"]
    assert main([*argv, str(tmp_path / "run")]) == 0
    saved = load(tmp_path / "run").config
    # Wherever the file stands among them.
    for last in (["--config", str(config)], [f"--config={config}"]):
        assert main(["train", *TINY, "--epochs", "1", "--out", str(tmp_path / "run"), "--overwrite", *last]) == 0
        assert load(tmp_path / "run").config == saved
    expected = {"cell": "gru", "hidden_size": 8, "embedding_size": 5, "epochs": 1}
    assert {key: saved[key] for key in expected} == expected
    # The config.json of a run is a config file, too.
    again = ["train", "--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    assert load(tmp_path / "again").config == saved
    assert "unrecognized arguments: --conf" in refused(capsys, "train", "--conf", str(config))
    config.write_text("hidden: 12\n")
    for given in ((f"--config={config}",), ("--config", str(config))):
        assert f"the --config file {config}: there is no setting 'hidden'" in refused(capsys, "train", *given)
    config.write_text("{")
    assert f"the --config file {config}: while parsing" in refused(capsys, "train", "--config", str(config))
    for value in ("many", "null", "1" + "0" * 23):
        config.write_text(f"hidden_size: {value}\n")
        assert "--hidden-size" in refused(capsys, "train", "--config", str(config))
    config.write_bytes(b"prefix: caf\xe9\n")
    assert "--config file is not UTF-8" in refused(capsys, "train", "--config", str(config))
    for text in ("", "# hidden_size: 8\n", "- 8\n"):
        config.write_text(text)
        assert "the --config file holds no settings: write lines such as" in refused(
            capsys, "train", "--config", str(config)
        )


def test_an_empty_name_of_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--out names no folder" in refused(capsys, *TRAIN, "--out", "")
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("matplotlib")
def test_resume_takes_the_runs_own_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 0
    assert load(run).progress["epoch"] == 3
    assert "finished its 3 epochs" in refused(capsys, "train", "--resume", str(run))
    assert "--hidden-size" in refused(capsys, "train", "--resume", str(run), "--hidden-size", "9", "--epochs", "9")


@pytest.mark.usefixtures("matplotlib")
def test_resume_takes_the_checkpoint_it_is_given(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier = run / "earlier.safetensors"
    earlier.write_bytes((run / FILE_NAME).read_bytes())
    other = [*TRAIN, "--cell", "gru", "--epochs", "2", "--out", str(run), "--overwrite"]
    resume = ["train", "--resume", str(earlier), "--epochs", "3"]
    assert (main(other), main(resume)) == (0, 2)
    assert "--overwrite replaces it by the one that earlier.safetensors goes on with" in capsys.readouterr().err
    assert load(run).config["cell"] == "gru"
    assert main([*resume, "--overwrite"]) == 0
    assert f"kept in {run}\n" in capsys.readouterr().out
    saved = load(run)
    assert (saved.config["cell"], saved.progress["epoch"]) == ("rnn", 3)


def test_unnamed_runs_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(TRAIN) == main(TRAIN) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"pydoc-rnn", "pydoc-rnn-2"}


@pytest.mark.usefixtures("matplotlib")
def test_runs_that_start_together_share_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    original = cli.train
    folders = []

    def train(config: TrainConfig, out: Path, **options: Any) -> Any:
        folders.append(out)
        if len(folders) == 1:
            assert main(TRAIN) == 0  # a second run, while the first has written nothing yet
        return original(config, out, **options)

    monkeypatch.setattr(cli, "train", train)
    assert main(TRAIN) == 0
    assert len(set(folders)) == 2
    assert set(Path("runs").iterdir()) == set(folders)
    assert "--steps" in refused(capsys, *TRAIN, "--steps", "1000")
    assert not folders[2].exists()
    monkeypatch.chdir(tmp_path / "runs")
    Path("runs").touch()
    assert "cannot make the folder runs/pydoc-rnn" in refused(capsys, *TRAIN)


def test_the_next_command_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, prefix = str(tmp_path / "my $run"), "say `it's`"
    assert main([*TRAIN, "--out", folder, "--prefix", prefix]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(command) == ["rnnfast", "generate", folder, "--prefix", prefix]


def test_the_next_command_is_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--out=-r", "--prefix=-a"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.startswith("-a")
    assert "--resume ./-r continues it" in refused(capsys, *TRAIN, "--out=-r")


@pytest.mark.parametrize("name", ["#notes.txt", "null", "~", "---", "!!null", "{a: 1}", "1"])
def test_names_that_mean_something_in_yaml(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    folder = Path(name).expanduser()
    assert main([*TRAIN, f"--out={name}"]) == 0
    assert (folder / FILE_NAME).exists()
    assert main(["train", f"--resume={name}", "--epochs=2"]) == 0
    assert load(folder).progress["epoch"] == 2
    if not name.startswith("-"):  # else it needs ./ in front
        capsys.readouterr()
        assert main(["info", name]) == 0
        assert "trained   2 epochs" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    unknown = "a home folder that cannot be found" if name == "~" else "cannot read the text"
    assert unknown in refused(capsys, "train", f"--corpus={name}x", "--out=other")
    (tmp_path / "text").mkdir()
    monkeypatch.chdir(tmp_path / "text")
    if name != "~":  # which is the home directory
        Path(name).write_text("a text of its own " * 100)
        assert main(["train", f"--corpus={name}", *TRAIN[3:], "--out=other"]) == 0
        assert load(Path("other")).config["corpus"].endswith(name)


def test_without_the_time_machine_the_builtin_text_is_used_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RNNFAST_DATA", raising=False)
    argv = ["train", *TINY[2:], "--epochs", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    assert "Going on with the built-in text" in capsys.readouterr().err
    assert load(tmp_path).config["corpus"] == "pydoc"
    error = refused(capsys, *argv, "--overwrite", "--corpus", "timemachine")
    assert "could not be downloaded" in error
    assert "RNNFAST_DATA" in error


def test_unknown_characters_are_taken_as_unk_and_named_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prefix", "Töö Time", "--num-chars", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Töö Time")
    assert captured.err.splitlines() == ["rnnfast: the vocabulary lacks 'T', 'ö' of the prefix: replaced by <unk>"]


def test_what_is_wrong_is_told_before_unknown_characters(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "temperature" in refused(capsys, "generate", str(run), "--prefix", "É", "--temperature", "-1")


# What does not


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", "binary"),
        (b"caf\xe9", "not UTF-8"),
        (b"too short", "--batch-size or --steps"),
    ],
)
def test_bad_texts(content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert message in refused(capsys, "train", "--corpus", str(text), "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_backends_that_there_are_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--backend magic: unknown rnnfast backend" in refused(capsys, "generate", str(run), "--backend", "magic")
    assert "--backend cuda: " in refused(capsys, "generate", str(run), "--backend", "cuda")


def test_empty_prefix(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "prefix is empty" in refused(capsys, "generate", str(run), "--prefix", "")
    assert "prefix is empty" in refused(capsys, *TRAIN, "--prefix", "", "--out", str(run / "new"))


@pytest.mark.parametrize("verb", ["generate", "info"])
def test_bad_checkpoints(verb: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(capsys, verb, str(run))
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"2"'))
    assert "format version 2" in refused(capsys, verb, str(run))
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    for pickled in (buffer.getvalue(), pickle.dumps([1, 2])):
        path.write_bytes(pickled)
        assert "pickle" in refused(capsys, verb, str(run))
    path.unlink()
    assert "No such file" in refused(capsys, verb, str(run))


def test_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "is a file, and a run needs a folder" in refused(
        capsys, *TRAIN, "--overwrite", "--out", str(tmp_path / "file")
    )
    assert "cannot make the folder" in refused(capsys, *TRAIN, "--out", str(tmp_path / "file" / "run"))


def test_full_disk(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / FILE_NAME).read_bytes()
    original = Checkpoint.save

    def save(self: Checkpoint, path: Path) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            original(self, path)

    monkeypatch.setattr(Checkpoint, "save", save)
    error = refused(capsys, "train", "--resume", str(run), "--epochs", "2")
    assert "No space left on device" in error
    assert "still the previous one" in error
    assert (run / FILE_NAME).read_bytes() == before


def test_bidirectional_models_do_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--bidirectional", "--sample-every", "1", "--out", str(tmp_path)]) == 0
    assert "perplexity means nothing" in capsys.readouterr().err
    assert "backward direction" in refused(capsys, "generate", str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "fly"),
        (["train", "--fly"], "--fly"),
        (["train", "--cell", "cnn"], "--cell"),
        (["train", "--epochs", "some"], "error: --epochs: expected a whole number, got some"),
        (["train", "--lr", "nan"], "error: --lr: expected a number, got nan"),
        (["train", "--lr="], "error: --lr: expected a number, got none"),
        (["train", "--resume", "/nowhere", "--print_config"], "--print_config prints a new run's settings"),
        (["train", "--embedding-size", "1.5"], "error: --embedding-size: expected a whole number, got 1.5"),
        (["generate", "x", "--temperature", "nan"], "error: --temperature: expected a number, got nan"),
        (["generate", "x", "--top-p", "nan"], "error: --top-p: expected a number, got nan"),
        (["train", "--lr", "-1"], "--lr must be a positive number"),
        ([], "give a command: train, generate, info, bench or tune"),
        (["train", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["train", "--backend", "magic"], "magic"),
        (["train", "--device", "abacus"], "--device abacus"),
        (["train", "--device", "xla"], "backend): try --device cpu"),
        (["train", "--resume", "/nowhere"], "No such file"),
        (["train", "--out", "~no-such-user/run"], "~no-such-user/run begins with a home folder that cannot be found"),
        (["train", "--tie-weights"], "--embedding-size 512"),
        (["train", "--steps", "100000", "--max-tokens", "2000"], "--max-tokens (-1: all)"),
        (["generate"], "error: the following arguments are required: CHECKPOINT"),
        (["generate", "/nowhere"], "No such file"),
        (["generate", "/dev/null"], "error: cannot read the checkpoint /dev/null: "),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if argv[:1] == ["train"]:
        argv = [*argv, "--corpus", "pydoc"]
    assert message in refused(capsys, *argv)


# In a process of its own

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*argv: str) -> list[str]:
    """A command line, on the backend that is there without compiling."""
    return [sys.executable, "-m", "rnnfast", *argv, "--backend", "reference"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_saves_and_resumes(signum: int, status: int, tmp_path: Path) -> None:
    argv = command("train", *TINY, "--epochs", "1000000", "--sample-every", "1", "--out", str(tmp_path))
    process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # the first epoch is done
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert len(err.splitlines()) == 1
    assert "interrupted" in err
    assert "--resume" in err
    epoch = load(tmp_path).progress["epoch"]
    assert epoch >= 1
    assert main(["train", "--resume", str(tmp_path), "--epochs", str(epoch + 2)]) == 0


def test_a_second_signal_ends_a_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*args: Any, **options: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(importlib.import_module("rnnfast.lm.trainer"), "train_steps", step)
    assert main([*TRAIN, "--out", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "rnnfast: interrupted twice: not saved\n"


def test_a_reader_that_goes_is_no_error(run: Path) -> None:
    argv = command("generate", str(run), "--num-chars", "100000")
    process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


# As Python buffers output unless it is told not to.
BUFFERED = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONUNBUFFERED"}


def test_a_run_outlives_the_reader_of_its_reports(tmp_path: Path) -> None:
    argv = command("train", *TINY, "--epochs", "3", "--sample-every", "1", "--out", str(tmp_path))
    process = subprocess.Popen(argv, env=BUFFERED, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert load(tmp_path).progress["epoch"] == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_on_a_full_disk_is_one_error() -> None:
    with Path("/dev/full").open("w") as full:
        argv = [sys.executable, "-m", "rnnfast", "info"]
        done = subprocess.run(argv, env=BUFFERED, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "rnnfast: error: cannot write the output: No space left on device\n"


def test_a_process_without_terminal_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main([*TRAIN, "--sample-every", "1", "--out", str(tmp_path)]) == 0


def test_without_stderr_notes_are_not_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert main([*TRAIN, "--prefix", "É", "--out", str(tmp_path)]) == 0
    assert main(["generate", str(tmp_path), "--prefix", "É", "--num-chars", "3"]) == 0
    assert "rnnfast:" not in capsys.readouterr().out
