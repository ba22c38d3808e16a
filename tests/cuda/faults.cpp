// Small kernels, right and wrong, for the tests of the emulator and its race detector: is found what a GPU gets wrong?
#include <cstdio>

#include "cluster.cuh"
#include "grid.cuh"
#include "instance.cuh"

namespace rnnfast::cuda {
namespace {

// Each thread hands its number to its neighbour through shared memory.
template <bool BARRIER>
void neighbours(int* out) {
  int* shared = reinterpret_cast<int*>(hw::shared_memory());
  shared[hw::thread()] = hw::thread();
  if (BARRIER) hw::block_barrier();
  out[hw::thread()] = shared[(hw::thread() + 1) % hw::threads()];
}

// The same within a warp.
template <bool BARRIER>
void lanes(int* out) {
  int* shared = reinterpret_cast<int*>(hw::shared_memory());
  shared[hw::lane()] = hw::lane();
  hw::block_barrier();
  out[hw::lane()] = shared[hw::lane() ^ 1];
  if (BARRIER) hw::warp_barrier();
  shared[hw::lane()] = 0;
}

// A warp copies numbers to shared memory.
template <bool WAIT>
void copy(int* out, const int* numbers) {
  int* shared = reinterpret_cast<int*>(hw::shared_memory());
  if (hw::lane() < 8) hw::copy_async(shared + 4 * hw::lane(), numbers + 4 * hw::lane());
  if (WAIT) hw::copies_wait();
  hw::block_barrier();
  out[hw::lane()] = shared[hw::lane()];
}

// Half of a warp's lanes are at one instruction, half at another.
void different_instructions(int* out) {
  if (hw::lane() < 16)
    hw::warp_barrier();
  else
    out[hw::lane()] = hw::shuffle_xor(hw::lane(), 1);
}

// Thread 0 of each block of a cluster stores its block's number at all its peers.
template <bool START, bool WAIT, bool PUBLISH = true>
void broadcast(int* out, int bytes = 4, int beyond = 0) {
  const int blocks = hw::blocks_x(), rank = hw::block_x();
  auto* barrier = reinterpret_cast<uint64_t*>(hw::shared_memory());
  int* values = reinterpret_cast<int*>(barrier + 1);
  if (hw::thread() == 0) {
    hw::mbarrier_init(barrier, 1);
    if (PUBLISH) hw::mbarrier_publish();
  }
  START ? hw::cluster_barrier() : hw::block_barrier();
  if (hw::thread() == 0) {
    hw::mbarrier_expect(barrier, bytes * blocks);
    for (int peer = 0; peer < blocks; ++peer) hw::remote_store(hw::address(values + rank + beyond), barrier, peer, rank);
  }
  if (!WAIT) hw::cluster_barrier();  // by which the stores need not have arrived
  while (WAIT && !hw::mbarrier_try_wait(barrier, 0)) continue;
  for (int i = hw::thread(); i < blocks; i += hw::threads()) out[rank * blocks + i] = values[i];
  hw::cluster_barrier();
}

// The threads of block 0 hand their numbers to block 1 through global memory.
template <bool BARRIER, bool WAIT>
void relay(int* out, int* numbers, uint32_t* flag) {
  if (hw::block_x() == 0) {
    numbers[hw::thread()] = hw::thread();
    if (BARRIER) hw::block_barrier();
    if (hw::thread() == 0) hw::flag_release(flag, 1);
  } else {
    while (WAIT && !hw::flag_acquire(flag)) continue;
    out[hw::thread()] = numbers[hw::thread()];
  }
}

void half_a_barrier(int*) {
  if (hw::thread() > 0) hw::block_barrier();
}

// Waits for the flag of a block that never raises it.
void absent_peer(uint32_t* flags, int step) {
  ScanParams p{};
  p.flags = flags;
  p.layout.blocks = 2;
  GridExchange<float>(p, hw::shared_memory()).wait(step);
}

// Waits for a peer that other work keeps from beginning.
void late_peer(uint32_t* flags) {
  if (hw::block_x() == 0) return absent_peer(flags, 1);
  while (hw::clock_high() < 100) emulator::yield();
  if (hw::thread() < 2) hw::flag_release(flags + hw::thread(), 1);
}

// Looks at a clock that is behind, as that of another multiprocessor, on which a thread that was preempted goes on.
void clock_behind() {
  emulator::machine()->nanoseconds = uint64_t{50} << 31;
  const Watchdog watchdog;
  emulator::machine()->nanoseconds = 0;
  watchdog.look("the clock is behind", 0);
}

// Waits for bytes that no block of the cluster sends.
void absent_bytes() {
  Arrivals arrivals(Layout{}, hw::shared_memory());
  arrivals.start();
  arrivals.expect(1, 4);
  arrivals.wait(1);
}

}  // namespace
}  // namespace rnnfast::cuda

