#include "ops.h"

#include <cstring>

#include "kernels.h"
#include "memory.h"
#include "tensors.h"
#include "threads.h"

namespace rnnfast {
namespace {

// What stands at the start of packed weights, before the panels, which are aligned as it is.
struct alignas(64) PackedHeader {
  ScanShape layer;
  size_t panels;  // bytes
  uint64_t magic;
  static constexpr uint64_t MAGIC = 0x7473616673616e6eULL;
};

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
    OptionalTensor c_0, OptionalTensor batch_sizes, Text cell, bool bidirectional, bool save_tape) {
  const Shape s(layer_shape(w_ih, w_hh, b_ih, b_hh, w_hr, cell, is_ids(input)), input, h_0, c_0, batch_sizes, bidirectional);
  const int64_t tape_width = tape_count(s.cell) * s.hidden;
  Tensor output = empty(h_0, {s.rows, s.lanes * s.state}), h_n = empty(h_0, {s.lanes, s.batch, s.state});
  Tensor c_n = empty_if(c_0.has_value(), h_0, {s.lanes, s.batch, s.hidden});
  Tensor tape = empty_if(save_tape, h_0, {s.lanes, s.rows, tape_width});
  if (s.rows) {
    const ForwardArgs args{s,         data(input), data(w_ih), data(w_hh), data(b_ih), data(b_hh), data(w_hr),
                           data(h_0), data(c_0),   out(output), out(h_n),  out(c_n),   out(tape), nullptr};
    choose_kernels(s.dtype).forward(args, available_threads());
  }
  return {output, h_n, c_n, tape};
}

namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const OptionalTensor& d_output, const OptionalTensor& d_h_n, const OptionalTensor& d_c_n,
                   const OptionalTensor& d_cells, const Tensor& input, const Tensor& w_ih, const Tensor& w_hh,
                   const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr, const Tensor& h_0,
                   const OptionalTensor& c_0, const OptionalTensor& batch_sizes, Text cell,
                   bool bidirectional, const Tensor& output, const Tensor& tape, bool need_input, bool need_weights) {
  const Shape s(layer_shape(w_ih, w_hh, b_ih, b_hh, w_hr, cell, is_ids(input)), input, h_0, c_0, batch_sizes, bidirectional);
  s.require_results(d_output, d_h_n, d_c_n, output, tape, tape_count(s.cell) * s.hidden);
  check(!d_cells || s.cell == Cell::lstm, "d_cells is the gradient of an lstm's c, no other cell has it");
  require("d_cells", d_cells, scalar_type(s.dtype), {s.lanes, s.rows, s.hidden});
  LayerGradients d(s, h_0, b_ih.has_value(), need_input, need_weights);
  if (s.rows) {
    const BackwardArgs args{s,          data(d_output), data(d_h_n), data(d_c_n), data(input),  data(w_ih),   data(w_hh),
                            data(b_ih), data(b_hh),     data(w_hr),  data(h_0),   data(c_0),    data(output), data(tape),
                            out(d.input), out(d.w_ih),  out(d.w_hh), out(d.b_ih), out(d.b_hh),  out(d.w_hr),
                            out(d.h_0), out(d.c_0),     data(d_cells)};
    choose_kernels(s.dtype).backward(args, available_threads());
  } else {
    d.zero_weights();
  }
  return {d.input, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr, d.h_0, d.c_0};
}

}  // namespace

Gradients scan_cpu_backward(OptionalTensor d_output, OptionalTensor d_h_n, OptionalTensor d_c_n, Tensor input,
                            Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                            Tensor h_0, OptionalTensor c_0, OptionalTensor batch_sizes, Text cell,
                            bool bidirectional, Tensor output, Tensor tape, bool need_input, bool need_weights) {
  return backward(d_output, d_h_n, d_c_n, std::nullopt, input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, batch_sizes, cell,
                  bidirectional, output, tape, need_input, need_weights);
}

Gradients scan_cpu_states_backward(OptionalTensor d_output, OptionalTensor d_cells, OptionalTensor d_c_n, Tensor input,
                                   Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                   OptionalTensor w_hr, Tensor h_0, OptionalTensor c_0, OptionalTensor batch_sizes,
                                   Text cell, bool bidirectional, Tensor output, Tensor tape, bool need_input,
                                   bool need_weights) {
  return backward(d_output, std::nullopt, d_c_n, d_cells, input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, batch_sizes,
                  cell, bidirectional, output, tape, need_input, need_weights);
}

Tensor scan_cpu_pack(Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                     Text cell, bool ids) {
  PackedHeader header{layer_shape(w_ih, w_hh, b_ih, b_hh, w_hr, cell, ids), 0, PackedHeader::MAGIC};
  ForwardArgs args{header.layer, nullptr,    data(w_ih), data(w_hh), data(b_ih), data(b_hh), data(w_hr),
                   nullptr,      nullptr,    nullptr,    nullptr,    nullptr,    nullptr,    nullptr};
  const Kernels& kernels = choose_kernels(header.layer.dtype);
  header.panels = kernels.pack(args, 1);
  const size_t bytes = sizeof header + header.panels;
  const size_t room = bytes < HUGE_PAGE / 4 ? bytes : (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE + HUGE_PAGE;
  Tensor packed = torch::stable::new_empty(w_hh, {int64_t(room)}, ScalarType::Byte);
  wish_huge_pages(packed.mutable_data_ptr(), room);
  char* base = packed_base(packed);
  std::memcpy(base, &header, sizeof header);
  args.packed = base + sizeof header;
  kernels.pack(args, available_threads());
  return packed;
}

PackedWeights unpack(const Tensor& packed) {
  constexpr char WRONG[] = "these are not weights that scan_cpu_pack has packed";
  check(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(), WRONG);
  PackedHeader header{};
  char* base = packed_base(packed);
  const int64_t room = packed.numel() - (base - static_cast<const char*>(packed.const_data_ptr()));
  if (room >= int64_t(sizeof header)) std::memcpy(&header, base, sizeof header);
  check(header.magic == PackedHeader::MAGIC && room >= int64_t(sizeof header + header.panels), WRONG);
  return {header.layer, base + sizeof header};
}

std::tuple<Tensor, Tensor, Tensor> scan_cpu_packed(Tensor input, Tensor packed, Tensor h_0, OptionalTensor c_0,
                                                   OptionalTensor batch_sizes, bool bidirectional) {
  const auto [layer, panels] = unpack(packed);
  const Shape s(layer, input, h_0, c_0, batch_sizes, bidirectional);
  Tensor output = empty(h_0, {s.rows, s.lanes * s.state}), h_n = empty(h_0, {s.lanes, s.batch, s.state});
  Tensor c_n = empty_if(c_0.has_value(), h_0, {s.lanes, s.batch, s.hidden});
  if (s.rows) {
    const ForwardArgs args{s,         data(input), nullptr,     nullptr,  nullptr,  nullptr, nullptr,
                           data(h_0), data(c_0),   out(output), out(h_n), out(c_n), nullptr, panels};
    choose_kernels(s.dtype).forward(args, available_threads());
  }
  return {output, h_n, c_n};
}

}  // namespace rnnfast
