#include "train.h"

#include <algorithm>
#include <cstring>

#include "clip.h"
#include "../kernels.h"
#include "../memory.h"
#include "../tensors.h"
#include "../threads.h"

namespace rnnfast {
namespace {

const float* floats(const Tensor& tensor) { return static_cast<const float*>(data(tensor)); }
float* writable(const Tensor& tensor) { return static_cast<float*>(out(tensor)); }
const int64_t* integers(const Tensor& tensor) { return static_cast<const int64_t*>(data(tensor)); }

struct State {
  char *h, *c;  // (L, B, H), c of an LSTM alone
};

struct Layer {
  void *w_ih, *w_hh, *b_ih, *b_hh;  // biases may be null
  void *d_w_ih, *d_w_hh, *d_b_ih, *d_b_hh;
  void *output, *tape;
};

// Numbers that are float32 in one place and bfloat16 in another.
struct Copy {
  float* wide;
  void* half;
  int64_t count;
};

// On all threads, by either kernel of kernels.h.
void copy_all(const std::vector<Copy>& copies, void (*copy)(float*, void*, int64_t)) {
  constexpr int64_t BLOCK = 1 << 14, WORTH_A_THREAD = 1 << 16;
  std::vector<Copy> blocks;
  int64_t total = 0;
  for (const Copy& c : copies) {
    for (int64_t i = 0; i < c.count; i += BLOCK)
      blocks.push_back({c.wide + i, static_cast<uint16_t*>(c.half) + i, std::min(BLOCK, c.count - i)});
    total += c.count;
  }
  const int wanted = int(std::clamp<int64_t>(total / WORTH_A_THREAD, 1, available_threads()));
  run_parallel(worth_threads(wanted, total / 4), [&](int thread, int threads) {
    const size_t count = blocks.size();
    for (size_t b = count * size_t(thread) / size_t(threads); b < count * size_t(thread + 1) / size_t(threads); ++b)
      copy(blocks[b].wide, blocks[b].half, blocks[b].count);
  });
}

// A model and the memory that a step takes. Where states are bfloat16, layers have copies of their parameters in it; parameters,
// gradients and all that comes behind the layers are float32.
class Model {
 public:
  Model(const std::vector<Tensor>& parameters, const Tensor& h_0, const OptionalTensor& c_0, Cell cell,
        int64_t steps, int64_t batch)
      : tensors_(parameters) {
    check(h_0.dim() == 3 && h_0.numel() > 0, "h_0 must be of (layers, batch, hidden), and not be empty");
    const int64_t depth = h_0.size(0), count = int64_t(parameters.size());
    per_layer_ = (count - 2) / depth;
    check(count == depth * per_layer_ + 2 && per_layer_ >= 2 && per_layer_ <= 4,
          "a model has two, three or four parameters a layer, and two of the head, not ", count, " with ", depth, " layers");
    shape_.lanes = 1;
    shape_.steps = steps;
    shape_.batch = batch;
    shape_.rows = steps * batch;
    shape_.hidden = shape_.state = h_0.size(2);
    shape_.cell = cell;
    shape_.dtype = parse_dtype(h_0);
    check(shape_.dtype != DType::float64, "a model is trained in float32, or in bfloat16 but for its parameters");
    is_half_ = shape_.dtype == DType::bfloat16;
    element_ = is_half_ ? 2 : 4;
    layers_.resize(size_t(depth));
    const Tensor& head = parameters[size_t(count) - 2];
    check(parameters[0].dim() == 2 && head.dim() == 2 && head.size(0) > 0, "w_ih and the head's weight have two dimensions");
    vocabulary_ = parameters[0].size(1);
    classes_ = head.size(0);
    for (int64_t l = 0; l < depth; ++l) {
      const Tensor* p = &parameters[size_t(l * per_layer_)];
      require("w_ih", p[0], ScalarType::Float, {gate_rows(), l ? shape_.hidden : vocabulary_});
      require("w_hh", p[1], ScalarType::Float, {gate_rows(), shape_.hidden});
      for (int64_t i = 2; i < per_layer_; ++i) require("a bias", p[i], ScalarType::Float, {gate_rows()});
    }
    require("the head's weight", head, ScalarType::Float, {classes_, shape_.hidden});
    require("the head's bias", parameters.back(), ScalarType::Float, {classes_});
    require("h_0", h_0, scalar_type(shape_.dtype), {depth, batch, shape_.hidden});
    check(c_0.has_value() == (shape_.cell == Cell::lstm), "c_0 must be given for an lstm, and for no other cell");
    require("c_0", c_0, scalar_type(shape_.dtype), {depth, batch, shape_.hidden});
  }

