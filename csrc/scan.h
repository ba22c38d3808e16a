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

  int64_t gates() const { return gate_count(cell); }
  int64_t size_at(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
  int64_t offset_at(int64_t t) const { return offsets ? offsets[t] : t * batch; }
  bool reversed(int64_t lane) const { return bidirectional && (lane & 1); }
  bool projected() const { return has_projection; }
  bool has_projection;
};

struct ForwardArgs {
  ScanShape shape;
  const void *input, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *h_0, *c_0;
  void *output, *h_n, *c_n, *tape;  // c_n and tape may be null
  void* packed;                     // weights packed before, in place of w_* and b_*; or null
};

struct BackwardArgs {
  ScanShape shape;
  const void *d_output, *d_h_n, *d_c_n;
  const void *input, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *h_0, *c_0, *output, *tape;
  void *d_input, *d_w_ih, *d_w_hh, *d_b_ih, *d_b_hh, *d_w_hr, *d_h_0, *d_c_0;  // null where not wanted
};

}  // namespace rnnfast
