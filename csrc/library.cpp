// Registers the implementations; schemas, fakes and autograd are in rnnfast/scan.py.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("scan_cpu", TORCH_BOX(&rnnfast::scan_cpu));
  m.impl("scan_cpu_backward", TORCH_BOX(&rnnfast::scan_cpu_backward));
}
