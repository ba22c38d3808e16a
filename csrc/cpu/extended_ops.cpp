// The scan with an extended recurrence, on tensors.
#include "kernels.h"
#include "memory.h"
#include "ops.h"
#include "tensors.h"

namespace rnnfast {
namespace {

const bool* flags(const OptionalTensor& tensor) { return static_cast<const bool*>(data(tensor)); }

Extension extension(const ScanShape& s, const OptionalTensor& gain_ih, const OptionalTensor& gain_hh,
                    const OptionalTensor& gain_c, const OptionalTensor& bias_c, const OptionalTensor& peepholes,
                    const OptionalTensor& recurrent_mask, const OptionalTensor& zoneout_h, const OptionalTensor& zoneout_c,
                    double share_h, double share_c) {
  const bool lstm = s.cell == Cell::lstm;
  check(gain_ih.has_value() == gain_hh.has_value() && gain_c.has_value() == bias_c.has_value() &&
            gain_c.has_value() == (gain_ih && lstm) && (!peepholes || lstm),
        "a normalisation takes gain_ih and gain_hh, of an lstm gain_c and bias_c as well; peepholes are its alone");
  const ScalarType type = scalar_type(s.dtype);
  require("gain_ih", gain_ih, type, {s.lanes, s.gates() * s.hidden});
  require("gain_hh", gain_hh, type, {s.lanes, s.gates() * s.hidden});
  require("gain_c", gain_c, type, {s.lanes, s.hidden});
  require("bias_c", bias_c, type, {s.lanes, s.hidden});
  require("peepholes", peepholes, type, {s.lanes, 3, s.hidden});
  require("recurrent_mask", recurrent_mask, type, {s.lanes, s.batch, s.state});
  require("zoneout_h", zoneout_h, ScalarType::Bool, {s.lanes, s.rows, s.state});
  require("zoneout_c", zoneout_c, ScalarType::Bool, {s.lanes, s.rows, s.hidden});
  return {data(recurrent_mask), flags(zoneout_h), flags(zoneout_c), share_h,      share_c,
          data(gain_ih),        data(gain_hh),    data(gain_c),     data(bias_c), data(peepholes)};
}

}  // namespace

Tensor scan_extended_cpu_pack(Tensor w_ih, Tensor w_hh, OptionalTensor w_hr, Text cell, bool ids) {
  ExtendedForwardArgs args{};
  args.scan.shape = layer_shape(w_ih, w_hh, std::nullopt, std::nullopt, w_hr, cell, ids);
  args.scan.w_ih = data(w_ih);
  args.scan.w_hh = data(w_hh);
  args.scan.w_hr = data(w_hr);
  const Kernels& kernels = choose_kernels(args.scan.shape.dtype);
  const int64_t bytes = int64_t(kernels.extended_pack(args, 1));
  Tensor packed = torch::stable::new_empty(w_hh, {bytes}, ScalarType::Byte);
  args.scan.packed = packed.mutable_data_ptr();
  wish_huge_pages(args.scan.packed, size_t(bytes));
  kernels.extended_pack(args, available_threads());
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_extended_cpu(
    Tensor input, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
    Tensor h_0, OptionalTensor c_0, OptionalTensor gain_ih, OptionalTensor gain_hh, OptionalTensor gain_c,
    OptionalTensor bias_c, OptionalTensor peepholes, OptionalTensor recurrent_mask, OptionalTensor zoneout_h,
    OptionalTensor zoneout_c, OptionalTensor batch_sizes, double share_h, double share_c, Text cell,
    bool bidirectional, bool save_tape, OptionalTensor packed) {
  const Shape s(layer_shape(w_ih, w_hh, b_ih, b_hh, w_hr, cell, is_ids(input)), input, h_0, c_0, batch_sizes, bidirectional);
  const Extension e = extension(s, gain_ih, gain_hh, gain_c, bias_c, peepholes, recurrent_mask, zoneout_h, zoneout_c,
                                share_h, share_c);
  Tensor output = empty(h_0, {s.rows, s.lanes * s.state}), h_n = empty(h_0, {s.lanes, s.batch, s.state});
  Tensor c_n = empty_if(c_0.has_value(), h_0, {s.lanes, s.batch, s.hidden});
  Tensor tape = empty_if(save_tape, h_0, {s.lanes, s.rows, ExtendedTape(s, e).width});
  if (s.rows) {
    const Kernels& kernels = choose_kernels(s.dtype);
    ExtendedForwardArgs args{{s,         data(input), data(w_ih),  data(w_hh), data(b_ih), data(b_hh), data(w_hr),
                              data(h_0), data(c_0),   out(output), out(h_n),   out(c_n),   out(tape),  nullptr},
                             e};
    if (packed) require("packed", packed, ScalarType::Byte, {int64_t(kernels.extended_pack(args, 1))});
    args.scan.packed = packed ? out(*packed) : nullptr;
    kernels.extended_forward(args, available_threads());
  }
  return {output, h_n, c_n, tape};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
scan_extended_cpu_backward(
    OptionalTensor d_output, OptionalTensor d_h_n, OptionalTensor d_c_n, Tensor input, Tensor w_ih, Tensor w_hh,
    OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, Tensor h_0, OptionalTensor c_0,
    OptionalTensor gain_ih, OptionalTensor gain_hh, OptionalTensor gain_c, OptionalTensor bias_c, OptionalTensor peepholes,
    OptionalTensor recurrent_mask, OptionalTensor zoneout_h, OptionalTensor zoneout_c, OptionalTensor batch_sizes,
    double share_h, double share_c, Text cell, bool bidirectional, Tensor output, Tensor tape, bool need_input,
    bool need_weights) {
  const Shape s(layer_shape(w_ih, w_hh, b_ih, b_hh, w_hr, cell, is_ids(input)), input, h_0, c_0, batch_sizes, bidirectional);
  const Extension e = extension(s, gain_ih, gain_hh, gain_c, bias_c, peepholes, recurrent_mask, zoneout_h, zoneout_c,
                                share_h, share_c);
  s.require_results(d_output, d_h_n, d_c_n, output, tape, ExtendedTape(s, e).width);
  LayerGradients d(s, h_0, b_ih.has_value(), need_input, need_weights);
  const int64_t gate_rows = s.gates() * s.hidden;
  Tensor d_gain_ih = empty_if(need_weights && gain_ih, h_0, {s.lanes, gate_rows});
  Tensor d_gain_hh = empty_if(need_weights && gain_ih, h_0, {s.lanes, gate_rows});
  Tensor d_gain_c = empty_if(need_weights && gain_c, h_0, {s.lanes, s.hidden});
  Tensor d_bias_c = empty_if(need_weights && gain_c, h_0, {s.lanes, s.hidden});
  Tensor d_peepholes = empty_if(need_weights && peepholes, h_0, {s.lanes, 3, s.hidden});
  if (s.rows) {
    const BackwardArgs scan{s,          data(d_output), data(d_h_n), data(d_c_n), data(input),  data(w_ih),   data(w_hh),
                            data(b_ih), data(b_hh),     data(w_hr),  data(h_0),   data(c_0),    data(output), data(tape),
                            out(d.input), out(d.w_ih),  out(d.w_hh), out(d.b_ih), out(d.b_hh),  out(d.w_hr),
                            out(d.h_0), out(d.c_0),     nullptr};
    const ExtendedBackwardArgs args{scan,          e,           out(d_gain_ih), out(d_gain_hh),
                                    out(d_gain_c), out(d_bias_c), out(d_peepholes)};
    choose_kernels(s.dtype).extended_backward(args, available_threads());
  } else {
    d.zero_weights();
    for (Tensor* gradient : {&d_gain_ih, &d_gain_hh, &d_gain_c, &d_bias_c, &d_peepholes}) torch::stable::zero_(*gradient);
  }
  return {d.input, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr, d.h_0, d.c_0, d_gain_ih, d_gain_hh, d_gain_c, d_bias_c, d_peepholes};
}

}  // namespace rnnfast
