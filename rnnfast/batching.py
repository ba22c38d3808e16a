"""How torch.vmap maps the scan over M members: as one scan over all of them.

Where the members share their weights, they are more rows of one scan: the index of the member goes behind that of the
row, so that the rows of a step stay together and lengths stay sorted. Where each has weights of its own, they are lanes
of one scan. Lanes share their input; so an input of each member's own is multiplied by its w_ih beforehand, and the
scan is handed the products as a table in which the token ids 0, 1, 2... look up one column a row. Each lane then reads
rows of its own, and the gradient of the table is the gradient of the gates, row by row. That also gives the gradient of
each member's weights where the members share them (per-sample gradients): one reverse scan over all rows, and the sums
over rows a member at a time.

Members M, lanes D, rows N, rows of the first step B, inputs I, gates times hidden units GH, size of the state P: as in
`rnnfast.scan`. The arguments of the rules are those of `torch.library.register_vmap` behind the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import _C, Tensor

from rnnfast.backends import reference
from rnnfast.derivatives import needs_gradient

Dims = Sequence["int | None"]
Tensors = list[Any]  # of tensors, or None for those that the layer lacks

# The dimension that rows, or the sequences of a batch, have in the tensors of a layer: input, weights, h_0, c_0.
_LAYER_ROWS = (0, None, None, None, None, None, 1, 1)


def map_forward(op: Any, info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    """The rule of a forward scan."""
    *layer, batch_sizes, cell, bidirectional, save_tape = arguments
    members, dims = info.batch_size, in_dims[:8]
    _refuse_mapped_lengths(in_dims[8])
    if _none_mapped(dims[1:6]):
        layer = _fold(layer, dims, _LAYER_ROWS, members)
        results = op(*layer, _times(batch_sizes, members), cell, bidirectional, save_tape or needs_gradient(layer))
        return _unfold(results, (0, 1, 1, 1), members)

    dtype, layer = layer[6].dtype, _members_first(layer, dims, members)
    if dims[0] is not None:
        layer = _widen(layer)
        layer[1], layer[0] = _products(layer[0], layer[1]), _row_ids(layer[0])
    else:
        layer[0] = arguments[0]
    lanes = _as_lanes(layer)
    output, *others = op(*lanes, batch_sizes, cell, bidirectional, save_tape or needs_gradient(lanes))
    results = [output.unflatten(1, (members, -1)), *(_from_lanes(t, members) for t in others)]
    return tuple(t.to(dtype) for t in results), (1, *(None if t.dim() == 1 else 0 for t in others))


def map_backward(op: Any, info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    """The rule of a backward scan."""
    *_, need_input, need_weights = arguments
    tensors, dims = [*arguments[:11], *arguments[14:16]], [*in_dims[:11], *in_dims[14:16]]
    members = info.batch_size
    _refuse_mapped_lengths(in_dims[11])
    scan = (op, *arguments[11:14])
    if not _none_mapped(dims[4:9]):
        return _over_lanes(scan, tensors, dims, members, need_input, need_weights)
    if not need_weights:
        return _over_rows(scan, tensors, dims, members, need_input)
    # A second derivative must see the products of each row, and a projection leaves no gradient of each row.
    if _may_be_differentiated(tensors) or tensors[8] is not None:
        return _over_lanes(scan, tensors, dims, members, need_input, need_weights)
    return _over_rows_and_weights(scan, tensors, dims, members, need_input)


# ---- the backward scan: tensors are the gradients of its results, the layer, output and tape -----------------------


def _fold_backward(tensors: Tensors, dims: Dims, members: int) -> Tensors:
    return _fold(tensors, dims, (0, 1, 1, *_LAYER_ROWS, 0, 1), members)


def _over_rows(scan: Any, tensors: Tensors, dims: Dims, members: int, need_input: bool) -> tuple[Any, Any]:
    """Shared weights without gradient."""
    op, batch_sizes, cell, bidirectional = scan
    *layer, output, tape = _fold_backward(tensors, dims, members)
    results = op(*layer, _times(batch_sizes, members), cell, bidirectional, output, tape, need_input, False)
    return _unfold(results, (0, *[None] * 5, 1, 1), members)


def _over_rows_and_weights(scan: Any, tensors: Tensors, dims: Dims, members: int, need_input: bool) -> tuple[Any, Any]:
    """Shared weights, of which each member has a gradient of its own."""
    op, batch_sizes, cell, bidirectional = scan
    dtype, tensors = tensors[-1].dtype, _widen(tensors)
    input, w_ih, _, b_ih = _members_first(tensors[3:7], dims[3:7], members)
    d_output, d_h_n, d_c_n, _, *weights, h_0, c_0, output, tape = _fold_backward(tensors, dims, members)
    rows = len(output)
    table = w_ih.new_empty((*w_ih.shape[1:3], rows))
    sizes = _times(batch_sizes, members)
    layer = (torch.arange(rows, device=table.device), table, *weights[1:], h_0, c_0)
    _, d_table, *_, d_h_0, d_c_0 = op(
        d_output, d_h_n, d_c_n, *layer, sizes, cell, bidirectional, output, tape, False, True
    )
    d_gates = d_table.unflatten(2, (-1, members)).movedim(3, 0)
    d_recurrent = reference.recurrent_gradient(cell, d_table.mT, tape).mT.unflatten(2, (-1, members)).movedim(3, 0)
    before = reference.states_before(output, h_0, sizes, bidirectional).unflatten(1, (-1, members)).movedim(2, 0)
    d_input, d_w_ih = _product_gradients(d_gates, input, w_ih, need_input, True)
    has_bias = b_ih is not None
    results = [
        d_input,
        d_w_ih,
        d_recurrent @ before,
        d_gates.sum(3) if has_bias else _empty(output),
        d_recurrent.sum(3) if has_bias else _empty(output),
        _empty(output),
    ]
    states, state_dims = _unfold((d_h_0, d_c_0), (1, 1), members)
    return tuple(t.to(dtype) for t in (*results, *states)), (*_leading(results), *state_dims)


def _over_lanes(
    scan: Any, tensors: Tensors, dims: Dims, members: int, need_input: bool, need_weights: bool
) -> tuple[Any, Any]:
    """Each member with weights of its own."""
    op, batch_sizes, cell, bidirectional = scan
    dtype, shared_input = tensors[-1].dtype, tensors[3]
    d_outputs, layer, (output, tape) = (
        _members_first(tensors[part], dims[part], members) for part in (slice(0, 3), slice(3, 11), slice(11, 13))
    )
    input, w_ih = layer[:2]
    with_table = need_input or dims[3] is not None
    if with_table:
        d_outputs, layer, (output, tape) = _widen(d_outputs), _widen(layer), _widen((output, tape))
        input, w_ih = layer[:2]
        products = (*w_ih.shape[:3], output.shape[1])
        layer[0] = _row_ids(output)
        layer[1] = _products(input, w_ih) if _may_be_differentiated(tensors) else w_ih.new_empty(products)
    else:
        layer[0] = shared_input
    d_output = None if d_outputs[0] is None else _beside(d_outputs[0])
    results = op(
        d_output,
        *_as_lanes([None, *d_outputs[1:]])[1:],
        *_as_lanes(layer),
        batch_sizes,
        cell,
        bidirectional,
        _beside(output),
        *_as_lanes([None, tape])[1:],
        False,
        need_weights or with_table,
    )
    results = [_from_lanes(t, members) for t in results]
    if with_table:
        results[0], results[1] = _product_gradients(results[1], input, w_ih, need_input, need_weights)
    return tuple(t.to(dtype) for t in results), _leading(results)


# ---- what the input contributes to the gates of each member's rows -------------------------------------------------


def _products(input: Tensor, w_ih: Tensor) -> Tensor:
    """w_ih x for every row: (M, D, GH, N), of input (M, N, I) or ids (M, N) and w_ih (M, D, GH, I)."""
    if input.is_floating_point():
        return torch.matmul(w_ih, input.mT.unsqueeze(1))
    members, lanes, gate_rows, inputs = w_ih.shape
    table = w_ih.permute(0, 3, 1, 2).reshape(members * inputs, lanes * gate_rows)
    by_row = F.embedding(_own_ids(input, inputs), table).view(members, input.shape[1], lanes, gate_rows)
    return by_row.permute(0, 2, 3, 1)


def _product_gradients(
    d_products: Tensor, input: Tensor, w_ih: Tensor, need_input: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of input (M, N, I) and w_ih (M, D, GH, I) from those of the products, (M, D, GH, N)."""
    none, floating = _empty(d_products), input.is_floating_point()
    d_input = torch.einsum("mdgn,mdgi->mni", d_products, w_ih) if need_input and floating else none
    if not need_weights:
        return d_input, none
    if floating:
        return d_input, torch.einsum("mdgn,mni->mdgi", d_products, input)
    members, lanes, gate_rows, inputs = w_ih.shape
    rows = d_products.permute(0, 3, 1, 2).flatten(2)
    by_id: Tensor = torch.ops.aten.embedding_dense_backward(rows, _own_ids(input, inputs), members * inputs, -1, False)
    return d_input, by_id.view(members, inputs, lanes, gate_rows).permute(0, 2, 3, 1)


