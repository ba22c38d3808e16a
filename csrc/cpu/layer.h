// What forward and backward share: weights packed for the forward scan, the split of work over threads, and the walk.
#pragma once

#include "../scan.h"
#include "memory.h"
#include "threads.h"
#include "tile.h"

namespace rnnfast::RNNFAST_ISA {

// An element of a tensor, whatever its storage type.
template <class S>
RNNFAST_INLINE const S* at(const void* base, int64_t index) {
  return static_cast<const S*>(base) + index;
}
template <class S>
RNNFAST_INLINE S* at(void* base, int64_t index) {
  return static_cast<S*>(base) + index;
}

template <class S>
RNNFAST_INLINE void copy_row(S* to, const S* from, int64_t n) {
  std::memcpy(to, from, size_t(n) * sizeof(S));
}
// Copies with conversion; S and R differ, or are the same.
template <class R, class S>
void convert_row(R* to, const S* from, int64_t n) {
  constexpr int V = Lanes<Compute<S>>::count;
  for (int64_t j = 0; j < n; j += V) store(to + j, load(from + j, int(n - j < V ? n - j : V)), int(n - j < V ? n - j : V));
}

template <class F>
void parallel(int threads, F body) {
  run_parallel(threads, [](void* f, int thread, int n) { (*static_cast<F*>(f))(thread, n); }, &body);
}

// The panels of the gates. LSTM and GRU: a panel is a vector of units with its gates side by side, so that the gate
// math runs on the tile just computed. RNN: several vectors of units.
struct GatePanels : Panels {
  int64_t units_per_panel;
};
RNNFAST_INLINE GatePanels gate_panels(const ScanShape& s, int lanes) {
  if (s.gates() == 1) {
    const Panels plain = plain_panels(s.hidden, lanes);
    return {plain, plain.vectors * lanes};
  }
  return {{s.gates(), s.gates() * ceil_div(s.hidden, lanes)}, lanes};
}

// Weights of all lanes in the layout of the forward scan. Offsets depend on the shape alone, so a packed layer can be
// kept and used again.
template <class S, class O>
struct PackedLayer {
  using T = typename Product<O>::T;
  static constexpr int V = LANES<O>;
  const ScanShape& s;
  GatePanels gates;
  Panels projection;
  O *w_ih, *w_hh, *w_hr;
  T *bias, *bias_n;  // bias: added to the input product; bias_n: GRU's b_hn, where its recurrent product starts
  T* table;          // instead of w_ih where the input is ids: a row of input product and bias for each id
  size_t bytes;

  // A layer that is kept has the table for any vocabulary; for one call a large one would not pay.
  PackedLayer(const ScanShape& shape, char* base, bool kept) : s(shape), gates(gate_panels(shape, V)) {
    const bool use_table = s.ids && (kept || s.input <= 4096);
    projection = plain_panels(s.state, V);
    Carver carver(base);
    w_hh = carver.take<O>(s.lanes * hh_size());
    w_ih = carver.take<O>(s.ids ? 0 : s.lanes * ih_size());
    w_hr = carver.take<O>(s.has_projection ? s.lanes * hr_size() : 0);
    bias = carver.take<T>(s.lanes * columns());
    bias_n = carver.take<T>(s.lanes * round_up(s.hidden, V));
    table = carver.take<T>(use_table ? s.lanes * s.input * columns() : 0);
    if (!use_table) table = nullptr;
    bytes = carver.used();
  }
  int64_t columns() const { return gates.total_vectors * V; }
  int64_t hh_size() const { return packed_size<O>(gates, s.state); }
  int64_t ih_size() const { return packed_size<O>(gates, s.input); }
  int64_t hr_size() const { return packed_size<O>(projection, s.hidden); }

  // Row of w_ih and w_hh that vector c of panel p holds in its lane e, or -1.
  int64_t weight_row(int64_t p, int c, int e) const {
    const bool plain = s.gates() == 1;
    const int64_t unit = plain ? p * gates.units_per_panel + c * V + e : p * V + e;
    return unit < s.hidden ? (plain ? 0 : c * s.hidden) + unit : -1;
  }

