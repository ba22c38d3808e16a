"""ONNX export: the scan as ONNX's standard RNN, LSTM and GRU.

    import rnnfast.onnx
    torch.onnx.export(model, (x,), "model.onnx", custom_translation_table=rnnfast.onnx.translation_table())

It needs `pip install 'rnnfast[onnx]'`. ONNX's operators have no projections, no batch_sizes and no changed recurrence,
so models with `proj_size`, PackedSequence input, lengths or resets, `LSTM.states`, or such a `Stack` are refused; a
`Stack` on the reference backend is exported step by step instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rnnfast.scan import BACKEND_NAMES, WITH_STATES

__all__ = ["translation_table"]

# torch.nn's gates in ONNX's order: i o f g of i f g o, z r n of r z n.
GATE_ORDER = {"rnn_tanh": (0,), "rnn_relu": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns what `torch.onnx.export` takes as `custom_translation_table`, for the scan of every backend.

    Raises:
        ImportError: onnxscript is not installed.
    """
    import onnxscript

    op: Any = onnxscript.opset18  # traced by the exporter: its operators take and give symbolic values

    def scan(
        input: Any,
        w_ih: Any,
        w_hh: Any,
        b_ih: Any,
        b_hh: Any,
        w_hr: Any,
        h_0: Any,
        c_0: Any,
        batch_sizes: Any,
        cell: str,
        bidirectional: bool,
        save_tape: bool,
    ) -> Any:
        if w_hr is not None:
            raise RuntimeError("ONNX's LSTM has no projection (proj_size): this model cannot be exported with it")
        if batch_sizes is not None:
            raise RuntimeError("ONNX's recurrent operators take no PackedSequence; export the model for padded input")
        lanes, _, hidden = (int(size) for size in w_hh.shape)
        inputs = int(w_ih.shape[2])
        options: dict[str, Any] = {
            "hidden_size": hidden,
            "direction": "bidirectional" if bidirectional else "forward",
        }
        x = input
        if input.dtype == onnxscript.ir.DataType.INT64:
            x = op.CastLike(op.OneHot(input, inputs, op.Constant(value_ints=[0, 1])), w_ih)
        batch = op.Shape(h_0, start=1, end=2)
        steps_and_rows = op.Concat(op.Constant(value_ints=[-1]), batch, op.Constant(value_ints=[inputs]), axis=0)
        x = op.Reshape(x, steps_and_rows)
        w, r = _reorder(op, w_ih, cell), _reorder(op, w_hh, cell)
        b = None if b_ih is None else op.Concat(_reorder(op, b_ih, cell), _reorder(op, b_hh, cell), axis=1)
        is_bfloat16 = h_0.dtype == onnxscript.ir.DataType.BFLOAT16  # which the operators have from opset 22 on
        first_h, first_c = h_0, c_0
        if is_bfloat16:
            x, w, r, b, first_h, first_c = (
                None if part is None else op.Cast(part, to=onnxscript.ir.DataType.FLOAT)
                for part in (x, w, r, b, h_0, c_0)
            )
        results: Any
        if cell == "lstm":
            results = op.LSTM(x, w, r, b, None, first_h, first_c, **options)
        elif cell == "gru":
            results = op.GRU(x, w, r, b, None, first_h, linear_before_reset=1, **options)
        else:
            activation = "Tanh" if cell == "rnn_tanh" else "Relu"
            results = op.RNN(x, w, r, b, None, first_h, activations=[activation] * lanes, **options)
        y, h_n, *c_n = (op.CastLike(result, h_0) for result in results) if is_bfloat16 else results
        # (T, D, B, H) to the rows of a scan, (T*B, D*H).
        columns = op.Constant(value_ints=[-1, lanes * hidden])
        output = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), columns)
        nothing = op.CastLike(op.ConstantOfShape(op.Constant(value_ints=[0])), h_0)
        return output, h_n, *(c_n or [nothing]), nothing

    def cut(lengths: Any, reset: Any, steps: Any, batch: Any, device: Any) -> Any:
        raise RuntimeError("lengths= and reset= cannot be exported to ONNX; export the model for padded input")

    def extended(*arguments: Any) -> Any:
        raise RuntimeError(
            "ONNX's recurrent operators have no zoneout, layer normalisation, recurrent dropout or peepholes: this "
            "model cannot be exported with them"
        )

    def states(*arguments: Any) -> Any:
        raise RuntimeError("ONNX's LSTM gives no c of every step: a model that calls LSTM.states cannot be exported")

    ops = torch.ops.rnnfast
    return {
        **{getattr(ops, f"scan_{backend}").default: scan for backend in BACKEND_NAMES},
        **{getattr(ops, f"scan_{backend}_states").default: states for backend in WITH_STATES},
        ops.scan_extended_cpu.default: extended,
        ops.cut.default: cut,
    }


def _reorder(op: Any, weight: Any, cell: str) -> Any:
    """Gates (D, G*H, ...) in ONNX's order."""
    order = GATE_ORDER[cell]
    hidden = int(weight.shape[1]) // len(order)
    rows = [gate * hidden + unit for gate in order for unit in range(hidden)]
    return op.Gather(weight, op.Constant(value_ints=rows), axis=1) if len(order) > 1 else weight
