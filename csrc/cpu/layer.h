// What forward and backward share: weights packed for the forward scan, the split of work over threads, and the walk.
#pragma once

#include <utility>

#include "../scan.h"
#include "memory.h"
#include "packing.h"
#include "processors.h"
#include "sharing.h"
#include "threads.h"

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
// Copies with conversion, if the types differ.
template <class R, class S>
void convert_row(R* to, const S* from, int64_t n) {
  constexpr int V = Lanes<Compute<S>>::count;
  for (int64_t j = 0; j < n; j += V) store(to + j, load(from + j, int(n - j < V ? n - j : V)), int(n - j < V ? n - j : V));
}

// n numbers as a tile reads them: where they lie, if they are of its type and end with a whole unit, or else in the buffer.
template <class O, class S>
RNNFAST_INLINE const O* as_operand(const S* from, int64_t n, O* buffer) {
  if (sizeof(S) == sizeof(O) && n % Product<O>::depth == 0) return reinterpret_cast<const O*>(from);
  convert_row(buffer, from, n);
  if (n % Product<O>::depth) buffer[n] = O{};
  return buffer;
}

template <class F>
void parallel(int threads, F body) {
  run_parallel(threads, [&](int thread, int n) {
    body(thread, n);
    end_tiles();
  });
}

// Of token ids, for which one call makes a table of their input products.
constexpr int64_t LARGEST_TABLE = 4096;

// The columns of the gates, vector by vector of units with the gates of each side by side. They are dealt in pieces that have all
// gates of their units, so that the gate math runs on the sums just computed. A piece is packed as one panel, or an LSTM's, of two
// vectors of units, as panels of three, three and two vectors, where batches suit tiles of four rows by three vectors.
struct GatePieces : Panels {
  int units;  // vectors of units
  int panel;  // vectors of a panel; the last one of a piece may have fewer
  // Of the panel that begins with such a vector.
  int panel_width(int64_t vector) const { return int(min64(panel, width(vector / vectors) - vector % vectors)); }
};
// Weights that are kept are packed in one way for all batches.
RNNFAST_INLINE GatePieces gate_pieces(const ScanShape& s, int lanes, bool kept) {
  const int64_t gates = s.gates(), total = gates * ceil_div(s.hidden, lanes);
  if (gates == 1) {
    const Panels plain = plain_panels(s.hidden, lanes);
    return {plain, int(plain.vectors), int(plain.vectors)};
  }
  const bool of_three = s.cell == Cell::lstm && !kept && most_vectors(s.batch) == PAIR / 2;
  const int units = of_three ? 2 : 1;
  return {{units * gates, total}, units, of_three ? PAIR / 2 : int(gates)};
}

// Panel p of a lane's weight of n rows and k columns, to be multiplied with rows of k.
template <class O, class S>
void pack_panel(O* to, const Panels& of, const S* weight, int64_t n, int64_t k, int64_t lane, int64_t p) {
  constexpr int V = LANES<O>;
  for (int c = 0; c < of.width(p); ++c) {
    const S* rows[V];
    for (int e = 0; e < V; ++e) {
      const int64_t row = (p * of.vectors + c) * V + e;
      rows[e] = row < n ? weight + (lane * n + row) * k : nullptr;
    }
    pack_columns<O>(to + lane * packed_size<O>(of, k) + panel_offset<O>(of, p, k), of.width(p), c, rows, k);
  }
}

// Weights of all lanes in the layout of the forward scan. Offsets depend on the shape alone, so a packed layer can be
// kept and used again.
template <class S, class O>
struct PackedLayer {
  using T = typename Product<O>::T;
  static constexpr int V = LANES<O>;
  const ScanShape& s;
  GatePieces gates;
  Panels projection;
  O *w_ih, *w_hh, *w_hr;
  T *bias, *bias_n;  // bias: added to the input product; bias_n: GRU's b_hn, where its recurrent product starts
  T* table;          // instead of w_ih where the input is ids: a row of input product and bias for each id
  size_t bytes;

