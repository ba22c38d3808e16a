#include "generate.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <numeric>

#include "../kernels.h"
#include "../tensors.h"
#include "../threads.h"

namespace rnnfast {
namespace {

// A NaN counts as the greatest, as in torch.argmax.
int64_t argmax(const std::vector<double>& logits) {
  int64_t best = 0;
  for (size_t v = 1; v < logits.size() && !std::isnan(logits[best]); ++v)
    if (!(logits[v] <= logits[best])) best = int64_t(v);
  return best;
}

constexpr const char* NOT_FINITE = "the model's logits are not finite: there is nothing to draw a token from";

int64_t likeliest(const std::vector<double>& logits) {
  const int64_t token = argmax(logits);
  check(!std::isnan(logits[token]), NOT_FINITE);
  return token;
}

struct Sampler {
  double temperature;
  std::optional<int64_t> top_k;
  std::optional<double> top_p;
  std::vector<double> ordered;
  std::vector<int64_t> index;

  // The operations of rnnfast/lm/generate.py `pick`, in its order. `weights`: the logits on entry.
  int64_t draw(std::vector<double>& weights, double uniform) {
    const int64_t count = int64_t(weights.size());
    const double greatest = weights[argmax(weights)];
    for (double& w : weights) w = (w - greatest) / temperature;
    double least = -INFINITY;
    if (top_k && *top_k < count) {
      ordered = weights;
      std::nth_element(ordered.begin(), ordered.begin() + (*top_k - 1), ordered.end(), std::greater<>());
      least = ordered[*top_k - 1];
    }
    for (double& w : weights) w = w < least ? 0.0 : std::exp(w);
    if (top_p) keep_nucleus(weights);
    double total = 0;
    for (double w : weights) total += w;
    check(total > 0, NOT_FINITE);
    const double threshold = uniform * total;
    double sum = weights[0];
    int64_t token = 0;
    while (sum < threshold && token + 1 < count) sum += weights[++token];
    return token;
  }

