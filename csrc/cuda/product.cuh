// The product of a step, operand (rows, depth) times weights (depth, columns), with the weights resident: the first of a
// warp's chunks, group by group, in registers, the others in shared memory. begin(), before the operand is waited for, finds what
// multiply() needs; where registers are left it is kept for all steps. Each sum goes to put(split, row, first, column, sum), of
// which block.cuh tells; a row's sums do not depend on the rows beside it.
#pragma once

#include "layout.h"
#include "math.cuh"

namespace rnnfast::cuda {

// The warp's groups are first_group, first_group + group_warps, ...; its chunks split, split + splits, ... Found where it is
// made, which may be before a wait, and not where it is used.
struct WarpShare {
  int split, first_group;
  WarpShare() = default;
  RNNFAST_DEVICE explicit WarpShare(const Layout& l) : first_group(quotient(hw::warp(), l.per_split)) {
    split = hw::warp() - first_group * l.splits;
    if (first_group >= l.group_warps) first_group = l.groups;  // a warp left over
    hw::hold(split);
    hw::hold(first_group);
  }
};

// Weights of a column that lie side by side along the depth, from one that was asked for on; 0 follows the last of them.
template <class Stored>
struct WeightRun {
  const Stored* first;
  int count;
  RNNFAST_DEVICE auto operator[](int i) const -> decltype(hw::widen(*first)) { return i < count ? hw::widen(first[i]) : 0; }
};

// The chunks of a warp that stay in registers, one after the other.
struct RegisterWalk {
  const Layout& l;
  const WarpShare& share;
  int group, chunk;
  RNNFAST_DEVICE RegisterWalk(const Layout& l, const WarpShare& share)
      : l(l), share(share), group(share.first_group), chunk(share.split) {}
  RNNFAST_DEVICE bool used() const { return group < l.groups && chunk < l.chunks; }
  RNNFAST_DEVICE void next() {
    chunk += l.splits;
    if (chunk < l.chunks_per_warp * l.splits) return;
    chunk = share.split;
    group += l.group_warps;
  }
};

// Counted over all its groups, a warp's chunks are in registers first and in shared memory from there on. The m-th of that
// count is, for the warp's i-th group, the chunk `before + m * splits` of the depth: below 0 if it is of a group before this
// one, and at least l.chunks if it is of a later one.
struct GroupChunks {
  int first, before;
  RNNFAST_DEVICE GroupChunks(const Layout& l, const WarpShare& share, int i) : GroupChunks(l, share.split, i * l.chunks_per_warp) {}
  RNNFAST_DEVICE GroupChunks(const Layout& l, int split, int first) : first(first), before(split - first * l.splits) {}
  RNNFAST_DEVICE int first_after(int in_registers) const { return first < in_registers ? in_registers : first; }
};

// Sums COUNT values over 2 * OFFSET neighbouring lanes in a fixed tree; the l-th of them ends up with the sums of values
// l * COUNT / (2 * OFFSET) and on.
template <int COUNT, int OFFSET, class Sum>
RNNFAST_DEVICE void reduce_scatter(Sum* v) {
  if constexpr (OFFSET > 0) {
    if constexpr (COUNT > 1) {
      const bool upper = hw::lane() & OFFSET;
#pragma unroll
      for (int i = 0; i < COUNT / 2; ++i) {
        const Sum give = upper ? v[i] : v[i + COUNT / 2];
        const Sum keep = upper ? v[i + COUNT / 2] : v[i];
        v[i] = keep + hw::shuffle_xor(give, OFFSET);
      }
    } else {
      v[0] += hw::shuffle_xor(v[0], OFFSET);
    }
    reduce_scatter<(COUNT > 1 ? COUNT / 2 : 1), OFFSET / 2>(v);
  }
}

// On plain arithmetic: a lane multiplies its 8 bytes of each chunk, for up to MOST_ROWS (4 or 5) rows and eight columns at a time:
// weights in shared memory are read once for all of them. LANES lanes split a chunk; the next take the next eight columns.
template <class M, int MOST_ROWS, int LANES>
class PlainProduct {
 public:
  static constexpr int kVector = 8 / sizeof(typename M::Sum);  // values of a lane's vector

