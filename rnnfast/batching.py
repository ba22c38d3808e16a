"""How torch.vmap maps the scan over M members: as one scan over all of them.

Where the members share their weights, they are more rows of one scan: the index of the member goes after that of the
row, so that the rows of a step stay together and lengths stay sorted. Where each has weights of its own, they are lanes
of one scan. Lanes share their input; so an input of each member's own is multiplied by its w_ih beforehand, and the
scan is handed the products as a table in which the token ids 0, 1, 2... look up one column a row. Each lane then reads
rows of its own, and the gradient of the table is the gradient of the gates, row by row. That also gives the gradient of
each member's weights where the members share them (per-sample gradients): one reverse scan over all rows, and the sums
over rows a member at a time.

Members whose sequences have lengths of their own (`batch_sizes` mapped) are one ragged batch, sorted anew. Their
tensors have equal shapes, so those with less to do have rows and states at the end that nothing reads, zeros in
results; the sum and the first of a member's batch_sizes tell how many are used. With weights of their own such members
run one after the other.

Members M, lanes D, rows N, rows of the first step B, inputs I, gates times hidden units GH, size of the state P: as in
`rnnfast.scan`. The arguments of the rules are the operator, then those of `torch.library.register_vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import _C, Tensor

from rnnfast.backends import products, reference
from rnnfast.derivatives import needs_gradient

Dims = Sequence["int | None"]
Tensors = list[Any]  # of tensors, or None for those that the layer lacks


class Place(NamedTuple):
    """Where a tensor has what members side by side have more of: rows, or states of sequences."""

    dim: int
    what: str


ROWS, ROWS_OF_LANES, STATES = Place(0, "rows"), Place(1, "rows"), Place(1, "states")
_LAYER_PLACES = (ROWS, None, None, None, None, None, STATES, STATES)


def or_no_members(rule: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Lets a rule map no members, too, such as a sampled batch that came out empty: as one of zeros, then cut off."""

    @wraps(rule)
    def mapped(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
        if info.batch_size > 0:
            return rule(info, in_dims, *arguments)
        filled = [
            argument if dim is None else argument.new_zeros([*argument.shape[:dim], 1, *argument.shape[dim + 1 :]])
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        results, dims = rule(info._replace(batch_size=1), in_dims, *filled)
        return tuple(t if dim is None else t.narrow(dim, 0, 0) for t, dim in zip(results, dims, strict=True)), dims

    return mapped


def map_forward(every: bool, op: Any, info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    """The rule of a forward scan; `every` says that its second result is every c rather than the last h."""
    *layer, batch_sizes, cell, bidirectional, save_tape = arguments
    members, dims = info.batch_size, in_dims[:8]
    places = (ROWS, ROWS_OF_LANES if every else STATES, STATES, ROWS_OF_LANES)
    if _none_mapped(dims[1:6]):
        side = _side_by_side(members, layer, dims, _LAYER_PLACES, batch_sizes, in_dims[8])
        layer = side.fold(layer, dims, _LAYER_PLACES)
        results = op(*layer, side.batch_sizes, cell, bidirectional, save_tape or needs_gradient(layer))
        return side.unfold(results, places)
    if in_dims[8] is not None:
        arguments = (*arguments[:-1], save_tape or needs_gradient(layer))
        return map_in_turn(op, (*_LAYER_PLACES, None, None, None, None), 8, places, info, in_dims, *arguments)

    dtype, layer = layer[6].dtype, _members_first(layer, dims, members)
    if dims[0] is not None:
        layer = _widen(layer)
        layer[1], layer[0] = _products(layer[0], layer[1]), _row_ids(layer[0])
    else:
        layer[0] = arguments[0]
    lanes = _as_lanes(layer)
    output, *others = op(*lanes, batch_sizes, cell, bidirectional, save_tape or needs_gradient(lanes))
    results = [output.unflatten(1, (members, -1)), *(_from_lanes(t, members) for t in others)]
    return tuple(t.to(dtype) for t in results), (1, *_leading(others))


def map_backward(every: bool, op: Any, info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    """The rule of a backward scan; `every` says that its second argument is the gradient of every c."""
    *_, need_input, need_weights = arguments
    tensors, dims = [*arguments[:11], *arguments[14:16]], [*in_dims[:11], *in_dims[14:16]]
    members, scan = info.batch_size, (op, *arguments[11:14])
    places = (ROWS, ROWS_OF_LANES if every else STATES, STATES, *_LAYER_PLACES, ROWS, ROWS_OF_LANES)
    # A second derivative must see the products of each row, and a projection leaves no gradient of each row.
    in_lanes = need_weights and (_may_be_differentiated(tensors) or tensors[8] is not None)
    if not in_lanes and _none_mapped(dims[4:9]):
        side = _side_by_side(members, tensors, dims, places, arguments[11], in_dims[11])
        folded = side.fold(tensors, dims, places)
        if need_weights:
            return _over_rows_and_weights(scan, side, folded, tensors, dims, members, need_input)
        return _over_rows(scan, side, folded, need_input)
    if in_dims[11] is None:
        return _over_lanes(scan, tensors, dims, members, need_input, need_weights)
    of_arguments = (*places[:11], None, None, None, *places[11:], None, None)
    return map_in_turn(op, of_arguments, 11, _LAYER_PLACES, info, in_dims, *arguments)


# ---- the backward scan: tensors are the gradients of its results, the layer, output and tape -----------------------


def _over_rows(scan: Any, side: _SideBySide, folded: Tensors, need_input: bool) -> tuple[Any, Any]:
    """Shared weights without gradient."""
    op, _, cell, bidirectional = scan
    *layer, output, tape = folded
    results = op(*layer, side.batch_sizes, cell, bidirectional, output, tape, need_input, False)
    return side.unfold(results, _LAYER_PLACES)


def _over_rows_and_weights(
    scan: Any, side: _SideBySide, folded: Tensors, tensors: Tensors, dims: Dims, members: int, need_input: bool
) -> tuple[Any, Any]:
    """Shared weights, of which each member has a gradient of its own."""
    op, _, cell, bidirectional = scan
    dtype = folded[-1].dtype
    input, w_ih, _, b_ih = _members_first(_widen(tensors[3:7]), dims[3:7], members)
    d_output, d_second, d_c_n, _, *weights, h_0, c_0, output, tape = _widen(folded)
    rows, sizes = len(output), side.batch_sizes
    table = w_ih.new_empty((*w_ih.shape[1:3], rows))
    layer = (torch.arange(rows, device=table.device), table, *weights[1:], h_0, c_0)
    _, d_table, *_, d_h_0, d_c_0 = op(
        d_output, d_second, d_c_n, *layer, sizes, cell, bidirectional, output, tape, False, True
    )

    def of_members(rows_of_lanes: Tensor) -> Tensor:
        """(D, N of all, K) to (M, D, K, N)."""
        ((split,), (dim,)) = side.unfold((rows_of_lanes,), (ROWS_OF_LANES,))
        result: Tensor = split.movedim(dim, 0).mT
        return result

    d_gates = of_members(d_table.mT)
    d_recurrent = of_members(reference.recurrent_gradient(cell, d_table.mT, tape))
    before = of_members(torch.stack(products.h_before(output, h_0, sizes, bidirectional))).mT
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
    states, state_dims = side.unfold((d_h_0, d_c_0), (STATES, STATES))
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
        size = (*w_ih.shape[:3], output.shape[1])
        layer[0] = _row_ids(output)
        layer[1] = _products(input, w_ih) if _may_be_differentiated(tensors) else w_ih.new_empty(size)
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


def _none_mapped(dims: Dims) -> bool:
    return all(dim is None for dim in dims)


def _may_be_differentiated(tensors: Tensors) -> bool:
    """A gradient is wanted here, or by a transform further out, which cannot be seen from here."""
    return needs_gradient(tensors) or len(_C._functorch.get_interpreter_stack() or ()) > 1


class _SideBySide:
    """Members as one batch: each row, and each state, of the first, the second... with its like, in one dimension."""

    def __init__(self, members: int, batch_sizes: Tensor | None) -> None:
        self._members = members
        self.batch_sizes = None if batch_sizes is None else batch_sizes * members

    def fold(self, tensors: Sequence[Any], dims: Dims, places: Sequence[Place | None]) -> Tensors:
        """All members' of what has a place; the rest has no members."""

        def fold(tensor: Any, at: int | None, place: Place | None) -> Any:
            if tensor is None or place is None:
                return tensor
            if at is None:
                tensor = tensor.unsqueeze(0).expand(self._members, *tensor.shape)
            return self._fold(tensor.movedim(at or 0, place.dim + 1), place).contiguous()

        return [fold(*which) for which in zip(tensors, dims, places, strict=True)]

    def unfold(self, tensors: Sequence[Tensor], places: Sequence[Place | None]) -> tuple[Any, Any]:
        """The members again in a dimension of their own, and which it is; what is absent stays empty."""
        results: list[Tensor] = []
        dims: list[int | None] = []
        for tensor, place in zip(tensors, places, strict=True):
            if place is None or tensor.dim() == 1:
                results.append(tensor)
                dims.append(None)
            else:
                results.append(self._unfold(tensor, place))
                dims.append(place.dim + 1)
        return tuple(results), tuple(dims)

    def _fold(self, tensor: Tensor, place: Place) -> Tensor:
        return tensor.flatten(place.dim, place.dim + 1)

    def _unfold(self, tensor: Tensor, place: Place) -> Tensor:
        members = self._members
        result: Tensor = tensor.unflatten(place.dim, (tensor.shape[place.dim] // members, members))
        return result


class _RaggedSideBySide(_SideBySide):
    """Members with batch_sizes (M, T) of their own as one ragged batch.

    Members fill `rows` rows and `states` states each, used or not. `_index` tells where what is used comes from in
    tensors (rows or states, M) that are flattened.
    """

    def __init__(self, batch_sizes: Tensor, rows: int, states: int, device: torch.device) -> None:
        self._members, steps = batch_sizes.shape
        self._full = {"rows": rows, "states": states}
        # A member's s-th sequence has as many steps as there are batch_sizes above s, and they never rise.
        sequence = torch.arange(states, device="cpu").expand(self._members, -1).contiguous()
        lengths = steps - torch.searchsorted(batch_sizes.flip(1).contiguous(), sequence, right=True)
        total = batch_sizes.sum(0)
        self.batch_sizes = total[: max(1, int((total > 0).sum()))].contiguous()
        order = lengths.flatten().argsort(descending=True, stable=True)[: int(self.batch_sizes[0])]
        step = torch.repeat_interleave(self.batch_sizes)
        which = order[torch.arange(len(step), device="cpu") - (self.batch_sizes.cumsum(0) - self.batch_sizes)[step]]
        member, place = which // max(1, states), which % max(1, states)
        row = (batch_sizes.cumsum(1) - batch_sizes)[member, step] + place
        member_of_state, state = order // max(1, states), order % max(1, states)
        self._index = {
            "rows": (row * self._members + member).to(device),
            "states": (state * self._members + member_of_state).to(device),
        }

    def _fold(self, tensor: Tensor, place: Place) -> Tensor:
        return super()._fold(tensor, place).index_select(place.dim, self._index[place.what])

    def _unfold(self, tensor: Tensor, place: Place) -> Tensor:
        full, shape = self._full[place.what], list(tensor.shape)
        shape[place.dim] = full * self._members
        filled = tensor.new_zeros(shape).index_copy(place.dim, self._index[place.what], tensor)
        result: Tensor = filled.unflatten(place.dim, (full, self._members))
        return result


def _side_by_side(
    members: int, tensors: Tensors, dims: Dims, places: Sequence[Place | None], batch_sizes: Any, sizes_dim: int | None
) -> _SideBySide:
    if sizes_dim is None:
        return _SideBySide(members, batch_sizes)

    def size(place: Place) -> int:
        at = next(i for i, found in enumerate(places) if found == place and tensors[i] is not None)
        shape = list(tensors[at].shape)
        if (dim := dims[at]) is not None:
            del shape[dim]
        return int(shape[place.dim])

    device = next(tensor.device for tensor in tensors if tensor is not None)
    return _RaggedSideBySide(batch_sizes.movedim(sizes_dim, 0), size(ROWS), size(STATES), device)


def map_in_turn(
    op: Any,
    places: Sequence[Place | None],
    sizes_at: int,
    result_places: Sequence[Place | None],
    info: Any,
    in_dims: Dims,
    *arguments: Any,
) -> tuple[Any, Any]:
    """torch.vmap's rule for any scan: one for each member. `sizes_at` is where batch_sizes stand in the arguments."""
    members = []
    for m in range(info.batch_size):
        own = [a if dim is None else a.select(dim, m) for a, dim in zip(arguments, in_dims, strict=True)]
        unused = {"rows": 0, "states": 0}
        if in_dims[sizes_at] is not None:
            sizes = own[sizes_at]
            own[sizes_at] = sizes[: max(1, int((sizes > 0).sum()))]
            used = {"rows": int(sizes.sum()), "states": int(sizes[0])}
            for at, place in enumerate(places):
                if place is not None and own[at] is not None and own[at].dim() > place.dim:  # and not an empty tape
                    unused[place.what] = own[at].shape[place.dim] - used[place.what]
                    own[at] = own[at].narrow(place.dim, 0, used[place.what])
        results = op(*(a.contiguous() if isinstance(a, Tensor) else a for a in own))
        members.append([_pad(t, place, unused) for t, place in zip(results, result_places, strict=True)])
    results = tuple(torch.stack(parts) for parts in zip(*members, strict=True))
    return results, (0,) * len(results)


def _pad(tensor: Tensor, place: Place | None, unused: dict[str, int]) -> Tensor:
    if place is None or tensor.dim() == 1:
        return tensor
    after_last = [0, 0] * (tensor.dim() - 1 - place.dim)
    return F.pad(tensor, (*after_last, 0, unused[place.what]))


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
    return [None if t is None else products.widen(t) for t in tensors]
