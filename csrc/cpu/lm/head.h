// The linear head of a language model on one hidden state.
#pragma once

#include "../kernels.h"
#include "../layer.h"

namespace rnnfast::RNNFAST_ISA {

template <class T>
void head_rows(const HeadArgs& x, int64_t first, int64_t end) {
  constexpr int V = Lanes<T>::count, GROUP = 8;
  const T* hidden = at<T>(x.hidden, 0);
  for (int64_t row = first; row < end; row += GROUP) {
    // A group that is not full repeats its last row.
    const T* weight[GROUP];
    Vec<T> sums[GROUP] = {};
    for (int r = 0; r < GROUP; ++r) weight[r] = at<T>(x.weight, min64(row + r, end - 1) * x.columns);
    int64_t j = 0;
    for (; j + V <= x.columns; j += V) {
      const Vec<T> h = load(hidden + j);
      for (int r = 0; r < GROUP; ++r) sums[r] = fma(load(weight[r] + j), h, sums[r]);
    }
    const int rest = int(x.columns - j);
#pragma GCC unroll 8
    for (int r = 0; r < GROUP; ++r)
      if (rest) sums[r] = fma(load(weight[r] + j, rest), load(hidden + j, rest), sums[r]);
#pragma GCC unroll 8
    for (int r = 0; r < GROUP; ++r) {
      if (r >= end - row) break;
      const T sum = total<T>(sums[r]);
      x.logits[row + r] = x.bias ? sum + *at<T>(x.bias, row + r) : sum;
    }
  }
}

// This thread's share of the logits.
RNNFAST_INLINE void head(const HeadArgs& x, int thread, int threads) {
  const int64_t first = x.rows * thread / threads, end = x.rows * (thread + 1) / threads;
  x.dtype == DType::float64 ? head_rows<double>(x, first, end) : head_rows<float>(x, first, end);
}

}  // namespace rnnfast::RNNFAST_ISA
