// The gradients of the gates, between the backward scan, which leaves them, and the gradients of weights and inputs made of them.
#pragma once

#include "layer.h"

namespace rnnfast::RNNFAST_ISA {

// Steps [step, end_step) of a scan. A long backward scan goes part by part, each followed by its gradients of weights and inputs:
// the gradients of the gates of all rows would take much memory, and would have left the cache before they are read.
struct Part {
  int64_t step, end_step;
  int64_t steps() const { return end_step - step; }
};
// The first row of time t, which may be the end.
RNNFAST_INLINE int64_t row_of(const ScanShape& s, int64_t t) { return t < s.steps ? s.offset_at(t) : s.rows; }
// One of `parts` of about as many rows each, of both directions where there are two; or of none.
RNNFAST_INLINE Part part_of(const ScanShape& s, int64_t i, int64_t parts) {
  const auto rows_before = [&](int64_t step) {
    return row_of(s, step) + (s.bidirectional ? s.rows - row_of(s, s.steps - step) : 0);
  };
  const auto first_step = [&](int64_t rows) {
    int64_t low = 0, high = s.steps;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (rows_before(middle) < rows)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  const int64_t all = rows_before(s.steps);
  return {first_step(all * i / parts), i + 1 == parts ? s.steps : first_step(all * (i + 1) / parts)};
}

// A row is d_gates_x and d_gates_h: the same (G*H) but for GRU, where it is n_x r z n_h, so that d_gates_x is its first 3H and
// d_gates_h its last 3H. Or one after the other, where all of them are `apart`.
template <class S, class O>
struct Gradients {
  using T = typename Product<O>::T;
  static constexpr int V = LANES<O>;
  const ScanShape& s;
  const int64_t last;  // where d_gates_h begins
  const bool permuted;
  const int64_t width, stride, state_stride, hidden_stride;
  // The rows of a part. Beside them stand those of the step after it: behind them, or `before` them where the lane is reversed.
  struct Rows {
    int64_t first, end, before;
    int64_t count() const { return end - first; }
  };
  int64_t parts = 1;   // of the scan
  Part part;           // the one at work
  Rows directions[2];  // its rows, of lanes in either direction
  int64_t capacity;    // rows of a lane there is room for
  O* gates;                   // (D, capacity, stride)
  const bool is_kept;
  O* state = nullptr;         // (D, capacity, state_stride): gradient of the projected state, where there is a projection
  O* unprojected = nullptr;   // (D, capacity, hidden_stride): o tanh(c) again, likewise
  S* states = nullptr;        // (D, N, P): what w_hh was multiplied with, where that is not the state

  // `kept`: memory for those of the gates, if it is not the call's.
  explicit Gradients(const ScanShape& shape, bool apart = false, void* kept = nullptr)
      : s(shape),
        last(apart ? s.gates() * s.hidden : s.cell == Cell::gru ? s.hidden : 0),
        permuted(s.cell == Cell::gru && !apart),
        width(s.gates() * s.hidden + last),
        stride(round_up(width + Product<O>::depth - 1, V * Product<O>::depth)),
        state_stride(round_up(s.state, V * Product<O>::depth)),
        hidden_stride(round_up(s.hidden, V * Product<O>::depth)),
        gates(static_cast<O*>(kept)),
        is_kept(kept) {
    cut(1);
  }
  // Makes room for one part of n only. The first to be walked is the last in time.
  void cut(int64_t n) {
    parts = n;
    capacity = 0;
    for (int64_t i = 0; i < n; ++i) {
      part = part_of(s, i, n);
      for (int direction = 0; direction <= s.bidirectional; ++direction) {
        const Rows& rows = directions[direction] = rows_of(direction);
        const int64_t after = direction == 0 && part.end_step < s.steps ? s.size_at(part.end_step) : 0;
        capacity = max64(capacity, rows.before + rows.count() + after);
      }
    }
  }
  // Goes on to a part, with the gradients of the step after it.
  void go_to(const Part& next) {
    const bool follows = next.end_step < s.steps;
    part = next;
    for (int direction = 0; direction <= s.bidirectional; ++direction) {
      const Rows old = directions[direction], rows = directions[direction] = rows_of(direction);
      if (!follows) continue;
      const int64_t t = s.time(direction, next.end_step), n = s.size_at(t) * stride;
      const int64_t from = (s.offset_at(t) - old.first + old.before) * stride, to = (s.offset_at(t) - rows.first + rows.before) * stride;
      for (int64_t lane = direction; lane < s.lanes; lane += 1 + s.bidirectional) {
        O* const of_lane = gates + lane * capacity * stride;
        std::memmove(of_lane + to, of_lane + from, size_t(n) * sizeof(O));
      }
    }
  }
  bool is_first_part() const { return part.end_step == s.steps; }
  bool is_last_part() const { return part.step == 0; }
  void carve(Carver& carver) {
    if (!is_kept) gates = carver.take<O>(s.lanes * capacity * stride);
    if (!s.has_projection) return;
    state = carver.take<O>(s.lanes * capacity * state_stride);
    unprojected = carver.take<O>(s.lanes * capacity * hidden_stride);
  }
  const Rows& rows(int64_t lane) const { return directions[s.reversed(lane)]; }
  int64_t place(int64_t lane, int64_t row) const { return lane * capacity + row - rows(lane).first + rows(lane).before; }
  O* gates_x(int64_t lane, int64_t row) const { return gates + place(lane, row) * stride; }
  O* gates_h(int64_t lane, int64_t row) const { return gates_x(lane, row) + last; }
  O* state_row(int64_t lane, int64_t row) const { return state + place(lane, row) * state_stride; }
  O* unprojected_row(int64_t lane, int64_t row) const { return unprojected + place(lane, row) * hidden_stride; }
  // The column of gates_x, or of gates_h, that belongs to a row of w_ih, or of w_hh.
  int64_t column_x(int64_t weight_row) const {
    if (!permuted) return weight_row;
    return weight_row < 2 * s.hidden ? weight_row + s.hidden : weight_row - 2 * s.hidden;
  }
  // The inverse of column_x.
  int64_t weight_row_x(int64_t column) const {
    if (!permuted) return column;
    return column < s.hidden ? column + 2 * s.hidden : column - s.hidden;
  }

 private:
  Rows rows_of(int direction) const {
    if (direction == 0) return {row_of(s, part.step), row_of(s, part.end_step), 0};
    const int64_t t = s.steps - part.end_step;
    return {row_of(s, t), row_of(s, s.steps - part.step), t > 0 ? s.size_at(t - 1) : 0};
  }
};

}  // namespace rnnfast::RNNFAST_ISA
