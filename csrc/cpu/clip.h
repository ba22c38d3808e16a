// Clipping of gradients by their norm. The schema is in rnnfast/backends/native.py.
#pragma once

#include <vector>

#include "tensors.h"

namespace rnnfast {

// Scales gradients (contiguous, float32) down to a Euclidean norm, of all of them together, if they exceed it. The bits do not
// depend on the number of threads.
void clip_gradients_cpu(std::vector<Tensor> gradients, double max_norm);

}  // namespace rnnfast
