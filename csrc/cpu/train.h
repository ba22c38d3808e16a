// Backpropagation through time for a language model of recurrent layers and a linear head, without a return to Python, nor
// torch's autograd, between its parts. The schemas are in rnnfast/backends/native.py, which documents the arguments.
#pragma once

#include <vector>

#include "ops.h"

namespace rnnfast {

// The mean cross entropy of one batch, and its gradients, which are left in `gradients`: (loss, h_n, c_n).
std::tuple<Tensor, Tensor, Tensor> backpropagate_cpu(Tensor inputs, Tensor targets, std::vector<Tensor> parameters,
                                                     std::vector<Tensor> gradients, Tensor h_0, OptionalTensor c_0,
                                                     std::string cell);

// Steps of truncated backpropagation through time, a batch each, with gradients clipped to a norm and gradient descent. Adds the
// losses to `loss_sum`, float64: (h_n, c_n).
std::tuple<Tensor, Tensor> train_cpu(Tensor inputs, Tensor targets, std::vector<Tensor> parameters, Tensor h_0,
                                     OptionalTensor c_0, Tensor loss_sum, std::string cell, bool carries,
                                     double learning_rate, double max_norm);

}  // namespace rnnfast