  // Gradients are left in those tensors; or in memory of the model's own if there are none, and parameters are written then.
  void carve(Carver& carver, const std::vector<Tensor>& gradients) {
    const auto take = [&](int64_t count) { return carver.take<char>(count * element_); };
    // The model from scratch has one bias: the other is zero, and nobody asks for its gradient.
    char* zeros = per_layer_ == 3 ? take(gate_rows()) : nullptr;
    char* unused = per_layer_ == 3 ? take(gate_rows()) : nullptr;
    if (zeros) std::memset(zeros, 0, size_t(gate_rows() * element_));
    parameters_.clear(), values_.clear(), gradients_.clear();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const int64_t count = tensors_[i].numel();
      if (gradients.empty())
        parameters_.push_back({carver.take<float>(count), count, writable(tensors_[i])});
      else
        parameters_.push_back({writable(gradients[i]), count, const_cast<float*>(floats(tensors_[i]))});
      if (!is_half_ || i + 2 >= tensors_.size()) continue;
      values_.push_back({parameters_[i].value, take(count), count});
      gradients_.push_back({parameters_[i].gradient, take(count), count});
    }
    const auto value = [&](size_t i) { return is_half_ ? values_[i].half : parameters_[i].value; };
    const auto gradient = [&](size_t i) { return is_half_ ? gradients_[i].half : parameters_[i].gradient; };
    for (size_t l = 0; l < layers_.size(); ++l) {
      const size_t p = l * size_t(per_layer_);
      const int64_t tape = shape_.rows * tape_count(shape_.cell) * shape_.hidden;
      layers_[l] = {value(p),
                    value(p + 1),
                    per_layer_ > 2 ? value(p + 2) : nullptr,
                    per_layer_ > 3 ? value(p + 3) : zeros,
                    gradient(p),
                    gradient(p + 1),
                    per_layer_ > 2 ? gradient(p + 2) : nullptr,
                    per_layer_ > 3 ? gradient(p + 3) : unused,
                    take(shape_.rows * shape_.hidden),
                    tape ? take(tape) : nullptr};
    }
    const int64_t hidden = shape_.rows * shape_.hidden;
    for (size_t i = 0; i < layers_.size() && i < 2; ++i) d_rows_[i] = take(hidden);
    hidden_ = {is_half_ ? carver.take<float>(hidden) : static_cast<float*>(layers_.back().output), layers_.back().output, hidden};
    d_hidden_ = {is_half_ ? carver.take<float>(hidden) : static_cast<float*>(d_rows_[0]), d_rows_[0], hidden};
  }

