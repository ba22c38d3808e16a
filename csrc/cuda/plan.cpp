#include "plan.h"

#include <algorithm>

namespace rnnfast::cuda {
namespace {

// The model, in microseconds, from datasheets and published latencies. `make gpu` measures these on a card (its
// calibration); until a card has been measured the plan rests on them.
constexpr double kClock = 1700;           // cycles a microsecond
constexpr double kBlockExchange = 0.05, kClusterExchange = 0.35, kGridExchange = 1.3;
constexpr double kCellMath = 0.15;        // gate math and the stores it waits for
constexpr double kExchangeBytes = 32;     // a cycle into one multiprocessor
constexpr double kSharedBytes = 128;      // a cycle from shared memory
constexpr double kStepLaunches = 5.0;     // two kernels of a captured graph

// Multiply-adds a cycle and multiprocessor that a product of this kind sustains.
double multiply_adds(ComputeType n, int capability) {
  switch (n) {
    case ComputeType::float32: return 80;
    case ComputeType::float64: return capability == 80 || capability == 90 ? 32 : 1.5;
    case ComputeType::tf32: return capability >= 90 ? 500 : 300;
    default: return capability >= 90 ? 1000 : 600;
  }
}

int clusters_at_once(const DeviceLimits& d, int blocks) {
  for (int i = 0; i < 4; ++i)
    if (blocks == 2 << i) return d.clusters[i];
  return 0;
}

double step_time(const Problem& p, const DeviceLimits& d, Kernel kernel, const Layout& l) {
  const bool mma = tensor_cores(p.compute_type);
  const double arithmetic = 1.0 * l.rows * l.columns * l.depth / multiply_adds(p.compute_type, d.capability);
  // As product.cuh cuts them: each reads the weights in shared memory once.
  const bool five_at_once = kernel == Kernel::cluster && l.rows % 4 == 1 && l.rows > 1;
  const int row_tiles = mma ? l.rows / kMmaRows : five_at_once ? l.rows / 4 : ceil_div(l.rows, 4);
  const double weights_read = 1.0 * l.warps * l.slots * chunk_words(mma) * 128 * row_tiles;
  const double operand_read = 1.0 * l.groups * l.rows * l.depth * operand_bytes(p.compute_type);
  const double product = std::max(arithmetic, (weights_read + operand_read) / kSharedBytes) / kClock;
  const double sums_bytes = 1.0 * l.splits * l.rows * l.columns * sum_bytes(p.compute_type);
  const double operand = 1.0 * l.rows * l.depth * operand_bytes(p.compute_type);
  const double exchanged = kernel == Kernel::block                          ? 0
                           : pass_of(kernel, p) == Pass::backward_scatter ? sums_bytes
                                                                          : operand;
  const double arriving = (exchanged / kExchangeBytes + sums_bytes / kSharedBytes) / kClock;
  const double exchange =
      kernel == Kernel::block ? kBlockExchange : kernel == Kernel::cluster ? kClusterExchange : kGridExchange;
  const int at_once = kernel == Kernel::cluster ? clusters_at_once(d, l.blocks) : d.multiprocessors / l.blocks;
  return (all_teams(p, l.rows) + at_once - 1) / at_once * (product + arriving + exchange + kCellMath);
}

double steps_time(const Problem& p, const DeviceLimits& d) {
  const double work = 1.0 * p.lanes * p.batch * gate_count(p.cell) * p.hidden * p.hidden;
  const double read = 1.0 * p.lanes * gate_count(p.cell) * p.hidden * p.hidden * operand_bytes(p.compute_type);
  return kStepLaunches + std::max(work / (1.5 * multiply_adds(p.compute_type, d.capability)), read / kExchangeBytes) /
                             d.multiprocessors / kClock;
}

}  // namespace

Layout check_layout(const Problem& p, const DeviceLimits& d, Kernel kernel, int blocks, int rows, int warps,
                    std::string& why_not) {
  if (const char* reason = flaw(p.hidden, p.compute_type, blocks, rows, warps)) {
    why_not = reason;
    return {};
  }
  const Layout l = make_layout(gate_count(p.cell), p.hidden, p.compute_type, exchange_of(kernel), p.backward, blocks, rows, warps);
  const int64_t all_blocks = blocks * all_teams(p, rows);
  why_not.clear();
  if (std::max(teams(p, rows), p.lanes) > kMaxGridYz)
    why_not = "a launch has at most " + std::to_string(kMaxGridYz) + " lanes and teams of a lane";
  else if (kernel == Kernel::block && blocks != 1)
    why_not = "a block scan's team is one block";
  else if (kernel == Kernel::cluster && p.compute_type == ComputeType::float64)
    why_not = "there is no float64 cluster scan";
  else if (kernel == Kernel::cluster && d.capability < 90)
    why_not = "clusters need compute capability 9.0 or later";
  else if (kernel == Kernel::cluster && clusters_at_once(d, blocks) == 0)
    why_not = "the device runs no cluster of " + std::to_string(blocks) + " such blocks";
  else if (kernel == Kernel::grid && all_blocks > d.multiprocessors)
    why_not = "its " + std::to_string(all_blocks) + " blocks do not fit the device's " +
              std::to_string(d.multiprocessors) + " multiprocessors at once";
  else if (l.shared_bytes > d.shared_bytes)
    why_not = "its weights and state take " + std::to_string(l.shared_bytes) + " bytes of shared memory a block, and there are " +
              std::to_string(d.shared_bytes);
  return l;
}

std::vector<Plan> make_plans(const Problem& p, const DeviceLimits& d) {
  std::vector<Plan> plans{{Kernel::steps, 0, 0, 0, 0, steps_time(p, d)}};
  const auto consider = [&](Kernel kernel, int blocks, int rows) {
    std::string why_not;
    const Layout l = check_layout(p, d, kernel, blocks, rows, kMaxWarps, why_not);
    if (!why_not.empty()) return;
    const Plan plan{kernel, blocks, rows, kMaxWarps, l.shared_bytes, step_time(p, d, kernel, l)};
    for (Plan& other : plans)
      if (other.kernel == kernel && (kernel != Kernel::cluster || other.blocks == blocks)) {
        if (plan.microseconds < other.microseconds) other = plan;
        return;
      }
    plans.push_back(plan);
  };
  const bool mma = tensor_cores(p.compute_type);
  const int most_rows = kMaxWarps * 32 * most_pairs_per_thread(mma) / least_columns(mma);  // of a block with the fewest units
  for (int rows = mma ? kMmaRows : 1; rows <= most_rows; rows = mma || rows >= 8 ? 2 * rows : rows + 1) {
    consider(Kernel::block, 1, rows);
    for (int blocks = 2; blocks <= kMaxCluster; blocks *= 2) consider(Kernel::cluster, blocks, rows);
    for (int blocks = 2; blocks <= d.multiprocessors; ++blocks) consider(Kernel::grid, blocks, rows);
    if (rows >= p.batch) break;
  }
  std::stable_sort(plans.begin(), plans.end(), [](const Plan& a, const Plan& b) { return a.microseconds < b.microseconds; });
  return plans;
}

}  // namespace rnnfast::cuda
