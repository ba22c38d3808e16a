// The forward scan of one layer.
#pragma once

#include "layer.h"

namespace rnnfast::RNNFAST_ISA {

template <class S, class O>
class Forward {
  using T = typename Product<O>::T;
  static constexpr int V = LANES<O>;
  // An operand that lies in memory as the tile wants it is read where it is; any other goes through a buffer.
  static constexpr bool SAME = sizeof(S) == sizeof(O);
  // GRU adds the state itself, which must not be the rounded operand.
  static constexpr bool ROUNDED = sizeof(O) < sizeof(T);

  const ForwardArgs& x;
  const ScanShape& s;
  const PackedLayer<S, O>& packed;
  const Split& split;
  const bool direct_state, direct_input, table;
  const int64_t state_stride, hidden_stride, input_stride, columns;
  const int64_t chunk_steps;  // of input product, which are made at a time

  // Of all lanes and rows; a thread touches its own rows or units.
  T* cell_state = nullptr;    // (D, B, hidden_stride), LSTM
  T* hidden_state = nullptr;  // (D, B, hidden_stride), GRU where ROUNDED
  O* operand = nullptr;       // (2, D, B, state_stride): the state after odd and even steps, where not direct
  O* unprojected = nullptr;   // (D, B, hidden_stride): o tanh(c), where a projection follows
  T* gates_x_ = nullptr;      // (2, D, chunk rows, columns) of a team: of this chunk and the next

 public:
  // Of one thread.
  struct Local {
    const O** a;      // operand rows
    const T** start;  // where their sums start
    T* gates_x;       // (lanes of the item, chunk rows, columns)
    O* inputs;        // (chunk rows, input_stride), where not direct
    int member, members;
    T* sums;          // of a piece: (rows of a part, its columns); or (pieces of a strip, rows, columns of a piece)
  };

  Forward(const ForwardArgs& args, const PackedLayer<S, O>& layer, const Split& how)
      : x(args),
        s(args.shape),
        packed(layer),
        split(how),
        direct_state(SAME && s.state % Product<O>::depth == 0),
        direct_input(SAME && s.input % Product<O>::depth == 0),
        table(layer.table != nullptr),
        state_stride(round_up(s.state, V * Product<O>::depth)),
        hidden_stride(round_up(s.hidden, V * Product<O>::depth)),
        input_stride(round_up(s.input, V * Product<O>::depth)),
        columns(layer.columns()),
        chunk_steps(steps_of_chunk(s, split)) {}

  void carve(Carver& carver) {
    const int64_t states = s.lanes * s.batch;
    if (s.cell == Cell::lstm) cell_state = carver.take<T>(states * hidden_stride);
    if (s.cell == Cell::gru && ROUNDED) hidden_state = carver.take<T>(states * hidden_stride);
    if (!direct_state) operand = carver.take<O>(2 * states * state_stride);
    if (s.has_projection) unprojected = carver.take<O>(states * hidden_stride);
    if (split.together() && !table) gates_x_ = carver.take<T>(2 * s.lanes * chunk_rows() * columns);
  }
  int64_t pieces() const { return s.lanes * ceil_div(packed.gates.count(), dealt_panels()) * split.groups; }

  Local carve_local(Carver& carver) const {
    Local local;
    const int64_t rows = chunk_rows(), lanes = split.together() ? 0 : 1;
    local.a = carver.take<const O*>(rows);
    local.start = carver.take<const T*>(rows);
    local.gates_x = carver.take<T>(table ? 0 : lanes * rows * columns);
    local.inputs = carver.take<O>(direct_input || s.ids ? 0 : rows * input_stride);
    const int64_t most = packed.gates.vectors;
    local.sums = carver.take<T>(max64(MAX_ROWS, part_rows(int(most))) * max64(MAX_VECTORS, most) * V);
    return local;
  }

