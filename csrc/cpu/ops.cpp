#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace rnnfast {
namespace {

using torch::headeronly::ScalarType;
using Sizes = std::vector<int64_t>;

Tensor empty(const Tensor& like, const Sizes& sizes) {
  Tensor tensor = torch::stable::new_empty(like, sizes);
  const size_t bytes = size_t(tensor.numel()) * tensor.element_size();
  if (bytes >= size_t(4) << 20) wish_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}
const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* out(const Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

Cell parse_cell(const std::string& name) {
  if (name == "rnn_tanh") return Cell::rnn_tanh;
  if (name == "rnn_relu") return Cell::rnn_relu;
  if (name == "lstm") return Cell::lstm;
  STD_TORCH_CHECK(name == "gru", "unknown cell ", name);
  return Cell::gru;
}

DType parse_dtype(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return DType::float32;
  if (type == ScalarType::Double) return DType::float64;
  STD_TORCH_CHECK(type == ScalarType::BFloat16,
                  "the cpu backend computes in float32, float64 and bfloat16; use backend='reference' for other types");
  return DType::bfloat16;
}

// The sizes of the layer alone; the others are 0.
ScanShape layer_shape(const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& w_hr, const std::string& cell,
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
        STD_TORCH_CHECK(t ? batch_sizes[t] >= 0 && batch_sizes[t] <= batch_sizes[t - 1] : batch_sizes[t] == batch,
                        "batch_sizes must start with the batch size of the states, ", batch, ", and never rise");
      }
      STD_TORCH_CHECK(row == rows, "batch_sizes adds up to ", row, " rows, the input has ", rows);
      offsets = first_rows.data();
    } else {
      steps = batch ? rows / batch : 0;
    }
    if (!ids) return;
    const int64_t* id = static_cast<const int64_t*>(x.const_data_ptr());
    for (int64_t row = 0; row < rows; ++row)
      STD_TORCH_CHECK(id[row] >= 0 && id[row] < input, "token id ", id[row], " in row ", row, " is outside [0, ", input, ")");
  }
  Shape(const Shape&) = delete;
};

bool is_ids(const Tensor& input) { return input.scalar_type() == ScalarType::Long; }

// What stands at the start of packed weights, before the panels.
struct PackedHeader {
  ScanShape layer;
  uint64_t magic;
  static constexpr uint64_t MAGIC = 0x7473616673616e6eULL;
  static constexpr size_t BYTES = 192;
};
static_assert(sizeof(PackedHeader) <= PackedHeader::BYTES);

// Large ones begin with a huge page: what lies in one spreads evenly over a core's second-level cache.
char* packed_base(const Tensor& packed) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(packed.const_data_ptr());
  const bool large = packed.numel() >= int64_t(HUGE_PAGE);
  return reinterpret_cast<char*>(large ? (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE : begin);
}

}  // namespace

