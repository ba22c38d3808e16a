// One pair of a batch row and a hidden unit at one step, forward and backward: what it reads, the cell's math, what it
// stores. Every kernel of this backend, persistent or a step at a time, is built on these.
//
// A value from memory is waited for where something is first done with it, and a multiprocessor does a thread's instructions
// in order. So what is fetched is kept as it is stored, and nothing, not even a conversion, is done with it before its step.
#pragma once

#include "layout.h"
#include "math.cuh"

namespace rnnfast::cuda {

enum class Kind { rnn, lstm, gru };  // tanh and relu are one kernel
constexpr int gates_of(Kind kind) { return kind == Kind::lstm ? 4 : kind == Kind::gru ? 3 : 1; }
constexpr int tape_of(Kind kind) { return kind == Kind::lstm ? 5 : kind == Kind::gru ? 4 : 0; }

// How one lane and its team's rows of the batch walk through time.
struct Walk {
  const ScanParams& p;
  int lane;
  bool reversed;

  RNNFAST_DEVICE Walk(const ScanParams& p, int lane) : p(p), lane(lane), reversed(p.bidirectional && (lane & 1)) {}

  // The row of `batch_row` at the i-th step walked, or -1 where its sequence has no such step.
  RNNFAST_DEVICE int row(int i, int batch_row) const {
    hw::hold(i);  // or what follows from it is kept from step to step
    const bool there = static_cast<unsigned>(i) < static_cast<unsigned>(p.steps);
    const int t = reversed ? p.steps - 1 - i : i;
    // Unsigned: of a packed batch, which does not use it, it may be more than an int holds.
    int row = static_cast<int>(static_cast<unsigned>(t) * p.batch + batch_row);
    if (p.offsets && there) {
      row = static_cast<int>(p.offsets[t]) + batch_row;
      if (row >= static_cast<int>(p.offsets[t + 1])) row = -1;
    }
    return there ? row : -1;
  }

  // Places in the tensors of docs/design.md. Only what may pass 2^31 is computed in 64 bits: a row's length does not.
  RNNFAST_DEVICE int64_t state(int batch_row, int unit) const {
    return int64_t{lane * p.batch + batch_row} * p.hidden + unit;
  }
  RNNFAST_DEVICE int64_t output(int row, int unit) const {
    return int64_t{row} * (p.lanes * p.hidden) + (lane * p.hidden + unit);
  }
  RNNFAST_DEVICE int64_t tape(int row, int unit, int values) const {
    return (int64_t{lane} * p.rows + row) * (values * p.hidden) + unit;
  }
  RNNFAST_DEVICE int64_t gate(int row, int unit, int gates) const {
    return int64_t{row} * (p.lanes * gates * p.hidden) + (lane * gates * p.hidden + unit);
  }
};

// Where a pair lies within the layer.
struct Place {
  int batch_row, unit;
};

// A pair's input, which any thread may fetch.
template <class M, Kind KIND>
struct Input {
  using Sum = typename M::Sum;
  static constexpr int kGates = gates_of(KIND);

  int row = -1;  // of the step that was found last, or -1 where the sequence has no such step

  // Finds a step's row, and has take(from) fetch its token id, if there are any. On its own: what waits for an id waits for all
  // that was asked for before it.
  template <class Take>
  RNNFAST_DEVICE void find(const Walk& walk, int step, Place at, Take take) {
    row = at.batch_row < walk.p.batch ? walk.row(step, at.batch_row) : -1;
    if (walk.p.ids && row >= 0) take(walk.p.ids + row);
  }

  // Has take(gate, from) fetch what the input adds to each gate of the step that was found, given its token id.
  template <class Take>
  RNNFAST_DEVICE void fetch(const Walk& walk, int64_t id, Place at, Take take) const {
    const ScanParams& p = walk.p;
    if (row < 0) return;
    if (p.ids && (id < 0 || id >= p.gx_rows)) hw::fail("a token id is outside the vocabulary in row", row);
    const int gx_row = p.ids ? static_cast<int>(id) : row;
    const Sum* from = static_cast<const Sum*>(p.gx) + walk.gate(gx_row, at.unit, kGates);
#pragma unroll
    for (int g = 0; g < kGates; ++g) take(g, from + int64_t{g} * p.hidden);
  }
};

template <class M, Kind KIND>
struct ForwardPair {
  using Stored = typename M::Stored;
  using Sum = typename M::Sum;
  static constexpr int kGates = gates_of(KIND), kTape = tape_of(KIND), kSaved = kTape ? kTape : 1;

