#include "threads.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <ctime>

#include "processors.h"

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
  asm volatile("isb" ::: "memory");  // takes about as long as the other's; "yield" takes no time
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

thread_local int pool_size = 1;  // as torch says

// The threads of a region in which so many work. libgomp ends those that a smaller team leaves out, and starts new ones for the next
// team, torch's perhaps, which takes longer than most regions: so its teams are of all, as torch's are, where it is torch's libgomp.
// But where a quota or the caller's binding leaves fewer processors than threads, those that spin would use them up.
int team_of(int threads) {
#if !defined(__clang__)
  const bool crowded = pool_size > processors() && is_confined();
  if (!crowded && pool_size == omp_get_max_threads()) return std::max(threads, pool_size);
#endif
  return threads;
}

// That the calling thread has had a core.
int64_t own_nanoseconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

thread_local Stalls stalls;

}  // namespace

int usable_threads(int pool) {
  pool_size = pool;
  const int usable = std::min(pool, processors());  // throws at one thread, too, where it has been told no number
  return forked.load() ? 1 : std::max(1, usable);
}

void run_parallel(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) return body(context, 0, 1);
  const int64_t begin = nanoseconds();
  int64_t worked = 0;
#pragma omp parallel num_threads(team_of(threads)) reduction(+ : worked)
  {
    if (const int thread = omp_get_thread_num(); thread < threads) {
      const int64_t before = own_nanoseconds();
      body(context, thread, std::min(threads, omp_get_num_threads()));
      worked += own_nanoseconds() - before;
    }
  }
  const int64_t end = nanoseconds();
  stalls.add(end, threads, end - begin, worked);
}

int64_t region_cycles() {
  constexpr int64_t REGION = 15000, A_THREAD = 400, WITHOUT_PROCESSOR = 30000;
  const int team = std::max(2, pool_size), waiting = std::max(0, team - processors());
  return REGION + A_THREAD * (team - 2) + WITHOUT_PROCESSOR * waiting + stall_cycles();
}

int worth_threads(int wanted, int64_t cycles) {
  return wanted > 1 && cycles / 2 < region_cycles() ? 1 : wanted;  // two threads save half
}

int64_t stall_cycles() {
  constexpr int64_t CYCLES = 3;  // a nanosecond
  return CYCLES * stalls.a_region(nanoseconds());
}

bool is_stalled(int64_t worked, int64_t elapsed) {
  return worked < elapsed + elapsed / 4;
}

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Stalls::add(int64_t now, int threads, int64_t elapsed, int64_t worked) {
  constexpr int64_t MILLISECOND = 1000000, ENOUGH = 30 * MILLISECOND, SHORTEST = 50 * MILLISECOND, LONGEST = 500 * MILLISECOND;
  if (now < until_) return;  // a call so long that a team pays all the same
  elapsed_ += elapsed;
  worked_ += worked;
  lost_ += elapsed - worked / threads;
  ++regions_;
  if (elapsed_ < ENOUGH) return;
  if (is_stalled(worked_, elapsed_)) {
    a_region_ = lost_ / regions_;
    while_ = std::clamp(2 * while_, SHORTEST, LONGEST);
    until_ = now + while_;
  } else {
    while_ /= 2;
  }
  elapsed_ = worked_ = lost_ = regions_ = 0;
}

int64_t Stalls::a_region(int64_t now) const { return now < until_ ? a_region_ : 0; }

void Barrier::wait(int members) {
  wait(members, [] {});
}

void Barrier::release(uint32_t phase) {
  arrived_.store(0, std::memory_order_relaxed);
  phase_.store(phase + 1);  // sequentially consistent, as are the sleepers' steps below: no wake-up is lost
  if (sleepers_.load()) wake_all(phase_);
}

bool spin_while(const std::atomic<uint32_t>& word, uint32_t value) {
  constexpr int64_t NANOSECONDS = 25000;
  constexpr int SPINS = 32;  // before each look at the clock, which may be slow: most waits are shorter than these
  for (int64_t until = 0;;) {
    for (int spin = 0; spin < SPINS; ++spin) {
      if (word.load(std::memory_order_acquire) != value) return true;
      pause_cpu();
    }
    const int64_t now = nanoseconds();
    if (until == 0) until = now + NANOSECONDS;
    if (now >= until) return false;
  }
}

void Barrier::await(uint32_t phase) {
  if (spin_while(phase_, phase)) return;
  const int64_t begin = nanoseconds();
  sleepers_.fetch_add(1);
  while (phase_.load() == phase) sleep_while(phase_, phase);
  sleepers_.fetch_sub(1);
  asleep_.fetch_add(nanoseconds() - begin, std::memory_order_relaxed);
}

int64_t& steps_walked() {
  static thread_local int64_t steps = 0;
  return steps;
}

}  // namespace rnnfast

int rnnfast_is_stalled_cpu() { return rnnfast::stall_cycles() > 0; }
