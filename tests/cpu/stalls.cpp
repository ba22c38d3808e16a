// Threads that wait for one that is not running, which here sleeps as if another program had its core: what a caller's parallel
// regions tell of it, and for how long. Returns 0 where all is well.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "../../csrc/cpu/threads.h"

using namespace rnnfast;

namespace {

void sleep(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// A region of two threads that meet twice. Each has `work` to do before, the second is `late`, in milliseconds.
void region(int work, int late) {
  struct {
    Barrier barrier;
    int work, late;
  } of{{}, work, late};
  run_parallel(
      2,
      [](void* context, int thread, int threads) {
        auto& o = *static_cast<decltype(of)*>(context);
        for (int meeting = 0; meeting < 2; ++meeting) {
          sleep(o.work + (thread == 1 ? o.late : 0));
          o.barrier.wait(threads);
        }
      },
      &of);
}

}  // namespace

int main() {
  for (int i = 0; i < 8; ++i) region(5, 0);
  expect(stall_cycles() == 0, "threads that work alike are said to stall");
  region(0, 1);
  expect(stall_cycles() == 0, "a millisecond is enough");
  for (int i = 0; i < 6; ++i) region(0, 5);
  expect(stall_cycles() > 0, "stalls are not noticed");
  std::thread([] { expect(stall_cycles() == 0, "another caller is told the same"); }).join();
  sleep(60);
  expect(stall_cycles() == 0, "the team is not tried again");
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 3; ++i) region(0, 5);
  sleep(60);
  const int64_t stall = stall_cycles();
  const bool soon = std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(125);
  expect(stall > 0 || !soon, "the second while is not longer than the first");
  return 0;
}
