// The one way through which the kernels reach the hardware. Compiled by nvcc, this is the device version; compiled by a
// plain C++ compiler, emulator.h supplies the same names, and the very same kernels run on the CPU for the tests.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdio>

#define RNNFAST_DEVICE __device__ __forceinline__
#define RNNFAST_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)

namespace rnnfast::hw {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

struct alignas(16) Vec16 {
  uint32_t word[4];
};

// ---- where this thread is -------------------------------------------------------------------------------------------

RNNFAST_DEVICE int thread() { return threadIdx.x; }
RNNFAST_DEVICE int threads() { return blockDim.x; }
RNNFAST_DEVICE int lane() { return threadIdx.x & 31; }
RNNFAST_DEVICE int warp() { return threadIdx.x >> 5; }
RNNFAST_DEVICE int block_x() { return blockIdx.x; }
RNNFAST_DEVICE int block_y() { return blockIdx.y; }
RNNFAST_DEVICE int block_z() { return blockIdx.z; }
RNNFAST_DEVICE int blocks_x() { return gridDim.x; }
RNNFAST_DEVICE int blocks_y() { return gridDim.y; }

RNNFAST_DEVICE char* shared_memory() {
  extern __shared__ char __align__(128) shared[];
  return shared;
}

// ---- barriers and shuffles ------------------------------------------------------------------------------------------

RNNFAST_DEVICE void block_barrier() { __syncthreads(); }
// Brings a warp's threads together again, as mma demands.
RNNFAST_DEVICE void warp_barrier() { __syncwarp(); }

template <class V>
RNNFAST_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- numbers -------------------------------------------------------------------------------------------------------------

RNNFAST_DEVICE float widen(float x) { return x; }
RNNFAST_DEVICE double widen(double x) { return x; }
RNNFAST_DEVICE float widen(bfloat16 x) { return __bfloat162float(x); }
RNNFAST_DEVICE float widen(float16 x) { return __half2float(x); }

RNNFAST_DEVICE void narrow(float x, float& out) { out = x; }
RNNFAST_DEVICE void narrow(double x, double& out) { out = x; }
// As one of two, which is an instruction of the usual kind; of one it is one of the few slow ones.
RNNFAST_DEVICE void narrow(float x, bfloat16& out) { out = __floats2bfloat162_rn(x, 0.0f).x; }
RNNFAST_DEVICE void narrow(float x, float16& out) { out = __floats2half2_rn(x, 0.0f).x; }

// Rounds to TF32's 10 bits of mantissa, ties away from zero; mma alone would cut them off.
RNNFAST_DEVICE float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

struct Functions {
  // Divided without a branch for denormal numbers; the error stays within three units in the last place.
  static RNNFAST_DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }
  static RNNFAST_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
  static RNNFAST_DEVICE float tanh(float x) { return tanhf(x); }
  static RNNFAST_DEVICE double tanh(double x) { return ::tanh(x); }
};

// ---- tensor cores: d (16 x 8) += a (16 x 16, or 16 x 8 in TF32) b; fragments as PTX lays them out ---------------------

struct MmaBf16 {
  static RNNFAST_DEVICE void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct MmaF16 {
  static RNNFAST_DEVICE void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct MmaTf32 {
  static RNNFAST_DEVICE void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// ---- memory ---------------------------------------------------------------------------------------------------------

RNNFAST_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes in one piece.
RNNFAST_DEVICE Vec16 load_vector(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}

// Has a value computed here: else the compiler may compute it anew where it is used, or early what follows from it.
template <class Word>
RNNFAST_DEVICE void hold(Word& value) {
  asm volatile("" : "+r"(value));
}

// Has a value stay in its register: what comes from a shuffle is not computed anew. Whole warps call it.
template <class Word>
RNNFAST_DEVICE void keep(Word& value) {
  value = __shfl_sync(0xffffffffu, value, lane());
}

// Where something lies in this block's shared memory. Of a pointer the compiler finds the block's own part before each load.
using Address = uint32_t;
RNNFAST_DEVICE Address address(const void* shared) {
  Address address = shared_address(shared);
  hold(address);
  return address;
}

// What lies there.
template <class Value>
RNNFAST_DEVICE const Value* at(Address address) {
  return static_cast<const Value*>(__cvta_shared_to_generic(address));
}

// 16 bytes of shared memory in one piece.
RNNFAST_DEVICE Vec16 load_shared(Address from) {
  Vec16 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(from)
               : "memory");
  return v;
}

// 16 bytes from global memory, as the L2 has them, to shared memory; complete after copies_wait().
RNNFAST_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// A number, likewise, by way of the L1.
template <class Value>
RNNFAST_DEVICE void copy_async(Address shared, const Value* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(sizeof(Value)) : "memory");
}
RNNFAST_DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A flag in global memory: what its writer's block did before the release is seen after an acquire that reads it.
RNNFAST_DEVICE void flag_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
RNNFAST_DEVICE uint32_t flag_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// The upper half of the multiprocessor's clock: one register, quick to read.
RNNFAST_DEVICE uint32_t clock_high() {
  uint32_t now;
  asm volatile("mov.u32 %0, %%clock_hi;" : "=r"(now));
  return now;
}

// Ends the kernel with an error and says why: an assertion's message reaches the user even as the kernel dies.
// Out of line and never back: so that the caller keeps no registers for it.
[[noreturn]] static __device__ __noinline__ void fail(const char* message, int64_t which) {
  printf("rnnfast: %s: %lld\n", message, static_cast<long long>(which));
  __assert_fail(message, "rnnfast", 0, "scan");
}

// ---- clusters (sm_90): a block's shared memory is open to its peers, remote stores complete on an mbarrier ------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
RNNFAST_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

RNNFAST_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised mbarriers visible to remote stores; a cluster barrier must follow.
RNNFAST_DEVICE void mbarrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and keeps the phase open until `bytes` have been stored by peers.
RNNFAST_DEVICE void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity is over, after waiting for it as long as the hardware likes to; what peers stored is then seen.
// All that they store is this block's shared memory, so it acquires for the block, as CUTLASS's waits do. An acquire for the
// cluster would have each warp empty the multiprocessor's L1 at each step, and a fence restricted to shared memory has it wait for
// all that it has asked memory for.
RNNFAST_DEVICE bool mbarrier_try_wait(uint64_t* barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}

RNNFAST_DEVICE uint32_t remote_address(Address local, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(local), "r"(rank));
  return address;
}

// Stores at the place that is `local` in this block, in the block of that rank, and completes on its `barrier`.
RNNFAST_DEVICE void remote_store(Address local, uint64_t* barrier, int rank, uint32_t value) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   remote_address(local, rank)),
               "r"(value), "r"(remote_address(shared_address(barrier), rank))
               : "memory");
}
#else
// Never called: clusters are not planned for devices that lack them, but the code must compile.
RNNFAST_DEVICE void cluster_barrier() { __trap(); }
RNNFAST_DEVICE void mbarrier_init(uint64_t*, int) { __trap(); }
RNNFAST_DEVICE void mbarrier_publish() { __trap(); }
RNNFAST_DEVICE void mbarrier_expect(uint64_t*, int) { __trap(); }
RNNFAST_DEVICE bool mbarrier_try_wait(uint64_t*, int) { __trap(); return false; }
RNNFAST_DEVICE void remote_store(Address, uint64_t*, int, uint32_t) { __trap(); }
#endif

}  // namespace rnnfast::hw

#endif
