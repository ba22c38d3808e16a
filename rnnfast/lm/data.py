"""From the name of a text to the batches of token ids that a model trains on."""

from __future__ import annotations

import codecs
import hashlib
import http.client
import io
import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rnnfast import files
from rnnfast.errors import UserError, note, reason
from rnnfast.files import atomic_write, expanded
from rnnfast.lm.config import TrainConfig
from rnnfast.lm.vocab import Vocab

TIME_MACHINE_URL = "http://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
TIME_MACHINE_SHA1 = "090b5e7e70c295757f55df93cb0a180b9691891a"
DOWNLOAD_TIMEOUT = 10  # seconds


class TextUnavailable(UserError):
    """The Time Machine is neither on this machine nor available for download."""


def _is_time_machine(data: bytes) -> bool:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest() == TIME_MACHINE_SHA1


def time_machine() -> str:
    """H. G. Wells, The Time Machine (1895), as d2l distributes it.

    Taken from the folder RNNFAST_DATA, else from the cache, else downloaded into the cache; checked by its sha1.

    Raises:
        TextUnavailable: it is in neither place and cannot be downloaded.
        UserError: RNNFAST_DATA names no folder, or the file in it is another text.
    """
    if folder := os.environ.get("RNNFAST_DATA"):
        given = _named_by("RNNFAST_DATA", folder) / "timemachine.txt"
        if not given.parent.is_dir():
            raise UserError(f"RNNFAST_DATA is {folder}, which is no folder: set it to the one of timemachine.txt")
        if given.exists():
            data = _read_bytes(given)
            if not _is_time_machine(data):
                raise UserError(
                    f"{given} (from RNNFAST_DATA) is not The Time Machine: its sha1 is not {TIME_MACHINE_SHA1}; "
                    f"unset RNNFAST_DATA, or train on that file with --corpus {given}"
                )
            return data.decode("utf-8")
    cached = _cached()
    if cached is not None and cached.is_file() and _is_time_machine(data := _read_bytes(cached)):
        return data.decode("utf-8")
    data = _download(TIME_MACHINE_URL)
    if not _is_time_machine(data):
        raise TextUnavailable(f"what {TIME_MACHINE_URL} sent is not The Time Machine (its sha1 differs)")
    if cached is not None:
        try:
            atomic_write(cached, data)
        except UserError as error:  # the text is here all the same
            note(f"The Time Machine was downloaded but not kept: {error}")
    return data.decode("utf-8")


def _cached() -> Path | None:
    """Where the cache has The Time Machine; None for a user without a home, who has no cache."""
    if folder := os.environ.get("RNNFAST_CACHE"):
        _named_by("RNNFAST_CACHE", folder)
    try:
        return files.cache_folder() / "timemachine.txt"
    except RuntimeError:
        return None


def _named_by(variable: str, folder: str) -> Path:
    try:
        return expanded(folder)
    except UserError as error:
        raise UserError(f"{variable}: {error}") from error


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
            return bytes(response.read(1 << 20))
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise TextUnavailable(
            f"The Time Machine could not be downloaded ({getattr(error, 'reason', error)}); "
            "put timemachine.txt into a folder and set RNNFAST_DATA to it"
        ) from error


