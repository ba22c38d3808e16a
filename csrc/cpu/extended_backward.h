// The backward scan of a layer whose recurrence is extended, and the gradients of gains and peepholes.
#pragma once

#include "backward.h"
#include "extended.h"
#include "sums.h"
#include "weight_gradients.h"

namespace rnnfast::RNNFAST_ISA {

// From the gradient d of n normalised units times gain, plus a shift, to that of x.
template <class S, class D, class X>
void norm_backward(int64_t n, const D* d, const X* x, const S* gain, Moments<Compute<S>> m, D* d_x) {
  using T = Compute<S>;
  constexpr int V = Lanes<T>::count;
  Vec<T> sum{}, along{};
  for (int64_t j = 0; j < n; j += V) {
    const int k = int(min64(V, n - j));
    const Vec<T> d_unit = load(d + j, k) * load(gain + j, k);
    sum += d_unit;
    along += d_unit * normalised(x + j, k, m);
  }
  const Vec<T> mean = splat(total<T>(sum) / T(n)), slope = splat(total<T>(along) / T(n));
  for (int64_t j = 0; j < n; j += V) {
    const int k = int(min64(V, n - j));
    const Vec<T> d_unit = load(d + j, k) * load(gain + j, k);
    store(d_x + j, (d_unit - mean - slope * normalised(x + j, k, m)) * splat(m.scale), k);
  }
}

template <class S, class O>
class ExtendedBackward {
  using T = typename Product<O>::T;
  static constexpr int V = LANES<O>;

  const ExtendedBackwardArgs& args;
  const BackwardArgs& x;
  const Extension& e;
  const ScanShape& s;
  const Split& split;
  const ExtendedTape columns;
  const Panels states, units_;
  const int64_t gate_rows, state_stride, hidden_stride, product_stride;

  O *w_hh = nullptr, *w_hr = nullptr;        // packed: d_gates_h w_hh, d_state w_hr
  T *carry_h = nullptr, *carry_c = nullptr;  // (D, B, state_stride or hidden_stride): what goes past w_hh to the state before
  T* products = nullptr;                     // (D, B, product_stride), of a team; else each thread has its own
  T* d_read = nullptr;                       // (D, N, hidden_stride): gradients of what an LSTM's output reads
  Moments<T>* row_moments = nullptr;         // (D, N, 5): of the input's products, the state's, and of c

 public:
  Gradients<S, O> gates;    // of the gates, which the biases shift
  Gradients<S, O> weighted;  // of the products, where those are normalised first

  struct Local {
    const O** a;
    T *d_read, *d_c;  // of one row
    T* products;
    int member, members;
  };

  static Panels panels_of(const ScanShape& s) { return plain_panels(s.state, V, s.batch); }

  ExtendedBackward(const ExtendedBackwardArgs& all, const Split& how)
      : args(all),
        x(all.scan),
        e(all.extension),
        s(x.shape),
        split(how),
        columns(s, e),
        states(panels_of(s)),
        units_(plain_panels(s.hidden, V)),
        gate_rows(s.gates() * s.hidden),
        state_stride(round_up(s.state, V * Product<O>::depth)),
        hidden_stride(round_up(s.hidden, V * Product<O>::depth)),
        product_stride(max64(states.total_vectors, units_.total_vectors) * V),
        gates(s),
        weighted(s, true) {}
  const Gradients<S, O>& of_products() const { return e.normalised() ? weighted : gates; }

