// The backward scan of one layer: time in reverse, from the gradient of each state to that of the gates.
#pragma once

#include "gate_gradients.h"

namespace rnnfast::RNNFAST_ISA {

constexpr int64_t ADDRESSED = 8 << 20;  // bytes in pages of which a core keeps the addresses

// Whether weights of so many rows, the units of k, by columns are multiplied where they lie, in every step by so many rows:
// packing does not pay for few tiles. Fewer still where weights take a good part of the near cache: parts of rows that lie a power
// of two apart share few sets of it, so each tile reads them from afar. And from the third step on packing pays where they have
// more pages than a core keeps the addresses of; packed they lie in huge ones.
template <class S, class O>
bool worth_no_packing(int64_t k, int64_t columns, int64_t steps, int64_t rows) {
  constexpr int64_t NEAR_TILES = 40, TILES = 8;
  if (sizeof(S) != sizeof(O) || Product<O>::depth > 1 || columns % LANES<O> != 0) return false;
  const int64_t tiles = ceil_div(rows, MAX_ROWS), bytes = k * columns * int64_t(sizeof(O));
  if (bytes > ADDRESSED) return steps <= 2 && tiles <= TILES;
  return steps * tiles <= (bytes <= near_bytes() / 2 ? NEAR_TILES : TILES);
}

template <class S, class O>
class Backward {
  using T = typename Product<O>::T;
  static constexpr int V = LANES<O>;
  // Units of k that all rows are multiplied with at a time: the weights of more would not stay near between their tiles.
  static constexpr int64_t BLOCK = 1024;

  const BackwardArgs& x;
  const ScanShape& s;
  const Split& split;
  const Gradients<S, O>& d;
  const Panels states, units_;
  const int64_t gate_rows;
  const bool unpacked;  // w_hh is not packed
  O *w_hh, *w_hr = nullptr;                 // packed: d_gates_h w_hh, d_state w_hr
  T *carry_h = nullptr, *carry_c = nullptr;  // (D, B, hidden_stride): what reaches the state before without w_hh

 public:
  struct Local {
    const O** a;
    const T** start;
    T* tile;
    int member, members;
  };

  // Weights that are kept packed serve any batch.
  static Panels panels_of(const BackwardArgs& x) { return plain_panels(x.shape.state, V, x.packed_hh ? 1 : x.shape.batch); }

  Backward(const BackwardArgs& args, const Split& how, const Gradients<S, O>& gradients)
      : x(args),
        s(args.shape),
        split(how),
        d(gradients),
        states(panels_of(x)),
        units_(plain_panels(s.hidden, V)),
        gate_rows(s.gates() * s.hidden),
        unpacked(!x.packed_hh && worth_no_packing<S, O>(gate_rows, s.state, s.steps, s.batch)),
        w_hh(static_cast<O*>(x.packed_hh)) {}

  bool reads_in_place() const { return unpacked; }
  int64_t packed_count() const { return s.lanes * packed_size<O>(states, gate_rows); }
  void carve(Carver& carver) {
    if (!unpacked && !x.packed_hh) w_hh = carver.take<O>(packed_count());
    if (s.has_projection) w_hr = carver.take<O>(s.lanes * packed_size<O>(units_, s.state));
    if (s.cell == Cell::gru) carry_h = carver.take<T>(s.lanes * s.batch * d.hidden_stride);
    if (s.cell == Cell::lstm) carry_c = carver.take<T>(s.lanes * s.batch * d.hidden_stride);
  }
  Local carve_local(Carver& carver) const {
    const int64_t rows = item_rows(s, split);
    const int64_t blocks = max64(1, ceil_div(units<O>(gate_rows), BLOCK)), sums = blocks > 1 ? rows : 0;
    return {carver.take<const O*>(rows * blocks), carver.take<const T*>(rows),
            carver.take<T>(max64(sums, MAX_ROWS) * MAX_VECTORS * V), 0, 1};
  }

