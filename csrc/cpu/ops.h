// The CPU implementations of the scan operators, on tensors. Their schemas are in rnnfast/scan.py and extended.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../scan.h"
#include "../text.h"

namespace rnnfast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// How many threads a call may use: torch.get_num_threads(), but no more than there are processors, and 1 in a forked child.
int available_threads();

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_cpu(
    Tensor input, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, Tensor h_0,
    OptionalTensor c_0, OptionalTensor batch_sizes, Text cell, bool bidirectional, bool save_tape);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_cpu_backward(
    OptionalTensor d_output, OptionalTensor d_h_n, OptionalTensor d_c_n, Tensor input, Tensor w_ih, Tensor w_hh,
    OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, Tensor h_0, OptionalTensor c_0,
    OptionalTensor batch_sizes, Text cell, bool bidirectional, Tensor output, Tensor tape, bool need_input,
    bool need_weights);

// As scan_cpu_backward, but for an LSTM's c after every step, (D, N, H), in place of h_n.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_cpu_states_backward(
    OptionalTensor d_output, OptionalTensor d_cells, OptionalTensor d_c_n, Tensor input, Tensor w_ih, Tensor w_hh,
    OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, Tensor h_0, OptionalTensor c_0,
    OptionalTensor batch_sizes, Text cell, bool bidirectional, Tensor output, Tensor tape, bool need_input,
    bool need_weights);

// The scan with an extended recurrence; the schemas are in rnnfast/extended.py. `packed`: what scan_extended_cpu_pack has
// made of w_ih, w_hh and w_hr, for many calls.
std::tuple<Tensor, Tensor, Tensor, Tensor> scan_extended_cpu(
    Tensor input, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
    Tensor h_0, OptionalTensor c_0, OptionalTensor gain_ih, OptionalTensor gain_hh, OptionalTensor gain_c,
    OptionalTensor bias_c, OptionalTensor peepholes, OptionalTensor recurrent_mask, OptionalTensor zoneout_h,
    OptionalTensor zoneout_c, OptionalTensor batch_sizes, double share_h, double share_c, Text cell,
    bool bidirectional, bool save_tape, OptionalTensor packed);
Tensor scan_extended_cpu_pack(Tensor w_ih, Tensor w_hh, OptionalTensor w_hr, Text cell, bool ids);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
scan_extended_cpu_backward(
    OptionalTensor d_output, OptionalTensor d_h_n, OptionalTensor d_c_n, Tensor input, Tensor w_ih, Tensor w_hh,
    OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, Tensor h_0, OptionalTensor c_0,
    OptionalTensor gain_ih, OptionalTensor gain_hh, OptionalTensor gain_c, OptionalTensor bias_c, OptionalTensor peepholes,
    OptionalTensor recurrent_mask, OptionalTensor zoneout_h, OptionalTensor zoneout_c, OptionalTensor batch_sizes,
    double share_h, double share_c, Text cell, bool bidirectional, Tensor output, Tensor tape, bool need_input,
    bool need_weights);

// What scan_cpu_pack has made: the sizes of the layer, and what ForwardArgs takes as packed.
struct PackedWeights {
  ScanShape layer;
  void* panels;
};
PackedWeights unpack(const Tensor& packed);

// Packs a layer's weights once for many calls of scan_cpu_packed, which is scan_cpu without a tape. The result can be
// used by the instruction set that made it, in this process.
Tensor scan_cpu_pack(Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                     Text cell, bool ids);
std::tuple<Tensor, Tensor, Tensor> scan_cpu_packed(Tensor input, Tensor packed, Tensor h_0, OptionalTensor c_0,
                                                   OptionalTensor batch_sizes, bool bidirectional);

}  // namespace rnnfast