  // A layer that is kept has the table for any vocabulary; for one call a large one would not pay.
  PackedLayer(const ScanShape& shape, char* base, bool kept) : s(shape), gates(gate_pieces(shape, V, kept)) {
    const bool use_table = s.ids && (kept || s.input <= LARGEST_TABLE);
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

  // Row of w_ih and w_hh that a vector holds in its lane e, or -1.
  int64_t weight_row(int64_t vector, int e) const {
    const int64_t unit = vector / s.gates() * V + e;
    return unit < s.hidden ? vector % s.gates() * s.hidden + unit : -1;
  }

  // Packs this thread's share of the pieces.
  void pack(const ForwardArgs& x, int thread, int threads) const {
    for (int64_t i = thread; i < s.lanes * gates.count(); i += threads) pack_gates(x, i / gates.count(), i % gates.count());
    if (!s.has_projection) return;
    for (int64_t i = thread; i < s.lanes * projection.count(); i += threads)
      pack_panel(w_hr, projection, at<S>(x.w_hr, 0), s.state, s.hidden, i / projection.count(), i % projection.count());
  }

 private:
  void pack_gates(const ForwardArgs& x, int64_t lane, int64_t p) const {
    const int64_t gate_rows = s.gates() * s.hidden;
    for (int c = 0; c < gates.width(p); ++c) {
      const S *hh[V], *ih[V];
      const int64_t vector = p * gates.vectors + c, of_panel = c % gates.panel, panel = vector - of_panel;
      const int width = gates.panel_width(panel);
      T* b = bias + lane * columns() + vector * V;
      for (int e = 0; e < V; ++e) {
        const int64_t row = weight_row(vector, e);
        hh[e] = row < 0 ? nullptr : at<S>(x.w_hh, (lane * gate_rows + row) * s.state);
        ih[e] = row < 0 ? nullptr : at<S>(x.w_ih, (lane * gate_rows + row) * s.input);
        const bool biased = row >= 0 && x.b_ih;
        const T b_ih = biased ? widen(*at<S>(x.b_ih, lane * gate_rows + row)) : T(0);
        const T b_hh = biased ? widen(*at<S>(x.b_hh, lane * gate_rows + row)) : T(0);
        if (s.cell == Cell::gru && vector % 3 == 2) {
          b[e] = b_ih;
          bias_n[lane * round_up(s.hidden, V) + vector / 3 * V + e] = b_hh;
        } else {
          b[e] = b_ih + b_hh;
        }
      }
      pack_columns<O>(w_hh + lane * hh_size() + vector_offset<O>(panel, s.state), width, int(of_panel), hh, s.state);
      if (!s.ids) {
        pack_columns<O>(w_ih + lane * ih_size() + vector_offset<O>(panel, s.input), width, int(of_panel), ih, s.input);
      } else if (table) {
        for (int64_t id = 0; id < s.input; ++id) {
          T* row = table + (lane * s.input + id) * columns() + vector * V;
          for (int e = 0; e < V; ++e) row[e] = b[e] + (ih[e] ? widen(ih[e][id]) : T(0));
        }
      }
    }
  }
};

// ---- the split of work ---------------------------------------------------------------------------------------------

// Either every thread walks time alone with some lanes and rows (members == 1, no barrier), or all walk together, each
// computing some panels of every row (one item, a barrier a step), or of a group of them.
struct Split {
  bool together() const { return members > 1; }
  int threads, members;
  int64_t items_per_lane, items;  // items_per_lane 0: one item of all lanes
  bool dealt = false;             // whether the pieces of a step are dealt, or members have equal shares of them
  int64_t groups = 1;             // of a step's rows, where panels alone are too few pieces
};

constexpr int64_t LEAST_GROUP = 8;  // rows of the batch for a member that shares panels: a tile

// Costs are in cycles of one core. A tile of one row is bound by reading its weights, not by their products; weights that are
// not near cost more, and those that are far from every core are best read by one of them each. The first step finds those near
// that were `beside` them.
RNNFAST_INLINE Split split_work(const ScanShape& s, int64_t weight_vectors, int64_t step_panels, int available,
                                int64_t most_groups = 1, int64_t beside = 0) {
  constexpr int64_t FAR_AWAY = 4;
  const auto step = [&](int64_t rows, int64_t vectors, int64_t lanes, int64_t others = 0) {
    const int64_t bytes = vectors * lanes * VECTOR_BYTES + others;
    const bool near = bytes <= near_bytes(), far = bytes > FAR_AWAY * near_bytes();
    return lanes * vectors * (max64(rows, near ? 2 : 12) + (near ? 0 : far ? 24 : 4));
  };
  const auto steps = [&](int64_t rows, int64_t vectors, int64_t lanes, int members) {
    return (s.steps - 1) * step(rows, vectors, lanes) + step(rows, vectors, lanes, beside / members);
  };
  constexpr int64_t ITEM_ROWS = 64;  // keeps an item's states near
  const auto items = [&](int64_t parts) {
    return parts * max64(1, ceil_div(ceil_div(s.batch, parts), ITEM_ROWS));
  };
  const auto dealt_groups = [&](int members) {  // enough pieces for a team to share them evenly
    constexpr int64_t PIECES = 8;  // of a member
    const int64_t wanted = ceil_div(PIECES * members, s.lanes * step_panels);
    return max64(1, min64(wanted, min64(most_groups, s.batch / (2 * MAX_ROWS))));
  };
  Split best{1, 1, items(1), s.lanes * items(1)};
  int64_t least = steps(s.batch, weight_vectors, s.lanes, 1);
  if (available == 1) return best;
  const int64_t region = region_cycles();
  for (int n = 2; n <= available && least > region; n = more_threads(n, available)) {
    const int64_t parts = s.lanes % n == 0 ? 1 : n;
    const int64_t by_rows = region + (parts == 1 ? steps(s.batch, weight_vectors, s.lanes / n, n)
                                                 : steps(ceil_div(s.batch, parts), weight_vectors, s.lanes, 1));
    if (by_rows < least) {
      least = by_rows;
      best = {n, 1, items(parts), s.lanes * items(parts)};
    }
    // Threads that wait for each other every step go at the pace of the slower, unless a step is long enough to be dealt.
    constexpr int64_t WORTH_DEALING = 100000;
    const int64_t groups = max64(1, min64(n / step_panels, most_groups));
    const int members = groups > 1 ? int(groups * step_panels) : n;
    const int64_t rows = ceil_div(s.batch, groups);
    const int64_t vectors = ceil_div(weight_vectors * ceil_div(step_panels, members / groups), step_panels);
    const bool dealt = step(rows, vectors, s.lanes) >= WORTH_DEALING;
    const int64_t shares = steps(rows, vectors, s.lanes, members);
    const int64_t by_panels = region + (dealt ? shares / 20 * 21 : shares / 4 * 5) + s.steps * barrier_cycles(members);
    if (by_panels < least) {
      least = by_panels;
      best = {members, members, 0, 1, dealt, dealt ? dealt_groups(members) : groups};
    }
  }
  return best;
}

// A member's part of a step, unless its pieces are dealt: panels, which it shares out with the members of the same rows, and a group
// of rows.
struct Seat {
  int member, members;
  int64_t group = 0, groups = 1;
};
RNNFAST_INLINE Seat seat_of(const Split& split, int member, int members) {
  // There may be fewer members than were planned.
  if (split.dealt || split.groups == 1 || members != split.members) return {member, members};
  const int of_group = members / int(split.groups);
  return {member % of_group, of_group, member / of_group, split.groups};
}

template <class Scan>
Team team_of(const Split& split, const Scan& scan) {
  return {split.threads, split.together(), split.dealt ? scan.pieces() : 0};
}

RNNFAST_INLINE Item item_of(const ScanShape& s, const Split& split, int64_t i) {
  if (!split.items_per_lane) return {0, s.lanes, 0, s.batch};
  const int64_t lane = i / split.items_per_lane, part = i % split.items_per_lane;
  return {lane, lane + 1, s.batch * part / split.items_per_lane, s.batch * (part + 1) / split.items_per_lane};
}

// The most rows of the batch that an item has.
RNNFAST_INLINE int64_t item_rows(const ScanShape& s, const Split& split) {
  return split.items_per_lane ? ceil_div(s.batch, split.items_per_lane) : s.batch;
}

// How many steps of input product a forward scan makes at a time: few enough to be read while still near.
RNNFAST_INLINE int64_t steps_of_chunk(const ScanShape& s, const Split& split) {
  constexpr int64_t ROWS = 32;
  return max64(1, ROWS / max64(1, item_rows(s, split)));
}

// A part of a step's work: the rows of a group and a panel of a lane.
struct Piece {
  int64_t lane, panel, group;
  int64_t before;  // of this member in this step
  // Its rows, of n.
  int64_t first(int64_t n, int64_t groups) const { return groups == 1 ? 0 : slice_of(n, group, groups).first; }
  int64_t end(int64_t n, int64_t groups) const { return groups == 1 ? n : slice_of(n, group, groups).end; }
};

// How a member of a team walks through the weights of a scan: its pieces of a step from the first to the last, and of the next
// one back, so that the weights last used, which are near, are used first again. The first step turns round as well: it may be
// the next of a stream. What is done for each piece divides no integers, unless pieces, which are large then, are dealt: it
// would take a good part of a small tile's time.
template <class O>
class Walk {
 public:
  Walk(const O* weights, const Panels& of, int64_t depth, const Item& item, int64_t steps, const Seat& seat,
       int64_t block = INT64_MAX, Deal* deal = nullptr, int64_t dealt_groups = 1, int64_t row_stride = 0,
       int64_t near = near_bytes(), int64_t dealt_panels = 1)
      : base_(weights),
        row_stride_(row_stride),
        panels_(of),
        k_(depth),
        lane_(item.lane),
        lanes_(item.lane_end - item.lane),
        first_(slice_of(of.count(), seat.member, seat.members).first),
        count_(slice_of(of.count(), seat.member, seat.members).end - first_),
        group_(seat.group),
        groups_(deal ? dealt_groups : seat.groups),
        block_(max64(1, min64(block, units<O>(depth)))),
        blocks_(ceil_div(units<O>(depth), block_)),
        near_(near / (max64(1, of.vectors) * block_ * VECTOR_BYTES)),
        not_fetching_(tiles_not_fetching(bytes())),
        walked_(steps_walked()),
        deal_(deal),
        member_(seat.member),
        dealt_panels_(dealt_panels) {
    steps_walked() += steps;
  }
  // Of the weights.
  int64_t bytes() const { return lanes_ * packed_size<O>(panels_, k_) * int64_t(sizeof(O)); }
  // The pieces of each lane that a member has where nothing is dealt.
  int64_t count() const { return count_; }
  int64_t groups() const { return groups_; }
  // The piece that is likely to follow the one just taken, and whether in this step, 0, or the next one, 1, which turns round
  // where this one ends.
  std::pair<Piece, int> next(const Piece& piece) const {
    if (is_last()) return {piece, 1};
    return {following(), 0};
  }

