// From tensors to the structures of scan.h: what the operators share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../scan.h"
#include "memory.h"

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

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline void* out(const Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

inline Cell parse_cell(const std::string& name) {
  if (name == "rnn_tanh") return Cell::rnn_tanh;
  if (name == "rnn_relu") return Cell::rnn_relu;
  if (name == "lstm") return Cell::lstm;
  check(name == "gru", "unknown cell ", name);
  return Cell::gru;
}

inline DType parse_dtype(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return DType::float32;
  if (type == ScalarType::Double) return DType::float64;
  check(type == ScalarType::BFloat16,
        "the cpu backend computes in float32, float64 and bfloat16; use backend='reference' for other types");
  return DType::bfloat16;
}

// The sizes of the layer alone; the others are 0.
inline ScanShape layer_shape(const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& w_hr, const std::string& cell,
                      bool ids) {
  ScanShape s{};
  s.cell = parse_cell(cell);
  s.dtype = parse_dtype(w_hh);
  s.lanes = w_hh.size(0);
  s.hidden = w_hh.size(1) / gate_count(s.cell);
  s.state = w_hh.size(2);
  s.input = w_ih.size(2);
  s.has_projection = w_hr.has_value();
  s.ids = ids;
  return s;
}

// The shape of a call, with the offsets it points at.
struct Shape : ScanShape {
  std::vector<int64_t> first_rows;

  Shape(const ScanShape& layer, const Tensor& x, const Tensor& h_0, const OptionalTensor& sizes, bool both)
      : ScanShape(layer) {
    batch = h_0.size(1);
    rows = x.size(0);
    bidirectional = both;
    if (sizes) {
      steps = sizes->numel();
      batch_sizes = static_cast<const int64_t*>(sizes->const_data_ptr());
      first_rows.resize(steps);
      int64_t row = 0;
      for (int64_t t = 0; t < steps; row += batch_sizes[t++]) {
        first_rows[t] = row;
        check(t ? batch_sizes[t] >= 0 && batch_sizes[t] <= batch_sizes[t - 1] : batch_sizes[t] == batch,
              "batch_sizes must start with the batch size of the states, ", batch, ", and never rise");
      }
      check(row == rows, "batch_sizes adds up to ", row, " rows, the input has ", rows);
      offsets = first_rows.data();
    } else {
      steps = batch ? rows / batch : 0;
    }
    if (!ids) return;
    const int64_t* id = static_cast<const int64_t*>(x.const_data_ptr());
    for (int64_t row = 0; row < rows; ++row)
      check(id[row] >= 0 && id[row] < input, "token id ", id[row], " in row ", row, " is outside [0, ", input, ")");
  }
  Shape(const Shape&) = delete;
};

inline bool is_ids(const Tensor& input) { return input.scalar_type() == ScalarType::Long; }

}  // namespace rnnfast
