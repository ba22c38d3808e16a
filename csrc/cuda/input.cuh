// What a scan's input adds to the gates, on its way from memory. It goes to shared memory: there it holds no registers, and a number
// on its way to a register may hold up what has nothing to do with it, for both share the few marks of what is under way.
//
// A step's input is found first, its row and token id, and fetched a step later. Threads without pairs of their own do so for the
// others, where there are any: peers wait for what the others do.
#pragma once

#include "cell.cuh"
#include "share.cuh"

namespace rnnfast::cuda {

template <class M, Kind KIND, int PAIRS>
class Inputs {
  using Sum = typename M::Sum;
  static constexpr int kRows = 4;  // steps whose rows are kept: of one that is taken, to one that is found two steps ahead

  const Walk& walk_;
  const Layout& layout_;
  const Shares<kRoomy<M>, true> shares_;
  Sum* input_;    // of a step and of the next, (2, rows, sum_stride); across the grid of one at a time
  int64_t* ids_;  // of the two steps that were found last, (2, rows)
  int* rows_;     // (kRows, rows + 1)
  Input<M, KIND> found_[PAIRS];

  RNNFAST_DEVICE Sum* place(int step, int row, int column) const {
    return input_ + (step & 1) * layout_.inputs_apart + row * layout_.sum_stride + column;
  }
  RNNFAST_DEVICE int* row_place(int step, int row) const { return rows_ + (step & (kRows - 1)) * (layout_.rows + 1) + row; }
  RNNFAST_DEVICE int64_t* id(int step, int row) const { return ids_ + (step & 1) * layout_.rows + row; }

  RNNFAST_DEVICE void find_step(int step) {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const Share share = shares_[j];
      if (!share.owned) continue;
      found_[j].find(walk_, step, share.at, [&](const int64_t* from) {
        if (share.unit == 0) hw::copy_async(hw::address(id(step, share.row)), from);
      });
      if (share.unit == 0) *row_place(step, share.row) = found_[j].row;
    }
  }

 public:
  RNNFAST_DEVICE Inputs(const Walk& walk, const Team& team, char* shared)
      : walk_(walk),
        layout_(walk.p.layout),
        shares_(walk.p, team),
        input_(reinterpret_cast<Sum*>(shared + layout_.input_at)),
        ids_(reinterpret_cast<int64_t*>(shared + layout_.id_at)),
        rows_(reinterpret_cast<int*>(shared + layout_.row_at)) {}

  // A block barrier must follow.
  RNNFAST_DEVICE void start() {
    if (hw::thread() < kRows) *row_place(hw::thread(), layout_.rows) = -1;
    find_step(0);
    wait();
    hw::block_barrier();
    fetch(0);
  }

  // Fetches the input of a step, which was found, and finds the next.
  RNNFAST_DEVICE void fetch(int step) {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const Share share = shares_[j];
      if (!share.real) continue;
      const hw::Address to = hw::address(place(step, share.row, share.unit));
      const int64_t token = walk_.p.ids ? *id(step, share.row) : 0;
      found_[j].fetch(walk_, token, share.at,
                      [&](int g, const Sum* from) { hw::copy_async(to + g * layout_.units * int{sizeof(Sum)}, from); });
    }
    find_step(step + 1);
  }

  // What this thread fetched is there; for others to see, a block barrier must follow.
  RNNFAST_DEVICE void wait() const { hw::copies_wait(); }

  // Of a step and of one of the team's rows, or -1 where the sequence has no such step.
  RNNFAST_DEVICE int row(int step, int row) const { return *row_place(step, row); }
  // Where a pair's input is in the first buffer, and a gate's of a step.
  RNNFAST_DEVICE const Sum* find(const Share& share) const { return place(0, share.row, share.unit); }
  RNNFAST_DEVICE Sum of(int step, const Sum* found, int gate) const {
    return found[(step & 1) * layout_.inputs_apart + gate * layout_.units];
  }
};

}  // namespace rnnfast::cuda