  void carve(Carver& carver) {
    const int64_t sequences = s.lanes * s.batch, rows = s.lanes * s.rows;
    w_hh = carver.take<O>(s.lanes * packed_size<O>(states, gate_rows));
    if (s.has_projection) w_hr = carver.take<O>(s.lanes * packed_size<O>(units_, s.state));
    carry_h = carver.take<T>(sequences * state_stride);
    if (s.cell == Cell::lstm) carry_c = carver.take<T>(sequences * hidden_stride);
    if (split.together()) products = carver.take<T>(sequences * product_stride);
    gates.carve(carver);
    if (e.recurrent_mask) gates.states = weighted.states = carver.take<S>(rows * s.state);
    if (!e.normalised()) return;
    weighted.gates = carver.take<O>(rows * weighted.stride);
    weighted.state = gates.state;
    weighted.unprojected = gates.unprojected;
    row_moments = carver.take<Moments<T>>(rows * 5);
    if (s.cell == Cell::lstm) d_read = carver.take<T>(rows * hidden_stride);
  }
  Local carve_local(Carver& carver) const {
    Local local;
    local.a = carver.take<const O*>(item_rows(s, split));
    local.d_read = carver.take<T>(hidden_stride);
    local.d_c = carver.take<T>(hidden_stride);
    local.products = split.together() ? products : carver.take<T>(item_rows(s, split) * product_stride);
    return local;
  }

  void pack(int thread, int threads) const {
    pack(w_hh, states, x.w_hh, gate_rows, s.state, thread, threads);
    if (w_hr) pack(w_hr, units_, x.w_hr, s.state, s.hidden, thread, threads);
  }

  void run_item(Item item, Local local, Team& team) const {
    if (local.member == 0 && item.done == 0) init_carries(item);
    team.barrier.wait(local.members);
    Walk<O> walk(w_hh, states, gate_rows, item, s.steps + 1, {local.member, local.members}, INT64_MAX, team.deal.get());
    Walk<O> projection_walk(w_hr, units_, s.state, item, 0, {local.member, local.members});
    for (int64_t step = s.steps - 1 - item.done; step >= 0; --step) {
      team.share(item, s.steps - 1 - step);
      // Of the rows of a step, those come first that have a step after it.
      multiply(item, local, walk, step, [&](int64_t lane) { return followed(item, lane, step); },
               [&](int64_t lane, int64_t) { return s.time(lane, step + 1); });
      if (!end_step(team, local, walk, projection_walk)) return;
      if (s.has_projection) through_projection(item, local, projection_walk, step, team.barrier);
      each_row(item, local, step, [&](const Place& place, const T* from_after, const T* from_projection) {
        row_gradients(place, local, from_after, from_projection);
      });
      team.barrier.wait(local.members);
    }
    multiply(item, local, walk, -1, [&](int64_t) { return item.end - item.first; },
             [&](int64_t lane, int64_t b) { return s.reversed(lane) ? last_step(s, b) : 0; });
    team.barrier.wait(local.members);
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane)
      own_rows(local, item.end - item.first,
               [&](int64_t r) { initial_gradients(lane, item.first + r, product(item, local, lane, r)); });
    team.barrier.wait(local.members);
  }
  int64_t pieces() const { return s.lanes * states.count(); }

  // ---- gains and peepholes: parallel in time, as the gradients in weight_gradients.h -------------------------------

  int64_t tasks() const { return s.lanes * (gate_blocks() + cell_blocks() + peephole_blocks()); }
  static size_t task_bytes() { return 3 * SUM_COLUMNS * sizeof(T); }
  void run(int64_t task, char* local) const {
    const int64_t lane = task % s.lanes, block = task / s.lanes, of_cell = block - gate_blocks();
    T* sums = reinterpret_cast<T*>(local);
    if (of_cell >= cell_blocks()) return peepholes(lane, (of_cell - cell_blocks()) * SUM_COLUMNS, sums);
    if (of_cell >= 0) return cell_gains(lane, of_cell * SUM_COLUMNS, sums);
    gate_gains(lane, block / 2 * SUM_COLUMNS, block % 2, sums);
  }

 private:
  int64_t gate_blocks() const { return args.d_gain_ih ? 2 * ceil_div(gate_rows, SUM_COLUMNS) : 0; }
  int64_t cell_blocks() const { return args.d_gain_c ? ceil_div(s.hidden, SUM_COLUMNS) : 0; }
  int64_t peephole_blocks() const { return args.d_peepholes ? ceil_div(s.hidden, SUM_COLUMNS) : 0; }