  // The other members have left.
  void alone() {
    first_ = 0;
    count_ = panels_.count();
    if (!deal_) group_ = 0, groups_ = 1;
  }

  void begin(int64_t step) {
    back_ = (walked_ + step) & 1;
    taken_ = 0;
    to_lane_ = back_ ? lanes_ - 1 : 0;
    to_panel_ = back_ ? count_ - 1 : 0;
  }
  bool is_back() const { return back_; }
  // Takes up to so many pieces whose panels lie one after the other, or those dealt together, of which `piece` becomes the first in
  // memory; returns how many.
  int64_t take(Piece& piece, int64_t most) {
    if (deal_) return take(piece) ? min64(dealt_panels_, panels_.count() - piece.panel) : 0;
    if (is_last()) return 0;
    const int64_t n = min64(most, back_ ? to_panel_ + 1 : count_ - to_panel_);
    if (back_) to_panel_ -= n - 1;
    piece = following();
    if (!back_) to_panel_ += n - 1;
    end_taking(n);
    return n;
  }
  bool take(Piece& piece) {
    if (deal_) {
      to_number_ = deal_->take(member_);
      if (to_number_ < 0) return false;
      piece = following();
      to_number_ = deal_->peek(member_);
      ++taken_;
      return true;
    }
    if (is_last()) return false;
    piece = following();
    end_taking(1);
    return true;
  }
  Panel<O> weights(int64_t lane, int64_t p, int64_t block = 0) const {
    if (row_stride_) return {base_ + (lane * k_ + block_start(block)) * row_stride_ + p * panels_.vectors * LANES<O>, row_stride_};
    return base_ + lane * packed_size<O>(panels_, k_) + panel_offset<O>(panels_, p, k_) +
           block_start(block) * panels_.width(p) * LANES<O> * Product<O>::depth;
  }
  // Blocks of k that a panel is multiplied in, one after the other for all rows, and where they begin.
  int64_t blocks() const { return blocks_; }
  int64_t block_start(int64_t block) const { return block * block_; }
  int64_t block_units(int64_t block) const { return min64(block_, units<O>(k_) - block * block_); }