def _own_ids(ids: Tensor, inputs: int) -> Tensor:
    """Ids into a table that has `inputs` rows for each member in turn; a wrong id must not reach another's rows."""
    first = inputs * torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return torch.where((ids >= 0) & (ids < inputs), ids + first, -1)


def _row_ids(rows: Tensor) -> Tensor:
    """The ids 0, 1, 2... for (M, N, ...) rows."""
    return torch.arange(rows.shape[1], device=rows.device)


# ---- members, rows and lanes ---------------------------------------------------------------------------------------


def _refuse_mapped_lengths(dim: int | None) -> None:
    if dim is not None:
        raise RuntimeError("vmap cannot map over batch_sizes: all members must have sequences of the same lengths")


def _none_mapped(dims: Dims) -> bool:
    return all(dim is None for dim in dims)


def _may_be_differentiated(tensors: Tensors) -> bool:
    """A gradient is wanted here, or by a transform further out, which cannot be seen from here."""
    return needs_gradient(tensors) or len(_C._functorch.get_interpreter_stack() or ()) > 1


def _times(batch_sizes: Tensor | None, members: int) -> Tensor | None:
    return None if batch_sizes is None else batch_sizes * members


def _fold(tensors: Tensors, dims: Dims, row_dims: Dims, members: int) -> Tensors:
    """The members behind the rows, in one dimension."""

    def fold(tensor: Any, dim: int | None, row_dim: int | None) -> Any:
        if tensor is None or row_dim is None:
            return tensor
        if dim is None:
            tensor = tensor.unsqueeze(row_dim + 1)
            tensor = tensor.expand(*tensor.shape[: row_dim + 1], members, *tensor.shape[row_dim + 2 :])
        else:
            tensor = tensor.movedim(dim, row_dim + 1)
        return tensor.flatten(row_dim, row_dim + 1).contiguous()

    return [fold(*which) for which in zip(tensors, dims, row_dims, strict=True)]


