"""Training: truncated backpropagation through time over a text, with reports, a log and checkpoints.

from rnnfast.lm import TrainConfig, train
result = train(TrainConfig(cell="gru", hidden_size=256), "runs/gru")
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rnnfast.files import UserError, atomic_write, note, reason
from rnnfast.lm import checkpoint as checkpoints
from rnnfast.lm.checkpoint import Checkpoint
from rnnfast.lm.config import TrainConfig, build_model, check_backend, flag, pick_device
from rnnfast.lm.data import Batches, Corpus, load_corpus, sequential_batches
from rnnfast.lm.generate import encode_prefix, generate, render
from rnnfast.lm.loss import cross_entropy, is_native
from rnnfast.lm.model import RNNLM, RNNLMScratch, State, detach
from rnnfast.lm.plot import plot
from rnnfast.lm.vocab import Vocab

CURVE = "perplexity.png"
LOOK_EVERY = 32  # steps between looks at the loss, the clock and the progress bar; on a GPU each look waits for it


def train_step(
    model: RNNLM | RNNLMScratch,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    state: State,
    clip: float,
    precision: str = "float32",
) -> tuple[Tensor, State]:
    """One step of truncated backpropagation through time.

    Args:
        inputs, targets: token ids (T, B), int64.
        state: carried from the batch before, detached; None for a fresh one.
        clip: the gradient is scaled down to this norm if it exceeds it.
        precision: "float32", or "bfloat16" for products and states in it and parameters, loss and optimizer in float32.

    Returns:
        The mean cross entropy in nats (a tensor: reading it waits for the device), and the detached state.
    """
    loss, state = loss_of(model, inputs, targets, state, precision)
    optimizer.zero_grad()
    loss.backward()
    trained = (p for group in optimizer.param_groups for p in group["params"])  # a list already, unlike the model's
    clip_gradients([p.grad for p in trained if p.grad is not None], clip, model.backend)
    optimizer.step()
    return loss.detach(), detach(state)


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], max_norm: float, backend: str = "auto") -> None:
    """Scales gradients down to a norm, of all of them together, if they exceed it; nobody waits for the device.

    `nn.utils.clip_grad_norm_` for tensors of one device and type: its search for these takes longer than the arithmetic
    of a small model. On a CPU in float32 it is one operator of the cpu backend, if the scan's `backend` is that.
    """
    if is_native(backend, *gradients) and all(gradient.is_contiguous() for gradient in gradients):
        torch.ops.rnnfast.clip_gradients_cpu.default(gradients, max_norm)
        return
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def loss_of(
    model: RNNLM | RNNLMScratch, inputs: Tensor, targets: Tensor, state: State, precision: str = "float32"
) -> tuple[Tensor, State]:
    """The mean cross entropy in nats, in float32 or wider, and the state; arguments as in `train_step`."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        hidden, state = model.hidden_states(inputs, state)
        return cross_entropy(hidden, *model.head_weights(), targets, model.backend), state


@torch.no_grad()
def evaluate(model: RNNLM | RNNLMScratch, inputs: Tensor, targets: Tensor, precision: str = "float32") -> float:
    """Perplexity on batches (N, T, B) in text order, the state carried through (but for a bidirectional model)."""
    model.eval()
    total, state = torch.zeros((), dtype=torch.float64, device=inputs.device), None
    for x, y in zip(inputs, targets, strict=True):
        loss, state = loss_of(model, x, y, None if model.bidirectional else state, precision)
        total += loss
    model.train()
    return perplexity(total.item() / len(inputs))