  // Packs this thread's share of the panels.
  void pack(const ForwardArgs& x, int thread, int threads) const {
    for (int64_t i = thread; i < s.lanes * gates.count(); i += threads) pack_gates(x, i / gates.count(), i % gates.count());
    if (!s.has_projection) return;
    for (int64_t i = thread; i < s.lanes * projection.count(); i += threads) {
      const int64_t lane = i / projection.count(), p = i % projection.count();
      for (int c = 0; c < projection.width(p); ++c) {
        const S* rows[V];
        for (int e = 0; e < V; ++e) {
          const int64_t j = (p * projection.vectors + c) * V + e;
          rows[e] = j < s.state ? at<S>(x.w_hr, (lane * s.state + j) * s.hidden) : nullptr;
        }
        pack_columns<O>(w_hr + lane * hr_size() + panel_offset<O>(projection, p, s.hidden), projection.width(p), c, rows,
                        s.hidden);
      }
    }
  }

 private:
  void pack_gates(const ForwardArgs& x, int64_t lane, int64_t p) const {
    const int width = gates.width(p);
    const int64_t gate_rows = s.gates() * s.hidden;
    for (int c = 0; c < width; ++c) {
      const S *hh[V], *ih[V];
      T* b = bias + lane * columns() + (p * gates.vectors + c) * V;
      for (int e = 0; e < V; ++e) {
        const int64_t row = weight_row(p, c, e);
        hh[e] = row < 0 ? nullptr : at<S>(x.w_hh, (lane * gate_rows + row) * s.state);
        ih[e] = row < 0 ? nullptr : at<S>(x.w_ih, (lane * gate_rows + row) * s.input);
        const bool biased = row >= 0 && x.b_ih;
        const T b_ih = biased ? widen(*at<S>(x.b_ih, lane * gate_rows + row)) : T(0);
        const T b_hh = biased ? widen(*at<S>(x.b_hh, lane * gate_rows + row)) : T(0);
        if (s.cell == Cell::gru && c == 2) {
          b[e] = b_ih;
          bias_n[lane * round_up(s.hidden, V) + p * V + e] = b_hh;
        } else {
          b[e] = b_ih + b_hh;
        }
      }
      pack_columns<O>(w_hh + lane * hh_size() + panel_offset<O>(gates, p, s.state), width, c, hh, s.state);
      if (!s.ids) {
        pack_columns<O>(w_ih + lane * ih_size() + panel_offset<O>(gates, p, s.input), width, c, ih, s.input);
      } else if (table) {
        for (int64_t id = 0; id < s.input; ++id) {
          T* row = table + (lane * s.input + id) * columns() + (p * gates.vectors + c) * V;
          for (int e = 0; e < V; ++e) row[e] = b[e] + (ih[e] ? widen(ih[e][id]) : T(0));
        }
      }
    }
  }
};

// ---- the split of work ---------------------------------------------------------------------------------------------

// Either every thread walks time alone with some lanes and rows (members == 1, no barrier), or all walk together, each
// computing some panels of every row (one item, a barrier a step).
struct Split {
  bool together() const { return members > 1; }
  int threads, members;
  int64_t items_per_lane, items;  // items_per_lane 0: one item of all lanes
};

// Costs are in cycles of one core: a tile of one row is bound by reading its weights, not by their products. Weights that are
// far from every core are best read by one of them each.
RNNFAST_INLINE Split split_work(const ScanShape& s, int64_t weight_vectors, int64_t step_panels, int available) {
  constexpr int64_t BARRIER = 2000, PARALLEL_REGION = 15000, FAR_AWAY = 4;
  const auto step = [&](int64_t rows, int64_t vectors, int64_t lanes) {
    const int64_t bytes = vectors * lanes * VECTOR_BYTES;
    const int64_t least = bytes <= near_bytes() ? 2 : 12, reading = bytes <= FAR_AWAY * near_bytes() ? 0 : 24;
    return lanes * vectors * (max64(rows, least) + reading);
  };
  const int64_t lanes_each = ceil_div(s.lanes, available);
  const int64_t parts = s.lanes % available == 0 ? 1 : available;
  const int64_t rows_each = ceil_div(s.batch, parts);
  const int64_t alone = s.steps * step(s.batch, weight_vectors, s.lanes);
  const int64_t by_rows = s.steps * (parts == 1 ? step(s.batch, weight_vectors, lanes_each)
                                                : step(rows_each, weight_vectors, s.lanes)) + PARALLEL_REGION;
  // Threads that wait for each other every step go at the pace of whichever is the slower.
  const int64_t by_panels = s.steps * (step(s.batch, ceil_div(weight_vectors * ceil_div(step_panels, available), step_panels),
                                            s.lanes) / 4 * 5 + BARRIER) + PARALLEL_REGION;
  constexpr int64_t ITEM_ROWS = 64;  // keeps an item's states near
  const auto items = [&](int64_t n_parts) {
    return n_parts * max64(1, ceil_div(ceil_div(s.batch, n_parts), ITEM_ROWS));
  };
  if (available == 1 || (alone <= by_rows && alone <= by_panels)) return {1, 1, items(1), s.lanes * items(1)};
  if (by_rows <= by_panels) return {available, 1, items(parts), s.lanes * items(parts)};
  return {available, available, 0, 1};
}

// Rows [first, end) of lanes [lane, lane_end), walked by the members of a team.
struct Item {
  int64_t lane, lane_end, first, end;
};
RNNFAST_INLINE Item item_of(const ScanShape& s, const Split& split, int64_t i) {
  if (!split.items_per_lane) return {0, s.lanes, 0, s.batch};
  const int64_t lane = i / split.items_per_lane, part = i % split.items_per_lane;
  return {lane, lane + 1, s.batch * part / split.items_per_lane, s.batch * (part + 1) / split.items_per_lane};
}

// How one member of a team walks through the weights of a scan: its panels of every lane of the item, one step from the
// first to the last and the next one back, so that the weights last used, which are near, are used first again. The first
// step turns round as well: it may be the next of a stream.
template <class O>
class Walk {
 public:
  Walk(const O* weights, const Panels& of, int64_t depth, const Item& item, int64_t steps, int member, int members,
       int64_t block = INT64_MAX)
      : base_(weights),
        panels_(of),
        k_(depth),
        first_(of.count() * member / members),
        count_(of.count() * (member + 1) / members - first_),
        lane_(item.lane),
        lanes_(item.lane_end - item.lane),
        block_(max64(1, min64(block, units<O>(depth)))),
        near_(near_bytes() / (max64(1, of.vectors) * block_ * VECTOR_BYTES)),
        walked_(steps_walked()) {
    steps_walked() += steps;
  }
  int64_t count() const { return count_; }
  int64_t lane(int64_t step, int64_t i) const { return lane_ + (back(step) ? lanes_ - 1 - i : i); }
  int64_t panel(int64_t step, int64_t i) const { return first_ + (back(step) ? count_ - 1 - i : i); }
  const O* weights(int64_t lane, int64_t p) const {
    return base_ + lane * packed_size<O>(panels_, k_) + panel_offset<O>(panels_, p, k_);
  }
  // Blocks of k that a panel is multiplied in, one after the other for all rows, and where they begin.
  int64_t blocks() const { return ceil_div(units<O>(k_), block_); }
  int64_t block_start(int64_t block) const { return block * block_; }
  int64_t block_units(int64_t block) const { return min64(block_, units<O>(k_) - block * block_); }

