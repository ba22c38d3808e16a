#include "clip.h"

#include <algorithm>
#include <cmath>

#include "ops.h"
#include "threads.h"

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
  struct Part {
    float* data;
    int64_t count;
  };
  std::vector<Part> blocks;
  std::vector<double> squares;  // of the norm of each block
  double max_norm;
  Barrier all;
  float factor = 1;

  void run(int thread, int threads) {
    // A thread scales the blocks that it has summed, which are near it then.
    const size_t first = blocks.size() * size_t(thread) / size_t(threads);
    const size_t last = blocks.size() * size_t(thread + 1) / size_t(threads);
    for (size_t b = first; b < last; ++b) squares[b] = sum_of_squares(blocks[b].data, blocks[b].count);
    all.wait(threads, [&] {
      double sum = 0;
      for (const double square : squares) sum += square;
      factor = float(max_norm / (std::sqrt(sum) + 1e-6));
    });
    if (factor >= 1) return;  // not so if the norm is no number: then no gradient is one, as in torch
    for (size_t b = first; b < last; ++b)
      for (int64_t i = 0; i < blocks[b].count; ++i) blocks[b].data[i] *= factor;
  }
};

}  // namespace

void clip_gradients_cpu(std::vector<Tensor> gradients, double max_norm) {
  Clip clip{};
  clip.max_norm = max_norm;
  int64_t total = 0;
  for (const Tensor& gradient : gradients) {
    check(parse_dtype(gradient) == DType::float32 && gradient.is_contiguous(), "gradients are clipped in float32, contiguous");
    const int64_t n = gradient.numel();
    float* const elements = static_cast<float*>(out(gradient));
    for (int64_t i = 0; i < n; i += BLOCK) clip.blocks.push_back({elements + i, std::min(BLOCK, n - i)});
    total += n;
  }
  clip.squares.resize(clip.blocks.size());
  const int wanted = int(std::clamp<int64_t>(total / WORTH_A_THREAD, 1, available_threads()));
  const int threads = worth_threads(wanted, total / 2);
  run_parallel(
      threads, [](void* context, int thread, int n) { static_cast<Clip*>(context)->run(thread, n); }, &clip);
}

}  // namespace rnnfast