  Sum h = 0, c = 0;

  // Reads h_0 and c_0 as h and c.
  RNNFAST_DEVICE void start(const Walk& walk, Place at) {
    const int64_t state = walk.state(at.batch_row, at.unit);
    h = hw::widen(static_cast<const Stored*>(walk.p.h_0)[state]);
    if (KIND == Kind::lstm) c = hw::widen(static_cast<const Stored*>(walk.p.c_0)[state]);
  }

  // What b_hh adds to a recurrent product; 0 beyond the layer's units.
  static RNNFAST_DEVICE Sum bias(const Walk& walk, int gate, int unit) {
    const ScanParams& p = walk.p;
    if (!p.b_hh || unit >= p.hidden) return 0;
    return hw::widen(static_cast<const Stored*>(p.b_hh)[(int64_t{walk.lane} * kGates + gate) * p.hidden + unit]);
  }

  // Takes a step, given its input and the recurrent products with b_hh; saves what the tape is to hold. Peers wait for h:
  // it is sent before anything is stored.
  RNNFAST_DEVICE void step(const Walk& walk, const Sum (&gx)[kGates], const Sum (&gh)[kGates], Sum (&saved)[kSaved]) {
    if constexpr (KIND == Kind::rnn) {
      const Sum x = gx[0] + gh[0];
      h = walk.p.relu ? relu(x) : hw::Functions::tanh(x);
    } else if constexpr (KIND == Kind::lstm) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) saved[g] = gx[g] + gh[g];
      h = lstm_forward<hw::Functions>(saved[0], saved[1], saved[2], saved[3], c);
      saved[4] = c;
    } else {
      saved[0] = gx[0] + gh[0];
      saved[1] = gx[1] + gh[1];
      saved[2] = gx[2];
      saved[3] = gh[2];
      h = gru_forward<hw::Functions>(saved[0], saved[1], saved[2], saved[3], h);
    }
  }

  // Stores the output and the tape of the step that was taken, at its row.
  RNNFAST_DEVICE void store(const Walk& walk, int row, Place at, const Sum (&saved)[kSaved]) const {
    const ScanParams& p = walk.p;
    hw::narrow(h, static_cast<Stored*>(p.output)[walk.output(row, at.unit)]);
    if (kTape && p.tape) {
      Stored* tape = static_cast<Stored*>(p.tape) + walk.tape(row, at.unit, kTape);
#pragma unroll
      for (int k = 0; k < kTape; ++k) hw::narrow(saved[k], tape[int64_t{k} * p.hidden]);
    }
  }

  RNNFAST_DEVICE void finish(const Walk& walk, Place at) const {
    const int64_t state = walk.state(at.batch_row, at.unit);
    hw::narrow(h, static_cast<Stored*>(walk.p.h_n)[state]);
    if (KIND == Kind::lstm) hw::narrow(c, static_cast<Stored*>(walk.p.c_n)[state]);
  }
};

template <class M, Kind KIND>
struct BackwardPair {
  using Stored = typename M::Stored;
  using Sum = typename M::Sum;
  static constexpr int kGates = gates_of(KIND), kTape = tape_of(KIND), kInput = KIND == Kind::gru ? kGates + 1 : kGates;

  Sum d_h = 0, d_c = 0;  // what comes to a step from those after it; d_h without what comes through w_hh
  Stored d_output{}, tape[kTape ? kTape : 1] = {};
  Stored before{};  // the state before the step, c (LSTM) or h (GRU); for the RNN its output itself
  int row = -1;

  RNNFAST_DEVICE void start(const Walk& walk, Place at) {
    const int64_t state = walk.state(at.batch_row, at.unit);
    if (walk.p.d_h_n) d_h = hw::widen(static_cast<const Stored*>(walk.p.d_h_n)[state]);
    if (KIND == Kind::lstm && walk.p.d_c_n) d_c = hw::widen(static_cast<const Stored*>(walk.p.d_c_n)[state]);
  }

