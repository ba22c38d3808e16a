// Included by the files of instances/, each of which compiles the scans of one arithmetic over one exchange.
#pragma once

#include "gates.cuh"
#include "launch.h"
#include "scan.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

namespace rnnfast::cuda {

#ifdef __CUDACC__
inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here: torch must not find it after its own next launch
  throw std::runtime_error(std::string("rnnfast: CUDA error ") + doing + ": " + cudaGetErrorString(error));
}

// What any kernel may have on the current device: the attribute is of the kernel, which other threads may be launching for
// layers of other sizes.
inline void allow_all_shared_memory(const void* kernel) {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "reading the device's limits");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "reserving shared memory");
}

template <class Params>
void launch(void (*kernel)(Params), const LaunchShape& s, const Params& params, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(s.blocks_x, s.blocks_y, s.blocks_z);
  config.blockDim = dim3(s.threads);
  config.dynamicSmemBytes = s.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (s.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(s.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (s.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  // Attributes belong to the kernel on the current device; setting them again costs a fraction of a microsecond, and no kernel
  // needs leave for the first 48 KiB.
  if (s.shared_bytes > 48 * 1024) allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
  if (s.cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "asking for a large cluster");
  check(cudaLaunchKernelEx(&config, kernel, params), "launching the scan");
}
#else
template <class Params>
void launch(void (*kernel)(Params), const LaunchShape& s, const Params& params, void*) {
  if constexpr (std::is_same_v<Params, ScanParams>) {
    const size_t teams = size_t{1} * s.blocks_y * s.blocks_z;
    races::watch("the exchange", params.exchange, 2 * teams * params.layout.rows * params.layout.pieces * 16);
  }
  emulator::run({s.blocks_x, s.blocks_y, s.blocks_z, s.threads, s.cluster, static_cast<size_t>(s.shared_bytes)},
                [&] { kernel(params); });
}
#endif

template <class M, Kind KIND, template <class> class X, int PAIRS = most_pairs_per_thread(M::kTensorCores)>
void run_kind(bool backward, const LaunchShape& shape, const ScanParams& params, void* stream) {
  if constexpr (PAIRS > 1)
    if (params.layout.pairs < PAIRS) return run_kind<M, KIND, X, PAIRS - 1>(backward, shape, params, stream);
  launch(backward ? &scan_kernel<M, KIND, X, true, PAIRS> : &scan_kernel<M, KIND, X, false, PAIRS>, shape, params, stream);
}

template <class M, template <class> class X>
void run_scan(Cell cell, bool backward, const LaunchShape& shape, const ScanParams& params, void* stream) {
  if (cell == Cell::lstm)
    run_kind<M, Kind::lstm, X>(backward, shape, params, stream);
  else if (cell == Cell::gru)
    run_kind<M, Kind::gru, X>(backward, shape, params, stream);
  else
    run_kind<M, Kind::rnn, X>(backward, shape, params, stream);
}

template <class M, Kind KIND>
void step_kind(bool backward, const LaunchShape& shape, const StepParams& params, void* stream) {
  launch(backward ? &step_kernel<M, KIND, true> : &step_kernel<M, KIND, false>, shape, params, stream);
}

template <class M>
void run_step(Cell cell, bool backward, const LaunchShape& shape, const StepParams& params, void* stream) {
  if (cell == Cell::lstm)
    step_kind<M, Kind::lstm>(backward, shape, params, stream);
  else if (cell == Cell::gru)
    step_kind<M, Kind::gru>(backward, shape, params, stream);
  else
    step_kind<M, Kind::rnn>(backward, shape, params, stream);
}

#define RNNFAST_STEP_INSTANCE(M) \
  template void run_step<M>(Cell, bool, const LaunchShape&, const StepParams&, void*);
#define RNNFAST_SCAN_INSTANCE(M, X) \
  template void run_scan<M, X>(Cell, bool, const LaunchShape&, const ScanParams&, void*);

}  // namespace rnnfast::cuda