  void run_item(Item item, Local local, Team& team) const {
    const bool together = split.together();
    if (together && !table) make_gates_x(item, local, 0);
    // Nobody goes on before states are copied, nor, where rows of a panel come from others, before their input products are made.
    if (copies_states() || split.groups > 1 || split.dealt) {
      if (local.member == 0 && item.done == 0) init_states(item);
      team.barrier.wait(local.members);
    }
    Walk<O> walk(packed.w_hh, packed.gates, s.state, item, s.steps, seat(local), INT64_MAX, team.deal.get(), split.groups, 0,
                 near_of_state(local), dealt_panels());
    int64_t in_chunk = 0;
    for (int64_t step = item.done; step < s.steps; ++step) {
      if (team.share(item, step)) in_chunk = 0;  // the input products of fewer rows lie elsewhere
      // A team makes them a step early, which saves it a barrier.
      const int64_t first = step + together;
      if (in_chunk == (together ? chunk_steps - 1 : 0) && first < s.steps && !table) make_gates_x(item, local, first);
      run_step(item, local, walk, step, step - in_chunk);
      if (++in_chunk == chunk_steps) in_chunk = 0;
      if (!end_step(team, local, walk)) return;
      if (!s.has_projection) continue;
      for (int64_t lane = item.lane; lane < item.lane_end; ++lane) project(item, local, lane, step);
      team.barrier.wait(local.members);
    }
    if (local.member == 0) finish_states(item);
  }

 private:
  struct Place {
    int64_t lane, row, b, step, t;
  };

  // Whether a strip multiplies two panels at once; where they are dealt, two are dealt together then.
  bool in_pairs(int64_t rows) const { return packed.gates.vectors == PAIR / 2 && rows <= PAIR_ROWS; }
  int64_t dealt_panels() const { return in_pairs(s.batch) ? 2 : 1; }
  Seat seat(const Local& local) const { return seat_of(split, local.member, local.members); }
  // Bytes of w_hh that stay near a member from step to step, beside its w_ih where both are more than that.
  int64_t near_of_state(const Local& local) const {
    const int64_t of_input = s.ids ? 0 : packed.ih_size() * int64_t(sizeof(O)) / seat(local).members;
    return is_far(local) ? max64(0, near_bytes() - of_input) : near_bytes();
  }
  bool is_far(const Local& local) const {
    return !s.ids && (packed.ih_size() + packed.hh_size()) * int64_t(sizeof(O)) / seat(local).members > near_bytes();
  }
  int64_t chunk_rows() const { return chunk_steps * item_rows(s, split); }
  // Rows of the chunk that begins with step `first`, which come before those of this step.
  int64_t chunk_row(const Item& item, int64_t lane, int64_t first, int64_t step) const {
    if (!s.batch_sizes) return (step - first) * (item.end - item.first);
    int64_t row = 0;
    for (int64_t i = first; i < step; ++i) row += alive(s, item, s.time(lane, i));
    return row;
  }
  T* gates_x(const Item& item, const Local& local, int64_t lane, int64_t step) const {
    if (split.together()) return gates_x_ + (step / chunk_steps % 2 * s.lanes + lane) * chunk_rows() * columns;
    return local.gates_x + (lane - item.lane) * chunk_rows() * columns;
  }
  O* operand_row(int64_t parity, int64_t lane, int64_t b) const {
    return operand + (((parity & 1) * s.lanes + lane) * s.batch + b) * state_stride;
  }
  S* output_row(int64_t row, int64_t lane) const { return at<S>(x.output, (row * s.lanes + lane) * s.state); }

  // A state that the scan does not keep itself is read where the caller left it.
  bool copies_states() const { return operand || hidden_state || cell_state || unprojected; }
  void init_states(const Item& item) const {
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane)
      for (int64_t b = item.first; b < item.end; ++b) {
        const int64_t state = lane * s.batch + b;
        const S* h_0 = at<S>(x.h_0, state * s.state);
        // Both parities: a row may start after any step.
        if (operand)
          for (int parity = 0; parity < 2; ++parity) {
            O* to = operand_row(parity, lane, b);
            convert_row(to, h_0, s.state);
            if (s.state % Product<O>::depth) to[s.state] = O{};
          }
        if (hidden_state) convert_row(hidden_state + state * hidden_stride, h_0, s.hidden);
        if (cell_state) convert_row(cell_state + state * hidden_stride, at<S>(x.c_0, state * s.hidden), s.hidden);
        if (unprojected && s.hidden % Product<O>::depth) unprojected[state * hidden_stride + s.hidden] = O{};
      }
  }