 private:
  using Sum = typename M::Sum;
  static constexpr int kColumns = kLaneColumns, kGroup = kColumns * 32 / LANES, kChunk = 8 * LANES;  // columns, columns, bytes
  static constexpr int kRegisterChunks = register_chunks(false, sizeof(Sum));
  struct alignas(8) Vector {
    Sum at[kVector];
  };
  Vector weights_[kRegisterChunks][kColumns];
  Vector* shared_;

  static RNNFAST_DEVICE Vector load(hw::Address from) { return *hw::at<Vector>(from); }

  static RNNFAST_DEVICE void multiply_add(Sum& sum, const Vector& a, const Vector& b) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum += a.at[e] * b.at[e];
  }

  template <int ROWS, class Put>
  RNNFAST_DEVICE void tile(const Layout& l, int split, int group, int first, int row, hw::Address operand, Put put) {
    hw::hold(first);  // so that what follows from it is computed here, and takes no registers meanwhile
    const GroupChunks of_group(l, split, first);
    Sum sums[ROWS * kColumns] = {};
    hw::Address from = operand + of_group.before * kChunk;
    if (of_group.first < kRegisterChunks) {
#pragma unroll
      for (int m = 0; m < kRegisterChunks; ++m) {
        const int chunk = of_group.before + m * l.splits;
        if (static_cast<unsigned>(chunk) < static_cast<unsigned>(l.chunks)) {
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            const Vector x = load(from + m * l.apart + (row + r) * l.stride);
#pragma unroll
            for (int c = 0; c < kColumns; ++c) multiply_add(sums[r * kColumns + c], weights_[m][c], x);
          }
        }
      }
    }
    const int first_shared = of_group.first_after(kRegisterChunks);
    // The warp's in each group: the last round may not reach it.
    const int chunks = l.chunks_per_warp - (split + (l.chunks_per_warp - 1) * l.splits >= l.chunks);
    int thread = hw::thread();
    hw::hold(thread);  // likewise
    const int slot = (thread >> 5) * l.slots + first_shared - kRegisterChunks;
    hw::Address weights = hw::address(shared_) + (slot * kColumns * 32 + (thread & 31)) * 8;
    from += first_shared * l.apart;
#pragma unroll 1
    for (int left = of_group.first + chunks - first_shared; left > 0; --left, from += l.apart, weights += kColumns * 256) {
      Vector x[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) x[r] = load(from + (row + r) * l.stride);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const Vector w = load(weights + c * 256);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) multiply_add(sums[r * kColumns + c], w, x[r]);
      }
    }
    hand_over<ROWS>(l, split, group, row, sums, put);
  }

  // Sums are halved from step to step of their reduction: rows go by powers of two, and each sum's tree is the same in all.
  template <int ROWS, class Put>
  RNNFAST_DEVICE void hand_over(const Layout& l, int split, int group, int row, Sum* sums, Put put) {
    constexpr int kRows = ROWS >= 4 ? 4 : ROWS >= 2 ? 2 : 1;
    reduce_scatter<kRows * kColumns, LANES / 2>(sums);
    constexpr int kSums = kRows * kColumns;
    constexpr int kCopies = LANES > kSums ? LANES / kSums : 1;  // lanes that hold the same sum
    constexpr int kHeld = LANES > kSums ? 1 : kSums / LANES;    // sums that a lane holds
    int lane = hw::lane();
    hw::hold(lane);
    const int first = group * kGroup + lane / LANES * kColumns, index = lane % LANES / kCopies * kHeld;
    if (lane % kCopies == 0 && (kGroup == kColumns || first < l.columns)) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        put(split, row + (index + i) / kColumns, first, (index + i) % kColumns, sums[i]);
    }
    if constexpr (ROWS > kRows) hand_over<ROWS - kRows>(l, split, group, row + kRows, sums + kRows * kColumns, put);
  }

 public:
  // run(column, k) is the WeightRun from depth k on, as far as a lane's vector goes; also beyond the layer's sizes. `whole`: each
  // is a whole vector or none, which is read in one piece, all of a thread's at once; else a number waits for the one before.
  template <class Run>
  RNNFAST_DEVICE void load(const Layout& l, char* shared, bool whole, Run run) {
    shared_ = reinterpret_cast<Vector*>(shared);
    Vector* slots = shared_ + hw::warp() * l.slots * kColumns * 32 + hw::lane();
    const WarpShare share(l);
    // The lane's vectors of a chunk, of all columns of a group.
    const auto read = [&](int group, int chunk, bool used, Vector (&w)[kColumns]) {
      const int k = (chunk * LANES + hw::lane() % LANES) * kVector, first = group * kGroup + hw::lane() / LANES * kColumns;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const auto from = run(first + c, k);
        if (whole) {
          w[c] = used && from.count > 0 ? *reinterpret_cast<const Vector*>(from.first) : Vector{};
        } else {
#pragma unroll
          for (int e = 0; e < kVector; ++e) w[c].at[e] = used ? from[e] : 0;
        }
      }
    };
    RegisterWalk walk(l, share);
