// Registers the implementations; the schemas are in Python: rnnfast/scan.py, extended.py, backends/cpu, lm/operators.py,
// bench/measure.py.
#include <torch/csrc/stable/library.h>

#include "cpu/direct.h"
#include "cpu/limits.h"
#include "cpu/lm/clip.h"
#include "cpu/lm/generate.h"
#include "cpu/lm/loss.h"
#include "cpu/lm/train.h"
#include "cpu/ops.h"
#include "cpu/weight_samples.h"

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("scan_cpu", TORCH_BOX(&rnnfast::scan_cpu));
  m.impl("scan_cpu_backward", TORCH_BOX(&rnnfast::scan_cpu_backward));
  m.impl("scan_cpu_states_backward", TORCH_BOX(&rnnfast::scan_cpu_states_backward));
  m.impl("scan_extended_cpu", TORCH_BOX(&rnnfast::scan_extended_cpu));
  m.impl("scan_extended_cpu_pack", TORCH_BOX(&rnnfast::scan_extended_cpu_pack));
  m.impl("scan_extended_cpu_backward", TORCH_BOX(&rnnfast::scan_extended_cpu_backward));
  m.impl("scan_cpu_pack", TORCH_BOX(&rnnfast::scan_cpu_pack));
  m.impl("scan_cpu_packed", TORCH_BOX(&rnnfast::scan_cpu_packed));
  m.impl("weight_samples_cpu", TORCH_BOX(&rnnfast::weight_samples_cpu));
  m.impl("direct_plan_cpu", TORCH_BOX(&rnnfast::direct_plan_cpu));
  m.impl("direct_layer_cpu", TORCH_BOX(&rnnfast::direct_layer_cpu));
  m.impl("direct_empty_cpu", TORCH_BOX(&rnnfast::direct_empty_cpu));
  m.impl("generate_cpu", TORCH_BOX(&rnnfast::generate_cpu));
  m.impl("linear_cross_entropy_cpu", TORCH_BOX(&rnnfast::linear_cross_entropy_cpu));
  m.impl("clip_gradients_cpu", TORCH_BOX(&rnnfast::clip_gradients_cpu));
  m.impl("backpropagate_cpu", TORCH_BOX(&rnnfast::backpropagate_cpu));
  m.impl("train_cpu", TORCH_BOX(&rnnfast::train_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {  // they take no tensor, so no device is known
  m.impl("fma_peak_cpu", TORCH_BOX(&rnnfast::fma_peak_cpu));
  m.impl("product_limit_cpu", TORCH_BOX(&rnnfast::product_limit_cpu));
  m.impl("weight_limit_cpu", TORCH_BOX(&rnnfast::weight_limit_cpu));
  m.impl("read_limit_cpu", TORCH_BOX(&rnnfast::read_limit_cpu));
  m.impl("gate_limit_cpu", TORCH_BOX(&rnnfast::gate_limit_cpu));
}
