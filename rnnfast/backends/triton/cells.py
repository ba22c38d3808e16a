"""The math of the cells as Triton functions, written once and passed to the scan kernels as `CELL: tl.constexpr`.

Forward:  `cell(x, g, h, c) -> (h', c', tape)`
    x, g: tuples of the gates' pre-activations, from the input and from the recurrent product, in torch.nn's gate order;
    h, c: the state before (cells without a cell state return c as it came); tape: the values the backward reads.
Backward: `cell_backward(d_h, d_c, tape, h_after, h_before, c_before) -> (d_x, d_g, d_h_direct, d_c_before)`
    d_h_direct: the part of the gradient of h_before that does not pass through the recurrent product.
    The gradients that arrive, which a step waits for, are multiplied last.

Everything is float32. The formulas are those of `backends/reference.py`; only exp2, rsqrt and a division are asked of
Triton. The first two are one instruction of a GPU each, where exp attends to subnormal numbers, too, so the kernels
need no device library and run in Triton's interpreter as they stand.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    # A power of a negative number only, so nothing overflows.
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """Within 4 ulp everywhere: near 0 the exponential formula cancels, so there an odd polynomial takes over.

    The polynomial x + x^3 Q(x^2) is our own minimax fit of the relative error on |x| < 0.75 (3.3e-8 before rounding).
    """
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    root = tl.rsqrt(1.0 + e)  # one instruction of a GPU, where a division takes five
    large = 1.0 - 2.0 * e * (root * root)
    y = x * x
    q = -0.004769489634782076 * y + 0.019664913415908813
    q = q * y - 0.0533902570605278
    q = q * y + 0.13326521217823029
    q = q * y - 0.3333306908607483
    return tl.where(tl.abs(x) < 0.75, x + x * (y * q), tl.where(x < 0, -large, large))


@triton.jit
def rnn_tanh(x, g, h, c):
    return tanh(x[0] + g[0]), c, ()


@triton.jit
def rnn_tanh_backward(d_h, d_c, tape, h_after, h_before, c_before):
    d = d_h * (1.0 - h_after * h_after)
    return (d,), (d,), tl.zeros_like(d), d_c


@triton.jit
def rnn_relu(x, g, h, c):
    s = x[0] + g[0]
    # A comparison, not a maximum, so that NaN stays NaN.
    return tl.where(s < 0, 0.0, s), c, ()


@triton.jit
def rnn_relu_backward(d_h, d_c, tape, h_after, h_before, c_before):
    d = tl.where(h_after <= 0, 0.0, d_h)
    return (d,), (d,), tl.zeros_like(d), d_c


@triton.jit
def lstm(x, g, h, c):
    i = sigmoid(x[0] + g[0])
    f = sigmoid(x[1] + g[1])
    candidate = tanh(x[2] + g[2])
    o = sigmoid(x[3] + g[3])
    c = f * c + i * candidate
    return o * tanh(c), c, (i, f, candidate, o, c)


@triton.jit
def lstm_backward(d_h, d_c, tape, h_after, h_before, c_before):
    i, f, candidate, o, c = tape
    tanh_c = tanh(c)
    d_c += d_h * (o * (1.0 - tanh_c * tanh_c))
    d_i = d_c * (candidate * i * (1.0 - i))
    d_f = d_c * (c_before * f * (1.0 - f))
    d_candidate = d_c * (i * (1.0 - candidate * candidate))
    d_o = d_h * (tanh_c * o * (1.0 - o))
    d = (d_i, d_f, d_candidate, d_o)
    return d, d, tl.zeros_like(d_h), d_c * f


@triton.jit
def gru(x, g, h, c):
    r = sigmoid(x[0] + g[0])
    z = sigmoid(x[1] + g[1])
    n = tanh(x[2] + r * g[2])
    return n + z * (h - n), c, (r, z, n, g[2])


@triton.jit
def gru_backward(d_h, d_c, tape, h_after, h_before, c_before):
    r, z, n, g_n = tape
    d_n = d_h * ((1.0 - z) * (1.0 - n * n))
    d_r = d_n * (g_n * r * (1.0 - r))
    d_z = d_h * ((h_before - n) * z * (1.0 - z))
    return (d_r, d_z, d_n), (d_r, d_z, d_n * r), d_h * z, d_c


FORWARD = {"rnn_tanh": rnn_tanh, "rnn_relu": rnn_relu, "lstm": lstm, "gru": gru}
BACKWARD = {"rnn_tanh": rnn_tanh_backward, "rnn_relu": rnn_relu_backward, "lstm": lstm_backward, "gru": gru_backward}
