// The operators that rnnfast/backends/cuda/launch.py is built on, registered through PyTorch's stable ABI. The products that are
// parallel in time are torch's; here are the plan, the scans, and the kernel of one step.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../text.h"
#include "device.h"
#include "launch.h"
#include "plan.h"

#ifndef RNNFAST_CUDA_NAMESPACE
#define RNNFAST_CUDA_NAMESPACE rnnfast_cuda
#define RNNFAST_CUDA_KEY CUDA
#endif

namespace rnnfast::cuda {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using torch::headeronly::ScalarType;

const void* in(const Tensor& t) { return t.numel() ? t.const_data_ptr() : nullptr; }
const void* in(const OptionalTensor& t) { return t ? in(*t) : nullptr; }
void* out(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }
void* out(const OptionalTensor& t) { return t ? out(*t) : nullptr; }

int checked_int(int64_t value, const char* what) {
  STD_TORCH_CHECK(value >= 0 && value <= std::numeric_limits<int>::max() / 8, "the cuda backend takes no ", value, " ", what);
  return static_cast<int>(value);
}

ComputeType parse_compute_type(Text text) {
  const std::string name = take(text);
  if (name == "float32") return ComputeType::float32;
  if (name == "tf32") return ComputeType::tf32;
  if (name == "bfloat16") return ComputeType::bfloat16;
  if (name == "float16") return ComputeType::float16;
  STD_TORCH_CHECK(name == "float64", "the cuda backend does not compute in ", name);
  return ComputeType::float64;
}

DeviceLimits parse_limits(const Ints& limits) {
  STD_TORCH_CHECK(limits.size() == 7, "limits are capability, multiprocessors, shared_bytes and four cluster counts");
  DeviceLimits d{static_cast<int>(limits[0]), static_cast<int>(limits[1]), static_cast<int>(limits[2]), {}};
  for (int i = 0; i < 4; ++i) d.clusters[i] = static_cast<int>(limits[3 + i]);
  return d;
}

Problem parse_problem(Text cell, int64_t hidden, int64_t batch, int64_t lanes, Text compute_type, bool backward) {
  Problem p{parse_cell(cell), 0, 0, 0, parse_compute_type(compute_type), backward};
  p.hidden = checked_int(hidden, "hidden units");
  p.batch = checked_int(batch, "rows");
  p.lanes = checked_int(lanes, "lanes");
  return p;
}

Ints limits(int64_t device) {
  const DeviceLimits d = device_limits(static_cast<int>(device));
  return {d.capability, d.multiprocessors, d.shared_bytes, d.clusters[0], d.clusters[1], d.clusters[2], d.clusters[3]};
}

// Of each plan, best first: kernel, blocks, rows, warps, bytes of shared memory, nanoseconds.
Ints plans(Text cell, int64_t hidden, int64_t batch, int64_t lanes, Text compute_type, bool backward, Ints device) {
  Ints all;
  for (const Plan& p : make_plans(parse_problem(cell, hidden, batch, lanes, compute_type, backward), parse_limits(device)))
    all.insert(all.end(), {static_cast<int>(p.kernel), p.blocks, p.rows, p.warps, p.shared_bytes,
                           static_cast<int64_t>(p.microseconds * 1000)});
  return all;
}

std::string check(Text cell, int64_t hidden, int64_t batch, int64_t lanes, Text compute_type, bool backward, Ints device,
                  Ints team) {
  std::string why_not;
  check_layout(parse_problem(cell, hidden, batch, lanes, compute_type, backward), parse_limits(device),
               static_cast<Kernel>(team.at(0)), static_cast<int>(team.at(1)), static_cast<int>(team.at(2)),
               static_cast<int>(team.at(3)), why_not);
  return why_not;
}

template <template <class> class X>
void run_over(ComputeType compute_type, Cell cell, bool backward, const LaunchShape& shape, const ScanParams& p, void* stream) {
  switch (compute_type) {
    case ComputeType::float32: return run_scan<Float32, X>(cell, backward, shape, p, stream);
    case ComputeType::tf32: return run_scan<Tf32, X>(cell, backward, shape, p, stream);
    case ComputeType::bfloat16: return run_scan<BFloat16, X>(cell, backward, shape, p, stream);
    case ComputeType::float16: return run_scan<Float16, X>(cell, backward, shape, p, stream);
    case ComputeType::float64: break;
  }
  if constexpr (!std::is_same_v<X<double>, ClusterExchange<double>>)
    return run_scan<Float64, X>(cell, backward, shape, p, stream);
  STD_TORCH_CHECK(false, "there is no float64 cluster scan");
}

ScanParams make_params(const Tensor& h_0, const Tensor& output, const OptionalTensor& offsets, Cell cell,
                       bool bidirectional, int64_t steps) {
  ScanParams p{};
  p.lanes = checked_int(h_0.size(0), "lanes");
  p.batch = checked_int(h_0.size(1), "rows of a batch");
  p.hidden = checked_int(h_0.size(2), "hidden units");
  STD_TORCH_CHECK(int64_t{p.lanes} * p.batch <= std::numeric_limits<int>::max(), "the cuda backend takes no ",
                  int64_t{p.lanes} * p.batch, " states");
  // Rows of all lanes' gates are counted in int.
  checked_int(int64_t{p.lanes} * gate_count(cell) * p.hidden, "gates of all lanes");
  p.rows = checked_int(output.size(0), "rows");
  p.steps = checked_int(steps, "steps");
  p.bidirectional = bidirectional;
  p.relu = cell == Cell::rnn_relu;
  p.offsets = static_cast<const int64_t*>(in(offsets));
  return p;
}

// `team` is kernel, blocks, rows and warps, as in `Plan.team` of rnnfast/backends/cuda/launch.py.
void run(ScanParams& p, const Tensor& h_0, Cell cell, ComputeType compute_type, bool backward, const Ints& team) {
  const auto kernel = static_cast<Kernel>(team.at(0));
  const int blocks = static_cast<int>(team.at(1)), rows = static_cast<int>(team.at(2)), warps = static_cast<int>(team.at(3));
  const char* reason = flaw(p.hidden, compute_type, blocks, rows, warps);
  STD_TORCH_CHECK(!reason, "no scan can be run so: ", reason);
  const bool is_size = blocks > 1 && blocks <= kMaxCluster && (blocks & (blocks - 1)) == 0;
  STD_TORCH_CHECK(kernel != Kernel::cluster || is_size, "no scan can be run so: a cluster has 2, 4, 8 or 16 blocks, not ", blocks);
  p.layout = make_layout(gate_count(cell), p.hidden, compute_type, exchange_of(kernel), backward, blocks, rows, warps);
  const Layout& l = p.layout;
  const int lane_teams = ceil_div(p.batch, l.rows);
  const LaunchShape shape{l.blocks, lane_teams, p.lanes, l.warps * 32, kernel == Kernel::cluster ? l.blocks : 1,
                          kernel == Kernel::grid, l.shared_bytes};
  Tensor exchange = h_0, flags = h_0;  // replaced where they are needed
  if (kernel == Kernel::grid) {
    const int64_t teams = int64_t{lane_teams} * p.lanes;
    const int64_t bytes = 2 * teams * l.rows * l.blocks * l.slice * operand_bytes(compute_type);
    exchange = torch::stable::new_empty(h_0, {bytes}, ScalarType::Byte);
    flags = torch::stable::new_zeros(h_0, {teams * l.blocks}, ScalarType::Int);
    p.exchange = out(exchange);
    p.flags = static_cast<uint32_t*>(out(flags));
  }
  void* stream = current_stream(h_0.get_device_index());
  if (kernel == Kernel::block)
    run_over<BlockExchange>(compute_type, cell, backward, shape, p, stream);
  else if (kernel == Kernel::cluster)
    run_over<ClusterExchange>(compute_type, cell, backward, shape, p, stream);
  else
    run_over<GridExchange>(compute_type, cell, backward, shape, p, stream);
}

void run_one_step(const StepParams& s, const Tensor& h_0, Cell cell, ComputeType compute_type, bool backward) {
  const int64_t states = int64_t{s.scan.batch} * s.scan.hidden;
  STD_TORCH_CHECK(s.scan.lanes <= kMaxGridYz, "the cuda backend takes at most ", kMaxGridYz, " lanes");
  const LaunchShape shape{checked_int((states + kStepThreads - 1) / kStepThreads, "blocks"), 1, s.scan.lanes, kStepThreads, 1,
                          false, 0};
  void* stream = current_stream(h_0.get_device_index());
  switch (compute_type) {
    case ComputeType::float32:
    case ComputeType::tf32: return run_step<Float32>(cell, backward, shape, s, stream);
    case ComputeType::float64: return run_step<Float64>(cell, backward, shape, s, stream);
    case ComputeType::bfloat16: return run_step<BFloat16>(cell, backward, shape, s, stream);
    case ComputeType::float16: return run_step<Float16>(cell, backward, shape, s, stream);
  }
}

ScanParams forward_params(const Tensor& gx, const OptionalTensor& ids, const OptionalTensor& b_hh, const Tensor& h_0,
                          const OptionalTensor& c_0, const OptionalTensor& offsets, const Tensor& output,
                          const OptionalTensor& h_n, const OptionalTensor& c_n, const OptionalTensor& tape,
                          Cell cell, bool bidirectional, int64_t steps) {
  ScanParams p = make_params(h_0, output, offsets, cell, bidirectional, steps);
  p.gx = in(gx);
  p.gx_rows = checked_int(gx.size(0), "rows or token ids");
  p.ids = static_cast<const int64_t*>(in(ids));
  p.b_hh = in(b_hh);
  p.h_0 = in(h_0);
  p.c_0 = in(c_0);
  p.output = out(output);
  p.h_n = out(h_n);
  p.c_n = out(c_n);
  p.tape = out(tape);
  return p;
}

ScanParams backward_params(const OptionalTensor& d_output, const OptionalTensor& d_h_n, const OptionalTensor& d_c_n,
                           const Tensor& h_0, const OptionalTensor& c_0, const OptionalTensor& offsets,
                           const Tensor& output, const OptionalTensor& tape, const Tensor& d_gx,
                           const OptionalTensor& d_g_last, const OptionalTensor& d_h_0, const OptionalTensor& d_c_0,
                           Cell cell, bool bidirectional, int64_t steps) {
  ScanParams p = make_params(h_0, output, offsets, cell, bidirectional, steps);
  p.d_output = in(d_output);
  p.d_h_n = in(d_h_n);
  p.d_c_n = in(d_c_n);
  p.h_0 = in(h_0);
  p.c_0 = in(c_0);
  p.output = const_cast<void*>(in(output));
  p.tape = const_cast<void*>(in(tape));
  p.d_gx = out(d_gx);
  p.d_g_last = out(d_g_last);
  p.d_h_0 = out(d_h_0);
  p.d_c_0 = out(d_c_0);
  return p;
}

void scan_forward(Tensor gx, OptionalTensor ids, Tensor w_hh, OptionalTensor b_hh, Tensor h_0, OptionalTensor c_0,
                  OptionalTensor offsets, Tensor output, Tensor h_n, OptionalTensor c_n, OptionalTensor tape,
                  Text cell_name, Text compute_type_name, bool bidirectional, int64_t steps, Ints team) {
  const Cell cell = parse_cell(cell_name);
  const ComputeType compute_type = parse_compute_type(compute_type_name);
  ScanParams p = forward_params(gx, ids, b_hh, h_0, c_0, offsets, output, h_n, c_n, tape, cell, bidirectional, steps);
  p.w_hh = in(w_hh);
  run(p, h_0, cell, compute_type, false, team);
}

void scan_backward(OptionalTensor d_output, OptionalTensor d_h_n, OptionalTensor d_c_n, Tensor w_hh_transposed, Tensor h_0,
                   OptionalTensor c_0, OptionalTensor offsets, Tensor output, OptionalTensor tape, Tensor d_gx,
                   OptionalTensor d_g_last, Tensor d_h_0, OptionalTensor d_c_0, Text cell_name, Text compute_type_name,
                   bool bidirectional, int64_t steps, Ints team) {
  const Cell cell = parse_cell(cell_name);
  const ComputeType compute_type = parse_compute_type(compute_type_name);
  ScanParams p = backward_params(d_output, d_h_n, d_c_n, h_0, c_0, offsets, output, tape, d_gx, d_g_last, d_h_0, d_c_0,
                                 cell, bidirectional, steps);
  p.w_hh = in(w_hh_transposed);
  run(p, h_0, cell, compute_type, true, team);
}

void step_forward(Tensor gx, OptionalTensor ids, OptionalTensor b_hh, Tensor h_0, OptionalTensor c_0, OptionalTensor offsets,
                  Tensor output, OptionalTensor tape, Text cell_name, Text compute_type_name, bool bidirectional,
                  int64_t steps, int64_t step, Tensor product, Tensor h_state, OptionalTensor c_state, Tensor operand) {
  const Cell cell = parse_cell(cell_name);
  const ComputeType compute_type = parse_compute_type(compute_type_name);
  const ScanParams p = forward_params(gx, ids, b_hh, h_0, c_0, offsets, output, std::nullopt, std::nullopt, tape, cell,
                                      bidirectional, steps);
  run_one_step({p, static_cast<int>(step), in(product), out(h_state), out(c_state), out(operand)}, h_0, cell, compute_type, false);
}

void step_backward(OptionalTensor d_output, Tensor h_0, OptionalTensor c_0, OptionalTensor offsets, Tensor output,
                   OptionalTensor tape, Tensor d_gx, OptionalTensor d_g_last, Text cell_name, Text compute_type_name,
                   bool bidirectional, int64_t steps, int64_t step, OptionalTensor product, Tensor h_state,
                   OptionalTensor c_state, Tensor operand) {
  const Cell cell = parse_cell(cell_name);
  const ComputeType compute_type = parse_compute_type(compute_type_name);
  const ScanParams p = backward_params(d_output, std::nullopt, std::nullopt, h_0, c_0, offsets, output, tape, d_gx,
                                       d_g_last, std::nullopt, std::nullopt, cell, bidirectional, steps);
  run_one_step({p, static_cast<int>(step), in(product), out(h_state), out(c_state), out(operand)}, h_0, cell, compute_type, true);
}

}  // namespace
}  // namespace rnnfast::cuda

