"""The gradients of weights in loops of short calls: one product for all of a loop's backward calls.

Were each call to make its own, torch would add up as many matrices as there are steps, each made of a few rows. Instead
every backward call leaves the rows that such a product is made of. The calls of a loop take the weights from one node
of the graph, which torch runs when all of them are through: it makes the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._C import _current_graph_task_id, _will_engine_execute_node

from rnnfast import derivatives
from rnnfast.backends import cpu
from rnnfast.backends.cpu import DONE
from rnnfast.direct.plans import Layer, Plan, addresses, requires_grad_of

_MOST_ROWS = 2048  # that are kept until their product is made
_WORTH_PACKING = 8  # a loop of more calls packs its weights for their backward calls


class Loop:
    """Short calls with the same weights and no backward call among them.

    Their graphs hold it, and nothing else does: it ends with the last of them, if not before.
    """

    def __init__(self) -> None:
        self.calls = self.rows = 0
        self.is_over = False
        self.shared: list[SharedWeights] | None = None  # of each layer, from the second call on


class SharedWeights:
    """A layer's weights as the calls of a loop take them, and the node of the graph that these come from."""

    def __init__(self, layer: Layer) -> None:
        self.rows: dict[int, Rows] = {}  # by the backward pass, of which there may be several at a time
        self.weights: Sequence[Tensor | None] = _Share.apply(self.rows, *layer.weights)
        self.node = next(weight.grad_fn for weight in self.weights if weight is not None)

    def are_wanted(self) -> bool:
        """Whether the backward pass that is under way comes to their gradients."""
        return bool(_will_engine_execute_node(self.node))

    def rows_of_pass(self, layer: Layer, loop: Loop) -> Rows:
        task = _current_graph_task_id()
        found = self.rows.get(task)
        if found is None:
            found = self.rows[task] = Rows(layer, min(loop.rows, _MOST_ROWS), loop.calls > _WORTH_PACKING)
        return found


class Rows:
    """What backward calls of a layer have left: gradients of the gates, inputs, and the states before.

    It also has the weights as those calls multiply them.
    """

    def __init__(self, layer: Layer, capacity: int, is_worth_packing: bool) -> None:
        self.layer = layer
        self.capacity = capacity
        self.count = 0
        self.is_worth_packing = is_worth_packing
        self.w_hh: Tensor | None = None
        self.w_ih: Tensor | None = None
        sizes = layer.row_bytes
        self.memory = cpu.empty(layer.kept, capacity * sum(sizes))
        start = self.memory.data_ptr()
        self.starts = start, start + capacity * sizes[0], start + capacity * (sizes[0] + sizes[1])
        self.sums: list[Tensor] | None = None

    def places(self, count: int) -> list[int]:
        """Where so many rows more go; they count from `left` on."""
        if self.count + count > self.capacity:
            self._add_up()
        return [start + self.count * size for start, size in zip(self.starts, self.layer.row_bytes, strict=True)]

    def left(self, count: int) -> None:
        self.count += count

    def packed(self, sizes: tuple[int, int], need_input: bool) -> tuple[int, int]:
        """The addresses of w_hh and w_ih packed for backward calls of (T, B), 0 for one that is read where it lies."""
        if not self.is_worth_packing:
            return 0, 0
        w_ih, w_hh, *_ = self.layer.memory
        if self.w_hh is None:
            self.w_hh = self._pack(sizes, w_hh.data_ptr(), 0)
        if need_input and self.w_ih is None:
            self.w_ih = self._pack(sizes, 0, w_ih.data_ptr())
        return self.w_hh.data_ptr(), 0 if self.w_ih is None else self.w_ih.data_ptr()

    def _pack(self, sizes: tuple[int, int], w_hh: int, w_ih: int) -> Tensor:
        layer = self.layer
        size = cpu.pack_backward(layer.address, *sizes, w_hh, w_ih, 0)
        packed: Tensor = cpu.empty(layer.kept, size)
        if size:
            cpu.pack_backward(layer.address, *sizes, w_hh, w_ih, packed.data_ptr())
        return packed

    def gradients(self) -> list[Tensor | None]:
        """Those of the weights, None where the layer has none."""
        if self.count:
            self._add_up()
        found = iter(self.sums or ())
        return [next(found, None) if has else None for has in self.layer.has_weight]

    def _add_up(self) -> None:
        weights = self.layer.memory[:4]
        found = [None if weight is None else torch.empty_like(weight) for weight in weights]
        if cpu.weight_gradients(self.layer.address, self.count, *self.starts, *addresses(found)) != DONE:
            raise RuntimeError("no memory for the gradients of the weights")
        made = [gradient for gradient in found if gradient is not None]
        if self.sums is None:
            self.sums = made
        else:
            torch._foreach_add_(self.sums, made)
        self.count = 0


class _Share(derivatives.Function):
    """apply(rows, the five of `scan.Weights`) returns these; backward adds what the rows of the pass make."""

    @staticmethod
    def forward(ctx: Any, rows: dict[int, Rows], *weights: Tensor | None) -> Any:
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        return tuple(None if weight is None else weight.detach() for weight in weights)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        rows = None if torch.compiler.is_compiling() else ctx.rows.pop(_current_graph_task_id(), None)
        if rows is None:
            return None, *given
        pairs = zip(given, rows.gradients(), strict=True)
        return None, *(b if a is None else a if b is None else a + b for a, b in pairs)


def loop_of(
    plan: Plan, ids: bool, layers: Sequence[Layer], rows: int
) -> tuple[Loop | None, list[SharedWeights] | None]:
    """The loop that a short call of so many rows belongs to, and its weights.

    Or None, where each call makes its own gradients.
    """
    if layers[0].weights.w_hr is not None or False in map(requires_grad_of, plan.weights):
        return None, None
    known = plan.loops.get(ids)
    loop: Loop | None = None if known is None else known()
    if loop is None or loop.is_over:
        loop = Loop()
        plan.loops[ids] = ref(loop)
    elif loop.shared is None:
        loop.shared = [SharedWeights(layer) for layer in layers]
    loop.calls += 1
    loop.rows += rows
    return loop, loop.shared
