"""Training: truncated backpropagation through time over a text, with reports, a log and checkpoints.

from rnnfast.lm import TrainConfig, train
result = train(TrainConfig(cell="gru", hidden_size=256), "runs/gru")
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import Any

from torch import nn
from tqdm import tqdm

from rnnfast.errors import UserError, note, reason
from rnnfast.files import atomic_write, expanded
from rnnfast.lm import checkpoint as checkpoints
from rnnfast.lm.config import TrainConfig, check_backend, flag, pick_device
from rnnfast.lm.data import load_corpus
from rnnfast.lm.generate import encode_prefix
from rnnfast.lm.plot import plot
from rnnfast.lm.run_folder import held
from rnnfast.lm.trainer import LOOK_EVERY, Trainer
from rnnfast.lm.vocab import Vocab

CONFIG, LOG, CURVE = "config.json", "log.jsonl", "perplexity.png"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run after its checkpoint was written (unless it came twice). The message says where."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Run:
    """A run's folder: checkpoint.safetensors, config.json, log.jsonl (a line an epoch), perplexity.png."""

    def __init__(self, folder: Path, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        self.folder, self.trainer, self.records = folder, trainer, records
        self.saved_at = time.monotonic()
        config = json.dumps(trainer.config.to_json(), indent=1)
        atomic_write(folder / CONFIG, config.encode())
        atomic_write(folder / LOG, "".join(map(_line, records)).encode())

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        path = self.folder / LOG
        try:
            with path.open("a") as file:
                file.write(_line(record))
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason(error)}; the last checkpoint is untouched") from error

    def save(self) -> None:
        self.trainer.check_parameters()
        self.trainer.checkpoint().save(self.folder / checkpoints.FILE_NAME)
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        self.save()
        config = self.trainer.config
        cell = "scratch" if config.scratch else config.cell
        title = f"{Path(str(config.corpus)).stem}: {cell}, {config.hidden_size} units"
        try:
            plot(self.records, self.folder / CURVE, title)
        except (UserError, OSError, ValueError, RuntimeError) as error:  # what is learned is saved without it
            note(f"no {CURVE}: {error}")


@dataclass
class TrainResult:
    """The result of a run. `perplexity` is the last epoch's; `tokens_per_second` is over the whole run's training."""

    model: nn.Module
    vocab: Vocab
    config: TrainConfig
    perplexity: float
    tokens_per_second: float
    records: list[dict[str, Any]] = field(repr=False)


def _print(line: str) -> None:
    """Print above the progress bar, and at once where the output is a file or a pipe.

    A reader that has gone, as `head` does, or a full disk ends no run: what is printed is in the log, too.
    """
    if sys.stdout is not None:
        with suppress(OSError):
            tqdm.write(line)
            sys.stdout.flush()


# What may differ between a checkpoint and the run that goes on from it.
CHANGEABLE = {"corpus", "epochs", "device", "backend", "prefix", "sample_every", "save_every"}


def train(
    config: TrainConfig,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] = _print,
) -> TrainResult:
    """Train a model as `config` says.

    Seeds torch's global generator. Ctrl-C and SIGTERM end the run after the step in progress and save it.

    Args:
        out: the run's folder; None writes nothing.
        resume: continue from the checkpoint in `out`; if `out` is a checkpoint file, from that file, in its folder.
            Settings other than the run's length and reports must be the same.
        overwrite: replace the run that `out` already holds; or the one in the folder of the file that `out` is.
        report: takes the lines of progress.

    Raises:
        UserError: bad input, a folder that cannot be written, a loss that is no longer finite.
        ValueError: a run is to be resumed, and `out` is None.
        Interrupted: by Ctrl-C or SIGTERM, after saving.
    """
    if resume and out is None:
        raise ValueError("to resume a run, give its folder as `out`")
    folder = None if out is None else expanded(out)
    source = None
    if resume and folder is not None:
        source = checkpoints.find(folder)
        folder = source.parent
        if overwrite and source.name == checkpoints.FILE_NAME:
            raise UserError("--resume continues a run, --overwrite replaces it: leave one of them out")
    elif folder is not None and folder.is_file():
        raise UserError(f"{folder} is a file, and a run needs a folder of its own: choose another --out")
    with nullcontext() if folder is None else held(folder):  # from before a checkpoint is read to after the last one
        return _train(config, folder, source, overwrite, report)


