// The barrier between time steps, and the pieces dealt in them, under contention, for ThreadSanitizer. Returns 0 where all is well.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "../../csrc/cpu/sharing.h"
#include "../../csrc/cpu/threads.h"

namespace {

constexpr int THREADS = 4, ROUNDS = 3000;

thread_local bool gives = false;
std::atomic<bool> allocated{false};  // while giving work away, where an exception would end the process

void sleep(int microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }

// Runs work(thread), which says whether it has seen something wrong, in every thread.
template <class F>
bool all_is_well(F work) {
  bool wrong[THREADS] = {};
  std::vector<std::thread> threads;
  for (int i = 0; i < THREADS; ++i) threads.emplace_back([&, i] { wrong[i] = work(i); });
  for (auto& thread : threads) thread.join();
  for (bool one : wrong)
    if (one) return false;
  return true;
}

// Each thread reads what the others wrote before the barrier: a race, or a wrong sum, if it does not hold.
bool barrier_holds() {
  rnnfast::Barrier barrier;
  int64_t written[THREADS] = {};
  return all_is_well([&](int thread) {
    bool wrong = false;
    for (int round = 1; round <= ROUNDS; ++round) {
      written[thread] = round;
      if (round % 500 == thread) sleep(300);  // the others fall asleep
      barrier.wait(THREADS);
      for (int64_t value : written) wrong |= value != round;
      barrier.wait(THREADS);
    }
    return wrong;
  });
}

// Every piece is taken once a step, whoever is slow; and one more member is dealt to than comes.
bool pieces_are_dealt_once() {
  constexpr int PIECES = 37;
  rnnfast::Barrier barrier;
  rnnfast::Deal deal(THREADS + 1, PIECES, false);
  int64_t taken[PIECES] = {};
  return all_is_well([&](int thread) {
    bool wrong = false;
    for (int round = 1; round <= ROUNDS; ++round) {
      for (int64_t piece; (piece = deal.take(thread)) >= 0;) {
        const int64_t next = deal.peek(thread);
        wrong |= piece >= PIECES || next >= PIECES || next == piece;
        ++taken[piece];
        if (round % 500 == thread) sleep(20);
      }
      barrier.wait(THREADS, [&] { deal.next_step(); });
      for (int64_t times : taken) wrong |= times != round;
      barrier.wait(THREADS);
    }
    return wrong;
  });
}

// Every row goes through every step once and in order, in whichever thread.
bool rows_are_relayed() {
  constexpr int64_t ROWS = 50, STEPS = 20;
  for (int round = 0; round < ROUNDS / 10; ++round) {
    rnnfast::Relay relay(THREADS);
    int64_t done[THREADS * ROWS] = {};
    const auto run = [&](rnnfast::Item item, int thread) {
      for (int64_t step = item.done; step < STEPS; ++step) {
        gives = true;
        relay.share(item, step);
        gives = false;
        for (int64_t row = item.first; row < item.end; ++row) {
          if (done[row] != step) return true;
          ++done[row];
        }
        if (thread == round % THREADS) sleep(round % 50 == 0 ? 200 : 1);  // a slow one
      }
      return false;
    };
    const bool well = all_is_well([&](int thread) {
      bool wrong = run({0, 1, thread * ROWS, (thread + 1) * ROWS}, thread);
      for (rnnfast::Item item; relay.take(item, THREADS);) wrong |= run(item, thread);
      return wrong;
    });
    for (int64_t steps : done)
      if (steps != STEPS) return false;
    if (!well) return false;
  }
  return true;
}

// Where one does not come for long, the first member does the rest of the work; every step's is done once.
bool a_stalled_team_dissolves() {
  constexpr int STEPS = 40;
  rnnfast::Team team(THREADS, true, 0);
  std::atomic<int> done[STEPS] = {}, left{0};
  const bool well = all_is_well([&](int member) {
    int members = THREADS;
    for (std::atomic<int>& shares : done) {
      // Beside it a wake-up on a busy machine counts for little: of four threads three may hardly work at all.
      if (member == 1) sleep(20000);
      shares += members == 1 ? THREADS : 1;
      if (team.end_step(member, members)) continue;
      ++left;
      return member == 0;
    }
    return members > 1;
  });
  for (const std::atomic<int>& shares : done)
    if (shares != THREADS) return false;
  return well && team.is_dissolved() && left == THREADS - 1;
}

}  // namespace

void* operator new(std::size_t bytes) {
  if (gives) allocated = true;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main() {
  const auto is_well = [](const char* what, bool well) {
    if (!well) std::fprintf(stderr, "not so: %s\n", what);
    return well;
  };
  const bool well = is_well("the barrier holds", barrier_holds()) && is_well("pieces are dealt once", pieces_are_dealt_once()) &&
                    is_well("rows are relayed", rows_are_relayed()) &&
                    is_well("a stalled team dissolves", a_stalled_team_dissolves()) &&
                    is_well("nothing is allocated while work is given away", !allocated);
  return well ? 0 : 1;
}
