// The machine's limit that the benchmarks quote: float32 multiply-adds on registers alone, on every thread.
#pragma once

#include <cstdint>

namespace rnnfast {

// GFLOP/s of the threads that torch may use, each doing `rounds` rounds of 16 independent multiply-adds of the widest
// vectors this processor has; a multiply-add counts as two operations.
double fma_peak_cpu(int64_t rounds);

}  // namespace rnnfast