def _train(
    config: TrainConfig, folder: Path | None, source: Path | None, overwrite: bool, report: Callable[[str], None]
) -> TrainResult:
    """`train` in a folder that is this run's alone, going on from the checkpoint `source` if there is one."""
    saved = None
    if source is not None:
        saved = checkpoints.load(source)
        _check_same(TrainConfig.from_json(saved.config, str(source)), config)
    is_copy = source is not None and source.name != checkpoints.FILE_NAME
    if folder is not None and (saved is None or is_copy) and not overwrite and _has_trained(checkpoints.find(folder)):
        how = f"--resume {argument(folder)} continues it, --overwrite replaces it"
        if source is not None:
            how = f"--overwrite replaces it by the one that {source.name} goes on with; or move that file elsewhere"
        raise UserError(f"{folder} holds a run already: {how}")
    if folder is not None and not overwrite:
        _check_own(folder, saved)
    check_backend(config.backend, pick_device(config.device))  # before a text is downloaded
    corpus = load_corpus(
        config.corpus,
        tokens=config.tokens,
        raw=config.raw,
        min_freq=config.min_freq,
        max_tokens=config.max_tokens,
        validation=config.validation,
    )
    config = replace(config, corpus=corpus.name)
    trainer = Trainer(config, corpus)
    records: list[dict[str, Any]] = []
    if saved is not None and folder is not None:
        trainer.restore(saved, folder)
    encode_prefix(config.prefix, corpus.vocab, config.tokens)  # an empty one is refused now, not in mid-run
    if config.bidirectional:
        note("a bidirectional model reads the token it is to predict: its perplexity means nothing, it cannot generate")
    if config.warmup > (steps := config.epochs * len(trainer.batches)):
        note(f"--warmup {config.warmup:,} is longer than the run, of {steps:,} steps: it never reaches its --lr")
    if saved is not None and folder is not None:
        if _has_log_of(folder, saved, is_copy):
            records = _read_log(folder / LOG, trainer.epoch)
        elif (folder / LOG).exists():
            note(f"the {LOG} in {folder} is another run's: a new one is started")
        if trainer.epoch >= config.epochs:
            more = "start a new run" if config.schedule == "cosine" else "--epochs N trains more"
            raise UserError(f"this run has finished its {trainer.epoch} epochs: {more}")
    num_tokens = sum(count for _, count in corpus.vocab.token_freqs)
    if saved is None and corpus.name not in ("timemachine", "pydoc") and 0 < config.max_tokens < num_tokens:
        note(f"using the first {config.max_tokens:,} of {num_tokens:,} tokens; --max-tokens -1 takes all")
    if folder is not None:
        # Before the first step: a disk without room costs no training, and a run to be replaced stays until it is.
        # Settings and log come next, and never stand beside another run's checkpoint.
        (saved or trainer.checkpoint()).save(folder / checkpoints.FILE_NAME)
        if saved is None or is_copy:
            with suppress(OSError):  # a curve that cannot be removed cannot be drawn either, which is said at the end
                (folder / CURVE).unlink(missing_ok=True)
    run = None if folder is None else Run(folder, trainer, records)
    _loop(trainer, run, records, report)
    return TrainResult(
        trainer.model,
        corpus.vocab,
        config,
        records[-1]["perplexity"],
        trainer.tokens / trainer.seconds,
        records,
    )


def _loop(trainer: Trainer, run: Run | None, records: list[dict[str, Any]], report: Callable[[str], None]) -> None:
    config = trainer.config
    hidden = True if sys.stderr is None else None  # None: where stderr is no terminal
    bar = tqdm(total=config.epochs, initial=trainer.epoch, unit="epoch", disable=hidden, bar_format=BAR, leave=False)

    def after_steps(count: int, of_epoch: int) -> None:
        bar.update(count / of_epoch)
        if caught or trainer.step % LOOK_EVERY == 0:
            trainer.check_loss()
            if run is not None and (caught or time.monotonic() - run.saved_at > config.save_every):
                run.save()
            if caught:
                where = (
                    f"saved in {run.folder}; --resume {argument(run.folder)} continues it"
                    if run
                    else "there was nothing to save"
                )
                raise Interrupted(f"interrupted in epoch {trainer.epoch + 1}: {where}", caught[0])

    with bar, _caught_signals() as caught:
        while trainer.epoch < config.epochs:
            record = trainer.run_epoch(after_steps)
            bar.set_postfix_str(f"perplexity {record['perplexity']:.2f}", refresh=False)
            if config.sample_every and record["epoch"] % config.sample_every == 0:
                record["sample"] = None if config.bidirectional else trainer.sample()
                report(_report_line(record))
            if run is None:
                records.append(record)
                continue
            run.log(record)
            if time.monotonic() - run.saved_at > config.save_every:
                run.save()
        if run is not None:
            run.finish()


