// Backpropagation through time for a language model of recurrent layers and a linear head, without a return to Python, nor
// torch's autograd, between its parts. The schemas are in rnnfast/lm/operators.py.
//
// `parameters` are w_ih, w_hh and the biases of each layer, b_ih and b_hh, or b_ih alone, or none; then the head's weight (V, H)
// and bias (V). They are float32. States (L, B, H) are float32 or bfloat16, and so are the layers' products. Inputs and targets
// are token ids, int64.
#pragma once

#include <vector>

#include "../ops.h"

namespace rnnfast {

// The mean cross entropy of one batch (T, B), and its gradients, which are left in `gradients`: (loss, h_n, c_n).
std::tuple<Tensor, Tensor, Tensor> backpropagate_cpu(Tensor inputs, Tensor targets, std::vector<Tensor> parameters,
                                                     std::vector<Tensor> gradients, Tensor h_0, OptionalTensor c_0,
                                                     Text cell);

// Steps of truncated backpropagation through time for batches (N, T, B), with gradients clipped to a norm, if it is not infinite,
// and gradient descent. A step goes on from the state behind the one before if it `carries`, else from h_0 and c_0. Adds the
// losses to `loss_sum`, float64: (h_n, c_n).
std::tuple<Tensor, Tensor> train_cpu(Tensor inputs, Tensor targets, std::vector<Tensor> parameters, Tensor h_0,
                                     OptionalTensor c_0, Tensor loss_sum, Text cell, bool carries,
                                     double learning_rate, double max_norm);

}  // namespace rnnfast
