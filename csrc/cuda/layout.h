// How a scan's work and weights are laid out over a team of blocks. Host code plans with it, kernels read it.
//
// A team of `blocks` blocks computes one lane for `rows` rows of the batch. Each block owns `units` hidden units with all
// their gates. A step is a product of the `operand` (`depth` values a row) with the block's weights (`columns` of them),
// which stay in registers and shared memory from the first step to the last, and then the cell's math for each pair of a row
// and a unit. What the team's blocks exchange is the operand, or the sums, as `Pass` tells.
//
// The product's columns are dealt to warps in groups, and its depth in chunks. On plain arithmetic a lane holds 8 bytes of each of
// eight columns, and the lanes of a warp split the depth, a chunk of 256 bytes; or, for a block's own gate gradients, which are few,
// eight lanes split it, a chunk of 64 bytes, and four times eight columns are a group. On tensor cores a chunk is two mma deep.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../cells.h"

namespace rnnfast::cuda {

enum class ComputeType { float32, tf32, bfloat16, float16, float64 };
enum class Exchange { block, cluster, grid };

// What the operand is, and what a block multiplies it with.
enum class Pass {
  forward,           // the hidden state of all units, gathered; with w_hh's columns of all units, for the block's gates
  backward_gather,   // the gate gradients of all units, gathered; with w_hh's rows of all gates, for the block's units
  backward_scatter,  // the gate gradients of the block's own units; with w_hh's rows of those, for all units: these sums
                     // are sent to the units' owners, each of which adds up those of all blocks
};

constexpr bool tensor_cores(ComputeType n) {
  return n == ComputeType::tf32 || n == ComputeType::bfloat16 || n == ComputeType::float16;
}
constexpr int sum_bytes(ComputeType n) { return n == ComputeType::float64 ? 8 : 4; }
constexpr int operand_bytes(ComputeType n) {
  return n == ComputeType::float64 ? 8 : n == ComputeType::bfloat16 || n == ComputeType::float16 ? 2 : 4;
}

// The backward of a cluster exchanges what is fewer bytes for each row and unit: gate gradients, or a sum. On plain
// arithmetic the product outweighs the exchange, and the block's own gate gradients fill its chunks of the depth less well;
// there sums must be less than a third. (A team of the grid has a sum from each of many more blocks to add up.)
constexpr Pass pass_of(Exchange exchange, int gates, int operand_size, int sum_size, bool mma, bool backward) {
  if (!backward) return Pass::forward;
  const bool fewer = (mma ? 1 : 3) * sum_size < gates * operand_size;
  return exchange == Exchange::cluster && fewer ? Pass::backward_scatter : Pass::backward_gather;
}

constexpr int kMaxWarps = 16;
constexpr int kMaxCluster = 16;   // blocks
constexpr int kStepThreads = 256;  // of the kernel of one step
constexpr int kMmaRows = 8;
constexpr int kMaxGridYz = 65535;  // blocks of a launch along y or z

constexpr int kLaneColumns = 8;  // on plain arithmetic
constexpr int depth_lanes(Pass pass) { return pass == Pass::backward_scatter ? 8 : 32; }
constexpr int least_columns(bool mma) { return mma ? 16 : kLaneColumns; }  // a block's units are a multiple of them
constexpr int group_columns(bool mma, Pass pass) { return mma ? 16 : kLaneColumns * 32 / depth_lanes(pass); }
constexpr int chunk_bytes(bool mma, Pass pass) { return mma ? 64 : 8 * depth_lanes(pass); }
constexpr int chunk_words(bool mma) { return mma ? 8 : 2 * kLaneColumns; }  // a lane's
// How many chunks a warp keeps in registers: 64, 48 and (float64) 32 registers a thread, as many as compile without spills.
constexpr int register_chunks(bool mma, int sum_bytes) { return mma ? 8 : sum_bytes == 8 ? 2 : 3; }
constexpr int most_pairs_per_thread(bool mma) { return mma ? 2 : 1; }

struct Layout {
  int blocks, units, rows, warps;
  int slice, depth;                   // operand values a row: of one block; of the product, rounded up to chunks
  int columns, groups, group_warps;   // group_warps warps take different groups
  int chunks, splits;                 // `splits` warps take different chunks of the same groups
  int groups_per_warp, chunks_per_warp;
  int apart;                          // bytes of the operand from one chunk of a warp to its next
  int stride;                         // bytes from one row of the operand to the next
  int pieces;                         // of 16 bytes, in a row as the team has it, without padding
  float per_unit, per_split, per_piece;  // 1 / units, 1 / splits, 1 / pieces: a division takes a GPU some twenty instructions
  int pairs;                          // of a row and a unit, that a thread takes
  int rows_at_once;                   // rows whose pairs the threads take side by side
  int slots;                          // chunks that a warp keeps in shared memory
  int sum_stride, sums_apart;         // from one row of the block's own sums to the next, and from one split's to the next
  int inputs_apart;                   // from the input of one step to the next's, 0 where they share a buffer
  int sums_at, operand_at, barrier_at, bias_at, input_at, id_at, row_at, shared_bytes;
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int round_up(int a, int b) { return ceil_div(a, b) * b; }

inline int units_of_block(int hidden, int blocks, bool mma) { return round_up(ceil_div(hidden, blocks), least_columns(mma)); }

// Why no device can run such a team, null if it is sound. Of one that is not, make_layout must not be asked: it divides by these
// numbers, and its sums of bytes may be more than an int holds.
inline const char* flaw(int hidden, ComputeType compute_type, int blocks, int rows, int warps) {
  const bool mma = tensor_cores(compute_type);
  if (std::min({blocks, rows, warps}) < 1 || warps > kMaxWarps)
    return "a team has a block, a row and a warp at least, and up to 16 warps";
  if (mma && rows % kMmaRows) return "tensor cores take rows by eight";
  if (int64_t{rows} * units_of_block(hidden, blocks, mma) > warps * 32 * most_pairs_per_thread(mma))
    return "there are too many states for the threads of a block";
  return nullptr;
}

inline Layout make_layout(int gates, int hidden, ComputeType compute_type, Exchange exchange, bool backward, int blocks, int rows,
                          int warps) {
  const bool mma = tensor_cores(compute_type);
  const Pass pass = pass_of(exchange, gates, operand_bytes(compute_type), sum_bytes(compute_type), mma, backward);
  Layout l{};
  l.blocks = blocks;
  l.rows = rows;
  l.warps = warps;
  l.units = units_of_block(hidden, blocks, mma);
  l.slice = (pass == Pass::forward ? 1 : gates) * l.units;
  const int chunk = chunk_bytes(mma, pass) / operand_bytes(compute_type);
  l.depth = round_up((pass == Pass::backward_scatter ? 1 : blocks) * l.slice, chunk);
  l.chunks = l.depth / chunk;
  l.columns = (pass == Pass::forward ? gates : pass == Pass::backward_gather ? 1 : blocks) * l.units;
  l.groups = ceil_div(l.columns, group_columns(mma, pass));
  l.splits = std::max(1, std::min(l.chunks, warps / l.groups));
  l.group_warps = warps / l.splits;
  l.groups_per_warp = ceil_div(l.groups, l.group_warps);
  l.chunks_per_warp = ceil_div(l.chunks, l.splits);
  l.apart = l.splits * chunk_bytes(mma, pass);
  // Eight lanes, over two rows, then read 128 bytes that lie in different banks.
  l.stride = round_up(l.depth * operand_bytes(compute_type), 128) + 64;
  l.slots = std::max(0, l.groups_per_warp * l.chunks_per_warp - register_chunks(mma, sum_bytes(compute_type)));
  l.sums_at = warps * l.slots * chunk_words(mma) * 128;
  // A warp stores the sums of eight columns and four pairs of rows at a time, or of four rows and eight columns: these then lie
  // in different banks.
  l.sum_stride = mma ? l.columns + 4 : l.columns + (40 - l.columns % 32) % 32;
  l.sums_apart = rows * l.sum_stride;
  // Sums that come from peers have two buffers: a peer may be a step ahead.
  const int row_sums = pass == Pass::backward_scatter ? 2 * l.columns : l.sum_stride;
  const int sums = l.splits * rows * row_sums * sum_bytes(compute_type);
  l.operand_at = l.sums_at + round_up(sums, 128);
  l.barrier_at = l.operand_at + 2 * rows * l.stride;
  l.pairs = std::max(1, ceil_div(rows * l.units, warps * 32));
  l.rows_at_once = rows / l.pairs;
  l.per_unit = 1.0f / l.units;
  l.per_split = 1.0f / l.splits;
  l.pieces = blocks * l.slice * operand_bytes(compute_type) / 16;
  l.per_piece = 1.0f / l.pieces;
  l.bias_at = l.barrier_at + 16;
  // Forward, b_hh of each column; what the input adds to it, for two steps, laid out as the sums (for one across the grid, where a
  // barrier lies between a step's cell and the next one's fetch); the rows' token ids, for two steps; and the rows of four steps,
  // with one behind each that is never there.
  l.inputs_apart = exchange == Exchange::grid ? 0 : l.sums_apart;
  l.input_at = l.bias_at + l.columns * sum_bytes(compute_type);
  l.id_at = l.input_at + (l.sums_apart + l.inputs_apart) * sum_bytes(compute_type);
  l.row_at = l.id_at + 2 * rows * 8;
  l.shared_bytes = pass == Pass::forward ? l.row_at + 4 * (rows + 1) * 4 : l.bias_at;
  return l;
}

// From the first buffer of the operand to that of a step, in bytes.
RNNFAST_HD int buffer_of(const Layout& l, int step) { return (step & 1) * l.rows * l.stride; }

// Everything a scan kernel is given. Tensors are those of docs/design.md; null is absent.
struct ScanParams {
  int steps, batch, lanes, rows, hidden;
  bool bidirectional, relu;
  const int64_t* offsets;  // (T + 1,) first row of each step, on the device; null: every step has `batch` rows
  const void* w_hh;        // forward (D, G*H, H), backward its transpose (D, H, G*H)
  const void *b_hh, *h_0, *c_0;
  const void* gx;  // (rows or ids, D*G*H) in the accumulation type: what the input adds to the gates
  int gx_rows;
  const int64_t* ids;
  void *output, *h_n, *c_n, *tape;  // written forward, read backward
  const void *d_output, *d_h_n, *d_c_n;
  void *d_gx, *d_g_last, *d_h_0, *d_c_0;  // d_gx (N, D*G*H); d_g_last (N, D*H): the GRU's recurrent n
  void* exchange;                         // grid scan: a double buffer of operands for each team
  uint32_t* flags;                        // grid scan: the last step each block has finished, 0 before
  Layout layout;
};

// What the kernel of one step is given besides.
struct StepParams {
  ScanParams scan;
  int step;
  const void* product;           // forward (D, B, G*H): h w_hh^T; backward (D, B, H): the last step's operand times w_hh
  void *h_state, *c_state;       // (D, B, H), also the gradients of these
  void* operand;                 // of the next product: forward (D, B, H), backward (D, B, G*H)
};

}  // namespace rnnfast::cuda
