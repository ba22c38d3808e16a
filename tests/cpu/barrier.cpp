// The barrier between time steps under contention, for ThreadSanitizer. Returns 0 where all is well.
#include <chrono>
#include <thread>
#include <vector>

#include "../../csrc/cpu/threads.h"

// Each thread reads what the others wrote before the barrier: a race, or a wrong sum, if it does not hold.
int main() {
  constexpr int THREADS = 4, ROUNDS = 3000;
  rnnfast::Barrier barrier;
  int64_t written[THREADS] = {};
  bool wrong[THREADS] = {};
  std::vector<std::thread> threads;
  for (int i = 0; i < THREADS; ++i)
    threads.emplace_back([&, i] {
      for (int round = 1; round <= ROUNDS; ++round) {
        written[i] = round;
        if (round % 500 == i) std::this_thread::sleep_for(std::chrono::microseconds(300));  // the others fall asleep
        barrier.wait(THREADS);
        for (int64_t value : written) wrong[i] |= value != round;
        barrier.wait(THREADS);
      }
    });
  for (auto& thread : threads) thread.join();
  for (bool one : wrong)
    if (one) return 1;
  return 0;
}

