"""What backends share that is parallel in time: rows of steps, the gates' inputs, the gradients of weights and inputs.

D lanes, N rows, B rows of the first step, I inputs, H hidden units, G gates. All of it is torch's GEMMs and gathers,
and every sum has a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def copy_to(device: torch.device, on_host: Tensor) -> Tensor:
    """Copies without making the host wait for the device."""
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


def check_batch_sizes(sizes: Tensor, batch: int, rows: int) -> None:
    """Raises RuntimeError for what no ragged batch has: a kernel would read and write elsewhere."""
    never_rise = int(sizes[0]) == batch and bool((sizes[1:] <= sizes[:-1]).all()) and int(sizes[-1]) >= 0
    if not never_rise or int(sizes.sum()) != rows:
        given = sizes.tolist()
        raise RuntimeError(
            f"batch_sizes must start with the batch size of the states, {batch}, never rise, and add up to the {rows} "
            f"rows of the input, got {given if len(given) < 20 else [*given[:20], '...']}"
        )


def first_rows(batch_sizes: Tensor) -> Tensor:
    """The first row of every step and, last, the number of rows: (T + 1,)."""
    return torch.cat((batch_sizes.new_zeros(1), batch_sizes.cumsum(0)))


def gate_inputs(input: Tensor, w_ih: Tensor, b_ih: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows that the scan adds to the recurrent product, (rows, D*G*H), and which of them each step takes.

    None: in order. The rows are in float32 for half types. For token ids they are the table w_ih^T + b_ih, unless the
    table is larger than the rows it would serve.
    """
    weight = w_ih.flatten(0, 1)
    if input.is_floating_point():
        return _add_bias(_product(input, weight), b_ih), None
    if weight.shape[1] <= len(input):
        # A copy even where the transpose is contiguous as it is (I = 1): the bias is added in place.
        return _add_bias(widen(weight.t()).clone(memory_format=torch.contiguous_format), b_ih), input
    return _add_bias(widen(weight.t().index_select(0, input)), b_ih), None


def recurrent_product(operand: Tensor, weight: Tensor, product: Tensor) -> None:
    """Puts operand (D, B, K) times weight (D, K, M) into `product` (D, B, M), whose type is the one accumulated in."""
    if operand.dtype is product.dtype:
        torch.bmm(operand, weight, out=product)
    elif operand.is_cuda:
        torch.bmm(operand, weight, out_dtype=product.dtype, out=product)
    else:
        torch.bmm(operand.to(product.dtype), weight.to(product.dtype), out=product)


def input_gradient(d_gx: Tensor, w_ih: Tensor) -> Tensor:
    """(N, I), from the gradient of the input's part of the gates, (N, D*G*H)."""
    return d_gx @ w_ih.flatten(0, 1)


def weight_gradients(
    d_gx: Tensor,
    d_g_last: Tensor | None,
    input: Tensor,
    w_ih: Tensor,
    has_bias: bool,
    output: Tensor,
    h_0: Tensor,
    batch_sizes: Tensor | None,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of w_ih, w_hh, b_ih and b_hh.

    `d_g_last` (N, D*H) is the gradient of the last gate's recurrent part where that differs from the input's (GRU: the
    reset gate comes between n and its recurrent product), else None.
    """
    before = h_before(output, h_0, batch_sizes, bidirectional)
    d_w_ih, d_w_hh = _d_w_ih(d_gx, input, w_ih), _d_w_hh(d_gx, d_g_last, before)
    if not has_bias:
        return d_w_ih, d_w_hh, None, None
    lanes, gate_rows = d_w_hh.shape[:2]
    d_b_ih = d_gx.sum(0).view(lanes, gate_rows)
    d_b_hh = d_b_ih.clone()
    if d_g_last is not None:
        d_b_hh[:, -h_0.shape[2] :] = d_g_last.sum(0).view(lanes, -1)
    return d_w_ih, d_w_hh, d_b_ih, d_b_hh


def widen(tensor: Tensor) -> Tensor:
    """In the type that it is computed in: half types in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _product(input: Tensor, weight: Tensor) -> Tensor:
    """Returns input weight^T without rounding half types on the way."""
    if input.is_cuda and input.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(input, weight.t(), out_dtype=torch.float32)
    return widen(input) @ widen(weight).t()


def _add_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else rows.add_(bias.flatten())


def _d_w_ih(d_gx: Tensor, input: Tensor, w_ih: Tensor) -> Tensor:
    if input.is_floating_point():
        return (d_gx.t() @ input).view_as(w_ih)
    # The gradient of an embedding is a segment sum in a fixed order, unlike index_add_ on a GPU. Of half types it would
    # keep the running sum in that type.
    by_id: Tensor = torch.ops.aten.embedding_dense_backward(widen(d_gx), input, w_ih.shape[2], -1, False)
    return by_id.t().to(w_ih.dtype).contiguous().view_as(w_ih)


def _d_w_hh(d_gx: Tensor, d_g_last: Tensor | None, h_before: list[Tensor]) -> Tensor:
    lanes, hidden = len(h_before), h_before[0].shape[1]
    d_w_hh = d_gx.new_empty(lanes, d_gx.shape[1] // lanes, hidden)
    for d, h in enumerate(h_before):
        d_gates = d_gx.unflatten(1, (lanes, -1))[:, d]
        if d_g_last is None:
            torch.mm(d_gates.t(), h, out=d_w_hh[d])
        else:
            torch.mm(d_gates[:, :-hidden].t(), h, out=d_w_hh[d, :-hidden])
            torch.mm(d_g_last[:, d * hidden : (d + 1) * hidden].t(), h, out=d_w_hh[d, -hidden:])
    return d_w_hh


def h_before(output: Tensor, h_0: Tensor, batch_sizes: Tensor | None, bidirectional: bool) -> list[Tensor]:
    """For each lane the hidden state before every row, (N, H)."""
    _, batch, hidden = h_0.shape
    before = []
    for d, lane_output in enumerate(output.split(hidden, dim=1)):
        backwards = bidirectional and d % 2 == 1
        if batch_sizes is None:
            parts = (lane_output[batch:], h_0[d]) if backwards else (h_0[d], lane_output[:-batch])
            before.append(torch.cat(parts) if len(output) else lane_output)
        else:
            index = copy_to(output.device, _rows_before(batch_sizes, backwards))
            before.append(torch.cat((lane_output, h_0[d])).index_select(0, index))
    return before


def _rows_before(batch_sizes: Tensor, backwards: bool) -> Tensor:
    """Which row of (all rows, then the batch's initial states) comes before each row of a ragged batch."""
    steps, rows = len(batch_sizes), int(batch_sizes.sum())
    step = torch.repeat_interleave(torch.arange(steps, device=batch_sizes.device), batch_sizes)
    row = torch.arange(rows, device=batch_sizes.device)
    in_batch = row - (batch_sizes.cumsum(0) - batch_sizes)[step]
    if backwards:
        next_sizes = torch.cat((batch_sizes[1:], batch_sizes.new_zeros(1)))
        return torch.where(in_batch < next_sizes[step], row + batch_sizes[step], rows + in_batch)
    return torch.where(step > 0, row - batch_sizes[(step - 1).clamp(min=0)], rows + in_batch)