 private:
  void keep_nucleus(std::vector<double>& weights) {
    index.resize(weights.size());
    std::iota(index.begin(), index.end(), 0);
    std::stable_sort(index.begin(), index.end(), [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
    double total = 0, sum = 0;
    for (int64_t v : index) total += weights[v];
    for (int64_t v : index) {
      sum += weights[v];
      if (sum - weights[v] >= *top_p * total) weights[v] = 0;
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> generate_cpu(std::vector<Tensor> packed, OptionalTensor embedding, Tensor head_weight,
                                                OptionalTensor head_bias, Tensor h_0, OptionalTensor c_0, int64_t token,
                                                int64_t length, OptionalTensor uniforms, double temperature,
                                                std::optional<int64_t> top_k, std::optional<double> top_p) {
  const ScalarType type = head_weight.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, "generation is in float32 or float64");
  check(!packed.empty() && head_weight.dim() == 2 && head_weight.numel() > 0 && (!embedding || embedding->dim() == 2),
        "generation takes a layer at least, a head (V, H) and, if any, an embedding (V, I)");
  const DType dtype = type == ScalarType::Float ? DType::float32 : DType::float64;
  const int64_t depth = int64_t(packed.size()), vocab = head_weight.size(0), features = head_weight.size(1);
  const int64_t known = embedding ? embedding->size(0) : unpack(packed[0]).layer.input;
  require("head_weight", head_weight, type, {vocab, features});
  require("head_bias", head_bias, type, {vocab});
  if (embedding) require("embedding", embedding, type, {known, embedding->size(1)});
  require("h_0", h_0, type, {depth, 1, features});
  require("c_0", c_0, type, {depth, 1, features});
  check(length >= 0 && (!top_k || *top_k >= 1) && (!top_p || (*top_p > 0 && *top_p <= 1)),
        "length must not be negative, top_k must be positive, and top_p in (0, 1]");
  require("uniforms, a draw for each token,", uniforms, ScalarType::Double, {length});
  check(vocab <= known && token >= 0 && token < known, "a token is outside the vocabulary of the first layer");
  const int64_t element = int64_t(head_weight.element_size());
  const Kernels& kernels = choose_kernels(dtype);
  const int threads = available_threads();

  Tensor ids = torch::stable::new_empty(h_0, {length}, ScalarType::Long);
  Tensor h_n = torch::stable::new_empty(h_0, {depth, 1, features});
  Tensor c_n = torch::stable::new_empty(h_0, {c_0 ? depth : 0, 1, features});
  const size_t state_bytes = size_t(h_0.numel() * element);
  std::memcpy(h_n.mutable_data_ptr(), h_0.const_data_ptr(), state_bytes);
  if (c_0) std::memcpy(c_n.mutable_data_ptr(), c_0->const_data_ptr(), state_bytes);

  // The states are advanced in place: a layer's step has read them before it writes the new ones.
  std::vector<ForwardArgs> layers;
  std::vector<char> outputs(packed.size() * size_t(features * element));
  int64_t inputs = embedding ? embedding->size(1) : 0;
  for (size_t l = 0; l < packed.size(); ++l) {
    const PackedWeights weights = unpack(packed[l]);
    ForwardArgs x{};
    x.shape = weights.layer;
    x.packed = weights.panels;
    check(x.shape.lanes == 1 && x.shape.dtype == dtype && x.shape.hidden == features &&
              x.shape.state == features && x.shape.ids == (l == 0 && !embedding) && (x.shape.ids || x.shape.input == inputs) &&
              (x.shape.cell == Cell::lstm) == c_0.has_value(),
          "layer ", l, " does not fit the layer before, the states or the head");
    x.shape.steps = x.shape.batch = x.shape.rows = 1;
    x.input = l == 0 ? static_cast<const void*>(&token) : layers[l - 1].output;
    x.output = outputs.data() + l * size_t(features * element);
    x.h_0 = x.h_n = static_cast<char*>(h_n.mutable_data_ptr()) + int64_t(l) * features * element;
    if (c_0) x.c_0 = x.c_n = static_cast<char*>(c_n.mutable_data_ptr()) + int64_t(l) * features * element;
    layers.push_back(x);
    inputs = features;
  }

  int64_t weight_bytes = 0;
  for (const ForwardArgs& x : layers)
    weight_bytes += x.shape.gates() * x.shape.hidden * (x.shape.state + (x.shape.ids ? 0 : x.shape.input)) * element;
  constexpr int64_t TOKENS = 32;  // after which it is decided anew how many threads there are to be
  const auto threads_now = [&] {
    // Fewer are read by one core before several have met, behind each layer and the head.
    constexpr int64_t WORTH_IT = 512 << 10, BYTES_A_CYCLE = 24;
    if (weight_bytes <= WORTH_IT) return 1;
    const int64_t cycles = weight_bytes / BYTES_A_CYCLE;
    const auto token = [&](int n) { return cycles / n + (depth + 1) * barrier_cycles(n); };
    int best = std::min(2, threads);
    for (int n = 2; n <= threads; n = more_threads(n, threads))
      if (token(n) < token(best)) best = n;
    return worth_threads(best, TOKENS * cycles);
  };

  struct Loop {
    Sampler sampler;
    std::vector<double> logits;
    const double* uniform;
    int64_t *ids, count;
    int64_t& token;
    const char* embedding;
    int64_t row_bytes;
    const void*& input;
    std::exception_ptr error;

    // From the logits to the next token, and to the first layer's input. Whether the threads go on.
    bool next() {
      *ids++ = token = uniform ? sampler.draw(logits, *uniform++) : likeliest(logits);
      if (embedding) input = embedding + token * row_bytes;
      return --count % TOKENS > 0;
    }
  };
  const char* table = static_cast<const char*>(data(embedding));
  const int64_t row_bytes = embedding ? embedding->size(1) * element : 0;
  Loop loop{{temperature, top_k, top_p, {}, {}},
            std::vector<double>(size_t(vocab), 0.0),
            static_cast<const double*>(data(uniforms)),
            static_cast<int64_t*>(ids.mutable_data_ptr()),
            length,
            token,
            table,
            row_bytes,
            layers[0].input,
            {}};
  if (length < 1) return {ids, h_n, c_n};
  if (table) layers[0].input = table + token * row_bytes;
  const HeadArgs head{vocab, features, dtype, data(head_weight), data(head_bias), layers.back().output, loop.logits.data()};
  const auto next = [](void* context) {
    Loop& loop = *static_cast<Loop*>(context);
    try {
      return loop.next();
    } catch (...) {  // not out of a parallel region
      loop.error = std::current_exception();
      return false;
    }
  };
  while (loop.count > 0) {
    kernels.generate(layers.data(), int64_t(layers.size()), head, threads_now(), next, &loop);
    if (loop.error) std::rethrow_exception(loop.error);
  }
  return {ids, h_n, c_n};
}

}  // namespace rnnfast
