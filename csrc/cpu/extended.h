// The scan of one layer whose recurrence is extended: dropout of h on its way into w_hh, zoneout, layer normalisation,
// peepholes.
//
// A step has two phases: the recurrent product of all rows, and what makes states of each row of it. Layer normalisation
// needs all units of a row for either, so products are not turned to states where the tile made them. Their columns are
// in the order of the rows of w_hh: the gates of a row one after the other. A projection adds two more of the same kind.
#pragma once

#include "layer.h"

namespace rnnfast::RNNFAST_ISA {

// ---- what both directions of the scan share ------------------------------------------------------------------------

// x where the n flags are set, y elsewhere.
template <class T>
RNNFAST_INLINE Vec<T> select(const bool* flags, int n, Vec<T> x, Vec<T> y) {
  typename Lanes<T>::Int set{};
  for (int e = 0; e < n; ++e) set[e] = flags[e];
  return set != 0 ? x : y;
}

// A row's mean, and one over its standard deviation.
template <class T>
struct Moments {
  T mean, scale;
};

template <class X>
Moments<Compute<X>> moments(const X* x, int64_t n) {
  using T = Compute<X>;
  constexpr int V = Lanes<T>::count;
  constexpr double EPSILON = 1e-5;
  Vec<T> sum{}, squares{};
  for (int64_t j = 0; j < n; j += V) sum += load(x + j, int(min64(V, n - j)));
  const T mean = total<T>(sum) / T(n);
  for (int64_t j = 0; j < n; j += V) {
    Vec<T> d = load(x + j, int(min64(V, n - j))) - splat(mean);
    for (int64_t e = n - j; e < V; ++e) d[e] = 0;
    squares += d * d;
  }
  return {mean, T(1 / __builtin_sqrt(double(total<T>(squares) / T(n)) + EPSILON))};
}

template <class X, class T>
RNNFAST_INLINE Vec<T> normalised(const X* x, int n, Moments<T> m) {
  return (load(x, n) - splat(m.mean)) * splat(m.scale);
}

// Gates that are normalised together: all of an LSTM; r and z, and n, of a GRU.
struct NormGroup {
  int64_t first, size;
};
RNNFAST_INLINE int norm_groups(const ScanShape& s) { return s.cell == Cell::gru ? 2 : 1; }
RNNFAST_INLINE NormGroup norm_group(const ScanShape& s, int i) {
  if (s.cell != Cell::gru) return {0, s.gates() * s.hidden};
  return {i * 2 * s.hidden, (2 - i) * s.hidden};
}

// One side's part of a row's gates: its product, perhaps normalised, and the bias.
template <class S>
struct GatesOfRow {
  using T = Compute<S>;
  const T* product;
  const S *gain, *bias;
  int64_t hidden;
  Moments<T> group[2];

