// Threads and the barrier between time steps. Not templates: one copy serves all instruction sets.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace rnnfast {

// How many threads a call may use of `wanted`: 1 in a forked child, where the parent's are gone.
int usable_threads(int wanted);

// Runs body(context, thread, threads) on at most `threads` threads of the pool that torch uses.
void run_parallel(int threads, void (*body)(void* context, int thread, int threads), void* context);

// Spins for some ten microseconds, then sleeps: a waiting thread must not hold a core that the others need.
class Barrier {
 public:
  void wait(int members);

 private:
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// Steps that the calling thread has walked in all its scans.
int64_t& steps_walked();

// Bytes of weights that stay in a core's second-level cache from step to step, beside all else that passes through it.
int64_t near_bytes();

}  // namespace rnnfast