def builtin_text() -> str:
    """English prose that every Python carries: the paragraphs of CPython's `pydoc_data.topics`, without its code."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python was installed without pydoc_data: name a text with --corpus FILE") from error
    paragraphs = (part.strip("\n") for topic in sorted(topics) for part in topics[topic].split("\n\n"))
    return "\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs if _is_prose(paragraph))


def _is_prose(paragraph: str) -> bool:
    """A paragraph of sentences: it ends like one, its lines are not indented, it holds no grammar rule."""
    lines = paragraph.split("\n")
    return (
        len(lines) > 1
        and paragraph.endswith((".", ":"))
        and "::=" not in paragraph
        and not any(line.startswith((" ", "*", "=", "-", "+", "|")) for line in lines)
    )


def read_text(path: Path) -> str:
    """A user's text file.

    Raises:
        UserError: it is missing, not a file, empty, binary or not UTF-8.
    """
    if path.is_char_device() or path.is_block_device():
        raise UserError(f"{path} is a device, which may have no end: name a text file with --corpus FILE")
    data = _read_bytes(path)
    for width in (32, 16):  # a mark of UTF-32 begins with one of UTF-16
        if data.startswith((getattr(codecs, f"BOM_UTF{width}_LE"), getattr(codecs, f"BOM_UTF{width}_BE"))):
            raise UserError(f"{path} is UTF-{width}: convert it with iconv -f utf-{width} -t utf-8")
    if b"\0" in data:
        raise UserError(f"{path} is a binary file, or UTF-16 (iconv -f utf-16 -t utf-8): name a UTF-8 text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}): convert it, "
            "for instance with iconv -f latin1 -t utf-8"
        ) from error
    if not text.strip():
        raise UserError(f"{path} is empty, or all spaces: name a text file with --corpus FILE")
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {reason(error)}; it must be a file that can be read") from error


def load_text(corpus: str | None) -> tuple[str, str]:
    """A text by name: "timemachine", "pydoc" (the built-in one), or the path of a UTF-8 file.

    With no name it is The Time Machine, or, where that cannot be had, the built-in text after a note that says so.

    Returns:
        What to call it later to get the same text again, and the text.
    """
    if corpus == "timemachine":
        return corpus, time_machine()
    if corpus == "pydoc":
        return corpus, builtin_text()
    if corpus is not None:
        path = expanded(corpus).absolute()
        return str(path), read_text(path)
    try:
        return "timemachine", time_machine()
    except TextUnavailable as error:
        note(f"{error}. Going on with the built-in text, the prose of Python's own documentation")
        return "pydoc", builtin_text()


def clean_lines(text: str) -> list[str]:
    """The lines of a text in lower case, every run of other characters than letters (A-Z) one space."""
    lines = io.StringIO(text, newline=None)  # ends of lines as in a file, which are fewer than those of `splitlines`
    return [re.sub("[^A-Za-z]+", " ", line).strip().lower() for line in lines]


def tokenize(text: str, unit: str = "char", raw: bool = False) -> str | list[str]:
    """The tokens of a text, cleaned first unless `raw`.

    Returns:
        For unit "char" a string, each character a token (cleaned lines follow one another with nothing between,
        as in d2l); for "word" the list of words.
    """
    if unit == "word":
        return (text if raw else " ".join(clean_lines(text))).split()
    return text if raw else "".join(clean_lines(text))


@dataclass(frozen=True)
class Corpus:
    """An encoded text: `train` and `validation` hold token ids, int64, (N,); `validation` may be empty."""

    name: str
    vocab: Vocab
    train: Tensor
    validation: Tensor


def load_corpus(
    name: str | None = None,
    *,
    tokens: Literal["char", "word"] = "char",
    raw: bool = False,
    min_freq: int = 0,
    max_tokens: int = -1,
    validation: float = 0.0,
) -> Corpus:
    """Load a text, build its vocabulary (from all of it), and encode its first `max_tokens` tokens (-1: all).

    Args:
        validation: the share of the encoded tokens, from their end, that is held out.

    Raises:
        UserError: the text cannot be had, or a setting is outside the range that `TrainConfig` gives it.
    """
    TrainConfig(
        corpus=name, tokens=tokens, raw=raw, min_freq=min_freq, max_tokens=max_tokens, validation=validation
    )  # checks them
    name, text = load_text(name)
    stream = tokenize(text, tokens, raw)
    if not stream:
        raise UserError(f"the text {name} holds no letters A-Z: train on it as it is with --raw")
    vocab = Vocab(stream, min_freq)
    if len(vocab) == 1:
        most = vocab.token_freqs[0][1]
        raise UserError(f"no token of the text {name} is seen {min_freq} times: give a --min-freq of at most {most}")
    ids = torch.tensor(vocab.encode(stream if max_tokens < 0 else stream[:max_tokens]))
    held_out = int(len(ids) * validation)
    return Corpus(name, vocab, ids[: len(ids) - held_out], ids[len(ids) - held_out :])


def sequential_batches(ids: Tensor, batch_size: int, num_steps: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Cut a text into `batch_size` long rows, and these into batches, each of which continues where the last ended.

    Args:
        ids: token ids, (N,).
        offset: number of tokens to skip at the start.

    Returns:
        Inputs and targets (the next tokens), both (batches, num_steps, batch_size) and contiguous.
    """
    length = max(0, len(ids) - offset - 1) // batch_size
    num_batches = length // num_steps

    def cut(start: int) -> Tensor:
        rows = ids[start : start + batch_size * length].view(batch_size, length)[:, : num_batches * num_steps]
        return rows.t().contiguous().view(num_batches, num_steps, batch_size)

    return cut(offset), cut(offset + 1)


