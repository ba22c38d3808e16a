#include "clip.h"

#include <algorithm>
#include <cmath>

#include "../kernels.h"
#include "../ops.h"
#include "../threads.h"

namespace rnnfast {
namespace {

constexpr int64_t BLOCK = 1 << 12;           // elements that are summed in float32; blocks are added up in float64
constexpr int64_t WORTH_A_THREAD = 1 << 15;  // elements
constexpr int LANES = 32;                    // sums side by side, for the compiler to make vectors of

double sum_of_squares(const float* x, int64_t n) {
  float sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += x[i + lane] * x[i + lane];
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += x[i] * x[i];
  double sum = 0;
  for (const float lane : sums) sum += double(lane);
  return sum;
}

struct Clip {
  std::vector<Parameter> blocks;
  std::vector<double> squares;  // of the norm of each block
  double max_norm;
  float rate;
  Barrier all;
  float factor = 1;

  void run(int thread, int threads) {
    // A thread scales the blocks that it has summed, which are near it then.
    const size_t first = blocks.size() * size_t(thread) / size_t(threads);
    const size_t last = blocks.size() * size_t(thread + 1) / size_t(threads);
    if (!std::isinf(max_norm)) {
      for (size_t b = first; b < last; ++b) squares[b] = sum_of_squares(blocks[b].gradient, blocks[b].count);
      all.wait(threads, [&] {
        double sum = 0;
        for (const double square : squares) sum += square;
        factor = float(max_norm / (std::sqrt(sum) + 1e-6));
      });
    }
    const Kernels& kernels = choose_kernels(DType::float32);
    for (size_t b = first; b < last; ++b) {
      const Parameter& block = blocks[b];
      if (!(factor >= 1))  // also if the norm is no number: then no gradient is one, as in torch
        for (int64_t i = 0; i < block.count; ++i) block.gradient[i] *= factor;
      if (block.value) kernels.descend(block.value, block.gradient, block.count, rate);
    }
  }
};

}  // namespace

void clip_and_descend(const std::vector<Parameter>& parameters, double max_norm, double rate) {
  Clip clip{};
  clip.max_norm = max_norm;
  clip.rate = float(rate);
  int64_t total = 0;
  for (const Parameter& p : parameters) {
    for (int64_t i = 0; i < p.count; i += BLOCK)
      clip.blocks.push_back({p.gradient + i, std::min(BLOCK, p.count - i), p.value ? p.value + i : nullptr});
    total += p.count;
  }
  clip.squares.resize(clip.blocks.size());
  const int wanted = int(std::clamp<int64_t>(total / WORTH_A_THREAD, 1, available_threads()));
  const int threads = worth_threads(wanted, total / 2);
  run_parallel(threads, [&](int thread, int n) { clip.run(thread, n); });
}

void clip_gradients_cpu(std::vector<Tensor> gradients, double max_norm) {
  std::vector<Parameter> parameters;
  for (const Tensor& gradient : gradients) {
    check(parse_dtype(gradient) == DType::float32 && gradient.is_contiguous(), "gradients are clipped in float32, contiguous");
    parameters.push_back({static_cast<float*>(out(gradient)), gradient.numel()});
  }
  clip_and_descend(parameters, max_norm, 0);
}

}  // namespace rnnfast
