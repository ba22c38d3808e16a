// The exchange across the whole chip: a block stores its values in global memory and raises its flag, and waits until all
// flags of its team are up. All blocks must be resident at once, which a cooperative launch sees to; a peer that does not
// arrive all the same (a fault, a debugger) ends the kernel with a message rather than hanging the device.
#pragma once

#include "layout.h"
#include "math.cuh"

namespace rnnfast::cuda {

constexpr uint64_t kWatchdogNanoseconds = 20'000'000'000;
constexpr unsigned kPollsACheck = 16;  // of the clock, which is slow to read

template <class Operand>
class GridExchange {
  const Layout& layout_;
  char* shared_;
  char* global_;     // this team's two buffers, (2, rows, blocks * slice)
  uint32_t* flags_;  // this team's

  RNNFAST_DEVICE int row_bytes() const { return layout_.blocks * layout_.slice * int{sizeof(Operand)}; }
  RNNFAST_DEVICE char* there(int step) { return global_ + (step & 1) * layout_.rows * row_bytes(); }

 public:
  RNNFAST_DEVICE GridExchange(const ScanParams& p, char* shared) : layout_(p.layout), shared_(shared) {
    const int team = hw::block_y() * (hw::blocks_x() / layout_.blocks) + hw::block_x() / layout_.blocks;
    global_ = static_cast<char*>(p.exchange) + int64_t{2} * team * layout_.rows * row_bytes();
    flags_ = p.flags + team * layout_.blocks;
  }

  RNNFAST_DEVICE char* here(int step) {
    return shared_ + layout_.operand_at + (step & 1) * layout_.rows * layout_.stride;
  }

  RNNFAST_DEVICE void start() { hw::block_barrier(); }

  RNNFAST_DEVICE void wait(int step) {
    for (int peer = hw::thread(); peer < layout_.blocks; peer += hw::threads()) {
      uint64_t deadline = 0;
      for (unsigned polls = 1; hw::flag_acquire(flags_ + peer) < static_cast<uint32_t>(step); ++polls) {
        if (polls % kPollsACheck) continue;
        const uint64_t now = hw::nanoseconds();
        if (deadline == 0) deadline = now + kWatchdogNanoseconds;
        if (now > deadline) hw::fail("a block of the grid scan did not arrive", peer);
      }
    }
    hw::block_barrier();
    const int pieces = row_bytes() / 16;
    for (int i = hw::thread(); i < layout_.rows * pieces; i += hw::threads())
      hw::copy_async(here(step) + i / pieces * layout_.stride + i % pieces * 16, there(step) + int64_t{i} * 16);
    hw::copies_wait();
    hw::block_barrier();
  }

  RNNFAST_DEVICE void send(int step, int row, int k, Operand value) {
    reinterpret_cast<Operand*>(there(step) + row * row_bytes())[k] = value;
  }

  RNNFAST_DEVICE void sent(int step) {
    hw::block_barrier();
    if (hw::thread() == 0) hw::flag_release(flags_ + hw::block_x() % layout_.blocks, static_cast<uint32_t>(step));
  }

  RNNFAST_DEVICE void finish() {}
};

}  // namespace rnnfast::cuda