def random_batches(
    ids: Tensor, batch_size: int, num_steps: int, offset: int = 0, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cut a text into pieces of `num_steps` tokens and batch them in `order`, a permutation of the pieces.

    Returns:
        Inputs and targets, both (batches, num_steps, batch_size) and contiguous.
    """
    num_pieces = num_random_pieces(len(ids), num_steps, offset)
    starts = offset + num_steps * (torch.arange(num_pieces) if order is None else order)
    num_batches = num_pieces // batch_size
    starts = starts[: num_batches * batch_size].view(num_batches, 1, batch_size)
    index = (starts + torch.arange(num_steps).view(1, num_steps, 1)).to(ids.device)
    return ids[index], ids[index + 1]


def num_random_pieces(num_tokens: int, num_steps: int, offset: int) -> int:
    """How many pieces `random_batches` cuts a text into."""
    return max(0, num_tokens - offset - 1) // num_steps


@dataclass
class Batches:
    """Batches, drawn anew for each epoch: from a random offset, and with `shuffle` in random order.

    Attributes:
        generator: the source of that randomness; its state decides the epochs to come.

    Raises:
        UserError: the text is shorter than one batch.
    """

    ids: Tensor
    batch_size: int
    num_steps: int
    shuffle: bool
    generator: torch.Generator

    def __post_init__(self) -> None:
        check_length(len(self.ids), self.batch_size, self.num_steps)

    def __len__(self) -> int:
        """The most batches an epoch can have; its offset may cost the last one."""
        if self.shuffle:
            return num_random_pieces(len(self.ids), self.num_steps, 0) // self.batch_size
        return (len(self.ids) - 1) // self.batch_size // self.num_steps

    def epoch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (batches, num_steps, batch_size); every batch is contiguous."""
        if not self.shuffle:
            offset = self._draw(self.num_steps + 1)
            return sequential_batches(self.ids, self.batch_size, self.num_steps, offset)
        offset = self._draw(self.num_steps)
        num_pieces = num_random_pieces(len(self.ids), self.num_steps, offset)
        order = torch.randperm(num_pieces, generator=self.generator)
        return random_batches(self.ids, self.batch_size, self.num_steps, offset, order)

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))


def check_length(num_tokens: int, batch_size: int, num_steps: int) -> None:
    """Refuse a text that has no whole batch after the largest offset."""
    needed = batch_size * num_steps + num_steps + 1
    if num_tokens < needed:
        raise UserError(
            f"there are {num_tokens} tokens to train on, but one batch of {batch_size} rows of {num_steps} steps needs "
            f"{needed}: take a longer text, more of it with --max-tokens (-1: all), or a smaller --validation, "
            "--batch-size or --steps"
        )
