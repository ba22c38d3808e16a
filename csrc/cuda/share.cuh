// What each thread of a scan takes upon itself.
#pragma once

#include "cell.cuh"
#include "layout.h"

namespace rnnfast::cuda {

// The place of this block in its team and of the team in the grid.
struct Team {
  int rank, first_row;
  RNNFAST_DEVICE explicit Team(const Layout& l) : rank(hw::block_x()), first_row(hw::block_y() * l.rows) {}
};

// Whether a kernel has registers left, once it has its weights and pairs, to keep what is otherwise found anew at each step.
template <class M>
constexpr bool kRoomy = M::kTensorCores;

// The j-th of the pairs that this thread keeps from the first step to the last: one unit, in rows that lie evenly apart.
struct Share {
  int row, unit;     // within the team's rows and the block's units
  bool owned, real;  // in this thread's share; and in the layer, not padding
  Place at;          // within the layer

  RNNFAST_DEVICE Share(const ScanParams& p, const Team& team, int first, int unit, int j)
      : row(first + j * p.layout.rows_at_once),
        unit(unit),
        owned(first < p.layout.rows_at_once),
        at{team.first_row + row, team.rank * p.layout.units + unit} {
    real = owned && at.batch_row < p.batch && at.unit < p.hidden;
  }
};

// Those of a thread; or, counted from the last thread, those whose input it fetches: where there are threads without pairs of
// their own, they fetch for the others.
template <bool ROOMY, bool FETCHED = false>
class Shares {
  const ScanParams& p_;
  const Team team_;
  int first_, unit_;  // of the first of them, where these are kept

  static RNNFAST_DEVICE int thread() { return FETCHED ? hw::threads() - 1 - hw::thread() : hw::thread(); }
  static RNNFAST_DEVICE int row(const Layout& l) { return quotient(thread(), l.per_unit); }

 public:
  RNNFAST_DEVICE Shares(const ScanParams& p, const Team& team) : p_(p), team_(team) {
    if constexpr (ROOMY) {
      first_ = row(p.layout);
      unit_ = thread() - first_ * p.layout.units;
      hw::keep(first_);
      hw::keep(unit_);
    }
  }
  RNNFAST_DEVICE Share operator[](int j) const {
    if constexpr (ROOMY) return {p_, team_, first_, unit_, j};
    const int first = row(p_.layout);
    return {p_, team_, first, thread() - first * p_.layout.units, j};
  }
};

}  // namespace rnnfast::cuda