  // The mean cross entropy of a batch. The state behind it goes to `behind`, which may not be where it is read.
  float backpropagate(const int64_t* inputs, const int64_t* targets, State before, State behind) const {
    const Kernels &kernels = choose_kernels(shape_.dtype), &wide = choose_kernels(DType::float32);
    const int threads = available_threads();
    const int64_t of_layer = shape_.batch * shape_.hidden * element_;
    const auto at_layer = [&](char* state, size_t l) { return state ? state + int64_t(l) * of_layer : nullptr; };
    const auto input_of = [&](size_t l) { return l ? layers_[l - 1].output : static_cast<const void*>(inputs); };
    if (is_half_) copy_all(values_, wide.narrow);
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer& p = layers_[l];
      const ForwardArgs x{shape_of(l),
                          input_of(l),
                          p.w_ih,
                          p.w_hh,
                          p.b_ih,
                          p.b_hh,
                          nullptr,
                          at_layer(before.h, l),
                          at_layer(before.c, l),
                          p.output,
                          at_layer(behind.h, l),
                          at_layer(behind.c, l),
                          p.tape,
                          nullptr};
      kernels.forward(x, threads);
    }
    if (is_half_) copy_all({hidden_}, wide.widen);
    const Parameter *weight = &parameters_[parameters_.size() - 2], *bias = weight + 1;
    const LossArgs loss{shape_.rows, shape_.hidden, classes_, hidden_.wide, weight->value, bias->value, targets};
    const LossGradients of_loss{d_hidden_.wide, weight->gradient, bias->gradient};
    const double mean = wide.loss(loss, &of_loss, threads);
    if (is_half_) copy_all({d_hidden_}, wide.narrow);
    void *d_output = d_rows_[0], *d_input = d_rows_[1];
    for (size_t l = layers_.size(); l-- > 0; std::swap(d_output, d_input)) {
      const Layer& p = layers_[l];
      BackwardArgs x{};
      x.shape = shape_of(l);
      x.d_output = d_output;
      x.input = input_of(l);
      x.w_ih = p.w_ih;
      x.w_hh = p.w_hh;
      x.b_ih = p.b_ih;
      x.b_hh = p.b_hh;
      x.h_0 = at_layer(before.h, l);
      x.c_0 = at_layer(before.c, l);
      x.output = p.output;
      x.tape = p.tape;
      x.d_input = l ? d_input : nullptr;
      x.d_w_ih = p.d_w_ih;
      x.d_w_hh = p.d_w_hh;
      x.d_b_ih = p.d_b_ih;
      x.d_b_hh = p.d_b_hh;
      kernels.backward(x, threads);
    }
    if (is_half_) copy_all(gradients_, wide.widen);
    return float(mean);
  }

  const std::vector<Parameter>& parameters() const { return parameters_; }
  int64_t state_bytes() const { return int64_t(layers_.size()) * shape_.batch * shape_.hidden * element_; }

  // Of batches of this model.
  void require_tokens(const int64_t* inputs, const int64_t* targets, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      check(inputs[i] >= 0 && inputs[i] < vocabulary_, "token id ", inputs[i], " in row ", i, " is outside [0, ", vocabulary_,
            ")");
      check(targets[i] >= 0 && targets[i] < classes_, "target ", targets[i], " in row ", i, " is outside [0, ", classes_, ")");
    }
  }

 private:
  int64_t gate_rows() const { return shape_.gates() * shape_.hidden; }
  ScanShape shape_of(size_t l) const {
    ScanShape s = shape_;
    s.ids = l == 0;
    s.input = l ? s.hidden : vocabulary_;
    return s;
  }

  const std::vector<Tensor>& tensors_;
  ScanShape shape_{};
  bool is_half_;
  int64_t element_;  // bytes of a layer's numbers
  int64_t per_layer_, vocabulary_, classes_;
  std::vector<Layer> layers_;
  std::vector<Parameter> parameters_;
  std::vector<Copy> values_, gradients_;  // of the layers' parameters, where they have copies
  Copy hidden_{}, d_hidden_{};            // of the last layer's output: both are one place in float32
  void* d_rows_[2] = {};                  // gradients of a layer's output and of its input
};

State state_of(const Tensor& h, const Tensor& c) { return {static_cast<char*>(out(h)), static_cast<char*>(out(c))}; }

