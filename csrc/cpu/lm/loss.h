// The operator of cross_entropy.h, on tensors. Its schema is in rnnfast/lm/operators.py.
#pragma once

#include "../ops.h"

namespace rnnfast {

// hidden (N, H), weight (V, H), bias (V), float32; targets (N), int64. Returns the mean cross entropy, (), and its gradients by
// hidden, weight and bias, which are empty if they are not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_cpu(Tensor hidden, Tensor weight, OptionalTensor bias,
                                                                    Tensor targets, bool need_gradients);

}  // namespace rnnfast