  // The rows of a step and of the one before it.
  struct Rows {
    int row = -1, previous = -1;
  };

  // Reads where a step's rows are. On its own: what waits for this would wait for all that was asked for before it.
  static RNNFAST_DEVICE Rows find(const Walk& walk, int step, Place at) {
    return {walk.row(step, at.batch_row), kTape ? walk.row(step - 1, at.batch_row) : -1};
  }

  RNNFAST_DEVICE void fetch(const Walk& walk, const Rows& rows, Place at) {
    const ScanParams& p = walk.p;
    row = rows.row;
    if (row < 0) return;
    const Stored* output = static_cast<const Stored*>(p.output);
    if (p.d_output) d_output = static_cast<const Stored*>(p.d_output)[walk.output(row, at.unit)];
    if constexpr (KIND == Kind::rnn) {
      before = output[walk.output(row, at.unit)];
    } else {
      const Stored* from = static_cast<const Stored*>(p.tape) + walk.tape(row, at.unit, kTape);
#pragma unroll
      for (int k = 0; k < kTape; ++k) tape[k] = from[int64_t{k} * p.hidden];
      const int previous = rows.previous;
      const int64_t initial = walk.state(at.batch_row, at.unit);
      if constexpr (KIND == Kind::lstm) {
        const Stored* cells = static_cast<const Stored*>(p.tape) + int64_t{4} * p.hidden;
        before = previous >= 0 ? cells[walk.tape(previous, at.unit, kTape)]
                               : static_cast<const Stored*>(p.c_0)[initial];
      } else {
        before = previous >= 0 ? output[walk.output(previous, at.unit)]
                               : static_cast<const Stored*>(p.h_0)[initial];
      }
    }
  }

  // Takes the fetched step back; gives the gradients of its recurrent products, and behind them, of a GRU, that of the input's
  // n. Peers wait for the former: they are sent before anything is stored.
  RNNFAST_DEVICE void step(const Walk& walk, Sum (&d_gates)[kInput]) {
    const Sum d = d_h + hw::widen(d_output), state = hw::widen(before);
    if constexpr (KIND == Kind::rnn) {
      d_gates[0] = walk.p.relu ? rnn_relu_backward(state, d) : rnn_tanh_backward(state, d);
      d_h = 0;
    } else if constexpr (KIND == Kind::lstm) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) d_gates[g] = hw::widen(tape[g]);
      const Sum c = hw::widen(tape[4]);
      lstm_backward<hw::Functions>(d_gates[0], d_gates[1], d_gates[2], d_gates[3], c, state, d, d_c);
      d_h = 0;
    } else {
      d_gates[0] = hw::widen(tape[0]);
      d_gates[1] = hw::widen(tape[1]);
      d_gates[3] = hw::widen(tape[2]);
      d_gates[2] = hw::widen(tape[3]);
      d_h = gru_backward<hw::Functions>(d_gates[0], d_gates[1], d_gates[3], d_gates[2], state, d);
    }
  }

  // Stores the gradients of the step that was taken back, at its row.
  RNNFAST_DEVICE void store(const Walk& walk, Place at, const Sum (&d_gates)[kInput]) const {
    const ScanParams& p = walk.p;
    Stored* d_gx = static_cast<Stored*>(p.d_gx) + walk.gate(row, at.unit, kGates);
#pragma unroll
    for (int g = 0; g < kGates; ++g)
      hw::narrow(d_gates[KIND == Kind::gru && g == 2 ? 3 : g], d_gx[int64_t{g} * p.hidden]);
    if constexpr (KIND == Kind::gru) hw::narrow(d_gates[2], static_cast<Stored*>(p.d_g_last)[walk.output(row, at.unit)]);
  }

  RNNFAST_DEVICE void finish(const Walk& walk, Place at) const {
    const int64_t state = walk.state(at.batch_row, at.unit);
    hw::narrow(d_h, static_cast<Stored*>(walk.p.d_h_0)[state]);
    if (KIND == Kind::lstm) hw::narrow(d_c, static_cast<Stored*>(walk.p.d_c_0)[state]);
  }
};

}  // namespace rnnfast::cuda