  // What tile `tile` of `tiles` of a block of the step's i-th panel fetches: weights of the next block, if those are no longer
  // near and another tile of this one leaves time for it.
  Ahead::Stream ahead(int64_t step, int64_t i, int64_t lane, int64_t block, int64_t tile, int64_t tiles) const {
    const int64_t panels_before = (back(step) ? lane_ + lanes_ - 1 - lane : lane - lane_) * count_ + i;
    const bool last = block + 1 == blocks();
    if (panels_before * blocks() + block + 1 < near_ || tiles == 1 || (last && i + 1 == count_)) return {};
    const int64_t p = panel(step, last ? i + 1 : i), next = last ? 0 : block + 1, depth = Product<O>::depth;
    return share_of_panel<O>(weights(lane, p) + block_start(next) * panels_.width(p) * LANES<O> * depth, panels_.width(p),
                             block_units(next) * depth, tile, tiles);
  }

 private:
  bool back(int64_t step) const { return (walked_ + step) & 1; }

  const O* base_;
  const Panels& panels_;
  int64_t k_, first_, count_, lane_, lanes_;
  int64_t block_;   // units of k
  int64_t near_;    // blocks that stay near
  int64_t walked_;  // steps this thread walked before
};

// What the next step reads and writes by rows, a stretch of memory each: the tiles of this one fetch it, each a part. Rows lie
// too many and too far apart for the processor to see them coming.
class NextStep {
 public:
  void add(const void* data, int64_t bytes) {
    if (!data) return;
    stretches_[count_++] = {static_cast<const char*>(data), ceil_div(bytes, 64)};
    lines_ += ceil_div(bytes, 64);
  }
  // Nothing, if all that `steps` such steps walk through stays near anyway.
  NextStep unless_near(int64_t steps) const { return steps * lines_ * 64 > near_bytes() ? *this : NextStep(); }
  // The part of tile `tile` of `tiles`, all of them k_units deep.
  Ahead::Stream share(int64_t tile, int64_t tiles, int64_t k_units) const {
    if (!lines_) return {};
    const int64_t blocks = ceil_div(k_units, Ahead::BLOCK), each = ceil_div(lines_, tiles * blocks);
    for (int i = 0; i < count_; ++i) {
      const int64_t fetching = ceil_div(stretches_[i].lines, each * blocks);
      if (tile < fetching) return {stretches_[i].data + tile * each * blocks * 64, int(each)};
      tile -= fetching;
    }
    return {};
  }

