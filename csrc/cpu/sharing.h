// How threads share the work of a scan while it goes on. Cores are never equally fast for long: their other hardware threads,
// and other programs, come and go. Not templates, and nothing inline that is not trivial: one copy serves all instruction sets.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "threads.h"

namespace rnnfast {

// Among threads that walk through time together. The pieces of a step are dealt in ranges, one a member, who walks through it
// from one end; a member that is through takes pieces from the far ends of the others'. The next step deals in proportion to
// what each has done, so a piece mostly stays with the member that has its weights near, and every member turns round, so that
// what it used last is used first.
class Deal {
 public:
  Deal(int members, int64_t pieces, bool back);
  ~Deal();

  // Between two steps, by one thread while the others wait.
  void next_step();
  // The next piece for a member, or -1 when all are taken.
  int64_t take(int member);
  // The piece after it, as far as can be said: of the member's own.
  int64_t peek(int member) const;

 private:
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
    int64_t first = 0, end = 0, done = 0;
  };
  bool is_back(int member) const;
  void begin();
  int64_t take_from(int member, bool from_end);

  std::vector<Share> shares_;
  bool back_;
};

// Rows [first, end) of lanes [lane, lane_end), `done` steps of which are done.
struct Item {
  int64_t lane, lane_end, first, end;
  int64_t done = 0;
};

// Among threads that walk through time alone, each with its own rows. One that has come to the end asks for more, and another
// gives it half of its rows from the step that it has reached.
class Relay {
 public:
  explicit Relay(int threads);
  ~Relay();

  // Gives half of the item's rows away, if a thread asks for some and they are worth it, and says whether it has. Takes no memory,
  // and throws nothing.
  bool share(Item& item, int64_t done);
  // For one of `threads` that has no more work: what another gives it, or false when none has any.
  bool take(Item& item, int threads);

 private:
  std::atomic<int> idle_{0};  // but for those to whom something has been given
  std::atomic<uint32_t> changes_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Item> given_;  // for each thread that asks at most one
};

// What the threads of a scan have in common.
struct Team {
  Barrier barrier;
  std::unique_ptr<Deal> deal;    // where pieces are dealt
  std::unique_ptr<Relay> relay;  // where every thread walks alone

  Team();
  // `pieces`: of a step, to be dealt, or 0.
  Team(int threads, bool together, int64_t pieces);
  ~Team();
  // Before a step, where rows may go on in another thread: whether some do.
  bool share(Item& item, int64_t done);
  // Whether the member goes on. Where the team has hardly been quicker than one of its threads, as others are not running, it
  // dissolves: the first member goes on alone, and `members` becomes 1.
  bool end_step(int member, int& members);
  bool is_dissolved() const { return alone_; }

 private:
  const int64_t begun_;                  // in nanoseconds
  std::atomic<bool> is_stalled_{false};  // as the first member finds
  bool alone_ = false;                   // as all know from the next barrier on
};

}  // namespace rnnfast
