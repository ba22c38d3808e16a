"""accelerate and restore: the recurrent layers and cells of a model that exists already, made ours and back in place.

A torch.nn module becomes ours by taking our methods: `forward`, `step` and `states` are set on the object, bound to it,
and its class stays torch.nn's. So the object, its type, parameters, buffers, hooks, mode and every reference to it, a
list's, an optimizer's, another module's, stay what they were. Putting a new module in its place would keep none but the
parameters, and giving it another class would lose the type.
"""

from __future__ import annotations

import inspect
import re
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from rnnfast import cell_modules, compiling, dispatch, layers
from rnnfast.direct.plans import forget_plan
from rnnfast.inputs import CHECKS

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: layers.RNN,
    nn.LSTM: layers.LSTM,
    nn.GRU: layers.GRU,
    nn.RNNCell: cell_modules.RNNCell,
    nn.LSTMCell: cell_modules.LSTMCell,
    nn.GRUCell: cell_modules.GRUCell,
}
_NAMES = {theirs.__name__ for theirs in _OURS}
_RECURRENT_NODE = r"(aten|quantized)::(quantized_)?(lstm|gru|rnn_tanh|rnn_relu)(_dynamic)?\(|rnnfast::scan_"
_RECURRENT_OPERATOR = r"aten\.(lstm|gru|rnn_tanh|rnn_relu)\.|rnnfast\.scan_"
_METHODS = "forward", "step", "states", "__prepare_scriptable__"
# What of a class takes part in a call: a subclass that changes none of it computes what torch.nn's does.
_TAKING_PART = (
    "forward",
    *CHECKS,
    "permute_hidden",
    "_update_flat_weights",
    "_weights_have_changed",
)
# As they are before anyone patches them.
_TORCHS = {base: {name: getattr(base, name, None) for name in _TAKING_PART} for base in _OURS}


class Method:
    """A function bound to a module that keeps it among its own attributes.

    Python's bound methods would hold the module, and thereby themselves, so that a deleted model stays in memory until
    the garbage collector comes by; they would also be pickled by name, and so come back as the class's. A copy of the
    module, by deepcopy or pickle, has copies of these, which are bound to it.
    """

    __slots__ = ("_function", "_module")

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self._function, self._module = function, weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._owner(), *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return method_of, (self._owner(), self._function.__name__)  # a pickle holds no path into the package

    @property
    def __code__(self) -> types.CodeType:
        return self._function.__code__  # torch.export names it in its messages

    # A bound method's attributes, for what wraps the function in it and binds that again (Hugging Face Accelerate).
    @property
    def __func__(self) -> Callable[..., Any]:
        return self._function

    @property
    def __self__(self) -> nn.Module:
        try:
            return self._owner()
        except ReferenceError as error:
            raise AttributeError(str(error)) from error

    @property
    def __name__(self) -> str:
        return self._function.__name__

    @property
    def __wrapped__(self) -> Any:
        """Where `inspect` finds the signature."""
        return types.MethodType(self._function, self.__self__)

    def _owner(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError(f"the module whose {self._function.__name__} this was is gone; keep the module itself")
        return module


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
        if not self:
            return "0 swapped, 0 left: there is no RNN, LSTM, GRU or cell of torch.nn's in it"
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        for swap, row in zip(self, rows, strict=True):
            what = "swapped" if swap.left_because is None else f"left: {swap.left_because}"
            lines.append("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=True)), what]))
        return "\n".join(lines)


def accelerate(model: nn.Module) -> SwapReport:
    """Makes every nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell of a model run as rnnfast's, in place.

    Parameters, names, hooks, buffers, modes, sharing, `type` and `isinstance` checks, and references from optimizers
    and elsewhere all stay valid, and the model can be pickled and copied. A swapped layer gets rnnfast's `forward`,
    with `lengths=`, `reset=` and token ids, and `step`; an LSTM also gets `states`; a cell gets `forward`. All have a
    `backend`, "auto", which may be set to a name of `rnnfast.backends()`. Subclasses of torch.nn's classes are swapped
    too, unless they change what a call does. `restore` undoes all of it.

    Args:
        model: a module that contains recurrent layers or cells, or is one itself.

    Returns:
        A report of what was swapped, and what was left and why. Print it.

    Raises:
        TypeError: it is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module, got {type(model).__name__}")
    swaps = []
    for names, module in _recurrent_modules(model):
        reason = _why_not(module)
        if reason is None:
            _bind(module)
        kind = module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
        swaps.append(Swap(names, kind, reason))
    return SwapReport(swaps)


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: the layers and cells it swapped are torch.nn's again; rnnfast's own stay as they are.

    Raises:
        TypeError: it is no module.
        RuntimeError: a module has since been given yet another `forward`, as by some libraries' hooks: remove these.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore takes a torch.nn.Module, got {type(model).__name__}")
    accelerated = [(name, module) for name, module in model.named_modules() if _bound_names(module)]
    for name, module in accelerated:
        if not _has_our_forward(module) and not _has_torchs_forward(module):
            raise RuntimeError(
                f"{name or 'the model'} has been given another forward since it was accelerated: "
                "first remove what replaced it, such as a library's hooks"
            )
    for _, module in accelerated:
        forget_plan(module)  # who follows it would ask for what is gone
        for name in {"forward", "backend", *_bound_names(module)}:
            delattr(module, name)


def is_ours(module: Any) -> bool:
    """Whether a layer or cell is of a class of rnnfast's, or one of torch.nn's that is accelerated."""
    return isinstance(module, layers.DropIn | cell_modules.DropInCell) or _has_our_forward(module)


def _set_forward(module: nn.Module) -> Any:
    """The function of a method that is set on the object as its forward, by us or by a library; None if none is."""
    return getattr(vars(module).get("forward"), "__func__", None)


def _our_forward(module: nn.Module) -> Any:
    return _OURS.get(_base(type(module)), nn.Module).forward


def _has_our_forward(module: nn.Module) -> bool:
    return _set_forward(module) is _our_forward(module)


def _has_torchs_forward(module: nn.Module) -> bool:
    """Whether torch.nn's is set on the object, as it is after unpickling one that a library has put together again."""
    return _set_forward(module) is (_base(type(module)) or nn.Module).forward


def _runs_ours(module: Any) -> bool:
    """Whether it is ours, or its forward wraps ours."""
    if is_ours(module):
        return True
    function = _set_forward(module)
    return function is not None and inspect.unwrap(function) is _our_forward(module)


compiling.let_dynamo_trace(_runs_ours)
compiling.let_fx_keep_whole(is_ours)


def _bind(module: nn.Module) -> None:
    """Sets our methods on the object."""
    ours = _OURS[_base(type(module))]
    for name in _METHODS:
        if hasattr(ours, name):
            setattr(module, name, method_of(module, name))
    module._replicate_for_data_parallel = method_of(module, _replicate.__name__)  # type: ignore[method-assign]
    module.backend = dispatch.AUTO  # type: ignore[assignment]


def method_of(module: nn.Module, name: str) -> Method:
    """The method of that name of our class for a module, or `_replicate`, bound to it."""
    function = _replicate if name == _replicate.__name__ else getattr(_OURS[_base(type(module))], name)
    return Method(function, module)


def _replicate(module: nn.Module) -> nn.Module:
    """DataParallel's copy: it has the attributes of the module that it was made from, methods bound to that too."""
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)
    for name, value in vars(module).items():
        if isinstance(value, Method | types.MethodType) and value.__self__ is module:
            setattr(replica, name, type(value)(value.__func__, replica))
    return replica


def _bound_names(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, Method)]