#pragma unroll
    for (int i = 0; i < kRegisterChunks; ++i, walk.next()) read(walk.group, walk.chunk, walk.used(), weights_[i]);
    for (int i = 0; i < l.groups_per_warp; ++i) {
      const GroupChunks of_group(l, share, i);
      const int group = share.first_group + i * l.group_warps;
      for (int m = of_group.first_after(kRegisterChunks); group < l.groups; ++m) {
        const int chunk = of_group.before + m * l.splits;
        if (chunk >= l.chunks) break;
        Vector w[kColumns];
        read(group, chunk, true, w);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) slots[((m - kRegisterChunks) * kColumns + c) * 32] = w[c];
      }
    }
  }

  struct Begun {
    WarpShare share;
    hw::Address operand;
  };
  RNNFAST_DEVICE Begun begin(const Layout& l, const char* operand) const {
    return {WarpShare(l), hw::address(operand + hw::lane() % LANES * 8)};
  }

  template <class Put>
  RNNFAST_DEVICE void multiply(const Layout& l, const Begun& begun, int buffer, Put put) {
    const WarpShare& share = begun.share;
    const hw::Address operand = begun.operand + buffer;
    int first = 0;
    for (int group = share.first_group; group < l.groups; group += l.group_warps, first += l.chunks_per_warp) {
      int row = 0;
      // Five at once, rather than four and one.
      if constexpr (MOST_ROWS == 5) {
        if (l.rows % 4 == 1 && l.rows > 1) {
          tile<5>(l, share.split, group, first, 0, operand, put);
          row = 5;
        }
      }
      for (; row + 4 <= l.rows; row += 4) tile<4>(l, share.split, group, first, row, operand, put);
      if (l.rows - row == 3) tile<3>(l, share.split, group, first, row, operand, put);
      if (l.rows - row == 2) tile<2>(l, share.split, group, first, row, operand, put);
      if (l.rows - row == 1) tile<1>(l, share.split, group, first, row, operand, put);
    }
  }
};

// On tensor cores: weights are the 16-row side of mma, 8 rows of the batch the other. A chunk is two mma deep; which of
// its values a lane feeds to which mma is free so long as both sides agree, so that a lane reads 16 bytes in one piece.
template <class M>
class TensorCoreProduct {
 public:
  static constexpr int kVector = 16 / sizeof(typename M::Operand);

 private:
  using Operand = typename M::Operand;
  static constexpr int kRegisterChunks = register_chunks(true, 4);
  static constexpr int kAtOnce = 4;
  struct Fragment {
    uint32_t word[2][4];
  };
  Fragment weights_[kRegisterChunks];
  hw::Vec16* shared_;

  // The two halves of a lane's fragment lie apart, so that a warp reads each without a bank conflict.
  RNNFAST_DEVICE hw::Vec16* slot(int index) { return shared_ + index * 64 + hw::lane(); }

