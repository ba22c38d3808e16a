// Threads and the barrier between time steps. Not templates, but for those of the caller's own function: one copy serves all
// instruction sets.
#pragma once

#include <atomic>
#include <cstdint>

namespace rnnfast {

// How many threads of a pool of so many, torch's, a call of this thread may use: no more than there are processors, and 1 in a forked
// child, where the parent's are gone. Keeps that number for what is below.
int usable_threads(int pool);

// Runs body(context, thread, threads) on at most `threads` threads of OpenMP's: of the pool that torch uses where both have GCC's
// libgomp; clang's libomp keeps a second one.
void run_parallel(int threads, void (*body)(void* context, int thread, int threads), void* context);
// Or body(thread, threads).
template <class F>
void run_parallel(int threads, F body) {
  run_parallel(threads, [](void* f, int thread, int n) { (*static_cast<F*>(f))(thread, n); }, &body);
}

// Costs, in cycles of one core. Measured with two threads; what more of them cost is what others found with as many.
// A parallel region, beginning and end, and what it loses where other programs have the cores.
int64_t region_cycles();
// A barrier.
constexpr int64_t barrier_cycles(int threads) { return 2000 + 300 * (threads - 2); }

// `wanted` threads for a region that takes one so many cycles, or one if beginning it takes longer than sharing them saves.
int worth_threads(int wanted, int64_t cycles);

// The number of threads to consider after so many, of `most`.
constexpr int more_threads(int threads, int most) { return threads < most && 2 * threads > most ? most : 2 * threads; }

// Cycles that a parallel region of the caller's loses, as it seems: where another program has the core of one of its threads, all
// wait for that, and a call of microseconds takes milliseconds. 0 where there are cores to spare.
int64_t stall_cycles();

// Whether a team that has worked for so many nanoseconds, of all its threads, in those elapsed was hardly quicker than one thread.
bool is_stalled(int64_t worked, int64_t elapsed);

// What the parallel regions of one caller tell of the machine. Once its team has hardly been quicker than one thread for some time,
// it is not asked for a while, and then tried again; the while doubles each time in vain, and else is halved. All in nanoseconds.
class Stalls {
 public:
  // A region of so many threads that has ended now: what has elapsed, and what all of them have worked in it.
  void add(int64_t now, int threads, int64_t elapsed, int64_t worked);
  // What a region loses, 0 but for that while.
  int64_t a_region(int64_t now) const;

 private:
  int64_t elapsed_ = 0, worked_ = 0, lost_ = 0, regions_ = 0;  // since the team was last judged
  int64_t a_region_ = 0, while_ = 0, until_ = 0;
};

int64_t nanoseconds();  // of a clock

// Waits for a word to change, about as long as it takes to wake a thread that sleeps, and says whether it did.
bool spin_while(const std::atomic<uint32_t>& word, uint32_t value);

// Spins for a while, then sleeps: a waiting thread must not hold a core that the others need.
class Barrier {
 public:
  void wait(int members);
  // `between` runs in one thread after all have come and before any goes on.
  template <class F>
  void wait(int members, F between) {
    if (members == 1) return between();
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < uint32_t(members)) return await(phase);
    between();
    release(phase);
  }
  // Nanoseconds, of all threads.
  int64_t asleep() const { return asleep_.load(std::memory_order_relaxed); }

 private:
  void await(uint32_t phase);
  void release(uint32_t phase);

  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<int64_t> asleep_{0};
};

// Steps that the calling thread has walked in all its scans.
int64_t& steps_walked();

}  // namespace rnnfast

// For Python: whether the caller's regions lose anything now.
extern "C" __attribute__((visibility("default"))) int rnnfast_is_stalled_cpu();
