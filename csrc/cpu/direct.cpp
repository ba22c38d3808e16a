#include "direct.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <exception>

#include "kernels.h"
#include "tensors.h"
#include "threads.h"

namespace rnnfast {
namespace {

constexpr int64_t SAMPLES = 16;

// Some elements from all over a weight, to see a write that torch's version counter does not count.
struct Sample {
  const char* data;
  int64_t elements, stride;  // in bytes
  int64_t element_size;
  char held[SAMPLES * 8];

  bool is_as_it_was() const {
    char now[sizeof held];
    read(now);
    return std::memcmp(now, held, size_t(elements * element_size)) == 0;
  }
  void read(char* to) const {
    for (int64_t i = 0; i < elements; ++i) std::memcpy(to + i * element_size, data + i * stride, size_t(element_size));
  }
};

// Followed in memory by the layers and the samples.
struct Plan {
  int64_t layers, samples;
  const PackedWeights* layer() const { return reinterpret_cast<const PackedWeights*>(this + 1); }
  const Sample* sample() const { return reinterpret_cast<const Sample*>(layer() + layers); }
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

// Bytes of both states of a layer, and of all its output.
struct Bytes {
  size_t state, cell, output;
  explicit Bytes(const ScanShape& s) {
    const size_t element = s.dtype == DType::float64 ? 8 : s.dtype == DType::float32 ? 4 : 2;
    state = size_t(s.lanes * s.batch * s.state) * element;
    cell = size_t(s.lanes * s.batch * s.hidden) * element;
    output = size_t(s.rows * s.lanes * s.state) * element;
  }
};

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Zeros in the place of both states, or of their gradients, where a caller leaves any out.
class StandIns {
 public:
  StandIns(const ScanShape& s, bool needed) : begin_(aligned(Bytes(s).state)), memory_(needed ? begin_ + Bytes(s).cell : 0) {
    if (needed) std::memset(memory_.data(), 0, begin_ + Bytes(s).cell);
  }
  char* state() const { return memory_.data(); }
  char* cell() const { return memory_.data() + begin_; }

