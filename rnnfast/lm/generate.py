"""Text from a trained model, one token at a time."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnnfast.backends.cpu import packing
from rnnfast.errors import UserError, note
from rnnfast.lm import operators
from rnnfast.lm.model import State
from rnnfast.lm.parts import parts_of
from rnnfast.lm.vocab import Vocab
from rnnfast.locks import ForkSafeLock

Drawing = tuple[float, int | None, float | None]
"""What a token is drawn from: temperature, top_k and top_p, as in `generate`."""

_modes = ForkSafeLock()  # held while a model in training mode is in evaluation mode for a step
NOT_FINITE = "the model's logits are not finite, there is nothing to draw from: its training has diverged"
CHUNK = 64  # tokens that the native loop writes before it returns to Python, where a stream can be shown or stopped


def encode_prefix(prefix: str, vocab: Vocab, tokens: str = "char", tell: bool = True) -> list[int]:
    """The ids of a prefix. Tokens missing from the vocabulary become `<unk>`; with `tell` they are listed on stderr.

    Raises:
        UserError: the prefix is empty.
    """
    parts = prefix.split() if tokens == "word" else list(prefix)
    if not parts:
        raise UserError('the prefix is empty: give the text to continue, such as --prefix "time traveller"')
    unknown = [repr(part) for part in dict.fromkeys(parts) if part not in vocab]
    if unknown and tell:
        note(f"the vocabulary lacks {', '.join(unknown)} of the prefix: replaced by <unk>")
    return vocab.encode(parts)


def generate(
    model: nn.Module,
    prefix: Sequence[int],
    length: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Warm up the state on `prefix`, then yield `length` token ids, each fed back as the next input.

    Args:
        temperature: 0 takes the likeliest token (greedy, as in the d2l chapter); otherwise logits are divided by it
            and a token is drawn.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the likeliest tokens that together have this probability (nucleus sampling).
        seed: of the draws, in [0, 2^63); the global random state is neither read nor changed.

    Raises:
        UserError: an empty prefix, an option outside its range, or a bidirectional model.
        TypeError: the prefix is a text, or a tensor, or not of whole numbers.
        IndexError: a token of the prefix is outside the vocabulary; raised with the first token.
    """
    _check(model, prefix, length, temperature, top_k, top_p, seed)
    return _generate(model, [*map(operator.index, prefix)], length, (temperature, top_k, top_p), seed)