  GatesOfRow(const ScanShape& s, const T* from, const void* gains, const void* biases, int64_t lane)
      : product(from),
        gain(gains ? at<S>(gains, lane * s.gates() * s.hidden) : nullptr),
        bias(biases ? at<S>(biases, lane * s.gates() * s.hidden) : nullptr),
        hidden(s.hidden) {
    if (!gain) return;
    for (int i = 0; i < norm_groups(s); ++i) group[i] = moments(product + norm_group(s, i).first, norm_group(s, i).size);
    if (s.cell != Cell::gru) group[1] = group[0];
  }
  // Units j.. of a gate.
  Vec<T> operator()(int gate, int64_t j, int n) const {
    const int64_t m = gate * hidden + j;
    Vec<T> v = gain ? normalised(product + m, n, group[gate >= 2]) * load(gain + m, n) : load(product + m, n);
    return bias ? v + load(bias + m, n) : v;
  }
};

// out(lane)[r] = a[r] w, for this member's pieces of a step. rows(lane) puts the lane's rows into a, and returns how many there
// are.
template <class O, class Rows, class Out>
void multiply_rows(Walk<O>& walk, const Panels& panels, int64_t depth, int64_t step, const O* const* a, Rows rows, Out out,
                   int64_t stride) {
  using T = typename Product<O>::T;
  constexpr int V = LANES<O>;
  const T* start[MAX_ROWS];
  for (const T*& from : start) from = ZEROS<O>;
  int64_t lane = -1, n = 0;
  walk.begin(step);
  for (Piece piece; walk.take(piece);) {
    if (lane != piece.lane) n = rows(lane = piece.lane);
    const int width = panels.width(piece.panel);
    T* to = out(lane) + piece.panel * panels.vectors * V;
    for_tiles(n, width, [&](int64_t row, int count, int64_t tile, int64_t tiles) {
      Ahead fetched(walk.ahead(piece, 0, tiles, tile, tiles));
      tile_function<O>(count, width)(units<O>(depth), a + row, walk.weights(lane, piece.panel), start, 0, nullptr,
                                     to + row * stride, stride, fetched.any());
    });
  }
}

// Rows [first, end) of n that are a member's, where the members of a team share them.
template <class Local, class F>
void own_rows(const Local& local, int64_t n, F f) {
  const Slice slice = slice_of(n, local.member, local.members);
  for (int64_t r = slice.first; r < slice.end; ++r) f(r);
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <class S, class O>
class ExtendedForward {
  using T = typename Product<O>::T;
  static constexpr int V = LANES<O>;
  static constexpr bool SAME = sizeof(S) == sizeof(O);

  const ForwardArgs& x;
  const Extension& e;
  const ScanShape& s;
  const Split& split;
  const ExtendedTape columns;
  const Panels panels, projection;
  const int64_t gate_rows, stride, hidden_stride, state_stride, input_stride;
  const bool direct_input, has_table;

  O *w_ih = nullptr, *w_hh = nullptr, *w_hr = nullptr;
  T* table = nullptr;        // (D, I, stride): the input product of each token id
  T *h = nullptr, *c = nullptr;  // (D, B, state_stride); (D, B, hidden_stride), c of an LSTM
  O* operand = nullptr;      // (D, B, state_stride): h as w_hh is multiplied with it
  O* unprojected = nullptr;  // (D, B, hidden_stride): what is projected to h
  T* products = nullptr;     // of a team; else each thread has its own

 public:
  struct Local {
    const O** a;
    O* inputs;            // (chunk rows, input_stride)
    T *units_h, *units_c;  // of one row
    T* products;          // for each lane of the item those of a chunk with w_ih, then those of a step with w_hh, or w_hr
    int member, members;
  };

  ExtendedForward(const ExtendedForwardArgs& args, const Split& how)
      : x(args.scan),
        e(args.extension),
        s(x.shape),
        split(how),
        columns(s, e),
        panels(panels_of(s)),
        projection(plain_panels(s.state, V)),
        gate_rows(s.gates() * s.hidden),
        stride(max64(panels.total_vectors, projection.total_vectors) * V),
        hidden_stride(round_up(s.hidden, V * Product<O>::depth)),
        state_stride(round_up(s.state, V * Product<O>::depth)),
        input_stride(round_up(s.input, V * Product<O>::depth)),
        direct_input(SAME && s.input % Product<O>::depth == 0),
        has_table(s.ids && s.input <= LARGEST_TABLE) {}
  static Panels panels_of(const ScanShape& s) { return plain_panels(s.gates() * s.hidden, V); }

  // Weights as the products want them: at x.packed, or in scratch memory for one call.
  void carve_weights(Carver& carver) {
    w_hh = carver.take<O>(s.lanes * packed_size<O>(panels, s.state));
    if (s.has_projection) w_hr = carver.take<O>(s.lanes * packed_size<O>(projection, s.hidden));
    if (!s.ids) w_ih = carver.take<O>(s.lanes * packed_size<O>(panels, s.input));
    if (has_table) table = carver.take<T>(s.lanes * s.input * stride);
  }
  void carve(Carver& carver) {
    Carver kept(static_cast<char*>(x.packed));
    carve_weights(x.packed ? kept : carver);
    h = carver.take<T>(s.lanes * s.batch * state_stride);
    if (s.cell == Cell::lstm) c = carver.take<T>(s.lanes * s.batch * hidden_stride);
    operand = carver.take<O>(s.lanes * s.batch * state_stride);
    if (s.has_projection) unprojected = carver.take<O>(s.lanes * s.batch * hidden_stride);
    if (split.together()) products = carver.take<T>(s.lanes * lane_products());
  }
  Local carve_local(Carver& carver) const {
    Local local;
    local.a = carver.take<const O*>(chunk_rows());
    local.inputs = carver.take<O>(direct_input || s.ids ? 0 : chunk_rows() * input_stride);
    local.units_h = carver.take<T>(hidden_stride);
    local.units_c = carver.take<T>(hidden_stride);
    local.products = split.together() ? products : carver.take<T>(lane_products());
    return local;
  }

  void pack(int thread, int threads) const {
    for (int64_t i = thread; i < s.lanes * panels.count(); i += threads) {
      const int64_t lane = i / panels.count(), p = i % panels.count();
      pack_panel(w_hh, panels, at<S>(x.w_hh, 0), gate_rows, s.state, lane, p);
      if (!s.ids) pack_panel(w_ih, panels, at<S>(x.w_ih, 0), gate_rows, s.input, lane, p);
    }
    for (int64_t i = thread; w_hr && i < s.lanes * projection.count(); i += threads)
      pack_panel(w_hr, projection, at<S>(x.w_hr, 0), s.state, s.hidden, i / projection.count(), i % projection.count());
    if (!has_table) return;
    for (int64_t i = thread; i < s.lanes * s.input; i += threads)
      gather(table + i * stride, i / s.input, i % s.input, 0, gate_rows);
  }

  void run_item(Item item, Local local, Team& team) const {
    if (local.member == 0 && item.done == 0) init_states(item);
    team.barrier.wait(local.members);
    Walk<O> walk(w_hh, panels, s.state, item, s.steps, {local.member, local.members}, INT64_MAX, team.deal.get());
    Walk<O> input_walk(w_ih, panels, s.input, item, 0, {local.member, local.members});
    Walk<O> projection_walk(w_hr, projection, s.hidden, item, 0, {local.member, local.members});
    for (int64_t step = item.done; step < s.steps; ++step) {
      if (step % chunk_steps() == 0) team.share(item, step);
      if (step % chunk_steps() == 0 && !has_table) multiply_inputs(item, local, input_walk, step);
      multiply_rows(walk, panels, s.state, step, local.a,
                    [&](int64_t lane) {
                      const int64_t rows = alive(s, item, s.time(lane, step));
                      for (int64_t r = 0; r < rows; ++r)
                        local.a[r] = operand + (lane * s.batch + item.first + r) * state_stride;
                      return rows;
                    },
                    [&](int64_t lane) { return products_h(item, local, lane); }, stride);
      if (!end_step(team, local, walk, input_walk, projection_walk)) return;
      for (int64_t lane = item.lane; lane < item.lane_end; ++lane) finish_rows(item, local, lane, step);
      team.barrier.wait(local.members);
      if (s.has_projection) project(item, local, projection_walk, step, team.barrier);
    }
    if (local.member == 0) finish_states(item);
  }
  int64_t pieces() const { return s.lanes * panels.count(); }

 private:
  struct Place {
    int64_t lane, row, b;
  };

  int64_t chunk_steps() const { return steps_of_chunk(s, split); }
  int64_t chunk_rows() const { return chunk_steps() * item_rows(s, split); }
  int64_t lane_products() const { return ((has_table ? 0 : chunk_rows()) + item_rows(s, split)) * stride; }
  T* products_x(const Item& item, const Local& local, int64_t lane) const {
    return local.products + (lane - item.lane) * lane_products();
  }
  T* products_h(const Item& item, const Local& local, int64_t lane) const {
    return products_x(item, local, lane) + (has_table ? 0 : chunk_rows()) * stride;
  }
  // Rows of the chunk that come before those of this step.
  int64_t chunk_row(const Item& item, int64_t lane, int64_t step) const {
    int64_t row = 0;
    for (int64_t i = step - step % chunk_steps(); i < step; ++i) row += alive(s, item, s.time(lane, i));
    return row;
  }

  void gather(T* to, int64_t lane, int64_t id, int64_t first, int64_t end) const {
    for (int64_t m = first; m < min64(end, gate_rows); ++m)
      to[m] = widen(*at<S>(x.w_ih, (lane * gate_rows + m) * s.input + id));
  }

  void init_states(const Item& item) const {
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane)
      for (int64_t b = item.first; b < item.end; ++b) {
        const int64_t state = lane * s.batch + b;
        // The other half of a last, odd, pair.
        if (s.state % Product<O>::depth) operand[state * state_stride + s.state] = O{};
        if (unprojected && s.hidden % Product<O>::depth) unprojected[state * hidden_stride + s.hidden] = O{};
        for (int64_t j = 0; j < s.state; j += V) {
          const int n = int(min64(V, s.state - j));
          store_state({lane, 0, b}, j, n, load(at<S>(x.h_0, state * s.state + j), n));
        }
        for (int64_t j = 0; c && j < s.hidden; j += V)
          store(c + state * hidden_stride + j, load(at<S>(x.c_0, state * s.hidden + j), int(min64(V, s.hidden - j))));
      }
  }
  void store_state(const Place& place, int64_t j, int n, Vec<T> value) const {
    const int64_t state = place.lane * s.batch + place.b;
    store(h + state * state_stride + j, value);
    if (e.recurrent_mask) value *= load(at<S>(e.recurrent_mask, state * s.state + j), n);
    store(operand + state * state_stride + j, value, n);
  }
  void finish_states(const Item& item) const {
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane)
      for (int64_t b = item.first; b < item.end; ++b) {
        const int64_t state = lane * s.batch + b;
        convert_row(at<S>(x.h_n, state * s.state), h + state * state_stride, s.state);
        if (c) convert_row(at<S>(x.c_n, state * s.hidden), c + state * hidden_stride, s.hidden);
      }
  }

