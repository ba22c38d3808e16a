// The scan contract (docs/design.md) as C++ structures: what the operators hand to a backend. Every tensor is
// contiguous; a pointer is null where the tensor is absent.
#pragma once

#include <cstdint>

#include "cells.h"

namespace rnnfast {

enum class DType { float32, float64, bfloat16 };

struct ScanShape {
  int64_t lanes, steps, batch, rows;  // D T B N
  int64_t input, hidden, state;       // I H P
  Cell cell;
  DType dtype;
  bool bidirectional;
  bool ids;                    // the input is (N,) int64 token ids
  const int64_t* batch_sizes;  // (T,), or null: every step has B rows
  const int64_t* offsets;      // (T,) first row of each step, null with batch_sizes
  bool has_projection;

  int64_t gates() const { return gate_count(cell); }
  int64_t size_at(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
  int64_t offset_at(int64_t t) const { return offsets ? offsets[t] : t * batch; }
  bool reversed(int64_t lane) const { return bidirectional && (lane & 1); }
  // Where in time a lane is at a step of its own.
  int64_t time(int64_t lane, int64_t step) const { return reversed(lane) ? steps - 1 - step : step; }
};

struct ForwardArgs {
  ScanShape shape;
  const void *input, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *h_0, *c_0;
  void *output, *h_n, *c_n, *tape;  // h_n, tape, and c_n but of an LSTM may be null
  void* packed;                     // weights packed before, in place of w_* and b_*; or null
  int64_t beside = 0;               // bytes of other layers' weights, which are read before these are again
};

struct BackwardArgs {
  ScanShape shape;
  const void *d_output, *d_h_n, *d_c_n;
  const void *input, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *h_0, *c_0, *output, *tape;
  void *d_input, *d_w_ih, *d_w_hh, *d_b_ih, *d_b_hh, *d_w_hr, *d_h_0, *d_c_0;  // null where not wanted
  const void* d_cells;     // (D, N, H): the gradient of an LSTM's c after every step; or null
  void* gates = nullptr;   // where the gradients of the gates stay for later gradients of weights; or null
  void *packed_hh = nullptr, *packed_ih = nullptr;  // weights packed before for backward calls that share them; or null
};

// What changes the recurrence of a layer (rnnfast/extended.py). A pointer is null where the change is not made.
struct Extension {
  const void* recurrent_mask;            // (D, B, P): multiplies h on its way into w_hh
  const bool *zoneout_h, *zoneout_c;     // (D, N, P), (D, N, H): where h and c stay what they were; or, without these,
  double share_h, share_c;               // the share of what they were in what they are, zoneout's mean; 0 for none
  const void *gain_ih, *gain_hh;         // (D, G*H): layer normalisation of both products
  const void *gain_c, *bias_c;           // (D, H): and of an LSTM's c on its way to the output
  const void* peepholes;                 // (D, 3, H): weights of c in the gates i, f and o of an LSTM

  bool zones_h() const { return zoneout_h || share_h != 0; }
  bool zones_c() const { return zoneout_c || share_c != 0; }
  bool normalised() const { return gain_ih != nullptr; }
};

// The columns of an extended scan's tape. First come those of the cell's own tape, whose c is not zoned out yet.
struct ExtendedTape {
  int64_t h;         // h before it was zoned out, of an RNN whose h is
  int64_t c;         // c after every step, of an LSTM: the cell's own where it is not zoned out
  int64_t products;  // where they are normalised: of the input with w_ih, of h with w_hh
  int64_t width;

  ExtendedTape(const ScanShape& s, const Extension& e) : h(tape_count(s.cell) * s.hidden), c(h), products(h), width(h) {
    const bool zoned = s.cell == Cell::lstm ? e.zones_c() : s.gates() == 1 && e.zones_h();
    if (zoned) products = width += s.hidden;
    if (!zoned) c -= s.hidden;
    if (e.normalised()) width += 2 * s.gates() * s.hidden;
  }
};

struct ExtendedForwardArgs {
  ForwardArgs scan;  // packed weights are those of extended_pack, without biases
  Extension extension;
};

struct ExtendedBackwardArgs {
  BackwardArgs scan;
  Extension extension;
  void *d_gain_ih, *d_gain_hh, *d_gain_c, *d_bias_c, *d_peepholes;  // null where not wanted
};

}  // namespace rnnfast
