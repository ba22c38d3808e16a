#include "direct.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <optional>

#include "kernels.h"
#include "memory.h"
#include "tensors.h"
#include "weight_samples.h"

namespace rnnfast {
namespace {

// Followed in memory by the layers.
struct Plan {
  int64_t layers;
  const void* samples;  // of the weights that the layers' were packed from
  const PackedWeights* layer() const { return reinterpret_cast<const PackedWeights*>(this + 1); }
};

// The layer in a call of T steps of B rows.
ScanShape shape_of_call(const ScanShape& layer, int64_t steps, int64_t batch) {
  ScanShape s = layer;
  s.steps = steps;
  s.batch = batch;
  s.rows = steps * batch;
  s.bidirectional = s.lanes == 2;
  return s;
}

bool ids_fit(const ScanShape& s, const void* input) {
  if (!s.ids) return true;
  const int64_t* ids = static_cast<const int64_t*>(input);
  for (int64_t row = 0; row < s.rows; ++row)
    if (ids[row] < 0 || ids[row] >= s.input) return false;
  return true;
}

// Bytes of an element, of both states of a layer, and of all its output.
struct Bytes {
  size_t element, state, cell, output;
  explicit Bytes(const ScanShape& s) {
    element = s.dtype == DType::float64 ? 8 : s.dtype == DType::float32 ? 4 : 2;
    state = size_t(s.lanes * s.batch * s.state) * element;
    cell = size_t(s.lanes * s.batch * s.hidden) * element;
    output = size_t(s.rows * s.lanes * s.state) * element;
  }
};

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Zeros in the place of both states where a caller leaves any out.
class StandIns {
 public:
  StandIns(const ScanShape& s, bool needed) : begin_(aligned(Bytes(s).state)) {
    if (!needed) return;
    memory_.emplace(begin_ + Bytes(s).cell);
    std::memset(memory_->data(), 0, begin_ + Bytes(s).cell);
  }
  char* state() const { return memory_->data(); }
  char* cell() const { return memory_->data() + begin_; }

