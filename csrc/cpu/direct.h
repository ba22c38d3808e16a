// Calls by address from rnnfast/direct: past the operators, whose way through the dispatcher takes longer than a small
// scan. There are no tensors here; what is contiguous, of the right dtype and of the right size is for Python to see to.
#pragma once

#include <vector>

#include "ops.h"

namespace rnnfast {

// Kept by Python as tensors of bytes. Their schemas are in rnnfast/backends/cpu/__init__.py.
//
// What calls with packed weights need: those of every layer, and samples of the weights that they were packed from,
// all of which must outlive it.
Tensor direct_plan_cpu(std::vector<Tensor> packed, Tensor weight_samples);
// What calls with gradients need: the ScanShape of one layer.
Tensor direct_layer_cpu(Tensor w_ih, Tensor w_hh, OptionalTensor w_hr, Text cell, bool ids);
// A large tensor of the type of `like`, of undefined content.
Tensor direct_empty_cpu(Tensor like, std::vector<int64_t> sizes);

enum DirectStatus : int {
  DIRECT_DONE = 0,
  DIRECT_STALE = 1,   // a weight's sample is not what it was: to be packed again
  DIRECT_FAILED = 2,  // for the operator to find out why: a token id outside the vocabulary, no memory
};

// What a call is given: 64-bit fields alone, which Python gives as numbers (python.cpp). A pointer is 0 where there is no tensor.
// States of 0 are zeros, gradients of 0 are not wanted.

// T steps of B rows through L layers of D directions, without gradients. input (T, B, I) or (T, B) int64 ids, output
// (T, B, D*P), h_0 and h_n (L*D, B, P), c_0 and c_n (L*D, B, H).
struct DirectInfer {
  const void* plan;
  int64_t steps, batch;
  const void *input, *h_0, *c_0;
  void *output, *h_n, *c_n;
};

// One layer of one direction, and its derivative: the arguments of scan_cpu and scan_cpu_backward. The forward scan takes the
// packed weights of layer `index` of a plan, if there is one.
struct DirectForward {
  const ScanShape* layer;
  const void* plan;
  int64_t index;
  int64_t steps, batch;
  const void *input, *h_0, *c_0, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
  void *output, *tape, *h_n, *c_n;
};
// Where a derivative leaves what gradients of weights are made of, each a row for each row of the call; or null.
struct DirectRows {
  void *gates, *inputs, *states;  // the gradients of the gates, of rnnfast_gates_bytes_cpu bytes; input; the state before
};
struct DirectBackward {  // of one step of an LSTM or a GRU, it reads no output, which may be null then
  const ScanShape* layer;
  int64_t steps, batch;
  const void *d_output, *d_h_n, *d_c_n;
  const void *input, *h_0, *c_0, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *output, *tape;
  void *d_input, *d_h_0, *d_c_0, *d_w_ih, *d_w_hh, *d_b_ih, *d_b_hh, *d_w_hr;
  DirectRows rows;
  void *packed_hh, *packed_ih;  // w_hh and w_ih as rnnfast_pack_backward_cpu has packed them; or null
};

// Packs either weight of such a layer for many derivatives of T steps of B rows to share; or, where there is no place yet, tells
// how many bytes it takes, 0 if it is not worth it.
struct DirectPack {
  const ScanShape* layer;
  int64_t steps, batch;
  const void *w_hh, *w_ih;  // one of them null
  void* packed;
};

// The gradients of the weights and biases of such a layer, without projection, from the rows that N rows of calls have left.
struct DirectWeights {
  const ScanShape* layer;
  int64_t count;
  DirectRows rows;
  void *d_w_ih, *d_w_hh, *d_b_ih, *d_b_hh;
};

// Each returns a DirectStatus, but for the one that packs.
int64_t direct_infer(const DirectInfer& call);
int64_t direct_forward(const DirectForward& call);
int64_t direct_backward(const DirectBackward& call);
int64_t direct_pack_backward(const DirectPack& call);
int64_t direct_weight_gradients(const DirectWeights& call);

}  // namespace rnnfast

extern "C" __attribute__((visibility("default"))) int rnnfast_gates_bytes_cpu(const rnnfast::ScanShape* layer);
