// An exchange hands the operand of a step from the threads that computed it to all warps of all blocks of the team:
//
//   start(step)          once, after both buffers of the operand have been filled
//   wait(step)           the operand of `step` is complete, here(step) points to it
//   send(step, row, k, value)   stores a value of the operand of `step`; whole warps call it
//   sent(step)           this thread has sent all of its values
//   finish()             before the block ends
//
// The block's own: a team is one block, and a barrier is all it takes.
#pragma once

#include "layout.h"
#include "math.cuh"

namespace rnnfast::cuda {

template <class Operand>
class BlockExchange {
  const Layout& layout_;
  char* shared_;

 public:
  RNNFAST_DEVICE BlockExchange(const ScanParams& p, char* shared) : layout_(p.layout), shared_(shared) {}

  RNNFAST_DEVICE char* here(int step) {
    return shared_ + layout_.operand_at + (step & 1) * layout_.rows * layout_.stride;
  }
  RNNFAST_DEVICE void start() { hw::block_barrier(); }
  RNNFAST_DEVICE void wait(int) { hw::block_barrier(); }
  RNNFAST_DEVICE void send(int step, int row, int k, Operand value) {
    reinterpret_cast<Operand*>(here(step) + row * layout_.stride)[k] = value;
  }
  RNNFAST_DEVICE void sent(int) {}
  RNNFAST_DEVICE void finish() {}
};

}  // namespace rnnfast::cuda