  void gate_gains(int64_t lane, int64_t first, bool recurrent, T* sums) const {
    const int64_t end = min64(first + SUM_COLUMNS, gate_rows);
    sum_rows(sums, end - first, s.rows, [&](T* block_sums, int64_t row) {
      const int64_t at_row = lane * s.rows + row;
      const O* d = recurrent ? gates.gates_h(lane, row) : gates.gates_x(lane, row);
      const S* product = at<S>(x.tape, at_row * columns.width + columns.products) + (recurrent ? gate_rows : 0);
      for (int i = 0; i < norm_groups(s); ++i) {
        const NormGroup group = norm_group(s, i);
        const Moments<T> m = row_moments[at_row * 5 + 2 * recurrent + i];
        for (int64_t k = max64(first, group.first); k < min64(end, group.first + group.size); k += V) {
          const int n = int(min64(V, min64(end, group.first + group.size) - k));
          const Vec<T> d_gate = load(d + (recurrent ? k : gates.column_x(k)), n);
          store(block_sums + k - first, load(block_sums + k - first, n) + d_gate * normalised(product + k, n, m), n);
        }
      }
    });
    convert_row(at<S>(recurrent ? args.d_gain_hh : args.d_gain_ih, lane * gate_rows + first), sums, end - first);
  }

  struct Place {
    int64_t lane, row, b, t;
  };

  // A weight of k rows of `columns` a lane, to be multiplied with rows of k.
  void pack(O* to, const Panels& of, const void* weight, int64_t k, int64_t columns, int thread, int threads) const {
    const auto row = [&](int64_t lane, int64_t r) { return at<S>(weight, (lane * k + r) * columns); };
    pack_weight(to, of, s.lanes, k, columns, row, thread, threads);
  }

