#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "device.h"
#include "instance.cuh"

namespace rnnfast::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "reading the device's limits");
  return value;
}

// Stands for the scan kernels: a block fills its multiprocessor's shared memory.
__global__ void __launch_bounds__(kMaxWarps * 32, 1) full_block() {}

// On the current device.
int clusters_at_once(int blocks, int shared_bytes) {
  check(cudaFuncSetAttribute(full_block, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "asking for occupancy");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kMaxWarps * 32);
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  // A cluster size the device cannot form is an error here; the answer to it is none.
  if (cudaFuncSetAttribute(full_block, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&count, full_block, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace

DeviceLimits device_limits(int device) {
  DeviceLimits d{};
  d.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  d.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (d.capability >= 90)
    for (int i = 0; i < 4; ++i) d.clusters[i] = clusters_at_once(2 << i, d.shared_bytes);
  return d;
}

void* current_stream(int device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream)) throw std::runtime_error("rnnfast: no current CUDA stream");
  return stream;
}

}  // namespace rnnfast::cuda