  void pack(int thread, int threads) const {
    if (!unpacked && !x.packed_hh) pack_hh(thread, threads);
    if (!s.has_projection) return;
    const auto row = [&](int64_t lane, int64_t k) { return at<S>(x.w_hr, (lane * s.state + k) * s.hidden); };
    pack_weight(w_hr, units_, s.lanes, s.state, s.hidden, row, thread, threads);
  }

  void pack_hh(int thread, int threads) const {
    const auto row = [&](int64_t lane, int64_t k) { return at<S>(x.w_hh, (lane * gate_rows + k) * s.state); };
    pack_weight(w_hh, states, s.lanes, gate_rows, s.state, row, thread, threads);
  }

  void run_item(Item item, Local local, Team& team) const {
    if (local.member == 0 && item.done == 0 && d.is_first_part()) init_carries(item);
    team.barrier.wait(local.members);
    Walk<O> walk(unpacked ? at<O>(x.w_hh, 0) : w_hh, states, gate_rows, item, d.part.steps() + d.is_last_part(),
                 seat_of(split, local.member, local.members), BLOCK, team.deal.get(), split.groups, unpacked ? s.state : 0);
    const int64_t last_step = d.part.end_step - 1;
    for (int64_t step = last_step - item.done; step >= d.part.step; --step) {
      team.share(item, last_step - step);
      state_gradients(item, local, walk, step);
      if (!end_step(team, local, walk)) return;
      if (!s.has_projection) continue;
      for (int64_t lane = item.lane; lane < item.lane_end; ++lane) through_projection(item, local, lane, step);
      team.barrier.wait(local.members);
    }
    if (x.d_h_0) initial_gradients(item, local, walk);
    if (local.member == 0 && d.is_last_part()) finish_carries(item);
  }
  int64_t pieces() const { return s.lanes * states.count() * split.groups; }

 private:
  struct Place {
    int64_t lane, row, b, t;
  };

  T* carry_row(T* carry, int64_t lane, int64_t b) const { return carry + (lane * s.batch + b) * d.hidden_stride; }