  void finish_states(const Item& item) const {
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane)
      for (int64_t b = item.first; b < item.end; ++b) {
        const int64_t state = lane * s.batch + b;
        const int64_t row = s.reversed(lane) ? s.offset_at(0) + b : s.offset_at(last_step(s, b)) + b;
        if (x.h_n) copy_row(at<S>(x.h_n, state * s.state), output_row(row, lane), s.state);
        if (cell_state) convert_row(at<S>(x.c_n, state * s.hidden), cell_state + state * hidden_stride, s.hidden);
      }
  }

  // The input product and bias of the chunk that begins with this step, for this member's panels and its share of the rows.
  void make_gates_x(const Item& item, const Local& local, int64_t step) const {
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane)
      make_gates_x(item, local, lane, step, min64(step + chunk_steps, s.steps));
  }
  void make_gates_x(const Item& item, const Local& local, int64_t lane, int64_t step, int64_t end) const {
    T* out = gates_x(item, local, lane, step);
    const T* bias = packed.bias + lane * columns;
    const Seat at_ = seat(local);
    const Slice own = at_.groups == 1 ? Slice{0, INT64_MAX} : slice_of(chunk_row(item, lane, step, end), at_.group, at_.groups);
    const Slice slice = slice_of(packed.gates.count(), at_.member, at_.members);
    int64_t rows = 0;
    for (int64_t i = step; i < end; ++i) {
      const int64_t t = s.time(lane, i), n = alive(s, item, t), row = s.offset_at(t) + item.first;
      for (int64_t r = 0; r < n; ++r, ++rows) {
        if (rows < own.first || rows >= own.end) continue;
        if (s.ids) {
          gather(out + rows * columns, lane, *at<int64_t>(x.input, row + r), slice);
          continue;
        }
        const S* from = at<S>(x.input, (row + r) * s.input);
        local.a[rows] = as_operand(from, s.input, local.inputs + rows * input_stride);
        local.start[rows] = bias;
      }
    }
    if (s.ids) return;
    rows = min64(rows, own.end) - own.first;
    const GatePieces& pieces = packed.gates;
    const O* const w_ih = packed.w_ih + lane * packed.ih_size();
    const bool far = is_far(local);
    const int64_t not_fetching = tiles_not_fetching(s.lanes * packed.ih_size() * int64_t(sizeof(O)));
    const int64_t end_vector = min64(slice.end * pieces.vectors, pieces.total_vectors);
    for (int64_t vector = slice.first * pieces.vectors, width; vector < end_vector; vector += width) {
      width = pieces.panel_width(vector);
      const O* const w = w_ih + vector_offset<O>(vector, s.input);
      for_tiles(rows, int(width), [&](int64_t row, int count, int64_t tile, int64_t tiles) {
        row += own.first;
        Ahead::Stream next;
        if (far && tiles > not_fetching && vector + width < end_vector)
          next = share_of_panel<O>(w_ih + vector_offset<O>(vector + width, s.input), pieces.panel_width(vector + width), s.input, tile,
                                   tiles);
        Ahead fetched(next);
        tile_function<O>(count, int(width))(units<O>(s.input), local.a + row, w, local.start + row, vector * V, nullptr,
                                            out + row * columns + vector * V, columns, fetched.any());
      });
    }
  }

  void gather(T* out, int64_t lane, int64_t id, const Slice& slice) const {
    const Panels& pieces = packed.gates;
    const int64_t gate_rows = s.gates() * s.hidden;
    for (int64_t vector = slice.first * pieces.vectors; vector < min64(slice.end * pieces.vectors, pieces.total_vectors); ++vector)
      for (int e = 0; e < V; ++e) {
        const int64_t row = packed.weight_row(vector, e);
        const T w = row < 0 ? T(0) : widen(*at<S>(x.w_ih, (lane * gate_rows + row) * s.input + id));
        out[vector * V + e] = packed.bias[lane * columns + vector * V + e] + w;
      }
  }

  void run_step(const Item& item, const Local& local, Walk<O>& walk, int64_t step, int64_t chunk) const {
    int64_t most = 0;  // rows of a lane
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane) most = max64(most, alive(s, item, s.time(lane, step)));
    Place first{-1, 0, item.first, step, 0};  // of `rows` rows of a lane
    int64_t rows = 0;
    walk.begin(step);
    // In strips, but where a piece has several panels.
    if (most <= FEW_ROWS && packed.gates.vectors == packed.gates.panel && walk.groups() == 1) {
      for (Piece piece; const int64_t panels = walk.take(piece, MAX_ROWS / max64(1, most));) {
        if (first.lane != piece.lane) rows = find_rows(item, local, first, piece.lane, chunk);
        if (rows > 0) run_strip(local, walk, first, int(rows), piece.panel, int(panels));
      }
      return;
    }
    RowsAhead ahead;
    for (Piece piece; walk.take(piece);) {
      if (first.lane != piece.lane) {
        rows = find_rows(item, local, first, piece.lane, chunk);
        if (local.members == 1) ahead = of_next_step(item, walk, piece.lane, step);
      }
      if (local.members > 1) ahead = of_next_piece(item, walk, piece, step);
      const int64_t begin = piece.first(rows, walk.groups()), end = piece.end(rows, walk.groups());
      for_parts(end - begin, part_rows(packed.gates.width(piece.panel)),
                [&](int64_t row, int count, int64_t part, int64_t parts) __attribute__((always_inline)) {
                  multiply(local, walk, piece, begin + row, count, part, parts, ahead);
                  gate_math(local, first, begin + row, count, piece.panel, 1);
                });
    }
  }

  // Sets the place of a lane's first row; returns how many there are.
  int64_t find_rows(const Item& item, const Local& local, Place& first, int64_t lane, int64_t chunk) const {
    first.lane = lane, first.t = s.time(lane, first.step), first.row = s.offset_at(first.t) + item.first;
    const int64_t rows = alive(s, item, first.t), x_row = table ? 0 : chunk_row(item, lane, chunk, first.step);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = item.first + r;
      if constexpr (SAME) local.a[r] = reinterpret_cast<const O*>(h_before<S>(x, lane, b, row_before(s, lane, first.t, b)));
      if (!direct_state) local.a[r] = operand_row(first.step + 1, lane, b);
      local.start[r] = table ? packed.table + (lane * s.input + *at<int64_t>(x.input, first.row + r)) * columns
                             : gates_x(item, local, lane, first.step) + (x_row + r) * columns;
    }
    return rows;
  }

  // The pieces of a strip: gate math of all units at once, as that of one alone waits for each of its instructions.
  void run_strip(const Local& local, const Walk<O>& walk, const Place& first, int rows, int64_t panel, int panels) const {
    const int vectors = int(packed.gates.vectors), last = packed.gates.width(panel + panels - 1);
    const auto multiply = [&](int64_t p, int count, int width, T* sums) {
      strip_function<O>(rows, width)(units<O>(s.state), local.a, walk.weights(first.lane, p).data, count, walk.is_back(),
                                     local.start, p * vectors * V, bias_n(first.lane, p), sums);
    };
    const int whole = last == vectors ? panels : panels - 1;
    const int paired = in_pairs(rows) ? whole / 2 * 2 : 0;
    if (paired > 0) multiply(panel, paired / 2, PAIR, local.sums);
    if (whole > paired) multiply(panel + paired, whole - paired, vectors, local.sums + paired * rows * vectors * V);
    if (panels > whole) multiply(panel + whole, 1, last, local.sums + whole * rows * vectors * V);
    gate_math(local, first, 0, rows, panel, panels);
  }

  // Where the recurrent product of a piece's n starts, or null.
  const T* bias_n(int64_t lane, int64_t panel) const {
    return s.cell == Cell::gru ? packed.bias_n + lane * round_up(s.hidden, V) + panel * packed.gates.units * V : nullptr;
  }

  // The sums of `count` rows of a piece, from `row` on. Inlined, as a tile of few rows takes little longer than a call.
  __attribute__((always_inline)) void multiply(const Local& local, const Walk<O>& walk, const Piece& piece, int64_t row, int count,
                                               int64_t part, int64_t parts, RowsAhead& ahead) const {
    const int width = packed.gates.width(piece.panel), panel = packed.gates.panel;
    const int across = MANY_REGISTERS || width <= panel ? 1 : (width + panel - 1) / panel;
    const int64_t vector = piece.panel * packed.gates.vectors, k = units<O>(s.state);
    const O* const weights = walk.weights(piece.lane, piece.panel).data;
    const T* const last = bias_n(piece.lane, piece.panel);
    for (int p = 0; p < across; ++p) {
      const int c = p * panel, vectors = across == 1 || width - c < panel ? width - c : panel;
      for_tiles(count, vectors, [&](int64_t r, int height, int64_t tile, int64_t tiles) __attribute__((always_inline)) {
        const auto run = [&](Ahead* fetched) __attribute__((always_inline)) {
          tile_function<O>(height, vectors)(k, local.a + row + r, weights + vector_offset<O>(c, s.state), local.start + row + r,
                                            (vector + c) * V, last, local.sums + (r * width + c) * V, width * V, fetched);
        };
        const int64_t all = parts * across * tiles;
        if (!ahead.any() && !walk.fetches(parts * tiles)) return run(nullptr);
        Ahead fetched(walk.ahead(piece, 0, parts * tiles, (part * across + p) * tiles + tile, all), ahead, all, k);
        run(fetched.any());
      });
    }
  }
  // From those sums, or a strip's, to the states of the units.
  __attribute__((always_inline)) void gate_math(const Local& local, const Place& first, int64_t row, int count, int64_t panel,
                                                int panels) const {
    const int gates = int(s.gates());
    const auto for_units = [&](auto math) __attribute__((always_inline)) {
      const T* sums = local.sums;
      for (int64_t p = panel; p < panel + panels; ++p) {
        const int width = packed.gates.width(p);
        for (int r = 0; r < count; ++r) {
          const Place place{first.lane, first.row + row + r, first.b + row + r, first.step, first.t};
          int64_t j = p * packed.gates.units * V;
          for (int c = 0; c < width; c += gates, j += V, sums += gates * V) math(place, j, sums, row + r);
        }
      }
    };
    switch (s.cell) {
      case Cell::rnn_tanh:
      case Cell::rnn_relu: return for_units([&](const Place& at_, int64_t j, const T* sums, int64_t) { rnn(at_, j, sums); });
      case Cell::lstm: return for_units([&](const Place& at_, int64_t j, const T* sums, int64_t) { lstm(at_, j, sums); });
      case Cell::gru:
        return for_units([&](const Place& at_, int64_t j, const T* sums, int64_t r) {
          gru(at_, j, sums, local.start[r], local.a[r]);
        });
    }
  }
  // Rows whose sums of a piece are made before their gate math: those of a tile, or where a piece has several panels, some more, so
  // that a panel stays near from tile to tile.
  int64_t part_rows(int width) const {
    constexpr int64_t ROWS = 32;
    return MANY_REGISTERS || width <= packed.gates.panel ? max_rows(width) : ROWS;
  }

  // Nothing is fetched that stays near from step to step, nor where rows are so few that a tile is bound by reading weights.
  bool fetches(int64_t rows) const {
    const int64_t of_row = (x.tape ? tape_count(s.cell) * s.hidden : 0) + s.state;
    return rows >= FETCHED_ROWS && s.steps * rows * of_row * int64_t(sizeof(S)) > near_bytes();
  }
  RowsAhead of_next_step(const Item& item, const Walk<O>& walk, int64_t lane, int64_t step) const {
    RowsAhead ahead(walk.count());
    if (step + 1 == s.steps) return ahead;
    const int64_t t = s.time(lane, step + 1), rows = alive(s, item, t), first = s.offset_at(t) + item.first;
    if (fetches(rows)) fetch_rows(ahead, lane, first, rows, 0, s.hidden);
    return ahead;
  }
  RowsAhead of_next_piece(const Item& item, const Walk<O>& walk, const Piece& piece, int64_t step) const {
    RowsAhead ahead;
    const auto [next, steps_on] = walk.next(piece);
    if (step + steps_on == s.steps) return ahead;
    const int64_t t = s.time(next.lane, step + steps_on), rows = alive(s, item, t), first = next.first(rows, walk.groups());
    const int64_t of_piece = packed.gates.units * V, unit = next.panel * of_piece;
    if (fetches(rows))
      fetch_rows(ahead, next.lane, s.offset_at(t) + item.first + first, next.end(rows, walk.groups()) - first, unit,
                 min64(unit + of_piece, s.hidden));
    return ahead;
  }
  void fetch_rows(RowsAhead& ahead, int64_t lane, int64_t row, int64_t rows, int64_t unit, int64_t end) const {
    const int64_t bytes = (end - unit) * int64_t(sizeof(S)), hidden = s.hidden * int64_t(sizeof(S));
    if (x.tape) ahead.add(tape_row(lane, row) + unit, bytes, rows * tape_count(s.cell), hidden);
    if (!s.has_projection) ahead.add(output_row(row, lane) + unit, bytes, rows, s.lanes * hidden);
  }

  void store_state(const Place& at_, int64_t j, int n, Vec<T> h) const {
    if (s.has_projection) return store(unprojected + (at_.lane * s.batch + at_.b) * hidden_stride + j, h, n);
    store(output_row(at_.row, at_.lane) + j, h, n);
    if (operand) store(operand_row(at_.step, at_.lane, at_.b) + j, h, n);
  }
  S* tape_row(int64_t lane, int64_t row) const {
    return at<S>(x.tape, (lane * s.rows + row) * tape_count(s.cell) * s.hidden);
  }

  void rnn(const Place& place, int64_t j, const T* sums) const {
    const Vec<T> sum = load(sums);
    store_state(place, j, int(min64(V, s.hidden - j)), s.cell == Cell::rnn_tanh ? Math<T>::tanh(sum) : relu(sum));
  }

  void lstm(const Place& place, int64_t j, const T* sums) const {
    const int64_t H = s.hidden;
    const int n = int(min64(V, H - j));
    T* state = cell_state + (place.lane * s.batch + place.b) * hidden_stride + j;
    Vec<T> i = load(sums), f = load(sums + V), g = load(sums + 2 * V), o = load(sums + 3 * V), c = load(state);
    const Vec<T> h = lstm_forward<Math<T>>(i, f, g, o, c);
    store(state, c);
    store_state(place, j, n, h);
    if (!x.tape) return;
    S* tape = tape_row(place.lane, place.row) + j;
    store(tape, i, n);
    store(tape + H, f, n);
    store(tape + 2 * H, g, n);
    store(tape + 3 * H, o, n);
    store(tape + 4 * H, c, n);
  }

  void gru(const Place& place, int64_t j, const T* sums, const T* start, const O* before) const {
    const int64_t H = s.hidden;
    const int count = int(min64(V, H - j));
    T* state = hidden_state + (place.lane * s.batch + place.b) * hidden_stride + j;
    Vec<T> r = load(sums), z = load(sums + V), n = load(start + 3 * j + 2 * V);
    const Vec<T> h_n = load(sums + 2 * V);
    Vec<T> h;
    if constexpr (ROUNDED)
      h = load(state);
    else
      h = load(before + j, count);
    h = gru_forward<Math<T>>(r, z, n, h_n, h);
    if constexpr (ROUNDED) store(state, h);
    store_state(place, j, count, h);
    if (!x.tape) return;
    S* tape = tape_row(place.lane, place.row) + j;
    store(tape, r, count);
    store(tape + H, z, count);
    store(tape + 2 * H, n, count);
    store(tape + 3 * H, h_n, count);
  }

  void project(const Item& item, const Local& local, int64_t lane, int64_t step) const {
    const int64_t t = s.time(lane, step), rows = alive(s, item, t), first_row = s.offset_at(t) + item.first;
    for (int64_t r = 0; r < rows; ++r) {
      local.a[r] = unprojected + (lane * s.batch + item.first + r) * hidden_stride;
      local.start[r] = ZEROS<O>;
    }
    const Panels& panels = packed.projection;
    const Slice slice = slice_of(panels.count(), local.member, local.members);
    for (int64_t p = slice.first; p < slice.end; ++p) {
      const O* w = packed.w_hr + lane * packed.hr_size() + panel_offset<O>(panels, p, s.hidden);
      const int width = panels.width(p);
      for_tiles(rows, width, [&](int64_t row, int count, int64_t, int64_t) {
        tile_function<O>(count, width)(units<O>(s.hidden), local.a + row, w, local.start + row, 0, nullptr, local.sums,
                                       width * V, nullptr);
        for (int r = 0; r < count; ++r)
          for (int c = 0; c < width; ++c) {
            const int64_t j = (p * panels.vectors + c) * V;
            const int n = int(min64(V, s.state - j));
            const Vec<T> h = load(local.sums + (r * width + c) * V);
            store(output_row(first_row + row + r, lane) + j, h, n);
            if (operand) store(operand_row(step, lane, item.first + row + r) + j, h, n);
          }
      });
    }
  }
};

}  // namespace rnnfast::RNNFAST_ISA