 private:
  size_t begin_;  // of the cell state
  std::optional<Scratch> memory_;
};

// Copies input and the states before each step.
void leave_rows(const ScanShape& s, const BackwardArgs& x, const DirectRows& rows) {
  const Bytes bytes(s);
  const size_t input_bytes = s.ids ? sizeof(int64_t) : size_t(s.input) * bytes.element;
  std::memcpy(rows.inputs, x.input, size_t(s.rows) * input_bytes);
  std::memcpy(rows.states, x.h_0, bytes.state);
  if (s.steps > 1) std::memcpy(static_cast<char*>(rows.states) + bytes.state, x.output, bytes.output - bytes.state);
}

// Of the weights that every step reads.
int64_t weight_bytes(const ScanShape& s) {
  return s.lanes * s.gates() * s.hidden * (s.state + (s.ids ? 0 : s.input)) * int64_t(Bytes(s).element);
}

template <class F>
int64_t guarded(F run) {
  try {
    return run();
  } catch (const std::exception&) {
    return DIRECT_FAILED;
  }
}

}  // namespace

Tensor direct_plan_cpu(std::vector<Tensor> packed, Tensor weight_samples) {
  Tensor kept = torch::stable::new_empty(weight_samples, {int64_t(sizeof(Plan) + packed.size() * sizeof(PackedWeights))});
  Plan* plan = static_cast<Plan*>(kept.mutable_data_ptr());
  *plan = {int64_t(packed.size()), weight_samples.const_data_ptr()};
  PackedWeights* layer = const_cast<PackedWeights*>(plan->layer());
  for (const Tensor& each : packed) *layer++ = unpack(each);
  return kept;
}

Tensor direct_layer_cpu(Tensor w_ih, Tensor w_hh, OptionalTensor w_hr, Text cell, bool ids) {
  const ScanShape layer = layer_shape(w_ih, w_hh, std::nullopt, std::nullopt, w_hr, cell, ids);
  Tensor kept = torch::stable::new_empty(w_hh, {int64_t(sizeof layer)}, ScalarType::Byte);
  std::memcpy(kept.mutable_data_ptr(), &layer, sizeof layer);
  return kept;
}

Tensor direct_empty_cpu(Tensor like, std::vector<int64_t> sizes) { return empty(like, sizes); }

int64_t direct_infer(const DirectInfer& c) {
  const Plan& plan = *static_cast<const Plan*>(c.plan);
  if (!are_as_they_were(plan.samples)) return DIRECT_STALE;
  return guarded([&] {
    const ScanShape first = shape_of_call(plan.layer()[0].layer, c.steps, c.batch);
    if (!ids_fit(first, c.input)) return DIRECT_FAILED;
    const Kernels& kernels = choose_kernels(first.dtype);
    const int threads = available_threads();
    const Bytes bytes(first);
    const StandIns zeros(first, !c.h_0);
    int64_t weights = 0;
    for (int64_t l = 0; l < plan.layers; ++l) weights += weight_bytes(plan.layer()[l].layer);
    // What a layer that is not the last puts out; where there are more, the next one reads it while it writes the other half.
    const size_t half = aligned(bytes.output);
    std::optional<Scratch> between;
    if (plan.layers > 1) between.emplace(half * size_t(std::min<int64_t>(plan.layers - 1, 2)));
    for (int64_t l = 0; l < plan.layers; ++l) {
      ForwardArgs x{};
      x.shape = shape_of_call(plan.layer()[l].layer, c.steps, c.batch);
      x.packed = plan.layer()[l].panels;
      x.beside = weights - weight_bytes(plan.layer()[l].layer);
      x.input = l == 0 ? c.input : between->data() + size_t(l - 1) % 2 * half;
      x.output = l + 1 < plan.layers ? between->data() + size_t(l) % 2 * half : c.output;
      x.h_0 = c.h_0 ? static_cast<const char*>(c.h_0) + size_t(l) * bytes.state : zeros.state();
      x.h_n = static_cast<char*>(c.h_n) + size_t(l) * bytes.state;
      if (c.c_n) {
        x.c_0 = c.c_0 ? static_cast<const char*>(c.c_0) + size_t(l) * bytes.cell : zeros.cell();
        x.c_n = static_cast<char*>(c.c_n) + size_t(l) * bytes.cell;
      }
      kernels.forward(x, threads);
    }
    return DIRECT_DONE;
  });
}

int64_t direct_forward(const DirectForward& c) {
  const Plan* plan = static_cast<const Plan*>(c.plan);
  // Samples are of all layers: the first of a call's looks at them.
  if (plan && c.index == 0 && !are_as_they_were(plan->samples)) return DIRECT_STALE;
  return guarded([&] {
    const ScanShape s = shape_of_call(*c.layer, c.steps, c.batch);
    if (!ids_fit(s, c.input)) return DIRECT_FAILED;
    const Bytes bytes(s);
    const StandIns zeros(s, !c.h_0);
    const ForwardArgs x{s,
                        c.input,
                        c.w_ih,
                        c.w_hh,
                        c.b_ih,
                        c.b_hh,
                        c.w_hr,
                        c.h_0 ? c.h_0 : zeros.state(),
                        c.c_0 || !c.c_n ? c.c_0 : zeros.cell(),
                        c.output,
                        c.h_n,
                        c.c_n,
                        c.tape,
                        plan ? plan->layer()[c.index].panels : nullptr,
                        2 * weight_bytes(s)};  // of a backward call in between, which reads them and makes as many gradients
    choose_kernels(s.dtype).forward(x, available_threads());
    return DIRECT_DONE;
  });
}

int64_t direct_backward(const DirectBackward& c) {
  return guarded([&] {
    const ScanShape s = shape_of_call(*c.layer, c.steps, c.batch);
    const StandIns zeros(s, !c.h_0);
    const BackwardArgs x{s,
                         c.d_output,
                         c.d_h_n,
                         c.d_c_n,
                         c.input,
                         c.w_ih,
                         c.w_hh,
                         c.b_ih,
                         c.b_hh,
                         c.w_hr,
                         c.h_0 ? c.h_0 : zeros.state(),
                         c.c_0 || s.cell != Cell::lstm ? c.c_0 : zeros.cell(),
                         c.output,
                         c.tape,
                         c.d_input,
                         c.d_w_ih,
                         c.d_w_hh,
                         c.d_b_ih,
                         c.d_b_hh,
                         c.d_w_hr,
                         c.d_h_0,
                         c.d_c_0,
                         nullptr,
                         c.rows.gates,
                         c.packed_hh,
                         c.packed_ih};
    choose_kernels(s.dtype).backward(x, available_threads());
    if (c.rows.gates) leave_rows(s, x, c.rows);
    return DIRECT_DONE;
  });
}

int64_t direct_pack_backward(const DirectPack& c) {
  BackwardArgs x{};
  x.shape = shape_of_call(*c.layer, c.steps, c.batch);
  x.w_hh = c.w_hh;
  x.w_ih = c.w_ih;
  (x.w_ih ? x.packed_ih : x.packed_hh) = c.packed;
  return int64_t(choose_kernels(x.shape.dtype).pack_backward(x, available_threads()));
}

int64_t direct_weight_gradients(const DirectWeights& c) {
  return guarded([&] {
    BackwardArgs x{};
    x.shape = shape_of_call(*c.layer, 1, c.count);
    x.gates = c.rows.gates;
    x.input = c.rows.inputs;
    x.h_0 = c.rows.states;
    x.d_w_ih = c.d_w_ih;
    x.d_w_hh = c.d_w_hh;
    x.d_b_ih = c.d_b_ih;
    x.d_b_hh = c.d_b_hh;
    choose_kernels(x.shape.dtype).weight_gradients(x, available_threads());
    return DIRECT_DONE;
  });
}

}  // namespace rnnfast

int rnnfast_gates_bytes_cpu(const rnnfast::ScanShape* layer) {
  return int(rnnfast::choose_kernels(layer->dtype).gates_bytes(*layer));
}