  // The input's products of the chunk that begins with this step.
  void multiply_inputs(const Item& item, const Local& local, Walk<O>& walk, int64_t step) const {
    if (s.ids) {
      for (int64_t lane = item.lane; lane < item.lane_end; ++lane) gather_inputs(item, local, lane, step);
      return;
    }
    multiply_rows(walk, panels, s.input, step, local.a,
                  [&](int64_t lane) {
                    int64_t rows = 0;
                    for_chunk(item, lane, step, [&](int64_t row) {
                      O* const buffer = local.inputs + rows * input_stride;
                      local.a[rows++] = as_operand(at<S>(x.input, row * s.input), s.input, buffer);
                    });
                    return rows;
                  },
                  [&](int64_t lane) { return products_x(item, local, lane); }, stride);
  }
  void gather_inputs(const Item& item, const Local& local, int64_t lane, int64_t step) const {
    T* out = products_x(item, local, lane);
    const Slice slice = slice_of(panels.count(), local.member, local.members);
    const int64_t first = slice.first * panels.vectors * V, end = slice.end * panels.vectors * V;
    for_chunk(item, lane, step, [&](int64_t row) {
      gather(out, lane, *at<int64_t>(x.input, row), first, end);
      out += stride;
    });
  }
  // f(row), for the item's rows in the chunk that begins with this step.
  template <class F>
  void for_chunk(const Item& item, int64_t lane, int64_t step, F f) const {
    for (int64_t i = step; i < min64(step + chunk_steps(), s.steps); ++i) {
      const int64_t t = s.time(lane, i), n = alive(s, item, t), first = s.offset_at(t) + item.first;
      for (int64_t row = first; row < first + n; ++row) f(row);
    }
  }

