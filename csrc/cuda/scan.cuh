// The scan, forward and backward, over any exchange (block, cluster, grid) and any arithmetic: one launch walks all steps.
#pragma once

#include <type_traits>

#include "block.cuh"
#include "cell.cuh"
#include "cluster.cuh"
#include "grid.cuh"
#include "layout.h"
#include "math.cuh"
#include "product.cuh"

namespace rnnfast::cuda {

// The place of this block in its team and of the team in the grid.
struct Team {
  int rank, first_row;
  RNNFAST_DEVICE explicit Team(const Layout& l) : rank(hw::block_x()), first_row(hw::block_y() * l.rows) {}
};

// The j-th of the pairs that this thread keeps from the first step to the last: one unit, in rows that lie evenly apart.
template <int PAIRS>
struct Share {
  int row, unit;     // within the team's rows and the block's units
  bool owned, real;  // in this thread's share; and in the layer, not padding
  Place at;          // within the layer

  RNNFAST_DEVICE Share(const ScanParams& p, const Team& team, int j) {
    const Layout& l = p.layout;
    const int first = quotient(hw::thread(), l.per_unit);
    row = first + j * l.rows_at_once;
    unit = hw::thread() - first * l.units;
    at = {team.first_row + row, team.rank * l.units + unit};
    owned = first < l.rows_at_once && row < l.rows;
    real = owned && at.batch_row < p.batch && at.unit < p.hidden;
  }
};

template <class X>
RNNFAST_DEVICE void clear_operands(const Layout& l, X& exchange) {
  auto* words = reinterpret_cast<hw::Vec16*>(exchange.here(0));
  for (int i = hw::thread(); i < 2 * l.rows * l.stride / 16; i += hw::threads()) words[i] = {};
  hw::block_barrier();
}

// A row that is not there keeps its state: a sequence that has ended, or a reversed one that has not begun.
template <class M, Kind KIND, template <class> class X>
RNNFAST_DEVICE void scan_forward(const ScanParams& p) {
  using Stored = typename M::Stored;
  using Sum = typename M::Sum;
  constexpr int kGates = gates_of(KIND), kPairs = pairs_per_thread(M::kTensorCores);
  const Layout& l = p.layout;
  char* shared = hw::shared_memory();
  const Walk walk(p, hw::block_z());
  const Team team(l);
  X<typename M::Operand> exchange(p, shared);
  BlockSums<Sum> sums(p, shared);

  using ItsProduct = Product<M, X<typename M::Operand>::kKind>;
  ItsProduct product;
  const Stored* w_hh = static_cast<const Stored*>(p.w_hh) + int64_t{walk.lane} * kGates * p.hidden * p.hidden;
  product.load(l, shared, in_vectors<ItsProduct>(w_hh, p.hidden), [&](int column, int k) -> WeightRun<Stored> {
    const int gate = quotient(column, l.per_unit), unit = (team.rank - gate) * l.units + column;
    if (unit >= p.hidden) return {nullptr, 0};
    return {w_hh + (int64_t{gate} * p.hidden + unit) * p.hidden + k, p.hidden - k};
  });

  // In shared memory: registers are full, and all that a step reads and stores passes through the L1.
  Sum* bias = reinterpret_cast<Sum*>(shared + l.bias_at);
  for (int i = hw::thread(); i < l.columns; i += hw::threads())
    bias[i] = ForwardPair<M, KIND>::bias(walk, i / l.units, team.rank * l.units + i % l.units);
  clear_operands(l, exchange);
  for (int i = hw::thread(); i < l.rows * p.hidden; i += hw::threads()) {
    const int row = i / p.hidden, k = i % p.hidden;
    if (team.first_row + row < p.batch)
      reinterpret_cast<typename M::Operand*>(exchange.here(0) + row * l.stride)[k] =
          M::operand(hw::widen(static_cast<const Stored*>(p.h_0)[walk.state(team.first_row + row, k)]));
  }
  ForwardPair<M, KIND> pairs[kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const Share<kPairs> share(p, team, j);
    if (!share.real) continue;
    pairs[j].start(walk, share.at);
    pairs[j].fetch(walk, pairs[j].find(walk, 0, share.at), share.at);
  }
  exchange.start();

  for (int step = 0; step < p.steps; ++step) {
    const auto begun = product.begin(l, exchange.here(step));
    if (step > 0) exchange.wait(step);
    product.multiply(l, begun, [&](auto... of_sum) { sums.put(step, of_sum...); });
    sums.wait(step);
    Sum saved[kPairs][ForwardPair<M, KIND>::kSaved];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Share<kPairs> share(p, team, j);
      if (!share.owned) continue;
      const auto place = exchange.place(step + 1, share.row, team.rank * l.slice + share.unit);
      if (pairs[j].row >= 0) {
        Sum gh[kGates];
        sums.of(step, share.row, share.unit, l.units, gh);
#pragma unroll
        for (int g = 0; g < kGates; ++g) gh[g] += bias[g * l.units + share.unit];
        pairs[j].step(walk, gh, saved[j]);
      }
      if (step + 1 < p.steps) exchange.send(step + 1, place, 0, M::operand(pairs[j].h));
    }
    if (step + 1 < p.steps) exchange.sent(step + 1);
    // The next step's input is on its way while what the peers send is, and while it is multiplied.
    typename ForwardPair<M, KIND>::Input next[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Share<kPairs> share(p, team, j);
      if (share.real) next[j] = pairs[j].find(walk, step + 1, share.at);
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Share<kPairs> share(p, team, j);
      if (pairs[j].row >= 0) pairs[j].store(walk, share.at, saved[j]);
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Share<kPairs> share(p, team, j);
      pairs[j].fetch(walk, next[j], share.at);
    }
  }

#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const Share<kPairs> share(p, team, j);
    if (share.real) pairs[j].finish(walk, share.at);
  }
  exchange.finish();
}