def _unfold(tensors: Sequence[Tensor], row_dims: Dims, members: int) -> tuple[Any, Any]:
    """The members again in a dimension of their own, and which it is; what is absent stays empty."""
    results: list[Tensor] = []
    dims: list[int | None] = []
    for tensor, dim in zip(tensors, row_dims, strict=True):
        if dim is None or tensor.dim() == 1:
            results.append(tensor)
            dims.append(None)
        else:
            results.append(tensor.unflatten(dim, (tensor.shape[dim] // members, members)))
            dims.append(dim + 1)
    return tuple(results), tuple(dims)


def _members_first(tensors: Sequence[Any], dims: Dims, members: int) -> Tensors:
    """Every tensor with a leading dimension M, by a view."""

    def first(tensor: Any, dim: int | None) -> Any:
        if tensor is None:
            return None
        return tensor.expand(members, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    return [first(*which) for which in zip(tensors, dims, strict=True)]


def _as_lanes(tensors: Tensors) -> Tensors:
    """(M, D, ...) to (M*D, ...) for all but the first, which lanes share."""
    return [tensors[0], *(None if t is None else t.flatten(0, 1).contiguous() for t in tensors[1:])]


def _from_lanes(tensor: Tensor, members: int) -> Tensor:
    return tensor if tensor.dim() == 1 else tensor.unflatten(0, (members, -1))


def _beside(outputs: Tensor) -> Tensor:
    """(M, N, D*P) to (N, M*D*P), as lanes write their outputs."""
    return outputs.movedim(0, 1).flatten(1).contiguous()


def _leading(tensors: Sequence[Tensor]) -> tuple[int | None, ...]:
    return tuple(None if tensor.dim() == 1 else 0 for tensor in tensors)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _widen(tensors: Sequence[Any]) -> Tensors:
    """Half types as float32: the products between the parts of a mapped scan must not be rounded."""
    half = (torch.float16, torch.bfloat16)
    return [t.float() if t is not None and t.dtype in half else t for t in tensors]