  void finish_rows(const Item& item, const Local& local, int64_t lane, int64_t step) const {
    const int64_t t = s.time(lane, step), first_row = s.offset_at(t) + item.first;
    const T *of_input = products_x(item, local, lane), *of_state = products_h(item, local, lane);
    if (!has_table) of_input += chunk_row(item, lane, step) * stride;
    own_rows(local, alive(s, item, t), [&](int64_t r) {
      const T* from = of_input + r * stride;
      if (has_table) from = table + (lane * s.input + *at<int64_t>(x.input, first_row + r)) * stride;
      finish_row({lane, first_row + r, item.first + r}, local, from, of_state + r * stride);
    });
  }

  void finish_row(const Place& place, const Local& local, const T* of_input, const T* of_state) const {
    const int64_t H = s.hidden;
    const GatesOfRow<S> from_input(s, of_input, e.gain_ih, x.b_ih, place.lane);
    const GatesOfRow<S> from_state(s, of_state, e.gain_hh, x.b_hh, place.lane);
    S* tape = x.tape ? at<S>(x.tape, (place.lane * s.rows + place.row) * columns.width) : nullptr;
    if (tape && e.normalised()) {
      convert_row(tape + columns.products, of_input, gate_rows);
      convert_row(tape + columns.products + gate_rows, of_state, gate_rows);
    }
    const int64_t state = (place.lane * s.batch + place.b) * hidden_stride;
    for (int64_t j = 0; j < H; j += V) {
      const int n = int(min64(V, H - j));
      const auto sum = [&](int gate) { return from_input(gate, j, n) + from_state(gate, j, n); };
      const auto keep = [&](int k, Vec<T> value) {
        if (tape) store(tape + k * H + j, value, n);
      };
      switch (s.cell) {
        case Cell::rnn_tanh: store(local.units_h + j, Math<T>::tanh(sum(0))); break;
        case Cell::rnn_relu: store(local.units_h + j, relu(sum(0))); break;
        case Cell::lstm: {
          Vec<T> i = sum(0), f = sum(1), g = sum(2), o = sum(3), c_now = load(c + state + j);
          const auto peephole = [&](int k) { return load(at<S>(e.peepholes, (place.lane * 3 + k) * H + j), n) * c_now; };
          if (e.peepholes) i += peephole(0), f += peephole(1);
          lstm_state<Math<T>>(i, f, g, c_now);
          if (e.peepholes) o += peephole(2);
          store(local.units_h + j, o);
          store(local.units_c + j, c_now);
          keep(0, i);
          keep(1, f);
          keep(2, g);
          keep(4, c_now);
          break;
        }
        case Cell::gru: {
          Vec<T> r = sum(0), z = sum(1), n_x = from_input(2, j, n);
          const Vec<T> n_h = from_state(2, j, n);
          store(local.units_h + j, gru_forward<Math<T>>(r, z, n_x, n_h, load(h + state + j)));
          keep(0, r);
          keep(1, z);
          keep(2, n_x);
          keep(3, n_h);
          break;
        }
      }
    }
    finish_units(place, local, tape);
  }

