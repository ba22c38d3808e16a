// The exchange across the whole chip: a block stores its values in global memory and raises its flag, and waits until all
// flags of its team are up. All blocks must be resident at once, which a cooperative launch sees to.
#pragma once

#include "block.cuh"
#include "layout.h"
#include "math.cuh"

namespace rnnfast::cuda {

template <class Operand>
class GridExchange {
  const ScanParams& p_;
  const Layout& layout_;
  char* shared_;

  // Found anew where it is needed: registers are scarcer than an instruction.
  RNNFAST_DEVICE int team() const { return hw::block_z() * hw::blocks_y() + hw::block_y(); }
  RNNFAST_DEVICE int row_bytes() const { return layout_.pieces * 16; }
  // The team's buffer, (rows, blocks * slice).
  RNNFAST_DEVICE char* there(int step) const {
    return static_cast<char*>(p_.exchange) + (int64_t{2} * team() + (step & 1)) * layout_.rows * row_bytes();
  }
  RNNFAST_DEVICE uint32_t* flag(int block) const { return p_.flags + team() * layout_.blocks + block; }

 public:
  static constexpr Exchange kKind = Exchange::grid;

  RNNFAST_DEVICE GridExchange(const ScanParams& p, char* shared) : p_(p), layout_(p.layout), shared_(shared) {}

  RNNFAST_DEVICE char* here(int step) {
    return shared_ + layout_.operand_at + buffer_of(layout_, step);
  }

  RNNFAST_DEVICE void start() { hw::block_barrier(); }

  RNNFAST_DEVICE void wait(int step) {
    for (int peer = hw::thread(); peer < layout_.blocks; peer += hw::threads()) {
      // What else runs on the device may keep a block of the team waiting for its multiprocessor.
      const Watchdog watchdog(step == 1 ? Watchdog::kForABeginning : Watchdog::kUsual);
      while (hw::flag_acquire(flag(peer)) < static_cast<uint32_t>(step))
        watchdog.look("a block of the grid scan did not arrive", peer);
    }
    hw::block_barrier();
    for (int i = hw::thread(); i < layout_.rows * layout_.pieces; i += hw::threads()) {
      const int row = quotient(i, layout_.per_piece), piece = i - row * layout_.pieces;
      hw::copy_async(here(step) + row * layout_.stride + piece * 16, there(step) + int64_t{i} * 16);
    }
    hw::copies_wait();
    hw::block_barrier();
  }

  RNNFAST_DEVICE Operand* place(int row, int k) { return reinterpret_cast<Operand*>(there(0) + row * row_bytes()) + k; }
  RNNFAST_DEVICE void send(int step, Operand* place, int further, Operand value) {
    place[(step & 1) * layout_.rows * (row_bytes() / int{sizeof(Operand)}) + further] = value;
  }

  RNNFAST_DEVICE void sent(int step) {
    hw::block_barrier();
    if (hw::thread() == 0) hw::flag_release(flag(hw::block_x()), static_cast<uint32_t>(step));
  }

  RNNFAST_DEVICE void finish() {}
};

}  // namespace rnnfast::cuda
