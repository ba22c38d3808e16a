// The scan, forward and backward, over any exchange (block, cluster, grid) and any arithmetic: one launch walks all steps.
#pragma once

#include <type_traits>

#include "block.cuh"
#include "cell.cuh"
#include "cluster.cuh"
#include "grid.cuh"
#include "input.cuh"
#include "layout.h"
#include "math.cuh"
#include "product.cuh"
#include "share.cuh"

namespace rnnfast::cuda {

template <class X>
RNNFAST_DEVICE void clear_operands(const Layout& l, X& exchange) {
  auto* words = reinterpret_cast<hw::Vec16*>(exchange.here(0));
  for (int i = hw::thread(); i < 2 * l.rows * l.stride / 16; i += hw::threads()) words[i] = {};
  hw::block_barrier();
}

// A row that is not there keeps its state: a sequence that has ended, or a reversed one that has not begun.
template <class M, Kind KIND, template <class> class X, int PAIRS>
RNNFAST_DEVICE void scan_forward(const ScanParams& p) {
  using Stored = typename M::Stored;
  using Sum = typename M::Sum;
  constexpr int kGates = gates_of(KIND);
  const Layout& l = p.layout;
  char* shared = hw::shared_memory();
  const Walk walk(p, hw::block_z());
  const Team team(l);
  const Shares<kRoomy<M>> shares(p, team);
  X<typename M::Operand> exchange(p, shared);
  BlockSums<Sum> sums(p, shared);

  using ItsProduct = Product<M, X<typename M::Operand>::kKind, Pass::forward>;
  ItsProduct product;
  const Stored* w_hh = static_cast<const Stored*>(p.w_hh) + int64_t{walk.lane} * kGates * p.hidden * p.hidden;
  product.load(l, shared, in_vectors<ItsProduct>(w_hh, p.hidden), [&](int column, int k) -> WeightRun<Stored> {
    const int gate = quotient(column, l.per_unit), unit = (team.rank - gate) * l.units + column;
    if (unit >= p.hidden) return {nullptr, 0};
    return {w_hh + (int64_t{gate} * p.hidden + unit) * p.hidden + k, p.hidden - k};
  });

  Inputs<M, KIND, PAIRS> inputs(walk, team, shared);
  // In shared memory: registers are full.
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
  ForwardPair<M, KIND> pairs[PAIRS];
#pragma unroll
  for (int j = 0; j < PAIRS; ++j)
    if (const Share share = shares[j]; share.real) pairs[j].start(walk, share.at);
  inputs.start();
  exchange.start();
  // Where in shared memory a pair's numbers are, and the value it sends goes.
  struct {
    const Sum *sums, *input, *bias;
    decltype(exchange.place(0, 0)) place;
    int row;
  } found[PAIRS];
  const auto find = [&] {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const Share share = shares[j];
      found[j] = {sums.find(share.row, share.unit), inputs.find(share), bias + share.unit,
                  exchange.place(share.row, team.rank * l.slice + share.unit), share.real ? share.row : l.rows};
    }
  };
  auto begun = product.begin(l, exchange.here(0));
  if constexpr (kRoomy<M>) {
    begun.keep();
    find();
  }

  for (int step = 0;;) {
    product.multiply(l, begun, kRoomy<M> ? buffer_of(l, step) : 0, [&](auto... of_sum) { sums.put(step, of_sum...); });
    if constexpr (!kRoomy<M>) find();
    inputs.wait();
    sums.wait(step);
    Sum saved[PAIRS][ForwardPair<M, KIND>::kSaved];
    int rows[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      rows[j] = -1;
      if (!shares[j].owned) continue;
      rows[j] = inputs.row(step, found[j].row);
      // Read for rows that are not there, too: a row's number would be waited for first.
      Sum gx[kGates], gh[kGates], b_hh[kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        b_hh[g] = found[j].bias[g * l.units];
        gx[g] = inputs.of(step, found[j].input, g);
      }
      sums.of(step, found[j].sums, l.units, gh);
#pragma unroll
      for (int g = 0; g < kGates; ++g) gh[g] += b_hh[g];
      if (rows[j] >= 0) pairs[j].step(walk, gx, gh, saved[j]);
      if (step + 1 < p.steps) exchange.send(step + 1, found[j].place, 0, M::operand(pairs[j].h));
    }
    if (step + 1 < p.steps) exchange.sent(step + 1);
#pragma unroll
    for (int j = 0; j < PAIRS; ++j)
      if (rows[j] >= 0) pairs[j].store(walk, rows[j], shares[j].at, saved[j]);
    if (++step >= p.steps) break;
    // On its way while what the peers send is, and while it is multiplied.
    inputs.fetch(step);
    if constexpr (!kRoomy<M>) begun = product.begin(l, exchange.here(step));
    exchange.wait(step);
  }

#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {
    const Share share = shares[j];
    if (share.real) pairs[j].finish(walk, share.at);
  }
  exchange.finish();
}

