"""accelerate and restore: the recurrent layers and cells of a model that exists already, made ours and back in place.

A torch.nn module becomes ours by taking our class: ours are subclasses that differ in their methods alone, so the
object, its parameters, buffers, hooks, mode and every reference to it, a list's, an optimizer's, another module's, stay
what they were. Putting a new module in its place would keep none but the parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from rnnfast import cell_modules, layers

_OURS: dict[type, type] = {
    nn.RNN: layers.RNN,
    nn.LSTM: layers.LSTM,
    nn.GRU: layers.GRU,
    nn.RNNCell: cell_modules.RNNCell,
    nn.LSTMCell: cell_modules.LSTMCell,
    nn.GRUCell: cell_modules.GRUCell,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_NAMES = {theirs.__name__ for theirs in _OURS}
_MARK = "_accelerated"  # set on what was swapped, so that restore leaves alone what was ours from the start


class Swap(NamedTuple):
    """A recurrent module of a model: its names (several if it is shared, "" if it is the model), and what was done.

    `left_because` is None if it was swapped.
    """

    names: tuple[str, ...]
    kind: str
    left_because: str | None


class SwapReport(tuple[Swap, ...]):
    """What `accelerate` swapped and what it left and why, printed as a table."""

    @property
    def swapped(self) -> tuple[Swap, ...]:
        return tuple(swap for swap in self if swap.left_because is None)

    @property
    def left(self) -> tuple[Swap, ...]:
        return tuple(swap for swap in self if swap.left_because is not None)

    def __repr__(self) -> str:
        rows = [(", ".join(name or "(the model)" for name in swap.names), swap.kind) for swap in self]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        for swap, row in zip(self, rows, strict=True):
            what = "swapped" if swap.left_because is None else f"left: {swap.left_because}"
            lines.append("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=True)), what]))
        return "\n".join(lines)


def accelerate(model: nn.Module) -> SwapReport:
    """Makes every nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell of a model rnnfast's, in place.

    Parameters, names, hooks, buffers, modes, `isinstance` checks, sharing, and references from optimizers and elsewhere
    all stay valid, and the model can be pickled and copied. One thing changes: `type(layer) is nn.LSTM` is False, as
    ours is a subclass. `restore` undoes it.

    Args:
        model: a module with recurrent layers or cells in it, or one itself.

    Returns:
        What was swapped, and what was left and why. Print it.
    """
    swaps = []
    for names, module in _recurrent_modules(model):
        reason = _why_not(module)
        if reason is None:
            module.__class__ = _OURS[type(module)]
            setattr(module, _MARK, True)
        kind = module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
        swaps.append(Swap(names, kind, reason))
    return SwapReport(swaps)


def restore(model: nn.Module) -> None:
    """Makes torch.nn's again of all that `accelerate` made rnnfast's; layers that were rnnfast's before stay so.

    Raises:
        RuntimeError: a layer has been given yet another class since, as FSDP and parametrizations do.
    """
    accelerated = [(name, module) for name, module in model.named_modules() if _MARK in vars(module)]
    for name, module in accelerated:
        if type(module) not in _THEIRS:
            raise RuntimeError(
                f"'{name}' has become a {type(module).__name__} since it was accelerated: undo that first"
            )
    for _, module in accelerated:
        module.__class__ = _THEIRS[type(module)]
        delattr(module, _MARK)


def _recurrent_modules(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Every recurrent module once, with all its names."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) or _is_compiled(module) or _is_quantized(module):
            found.setdefault(module, []).append(name)
    return [(tuple(names), module) for module, names in found.items()]


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", None) in _NAMES


def _is_quantized(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn.quant") and kind.__name__ in _NAMES


def _why_not(module: nn.Module) -> str | None:
    """Why a recurrent module cannot be swapped, or None."""
    kind = type(module)
    if _is_compiled(module):
        return "it was compiled by torch.jit; accelerate what it was compiled from"
    if _is_quantized(module):
        return "it is quantized or made to be, and rnnfast computes in floating point"
    if isinstance(module, tuple(_THEIRS)):
        return "it is rnnfast's already"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if kind in _OURS:
        return None
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized, and so has a class of its own; accelerate first, then parametrize"
    base = next((base for base in kind.__mro__ if base in _OURS), None)
    if base is None:
        return f"{kind.__name__} is no layer or cell that rnnfast has"
    return f"{kind.__name__} is a subclass of torch.nn.{base.__name__}; derive it from rnnfast.{base.__name__}"
