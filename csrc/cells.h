// The math of one unit of each cell, forward and backward, on the host and on the device.
//
// V is a number or a vector of numbers, M supplies sigmoid(V) and tanh(V). Gates, states and the tape are those of
// rnnfast/backends/reference.py, which is the definition: Elman (1990); Hochreiter & Schmidhuber (1997); Cho et al.
// (2014) with the reset gate applied after the product. Pre-activations come in, activated gates go out.
#pragma once

#ifdef __CUDACC__
#define RNNFAST_HD __host__ __device__ __forceinline__
#else
#define RNNFAST_HD inline
#endif

namespace rnnfast {

enum class Cell { rnn_tanh, rnn_relu, lstm, gru };

constexpr int gate_count(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
constexpr int tape_count(Cell cell) { return cell == Cell::lstm ? 5 : cell == Cell::gru ? 4 : 0; }

// The comparisons keep a NaN: it fails them, and passes through.
template <class V>
RNNFAST_HD V relu(V x) {
  return x < V{} ? V{} : x;
}

// The derivative of tanh, from its value: 1 - y^2 without that form's cancellation where |y| is near 1.
template <class V>
RNNFAST_HD V tanh_slope(V y) {
  return (1 - y) * (1 + y);
}

template <class V>
RNNFAST_HD V rnn_tanh_backward(V h, V d_h) {
  return d_h * tanh_slope(h);
}

template <class V>
RNNFAST_HD V rnn_relu_backward(V h, V d_h) {
  return h <= V{} ? V{} : d_h;
}

// c is the cell state before, and after on return.
template <class M, class V>
RNNFAST_HD void lstm_state(V& i, V& f, V& g, V& c) {
  i = M::sigmoid(i);
  f = M::sigmoid(f);
  g = M::tanh(g);
  c = f * c + i * g;
}

// `read` is what the output reads: c, or c normalised.
template <class M, class V>
RNNFAST_HD V lstm_output(V& o, V read) {
  o = M::sigmoid(o);
  return o * M::tanh(read);
}

template <class M, class V>
RNNFAST_HD V lstm_forward(V& i, V& f, V& g, V& o, V& c) {
  lstm_state<M>(i, f, g, c);
  return lstm_output<M>(o, c);
}

// o becomes the gradient of its pre-activation; returns that of `read`.
template <class M, class V>
RNNFAST_HD V lstm_output_backward(V& o, V read, V d_h) {
  const V tanh_read = M::tanh(read);
  const V d_read = d_h * o * tanh_slope(tanh_read);
  o = d_h * tanh_read * o * (1 - o);
  return d_read;
}

// i f g become the gradients of their pre-activations, d_c, of the cell state after, that of the cell state before.
template <class V>
RNNFAST_HD void lstm_state_backward(V& i, V& f, V& g, V c_before, V& d_c) {
  const V d_c_now = d_c;
  d_c = d_c_now * f;
  f = d_c_now * c_before * f * (1 - f);
  const V d_i = d_c_now * g * i * (1 - i);
  g = d_c_now * i * tanh_slope(g);
  i = d_i;
}

// i f g o become the gradients of their pre-activations, d_c the gradient of the cell state before.
template <class M, class V>
RNNFAST_HD void lstm_backward(V& i, V& f, V& g, V& o, V c, V c_before, V d_h, V& d_c) {
  d_c = d_c + lstm_output_backward<M>(o, c, d_h);
  lstm_state_backward(i, f, g, c_before, d_c);
}

// n comes in as the input's part of its pre-activation; h_n is the recurrent part.
template <class M, class V>
RNNFAST_HD V gru_forward(V& r, V& z, V& n, V h_n, V h_before) {
  r = M::sigmoid(r);
  z = M::sigmoid(z);
  n = M::tanh(n + r * h_n);
  return n + z * (h_before - n);
}

// r z n become the gradients of their pre-activations (n: of the input's part), h_n the gradient of the recurrent part;
// returns the gradient that reaches the state before by z alone.
template <class M, class V>
RNNFAST_HD V gru_backward(V& r, V& z, V& n, V& h_n, V h_before, V d_h) {
  const V d_n = d_h * (1 - z) * tanh_slope(n);
  const V d_r = d_n * h_n * r * (1 - r);
  const V carry = d_h * z;
  z = d_h * (h_before - n) * z * (1 - z);
  n = d_n;
  h_n = d_n * r;
  r = d_r;
  return carry;
}

}  // namespace rnnfast
