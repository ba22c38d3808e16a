// How threads share the work of a scan while it goes on. Cores are never equally fast for long: their other hardware threads,
// and other programs, come and go.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
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
  Deal(int members, int64_t pieces, bool back) : shares_(size_t(members)), back_(back) {
    for (int m = 0; m < members; ++m) {
      shares_[size_t(m)].first = pieces * m / members;
      shares_[size_t(m)].end = pieces * (m + 1) / members;
    }
    begin();
  }

  // Between two steps, by one thread while the others wait.
  void next_step() {
    int64_t first = 0;
    for (Share& share : shares_) {
      share.first = first;
      first = share.end = first + share.done;
    }
    back_ = !back_;
    begin();
  }

  // The next piece for a member, or -1 when all are taken.
  int64_t take(int member) {
    const int members = int(shares_.size());
    for (int i = 0; i < members; ++i) {
      const int of = (member + i) % members;
      const int64_t piece = take_from(of, is_back(of) == (i == 0));
      if (piece < 0) continue;
      ++shares_[size_t(member)].done;
      return piece;
    }
    return -1;
  }
  // The piece after it, as far as can be said: of the member's own.
  int64_t peek(int member) const {
    const Range range = unpack(shares_[size_t(member)].left.load(std::memory_order_relaxed));
    if (range.first == range.end) return -1;
    return is_back(member) ? range.end - 1 : range.first;
  }

 private:
  struct Range {
    int64_t first, end;
  };
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
    int64_t first = 0, end = 0, done = 0;
  };
  static uint64_t pack(Range range) { return uint64_t(range.first) << 32 | uint64_t(range.end); }
  static Range unpack(uint64_t range) { return {int64_t(range >> 32), int64_t(range & 0xffffffff)}; }

  // Neighbours walk towards and away from each other: what one takes from the other lies beside its own.
  bool is_back(int member) const { return back_ != bool(member & 1); }

  void begin() {
    for (Share& share : shares_) {
      share.left.store(pack({share.first, share.end}), std::memory_order_relaxed);
      share.done = 0;
    }
  }
  int64_t take_from(int member, bool from_end) {
    std::atomic<uint64_t>& left = shares_[size_t(member)].left;
    uint64_t now = left.load(std::memory_order_relaxed);
    for (;;) {
      const Range range = unpack(now);
      if (range.first == range.end) return -1;
      const Range rest = from_end ? Range{range.first, range.end - 1} : Range{range.first + 1, range.end};
      if (left.compare_exchange_weak(now, pack(rest), std::memory_order_relaxed))
        return from_end ? range.end - 1 : range.first;
    }
  }

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
  // Gives half of the item's rows away, if a thread asks for some and they are worth it.
  void share(Item& item, int64_t done) {
    constexpr int64_t WORTH_IT = 8;
    const int64_t rows = item.end - item.first;
    if (rows < WORTH_IT || idle_.load(std::memory_order_relaxed) == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.load(std::memory_order_relaxed) == 0) return;
    given_.push_back({item.lane, item.lane_end, item.end - rows / 2, item.end, done});
    item.end -= rows / 2;
    idle_.fetch_sub(1, std::memory_order_relaxed);  // whoever takes it
    changes_.fetch_add(1, std::memory_order_release);
    changed_.notify_one();
  }

  // For one of `threads` that has no more work: what another gives it, or false when none has any.
  bool take(Item& item, int threads) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (idle_.fetch_add(1, std::memory_order_relaxed) + 1 == threads) {
      changes_.fetch_add(1, std::memory_order_release);
      changed_.notify_all();
      return false;
    }
    const auto ready = [&] { return !given_.empty() || idle_.load(std::memory_order_relaxed) == threads; };
    while (!ready()) {
      const uint32_t seen = changes_.load(std::memory_order_relaxed);
      lock.unlock();
      const bool changed = spin_while(changes_, seen);
      lock.lock();
      if (!changed && !ready()) changed_.wait(lock, ready);
    }
    if (given_.empty()) return false;
    item = given_.back();
    given_.pop_back();
    return true;
  }

 private:
  std::atomic<int> idle_{0};  // but for those to whom something has been given
  std::atomic<uint32_t> changes_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Item> given_;
};

}  // namespace rnnfast
