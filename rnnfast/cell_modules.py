"""RNNCell, LSTMCell and GRUCell: drop-in replacements of torch.nn's, one time step a call.

Each is a subclass of its torch.nn namesake and inherits its parameters, pickling and repr. Beyond torch.nn, each takes
token ids in place of one-hot vectors, and a `backend`. For a loop that does no more than feed the state back,
`layer.step` or `rnnfast.Stream` serve as well; a sequence that is all there is faster in one call of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.types import Device

from rnnfast import direct, dispatch, functional, inputs
from rnnfast.autocast import autocast_dtype
from rnnfast.tracing import is_jit_traced, is_traced_for_onnx, is_transformed

State = TypeVar("State")  # of a cell: h, or (h, c) of an LSTM


class DropInCell(dispatch.Dispatched, nn.RNNCellBase, Generic[State]):
    """What the three cells share: torch.nn's conventions and checks, and the step.

    `forward` uses of `self` what torch.nn's cells have, and `backend`; so `accelerate` can bind it to one of those.
    """

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Runs one time step of B sequences of I = input_size inputs and H = hidden_size units.

        Even under autocast, states are computed, kept and returned in the weights' dtype, except on the torch backend.

        Args:
            input: (B, I), or (I,) unbatched, of the weights' dtype; or integer token ids, which stand for one-hot
                vectors, (B,) or (), unbatched.
            hx: the state h (B, H), for an LSTM (h, c); without B if unbatched. Zeros if None.

        Returns:
            The next state, in hx's form.

        Raises:
            ValueError, RuntimeError: as in torch.nn, for dimensions, sizes and dtypes that do not fit.
            TypeError: the input is not a tensor.
            IndexError: a token id outside [0, I).
        """
        may_be_direct = not torch.compiler.is_compiling()
        if may_be_direct and (result := direct.cell(self, input, hx)) is not None:
            return result
        if not isinstance(input, Tensor):
            raise TypeError(f"a cell takes a tensor, got {type(input).__name__}")
        token_ids = not (input.is_floating_point() or input.is_complex() or input.dtype == torch.bool)
        weight = self.weight_hh
        kind = dispatch.cell_of(self)
        request = (kind, weight.device.type, weight.dtype, token_ids, False, is_transformed())
        backend = dispatch.choose_name(dispatch.asked(self.backend), None, *request)
        if (backend == "torch" or is_traced_for_onnx()) and not token_ids:
            return _OF_TORCH.get(kind, nn.RNNCell).forward(self, input, hx)  # type: ignore[arg-type]

        name, dims = type(self).__name__, input.dim() + token_ids
        if dims not in (1, 2):
            if token_ids:
                raise ValueError(inputs.token_ids_error(name, "0D or 1D", input))
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        is_lstm = kind == "lstm"
        if hx is not None and not is_lstm and not isinstance(hx, Tensor):
            raise RuntimeError(f"{name} takes one tensor h as its state, got {type(hx).__name__}")
        states: list[Tensor] = [] if hx is None else list(inputs.checked_pair(hx)) if is_lstm else [hx]
        for index, state in enumerate(states):
            if state.dim() not in (1, 2):
                what = f"hx[{index}]" if is_lstm else "hidden"
                raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
        if dims == 1:
            input, states = input.unsqueeze(0), [state.unsqueeze(0) for state in states]
        if hx is None:
            states = [weight.new_zeros(input.shape[0], self.hidden_size) for _ in range(1 + is_lstm)]
        _check_sizes(self, input, states, token_ids)
        weights = functional.weights_of_cell(self)
        h_0, c_0 = states[0].unsqueeze(0), states[1].unsqueeze(0) if is_lstm else None
        if autocast_dtype(weight.device.type) is not None:
            input = input if token_ids else input.to(weight.dtype)
            h_0, c_0 = h_0.to(weight.dtype), None if c_0 is None else c_0.to(weight.dtype)
        _, h_n, c_n = functional.step(kind, input, h_0, c_0, [weights], backend=backend)
        if may_be_direct:
            direct.prepare(self, input)
        # The final state, which may be changed in place, as torch.nn's, and not the output, which backward needs. It
        # has the memory of h_n and c_n, which nobody else holds, but is no view: a view cannot be detached in place.
        final = [h_n, c_n] if is_lstm else [h_n]
        if is_jit_traced():  # which would make constants of the sizes
            h, *c = (n.squeeze(0) if dims == 2 else n.squeeze((0, 1)) for n in final)
        else:
            h, *c = (torch.ops.aten._unsafe_view.default(n, n.shape[1:] if dims == 2 else n.shape[2:]) for n in final)
        return (h, *c) if is_lstm else h

    if TYPE_CHECKING:  # torch.nn's is Callable[..., Any]

        def __call__(self, input: Tensor, hx: State | None = None) -> State: ...


class RNNCell(DropInCell[Tensor], nn.RNNCell):
    """`torch.nn.RNNCell`: h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu (Elman 1990).

    Takes torch.nn.RNNCell's arguments, and `backend`: "auto" or a name of `rnnfast.backends()`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = dispatch.AUTO,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias=bias,
            nonlinearity=nonlinearity,
            device=device,
            dtype=dtype,
            backend=backend,
        )


class LSTMCell(DropInCell[tuple[Tensor, Tensor]], nn.LSTMCell):
    """`torch.nn.LSTMCell` with forget gates (Gers et al. 2000).

    Takes torch.nn.LSTMCell's arguments, and `backend`: "auto" or a name of `rnnfast.backends()`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = dispatch.AUTO,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
            backend=backend,
        )


class GRUCell(DropInCell[Tensor], nn.GRUCell):
    """`torch.nn.GRUCell` (Cho et al. 2014), with the reset gate applied after the recurrent product.

    Takes torch.nn.GRUCell's arguments, and `backend`: "auto" or a name of `rnnfast.backends()`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = dispatch.AUTO,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
            backend=backend,
        )


_OF_TORCH = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}


def _check_sizes(cell: Any, input: Tensor, states: list[Tensor], token_ids: bool) -> None:
    """Raises torch.nn's errors, which come from its C++."""
    if not token_ids and input.shape[1] != cell.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {cell.input_size}")
    for index, state in enumerate(states):
        if state.dim() != 2:  # as torch 2.15 says; before, it compares sizes that are something else
            raise RuntimeError(f"Expected 2D hidden{index} (batch x hidden_size), but got {state.dim()}D tensor")
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden{index} batch size {state.shape[0]}"
            )
        if state.shape[1] != cell.hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {cell.hidden_size}"
            )