def perplexity(loss: float) -> float:
    """The exponential of a mean cross entropy in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def learning_rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The share of the learning rate at a step: a linear warm-up, then constant, or half a cosine down to 0."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        if config.schedule == "constant":
            return 1.0
        done = (step - config.warmup) / max(1, total_steps - config.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run, after its checkpoint was written, unless it came twice. The message says where."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Trainer:
    """A run in memory: the model, its optimizer, the text, and where it stands.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the epoch in progress.
        loss_sum: sum of those steps' losses.
        carry: the state that goes into the next step.
        tokens, seconds: trained on in all, and the time that took.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        self.config, self.vocab = config, corpus.vocab
        self.device = pick_device(config.device)
        # Read both ways, a state of the backward direction belongs to the future: nothing is carried then.
        self.carries = not (config.random_batches or config.bidirectional)
        torch.manual_seed(config.seed)
        self.model: Any = build_model(config, len(corpus.vocab)).to(self.device)
        generator = torch.Generator().manual_seed(config.seed)
        ids = corpus.train.to(self.device)
        self.batches = Batches(ids, config.batch_size, config.steps, config.random_batches, generator)
        self.validation = None
        if config.validation:
            num_tokens = len(corpus.validation)
            if num_tokens <= config.steps:
                raise UserError(
                    f"--validation {config.validation:g} holds out {num_tokens} tokens, but --steps {config.steps} "
                    f"needs {config.steps + 1}: hold out more, or take more of the text with --max-tokens (-1: all)"
                )
            # A short text is read in fewer rows, for every row needs a whole batch's steps.
            rows = min(config.batch_size, (num_tokens - 1) // config.steps)
            self.validation = sequential_batches(corpus.validation.to(self.device), rows, config.steps)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config.optimizer]
        # Fused: one pass over each parameter, with which AdamW is several times as fast.
        self.optimizer = kind(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
        if config.schedule != "constant" or config.warmup:
            factor = learning_rate_factor(config, config.epochs * len(self.batches))
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.epoch = self.step = self.tokens = 0
        self.seconds = 0.0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.carry: State = None
        self.epoch_rng = generator.get_state()

    def run_epoch(self, after_step: Callable[[int], None]) -> dict[str, Any]:
        """Train to the end of the epoch in progress, calling `after_step(steps of the epoch)` behind every step.

        Returns:
            The epoch's record for the log.
        """
        self.epoch_rng = self.batches.generator.get_state()
        inputs, targets = self.batches.epoch()
        config, first, tokens, seconds = self.config, self.step, self.tokens, self.seconds
        began = time.perf_counter() - seconds  # of all that is counted
        for x, y in zip(inputs[first:], targets[first:], strict=True):
            loss, state = train_step(self.model, self.optimizer, x, y, self.carry, config.clip, config.precision)
            if self.scheduler is not None:
                self.scheduler.step()
            self.carry = state if self.carries else None
            self.loss_sum += loss
            self.step += 1
            self.tokens += x.numel()
            self.seconds = time.perf_counter() - began
            after_step(len(inputs))
        self.check_finite()  # waits for the device
        self.seconds = time.perf_counter() - began
        record = {
            "epoch": self.epoch + 1,
            "perplexity": perplexity(self.loss_sum.item() / self.step),
            "tokens_per_second": round((self.tokens - tokens) / (self.seconds - seconds), 1),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        if self.validation is not None:
            record["validation_perplexity"] = evaluate(self.model, *self.validation, self.config.precision)
        self.epoch, self.step, self.carry = self.epoch + 1, 0, None
        self.loss_sum.zero_()
        self.epoch_rng = self.batches.generator.get_state()
        return record

    def check_finite(self) -> None:
        """Stop at a loss that is not a number.

        Raises:
            UserError: it says what to try.
        """
        if not math.isfinite(self.loss_sum.item()):
            raise UserError(
                f"the loss is no longer finite in epoch {self.epoch + 1}: try a smaller --lr (now {self.config.lr:g}), "
                f"a smaller --clip (now {self.config.clip:g}), or a gated cell (--cell lstm or gru)"
            )

    def sample(self, length: int = 50) -> str:
        """The sample text of a report, greedy as in the chapter."""
        prefix, unit = self.config.prefix, self.config.tokens
        ids = encode_prefix(prefix, self.vocab, unit, tell=False)
        return prefix + "".join(render(generate(self.model, ids, length), self.vocab, unit))

    def checkpoint(self) -> Checkpoint:
        """Everything that another process needs to go on from here, bit for bit on the CPU."""
        tensors = {f"model.{name}": parameter for name, parameter in self.model.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if value is not None}
        carry = () if self.carry is None else self.carry if isinstance(self.carry, tuple) else (self.carry,)
        tensors |= {f"carry.{index}": part for index, part in enumerate(carry)}
        tensors |= {
            "rng.epoch": self.epoch_rng,
            "rng.torch": torch.get_rng_state(),
            "loss_sum": self.loss_sum,
        }
        progress = {
            "epoch": self.epoch,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "text_sha1": self.text_sha1(),
            "scheduler_steps": self.scheduler.last_epoch if self.scheduler else 0,
        }
        return Checkpoint(self.config.to_json(), self.vocab.idx_to_token, progress, tensors)

    def restore(self, saved: Checkpoint, where: Path) -> None:
        """Go on where `saved` was taken.

        Raises:
            UserError: the text is another one now, or the checkpoint is damaged.
        """
        try:
            progress, tensors = saved.progress, saved.tensors
            if saved.vocab != self.vocab.idx_to_token or progress["text_sha1"] != self.text_sha1():
                raise UserError("the text is not the one this run was trained on: give that one, or start a new run")
            checkpoints.load_parameters(self.model, saved.group("model"), where)
            parameters = list(self.model.parameters())
            states: dict[int, dict[str, Tensor]] = {}
            for name, value in saved.group("optimizer").items():
                index, key = name.split(".")
                like = parameters[int(index)]
                if value.ndim and value.shape != like.shape:
                    raise ValueError(f"the shape of optimizer.{name}")
                # In the parameter's own memory layout, as the optimizer would have made it.
                value = torch.empty_like(like).copy_(value) if value.ndim else value
                states.setdefault(int(index), {})[key] = value
            groups = self.optimizer.state_dict()["param_groups"]
            if self.scheduler is not None:
                self.scheduler.last_epoch = steps = _number(progress, "scheduler_steps")
                for group in groups:
                    group["lr"] = self.config.lr * self.scheduler.lr_lambdas[0](steps)
            self.optimizer.load_state_dict({"state": states, "param_groups": groups})
            self.epoch, self.step = _number(progress, "epoch"), _number(progress, "step", most=len(self.batches))
            self.tokens, self.seconds = _number(progress, "tokens"), _number(progress, "seconds", float)
            self.loss_sum.copy_(tensors["loss_sum"])
            self.carry = self._carry(tensors) if self.carries and self.step else None
            self.epoch_rng = tensors["rng.epoch"]
            self.batches.generator.set_state(self.epoch_rng)
            torch.set_rng_state(tensors["rng.torch"])
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{where} is damaged, this run cannot be resumed from it ({error})") from error

    def _carry(self, tensors: dict[str, Tensor]) -> State:
        """The state that a checkpoint in the middle of an epoch carries over."""
        config = self.config
        shape = (config.num_layers, config.batch_size, config.hidden_size)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else next(self.model.parameters()).dtype
        parts = [tensors[f"carry.{index}"] for index in range(2 if config.cell == "lstm" else 1)]
        if any(part.shape != shape or part.dtype != dtype for part in parts):
            raise ValueError("the shape or type of its carried state")
        return tuple(part.to(self.device) for part in parts) if len(parts) > 1 else parts[0].to(self.device)

    def text_sha1(self) -> str:
        """Tells one training text from another."""
        return hashlib.sha1(self.batches.ids.cpu().numpy().tobytes(), usedforsecurity=False).hexdigest()


def _number(progress: dict[str, Any], key: str, kind: type = int, most: int = 2**63) -> Any:
    """A number of a checkpoint's progress, checked: a file from elsewhere may hold anything."""
    value = progress[key]
    if type(value) not in (int, kind) or not 0 <= value <= most:
        raise ValueError(f"its {key} is {value!r}")
    return value


class Run:
    """A run's folder: checkpoint.safetensors, config.json, log.jsonl (a line an epoch), perplexity.png."""

    def __init__(self, folder: Path, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        self.folder, self.trainer, self.records = folder, trainer, records
        self.saved_at = time.monotonic()
        config = json.dumps(trainer.config.to_json(), indent=1)
        atomic_write(folder / "config.json", config.encode())
        atomic_write(folder / "log.jsonl", "".join(map(_line, records)).encode())

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        path = self.folder / "log.jsonl"
        try:
            with path.open("a") as file:
                file.write(_line(record))
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason(error)}; the last checkpoint is untouched") from error

    def save(self) -> None:
        self.trainer.check_finite()
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
    """What a run ends with. `perplexity` is of the last epoch, `tokens_per_second` over the whole run's training."""

    model: nn.Module
    vocab: Vocab
    config: TrainConfig
    perplexity: float
    tokens_per_second: float
    records: list[dict[str, Any]] = field(repr=False)


def _print(line: str) -> None:
    """Print above the progress bar, and at once where the output is a file or a pipe."""
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
        resume: go on from the checkpoint in `out`; if `out` is a checkpoint file, from that one, in its folder.
            Settings other than the run's length and reports must be the same.
        overwrite: replace a run that is in `out` already.
        report: takes the lines of progress.

    Raises:
        UserError: bad input, a folder that cannot be written, a loss that is no longer finite.
        Interrupted: by Ctrl-C or SIGTERM, after saving.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite replaces it: leave one of them out")
    if resume and out is None:
        raise ValueError("to resume a run, give its folder as `out`")
    folder = None if out is None else Path(out).expanduser()
    saved = None
    if resume and folder is not None:
        source = checkpoints.find(folder)
        saved, folder = checkpoints.load(source), source.parent
        _check_same(TrainConfig.from_json(saved.config, str(source)), config)
    elif folder is not None and folder.is_file():
        raise UserError(f"{folder} is a file, and a run needs a folder of its own: choose another --out")
    elif folder is not None and checkpoints.find(folder).exists() and not overwrite:
        raise UserError(
            f"{folder} holds a run already: --resume {quote(str(folder))} continues it, --overwrite replaces it"
        )
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
    if config.bidirectional:
        note("a bidirectional model reads the token it is to predict: its perplexity means nothing, it cannot generate")
    trainer = Trainer(config, corpus)
    encode_prefix(config.prefix, corpus.vocab, config.tokens)  # an empty one is refused now, not in mid-run
    records: list[dict[str, Any]] = []
    if saved is not None and folder is not None:
        trainer.restore(saved, folder)
        records = _read_log(folder / "log.jsonl", trainer.epoch)
        if trainer.epoch >= config.epochs:
            more = "start a new run" if config.schedule == "cosine" else "--epochs N trains more"
            raise UserError(f"this run has finished its {trainer.epoch} epochs: {more}")
    num_tokens = sum(count for _, count in corpus.vocab.token_freqs)
    if saved is None and corpus.name not in ("timemachine", "pydoc") and 0 < config.max_tokens < num_tokens:
        note(f"using the first {config.max_tokens:,} of {num_tokens:,} tokens; --max-tokens -1 takes all")
    if folder is not None:  # settings and log come next, and never stand beside another run's checkpoint
        if saved is None:
            _remove_run(folder)
        else:
            saved.save(folder / checkpoints.FILE_NAME)
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
    bar = tqdm(total=config.epochs, initial=trainer.epoch, unit="epoch", disable=None, bar_format=BAR, leave=False)

    def after_step(num_steps: int) -> None:
        bar.update(1 / num_steps)
        if caught or trainer.step % LOOK_EVERY == 0:
            trainer.check_finite()
            if run is not None and (caught or time.monotonic() - run.saved_at > config.save_every):
                run.save()
            if caught:
                where = (
                    f"saved in {run.folder}; --resume {quote(str(run.folder))} continues it"
                    if run
                    else "there was nothing to save"
                )
                raise Interrupted(f"interrupted in epoch {trainer.epoch + 1}: {where}", caught[0])

    with bar, _caught_signals() as caught:
        while trainer.epoch < config.epochs:
            record = trainer.run_epoch(after_step)
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

    previous = {signum: signal.signal(signum, catch) for signum in (signal.SIGINT, signal.SIGTERM)}
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


def _remove_run(folder: Path) -> None:
    """Remove the checkpoint and curve of a run that is replaced; its settings and log are written over."""
    for name in (checkpoints.FILE_NAME, CURVE):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {reason(error)}; choose another --out") from error


def _line(record: dict[str, Any]) -> str:
    """A record as a line of the log: JSON, which has no infinity; such a perplexity is null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"


def _read_log(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The records of the epochs that a checkpoint has seen; a crash may have left later ones, or half a line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        note(f"{path} cannot be read ({reason(error)}): the log starts anew")
        return []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["epoch"] > epochs:
                break
        except (ValueError, KeyError, TypeError):
            note(f"line {number} of {path} is damaged: the log goes on from the lines before it")
            break
        infinite = [key for key in ("perplexity", "validation_perplexity") if record.get(key, 0) is None]
        records.append(record | dict.fromkeys(infinite, math.inf))
    return records
