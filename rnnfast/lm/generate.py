"""Text from a trained model, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rnnfast.lm.files import UserError, note
from rnnfast.lm.model import State
from rnnfast.lm.vocab import Vocab


def encode_prefix(prefix: str, vocab: Vocab, tokens: str = "char", tell: bool = True) -> list[int]:
    """The ids of a prefix. Tokens that the vocabulary does not know become `<unk>`; `tell` notes them, once, on stderr.

    Raises:
        UserError: the prefix is empty.
    """
    parts = prefix.split() if tokens == "word" else list(prefix)
    if not parts:
        raise UserError('the prefix is empty: give the text to go on from, such as --prefix "time traveller"')
    unknown = [repr(part) for part in dict.fromkeys(parts) if part not in vocab]
    if unknown and tell:
        note(f"the vocabulary lacks {', '.join(unknown)} of the prefix: taken as <unk>")
    return vocab.encode(parts)


def generate(
    model: nn.Module,
    prefix: list[int],
    length: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Warm the state up on `prefix`, then yield `length` token ids, each fed back as the next input.

    Args:
        temperature: 0 takes the likeliest token (greedy, as in the d2l chapter); otherwise logits are divided by it
            and a token is drawn.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the likeliest tokens that together have this probability (nucleus sampling).
        seed: of the draws; the global random state is neither read nor changed.

    Raises:
        UserError: an empty prefix, an option outside its range, or a bidirectional model.
    """
    _check(model, prefix, length, temperature, top_k, top_p)
    return _generate(model, prefix, length, temperature, top_k, top_p, seed)


def _generate(
    model: nn.Module,
    prefix: list[int],
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[int]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        inputs, state = torch.tensor(prefix, device=device).view(-1, 1), None
        for _ in range(length):
            logits, state = _step(model, inputs, state)
            token = pick(logits, temperature, top_k, top_p, generator)
            yield int(token)
            inputs = token.to(device).view(1, 1)
    finally:
        model.train(was_training)


@torch.no_grad()
def _step(model: nn.Module, inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """The logits (V,) behind the last of `inputs` (T, 1), and the state."""
    logits, state = model(inputs, state)
    return logits[-1, 0], state


def pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Choose a token by its logits (V,); draws happen on the CPU, so that a seed means the same on every device."""
    if temperature == 0:
        return logits.argmax()
    logits = logits.double().cpu()
    logits = (logits - logits.max()) / temperature  # the maximum is 0, so that no temperature overflows
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(0)
    if top_p is not None:
        ordered, index = probabilities.sort(descending=True)
        # A token stays if the likelier ones do not yet reach top_p; the likeliest always does.
        beyond = ordered.cumsum(0) - ordered >= top_p
        probabilities[index[beyond]] = 0.0
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def _check(
    model: nn.Module,
    prefix: list[int],
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if getattr(model, "bidirectional", False):
        raise UserError(
            "a bidirectional model cannot generate: its backward direction reads the tokens that are yet to be "
            "written; train without --bidirectional"
        )
    if not prefix:
        raise UserError("the prefix is empty: give at least one token")
    if length < 0:
        raise UserError(f"cannot generate {length} tokens: give a length of 0 or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"the temperature must be 0 (greedy) or a positive number, not {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p must be above 0 and at most 1, not {top_p}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise UserError("top-k and top-p say what to draw from, but temperature 0 draws nothing: add --temperature 1")


def render(ids: Iterator[int], vocab: Vocab, tokens: str = "char") -> Iterator[str]:
    """The text of generated ids, piece by piece, to be written behind the prefix."""
    for index in ids:
        token = vocab.to_tokens(index)
        yield f" {token}" if tokens == "word" else token
