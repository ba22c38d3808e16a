#include "limits.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "ops.h"
#include "tensors.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace rnnfast {
namespace {

// 16 chains in flight hide the latency of two 4-cycle units; 16 accumulators and two factors fit 32 registers. AVX2 has
// 16 registers, so there 12 chains. x -> x a + b with a < 1 converges: no overflow, no denormals.
#define RNNFAST_FMA_LOOP(NAME, TARGET, CHAINS, VECTOR, BROADCAST, FMA)                 \
  TARGET void NAME(int64_t rounds, float* out) {                                       \
    VECTOR x[CHAINS];                                                                  \
    const VECTOR a = BROADCAST(out[0]), b = BROADCAST(out[1]);                         \
    _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; ++i) x[i] = BROADCAST(float(i)); \
    for (int64_t round = 0; round < rounds; ++round) {                                 \
      _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; ++i) x[i] = FMA(x[i], a, b); \
    }                                                                                  \
    _Pragma("GCC unroll 16") for (int i = 1; i < CHAINS; ++i) x[0] = FMA(x[0], a, x[i]); \
    __builtin_memcpy(out, &x[0], sizeof(float));                                       \
  }

struct Loop {
  void (*run)(int64_t rounds, float* out);  // out: a and b, then one number of the result, so that it must be computed
  int chains, lanes;
};

#if defined(__x86_64__)
RNNFAST_FMA_LOOP(loop_avx512, __attribute__((target("avx512f"))), 16, __m512, _mm512_set1_ps, _mm512_fmadd_ps)
RNNFAST_FMA_LOOP(loop_avx2, __attribute__((target("avx2,fma"))), 12, __m256, _mm256_set1_ps, _mm256_fmadd_ps)
inline __m128 multiply_add(__m128 x, __m128 a, __m128 b) { return _mm_add_ps(_mm_mul_ps(x, a), b); }
RNNFAST_FMA_LOOP(loop_sse2, , 12, __m128, _mm_set1_ps, multiply_add)

Loop widest() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return {loop_avx512, 16, 16};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {loop_avx2, 12, 8};
  return {loop_sse2, 12, 4};
}
#elif defined(__aarch64__)
inline float32x4_t multiply_add(float32x4_t x, float32x4_t a, float32x4_t b) { return vfmaq_f32(b, x, a); }
RNNFAST_FMA_LOOP(loop_neon, , 16, float32x4_t, vdupq_n_f32, multiply_add)

Loop widest() { return {loop_neon, 16, 4}; }
#else
inline float same(float x) { return x; }
inline float multiply_add(float x, float a, float b) { return x * a + b; }
RNNFAST_FMA_LOOP(loop_scalar, , 8, float, same, multiply_add)

Loop widest() { return {loop_scalar, 8, 1}; }
#endif

// 1e-9 of what all threads do a second, each with one call of work(thread), which returns how much it has done.
template <class Work>
double giga_a_second(const Work& work) {
  std::vector<double> done(static_cast<size_t>(available_threads()));
  const auto start = std::chrono::steady_clock::now();
  run_parallel(int(done.size()), [&](int thread, int) { done[size_t(thread)] = work(thread); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 1e-9 * std::accumulate(done.begin(), done.end(), 0.0) / seconds.count();
}

}  // namespace

double fma_peak_cpu(int64_t rounds) {
  const Loop loop = widest();
  return giga_a_second([&](int) {
    float numbers[] = {0.5f, 1.0f};
    loop.run(rounds, numbers);
    asm volatile("" : : "m"(numbers));
    return 2.0 * double(loop.chains * loop.lanes) * double(rounds);
  });
}

double product_limit_cpu(int64_t batch, int64_t depth, int64_t rounds) {
  check(batch > 0 && depth > 0, "a product needs rows and a depth");
  const Kernels& kernels = choose_kernels(DType::float32);
  return giga_a_second([&](int) { return kernels.near_product(batch, depth, rounds); });
}

double weight_limit_cpu(int64_t batch, int64_t depth, int64_t rounds) {
  const MatrixUnit* const unit = matrix_unit();
  if (!unit) return product_limit_cpu(batch, depth, rounds);
  check(batch > 0 && depth > 0, "a product needs rows and a depth");
  const int64_t as_much = 1 + batch * depth * rounds / 2048;  // as a product of vectors computes
  return giga_a_second([&](int) { return unit->near_product(as_much); });
}

double read_limit_cpu(int64_t bytes, int64_t rounds) {
  constexpr int64_t LINE = 64, LINES = 8;
  const Kernels& kernels = choose_kernels(DType::float32);
  const int threads = available_threads();
  const int64_t lines = std::max<int64_t>(1, bytes / (threads * LINE * LINES)) * LINES;
  const Scratch memory(size_t(threads * lines * LINE));
  const auto share = [&](int thread) { return reinterpret_cast<float*>(memory.data() + thread * lines * LINE); };
  run_parallel(threads, [&](int thread, int) { std::fill_n(share(thread), lines * LINE / int64_t(sizeof(float)), 0.5f); });
  double best = 0;
  for (const bool fetch : {false, true})
    best = std::max(best, giga_a_second([&](int thread) { return kernels.read_weights(share(thread), lines, fetch, rounds); }));
  return best;
}

double gate_limit_cpu(Text cell, bool backward, int64_t rounds) {
  const Kernels& kernels = choose_kernels(DType::float32);
  const Cell which = parse_cell(cell);
  return 1e9 * giga_a_second([&](int) { return kernels.near_gates(which, backward, rounds); });
}

}  // namespace rnnfast
