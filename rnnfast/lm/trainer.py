"""The steps of training, and what a run consists of at any moment: model, optimizer, generators and progress."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from rnnfast.backends import cpu
from rnnfast.errors import UserError
from rnnfast.lm import checkpoint as checkpoints
from rnnfast.lm import operators
from rnnfast.lm.backpropagation import backpropagate, descend, loss_of
from rnnfast.lm.checkpoint import Checkpoint
from rnnfast.lm.config import TrainConfig, build_model, pick_device
from rnnfast.lm.data import Batches, Corpus, sequential_batches
from rnnfast.lm.generate import encode_prefix, generate, render
from rnnfast.lm.loss import is_native
from rnnfast.lm.model import RNNLM, RNNLMScratch, State

PRECISIONS = get_args(get_type_hints(TrainConfig)["precision"])
LOOK_EVERY = 32  # steps after which the loss is read, which waits for a device, and the clock
SECONDS_AT_ONCE = 0.1  # of steps in a row, in which no signal is noticed
STATES_OF = {"sgd": set(), "adamw": {"step", "exp_avg", "exp_avg_sq"}}  # of each parameter, once it has been updated


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
        clip: the gradient is scaled down to this norm if it exceeds it; 0: never.
        precision: "float32", or "bfloat16" for products and states in it and parameters, loss and optimizer in float32.

    Returns:
        The mean cross entropy in nats (a tensor: reading it waits for the device), and the detached state.

    Raises:
        ValueError: clip or precision is none of these.
    """
    _check_options(clip, precision)
    trained = [p for group in optimizer.param_groups for p in group["params"]]  # a list already, unlike the model's
    for parameter in trained:
        parameter.grad = None  # as `zero_grad` does, which asks for more than a small model's step has time for
    result = backpropagate(model, inputs, targets, state, precision)
    if clip > 0:
        clip_gradients([p.grad for p in trained if p.grad is not None], clip, model.backend)
    update(optimizer)
    return result


def train_steps(
    model: RNNLM | RNNLMScratch,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    state: State,
    loss_sum: Tensor,
    clip: float,
    precision: str = "float32",
    *,
    carries: bool = True,
) -> State:
    """A `train_step` for each batch, in order; on a CPU, with plain SGD, all of them may be one operator.

    Args:
        inputs, targets: token ids (N, T, B), int64.
        state: goes into the first step, detached; None for a fresh one.
        loss_sum: a float64 scalar, to which each step's loss is added.
        carries: the state after a step goes into the next one; else each begins with `state`.
        clip, precision: as in `train_step`.

    Returns:
        The state after the last step. `.grad` of the parameters is the last step's gradient, or None.

    Raises:
        ValueError: the token ids are not those of N batches; clip or precision is none of these.
    """
    _check_options(clip, precision)
    if inputs.dim() != 3:
        raise ValueError(f"train_steps takes batches of token ids (N, T, B), got {tuple(inputs.shape)}; see train_step")
    found = descend(model, optimizer, inputs, targets, state, loss_sum, clip, precision, carries)
    if found is not None:
        return found[0]
    before = last = state
    for x, y in zip(inputs, targets, strict=True):
        loss, last = train_step(model, optimizer, x, y, before, clip, precision)
        before = last if carries else state
        loss_sum += loss
    return last


def _check_options(clip: float, precision: str) -> None:
    if not clip >= 0:
        raise ValueError(f"clip is the largest norm of the gradient, or 0 for any, got {clip}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {' or '.join(map(repr, PRECISIONS))}, got {precision!r}")