// What a model reads: nothing is written there.
State state_before(const Tensor& h_0, const OptionalTensor& c_0) {
  return {static_cast<char*>(const_cast<void*>(data(h_0))), static_cast<char*>(const_cast<void*>(data(c_0)))};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> backpropagate_cpu(Tensor inputs, Tensor targets, std::vector<Tensor> parameters,
                                                     std::vector<Tensor> gradients, Tensor h_0, OptionalTensor c_0,
                                                     Text cell_name) {
  const Cell cell = parse_cell(cell_name);
  check(inputs.dim() == 2 && inputs.numel() > 0, "inputs must be of (T, B), and not be empty");
  const int64_t steps = inputs.size(0), batch = inputs.size(1);
  require("inputs", inputs, ScalarType::Long, {steps, batch});
  require("targets", targets, ScalarType::Long, {steps, batch});
  Model model(parameters, h_0, c_0, cell, steps, batch);
  check(gradients.size() == parameters.size(), "there must be a gradient for each parameter");
  for (size_t i = 0; i < gradients.size(); ++i)
    check(parse_dtype(gradients[i]) == DType::float32 && gradients[i].is_contiguous() &&
              gradients[i].numel() == parameters[i].numel(),
          "a gradient must be contiguous, in float32, and have as many elements as its parameter");
  model.require_tokens(integers(inputs), integers(targets), steps * batch);
  Tensor loss = empty(parameters[0], {}), h_n = empty(h_0, {h_0.size(0), batch, h_0.size(2)});
  Tensor c_n = empty_if(c_0.has_value(), h_0, {h_0.size(0), batch, h_0.size(2)});
  Carver sizes(nullptr);
  model.carve(sizes, gradients);
  const Scratch memory(sizes.used());
  Carver carver(memory.data());
  model.carve(carver, gradients);
  *writable(loss) = model.backpropagate(integers(inputs), integers(targets), state_before(h_0, c_0), state_of(h_n, c_n));
  return {loss, h_n, c_n};
}

std::tuple<Tensor, Tensor> train_cpu(Tensor inputs, Tensor targets, std::vector<Tensor> parameters, Tensor h_0,
                                     OptionalTensor c_0, Tensor loss_sum, Text cell_name, bool carries,
                                     double learning_rate, double max_norm) {
  const Cell cell = parse_cell(cell_name);
  check(inputs.dim() == 3 && inputs.numel() > 0, "inputs must be of (N, T, B), and not be empty");
  const int64_t count = inputs.size(0), steps = inputs.size(1), batch = inputs.size(2);
  require("inputs", inputs, ScalarType::Long, {count, steps, batch});
  require("targets", targets, ScalarType::Long, {count, steps, batch});
  require("loss_sum", loss_sum, ScalarType::Double, {});
  Model model(parameters, h_0, c_0, cell, steps, batch);
  model.require_tokens(integers(inputs), integers(targets), count * steps * batch);
  Tensor h_n = empty(h_0, {h_0.size(0), batch, h_0.size(2)});
  Tensor c_n = empty_if(c_0.has_value(), h_0, {h_0.size(0), batch, h_0.size(2)});
  const auto carve = [&](Carver& carver) {
    model.carve(carver, {});
    char* h = carver.take<char>(model.state_bytes());
    return State{h, c_0 ? carver.take<char>(model.state_bytes()) : nullptr};
  };
  Carver sizes(nullptr);
  carve(sizes);
  const Scratch memory(sizes.used());
  Carver carver(memory.data());
  // The state behind a step goes to either place by turns, so that the last one is the result.
  State behind = carve(carver), other = state_of(h_n, c_n);
  State before = state_before(h_0, c_0);
  if (count % 2) std::swap(behind, other);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * steps * batch;
    const float loss = model.backpropagate(integers(inputs) + first, integers(targets) + first, before, behind);
    clip_and_descend(model.parameters(), max_norm, learning_rate);
    *static_cast<double*>(out(loss_sum)) += double(loss);
    if (carries) before = behind;
    std::swap(behind, other);
  }
  return {h_n, c_n};
}

}  // namespace rnnfast
