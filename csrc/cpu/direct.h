// Calls by address from rnnfast/direct.py: past the operators, whose way through the dispatcher takes longer than a small
// scan. There are no tensors here; what is contiguous, of the right dtype and of the right size is for Python to see to.
#pragma once

#include <vector>

#include "ops.h"

namespace rnnfast {

// Kept by Python as tensors of bytes. Their schemas are in rnnfast/backends/native.py.
//
// What calls without gradients need: the packed weights of every layer, which must outlive it, and a sample of every weight
// they were packed from.
Tensor direct_plan_cpu(std::vector<Tensor> packed, std::vector<Tensor> weights);
// What calls with gradients need: the ScanShape of one layer.
Tensor direct_layer_cpu(Tensor w_ih, Tensor w_hh, OptionalTensor w_hr, std::string cell, bool ids);

enum DirectStatus : int {
  DIRECT_DONE = 0,
  DIRECT_STALE = 1,   // a weight's sample is not what it was: to be packed anew
  DIRECT_FAILED = 2,  // for the operator to find out why: a token id outside the vocabulary, no memory
};

}  // namespace rnnfast

#define RNNFAST_DIRECT extern "C" __attribute__((visibility("default"))) int

// T steps of B rows through L layers of D directions, without gradients. input (T, B, I) or (T, B) int64 ids, output
// (T, B, D*P), h_0 and h_n (L*D, B, P), c_0 and c_n (L*D, B, H) or null. States of null are zeros. Writes nothing unless it
// returns DIRECT_DONE.
RNNFAST_DIRECT rnnfast_infer_cpu(const void* plan, int64_t steps, int64_t batch, const void* input, const void* h_0,
                                 const void* c_0, void* output, void* h_n, void* c_n);

// One layer of one direction, and its derivative: the arguments of scan_cpu and scan_cpu_backward. States of null are zeros,
// gradients that are null are not wanted.
RNNFAST_DIRECT rnnfast_forward_cpu(const void* layer, int64_t steps, int64_t batch, const void* input, const void* h_0,
                                   const void* c_0, const void* w_ih, const void* w_hh, const void* b_ih, const void* b_hh,
                                   const void* w_hr, void* output, void* h_n, void* c_n, void* tape);
RNNFAST_DIRECT rnnfast_backward_cpu(const void* layer, int64_t steps, int64_t batch, const void* d_output,
                                    const void* d_h_n, const void* d_c_n, const void* input, const void* h_0,
                                    const void* c_0, const void* w_ih, const void* w_hh, const void* b_ih, const void* b_hh,
                                    const void* w_hr, const void* output, const void* tape, void* d_input, void* d_h_0,
                                    void* d_c_0, void* d_w_ih, void* d_w_hh, void* d_b_ih, void* d_b_hh, void* d_w_hr);
