// Clipping of gradients by their norm, and gradient descent. The schema is in rnnfast/lm/operators.py.
#pragma once

#include <vector>

#include "../tensors.h"

namespace rnnfast {

// A parameter, or its gradient alone.
struct Parameter {
  float* gradient;
  int64_t count;
  float* value = nullptr;
};

// Scales gradients down to a Euclidean norm, of all of them together, if they exceed it; an infinite one leaves them as they are.
// Then takes `rate` times the gradient from each value that is given, rounded as torch's SGD rounds where there are fused
// multiply-adds. The bits do not depend on the number of threads.
void clip_and_descend(const std::vector<Parameter>& parameters, double max_norm, double rate);

// The first of these, of contiguous float32 tensors.
void clip_gradients_cpu(std::vector<Tensor> gradients, double max_norm);

}  // namespace rnnfast
