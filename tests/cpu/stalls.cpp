// Threads that wait for one that is not running, which here sleeps as if another program had its core: what a caller's parallel
// regions tell of it, and for how long. Returns 0 where all is well.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "../../csrc/cpu/threads.h"

using namespace rnnfast;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// A region of two threads that meet twice, the second of them five milliseconds late.
void region() {
  Barrier barrier;
  run_parallel(
      2,
      [](void* context, int thread, int threads) {
        for (int meeting = 0; meeting < 2; ++meeting) {
          if (thread == 1) std::this_thread::sleep_for(std::chrono::milliseconds(5));
          static_cast<Barrier*>(context)->wait(threads);
        }
      },
      &barrier);
}

constexpr int64_t MS = 1000000;

// With a clock of its own: regions of 10 ms of a team of two, which both work through, or one sleeps.
void judgement() {
  Stalls stalls;
  int64_t now = 0;
  const auto regions = [&](int count, int64_t worked) {
    for (int i = 0; i < count; ++i) stalls.add(now += 10 * MS, 2, 10 * MS, worked);
    return stalls.a_region(now);
  };
  expect(regions(30, 19 * MS) == 0, "threads that work alike are said to stall");
  expect(regions(1, 11 * MS) == 0 && regions(2, 19 * MS) == 0, "one stall is enough");
  expect(regions(3, 11 * MS) == 45 * MS / 10, "stalls are not noticed, or not what they cost");
  expect(stalls.a_region(now + 49 * MS) > 0 && stalls.a_region(now + 50 * MS) == 0, "the first while is not 50 ms");
  now += 50 * MS;
  regions(3, 11 * MS);
  expect(stalls.a_region(now + 99 * MS) > 0 && stalls.a_region(now + 100 * MS) == 0, "the second one is not twice as long");
  expect(regions(3, 19 * MS) > 0, "a long call ends it");
  now += 100 * MS;
  regions(3, 19 * MS);
  regions(3, 11 * MS);
  expect(stalls.a_region(now + 99 * MS) > 0 && stalls.a_region(now + 100 * MS) == 0, "success does not halve it");
  for (int i = 0; i < 9; ++i) {
    now += 500 * MS;
    regions(3, 11 * MS);
  }
  expect(stalls.a_region(now + 499 * MS) > 0 && stalls.a_region(now + 500 * MS) == 0, "the longest is not half a second");
}

}  // namespace

int main() {
  judgement();
  int tries = 100;
  do region();
  while (stall_cycles() == 0 && --tries > 0);
  expect(tries > 0 && rnnfast_is_stalled_cpu() == 1, "a thread that always comes late is not noticed");
  std::thread([] { expect(stall_cycles() == 0 && rnnfast_is_stalled_cpu() == 0, "another caller is told the same"); }).join();
  return 0;
}
