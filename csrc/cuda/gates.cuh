// The large-size path: a step at a time, with the recurrent product a GEMM (torch's, see rnnfast/backends/cuda/launch.py) and the
// rest one kernel. The states are kept in the accumulation type, and rounded once more for the product.
#pragma once

#include "cell.cuh"

namespace rnnfast::cuda {

template <class M, Kind KIND, bool BACKWARD>
RNNFAST_KERNEL(kStepThreads) step_kernel(const StepParams s) {
  using Stored = typename M::Stored;
  using Sum = typename M::Sum;
  constexpr int kGates = gates_of(KIND);
  const ScanParams& p = s.scan;
  const Walk walk(p, hw::block_z());
  const int64_t index = int64_t{hw::block_x()} * hw::threads() + hw::thread();
  const Place at{static_cast<int>(index / p.hidden), static_cast<int>(index % p.hidden)};
  if (at.batch_row >= p.batch) return;
  const int64_t state = walk.state(at.batch_row, at.unit);
  const int64_t gates = (state - at.unit) * kGates + at.unit;  // of (D, B, G*H)
  Sum& h = static_cast<Sum*>(s.h_state)[state];
  Sum& c = static_cast<Sum*>(s.c_state)[KIND == Kind::lstm ? state : 0];
  if constexpr (BACKWARD) {
    BackwardPair<M, KIND> pair;
    pair.d_h = h;
    if (s.product) pair.d_h += static_cast<const Sum*>(s.product)[state];
    if (KIND == Kind::lstm) pair.d_c = c;
    Sum d_gates[BackwardPair<M, KIND>::kInput] = {};
    pair.fetch(walk, pair.find(walk, p.steps - 1 - s.step, at), at);
    if (pair.row >= 0) {
      pair.step(walk, d_gates);
      pair.store(walk, at, d_gates);
    }
    h = pair.d_h;
    if (KIND == Kind::lstm) c = pair.d_c;
#pragma unroll
    for (int g = 0; g < kGates; ++g) hw::narrow(d_gates[g], static_cast<Stored*>(s.operand)[gates + g * p.hidden]);
  } else {
    ForwardPair<M, KIND> pair;
    pair.h = h;
    if (KIND == Kind::lstm) pair.c = c;
    Input<M, KIND> input;
    int64_t id = 0;
    input.find(walk, s.step, at, [&](const int64_t* from) { id = *from; });
    if (input.row < 0) return;
    Sum gx[kGates], gh[kGates];
    input.fetch(walk, id, at, [&](int g, const Sum* from) { gx[g] = *from; });
#pragma unroll
    for (int g = 0; g < kGates; ++g)
      gh[g] = static_cast<const Sum*>(s.product)[gates + g * p.hidden] + pair.bias(walk, g, at.unit);
    Sum saved[ForwardPair<M, KIND>::kSaved];
    pair.step(walk, gx, gh, saved);
    pair.store(walk, input.row, at, saved);
    h = pair.h;
    if (KIND == Kind::lstm) c = pair.c;
    hw::narrow(pair.h, static_cast<Stored*>(s.operand)[state]);
  }
}

}  // namespace rnnfast::cuda