def _base(kind: type) -> Any:
    """The class of torch.nn's that it is or derives from, or None if rnnfast has none like it."""
    return next((base for base in kind.__mro__ if base in _OURS), None)


def _name_of(kind: type) -> str:
    """With its module, as libraries have classes of torch.nn's names."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _recurrent_modules(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Every recurrent module once, with all its names."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) or _is_jit_compiled(module) or _is_quantized(module):
            found.setdefault(module, []).append(name)
    return [(tuple(names), module) for module, names in found.items()]


def hides_state(module: nn.Module) -> bool:
    """Whether a recurrent layer runs in it whose states no hook sees: quantized, compiled by torch.jit, or exported."""
    if isinstance(module, torch.jit.ScriptModule):
        try:
            return re.search(_RECURRENT_NODE, str(module.inlined_graph)) is not None
        except RuntimeError:  # it has no forward
            return False
    if isinstance(module, torch.fx.GraphModule):
        return any(re.match(_RECURRENT_OPERATOR, str(node.target)) for node in module.graph.nodes)
    return _is_quantized(module) and not type(module).__name__.endswith("Cell")


def _is_jit_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", None) in _NAMES


def _is_quantized(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn.quant") and kind.__name__ in _NAMES


def _why_not(module: nn.Module) -> str | None:
    """Why a recurrent module cannot be swapped, or None."""
    kind = type(module)
    if _is_jit_compiled(module):
        return "it was compiled by torch.jit; accelerate what it was compiled from"
    if _is_quantized(module):
        return "it is quantized or made to be, and rnnfast computes in floating point"
    if is_ours(module):
        return "it is rnnfast's already"
    base = _base(kind)
    if base is None:
        return f"{_name_of(kind)} is none of torch.nn's layers and cells, nor derived from one"
    patched = [name for name in _TAKING_PART if getattr(base, name, None) is not _TORCHS[base][name]]
    if patched:
        return f"{_name_of(base)}.{patched[0]} was replaced, and rnnfast's would go past what replaced it"
    changed = [name for name in _TAKING_PART if getattr(kind, name, None) is not getattr(base, name, None)]
    if changed:
        return f"{_name_of(kind)} has a {changed[0]} of its own; derive it from rnnfast.{base.__name__}"
    bound = vars(module).get("forward")
    if bound is not None and not (_has_torchs_forward(module) and bound.__self__ is module):
        return "its forward was replaced on the object; accelerate before that, as before a library that sets hooks"
    taken = [name for name in (*_METHODS[1:], "backend") if hasattr(module, name) and not _bound_names(module)]
    if taken:
        return f"it has an attribute {taken[0]} of its own, which rnnfast's would hide"
    return None
