// Which kernel runs a layer, and how: one function of the layer's sizes and the device's limits.
#pragma once

#include <string>
#include <vector>

#include "layout.h"

namespace rnnfast::cuda {

struct DeviceLimits {
  int capability;         // 90 for sm_90
  int multiprocessors;
  int shared_bytes;       // the most that one block can have
  int clusters[4];        // how many clusters of 2, 4, 8, 16 blocks run at once, each block filling its multiprocessor
};

struct Problem {
  Cell cell;
  int hidden, batch, lanes;
  ComputeType compute_type;
  bool backward;
};

enum class Kernel { block, cluster, grid, steps };

// What the scan of a problem exchanges on this kernel, which is not Kernel::steps.
inline Exchange exchange_of(Kernel kernel) {
  return kernel == Kernel::block ? Exchange::block : kernel == Kernel::cluster ? Exchange::cluster : Exchange::grid;
}
inline Pass pass_of(Kernel kernel, const Problem& p) {
  return pass_of(exchange_of(kernel), gate_count(p.cell), operand_bytes(p.compute_type), sum_bytes(p.compute_type),
                 tensor_cores(p.compute_type), p.backward);
}

struct Plan {
  Kernel kernel;
  int blocks, rows, warps;  // of a team; 0 for Kernel::steps
  int shared_bytes;
  double microseconds;  // a step, by the model
};

// The best team of each kernel (for clusters, of each size), fastest by the model first. Kernel::steps, a GEMM and a gate
// kernel a step, is always among them: it is what remains where no kernel can hold the weights, or where the batch is so
// large that the product outweighs everything.
std::vector<Plan> make_plans(const Problem& problem, const DeviceLimits& device);

// The layout of a scan with a given team, or why the device cannot run it.
Layout check_layout(const Problem& problem, const DeviceLimits& device, Kernel kernel, int blocks, int rows, int warps,
                    std::string& why_not);

// Of a lane; and of all lanes, which may be more than an int holds.
inline int teams(const Problem& p, int rows) { return ceil_div(p.batch, rows); }
inline int64_t all_teams(const Problem& p, int rows) { return int64_t{teams(p, rows)} * p.lanes; }

}  // namespace rnnfast::cuda
