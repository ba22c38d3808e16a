"""The language model's own operators of the cpu backend (csrc/cpu/lm): the loops of training and generation, the loss,
and the clipping of gradients.

They are defined when this is imported, and implemented by the library that `rnnfast.backends.cpu.load` loads.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("rnnfast", "FRAGMENT")
for _schema in (
    "generate_cpu(Tensor[] packed, Tensor? embedding, Tensor head_weight, Tensor? head_bias, Tensor h_0, Tensor? c_0,"
    " int token, int length, Tensor? uniforms, float temperature, int? top_k, float? top_p)"
    " -> (Tensor ids, Tensor h_n, Tensor c_n)",
    "linear_cross_entropy_cpu(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, bool need_gradients)"
    " -> (Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    "clip_gradients_cpu(Tensor(a!)[] gradients, float max_norm) -> ()",
    "backpropagate_cpu(Tensor inputs, Tensor targets, Tensor[] parameters, Tensor(a!)[] gradients, Tensor h_0,"
    " Tensor? c_0, str cell) -> (Tensor loss, Tensor h_n, Tensor c_n)",
    "train_cpu(Tensor inputs, Tensor targets, Tensor(a!)[] parameters, Tensor h_0, Tensor? c_0, Tensor(b!) loss_sum,"
    " str cell, bool carries, float learning_rate, float max_norm) -> (Tensor h_n, Tensor c_n)",
):
    _library.define(_schema)

linear_cross_entropy = torch.ops.rnnfast.linear_cross_entropy_cpu.default
clip_gradients = torch.ops.rnnfast.clip_gradients_cpu.default
backpropagate = torch.ops.rnnfast.backpropagate_cpu.default
train = torch.ops.rnnfast.train_cpu.default


def generate(
    packed: list[Tensor],
    embedding: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    token: int,
    length: int,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Feeds `token` to L layers and a linear head, picks the next token, feeds that, and so on, all in C++.

    Args:
        packed: for each layer what `rnnfast.backends.cpu.packing.packed_weights` returned; the first for ids unless
            there is an embedding.
        embedding: (V, I) of the weights' dtype, float32 or float64, or None.
        head_weight, head_bias: (V, H), and (V,) or None.
        h_0, c_0: (L, 1, H); c_0 is None but for the LSTM.
        length: tokens to pick.
        uniforms: (length,) float64 in (0, 1], a draw for each token; None: the likeliest token, without a draw.
        temperature, top_k, top_p: what to draw from, as in `rnnfast.lm.generate`.

    Returns:
        The ids (length,), int64, and the states after all but the last of them: h_n, and c_n, which is empty but for
        the LSTM.

    Raises:
        RuntimeError: parts that do not fit each other, or logits of which none is finite.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.rnnfast.generate_cpu.default(
        packed, embedding, head_weight, head_bias, h_0, c_0, token, length, uniforms, temperature, top_k, top_p
    )
    return result
