"""The forms in which layers and stacks take a sequence: checks them, and converts them to time-major rows and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnfast import sequences

# torch.nn's methods that look at what a layer is given.
CHECKS = (
    "check_input",
    "check_forward_args",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
)


def check_kind(input: Any, lengths: Any, reset: Any, reset_to: Any) -> None:
    """Raises TypeError or ValueError unless the input is of a kind that a layer takes, and the others go with it."""
    if not isinstance(input, Tensor | PackedSequence):
        raise TypeError(f"input must be a tensor or a PackedSequence, got {type(input).__name__}")
    if isinstance(input, Tensor):
        refuse_nested(input)
    elif lengths is not None or reset is not None:
        raise ValueError("a PackedSequence has lengths of its own; give a padded tensor with lengths= or reset=")
    if reset_to is not None and reset is None:
        raise ValueError("reset_to is the state that reset= returns to: give reset= as well")


def refuse_nested(input: Tensor) -> None:
    if input.is_nested:
        raise TypeError("input must be a padded tensor or a PackedSequence, got a nested tensor; pad it, use lengths=")


def refuse_inference_weights(lanes: Sequence[Sequence[Tensor | None]]) -> None:
    """Raises where a gradient of weights would be lost without a word: no operation on such ones is recorded."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return
    if any(w is not None and w.requires_grad and w.is_inference() for lane in lanes for w in lane):
        raise RuntimeError(
            "the layer's weights were made in inference mode, so no gradient reaches them: make or load them outside "
            "torch.inference_mode(), for instance under torch.no_grad(), or call the layer without gradients"
        )


def check_step(input: Any, input_size: int) -> None:
    """Raises unless the input is one step of a batch, (B, I) or token ids (B,)."""
    if not isinstance(input, Tensor):
        raise TypeError(f"a step takes a tensor, got {type(input).__name__}")
    refuse_nested(input)
    has_features = input.is_floating_point() or input.is_complex()
    if not has_features and input.dim() > 1:
        raise RuntimeError(token_ids_error("a step", "1D", input))
    if input.dim() != 1 + has_features:
        raise RuntimeError(f"a step takes (B, {input_size}) input or (B,) token ids, got {tuple(input.shape)}")
    if has_features and input.shape[1] != input_size:
        got = input.shape[1]
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {input_size}, got {got}")


def is_batched(input: Tensor, name: str, tensor: str = "") -> bool:
    """Whether a padded input has a batch dimension.

    Args:
        input: (T, B, I) or (T, I), floating; or token ids, without I.
        name, tensor: words of torch.nn's message, the class's name and " tensor" where it has that.

    Raises:
        ValueError: it has another number of dimensions.
    """
    has_features = input.is_floating_point() or input.is_complex()
    dims = input.dim() - has_features
    if dims in (1, 2):
        return dims == 2
    if has_features:
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead")
    raise ValueError(token_ids_error(name, "1D or 2D", input))


def token_ids_error(name: str, expected: str, input: Tensor) -> str:
    """What is wrong with integers of too many dimensions: most are vectors, as of torch.nn.functional.one_hot."""
    return (
        f"{name}: Expected token ids to be {expected}, got {input.dim()}D {input.dtype} instead; "
        "of vectors, one-hot or others, make floating input: input.float()"
    )


def checked_pair(hx: Any) -> tuple[Tensor, Tensor]:
    """The state of an LSTM as it must be given."""
    if not isinstance(hx, tuple | list) or len(hx) != 2:
        given = f"{len(hx)} of them" if isinstance(hx, tuple | list) else type(hx).__name__
        raise RuntimeError(f"the state of an LSTM is a pair of tensors (h_0, c_0), got {given}")
    for part in hx:
        if not isinstance(part, Tensor):
            raise RuntimeError(f"the state of an LSTM is a pair of tensors (h_0, c_0), got {type(part).__name__} in it")
    return hx[0], hx[1]


def to_time_major(
    input: Tensor,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
    batched: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """A padded input (T, B, I), or ids (T, B), and its reset (T, B), of whatever form they were given in.

    Raises:
        TypeError, ValueError: reset is no mask of the input's shape, or lengths came with an unbatched input.
    """
    sequences.check_reset(reset, input.shape[: 1 + batched])
    if batched:
        if not batch_first:
            return input, reset
        return input.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
    if lengths is not None:
        raise ValueError("lengths= is for a batch of sequences; give an unbatched one without its padding")
    return input.unsqueeze(1), None if reset is None else reset.unsqueeze(1)


def from_time_major(output: Tensor, state: Any, batched: bool, batch_first: bool) -> tuple[Tensor, Any]:
    """An output (T, B, P) and the final state, in the form of the input."""
    if not batched:
        return output.squeeze(1), map_state(state, lambda part: part.squeeze(1))
    return output.transpose(0, 1) if batch_first else output, state


def map_state(state: Any, function: Callable[..., Tensor], *others: Any) -> Any:
    """Applies a function to a state, None, h, (h, c) or a list of such, part by part along with others of its form."""
    if state is None:
        return None
    if isinstance(state, tuple | list):
        return tuple(map_state(part, function, *rest) for part, *rest in zip(state, *others, strict=True))
    return function(state, *others)


def has_own_checks(kind: type) -> bool:
    """Whether a class derived from torch.nn's layers has checks of its own, which its calls must make."""
    base = next((base for base in (nn.LSTM, nn.GRU, nn.RNN) if issubclass(kind, base)), None)
    return base is not None and any(getattr(kind, name, None) is not getattr(base, name, None) for name in CHECKS)