 private:
  size_t begin_;  // of the cell state
  Scratch memory_;
};

template <class F>
int guarded(F run) {
  try {
    return run();
  } catch (const std::exception&) {
    return DIRECT_FAILED;
  }
}

}  // namespace

Tensor direct_plan_cpu(std::vector<Tensor> packed, std::vector<Tensor> weights) {
  const size_t bytes = sizeof(Plan) + packed.size() * sizeof(PackedWeights) + weights.size() * sizeof(Sample);
  Tensor kept = torch::stable::new_empty(packed.at(0), {int64_t(bytes)});
  Plan* plan = static_cast<Plan*>(kept.mutable_data_ptr());
  *plan = {int64_t(packed.size()), int64_t(weights.size())};
  PackedWeights* layer = const_cast<PackedWeights*>(plan->layer());
  for (const Tensor& each : packed) *layer++ = unpack(each);
  Sample* sample = const_cast<Sample*>(plan->sample());
  for (const Tensor& weight : weights) {
    const int64_t elements = weight.numel(), size = weight.element_size();
    const int64_t apart = elements > SAMPLES ? elements / SAMPLES : 1;
    *sample = {static_cast<const char*>(weight.const_data_ptr()), elements < SAMPLES ? elements : SAMPLES, apart * size, size, {}};
    sample->read(sample->held);
    ++sample;
  }
  return kept;
}

Tensor direct_layer_cpu(Tensor w_ih, Tensor w_hh, OptionalTensor w_hr, std::string cell, bool ids) {
  const ScanShape layer = layer_shape(w_ih, w_hh, w_hr, cell, ids);
  Tensor kept = torch::stable::new_empty(w_hh, {int64_t(sizeof layer)}, ScalarType::Byte);
  std::memcpy(kept.mutable_data_ptr(), &layer, sizeof layer);
  return kept;
}

}  // namespace rnnfast

using namespace rnnfast;

int rnnfast_infer_cpu(const void* data, int64_t steps, int64_t batch, const void* input, const void* h_0, const void* c_0,
                      void* output, void* h_n, void* c_n) {
  const Plan& plan = *static_cast<const Plan*>(data);
  for (int64_t i = 0; i < plan.samples; ++i)
    if (!plan.sample()[i].is_as_it_was()) return DIRECT_STALE;
  return guarded([&] {
    const ScanShape first = shape_of_call(plan.layer()[0].layer, steps, batch);
    if (!ids_fit(first, input)) return DIRECT_FAILED;
    const Kernels& kernels = choose_kernels(first.dtype);
    const int threads = available_threads();
    const Bytes bytes(first);
    const StandIns zeros(first, !h_0);
    // What a layer that is not the last puts out; the next one reads it while it writes the other half.
    const size_t half = aligned(bytes.output);
    const Scratch between(half * size_t(plan.layers > 2 ? 2 : plan.layers - 1));
    wish_huge_pages_if_large(output, bytes.output);
    for (int64_t l = 0; l < plan.layers; ++l) {
      ForwardArgs x{};
      x.shape = shape_of_call(plan.layer()[l].layer, steps, batch);
      x.packed = plan.layer()[l].panels;
      x.input = l == 0 ? input : between.data() + size_t(l - 1) % 2 * half;
      x.output = l + 1 < plan.layers ? between.data() + size_t(l) % 2 * half : output;
      x.h_0 = h_0 ? static_cast<const char*>(h_0) + size_t(l) * bytes.state : zeros.state();
      x.h_n = static_cast<char*>(h_n) + l * bytes.state;
      if (c_n) {
        x.c_0 = c_0 ? static_cast<const char*>(c_0) + l * bytes.cell : zeros.cell();
        x.c_n = static_cast<char*>(c_n) + l * bytes.cell;
      }
      kernels.forward(x, threads);
    }
    return DIRECT_DONE;
  });
}

int rnnfast_forward_cpu(const void* layer, int64_t steps, int64_t batch, const void* input, const void* h_0, const void* c_0,
                        const void* w_ih, const void* w_hh, const void* b_ih, const void* b_hh, const void* w_hr,
                        void* output, void* h_n, void* c_n, void* tape) {
  return guarded([&] {
    const ScanShape s = shape_of_call(*static_cast<const ScanShape*>(layer), steps, batch);
    if (!ids_fit(s, input)) return DIRECT_FAILED;
    const Bytes bytes(s);
    const StandIns zeros(s, !h_0);
    wish_huge_pages_if_large(output, bytes.output);
    wish_huge_pages_if_large(tape, bytes.output / s.state * s.hidden * tape_count(s.cell));
    const ForwardArgs x{s, input, w_ih, w_hh, b_ih, b_hh, w_hr, h_0 ? h_0 : zeros.state(), c_0 || !c_n ? c_0 : zeros.cell(),
                        output, h_n, c_n, tape, nullptr};
    choose_kernels(s.dtype).forward(x, available_threads());
    return DIRECT_DONE;
  });
}

int rnnfast_backward_cpu(const void* layer, int64_t steps, int64_t batch, const void* d_output, const void* d_h_n,
                         const void* d_c_n, const void* input, const void* h_0, const void* c_0, const void* w_ih,
                         const void* w_hh, const void* b_ih, const void* b_hh, const void* w_hr, const void* output,
                         const void* tape, void* d_input, void* d_h_0, void* d_c_0, void* d_w_ih, void* d_w_hh, void* d_b_ih,
                         void* d_b_hh, void* d_w_hr) {
  return guarded([&] {
    const ScanShape s = shape_of_call(*static_cast<const ScanShape*>(layer), steps, batch);
    const bool lstm = s.cell == Cell::lstm;
    const StandIns zeros(s, !h_0), unwanted(s, !d_h_0 || (lstm && !d_c_0));
    wish_huge_pages_if_large(d_input, Bytes(s).output / s.state * s.input);
    const BackwardArgs x{s,       d_output, d_h_n, d_c_n, input, w_ih, w_hh, b_ih, b_hh, w_hr,
                         h_0 ? h_0 : zeros.state(), c_0 || !lstm ? c_0 : zeros.cell(), output, tape,
                         d_input, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr,
                         d_h_0 ? d_h_0 : unwanted.state(), d_c_0 || !lstm ? d_c_0 : unwanted.cell(), nullptr};
    choose_kernels(s.dtype).backward(x, available_threads());
    return DIRECT_DONE;
  });
}
