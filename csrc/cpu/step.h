// One time step of a stream, called by address from rnnfast/backends/step.py: past the operator, whose way through the
// dispatcher takes longer than a small step.
#pragma once

#include <vector>

#include "ops.h"

namespace rnnfast {

// What the calls of a stream need, kept by Python as a tensor of bytes: the packed weights of every layer (L), which must
// outlive it, and a sample of every weight they were packed from. The schema is in rnnfast/backends/native.py.
Tensor step_plan_cpu(std::vector<Tensor> packed, std::vector<Tensor> weights);

enum StepStatus : int {
  STEP_DONE = 0,
  STEP_STALE = 1,   // a weight's sample is not what it was: to be packed anew
  STEP_FAILED = 2,  // for the operator to find out why: a token id outside the vocabulary, no memory
};

}  // namespace rnnfast

// plan: the data of a step plan. input (B, I) or (B,) int64 ids; h_0 and h_n (L, B, P), c_0 and c_n (L, B, H) or null,
// output (B, P), all contiguous and of the weights' dtype. Writes nothing unless it returns STEP_DONE.
extern "C" __attribute__((visibility("default"))) int rnnfast_step_cpu(const void* plan, const void* input, const void* h_0,
                                                                       const void* c_0, void* output, void* h_n, void* c_n,
                                                                       int64_t batch);
