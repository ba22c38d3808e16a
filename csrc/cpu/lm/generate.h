// Tokens one after the other from a stack of recurrent layers and a linear head, without a return to Python for each.
#pragma once

#include <vector>

#include "../ops.h"

namespace rnnfast {

// Feeds `token`, picks the next by its logits, feeds that, `length` times. The schema is in rnnfast/lm/operators.py,
// which documents the arguments; the choice of a token is that of rnnfast/lm/generate.py.
std::tuple<Tensor, Tensor, Tensor> generate_cpu(std::vector<Tensor> packed, OptionalTensor embedding, Tensor head_weight,
                                                OptionalTensor head_bias, Tensor h_0, OptionalTensor c_0, int64_t token,
                                                int64_t length, OptionalTensor uniforms, double temperature,
                                                std::optional<int64_t> top_k, std::optional<double> top_p);

}  // namespace rnnfast