// Runs a kernel by name; writes its numbers, or gives the message it failed with (empty: none).
extern "C" const char* rnnfast_run_fault(const char* name, int* out) {
  using namespace rnnfast;
  using namespace rnnfast::cuda;
  static std::string message;
  message.clear();
  const emulator::Launch warp{1, 1, 1, 32, 1, 128}, cluster{4, 1, 1, 32, 4, 64}, pair{2, 1, 1, 64, 1, 0};
  uint32_t flags[2] = {};
  alignas(16) int numbers[64] = {};
  races::watch("global memory", numbers, sizeof numbers);
  const std::string kernel = name;
  try {
    if (kernel == "neighbours") emulator::run({1, 1, 1, 64, 1, 256}, [&] { neighbours<true>(out); });
    if (kernel == "neighbours without a barrier") emulator::run({1, 1, 1, 64, 1, 256}, [&] { neighbours<false>(out); });
    if (kernel == "lanes") emulator::run(warp, [&] { lanes<true>(out); });
    if (kernel == "lanes without a barrier") emulator::run(warp, [&] { lanes<false>(out); });
    if (kernel == "broadcast") emulator::run(cluster, [&] { broadcast<true, true>(out); });
    if (kernel == "broadcast without a wait") emulator::run(cluster, [&] { broadcast<true, false>(out); });
    if (kernel == "broadcast without a start") emulator::run(cluster, [&] { broadcast<false, true>(out); });
    if (kernel == "broadcast without all bytes") emulator::run(cluster, [&] { broadcast<true, true>(out, 3); });
    if (kernel == "broadcast of what is not published")
      emulator::run(cluster, [&] { broadcast<true, true, false>(out); });
    if (kernel == "broadcast beyond the memory") emulator::run(cluster, [&] { broadcast<true, true>(out, 4, 16); });
    if (kernel == "broadcast of too much") emulator::run(cluster, [&] { broadcast<true, true>(out, 1 << 20); });
    if (kernel == "different instructions") emulator::run(warp, [&] { different_instructions(out); });
    if (kernel == "copy" || kernel == "copy without a wait")
      for (int i = 0; i < 32; ++i) numbers[i] = i;
    if (kernel == "copy") emulator::run(warp, [&] { copy<true>(out, numbers); });
    if (kernel == "copy without a wait") emulator::run(warp, [&] { copy<false>(out, numbers); });
    if (kernel == "relay") emulator::run(pair, [&] { relay<true, true>(out, numbers, flags); });
    if (kernel == "relay without a barrier") emulator::run(pair, [&] { relay<false, true>(out, numbers, flags); });
    if (kernel == "relay without a wait") emulator::run(pair, [&] { relay<true, false>(out, numbers, flags); });
    if (kernel == "half a barrier") emulator::run({1, 1, 1, 64, 1, 64}, [&] { half_a_barrier(out); });
    if (kernel == "absent peer") emulator::run({2, 1, 1, 32, 1, 64}, [&] { absent_peer(flags, 1); });
    if (kernel == "peer gone") emulator::run({2, 1, 1, 32, 1, 64}, [&] { absent_peer(flags, 2); });
    if (kernel == "peer a step ahead") {
      flags[0] = flags[1] = 2;
      emulator::run({2, 1, 1, 32, 1, 64}, [&] { absent_peer(flags, 1); });
    }
    if (kernel == "late peer") emulator::run({2, 1, 1, 32, 1, 64}, [&] { late_peer(flags); });
    if (kernel == "clock behind") emulator::run({1, 1, 1, 32, 1, 64}, [&] { clock_behind(); });
    if (kernel == "absent bytes") emulator::run({2, 1, 1, 32, 2, 64}, [&] { absent_bytes(); });
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

extern "C" void rnnfast_set_schedule(unsigned seed) { rnnfast::emulator::schedule() = seed; }