  // Whether weights may be fetched where `sharing` tiles of rows share a panel: so many leave time for it.
  bool fetches(int64_t sharing) const { return sharing > not_fetching_ && !row_stride_; }
  // What tile `tile` of `tiles` of a block of a piece fetches: the weights of the next block, if they are no longer near.
  Ahead::Stream ahead(const Piece& piece, int64_t block, int64_t sharing, int64_t tile, int64_t tiles) const {
    const bool last = block + 1 == blocks_;
    if (!fetches(sharing)) return {};
    const int64_t panels_before = deal_ ? piece.before / groups_ : piece.before;
    if (panels_before * blocks_ + block + 1 < near_ || (last && is_last())) return {};
    const Piece after = last ? following() : piece;
    const int64_t lane = after.lane, p = after.panel;
    if (last && lane == piece.lane && p == piece.panel) return {};
    const int64_t next = last ? 0 : block + 1, depth = Product<O>::depth;
    return share_of_panel<O>(weights(lane, p, next).data, panels_.width(p), block_units(next) * depth, tile, tiles);
  }

 private:
  // After n pieces, the last of them at to_panel_.
  void end_taking(int64_t n) {
    taken_ += n;
    if (back_ && to_panel_-- == 0) to_panel_ = count_ - 1, --to_lane_;
    if (!back_ && ++to_panel_ == count_) to_panel_ = 0, ++to_lane_;
  }
  // Whether no piece is known to follow those that have been taken.
  bool is_last() const { return deal_ ? to_number_ < 0 : taken_ == count_ * lanes_; }
  Piece following() const {
    if (!deal_) return {lane_ + to_lane_, first_ + to_panel_, group_, taken_};
    const int64_t dealt = to_number_ / groups_, of_lane = ceil_div(panels_.count(), dealt_panels_);
    return {lane_ + dealt / of_lane, dealt % of_lane * dealt_panels_, to_number_ % groups_, taken_};
  }