  // How many rows of a step have a step after it.
  int64_t followed(const Item& item, int64_t lane, int64_t step) const {
    if (step + 1 == s.steps) return 0;
    return min64(alive(s, item, s.time(lane, step)), alive(s, item, s.time(lane, step + 1)));
  }
  const T* product(const Item& item, const Local& local, int64_t lane, int64_t r) const {
    return local.products + ((lane - item.lane) * s.batch * split.together() + r) * product_stride;
  }
  // What w_hh brings back from the gates of rows(lane) rows, of the steps time_of(lane, b).
  template <class Rows, class F>
  void multiply(const Item& item, const Local& local, Walk<O>& walk, int64_t step, Rows rows, F time_of) const {
    multiply_rows(walk, states, gate_rows, step, local.a,
                  [&](int64_t lane) {
                    const int64_t n = rows(lane);
                    for (int64_t b = item.first; b < item.first + n; ++b)
                      local.a[b - item.first] = of_products().gates_h(lane, s.offset_at(time_of(lane, b)) + b);
                    return n;
                  },
                  [&](int64_t lane) { return const_cast<T*>(product(item, local, lane, 0)); }, product_stride);
  }
  // f(place, what w_hh brings back from the step after or null where there is none, or what w_hr brings back), for each
  // row of a step that is this member's.
  template <class F>
  void each_row(const Item& item, const Local& local, int64_t step, F f) const {
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane) {
      const int64_t t = s.time(lane, step), row = s.offset_at(t) + item.first, n = followed(item, lane, step);
      own_rows(local, alive(s, item, t), [&](int64_t r) {
        const T* p = product(item, local, lane, r);
        f({lane, row + r, item.first + r, t}, r < n ? p : nullptr, p);
      });
    }
  }
  // From the gradient of the projected states to that of what was projected, which takes the place of w_hh's products.
  void through_projection(const Item& item, const Local& local, Walk<O>& walk, int64_t step, Barrier& barrier) const {
    each_row(item, local, step, [&](const Place& place, const T* from_after, const T*) {
      O* d = gates.state + (place.lane * s.rows + place.row) * state_stride;
      for (int64_t j = 0; j < s.state; j += V)
        store(d + j, state_gradient(place, j, int(min64(V, s.state - j)), from_after));
    });
    barrier.wait(local.members);
    multiply_rows(walk, units_, s.state, step, local.a,
                  [&](int64_t lane) {
                    const int64_t t = s.time(lane, step), rows = alive(s, item, t);
                    const int64_t row = lane * s.rows + s.offset_at(t) + item.first;
                    for (int64_t r = 0; r < rows; ++r) local.a[r] = gates.state + (row + r) * state_stride;
                    return rows;
                  },
                  [&](int64_t lane) { return const_cast<T*>(product(item, local, lane, 0)); }, product_stride);
    barrier.wait(local.members);
  }

  void init_carries(const Item& item) const {
    for (int64_t lane = item.lane; lane < item.lane_end; ++lane)
      for (int64_t b = item.first; b < item.end; ++b) {
        const int64_t state = lane * s.batch + b;
        init_carry(carry_h + state * state_stride, x.d_h_n, state, s.state);
        if (carry_c) init_carry(carry_c + state * hidden_stride, x.d_c_n, state, s.hidden);
      }
  }
  static void init_carry(T* carry, const void* from, int64_t state, int64_t size) {
    for (int64_t j = 0; j < size; j += V)
      store(carry + j, from ? load(at<S>(from, state * size + j), int(min64(V, size - j))) : Vec<T>{});
  }
  void initial_gradients(int64_t lane, int64_t b, const T* product) const {
    const int64_t state = lane * s.batch + b;
    for (int64_t j = 0; j < s.state; j += V) {
      const int n = int(min64(V, s.state - j));
      const Vec<T> d_h = masked(product, state, j, n) + load(carry_h + state * state_stride + j);
      store(at<S>(x.d_h_0, state * s.state + j), d_h, n);
    }
    if (s.cell == Cell::lstm) convert_row(at<S>(x.d_c_0, state * s.hidden), carry_c + state * hidden_stride, s.hidden);
  }
  Vec<T> masked(const T* product, int64_t state, int64_t j, int n) const {
    const Vec<T> d = load(product + j);
    return e.recurrent_mask ? d * load(at<S>(e.recurrent_mask, state * s.state + j), n) : d;
  }

  // Of the gradient d of a state that zoneout may have kept: what is the new state's, and in `kept` what is that before.
  static Vec<T> zone_out_backward(const bool* stays, double share, int64_t at_, int n, Vec<T> d, Vec<T>& kept) {
    if (stays) {
      kept = select<T>(stays + at_, n, d, Vec<T>{});
      return select<T>(stays + at_, n, Vec<T>{}, d);
    }
    kept = share == 0 ? Vec<T>{} : splat(T(share)) * d;
    return share == 0 ? d : d - kept;
  }

  // The gradient of units j.. of h as the cell made it, or its projection, before zoneout. `from_after`: see each_row.
  Vec<T> state_gradient(const Place& place, int64_t j, int n, const T* from_after) const {
    const int64_t state = place.lane * s.batch + place.b, row = place.lane * s.rows + place.row;
    T* carry = carry_h + state * state_stride + j;
    if (gates.states) {
      const Vec<T> h = load(h_before<S>(x, place.lane, place.b, row_before(s, place.lane, place.t, place.b)) + j, n);
      store(gates.states + row * s.state + j, h * load(at<S>(e.recurrent_mask, state * s.state + j), n), n);
    }
    Vec<T> d_h = load(carry), kept;
    if (x.d_output) d_h += load(at<S>(x.d_output, (place.row * s.lanes + place.lane) * s.state + j), n);
    if (from_after) d_h += masked(from_after, state, j, n);
    d_h = zone_out_backward(e.zoneout_h, e.share_h, row * s.state + j, n, d_h, kept);
    store(carry, kept);
    return d_h;
  }

  // From the gradient of the states after a row's step to those of its gates and of the states before.
  void row_gradients(const Place& place, const Local& local, const T* from_after, const T* from_projection) const {
    const int64_t H = s.hidden, state = place.lane * s.batch + place.b, row = place.lane * s.rows + place.row;
    const int64_t before = row_before(s, place.lane, place.t, place.b), out = (place.row * s.lanes + place.lane) * H;
    const S* const h = h_before<S>(x, place.lane, place.b, before);
    const S* tape = at<S>(x.tape, row * columns.width);
    O* d = gates.gates + row * gates.stride;
    T* d_reads = d_read ? d_read + row * hidden_stride : local.d_read;
    Moments<T> of_c{};
    if (e.gain_c) of_c = row_moments[row * 5 + 4] = moments(tape + 4 * H, H);
    for (int64_t j = 0; j < H; j += V) {
      const int n = int(min64(V, H - j));
      const Vec<T> d_h = s.has_projection ? load(from_projection + j) : state_gradient(place, j, n, from_after);
      switch (s.cell) {
        case Cell::rnn_tanh:
        case Cell::rnn_relu: {
          const Vec<T> y = load(e.zones_h() ? tape + columns.h + j : at<S>(x.output, out + j), n);
          store(d + j, s.cell == Cell::rnn_tanh ? rnn_tanh_backward(y, d_h) : rnn_relu_backward(y, d_h), n);
          break;
        }
        case Cell::lstm: {
          Vec<T> o = load(tape + 3 * H + j, n), read = load(tape + 4 * H + j, n);
          if (e.gain_c)
            read = normalised(tape + 4 * H + j, n, of_c) * load(at<S>(e.gain_c, place.lane * H + j), n) +
                   load(at<S>(e.bias_c, place.lane * H + j), n);
          if (gates.unprojected) store(gates.unprojected + row * hidden_stride + j, o * Math<T>::tanh(read));
          store(d_reads + j, lstm_output_backward<Math<T>>(o, read, d_h));
          store(d + 3 * H + j, o, n);
          break;
        }
        case Cell::gru: {
          Vec<T> r = load(tape + j, n), z = load(tape + H + j, n), n_x = load(tape + 2 * H + j, n);
          Vec<T> n_h = load(tape + 3 * H + j, n);
          T* carry = carry_h + state * state_stride + j;
          store(carry, load(carry) + gru_backward<Math<T>>(r, z, n_x, n_h, load(h + j, n), d_h));
          store(d + j, n_x, n);
          store(d + H + j, r, n);
          store(d + 2 * H + j, z, n);
          store(d + 3 * H + j, n_h, n);
          break;
        }
      }
    }
    if (s.cell == Cell::lstm) cell_gradients(place, before, tape, d_reads, local.d_c, of_c, d);
    if (Product<O>::depth > 1) d[gates.width] = O{};  // the other half of a last, odd, pair
    if (e.normalised()) product_gradients(place.lane, place.row, tape + columns.products, d);
  }

  void cell_gradients(const Place& place, int64_t before, const S* tape, const T* d_reads, T* d_c, Moments<T> of_c,
                      O* d) const {
    const int64_t H = s.hidden, state = place.lane * s.batch + place.b, row = place.lane * s.rows + place.row;
    const S* c_before = cell_before(place.lane, before, place.b);
    T* carry = carry_c + state * hidden_stride;
    const T* by_output = d_reads;
    if (e.gain_c) {
      norm_backward(H, d_reads, tape + 4 * H, at<S>(e.gain_c, place.lane * H), of_c, d_c);
      by_output = d_c;
    }
    for (int64_t j = 0; j < H; j += V) {
      const int n = int(min64(V, H - j));
      Vec<T> i = load(tape + j, n), f = load(tape + H + j, n), g = load(tape + 2 * H + j, n), kept;
      Vec<T> d_now = zone_out_backward(e.zoneout_c, e.share_c, row * H + j, n, load(carry + j), kept);
      d_now += load(by_output + j);
      const auto peephole = [&](int k) { return load(at<S>(e.peepholes, (place.lane * 3 + k) * H + j), n); };
      if (e.peepholes) d_now += load(d + 3 * H + j, n) * peephole(2);
      lstm_state_backward(i, f, g, load(c_before + j, n), d_now);
      if (e.peepholes) d_now += i * peephole(0) + f * peephole(1);
      store(carry + j, d_now + kept);
      store(d + j, i, n);
      store(d + H + j, f, n);
      store(d + 2 * H + j, g, n);
    }
  }

  const S* cell_before(int64_t lane, int64_t before, int64_t b) const {
    return before >= 0 ? at<S>(x.tape, (lane * s.rows + before) * columns.width + columns.c)
                       : at<S>(x.c_0, (lane * s.batch + b) * s.hidden);
  }

  void product_gradients(int64_t lane, int64_t row, const S* tape, const O* d) const {
    O* to = weighted.gates + (lane * s.rows + row) * weighted.stride;
    for (int i = 0; i < norm_groups(s); ++i) {
      const NormGroup group = norm_group(s, i);
      for (int recurrent = 0; recurrent < 2; ++recurrent) {
        const S* product = tape + recurrent * gate_rows + group.first;
        const Moments<T> m = moments(product, group.size);
        row_moments[(lane * s.rows + row) * 5 + 2 * recurrent + i] = m;
        norm_backward(group.size, d + (recurrent ? gates.last + group.first : gates.column_x(group.first)), product,
                      at<S>(recurrent ? e.gain_hh : e.gain_ih, lane * gate_rows + group.first), m,
                      to + recurrent * gate_rows + group.first);
      }
    }
    if (Product<O>::depth > 1) to[weighted.width] = O{};
  }

  void cell_gains(int64_t lane, int64_t first, T* sums) const {
    const int64_t n = min64(SUM_COLUMNS, s.hidden - first);
    for (int shift = 0; shift < 2; ++shift) {
      sum_rows(sums, n, s.rows, [&](T* block, int64_t row) {
        const int64_t at_row = lane * s.rows + row;
        const S* c = at<S>(x.tape, at_row * columns.width + 4 * s.hidden + first);
        for (int64_t j = 0; j < n; j += V) {
          const int k = int(min64(V, n - j));
          Vec<T> d = load(d_read + at_row * hidden_stride + first + j, k);
          if (!shift) d *= normalised(c + j, k, row_moments[at_row * 5 + 4]);
          store(block + j, load(block + j, k) + d, k);
        }
      });
      convert_row(at<S>(shift ? args.d_bias_c : args.d_gain_c, lane * s.hidden + first), sums, n);
    }
  }

  void peepholes(int64_t lane, int64_t first, T* sums) const {
    const int64_t n = min64(SUM_COLUMNS, s.hidden - first);
    StepOfRow step_of(s);
    for (int k = 0; k < 3; ++k) {
      const int gate = k == 2 ? 3 : k;  // i f o, of i f g o
      sum_rows(sums, n, s.rows, [&](T* block, int64_t row) {
        const int64_t t = step_of(row), b = row - s.offset_at(t);
        const S* seen = k == 2 ? at<S>(x.tape, (lane * s.rows + row) * columns.width + 4 * s.hidden)
                               : cell_before(lane, row_before(s, lane, t, b), b);
        const O* d = gates.gates_x(lane, row) + gate * s.hidden;
        for (int64_t j = first; j < first + n; j += V) {
          const int count = int(min64(V, first + n - j));
          T* sum = block + j - first;
          store(sum, load(sum, count) + load(d + j, count) * load(seen + j, count), count);
        }
      });
      convert_row(at<S>(args.d_peepholes, (lane * 3 + k) * s.hidden + first), sums, n);
    }
  }
};

}  // namespace rnnfast::RNNFAST_ISA
