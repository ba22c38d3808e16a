#include "loss.h"

#include "../kernels.h"
#include "../tensors.h"

namespace rnnfast {

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_cpu(Tensor hidden, Tensor weight, OptionalTensor bias,
                                                                    Tensor targets, bool need_gradients) {
  check(hidden.dim() == 2 && weight.dim() == 2 && hidden.numel() && weight.numel(),
        "hidden states (N, H) and weight (V, H) must have 2 dimensions, and not be empty");
  const int64_t rows = hidden.size(0), columns = hidden.size(1), classes = weight.size(0);
  require("hidden", hidden, ScalarType::Float, {rows, columns});
  require("weight", weight, ScalarType::Float, {classes, columns});
  require("bias", bias, ScalarType::Float, {classes});
  require("targets", targets, ScalarType::Long, {rows});
  const auto in = [](const auto& tensor) { return static_cast<const float*>(data(tensor)); };
  const LossArgs x{rows, columns, classes, in(hidden), in(weight), in(bias), static_cast<const int64_t*>(data(targets))};
  for (int64_t row = 0; row < rows; ++row)
    check(x.targets[row] >= 0 && x.targets[row] < classes, "target ", x.targets[row], " in row ", row, " is outside [0, ",
          classes, ")");
  Tensor loss = empty(hidden, {}), d_hidden = empty_if(need_gradients, hidden, {rows, columns});
  Tensor d_weight = empty_if(need_gradients, hidden, {classes, columns}), d_bias = empty_if(need_gradients, hidden, {classes});
  const auto to = [](const Tensor& tensor) { return static_cast<float*>(out(tensor)); };
  const LossGradients d{to(d_hidden), to(d_weight), to(d_bias)};
  *to(loss) = float(choose_kernels(DType::float32).loss(x, need_gradients ? &d : nullptr, available_threads()));
  return {loss, d_hidden, d_weight, d_bias};
}

}  // namespace rnnfast