  const O* base_;
  int64_t row_stride_;  // of weights that are not packed
  const Panels& panels_;
  int64_t k_, lane_, lanes_, first_, count_;
  int64_t group_, groups_;  // of rows: the member's own, where pieces are not dealt
  int64_t block_, blocks_;  // units of k in a block, and blocks
  int64_t near_;    // blocks that stay near
  int64_t not_fetching_;  // the most tiles sharing weights for which they are not fetched
  int64_t walked_;  // steps this thread walked before
  Deal* deal_;
  int member_;
  int64_t dealt_panels_;  // of each piece that is dealt
  bool back_ = false;
  int64_t taken_ = 0;
  int64_t to_lane_ = 0, to_panel_ = 0;  // of the member's own, what comes next
  int64_t to_number_ = -1;              // where pieces are dealt, the number of what comes next
};

// Rows from which on those that come next are fetched: the tile of fewer is bound by reading its weights. One thread alone fetches
// those of its next step, where they would still be near; a member of a team, of which it cannot say which pieces of a step will be
// its own, those of its next piece.
constexpr int64_t FETCHED_ROWS = 4;

// Rows of an item that are alive at step t.
RNNFAST_INLINE int64_t alive(const ScanShape& s, const Item& item, int64_t t) {
  return max64(0, min64(s.size_at(t), item.end) - item.first);
}

// The row before row b of step t in the lane's own order of time, or -1 where b starts there.
RNNFAST_INLINE int64_t row_before(const ScanShape& s, int64_t lane, int64_t t, int64_t b) {
  if (!s.reversed(lane)) return t > 0 ? s.offset_at(t - 1) + b : -1;
  return t + 1 < s.steps && b < s.size_at(t + 1) ? s.offset_at(t + 1) + b : -1;
}

// The h of the row before, of a forward or a backward scan.
template <class S, class Args>
RNNFAST_INLINE const S* h_before(const Args& x, int64_t lane, int64_t b, int64_t before) {
  const ScanShape& s = x.shape;
  return before >= 0 ? at<S>(x.output, (before * s.lanes + lane) * s.state) : at<S>(x.h_0, (lane * s.batch + b) * s.state);
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

// Ends a member's step, in which it has walked through its part of these weights; false where it leaves its team.
template <class Local, class... Walks>
bool end_step(Team& team, Local& local, Walks&... walks) {
  if (!team.end_step(local.member, local.members)) return false;
  if (local.members == 1) (walks.alone(), ...);
  return true;
}

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
