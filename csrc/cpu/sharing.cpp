#include "sharing.h"

namespace rnnfast {
namespace {

struct Range {
  int64_t first, end;
};
uint64_t pack(Range range) { return uint64_t(range.first) << 32 | uint64_t(range.end); }
Range unpack(uint64_t range) { return {int64_t(range >> 32), int64_t(range & 0xffffffff)}; }

}  // namespace

Deal::Deal(int members, int64_t pieces, bool back) : shares_(size_t(members)), back_(back) {
  for (int m = 0; m < members; ++m) {
    shares_[size_t(m)].first = pieces * m / members;
    shares_[size_t(m)].end = pieces * (m + 1) / members;
  }
  begin();
}
Deal::~Deal() = default;

void Deal::next_step() {
  int64_t first = 0;
  for (Share& share : shares_) {
    share.first = first;
    first = share.end = first + share.done;
  }
  back_ = !back_;
  begin();
}

int64_t Deal::take(int member) {
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

int64_t Deal::peek(int member) const {
  const Range range = unpack(shares_[size_t(member)].left.load(std::memory_order_relaxed));
  if (range.first == range.end) return -1;
  return is_back(member) ? range.end - 1 : range.first;
}

// Neighbours walk towards and away from each other: what one takes from the other lies beside its own.
bool Deal::is_back(int member) const { return back_ != bool(member & 1); }

void Deal::begin() {
  for (Share& share : shares_) {
    share.left.store(pack({share.first, share.end}), std::memory_order_relaxed);
    share.done = 0;
  }
}

int64_t Deal::take_from(int member, bool from_end) {
  std::atomic<uint64_t>& left = shares_[size_t(member)].left;
  uint64_t now = left.load(std::memory_order_relaxed);
  for (;;) {
    const Range range = unpack(now);
    if (range.first == range.end) return -1;
    const Range rest = from_end ? Range{range.first, range.end - 1} : Range{range.first + 1, range.end};
    if (left.compare_exchange_weak(now, pack(rest), std::memory_order_relaxed)) return from_end ? range.end - 1 : range.first;
  }
}

Relay::Relay(int threads) { given_.reserve(size_t(threads)); }
Relay::~Relay() = default;

bool Relay::share(Item& item, int64_t done) {
  constexpr int64_t WORTH_IT = 4;
  const int64_t rows = item.end - item.first;
  if (rows < WORTH_IT || idle_.load(std::memory_order_relaxed) == 0) return false;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.load(std::memory_order_relaxed) == 0) return false;
  given_.push_back({item.lane, item.lane_end, item.end - rows / 2, item.end, done});
  item.end -= rows / 2;
  idle_.fetch_sub(1, std::memory_order_relaxed);  // whoever takes it
  changes_.fetch_add(1, std::memory_order_release);
  changed_.notify_one();
  return true;
}

bool Relay::take(Item& item, int threads) {
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

Team::Team() : begun_(nanoseconds()) {}
Team::Team(int threads, bool together, int64_t pieces) : Team() {
  if (pieces) deal = std::make_unique<Deal>(threads, pieces, steps_walked() & 1);
  if (threads > 1 && !together) relay = std::make_unique<Relay>(threads);
}
Team::~Team() = default;

bool Team::share(Item& item, int64_t done) { return relay && relay->share(item, done); }

bool Team::end_step(int member, int& members) {
  constexpr int64_t WORTH_LEAVING = 1000000;  // nanoseconds
  const auto deal_next = [&] {
    if (deal) deal->next_step();
  };
  if (members == 1) {
    deal_next();
    return true;
  }
  if (member == 0 && barrier.asleep() > WORTH_LEAVING) {
    const int64_t elapsed = nanoseconds() - begun_;
    if (is_stalled(members * elapsed - barrier.asleep(), elapsed)) is_stalled_.store(true, std::memory_order_relaxed);
  }
  barrier.wait(members, [&] {
    deal_next();
    alone_ = is_stalled_.load(std::memory_order_relaxed);
  });
  if (!alone_) return true;
  members = 1;
  return member == 0;
}

}  // namespace rnnfast