  // From numbers as they are stored to operands; half types are the same as both.
  static RNNFAST_DEVICE void round(Fragment& w) {
    if constexpr (sizeof(Operand) == 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 4; ++e) w.word[half][e] = bits<uint32_t>(M::operand(bits<float>(w.word[half][e])));
    }
  }

  static RNNFAST_DEVICE void multiply_add(float (&sums)[2][4], const uint32_t (&w)[2][4], const hw::Vec16& x) {
    M::mma(sums[0], w[0], x.word[0], x.word[1]);
    M::mma(sums[1], w[1], x.word[2], x.word[3]);
  }

 public:
  // As above.
  template <class Run>
  RNNFAST_DEVICE void load(const Layout& l, char* shared, bool whole, Run run) {
    shared_ = reinterpret_cast<hw::Vec16*>(shared) + hw::warp() * l.slots * 64;
    const WarpShare share(l);
    const auto read_whole = [&](int group, int chunk, bool used) {
      const int column = group * 16 + hw::lane() / 4, k = (chunk * 4 + hw::lane() % 4) * kVector;
      const auto from_upper = run(column, k), from_lower = run(column + 8, k);
      const hw::Vec16 upper = used && from_upper.count > 0 ? hw::load_vector(from_upper.first) : hw::Vec16{};
      const hw::Vec16 lower = used && from_lower.count > 0 ? hw::load_vector(from_lower.first) : hw::Vec16{};
      return Fragment{{{upper.word[0], lower.word[0], upper.word[1], lower.word[1]},
                       {upper.word[2], lower.word[2], upper.word[3], lower.word[3]}}};
    };
    const auto read = [&](int group, int chunk) {
      Operand upper_values[kVector], lower_values[kVector];
      const int column = group * 16 + hw::lane() / 4, k = (chunk * 4 + hw::lane() % 4) * kVector;
      const auto from_upper = run(column, k), from_lower = run(column + 8, k);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        upper_values[e] = M::operand(from_upper[e]);
        lower_values[e] = M::operand(from_lower[e]);
      }
      const auto upper = bits<hw::Vec16>(upper_values), lower = bits<hw::Vec16>(lower_values);
      return Fragment{{{upper.word[0], lower.word[0], upper.word[1], lower.word[1]},
                       {upper.word[2], lower.word[2], upper.word[3], lower.word[3]}}};
    };
    RegisterWalk walk(l, share);
    if (whole) {
#pragma unroll
      for (int i = 0; i < kRegisterChunks; ++i, walk.next())
        weights_[i] = read_whole(walk.group, walk.chunk, walk.used());
#pragma unroll
      for (Fragment& w : weights_) round(w);
    } else {
#pragma unroll
      for (int i = 0; i < kRegisterChunks; ++i, walk.next())
        weights_[i] = walk.used() ? read(walk.group, walk.chunk) : Fragment{};
    }
    for (int i = 0; i < l.groups_per_warp; ++i) {
      const GroupChunks of_group(l, share, i);
      const int group = share.first_group + i * l.group_warps;
#pragma unroll 2
      for (int m = of_group.first_after(kRegisterChunks); group < l.groups; ++m) {
        const int chunk = of_group.before + m * l.splits;
        if (chunk >= l.chunks) break;
        Fragment w;
        if (whole) {
          w = read_whole(group, chunk, true);
          round(w);
        } else {
          w = read(group, chunk);
        }
        hw::Vec16* place = slot(m - kRegisterChunks);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          place[half * 32] = {{w.word[half][0], w.word[half][1], w.word[half][2], w.word[half][3]}};
      }
    }
  }

  struct Begun {
    WarpShare share;
    hw::Address first_chunk;
    int chunks;       // the warp's in each group: the last round may not reach it
    int row, column;  // of the lane's first sum, within a tile
    RNNFAST_DEVICE void keep() {
      hw::keep(share.split);
      hw::keep(share.first_group);
      hw::keep(first_chunk);
      hw::keep(chunks);
      hw::keep(row);
      hw::keep(column);
    }
  };
  RNNFAST_DEVICE Begun begin(const Layout& l, const char* operand) const {
    const WarpShare share(l);
    const int chunks = l.chunks_per_warp - (share.split + (l.chunks_per_warp - 1) * l.splits >= l.chunks);
    return {share, hw::address(operand + hw::lane() / 4 * l.stride + hw::lane() % 4 * 16 + share.split * 64), chunks,
            hw::lane() % 4 * 2, hw::lane() / 4};
  }

  // Shared memory answers many loads in hardly more time than one, and registers are few: chunks in registers are multiplied by
  // fours, loads first, all of them or with a predicate for each and no jump between them; of the others a chunk's three loads go
  // together. `used`: which of the chunks in registers, a bit for each.
  template <bool ALL>
  RNNFAST_DEVICE void multiply_registers(float (&sums)[2][4], uint32_t used, hw::Address& from, int apart) {
#pragma unroll
    for (int m = 0; m < kRegisterChunks; m += kAtOnce) {
      if (!ALL && !(used >> m & ((1 << kAtOnce) - 1))) continue;
      hw::Vec16 x[kAtOnce] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (ALL || used >> (m + j) & 1) {
          x[j] = hw::load_shared(from);
          from += apart;
        }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (ALL || used >> (m + j) & 1) multiply_add(sums, weights_[m + j].word, x[j]);
    }
  }

  template <class Put>
  RNNFAST_DEVICE void multiply(const Layout& l, const Begun& begun, int buffer, Put put) {
    hw::warp_barrier();
    int first = 0;  // of the group's chunks, counted over all of the warp's
    for (int group = begun.share.first_group; group < l.groups; group += l.group_warps, first += l.chunks_per_warp) {
      int row = 0;
      do {  // a team has rows
        float sums[2][4] = {};
        hw::Address from = begun.first_chunk + buffer + row * l.stride;
        if (first == 0 && begun.chunks >= kRegisterChunks) {
          multiply_registers<true>(sums, 0, from, l.apart);
        } else if (first < kRegisterChunks) {
          const int count = begun.chunks < kRegisterChunks ? begun.chunks : kRegisterChunks;
          multiply_registers<false>(sums, ((1u << count) - 1) << first, from, l.apart);
        }
        int first_shared = first < kRegisterChunks ? kRegisterChunks : first;
        int left = first + begun.chunks - first_shared;
        if (left > 0) {
          hw::hold(first_shared);  // so that what follows from it is computed here
          hw::Address weights = hw::address(slot(first_shared - kRegisterChunks));
#pragma unroll 1
          for (; left > 0; --left, from += l.apart, weights += 1024) {
            const hw::Vec16 x = hw::load_shared(from), w[2] = {hw::load_shared(weights), hw::load_shared(weights + 512)};
            hw::warp_barrier();  // or the compiler has the last of them wait for the first mma
            multiply_add(sums, bits<Fragment>(w).word, x);
          }
        }
#pragma unroll
        for (int s = 0; s < 4; ++s)
          put(begun.share.split, row + begun.row + s % 2, group * 16, begun.column + s / 2 * 8, sums[0][s] + sums[1][s]);
        row += kMmaRows;
      } while (row < l.rows);
    }
  }
};

// Whether all rows of a matrix of so many columns begin with a vector of the product's, and end with one.
template <class Product, class Stored>
RNNFAST_DEVICE bool in_vectors(const Stored* matrix, int columns) {
  return columns % Product::kVector == 0 && reinterpret_cast<uintptr_t>(matrix) % (Product::kVector * sizeof(Stored)) == 0;
}

template <class M, int MOST_ROWS, int LANES, bool TENSOR_CORES>
struct ChooseProduct {
  using Type = PlainProduct<M, MOST_ROWS, LANES>;
};
template <class M, int MOST_ROWS, int LANES>
struct ChooseProduct<M, MOST_ROWS, LANES, true> {
  using Type = TensorCoreProduct<M>;
};
// Five rows at once leave a cluster's kernels without a spill, and no others.
template <class M, Exchange EXCHANGE, Pass PASS>
using Product = typename ChooseProduct<M, EXCHANGE == Exchange::cluster ? 5 : 4, depth_lanes(PASS), M::kTensorCores>::Type;

}  // namespace rnnfast::cuda
