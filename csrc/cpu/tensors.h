// From tensors to the structures of scan.h: what the operators share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../scan.h"
#include "../text.h"

namespace rnnfast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;
using Sizes = std::vector<int64_t>;

// Throws what is wrong with a call; STD_TORCH_CHECK would begin with the path of this file.
template <typename... Parts>
void check(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// A contiguous tensor of undefined content, of the type of `like`. One of WORTH_KEEPING bytes and more is a block of memory.h's,
// which goes back there with the tensor, where torch can have that (2.11 and later).
Tensor empty(const Tensor& like, const Sizes& sizes);
// Or one of no elements, as the operators return where there is nothing or it is not needed.
inline Tensor empty_if(bool needed, const Tensor& like, const Sizes& sizes) { return empty(like, needed ? sizes : Sizes{0}); }

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline void* out(const Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

inline DType parse_dtype(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return DType::float32;
  if (type == ScalarType::Double) return DType::float64;
  check(type == ScalarType::BFloat16,
        "the cpu backend computes in float32, float64 and bfloat16; use backend='reference' for other types");
  return DType::bfloat16;
}

inline ScalarType scalar_type(DType dtype) {
  return dtype == DType::float32 ? ScalarType::Float : dtype == DType::float64 ? ScalarType::Double : ScalarType::BFloat16;
}

// Throws what the tensor should be, and what it is.
[[noreturn]] void refuse(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes);

// Everyone can call the operators, and exported programs do: no address is used before its tensor has been looked at here.
inline void require(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  const auto given = tensor.sizes();
  if (tensor.scalar_type() != type || !std::equal(given.begin(), given.end(), sizes.begin(), sizes.end()) ||
      !tensor.is_contiguous())
    refuse(name, tensor, type, sizes);
  check(tensor.const_data_ptr() || !tensor.numel(), name, " has no memory: its storage has been freed");
}
inline void require(const char* name, const OptionalTensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  if (tensor) require(name, *tensor, type, sizes);
}

// The sizes of the layer alone, whose weights fit each other; the other sizes are 0.
inline ScanShape layer_shape(const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                             const OptionalTensor& w_hr, Text cell, bool ids) {
  ScanShape s{};
  s.cell = parse_cell(cell);
  s.dtype = parse_dtype(w_hh);
  check(w_ih.dim() == 3 && w_hh.dim() == 3, "w_ih and w_hh must have 3 dimensions, of directions, gates and columns");
  s.lanes = w_hh.size(0);
  s.hidden = w_hh.size(1) / s.gates();
  s.state = w_hh.size(2);
  s.input = w_ih.size(2);
  s.has_projection = w_hr.has_value();
  s.ids = ids;
  check(s.lanes > 0 && s.hidden > 0 && s.state > 0, "a layer must have a direction and a unit");
  check(s.has_projection ? s.cell == Cell::lstm : s.state == s.hidden,
        "w_hh must have a column for each unit; an lstm with w_hr has one for each that it projects to");
  check(b_ih.has_value() == b_hh.has_value(), "b_ih and b_hh must both be given, or neither");
  const ScalarType type = scalar_type(s.dtype);
  const int64_t gate_rows = s.gates() * s.hidden;
  require("w_ih", w_ih, type, {s.lanes, gate_rows, s.input});
  require("w_hh", w_hh, type, {s.lanes, gate_rows, s.state});
  require("b_ih", b_ih, type, {s.lanes, gate_rows});
  require("b_hh", b_hh, type, {s.lanes, gate_rows});
  require("w_hr", w_hr, type, {s.lanes, s.state, s.hidden});
  return s;
}

// The shape of a call, with the offsets it points at. Input and states fit the layer and each other.
struct Shape : ScanShape {
  std::vector<int64_t> first_rows;

  Shape(const ScanShape& layer, const Tensor& x, const Tensor& h_0, const OptionalTensor& c_0, const OptionalTensor& sizes,
        bool both)
      : ScanShape(layer) {
    const ScalarType type = scalar_type(dtype);
    check(x.dim() > 0 && h_0.dim() == 3, "input must have rows, and h_0 must have 3 dimensions");
    batch = h_0.size(1);
    rows = x.size(0);
    bidirectional = both;
    if (ids)
      require("input", x, ScalarType::Long, {rows});
    else
      require("input", x, type, {rows, input});
    require("h_0", h_0, type, {lanes, batch, state});
    check(c_0.has_value() == (cell == Cell::lstm), "c_0 must be given for an lstm, and for no other cell");
    require("c_0", c_0, type, {lanes, batch, hidden});
    if (sizes) {
      steps = sizes->numel();
      require("batch_sizes", sizes, ScalarType::Long, {steps});
      check(steps > 0, "a sequence must have at least one step, batch_sizes is empty");
      batch_sizes = static_cast<const int64_t*>(sizes->const_data_ptr());
      first_rows.resize(steps);
      int64_t row = 0;
      for (int64_t t = 0; t < steps; row += batch_sizes[t++]) {
        first_rows[t] = row;
        check(t ? batch_sizes[t] >= 0 && batch_sizes[t] <= batch_sizes[t - 1] : batch_sizes[t] == batch,
              "batch_sizes must start with the batch size of the states, ", batch, ", and never rise");
      }
      check(row == rows, "batch_sizes adds up to ", row, " rows, the input has ", rows);
      while (steps > 1 && batch_sizes[steps - 1] == 0) --steps;  // no part of a scan is without rows
      offsets = first_rows.data();
    } else {
      check(rows > 0 || batch == 0, "a sequence must have at least one step, the input has no rows");
      check(batch ? rows % batch == 0 : rows == 0, "the input's ", rows, " rows are no whole number of steps of ", batch,
            " rows");
      steps = batch ? rows / batch : 0;
    }
    if (!ids) return;
    const int64_t* id = static_cast<const int64_t*>(x.const_data_ptr());
    for (int64_t row = 0; row < rows; ++row)
      check(id[row] >= 0 && id[row] < input, "token id ", id[row], " in row ", row, " is outside [0, ", input, ")");
  }
  Shape(const Shape&) = delete;

  // What a backward scan is given besides. A cell without c has no use for the gradient of its empty c_n.
  void require_results(const OptionalTensor& d_output, const OptionalTensor& d_h_n, const OptionalTensor& d_c_n,
                       const Tensor& output, const Tensor& tape, int64_t tape_width) const {
    const ScalarType type = scalar_type(dtype);
    require("d_output", d_output, type, {rows, lanes * state});
    require("d_h_n", d_h_n, type, {lanes, batch, state});
    if (cell == Cell::lstm) require("d_c_n", d_c_n, type, {lanes, batch, hidden});
    require("output", output, type, {rows, lanes * state});
    check(tape.numel() == lanes * rows * tape_width && tape.scalar_type() == type && tape.is_contiguous(),
          "the tape is not that of a scan of this layer that was run with save_tape=True");
  }
};

// The gradients that any backward scan returns first, of undefined content.
struct LayerGradients {
  Tensor input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0;

  LayerGradients(const Shape& s, const Tensor& like, bool biased, bool need_input, bool need_weights)
      : input(empty_if(need_input && !s.ids, like, {s.rows, s.input})),
        w_ih(empty_if(need_weights, like, {s.lanes, s.gates() * s.hidden, s.input})),
        w_hh(empty_if(need_weights, like, {s.lanes, s.gates() * s.hidden, s.state})),
        b_ih(empty_if(need_weights && biased, like, {s.lanes, s.gates() * s.hidden})),
        b_hh(empty_if(need_weights && biased, like, {s.lanes, s.gates() * s.hidden})),
        w_hr(empty_if(need_weights && s.has_projection, like, {s.lanes, s.state, s.hidden})),
        h_0(empty(like, {s.lanes, s.batch, s.state})),
        c_0(empty_if(s.cell == Cell::lstm, like, {s.lanes, s.batch, s.hidden})) {}
  // Of a scan of no rows.
  void zero_weights() {
    for (Tensor* d : {&w_ih, &w_hh, &b_ih, &b_hh, &w_hr}) torch::stable::zero_(*d);
  }
};

inline bool is_ids(const Tensor& input) { return input.scalar_type() == ScalarType::Long; }

}  // namespace rnnfast