def update(optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer, on one thread while the scans run on one because other programs have the cores.

    torch's operations on large tensors would go on to wait for a second one, for milliseconds.
    """
    threads = torch.get_num_threads()
    if threads == 1 or cpu.is_stalled is None or not cpu.is_stalled():
        optimizer.step()
        return
    torch.set_num_threads(1)
    try:
        optimizer.step()
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], max_norm: float, backend: str = "auto") -> None:
    """Scales gradients down to a norm, of all of them together, if they exceed it; nobody waits for the device.

    `nn.utils.clip_grad_norm_` for tensors of one device and type: its search for these takes longer than the arithmetic
    of a small model. On a CPU in float32 it is one operator of the cpu backend, if the scan's `backend` is that.
    """
    if is_native(backend, *gradients) and all(gradient.is_contiguous() for gradient in gradients):
        operators.clip_gradients(gradients, max_norm)
        return
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


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


class Trainer:
    """A run in memory: the model, its optimizer, the text, and where it stands.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the epoch in progress.
        loss_sum: sum of those steps' losses.
        carry: the state that goes into the next step.
        tokens, seconds: trained on in all, and the time that took.
        epoch_seconds: what the epoch in progress took of that.
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
        # AdamW is several times as fast fused. SGD has little to fuse, and torch's fused kernel wakes all threads even
        # for a small parameter, which takes milliseconds where other programs have the cores.
        fused = True if config.optimizer == "adamw" else None
        self.optimizer = kind(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        self.scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
        if config.schedule != "constant" or config.warmup:
            factor = learning_rate_factor(config, config.epochs * len(self.batches))
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.epoch = self.step = self.tokens = 0
        self.seconds = self.epoch_seconds = 0.0
        self.pace = math.inf  # of the last steps, in seconds each
        self.lr = config.lr  # of the last step
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.carry: State = None
        self.epoch_rng = generator.get_state()

    def run_epoch(self, after_steps: Callable[[int, int], None]) -> dict[str, Any]:
        """Train to the end of the epoch in progress.

        Args:
            after_steps: is called after some steps, with their number and that of the epoch's.

        Returns:
            The epoch's record for the log.
        """
        self.epoch_rng = self.batches.generator.get_state()
        inputs, targets = self.batches.epoch()
        began, before = time.perf_counter() - self.epoch_seconds, self.seconds - self.epoch_seconds
        while self.step < len(inputs):
            first, start = self.step, time.perf_counter()
            some = slice(first, first + self._steps_at_once())
            self._train(inputs[some], targets[some])
            now, count = time.perf_counter(), self.step - first
            self._count_seconds(before, now - began)
            self.pace = (now - start) / count
            after_steps(count, len(inputs))
        self.check_loss()  # waits for the device
        self._count_seconds(before, time.perf_counter() - began)
        record = {
            "epoch": self.epoch + 1,
            "perplexity": perplexity(self.loss_sum.item() / self.step),
            "tokens_per_second": round(inputs.numel() / self.epoch_seconds, 1),
            "lr": self.lr,
        }
        if self.validation is not None:
            record["validation_perplexity"] = evaluate(self.model, *self.validation, self.config.precision)
        self.epoch, self.step, self.epoch_seconds, self.carry = self.epoch + 1, 0, 0.0, None
        self.loss_sum.zero_()
        self.epoch_rng = self.batches.generator.get_state()
        return record

    def _count_seconds(self, before: float, of_epoch: float) -> None:
        self.seconds, self.epoch_seconds = before + of_epoch, of_epoch

    def _steps_at_once(self) -> int:
        """As many as a signal can wait for, and none beyond the step after which the loss is read."""
        if self.scheduler is not None:
            return 1
        return max(1, min(LOOK_EVERY - self.step % LOOK_EVERY, int(SECONDS_AT_ONCE / self.pace)))

    def _train(self, inputs: Tensor, targets: Tensor) -> None:
        config, self.lr = self.config, self.optimizer.param_groups[0]["lr"]
        state = train_steps(
            self.model,
            self.optimizer,
            inputs,
            targets,
            self.carry,
            self.loss_sum,
            config.clip,
            config.precision,
            carries=self.carries,
        )
        if self.scheduler is not None:
            self.scheduler.step()
        self.carry = state if self.carries else None
        self.step += len(inputs)
        self.tokens += inputs.numel()

    def check_loss(self) -> None:
        """Stop at a loss that is not a number.

        Raises:
            UserError: it says what to try.
        """
        if not math.isfinite(self.loss_sum.item()):
            raise self._diverged("loss is")

    def check_parameters(self) -> None:
        """Stop before a checkpoint would be lost to parameters that are not numbers, which the next loss would show.

        Raises:
            UserError: it says what to try.
        """
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise self._diverged("parameters are")

    def _diverged(self, what: str) -> UserError:
        clip = f"a smaller --clip (now {self.config.clip:g})" if self.config.clip else "a --clip above 0"
        return UserError(
            f"the {what} no longer finite in epoch {self.epoch + (self.step > 0)}: try a smaller --lr "
            f"(now {self.config.lr:g}), {clip}, or a gated cell (--cell lstm or gru)"
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
            "epoch_seconds": self.epoch_seconds,
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
            kept = STATES_OF[self.config.optimizer] if _number(progress, "tokens") else set()
            if any(states.get(index, {}).keys() != kept for index in range(len(parameters))):
                raise ValueError("of the optimizer's states some are missing")
            groups = self.optimizer.state_dict()["param_groups"]
            if self.scheduler is not None:
                self.scheduler.last_epoch = steps = _number(progress, "scheduler_steps")
                for group in groups:
                    group["lr"] = self.config.lr * self.scheduler.lr_lambdas[0](steps)
            self.optimizer.load_state_dict({"state": states, "param_groups": groups})
            self.epoch, self.step = _number(progress, "epoch"), _number(progress, "step", most=len(self.batches))
            self.tokens = _number(progress, "tokens")
            self.seconds = _number(progress, "seconds", float, 10**9)
            # Which older checkpoints lack.
            self.epoch_seconds = _number({"epoch_seconds": 0.0} | progress, "epoch_seconds", float, 10**9)
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
        # Into memory of torch's: products of what lies in the file's, which is aligned to less, may round otherwise.
        copies = tuple(part.to(self.device, copy=True) for part in parts)
        return copies if len(copies) > 1 else copies[0]

    def text_sha1(self) -> str:
        """A hash of the text's token ids, those held out included, which tells it from another text."""
        found = hashlib.sha1(usedforsecurity=False)
        for ids in (self.batches.ids, *(self.validation or ())):
            found.update(ids.cpu().numpy().tobytes())
        return found.hexdigest()


def _number(progress: dict[str, Any], key: str, kind: type = int, most: int = 2**63) -> Any:
    """A number of a checkpoint's progress, checked: a file from elsewhere may hold anything."""
    value = progress[key]
    if type(value) not in (int, kind) or not 0 <= value <= most:
        raise ValueError(f"its {key} is {value!r}")
    return value