BAR = "{percentage:3.0f}%|{bar}| epoch {n:.0f} of {total} [{elapsed}<{remaining}{postfix}]"


def _report_line(record: dict[str, Any]) -> str:
    parts = [f"epoch {record['epoch']:4d}", f"perplexity {record['perplexity']:5.2f}"]
    if "validation_perplexity" in record:
        parts.append(f"validation {record['validation_perplexity']:5.2f}")
    parts.append(f"{record['tokens_per_second']:9,.0f} tokens/s")
    if record["sample"] is not None:
        parts.append(" ".join(record["sample"].split()))
    return "  ".join(parts)


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that no step is cut in two; a second one ends the run at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may handle signals
        return

    def catch(signum: int, frame: FrameType | None) -> None:
        if caught:
            raise Interrupted("interrupted twice: not saved", signum)
        caught.append(signum)

    # One that is ignored stays so: a shell lets no Ctrl-C reach what a script has put into the background.
    signums = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, catch) for signum in signums}
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _check_same(saved: TrainConfig, config: TrainConfig) -> None:
    odd = [f.name for f in fields(config) if getattr(saved, f.name) != getattr(config, f.name)]
    if odd := [flag(name) for name in odd if name not in CHANGEABLE]:
        raise UserError(f"a resumed run keeps its settings, but {', '.join(odd)} differs: leave that out")
    if config.schedule == "cosine" and saved.epochs != config.epochs:
        raise UserError(
            f"--epochs decides every learning rate of --schedule cosine, and this run began with {saved.epochs}: "
            "leave --epochs out, or start a new run"
        )


def _check_own(folder: Path, saved: checkpoints.Checkpoint | None) -> None:
    """Refuse to replace files that have the names of a run's, in a folder without a run.

    They are the run's own where the settings are: its checkpoint may be gone, and another one of it, `saved`, be there.
    """
    taken = [name for name in (CONFIG, LOG, CURVE) if (folder / name).exists()]
    if not taken or (folder / checkpoints.FILE_NAME).exists():
        return
    if saved is None or not _is_of(folder, saved):
        raise UserError(
            f"{folder} holds a {taken[0]} but no run, which would replace it: choose another folder, or move it away"
        )


def _is_of(folder: Path, saved: checkpoints.Checkpoint) -> bool:
    """Whether the settings in a folder are those of a run that was saved."""
    try:
        written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        defaults, any_will_do = TrainConfig().to_json(), dict.fromkeys(CHANGEABLE)
        return bool(defaults | written | any_will_do == defaults | saved.config | any_will_do)
    except (OSError, ValueError, TypeError):  # unreadable, no JSON, or no settings
        return False


def _has_log_of(folder: Path, saved: checkpoints.Checkpoint, is_copy: bool) -> bool:
    """Whether the log in a folder is that of a run that was saved, there or in a copy."""
    if not is_copy:  # but for a run that a copy was about to replace when it was killed
        return not (folder / CONFIG).exists() or _is_of(folder, saved)
    kept = checkpoints.find(folder)
    try:
        replaced = checkpoints.load(kept) if kept.exists() else saved
    except UserError:  # damaged, so nobody knows
        return False
    return replaced.progress.get("text_sha1") == saved.progress.get("text_sha1") and _is_of(folder, saved)


def argument(path: Path) -> str:
    """A path as an argument for a shell, and not for an option."""
    return quote(f"./{path}" if str(path).startswith("-") else str(path))


def _has_trained(path: Path) -> bool:
    """Whether a checkpoint, if there is one, holds more than a run's start, which may be replaced unasked."""
    if not path.exists():
        return False
    try:
        return bool(checkpoints.load(path).progress.get("tokens", True))
    except UserError:  # damaged, or not ours: whoever put it there may want it
        return True


def _line(record: dict[str, Any]) -> str:
    """A record as a line of the log: JSON, which has no infinity; such a perplexity is null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"


def _read_log(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The records of the epochs that a checkpoint has seen; a crash may have left later ones, or half a line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        note(f"there is no {path}: a new log is started")
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; make it readable, or move it away") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["epoch"] > epochs:
                break
        except (ValueError, KeyError, TypeError):
            note(f"line {number} of {path} is damaged: the log continues from the lines before it")
            break
        infinite = [key for key in ("perplexity", "validation_perplexity") if record.get(key, 0) is None]
        records.append(record | dict.fromkeys(infinite, math.inf))
    return records
