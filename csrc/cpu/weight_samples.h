// Whether weights are as they were, without reading all of them: a write through `.data` counts no version in torch.
#pragma once

#include <vector>

#include "ops.h"

namespace rnnfast {

// Elements of a layer's contiguous weights: some of each column, of each unit (its row of one gate or another) and of each gate,
// and all of a vector; or all of everything, where `whole`. Kept by Python as a tensor of bytes; its schema is in
// rnnfast/backends/cpu/__init__.py.
Tensor weight_samples_cpu(std::vector<Tensor> weights, int64_t units, bool whole);

// Whether the weights, which must still be where they were, hold what they held then.
bool are_as_they_were(const void* weight_samples);

}  // namespace rnnfast

extern "C" __attribute__((visibility("default"))) int rnnfast_are_as_they_were_cpu(const void* weight_samples);