  void init_carries(const Item& item) const {
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane)
      for (int64_t b = item.first; b < item.end; ++b) {
        init_carry(carry_h, x.d_h_n, lane, b);
        init_carry(carry_c, x.d_c_n, lane, b);
      }
  }
  void init_carry(T* carry, const void* from, int64_t lane, int64_t b) const {
    if (!carry) return;
    if (from)
      convert_row(carry_row(carry, lane, b), at<S>(from, (lane * s.batch + b) * s.hidden), s.hidden);
    else
      std::memset(carry_row(carry, lane, b), 0, size_t(s.hidden) * sizeof(T));
  }
  void finish_carries(const Item& item) const {
    if (!carry_c || !x.d_c_0) return;
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane)
      for (int64_t b = item.first; b < item.end; ++b)
        convert_row(at<S>(x.d_c_0, (lane * s.batch + b) * s.hidden), carry_row(carry_c, lane, b), s.hidden);
  }

  void state_gradients(const Item& item, const Local& local, Walk<O>& walk, int64_t step) const {
    int64_t lane = -1;
    RowsAhead ahead;
    bool by_step = false;
    walk.begin(step);
    for (Piece piece; walk.take(piece);) {
      const int64_t t = s.time(piece.lane, step), rows = alive(s, item, t);
      // Rows [0, followed) have a step after this one; the others end here, and get the gradient of the final state.
      const int64_t after = s.reversed(piece.lane) ? t - 1 : t + 1;
      const int64_t followed = after < 0 || after >= s.steps ? 0 : min64(rows, alive(s, item, after));
      if (lane != piece.lane) {
        lane = piece.lane;
        for (int64_t r = 0; r < followed; ++r)
          operands(local, walk, followed, r, d.gates_h(lane, s.offset_at(after) + item.first + r));
        by_step = local.members == 1 && lasts(walk, rows);
        if (by_step) ahead = of_next_step(item, walk, lane, step);
      }
      if (!by_step) ahead = of_next_piece(item, walk, piece, step);
      state_gradient(item, local, walk, piece, t, rows, followed, ahead);
    }
  }

  // d_h = d_output + what carries over + d_gates_h(step after) w_hh, and then the gates, unless a projection is between.
  void state_gradient(const Item& item, const Local& local, const Walk<O>& walk, const Piece& piece, int64_t t, int64_t rows,
                      int64_t followed, RowsAhead& ahead) const {
    const int64_t lane = piece.lane, first_row = s.offset_at(t) + item.first, p = piece.panel;
    const int width = states.width(p);
    const int64_t column = p * states.vectors * V;
    const auto start = [&](int64_t row, int count, bool ends, T* sums) {
      for (int r = 0; r < count; ++r)
        start_gradient({lane, first_row + row + r, item.first + row + r, t}, p, width, ends, sums + r * width * V);
    };
    // Where nothing but d_output is added, and there are whole vectors of it, the product starts from it.
    const bool direct = sizeof(S) == sizeof(T) && x.d_output && !carry_h && column + width * V <= s.state;
    const auto finish = [&](int64_t row, int count, const T* sums) {
      for (int r = 0; r < count; ++r)
        finish_gradient({lane, first_row + row + r, item.first + row + r, t}, p, width, sums + r * width * V);
    };
    add_product(local, walk, piece, followed, ahead,
                [&](int64_t row, int count, T* sums) {
                  if (direct)
                    for (int r = 0; r < count; ++r)
                      local.start[r] = at<T>(x.d_output, ((first_row + row + r) * s.lanes + lane) * s.state + column);
                  else
                    start(row, count, false, sums);
                  return direct;
                },
                finish);
    if (piece.group + 1 < walk.groups()) return;
    for_tiles(rows - followed, width, [&](int64_t row, int count, int64_t, int64_t) {
      start(followed + row, count, true, local.tile);
      finish(followed + row, count, local.tile);
    });
  }

  int64_t row_bytes() const {
    const int64_t read = tape_count(s.cell) * s.hidden + (x.d_output ? s.state : 0) + (s.cell != Cell::lstm ? s.state : 0);
    return read * int64_t(sizeof(S)) + d.stride * int64_t(sizeof(O));
  }
  // As in the forward scan.
  bool fetches(int64_t rows) const { return rows >= FETCHED_ROWS && s.steps * rows * row_bytes() > near_bytes(); }
  // Whether rows fetched during the step before are still near when their turn comes: the step reads them, and all weights.
  bool lasts(const Walk<O>& walk, int64_t rows) const { return walk.bytes() + rows * row_bytes() <= near_bytes(); }
  RowsAhead of_next_step(const Item& item, const Walk<O>& walk, int64_t lane, int64_t step) const {
    RowsAhead ahead(walk.count());
    if (step == d.part.step) return ahead;
    const int64_t t = s.time(lane, step - 1), rows = alive(s, item, t);
    if (fetches(rows)) fetch_rows(ahead, lane, t, item.first, rows, 0, s.hidden);
    return ahead;
  }
  RowsAhead of_next_piece(const Item& item, const Walk<O>& walk, const Piece& piece, int64_t step) const {
    RowsAhead ahead;
    const auto [next, steps_on] = walk.next(piece);
    if (step - steps_on < d.part.step) return ahead;
    const int64_t t = s.time(next.lane, step - steps_on), rows = alive(s, item, t), first = next.first(rows, walk.groups());
    const int64_t of_panel = states.vectors * V, unit = next.panel * of_panel;
    if (fetches(rows))
      fetch_rows(ahead, next.lane, t, item.first + first, next.end(rows, walk.groups()) - first, unit,
                 min64(unit + of_panel, s.hidden));
    return ahead;
  }
  void fetch_rows(RowsAhead& ahead, int64_t lane, int64_t t, int64_t b, int64_t rows, int64_t unit, int64_t end) const {
    if (s.has_projection) return;
    const int64_t row = s.offset_at(t) + b, before = row_before(s, lane, t, b);
    const int64_t bytes = (end - unit) * int64_t(sizeof(S)), hidden = s.hidden * int64_t(sizeof(S));
    const int64_t gate_bytes = (end - unit) * int64_t(sizeof(O)), stride = d.stride * int64_t(sizeof(O));
    const int64_t tape = tape_count(s.cell), in_tape = (lane * s.rows + row) * tape * s.hidden + unit;
    const int64_t in_output = (row * s.lanes + lane) * s.hidden + unit;
    if (x.tape) ahead.add(at<S>(x.tape, in_tape), bytes, rows * tape, hidden);
    if (x.d_output) ahead.add(at<S>(x.d_output, in_output), bytes, rows, s.lanes * hidden);
    if (s.gates() == 1) ahead.add(at<S>(x.output, in_output), bytes, rows, s.lanes * hidden);
    // The state before, c or h: it is new here, and stands in the tape or the output of the step that comes next.
    if (before >= 0 && s.cell == Cell::lstm)
      ahead.add(at<S>(x.tape, (lane * s.rows + before) * tape * s.hidden + (tape - 1) * s.hidden + unit), bytes, rows,
                tape * hidden);
    if (before >= 0 && s.cell == Cell::gru)
      ahead.add(at<S>(x.output, (before * s.lanes + lane) * s.hidden + unit), bytes, rows, s.lanes * hidden);
    const O* gates = d.gates_x(lane, row) + unit;
    if (unit == 0 && end == s.hidden)
      ahead.add(gates, stride, rows, stride);
    else if (d.stride == d.width)  // else the parts of all rows are not equally far apart
      ahead.add(gates, gate_bytes, rows * (d.width / s.hidden), s.hidden * int64_t(sizeof(O)));
  }

  // Row r of d_gates_h, as every block of the walk's panels multiplies it.
  void operands(const Local& local, const Walk<O>& walk, int64_t rows, int64_t r, const O* gates) const {
    for (int64_t block = 0; block < walk.blocks(); ++block)
      local.a[block * rows + r] = gates + walk.block_start(block) * Product<O>::depth;
  }

  // Adds the products of a piece's part of rows [0, rows) and its panel to what start(first row, count, sums) writes to sums,
  // or points to with local.start if it returns true, and hands them to finish(first row, count, sums).
  template <class Start, class Finish>
  void add_product(const Local& local, const Walk<O>& walk, const Piece& piece, int64_t rows, RowsAhead& ahead,
                   Start start, Finish finish) const {
    const int64_t p = piece.panel, first = piece.first(rows, walk.groups()), end = piece.end(rows, walk.groups());
    const int64_t blocks = walk.blocks();
    const int width = states.width(p);
    for (int64_t block = 0; block < blocks; ++block) {
      const Panel<O> w = walk.weights(piece.lane, p, block);
      for_tiles(end - first, width, [&](int64_t row, int count, int64_t tile, int64_t of) {
        T* sums = local.tile + (blocks > 1 ? row * width * V : 0);
        row += first;
        if (block > 0 || !start(row, count, sums))
          for (int r = 0; r < count; ++r) local.start[r] = sums + r * width * V;
        Ahead fetched(walk.ahead(piece, block, of, tile, of), ahead, blocks * of, walk.block_units(0));
        tile_function<O>(count, width)(walk.block_units(block), local.a + block * rows + row, w, local.start, 0, nullptr, sums,
                                       width * V, fetched.any());
        if (block + 1 == blocks) finish(row, count, sums);
      });
    }
  }

  void start_gradient(const Place& place, int64_t p, int width, bool ends, T* sums) const {
    const int64_t j = p * states.vectors * V, state = (place.lane * s.batch + place.b) * s.state + j;
    const S* const d_output = x.d_output ? at<S>(x.d_output, (place.row * s.lanes + place.lane) * s.state + j) : nullptr;
    const T* const carry = carry_h ? carry_row(carry_h, place.lane, place.b) + j : nullptr;
    const S* const d_h_n = !carry && ends && x.d_h_n ? at<S>(x.d_h_n, state) : nullptr;
    for_units(s.state - j, width, [&](int64_t u, int n) __attribute__((always_inline)) {
      Vec<T> sum{};
      if (d_output) sum = load(d_output + u, n);
      if (carry) sum += load(carry + u);
      if (d_h_n) sum += load(d_h_n + u, n);
      store(sums + u, sum);
    });
  }

  void finish_gradient(const Place& place, int64_t p, int width, const T* sums) const {
    if (!s.has_projection) return gate_gradients(place, p * states.vectors * V, width, sums);
    for (int c = 0; c < width; ++c)
      store(d.state_row(place.lane, place.row) + (p * states.vectors + c) * V, load(sums + c * V));
  }

  void through_projection(const Item& item, const Local& local, int64_t lane, int64_t step) const {
    const int64_t t = s.time(lane, step), rows = alive(s, item, t), first_row = s.offset_at(t) + item.first;
    for (int64_t r = 0; r < rows; ++r) {
      local.a[r] = d.state_row(lane, first_row + r);
      local.start[r] = ZEROS<O>;
    }
    const Slice slice = slice_of(units_.count(), local.member, local.members);
    for (int64_t p = slice.first; p < slice.end; ++p) {
      const O* w = w_hr + lane * packed_size<O>(units_, s.state) + panel_offset<O>(units_, p, s.state);
      const int width = units_.width(p);
      for_tiles(rows, width, [&](int64_t row, int count, int64_t, int64_t) {
        tile_function<O>(count, width)(units<O>(s.state), local.a + row, w, local.start + row, 0, nullptr, local.tile,
                                       width * V, nullptr);
        for (int r = 0; r < count; ++r)
          gate_gradients({lane, first_row + row + r, item.first + row + r, t}, p * units_.vectors * V, width,
                         local.tile + r * width * V);
      });
    }
  }

  // From the gradients d_h of `width` vectors of units of a row, from unit j on, to those of their gates and of the state before.
  void gate_gradients(const Place& place, int64_t j, int width, const T* d_h) const {
    const int64_t H = s.hidden, before = row_before(s, place.lane, place.t, place.b), state = place.lane * s.batch + place.b;
    O* const gates = d.gates_x(place.lane, place.row) + j;
    const S* const tape = at<S>(x.tape, (place.lane * s.rows + place.row) * tape_count(s.cell) * H + j);
    switch (s.cell) {
      case Cell::lstm: {
        const S* const c_before = before >= 0 ? at<S>(x.tape, (place.lane * s.rows + before) * 5 * H + 4 * H + j)
                                              : at<S>(x.c_0, state * H + j);
        const S* const d_cells = x.d_cells ? at<S>(x.d_cells, (place.lane * s.rows + place.row) * H + j) : nullptr;
        T* const carry = carry_row(carry_c, place.lane, place.b) + j;
        O* const unprojected = s.has_projection ? d.unprojected_row(place.lane, place.row) + j : nullptr;
        for_units(H - j, width, [&](int64_t u, int n) __attribute__((always_inline)) {
          Vec<T> i = load(tape + u, n), f = load(tape + H + u, n), g = load(tape + 2 * H + u, n), o = load(tape + 3 * H + u, n);
          const Vec<T> c = load(tape + 4 * H + u, n);
          Vec<T> d_c = load(carry + u);
          if (d_cells) d_c += load(d_cells + u, n);
          if (unprojected) store(unprojected + u, o * Math<T>::tanh(c));
          lstm_backward<Math<T>>(i, f, g, o, c, load(c_before + u, n), load(d_h + u), d_c);
          store(carry + u, d_c);
          store(gates + u, i, n);
          store(gates + H + u, f, n);
          store(gates + 2 * H + u, g, n);
          store(gates + 3 * H + u, o, n);
        });
        break;
      }
      case Cell::gru: {
        const S* const h = h_before<S>(x, place.lane, place.b, before) + j;
        T* const carry = carry_row(carry_h, place.lane, place.b) + j;
        for_units(H - j, width, [&](int64_t u, int n) __attribute__((always_inline)) {
          Vec<T> r = load(tape + u, n), z = load(tape + H + u, n), n_x = load(tape + 2 * H + u, n), n_h = load(tape + 3 * H + u, n);
          store(carry + u, gru_backward<Math<T>>(r, z, n_x, n_h, load(h + u, n), load(d_h + u)));
          store(gates + u, n_x, n);
          store(gates + H + u, r, n);
          store(gates + 2 * H + u, z, n);
          store(gates + 3 * H + u, n_h, n);
        });
        break;
      }
      default: {
        const S* const h = at<S>(x.output, (place.row * s.lanes + place.lane) * H + j);
        const bool is_tanh = s.cell == Cell::rnn_tanh;
        for_units(H - j, width, [&](int64_t u, int n) __attribute__((always_inline)) {
          const Vec<T> h_u = load(h + u, n), d_u = load(d_h + u);
          store(gates + u, is_tanh ? rnn_tanh_backward(h_u, d_u) : rnn_relu_backward(h_u, d_u), n);
        });
      }
    }
    // The other half of a last, odd, pair.
    if (Product<O>::depth > 1 && j + width * V >= H) gates[d.width - j] = O{};
  }
  // Calls unit(u, n) for vectors from u on, of `units` units in all; the last one may have only n of them.
  template <class Unit>
  RNNFAST_INLINE void for_units(int64_t units, int width, Unit unit) {
    const int64_t whole = min64(width * V, units / V * V);
    for (int64_t u = 0; u < whole; u += V) unit(u, V);
    if (whole < width * V) unit(whole, int(units - whole));
  }

  // Of the sequences whose first step is one of this part.
  void initial_gradients(const Item& item, const Local& local, Walk<O>& walk) const {
    int64_t lane = -1, first = 0, rows = 0;
    if (!d.is_last_part() && !(s.bidirectional && s.batch_sizes)) return;
    walk.begin(d.part.step - 1);
    for (Piece piece; walk.take(piece);) {
      if (lane != piece.lane) {
        lane = piece.lane;
        const bool reversed = s.reversed(lane);
        const int64_t after = s.steps - d.part.step;  // in time
        const int64_t from = reversed && after < s.steps ? s.size_at(after) : 0;
        const int64_t end = reversed ? s.size_at(s.steps - d.part.end_step) : d.is_last_part() ? s.batch : 0;
        first = max64(item.first, from);
        rows = max64(0, min64(item.end, end) - first);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t b = first + r, t = reversed ? last_step(s, b) : 0;
          operands(local, walk, rows, r, d.gates_h(lane, s.offset_at(t) + b));
        }
      }
      const int64_t p = piece.panel;
      const int width = states.width(p);
      const auto start = [&](int64_t row, int count, T* sums) {
        for (int r = 0; r < count; ++r)
          for (int c = 0; c < width; ++c) {
            const int64_t j = (p * states.vectors + c) * V;
            store(sums + (r * width + c) * V, carry_h ? load(carry_row(carry_h, lane, first + row + r) + j) : Vec<T>{});
          }
        return false;
      };
      const auto finish = [&](int64_t row, int count, const T* sums) {
        for (int r = 0; r < count; ++r)
          for (int c = 0; c < width; ++c) {
            const int64_t j = (p * states.vectors + c) * V;
            store(at<S>(x.d_h_0, (lane * s.batch + first + row + r) * s.state + j), load(sums + (r * width + c) * V),
                  int(min64(V, s.state - j)));
          }
      };
      RowsAhead none;
      add_product(local, walk, piece, rows, none, start, finish);
    }
  }
};

}  // namespace rnnfast::RNNFAST_ISA
