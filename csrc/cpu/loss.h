// The operators of cross_entropy.h, on tensors. Their schemas are in rnnfast/backends/native.py.
#pragma once

#include "ops.h"

namespace rnnfast {

// hidden (N, H), weight (V, H), bias (V), float32; targets (N), int64. Returns the mean cross entropy, (), and what the gradients
// are made of, (N, V rounded up to 16).
std::tuple<Tensor, Tensor> linear_cross_entropy_cpu(Tensor hidden, Tensor weight, OptionalTensor bias, Tensor targets);

// The gradients of hidden, weight and bias.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_cpu_backward(Tensor d_loss, Tensor hidden, Tensor weight,
                                                                     Tensor d_logits);

}  // namespace rnnfast
