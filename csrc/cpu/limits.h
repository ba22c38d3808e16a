// The machine's limits that the benchmarks quote, each on every thread that torch may use.
#pragma once

#include <cstdint>

#include "../text.h"

namespace rnnfast {

// GFLOP/s in float32 of `rounds` rounds of independent multiply-adds on registers alone, of the widest vectors this processor
// has and as many as keep its units busy; a multiply-add counts as two operations.
double fma_peak_cpu(int64_t rounds);

// GFLOP/s in float32 of the scan's product of `batch` rows and one panel of weights, `depth` deep, over and over: the
// operands stay near, nothing is waited for.
double product_limit_cpu(int64_t batch, int64_t depth, int64_t rounds);

// The same of gradients of weights: on the matrix unit where there is one, on vectors else.
double weight_limit_cpu(int64_t batch, int64_t depth, int64_t rounds);

// GB/s that all threads read weights of so many bytes with, each its share of them, `rounds` times: from whichever cache holds them.
double read_limit_cpu(int64_t bytes, int64_t rounds);

// Units a second, in float32, whose gate math is done forward or backward on operands that stay in the first-level cache;
// `rounds` rounds of a few vectors.
double gate_limit_cpu(Text cell, bool backward, int64_t rounds);

}  // namespace rnnfast
