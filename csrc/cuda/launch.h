// Starting a scan kernel. What needs the CUDA runtime is in device.cu; the emulated library of the tests has its own.
#pragma once

#include "layout.h"

namespace rnnfast::cuda {

// math.cuh and {block,cluster,grid}.cuh define these; whoever only launches needs their names.
struct Float32;
struct Float64;
struct Tf32;
struct BFloat16;
struct Float16;
template <class Operand>
class BlockExchange;
template <class Operand>
class ClusterExchange;
template <class Operand>
class GridExchange;

struct LaunchShape {
  int blocks_x, blocks_y, blocks_z;  // a team's, teams of a lane, lanes; a step's kernel has its blocks along x
  int threads, cluster;              // cluster: blocks of one cluster, 1 for none
  bool cooperative;                  // all blocks must be resident at once
  int shared_bytes;
};

// Runs the kernel for a cell on `stream`. One instance is compiled in each file of instances/.
template <class M, template <class> class X>
void run_scan(Cell cell, bool backward, const LaunchShape& shape, const ScanParams& params, void* stream);

// Runs the kernel of one step. All instances are in instances/steps.cu.
template <class M>
void run_step(Cell cell, bool backward, const LaunchShape& shape, const StepParams& params, void* stream);

}  // namespace rnnfast::cuda
