// An exchange hands the operand of a step from the threads that computed it to all warps of all blocks of the team (where
// sums are exchanged in its place, see cluster.cuh, of the block):
//
//   start()              once, after both buffers of the operand have been filled
//   wait(step)           the operand of `step` is complete, here(step) points to it
//   place(row, k)        where a value goes, in the first buffer: found before the value is, for which peers wait
//   send(step, place, further, value)   stores a value of the operand of `step` that lies `further` values behind the place; whole
//                        warps call it
//   sent(step)           this thread has sent all of its values
//   finish()             before the block ends
//
// The block's own: a team is one block, and a barrier is all it takes.
#pragma once

#include "layout.h"
#include "math.cuh"

namespace rnnfast::cuda {

// Ends a kernel with a message where a peer never comes (a fault, a debugger), rather than hanging the device.
class Watchdog {
  const int32_t patience_;
  const uint32_t begin_ = hw::clock_high();

 public:
  // Times 2^32 cycles: two to five seconds. Blocks that the device may not have begun yet have ten minutes: another kernel, as one
  // of NCCL's that waits for a slower process, may hold the multiprocessors for so long.
  static constexpr int32_t kUsual = 1, kForABeginning = 300;

  RNNFAST_DEVICE explicit Watchdog(int32_t patience = kUsual) : patience_(patience) {}

  // After each look that was in vain.
  RNNFAST_DEVICE void look(const char* message, int which) const {
    // A thread that was preempted may go on where the clock is behind.
    if (static_cast<int32_t>(hw::clock_high() - begin_) > patience_) hw::fail(message, which);
  }
};

template <class Operand>
class BlockExchange {
  const Layout& layout_;
  char* shared_;

 public:
  static constexpr Exchange kKind = Exchange::block;

  RNNFAST_DEVICE BlockExchange(const ScanParams& p, char* shared) : layout_(p.layout), shared_(shared) {}

  RNNFAST_DEVICE char* here(int step) {
    return shared_ + layout_.operand_at + buffer_of(layout_, step);
  }
  RNNFAST_DEVICE void start() { hw::block_barrier(); }
  RNNFAST_DEVICE void wait(int) { hw::block_barrier(); }
  RNNFAST_DEVICE Operand* place(int row, int k) { return reinterpret_cast<Operand*>(here(0) + row * layout_.stride) + k; }
  RNNFAST_DEVICE void send(int step, Operand* place, int further, Operand value) {
    place[buffer_of(layout_, step) / int{sizeof(Operand)} + further] = value;
  }
  RNNFAST_DEVICE void sent(int) {}
  RNNFAST_DEVICE void finish() {}
};

// The sums of a product on their way to the threads that own a row and a unit:
//
//   start()                            once
//   put(step, split, row, first, column, sum)   a sum of the product, from the warp that has it: of a column of the group that
//                                      begins at the `first`, all of whose columns are of one block's units
//   wait(step)                         all sums of the step are there
//   find(row, column)                  where a sum's parts are, in the first buffer: found before they are, as a place is
//   of(step, found)                    the sum
//   finish()                           before the block ends
//
// The block's own product, whose depth may be split over warps.
template <class Sum>
class BlockSums {
  const Layout& layout_;
  Sum* sums_;  // (splits, rows, sum_stride)

 public:
  RNNFAST_DEVICE BlockSums(const ScanParams& p, char* shared)
      : layout_(p.layout), sums_(reinterpret_cast<Sum*>(shared + p.layout.sums_at)) {}

  RNNFAST_DEVICE void start() {}
  RNNFAST_DEVICE void put(int, int split, int row, int first, int column, Sum sum) {
    sums_[split * layout_.sums_apart + row * layout_.sum_stride + first + column] = sum;
  }
  RNNFAST_DEVICE void wait(int) { hw::block_barrier(); }
  RNNFAST_DEVICE const Sum* find(int row, int column) const { return sums_ + row * layout_.sum_stride + column; }
  RNNFAST_DEVICE Sum of(int step, const Sum* found) const {
    Sum sum[1];
    of(step, found, 0, sum);
    return sum[0];
  }
  // Of COUNT columns that lie `apart`, side by side rather than one after the other.
  template <int COUNT>
  RNNFAST_DEVICE void of(int, const Sum* found, int apart, Sum (&sum)[COUNT]) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum[i] = found[i * apart];
#pragma unroll 1
    for (int left = layout_.splits - 1; left > 0; --left) {
      found += layout_.sums_apart;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) sum[i] += found[i * apart];
    }
  }
  RNNFAST_DEVICE void finish() {}
};

}  // namespace rnnfast::cuda
