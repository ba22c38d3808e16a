"""What torch.utils.flop_counter counts of a scan: its products, as it does for other operators, and no gate math."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rnnfast.imports import after_import


def count(operators: Iterable[str]) -> None:
    """Has scans of these names counted, and their backward scans, `<name>_backward`."""
    names = [*operators]

    def register(flop_counter: ModuleType) -> None:
        for name in names:
            for suffix, formula in (("", _forward), ("_backward", _backward)):
                packet = getattr(torch.ops.rnnfast, name + suffix)
                flop_counter.register_flop_formula(packet, get_raw=True)(formula)

    after_import("torch.utils.flop_counter", register)  # importing it takes longer than importing rnnfast


# Both are given the arguments of the operator, which begin with those of `rnnfast.scan`, and its result.


def _forward(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, w_hr: Tensor | None, *_: Any, **__: Any
) -> int:
    return 2 * input.shape[0] * (_of_input(input, w_ih) + _recurrent(w_hh, w_hr))


def _backward(d_output: Any, d_h_n: Any, d_c_n: Any, *arguments: Any, **_: Any) -> int:
    input, w_ih, w_hh, _b_ih, _b_hh, w_hr, *_rest, need_input, need_weights = arguments
    of_input, recurrent = _of_input(input, w_ih), _recurrent(w_hh, w_hr)
    products = recurrent + of_input * bool(need_input) + (of_input + recurrent) * bool(need_weights)
    return 2 * int(input.shape[0]) * products


def _of_input(input: Tensor, w_ih: Tensor) -> int:
    return w_ih.numel() if input.is_floating_point() else 0  # of token ids it is rows that are looked up


def _recurrent(w_hh: Tensor, w_hr: Tensor | None) -> int:
    return w_hh.numel() + (0 if w_hr is None else w_hr.numel())
