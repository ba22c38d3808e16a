#include "step.h"

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <exception>

#include "kernels.h"
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
struct StepPlan {
  int64_t layers, samples;
  const PackedWeights* layer() const { return reinterpret_cast<const PackedWeights*>(this + 1); }
  const Sample* sample() const { return reinterpret_cast<const Sample*>(layer() + layers); }
};

}  // namespace

Tensor step_plan_cpu(std::vector<Tensor> packed, std::vector<Tensor> weights) {
  const size_t bytes = sizeof(StepPlan) + packed.size() * sizeof(PackedWeights) + weights.size() * sizeof(Sample);
  Tensor kept = torch::stable::new_empty(packed.at(0), {int64_t(bytes)});
  StepPlan* plan = static_cast<StepPlan*>(kept.mutable_data_ptr());
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

}  // namespace rnnfast

int rnnfast_step_cpu(const void* data, const void* input, const void* h_0, const void* c_0, void* output, void* h_n,
                     void* c_n, int64_t batch) {
  using namespace rnnfast;
  const StepPlan& plan = *static_cast<const StepPlan*>(data);
  for (int64_t i = 0; i < plan.samples; ++i)
    if (!plan.sample()[i].is_as_it_was()) return STEP_STALE;
  try {
    const ScanShape& first = plan.layer()[0].layer;
    if (first.ids) {
      const int64_t* ids = static_cast<const int64_t*>(input);
      for (int64_t b = 0; b < batch; ++b)
        if (ids[b] < 0 || ids[b] >= first.input) return STEP_FAILED;
    }
    const int64_t element = first.dtype == DType::float64 ? 8 : first.dtype == DType::float32 ? 4 : 2;
    const int64_t states = batch * first.state * element, cells = batch * first.hidden * element;
    const Kernels& kernels = choose_kernels(first.dtype);
    const int threads = available_threads();
    const Scratch between(plan.layers > 1 ? size_t(states) : 0);  // output of a layer that is not the last
    for (int64_t l = 0; l < plan.layers; ++l) {
      ForwardArgs x{};
      x.shape = plan.layer()[l].layer;
      x.packed = plan.layer()[l].panels;
      x.shape.steps = 1;
      x.shape.batch = x.shape.rows = batch;
      x.input = l == 0 ? input : static_cast<char*>(h_n) + (l - 1) * states;  // one step's output is the state after it
      x.output = l + 1 < plan.layers ? between.data() : output;
      x.h_0 = static_cast<const char*>(h_0) + l * states;
      x.h_n = static_cast<char*>(h_n) + l * states;
      if (c_0) x.c_0 = static_cast<const char*>(c_0) + l * cells, x.c_n = static_cast<char*>(c_n) + l * cells;
      kernels.forward(x, threads);
    }
  } catch (const std::exception&) {
    return STEP_FAILED;
  }
  return STEP_DONE;
}