STABLE_TORCH_LIBRARY(RNNFAST_CUDA_NAMESPACE, m) {
  m.def("limits(int device) -> int[]");
  m.def("plans(str cell, int hidden, int batch, int lanes, str compute_type, bool backward, int[] limits) -> int[]");
  m.def("check(str cell, int hidden, int batch, int lanes, str compute_type, bool backward, int[] limits, int[] team) -> str");
  m.def(
      "scan_forward(Tensor gx, Tensor? ids, Tensor w_hh, Tensor? b_hh, Tensor h_0, Tensor? c_0, Tensor? offsets, "
      "Tensor(a!) output, Tensor(b!) h_n, Tensor(c!)? c_n, Tensor(d!)? tape, str cell, str compute_type, bool bidirectional, "
      "int steps, int[] team) -> ()");
  m.def(
      "scan_backward(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor w_hh_transposed, Tensor h_0, Tensor? c_0, "
      "Tensor? offsets, Tensor output, Tensor? tape, Tensor(a!) d_gx, Tensor(b!)? d_g_last, Tensor(c!) d_h_0, "
      "Tensor(d!)? d_c_0, str cell, str compute_type, bool bidirectional, int steps, int[] team) -> ()");
  m.def(
      "step_forward(Tensor gx, Tensor? ids, Tensor? b_hh, Tensor h_0, Tensor? c_0, Tensor? offsets, Tensor(a!) output, "
      "Tensor(b!)? tape, str cell, str compute_type, bool bidirectional, int steps, int step, Tensor product, "
      "Tensor(c!) h_state, Tensor(d!)? c_state, Tensor(e!) operand) -> ()");
  m.def(
      "step_backward(Tensor? d_output, Tensor h_0, Tensor? c_0, Tensor? offsets, Tensor output, Tensor? tape, "
      "Tensor(a!) d_gx, Tensor(b!)? d_g_last, str cell, str compute_type, bool bidirectional, int steps, int step, "
      "Tensor? product, Tensor(c!) h_state, Tensor(d!)? c_state, Tensor(e!) operand) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(RNNFAST_CUDA_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("limits", TORCH_BOX(&rnnfast::cuda::limits));
  m.impl("plans", TORCH_BOX(&rnnfast::cuda::plans));
  m.impl("check", TORCH_BOX(&rnnfast::cuda::check));
}

STABLE_TORCH_LIBRARY_IMPL(RNNFAST_CUDA_NAMESPACE, RNNFAST_CUDA_KEY, m) {
  m.impl("scan_forward", TORCH_BOX(&rnnfast::cuda::scan_forward));
  m.impl("scan_backward", TORCH_BOX(&rnnfast::cuda::scan_backward));
  m.impl("step_forward", TORCH_BOX(&rnnfast::cuda::step_forward));
  m.impl("step_backward", TORCH_BOX(&rnnfast::cuda::step_backward));
}
