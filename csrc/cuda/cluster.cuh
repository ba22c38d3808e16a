// The exchanges within a thread-block cluster: values are stored straight into the shared memory of peers (st.async), and a
// buffer's mbarrier completes when a step's bytes have all arrived.
//
// Two buffers are enough: a block sends step t + 1 only after it has received step t from all peers, and a peer sends
// step t only after it has read step t - 1, whose buffer step t + 1 overwrites.
#pragma once

#include "block.cuh"
#include "layout.h"
#include "math.cuh"

namespace rnnfast::cuda {

// The mbarriers of the two buffers.
class Arrivals {
  uint64_t* barriers_;
  int expects_ = hw::thread() == hw::threads() - 1;

 public:
  RNNFAST_DEVICE Arrivals(const Layout& l, char* shared) : barriers_(reinterpret_cast<uint64_t*>(shared + l.barrier_at)) {
    hw::keep(expects_);
  }

  RNNFAST_DEVICE uint64_t* of(int step) { return barriers_ + (step & 1); }

  RNNFAST_DEVICE void start() {
    if (hw::thread() == 0) {
      hw::mbarrier_init(of(0), 1);
      hw::mbarrier_init(of(1), 1);
      hw::mbarrier_publish();
    }
    hw::cluster_barrier();
  }

  // Bytes may arrive before they are expected: the phase stays open for the last thread's own arrival, which is the likeliest to be
  // early, for it takes a pair only where all do.
  RNNFAST_DEVICE void expect(int step, int bytes) {
    if (expects_) hw::mbarrier_expect(of(step), bytes);
  }
  RNNFAST_DEVICE void wait(int step) {
    const Watchdog watchdog;
    while (!hw::mbarrier_try_wait(of(step), (step - 1) >> 1 & 1))
      watchdog.look("what the cluster's blocks send did not arrive for step", step);
    hw::warp_barrier();
  }
};

// All blocks gather the operand: each stores its values at all its peers.
template <class Operand>
class ClusterExchange {
  const Layout& layout_;
  char* shared_;
  Arrivals arrivals_;

  static constexpr int kApart = sizeof(Operand) == 2 ? 2 : 1;  // a lane sends to every peer or, of half types, to every other
  // Which of them it begins with.
  static RNNFAST_DEVICE int first() { return hw::lane() & (kApart - 1); }

  // Each block begins with itself and no two are at the same peer at a time; `blocks` is a power of two.
  template <int COUNT>
  RNNFAST_DEVICE void send_word(int step, hw::Address place, uint32_t word, int from) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      hw::remote_store(place, arrivals_.of(step), hw::block_x() ^ first() ^ (from + i * kApart), word);
  }
  // By fours, for a jump between two stores takes longer than they do.
  RNNFAST_DEVICE void send_word(int step, hw::Address place, uint32_t word) {
    const int peers = layout_.blocks / kApart;
    if (peers < 4) {
      send_word<1>(step, place, word, 0);
      if (peers == 2) send_word<1>(step, place, word, kApart);
    } else {
#pragma unroll
      for (int i = 0; i < kMaxCluster / kApart; i += 4) {
        if (i >= peers) break;
        send_word<4>(step, place, word, i * kApart);
      }
    }
  }

 public:
  static constexpr Exchange kKind = Exchange::cluster;

  RNNFAST_DEVICE ClusterExchange(const ScanParams& p, char* shared)
      : layout_(p.layout), shared_(shared), arrivals_(p.layout, shared) {}

  RNNFAST_DEVICE char* here(int step) {
    return shared_ + layout_.operand_at + buffer_of(layout_, step);
  }

  RNNFAST_DEVICE void start() { arrivals_.start(); }

  RNNFAST_DEVICE void wait(int step) { arrivals_.wait(step); }

  RNNFAST_DEVICE hw::Address place(int row, int k) {
    return hw::address(here(0) + row * layout_.stride + (k - first()) * sizeof(Operand));
  }

  RNNFAST_DEVICE void send(int step, hw::Address place, int further, Operand value) {
    place += buffer_of(layout_, step) + further * int{sizeof(Operand)};
    if constexpr (sizeof(Operand) == 2) {
      // The least that travels is four bytes, the values of two lanes, which share the peers.
      const uint32_t mine = bits<uint16_t>(value);
      const uint32_t next = hw::shuffle_xor(mine, 1);
      send_word(step, place, first() ? next | mine << 16 : mine | next << 16);
    } else {
      send_word(step, place, bits<uint32_t>(value));
    }
  }

  // Before what is stored and fetched, for which no peer's values should wait.
  RNNFAST_DEVICE void sent(int step) {
    arrivals_.expect(step, layout_.blocks * layout_.rows * layout_.slice * int{sizeof(Operand)});
  }

  // A block's shared memory must outlive its peers' stores.
  RNNFAST_DEVICE void finish() { hw::cluster_barrier(); }
};

// The sums are scattered: each is a part of the sum of one unit, and is stored at the block that owns the unit, which adds the
// parts up in the order of the blocks. A sum leaves from the lane that has it, without a stop in its own shared memory.
template <class Sum>
class ClusterSums {
  const Layout& layout_;
  Sum* sums_;  // two of (blocks * splits, rows, units)
  Arrivals arrivals_;

  RNNFAST_DEVICE int parts() const { return layout_.blocks * layout_.splits; }
  RNNFAST_DEVICE Sum* part(int step, int index, int row, int unit) const {
    return sums_ + (((step & 1) * parts() + index) * layout_.rows + row) * layout_.units + unit;
  }

 public:
  RNNFAST_DEVICE ClusterSums(const ScanParams& p, char* shared)
      : layout_(p.layout),
        sums_(reinterpret_cast<Sum*>(shared + p.layout.sums_at)),
        arrivals_(p.layout, shared) {}

  RNNFAST_DEVICE void start() { arrivals_.start(); }

  RNNFAST_DEVICE void put(int step, int split, int row, int first, int column, Sum sum) {
    const int owner = quotient(first, layout_.per_unit);
    const Sum* place = part(step, hw::block_x() * layout_.splits + split, row, first + column - owner * layout_.units);
    hw::remote_store(hw::address(place), arrivals_.of(step), owner, bits<uint32_t>(sum));
  }

  RNNFAST_DEVICE void wait(int step) {
    arrivals_.expect(step, parts() * layout_.rows * layout_.units * int{sizeof(Sum)});
    arrivals_.wait(step);
  }

  RNNFAST_DEVICE const Sum* find(int row, int unit) const { return part(0, 0, row, unit); }
  RNNFAST_DEVICE Sum of(int step, const Sum* found) const {
    const int next = layout_.rows * layout_.units;
    found += (step & 1) * parts() * next;
    Sum sum = 0;
#pragma unroll 4
    for (int i = 0; i < parts(); ++i, found += next) sum += *found;
    return sum;
  }

  RNNFAST_DEVICE void finish() { hw::cluster_barrier(); }
};

}  // namespace rnnfast::cuda