  // An LSTM's output, zoneout, and where the states go; h, if it is projected first, by `project`.
  void finish_units(const Place& place, const Local& local, S* tape) const {
    const int64_t H = s.hidden, state = (place.lane * s.batch + place.b) * hidden_stride;
    const int64_t flags = (place.lane * s.rows + place.row) * H;
    Moments<T> of_c{};
    if (e.gain_c) of_c = moments(local.units_c, H);
    for (int64_t j = 0; j < H; j += V) {
      const int n = int(min64(V, H - j));
      Vec<T> value = load(local.units_h + j);
      if (c) {
        const Vec<T> c_now = load(local.units_c + j), c_after = zone_out(e.zoneout_c, e.share_c, flags + j, n,
                                                                         load(c + state + j), c_now);
        Vec<T> read = c_now;
        if (e.gain_c)
          read = normalised(local.units_c + j, n, of_c) * load(at<S>(e.gain_c, place.lane * H + j), n) +
                 load(at<S>(e.bias_c, place.lane * H + j), n);
        Vec<T> o = value;
        value = lstm_output<Math<T>>(o, read);
        if (tape) store(tape + 3 * H + j, o, n);
        store(c + state + j, c_after);
        if (tape && e.zones_c()) store(tape + columns.c + j, c_after, n);
      } else if (tape && s.gates() == 1 && e.zones_h()) {
        store(tape + columns.h + j, value, n);
      }
      if (unprojected)
        store(unprojected + state + j, value, n);
      else
        finish_state(place, j, n, value);
    }
  }

  void finish_state(const Place& place, int64_t j, int n, Vec<T> value) const {
    value = zone_out(e.zoneout_h, e.share_h, (place.lane * s.rows + place.row) * s.state + j, n,
                     load(h + (place.lane * s.batch + place.b) * state_stride + j), value);
    store_state(place, j, n, value);
    store(at<S>(x.output, (place.row * s.lanes + place.lane) * s.state + j), value, n);
  }

  void project(const Item& item, const Local& local, Walk<O>& walk, int64_t step, Barrier& barrier) const {
    multiply_rows(walk, projection, s.hidden, step, local.a,
                  [&](int64_t lane) {
                    const int64_t rows = alive(s, item, s.time(lane, step));
                    for (int64_t r = 0; r < rows; ++r)
                      local.a[r] = unprojected + (lane * s.batch + item.first + r) * hidden_stride;
                    return rows;
                  },
                  [&](int64_t lane) { return products_h(item, local, lane); }, stride);
    barrier.wait(local.members);
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane) {
      const int64_t t = s.time(lane, step), row = s.offset_at(t) + item.first;
      own_rows(local, alive(s, item, t), [&](int64_t r) {
        const T* product = products_h(item, local, lane) + r * stride;
        for (int64_t j = 0; j < s.state; j += V)
          finish_state({lane, row + r, item.first + r}, j, int(min64(V, s.state - j)), load(product + j));
      });
    }
    barrier.wait(local.members);
  }

  static Vec<T> zone_out(const bool* stays, double share, int64_t at_, int n, Vec<T> before, Vec<T> after) {
    if (stays) return select<T>(stays + at_, n, before, after);
    return share == 0 ? after : after + splat(T(share)) * (before - after);
  }
};

}  // namespace rnnfast::RNNFAST_ISA