// The walk in reverse. At step i the operand is the gradient of the recurrent products of step i - 1 (in this order); a row
// that is not there keeps its gradient. The last turn takes no step: it brings the gradient of the initial state.
// Where the cluster's blocks exchange sums, the operand is the block's own.
template <class M, Kind KIND, template <class> class X, int PAIRS>
RNNFAST_DEVICE void scan_backward(const ScanParams& p) {
  using Stored = typename M::Stored;
  using Sum = typename M::Sum;
  using Operand = typename M::Operand;
  constexpr int kGates = gates_of(KIND);
  constexpr Pass kPass = pass_of(X<Operand>::kKind, kGates, sizeof(Operand), sizeof(Sum), M::kTensorCores, true);
  constexpr bool kScatter = kPass == Pass::backward_scatter;
  constexpr bool kRoomyHere = kRoomy<M> && PAIRS == 1;  // a pair takes more registers than forward
  const Layout& l = p.layout;
  char* shared = hw::shared_memory();
  const Walk walk(p, hw::block_z());
  const Team team(l);
  const Shares<kRoomyHere> shares(p, team);
  std::conditional_t<kScatter, BlockExchange<Operand>, X<Operand>> exchange(p, shared);
  std::conditional_t<kScatter, ClusterSums<Sum>, BlockSums<Sum>> sums(p, shared);

  using ItsProduct = Product<M, X<Operand>::kKind, kPass>;
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

  BackwardPair<M, KIND> pairs[PAIRS];
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {
    const Share share = shares[j];
    if (share.real) pairs[j].start(walk, share.at);
  }
  exchange.start();
  sums.start();
  typename ItsProduct::Begun begun;
  if constexpr (kRoomyHere) {
    begun = product.begin(l, exchange.here(0));
    begun.keep();
  }

  for (int step = 0; step <= p.steps; ++step) {
    typename BackwardPair<M, KIND>::Rows rows[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const Share share = shares[j];
      if (share.real) rows[j] = pairs[j].find(walk, p.steps - 1 - step, share.at);
    }
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const Share share = shares[j];
      if (share.real) pairs[j].fetch(walk, rows[j], share.at);
    }
    if (step > 0) {
      if constexpr (!kRoomyHere) begun = product.begin(l, exchange.here(step));
      exchange.wait(step);
      product.multiply(l, begun, kRoomyHere ? buffer_of(l, step) : 0, [&](auto... of_sum) { sums.put(step, of_sum...); });
      sums.wait(step);
    }
    Sum d_gates[PAIRS][BackwardPair<M, KIND>::kInput] = {};
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const Share share = shares[j];
      if (!share.owned) continue;
      const auto place = exchange.place(share.row, (team.rank - first_block) * l.slice + share.unit);
      if (step > 0) pairs[j].d_h += sums.of(step, sums.find(share.row, share.unit));
      if (pairs[j].row >= 0) pairs[j].step(walk, d_gates[j]);
      if (step < p.steps) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) exchange.send(step + 1, place, g * l.units, M::operand(d_gates[j][g]));
      }
    }
    if (step < p.steps) exchange.sent(step + 1);
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const Share share = shares[j];
      if (pairs[j].row >= 0) pairs[j].store(walk, share.at, d_gates[j]);
    }
  }

#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {
    const Share share = shares[j];
    if (share.real) pairs[j].finish(walk, share.at);
  }
  exchange.finish();
  sums.finish();
}

template <class M, Kind KIND, template <class> class X, bool BACKWARD, int PAIRS>
RNNFAST_KERNEL(kMaxWarps * 32) scan_kernel(const ScanParams p) {
  if constexpr (BACKWARD)
    scan_backward<M, KIND, X, PAIRS>(p);
  else
    scan_forward<M, KIND, X, PAIRS>(p);
}

}  // namespace rnnfast::cuda
