"""Every setting of a training run, with the d2l chapter's values as defaults."""

from __future__ import annotations

import numbers
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_type_hints

import torch

from rnnfast import functional
from rnnfast.errors import UserError
from rnnfast.lm.model import RNNLM, RNNLMScratch


def option(default: Any, help: str) -> Any:
    """A setting: its default and its line in `rnnfast train --help`."""
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """The settings of a run; each is a flag of `rnnfast train` and a key of its config file.

    Raises:
        UserError: a value is outside its range.
    """

    corpus: str | None = option(None, "timemachine, pydoc (built in), or a UTF-8 file; none: timemachine or else pydoc")
    tokens: Literal["char", "word"] = option("char", "what a token is")
    raw: bool = option(False, "keep the text as it is; otherwise letters only, in lower case")
    min_freq: int = option(0, "rarer tokens become <unk>")
    max_tokens: int = option(10_000, "use the first tokens of the text only; -1: all")
    validation: float = option(0.0, "share of those tokens, from their end, held out for validation")

    scratch: bool = option(False, "the chapter's tanh model of five parameters, instead of a layer and a head")
    cell: Literal["rnn", "rnn_relu", "lstm", "gru"] = option("rnn", "recurrent cell")
    hidden_size: int = option(512, "hidden units per layer")
    num_layers: int = option(1, "layers")
    dropout: float = option(0.0, "dropout after the embedding, between layers and before the head")
    embedding_size: int | None = option(None, "width of an embedding; none: token ids go straight into the layer")
    tie_weights: bool = option(False, "the head's weight is the embedding's")
    bidirectional: bool = option(False, "read both ways; such a model cannot generate")

    batch_size: int = option(32, "sequences per batch")
    steps: int = option(35, "time steps per batch, the length of backpropagation through time")
    random_batches: bool = option(False, "batches in random order, each from a fresh state; otherwise in text order")
    epochs: int = option(500, "passes over the text")
    optimizer: Literal["sgd", "adamw"] = option("sgd", "optimizer")
    lr: float = option(1.0, "learning rate, at its highest")
    schedule: Literal["constant", "cosine"] = option("constant", "how the learning rate continues after the warm-up")
    warmup: int = option(0, "optimizer steps over which the learning rate rises")
    weight_decay: float = option(0.0, "weight decay")
    clip: float = option(1.0, "largest norm of the gradient; 0: any")
    seed: int = option(0, "determines every number of a run on a CPU")

    precision: Literal["float32", "bfloat16"] = option(
        "float32", "of the model's products and states; bfloat16 keeps parameters, loss and optimizer in float32"
    )
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda, ...")
    backend: str = option("auto", "rnnfast's backend; `rnnfast info` lists them")
    prefix: str = option("time traveller", "what sample texts start with")
    sample_every: int = option(10, "epochs between reports with a sample text; 0: none")
    save_every: float = option(60.0, "seconds between checkpoints; one is written at the end anyway")

    def __post_init__(self) -> None:
        if isinstance(self.corpus, os.PathLike):
            self.corpus = os.fspath(self.corpus)
        for name, hint in get_type_hints(type(self)).items():
            setattr(self, name, _plain(getattr(self, name)))
            type_name = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
            self._check(name, _fits(getattr(self, name), hint), f"of type {type_name}")
        self._check("corpus", self.corpus is None or _may_name_a_file(self.corpus), "the name of a text or a file")
        for name in ("hidden_size", "num_layers", "batch_size", "steps", "epochs"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("hidden_size", "embedding_size"):
            self._check(name, (getattr(self, name) or 0) < 2**40, "below 2^40")  # beyond, torch's own sizes overflow
        for name in ("min_freq", "sample_every", "save_every", "warmup", "weight_decay"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        # torch's SGD refuses to scale a float32 gradient by more.
        largest = torch.finfo(torch.float32).max
        self._check("lr", 0 < self.lr <= largest, "a positive number below 3.4e38")
        self._check("weight_decay", self.weight_decay <= largest, "below 3.4e38")
        self._check("clip", 0 <= self.clip < float("inf"), "a norm, or 0 for none")
        self._check("max_tokens", self.max_tokens == -1 or self.max_tokens >= 1, "at least 1, or -1 for all")
        self._check("validation", 0 <= self.validation < 1, "in [0, 1)")
        self._check("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self._check("embedding_size", self.embedding_size is None or self.embedding_size >= 1, "at least 1")
        self._check("seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        if self.scratch:
            fixed = ("cell", "num_layers", "dropout", "embedding_size", "tie_weights", "bidirectional")
            defaults = {f.name: f.default for f in fields(self)}
            if odd := [name for name in fixed if getattr(self, name) != defaults[name]]:
                raise UserError(f"--scratch is one tanh layer: it cannot take {', '.join(map(flag, odd))}")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{flag(name)} must be {expected}, not {getattr(self, name)!r}")

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> TrainConfig:
        """The settings in a checkpoint, checked, since a file from elsewhere may hold anything.

        A setting that it lacks is newer than the file, and takes its default.
        """
        if unknown := values.keys() - {setting.name for setting in fields(cls)}:
            raise UserError(
                f"{where} has settings that this rnnfast does not know ({', '.join(sorted(unknown))}): "
                "it is damaged, or a newer version wrote it"
            )
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{where} is damaged (of its settings, {error}): take another copy") from error

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values, in the form of a config file."""
        return asdict(self)


def flag(name: str) -> str:
    """The command line flag of a setting."""
    return "--" + name.replace("_", "-")


def _plain(value: Any) -> Any:
    """A number of NumPy's, say, as Python's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a setting's type; an int will do for a float."""
    choices = getattr(hint, "__args__", (hint,))
    if getattr(hint, "__origin__", None) is Literal:
        return value in choices
    if float in choices and type(value) is int:
        return True
    return type(value) in choices


def _may_name_a_file(text: str) -> bool:
    """Whether it may be a path: without a NUL, and of letters that can be encoded, or bytes that Python escaped."""
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def build_model(config: TrainConfig, vocab_size: int) -> RNNLM | RNNLMScratch:
    """The model of a configuration, on the current default device, initialised from torch's global generator.

    Raises:
        UserError: it does not fit into memory.
    """
    try:
        if config.scratch:
            return RNNLMScratch(vocab_size, config.hidden_size, backend=config.backend)
        return RNNLM(
            vocab_size,
            config.cell,
            config.hidden_size,
            config.num_layers,
            dropout=config.dropout,
            embedding_size=config.embedding_size,
            tie_weights=config.tie_weights,
            bidirectional=config.bidirectional,
            backend=config.backend,
        )
    except RuntimeError as error:
        raise UserError(
            f"the model cannot be built ({str(error).splitlines()[0]}): try a smaller --hidden-size or --embedding-size"
        ) from error


def check_backend(name: str, device: torch.device) -> None:
    """Refuse a backend that cannot run here, before a run begins.

    Raises:
        UserError: rnnfast has no such backend, or it is not available.
    """
    one = torch.ones(1, 1, device=device)
    try:
        functional.rnn(one[None], one[None], [functional.Weights(one, one)], backend=name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--backend {name}: {str(error).splitlines()[0]}") from error


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a number that is to come back
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        first_sentence = str(error).splitlines()[0].split(". ")[0]  # a list of all of torch's backends may follow
        raise UserError(f"--device {name} cannot be used here ({first_sentence}): try --device cpu") from error
    return device