// The walk in reverse. At step i the operand is the gradient of the recurrent products of step i - 1 (in this order); a row
// that is not there keeps its gradient. The last turn takes no step: it brings the gradient of the initial state.
// Where the cluster's blocks exchange sums, the operand is the block's own.
template <class M, Kind KIND, template <class> class X>
RNNFAST_DEVICE void scan_backward(const ScanParams& p) {
  using Stored = typename M::Stored;
  using Sum = typename M::Sum;
  using Operand = typename M::Operand;
  constexpr int kGates = gates_of(KIND), kPairs = pairs_per_thread(M::kTensorCores);
  constexpr bool kScatter =
      pass_of(X<Operand>::kKind, kGates, sizeof(Operand), sizeof(Sum), M::kTensorCores, true) == Pass::backward_scatter;
  const Layout& l = p.layout;
  char* shared = hw::shared_memory();
  const Walk walk(p, hw::block_z());
  const Team team(l);
  std::conditional_t<kScatter, BlockExchange<Operand>, X<Operand>> exchange(p, shared);
  std::conditional_t<kScatter, ClusterSums<Sum>, BlockSums<Sum>> sums(p, shared);

  using ItsProduct = Product<M, X<typename M::Operand>::kKind>;
  ItsProduct product;
  const Stored* w_hh = static_cast<const Stored*>(p.w_hh) + int64_t{walk.lane} * kGates * p.hidden * p.hidden;
  const int first_unit = kScatter ? 0 : team.rank * l.units;  // of the columns
  const int first_block = kScatter ? team.rank : 0, blocks = kScatter ? 1 : l.blocks;  // of the operand
  // A lane's vector lies within one gate of one block: a block's units are a multiple of its length.
  product.load(l, shared, in_vectors<ItsProduct>(w_hh, p.hidden), [&](int column, int k) -> WeightRun<Stored> {
    const int unit = first_unit + column, block = quotient(k, l.per_unit / kGates);
    const int gate = quotient(k, l.per_unit) - block * kGates, from = (first_block - block * (kGates - 1) - gate) * l.units + k;
    if (unit >= p.hidden || k >= blocks * l.slice) return {nullptr, 0};
    return {w_hh + (int64_t{unit} * kGates + gate) * p.hidden + from, p.hidden - from};
  });
  clear_operands(l, exchange);

  BackwardPair<M, KIND> pairs[kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const Share<kPairs> share(p, team, j);
    if (share.real) pairs[j].start(walk, share.at);
  }
  exchange.start();
  sums.start();

  for (int step = 0; step <= p.steps; ++step) {
    typename BackwardPair<M, KIND>::Rows rows[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Share<kPairs> share(p, team, j);
      if (share.real) rows[j] = pairs[j].find(walk, p.steps - 1 - step, share.at);
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Share<kPairs> share(p, team, j);
      if (share.real) pairs[j].fetch(walk, rows[j], share.at);
    }
    if (step > 0) {
      const auto begun = product.begin(l, exchange.here(step));
      exchange.wait(step);
      product.multiply(l, begun, [&](auto... of_sum) { sums.put(step, of_sum...); });
      sums.wait(step);
    }
    Sum d_gates[kPairs][BackwardPair<M, KIND>::kInput] = {};
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Share<kPairs> share(p, team, j);
      if (!share.owned) continue;
      const auto place = exchange.place(step + 1, share.row, (team.rank - first_block) * l.slice + share.unit);
      if (step > 0) pairs[j].d_h += sums.of(step, share.row, share.unit);
      if (pairs[j].row >= 0) pairs[j].step(walk, d_gates[j]);
      if (step < p.steps) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) exchange.send(step + 1, place, g * l.units, M::operand(d_gates[j][g]));
      }
    }
    if (step < p.steps) exchange.sent(step + 1);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Share<kPairs> share(p, team, j);
      if (pairs[j].row >= 0) pairs[j].store(walk, share.at, d_gates[j]);
    }
  }

#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const Share<kPairs> share(p, team, j);
    if (share.real) pairs[j].finish(walk, share.at);
  }
  exchange.finish();
  sums.finish();
}

template <class M, Kind KIND, template <class> class X, bool BACKWARD>
RNNFAST_KERNEL(kMaxWarps * 32) scan_kernel(const ScanParams p) {
  if constexpr (BACKWARD)
    scan_backward<M, KIND, X>(p);
  else
    scan_forward<M, KIND, X>(p);
}

}  // namespace rnnfast::cuda