def _generate(model: nn.Module, prefix: list[int], length: int, drawing: Drawing, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    native = native_parts(model)
    if native is not None:
        yield from _native(native, prefix, length, drawing, generator)
        return
    device = next(model.parameters()).device
    inputs, state = torch.tensor(prefix, device=device).view(-1, 1), None
    modules = [*model.modules()]
    for _ in range(length):
        logits, state = _step(model, modules, inputs, state)
        token = pick(logits, *drawing, generator)
        yield int(token)
        inputs = token.to(device).view(1, 1)


@torch.no_grad()
def _step(model: nn.Module, modules: list[nn.Module], inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """The logits (V,) after the last of `inputs` (T, 1), and the state.

    In evaluation mode, for this call only: between two tokens the model is its owner's, who may train it. `modules` are
    all of the model's: to ask each is quicker than to put the whole model into a mode, which takes longer than a step.
    """
    with _modes.lock:  # a text of another thread would otherwise lose the evaluation mode in the middle of its step
        training = [module for module in modules if module.training]
        if training:
            model.eval()
            try:
                logits, state = model(inputs, state)
            finally:
                for module in training:
                    module.training = True
            return logits[-1, 0], state
    logits, state = model(inputs, state)
    return logits[-1, 0], state


class NativeParts(NamedTuple):
    """A language model and its state, at first zeros, as `rnnfast.lm.operators.generate` takes them."""

    packed: list[Tensor]
    embedding: Tensor | None
    head_weight: Tensor
    head_bias: Tensor | None
    h_0: Tensor
    c_0: Tensor | None


def native_parts(model: nn.Module) -> NativeParts | None:
    """The model's parts if the native loop can run it, else None: the loop in Python then calls the model.

    It can if the model has `parts_of`, in float32 or float64. Both loops have the same hidden states, bit for bit, and
    the same draws; logits may differ in their last bit. The parts hold the weights as they are now.
    """
    parts = parts_of(model)
    if parts is None or parts.head_weight.dtype not in (torch.float32, torch.float64):
        return None
    layers, cell, embedding, head_weight, head_bias = parts
    packed = [packing.packed_weights([lane], cell, i == 0 and embedding is None) for i, lane in enumerate(layers)]
    dense = [None if part is None else part.detach().contiguous() for part in (embedding, head_bias)]
    h_0 = head_weight.new_zeros(len(packed), 1, head_weight.shape[1])
    return NativeParts(
        packed, dense[0], head_weight.detach().contiguous(), dense[1], h_0, h_0 if cell == "lstm" else None
    )


def _native(
    parts: NativeParts, prefix: list[int], length: int, drawing: Drawing, generator: torch.Generator
) -> Iterator[int]:
    vocabulary = len(parts.head_weight)
    for token in prefix:
        if not 0 <= token < vocabulary:
            raise IndexError(f"token ids must be in [0, {vocabulary}), got {token}")
    token, parts = prefix[-1], _after(parts, prefix[:-1])
    temperature, top_k, top_p = drawing
    top_k = None if top_k is None else min(top_k, vocabulary)  # the operator takes 64 bits
    for start in range(0, length, CHUNK):
        count = min(CHUNK, length - start)
        draws = uniforms(count, generator) if temperature > 0 else None
        try:
            ids, h, c = operators.generate(*parts, token, count, draws, temperature, top_k, top_p)
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            raise UserError(NOT_FINITE) from error
        parts = parts._replace(h_0=h, c_0=None if parts.c_0 is None else c)
        chunk = ids.tolist()
        yield from chunk
        token = chunk[-1]


def _after(parts: NativeParts, ids: list[int]) -> NativeParts:
    """With the states after these tokens, through all of which a layer walks before the next one does."""
    if not ids:
        return parts
    rows = torch.tensor(ids, device="cpu")  # whatever the default device
    if parts.embedding is not None:
        rows = parts.embedding[rows]
    states = []
    for layer, packed in enumerate(parts.packed):
        one = slice(layer, layer + 1)
        rows, *state = packing.scan_packed(rows, packed, parts.h_0[one], None if parts.c_0 is None else parts.c_0[one])
        states.append(state)
    h, c = map(torch.cat, zip(*states, strict=True))
    return parts._replace(h_0=h, c_0=None if parts.c_0 is None else c)


def pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Choose a token by its logits (V,); draws happen on the CPU, so that a seed means the same on every device.

    A draw inverts the cumulative distribution at one uniform number, in float64. `csrc/cpu/lm` does the same
    operations in the same order.

    Raises:
        UserError: logits that are not finite (at temperature 0: one that is NaN).
    """
    if temperature == 0:
        token = logits.argmax()  # for which a NaN is the greatest
        if logits[token].isnan():
            raise UserError(NOT_FINITE)
        return token
    logits = logits.double().cpu()
    logits = (logits - logits.max()) / temperature  # the maximum is 0, so that no temperature overflows
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    weights = logits.exp()
    if top_p is not None:
        ordered, index = weights.sort(descending=True, stable=True)
        cumulative = ordered.cumsum(0)
        # A token stays if the likelier ones do not yet reach top_p; the likeliest always does.
        weights[index[cumulative - ordered >= top_p * cumulative[-1]]] = 0.0
    cumulative = weights.cumsum(0)
    if not cumulative[-1] > 0:
        raise UserError(NOT_FINITE)
    return torch.searchsorted(cumulative, uniforms(1, generator) * cumulative[-1])[0]


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """Numbers (count,) in (0, 1], float64.

    Without 0, the first token whose cumulative weight reaches number * total has a weight above 0 itself.
    """
    return 1 - torch.rand(count, dtype=torch.float64, generator=generator, device="cpu")


def _check(
    model: nn.Module,
    prefix: Sequence[int],
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    if getattr(model, "bidirectional", False):
        raise UserError(
            "a bidirectional model cannot generate: its backward direction reads the tokens that are yet to be "
            "written; train without --bidirectional"
        )
    if isinstance(prefix, str | Tensor):
        made = "encode_prefix makes one" if isinstance(prefix, str) else "take its .tolist()"
        raise TypeError(f"the prefix is a list of token ids, not a {type(prefix).__name__}: {made}")
    if not prefix:
        raise UserError("the prefix is empty: give at least one token")
    if length < 0:
        raise UserError(f"cannot generate {length} tokens: give a length of 0 or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"the temperature must be 0 (greedy) or a positive number, not {temperature}")
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise UserError(f"top-k must be a whole number of at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p must be above 0 and at most 1, not {top_p}")
    if not 0 <= seed < 2**63:
        raise UserError(f"the seed must be in [0, 2^63), not {seed}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise UserError("top-k and top-p say what to draw from, but temperature 0 draws nothing: add --temperature 1")


def render(ids: Iterable[int], vocab: Vocab, tokens: str = "char") -> Iterator[str]:
    """The text of generated ids, piece by piece, to be written after the prefix."""
    for index in ids:
        token = vocab.to_tokens(index)
        yield f" {token}" if tokens == "word" else token
