// Whether weights are as they were, without reading all of them: a write through `.data` counts no version in torch.
#pragma once

#include <vector>

#include "ops.h"

namespace rnnfast {

// Elements of contiguous weights along a diagonal that comes round: some of each row and of each column, of a vector all. Kept
// by Python as a tensor of bytes; its schema is in rnnfast/backends/native.py.
Tensor weight_samples_cpu(std::vector<Tensor> weights);

// Whether the weights, which must still be where they were, hold what they held then.
bool are_as_they_were(const void* weight_samples);

}  // namespace rnnfast

extern "C" __attribute__((visibility("default"))) int rnnfast_are_as_they_were(const void* weight_samples);
