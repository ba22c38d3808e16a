#include "threads.h"

#include <omp.h>
#include <pthread.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <thread>
#endif

namespace rnnfast {
namespace {

// libgomp's pool does not survive fork: a parallel region in the child waits for threads that do not exist.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  (void)value;
  std::this_thread::yield();
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
#endif
}

}  // namespace

int usable_threads(int wanted) { return forked.load() ? 1 : wanted; }

void run_parallel(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) return body(context, 0, 1);
#pragma omp parallel num_threads(threads)
  body(context, omp_get_thread_num(), omp_get_num_threads());
}

void Barrier::wait(int members) {
  wait(members, [] {});
}

void Barrier::release(uint32_t phase) {
  arrived_.store(0, std::memory_order_relaxed);
  phase_.store(phase + 1);  // sequentially consistent, as are the sleepers' steps below: no wake-up is lost
  if (sleepers_.load()) wake_all(phase_);
}

bool spin_while(const std::atomic<uint32_t>& word, uint32_t value) {
  constexpr int SPINS = 1000;
  for (int spin = 0; spin < SPINS; ++spin) {
    if (word.load(std::memory_order_acquire) != value) return true;
    pause_cpu();
  }
  return false;
}

void Barrier::await(uint32_t phase) {
  if (spin_while(phase_, phase)) return;
  sleepers_.fetch_add(1);
  while (phase_.load() == phase) sleep_while(phase_, phase);
  sleepers_.fetch_sub(1);
}

int64_t& steps_walked() {
  static thread_local int64_t steps = 0;
  return steps;
}

int64_t near_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long second_level = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr long second_level = 0;
#endif
  constexpr int64_t USUAL = int64_t(1) << 20;
  return (second_level > 0 ? second_level : USUAL) / 4 * 3;
}

}  // namespace rnnfast
