"""The vocabulary: a token is a character or a word, its id an index by descending frequency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, overload

UNKNOWN = "<unk>"


def count_corpus(tokens: Iterable[Any]) -> Counter[Any]:
    """Count tokens, given flat or as a list of lines, which are lists; a tuple is a token, such as a bigram."""
    if not isinstance(tokens, str):
        tokens = list(tokens)
        if tokens and isinstance(tokens[0], list):
            return Counter(token for line in tokens for token in line)
    return Counter(tokens)


class Vocab:
    """Maps tokens to ids and back. `<unk>` is 0, followed by the reserved tokens, then the others by descending
    frequency, and by first appearance if equally frequent.

    Args:
        tokens: a flat sequence of tokens (in a string these are its characters; tuples are tokens), or a list of lines,
            which are lists of tokens.
        min_freq: tokens seen fewer times become `<unk>`.
        reserved_tokens: tokens that get an id whether they occur or not, such as `<pad>`.
    """

    def __init__(
        self,
        tokens: Iterable[Any] | None = None,
        min_freq: int = 0,
        reserved_tokens: Sequence[str] | None = None,
    ) -> None:
        self.token_freqs: list[tuple[Any, int]] = count_corpus(tokens if tokens is not None else ()).most_common()
        frequent = (token for token, count in self.token_freqs if count >= min_freq)
        self.idx_to_token: list[Any] = list(dict.fromkeys([UNKNOWN, *(reserved_tokens or ()), *frequent]))
        self.token_to_idx = {token: index for index, token in enumerate(self.idx_to_token)}

    @classmethod
    def from_list(cls, idx_to_token: Sequence[str]) -> Vocab:
        """The vocabulary whose token i is `idx_to_token[i]`, as a checkpoint holds it.

        Raises:
            ValueError: token 0 is not `<unk>`, or a token has two ids.
        """
        vocab = cls(reserved_tokens=idx_to_token)
        if vocab.idx_to_token != list(idx_to_token):
            raise ValueError(f"the tokens of a vocabulary are {UNKNOWN} and then others, each once")
        return vocab

    unk = 0

    def __len__(self) -> int:
        return len(self.idx_to_token)

    def __contains__(self, token: Any) -> bool:
        return token in self.token_to_idx

    @overload
    def __getitem__(self, tokens: str) -> int: ...
    @overload
    def __getitem__(self, tokens: list[Any]) -> list[int]: ...
    @overload
    def __getitem__(self, tokens: tuple[Any, ...]) -> Any: ...
    def __getitem__(self, tokens: Any) -> Any:
        """The id of a token, or the ids of a list of tokens; a tuple is either, a token if the vocabulary has it."""
        if isinstance(tokens, (list, tuple)):
            with suppress(KeyError, TypeError):  # a list has no hash
                return self.token_to_idx[tokens]
            return [self[token] for token in tokens]
        return self.token_to_idx.get(tokens, self.unk)

    def encode(self, tokens: Iterable[Any]) -> list[int]:
        """Ids of a flat sequence of tokens; a string is a sequence of characters."""
        index, unk = self.token_to_idx, self.unk
        return [index.get(token, unk) for token in tokens]

    def to_tokens(self, indices: Any) -> Any:
        """The token of an id, or the tokens of a sequence (or 1-D tensor) of ids."""
        if hasattr(indices, "tolist"):
            indices = indices.tolist()
        if isinstance(indices, (list, tuple)):
            return [self.idx_to_token[int(index)] for index in indices]
        return self.idx_to_token[indices]
