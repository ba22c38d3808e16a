#include "loss.h"

#include "kernels.h"
#include "tensors.h"

namespace rnnfast {
namespace {

constexpr int64_t STRIDE = 16;

LossArgs loss_args(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor* targets,
                   const Tensor& d_logits) {
  LossArgs x{};
  x.rows = hidden.size(0);
  x.columns = hidden.size(1);
  x.classes = weight.size(0);
  x.stride = d_logits.size(1);
  x.hidden = static_cast<const float*>(data(hidden));
  x.weight = static_cast<const float*>(data(weight));
  x.bias = static_cast<const float*>(data(bias));
  x.targets = targets ? static_cast<const int64_t*>(data(*targets)) : nullptr;
  x.d_logits = static_cast<float*>(out(d_logits));
  return x;
}

}  // namespace

std::tuple<Tensor, Tensor> linear_cross_entropy_cpu(Tensor hidden, Tensor weight, OptionalTensor bias, Tensor targets) {
  check(parse_dtype(hidden) == DType::float32 && parse_dtype(weight) == DType::float32, "the loss is computed in float32");
  const bool fit = hidden.size(1) == weight.size(1) && targets.numel() == hidden.size(0);
  check(fit && (!bias || bias->numel() == weight.size(0)) && hidden.numel() && weight.numel(),
        "hidden states, weight, bias and targets do not fit each other, or are empty");
  Tensor loss = empty(hidden, {});
  Tensor d_logits = empty(hidden, {hidden.size(0), (weight.size(0) + STRIDE - 1) / STRIDE * STRIDE});
  const LossArgs x = loss_args(hidden, weight, bias, &targets, d_logits);
  for (int64_t row = 0; row < x.rows; ++row)
    check(x.targets[row] >= 0 && x.targets[row] < x.classes, "target ", x.targets[row], " in row ", row, " is outside [0, ",
          x.classes, ")");
  *static_cast<float*>(out(loss)) = float(choose_kernels(DType::float32).loss(x, available_threads()));
  return {loss, d_logits};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_cpu_backward(Tensor d_loss, Tensor hidden, Tensor weight,
                                                                     Tensor d_logits) {
  Tensor d_hidden = empty(hidden, {hidden.size(0), hidden.size(1)});
  Tensor d_weight = empty(hidden, {weight.size(0), weight.size(1)}), d_bias = empty(hidden, {weight.size(0)});
  const LossArgs x = loss_args(hidden, weight, std::nullopt, nullptr, d_logits);
  const LossGradients d{static_cast<float*>(out(d_hidden)), static_cast<float*>(out(d_weight)), static_cast<float*>(out(d_bias))};
  const float scale = *static_cast<const float*>(data(d_loss)) / float(x.rows);
  choose_kernels(DType::float32).loss_backward(x, d, scale, available_threads());
  return {d_hidden, d_weight, d_bias};
}

}  // namespace rnnfast
