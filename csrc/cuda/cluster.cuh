// The exchange within a thread-block cluster: every block stores its values straight into the shared memory of all its
// peers (st.async), and a buffer's mbarrier completes when a step's bytes have all arrived.
//
// Two buffers are enough: a block sends step t + 1 only after it has received step t from all peers, and a peer sends
// step t only after its product has read step t - 1, whose buffer step t + 1 overwrites.
#pragma once

#include "layout.h"
#include "math.cuh"

namespace rnnfast::cuda {

template <class Operand>
class ClusterExchange {
  const Layout& layout_;
  char* shared_;

  RNNFAST_DEVICE uint64_t* barrier(int step) {
    return reinterpret_cast<uint64_t*>(shared_ + layout_.barrier_at) + (step & 1);
  }

  RNNFAST_DEVICE void send_word(int step, char* place, uint32_t word) {
    for (int peer = 0; peer < layout_.blocks; ++peer) hw::remote_store(place, barrier(step), peer, word);
  }

 public:
  RNNFAST_DEVICE ClusterExchange(const ScanParams& p, char* shared) : layout_(p.layout), shared_(shared) {}

  RNNFAST_DEVICE char* here(int step) {
    return shared_ + layout_.operand_at + (step & 1) * layout_.rows * layout_.stride;
  }

  RNNFAST_DEVICE void start() {
    if (hw::thread() == 0) {
      hw::mbarrier_init(barrier(0), 1);
      hw::mbarrier_init(barrier(1), 1);
      hw::mbarrier_publish();
    }
    hw::cluster_barrier();
  }

  // Bytes may arrive before they are expected: the phase stays open for thread 0's own arrival.
  RNNFAST_DEVICE void wait(int step) {
    if (hw::thread() == 0)
      hw::mbarrier_expect(barrier(step), layout_.blocks * layout_.rows * layout_.slice * int{sizeof(Operand)});
    hw::mbarrier_wait(barrier(step), (step - 1) >> 1 & 1);
  }

  RNNFAST_DEVICE void send(int step, int row, int k, Operand value) {
    char* place = here(step) + row * layout_.stride + k * sizeof(Operand);
    if constexpr (sizeof(Operand) == 2) {
      // The least that travels is four bytes: an even lane sends its neighbour's value with its own.
      const uint32_t mine = bits<uint16_t>(value);
      const uint32_t next = hw::shuffle_xor(mine, 1);
      if (hw::lane() % 2 == 0) send_word(step, place, mine | next << 16);
    } else {
      send_word(step, place, bits<uint32_t>(value));
    }
  }

  RNNFAST_DEVICE void sent(int) {}

  // A block's shared memory must outlive its peers' stores.
  RNNFAST_DEVICE void finish() { hw::cluster_barrier(); }
};

}  // namespace rnnfast::cuda