int available_threads() { return usable_threads(int(torch::stable::get_num_threads())); }

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_cpu(
    Tensor input, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, Tensor h_0,
    OptionalTensor c_0, OptionalTensor batch_sizes, std::string cell, bool bidirectional, bool save_tape) {
  const Shape s(layer_shape(w_ih, w_hh, w_hr, cell, is_ids(input)), input, h_0, batch_sizes, bidirectional);
  const int64_t tape_width = tape_count(s.cell) * s.hidden;
  Tensor output = empty(h_0, {s.rows, s.lanes * s.state}), h_n = empty(h_0, {s.lanes, s.batch, s.state});
  Tensor c_n = c_0 ? empty(h_0, {s.lanes, s.batch, s.hidden}) : empty(h_0, {0});
  Tensor tape = save_tape ? empty(h_0, {s.lanes, s.rows, tape_width}) : empty(h_0, {0});
  if (s.rows) {
    const ForwardArgs args{s,         data(input), data(w_ih), data(w_hh), data(b_ih), data(b_hh), data(w_hr),
                           data(h_0), data(c_0),   out(output), out(h_n),  out(c_n),   out(tape), nullptr};
    choose_kernels(s.dtype).forward(args, available_threads());
  }
  return {output, h_n, c_n, tape};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_cpu_backward(
    OptionalTensor d_output, OptionalTensor d_h_n, OptionalTensor d_c_n, Tensor input, Tensor w_ih, Tensor w_hh,
    OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, Tensor h_0, OptionalTensor c_0,
    OptionalTensor batch_sizes, std::string cell, bool bidirectional, Tensor output, Tensor tape, bool need_input,
    bool need_weights) {
  const Shape s(layer_shape(w_ih, w_hh, w_hr, cell, is_ids(input)), input, h_0, batch_sizes, bidirectional);
  STD_TORCH_CHECK(tape.numel() == s.lanes * s.rows * tape_count(s.cell) * s.hidden &&
                      output.numel() == s.rows * s.lanes * s.state,
                  "output and tape are not those of a scan of this layer that was run with save_tape=True");
  const int64_t gate_rows = s.gates() * s.hidden;
  const auto when = [&](bool needed, const Sizes& sizes) { return empty(h_0, needed ? sizes : Sizes{0}); };
  Tensor d_input = when(need_input && !s.ids, {s.rows, s.input});
  Tensor d_w_ih = when(need_weights, {s.lanes, gate_rows, s.input});
  Tensor d_w_hh = when(need_weights, {s.lanes, gate_rows, s.state});
  Tensor d_b_ih = when(need_weights && b_ih, {s.lanes, gate_rows});
  Tensor d_b_hh = when(need_weights && b_ih, {s.lanes, gate_rows});
  Tensor d_w_hr = when(need_weights && w_hr, {s.lanes, s.state, s.hidden});
  Tensor d_h_0 = empty(h_0, {s.lanes, s.batch, s.state});
  Tensor d_c_0 = when(c_0.has_value(), {s.lanes, s.batch, s.hidden});
  if (s.rows) {
    const BackwardArgs args{s,          data(d_output), data(d_h_n), data(d_c_n), data(input),  data(w_ih),   data(w_hh),
                            data(b_ih), data(b_hh),     data(w_hr),  data(h_0),   data(c_0),    data(output), data(tape),
                            out(d_input), out(d_w_ih),  out(d_w_hh), out(d_b_ih), out(d_b_hh),  out(d_w_hr),
                            out(d_h_0), out(d_c_0)};
    choose_kernels(s.dtype).backward(args, available_threads());
  } else {
    for (Tensor* d : {&d_w_ih, &d_w_hh, &d_b_ih, &d_b_hh, &d_w_hr}) torch::stable::zero_(*d);
  }
  return {d_input, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_h_0, d_c_0};
}

Tensor scan_cpu_pack(Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                     std::string cell, bool ids) {
  const PackedHeader header{layer_shape(w_ih, w_hh, w_hr, cell, ids), PackedHeader::MAGIC};
  ForwardArgs args{header.layer, nullptr,    data(w_ih), data(w_hh), data(b_ih), data(b_hh), data(w_hr),
                   nullptr,      nullptr,    nullptr,    nullptr,    nullptr,    nullptr,    nullptr};
  const Kernels& kernels = choose_kernels(header.layer.dtype);
  const size_t bytes = PackedHeader::BYTES + kernels.pack(args);
  const size_t room = bytes < HUGE_PAGE / 4 ? bytes : (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE + HUGE_PAGE;
  Tensor packed = torch::stable::new_empty(w_hh, {int64_t(room)}, ScalarType::Byte);
  wish_huge_pages(packed.mutable_data_ptr(), room);
  char* base = packed_base(packed);
  std::memcpy(base, &header, sizeof header);
  args.packed = base + PackedHeader::BYTES;
  kernels.pack(args);
  return packed;
}

PackedWeights unpack(const Tensor& packed) {
  PackedHeader header{};
  char* base = packed_base(packed);
  if (packed.numel() >= int64_t(PackedHeader::BYTES)) std::memcpy(&header, base, sizeof header);
  STD_TORCH_CHECK(header.magic == PackedHeader::MAGIC, "these are not weights that scan_cpu_pack has packed");
  return {header.layer, base + PackedHeader::BYTES};
}

std::tuple<Tensor, Tensor, Tensor> scan_cpu_packed(Tensor input, Tensor packed, Tensor h_0, OptionalTensor c_0,
                                                   OptionalTensor batch_sizes, bool bidirectional) {
  const auto [layer, panels] = unpack(packed);
  STD_TORCH_CHECK(is_ids(input) == layer.ids && parse_dtype(h_0) == layer.dtype && h_0.size(2) == layer.state &&
                      h_0.size(0) == layer.lanes && (layer.ids || input.size(1) == layer.input),
                  "input or state do not fit the packed weights");
  const Shape s(layer, input, h_0, batch_sizes, bidirectional);
  Tensor output = empty(h_0, {s.rows, s.lanes * s.state}), h_n = empty(h_0, {s.lanes, s.batch, s.state});
  Tensor c_n = c_0 ? empty(h_0, {s.lanes, s.batch, s.hidden}) : empty(h_0, {0});
  if (s.rows) {
    const ForwardArgs args{s,         data(input), nullptr,     nullptr,  nullptr,  nullptr, nullptr,
                           data(h_0), data(c_0),   out(output), out(h_n), out(c_n), nullptr, panels};
    choose_kernels(s.dtype).forward(args, available_threads());
  }
  return {output, h_n, c_n};
}

}  // namespace rnnfast
