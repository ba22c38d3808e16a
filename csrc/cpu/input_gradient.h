// What follows the backward scan and is parallel in time: the gradient of the input.
#pragma once

#include <type_traits>

#include "backward.h"

namespace rnnfast::RNNFAST_ISA {

// A task owns some rows, of some of the panels of w_ih where rows are few.
template <class S, class O>
class InputGradient {
  using T = typename Product<O>::T;
  static constexpr int V = LANES<O>;
  static constexpr int64_t TASK_ROWS = 48;

  const BackwardArgs& x;
  const ScanShape& s;
  const Gradients<S, O>& d;
  const int threads;
  const int64_t gate_rows;
  const Panels inputs;
  const bool unpacked;   // w_ih is read where it lies
  O* w_ih;               // packed: d_gates_x w_ih
  int64_t slices = 1;    // tasks of the same rows
  int64_t in_order = 0;  // tasks of both directions, or of the first; the others of the second

 public:
  // Whether the two directions of a layer add to d_input one after the other, as they need not come to a row in the same part; not
  // where that would round more.
  static constexpr bool DIRECTIONS_APART = std::is_same_v<S, T>;

  InputGradient(const BackwardArgs& args, const Gradients<S, O>& gradients, int how_many)
      : x(args),
        s(args.shape),
        d(gradients),
        threads(how_many),
        gate_rows(s.gates() * s.hidden),
        inputs(plain_panels(s.input, V, x.packed_ih ? 1 : s.rows)),
        // Where gradients are permuted, the products of each part are to be added up in the same blocks as those of all.
        unpacked(!x.packed_ih && worth_no_packing<S, O>(gate_rows, s.input, 1, s.rows) && s.rows <= 2 * TASK_ROWS &&
                 (!d.permuted || s.hidden % SUM_BLOCK == 0)),
        w_ih(static_cast<O*>(x.packed_ih)) {
    begin_part();
  }

  // Once the gradients of the gates are those of another part.
  void begin_part() {
    const int64_t blocks = ceil_div(d.directions[0].count(), TASK_ROWS);
    slices = max64(1, min64(inputs.count(), ceil_div(threads, blocks)));
    in_order = x.d_input ? blocks * slices : 0;
  }

  bool reads_in_place() const { return unpacked; }
  int64_t packed_count() const { return s.lanes * packed_size<O>(inputs, gate_rows); }
  void carve(Carver& carver) {
    if (x.d_input && !unpacked && !x.packed_ih) w_ih = carver.take<O>(packed_count());
  }
  size_t local_bytes() const { return sizeof(T) * MAX_ROWS * MAX_VECTORS * V; }
  void pack(int thread, int n) const {
    if (w_ih && !x.packed_ih) pack_ih(thread, n);
  }
  void pack_ih(int thread, int n) const {
    const auto row = [&](int64_t lane, int64_t k) { return at<S>(x.w_ih, (lane * gate_rows + d.weight_row_x(k)) * s.input); };
    pack_weight(w_ih, inputs, s.lanes, gate_rows, s.input, row, thread, n);
  }
  // Of the tasks, those at the end are to be run once all others are.
  int64_t tasks() const { return in_order + last_tasks(); }
  int64_t last_tasks() const {
    if (!x.d_input || !DIRECTIONS_APART || !s.bidirectional) return 0;
    return ceil_div(d.directions[1].count(), TASK_ROWS) * slices;
  }
  void run(int64_t task, char* local) const {
    if (task < in_order)
      add<0>(task, local);
    else
      add<1>(task - in_order, local);
  }

 private:
  // Adds over the lanes of a direction in their order, in the accumulators, and to what the other direction has left.
  template <int DIRECTION>
  void add(int64_t task, char* local) const {
    const auto rows = d.directions[DIRECTION];
    const int64_t first = rows.first + task / slices * TASK_ROWS, n = min64(TASK_ROWS, rows.end - first);
    const bool apart = DIRECTIONS_APART && s.bidirectional;
    const auto has_other = [&](int64_t row) {
      return apart && (DIRECTION ? row >= d.directions[0].first : row < d.directions[1].first);
    };
    const Slice slice = slice_of(inputs.count(), task % slices, slices);
    T* sums = reinterpret_cast<T*>(local);
    for (int64_t p = slice.first; p < slice.end; ++p) {
      const int width = inputs.width(p);
      const int64_t column = p * inputs.vectors * V;
      for_tiles(n, width, [&](int64_t row, int count, int64_t, int64_t) {
        row += first;
        std::memset(sums, 0, sizeof(T) * size_t(count) * width * V);
        const O* a[MAX_ROWS];
        const T* start[MAX_ROWS];
        for (int r = 0; r < count; ++r) start[r] = sums + r * width * V;
        const auto multiply = [&](int64_t lane, int64_t k, int64_t end, Panel<O> w) {
          for (int r = 0; r < count; ++r) a[r] = d.gates_x(lane, row + r) + k;
          tile_function<O>(count, width)(units<O>(end - k), a, w, start, 0, nullptr, sums, width * V, nullptr);
        };
        for (int64_t lane = DIRECTION; lane < s.lanes; lane += 1 + apart) {
          if (!unpacked) {
            multiply(lane, 0, gate_rows,
                     w_ih + lane * packed_size<O>(inputs, gate_rows) + panel_offset<O>(inputs, p, gate_rows));
            continue;
          }
          const auto rows_from = [&](int64_t k) {
            return Panel<O>(at<O>(x.w_ih, (lane * gate_rows + d.weight_row_x(k)) * s.input + column), s.input);
          };
          const int64_t jump = d.permuted ? s.hidden : 0;
          if (jump) multiply(lane, 0, jump, rows_from(0));
          multiply(lane, jump, gate_rows, rows_from(jump));
        }
        for (int r = 0; r < count; ++r) {
          S* const out = at<S>(x.d_input, (row + r) * s.input + column);
          const int64_t columns = min64(width * V, s.input - column);
          if constexpr (DIRECTIONS_APART)
            if (has_other(row + r)) add_row(sums + r * width * V, out, columns);
          convert_row(out, sums + r * width * V, columns);
        }
      });
    }
  }

  static void add_row(T* to, const S* from, int64_t n) {
    for (int64_t j = 0; j < n; j += V) store(to + j, load(from + j, int(min64(V, n - j))) + load(to + j));
  }
};

}  // namespace rnnfast::RNNFAST_ISA