 private:
  struct Stretch {
    const char* data;
    int64_t lines;
  };
  Stretch stretches_[4];
  int count_ = 0;
  int64_t lines_ = 0;
};

// Rows of an item that are alive at step t.
RNNFAST_INLINE int64_t alive(const ScanShape& s, const Item& item, int64_t t) {
  return max64(0, min64(s.size_at(t), item.end) - item.first);
}

// The row before row b of step t in the lane's own order of time, or -1 where b starts there.
RNNFAST_INLINE int64_t row_before(const ScanShape& s, int64_t lane, int64_t t, int64_t b) {
  if (!s.reversed(lane)) return t > 0 ? s.offset_at(t - 1) + b : -1;
  return t + 1 < s.steps && b < s.size_at(t + 1) ? s.offset_at(t + 1) + b : -1;
}

// The step that a row belongs to, for rows asked for in their order.
class StepOfRow {
 public:
  explicit StepOfRow(const ScanShape& shape) : s_(shape) {}
  int64_t operator()(int64_t row) {
    if (!s_.batch_sizes) return row / s_.batch;
    if (row < s_.offset_at(t_)) t_ = 0;
    while (row >= s_.offset_at(t_) + s_.size_at(t_)) ++t_;
    return t_;
  }

 private:
  const ScanShape& s_;
  int64_t t_ = 0;
};

// The last step in which row b is alive.
RNNFAST_INLINE int64_t last_step(const ScanShape& s, int64_t b) {
  int64_t low = 0, high = s.steps - 1;
  if (!s.batch_sizes) return high;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (b < s.batch_sizes[middle])
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace rnnfast::RNNFAST_ISA
