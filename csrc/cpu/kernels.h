// The entry points of one instruction set; kernels.cpp is compiled once for each.
#pragma once

#include <cstddef>

#include "../scan.h"

namespace rnnfast {

// logits = weight (rows, columns) @ hidden + bias; bias may be null. Each is summed in the same order whatever the
// threads, in the weight's dtype: float32 or float64.
struct HeadArgs {
  int64_t rows, columns;
  DType dtype;
  const void *weight, *bias, *hidden;
  double* logits;
};

// The mean cross entropy of rows of hidden states (rows, columns) under weight (classes, columns) and bias, which may be null, for
// a target class each; all float32.
struct LossArgs {
  int64_t rows, columns, classes;
  const float *hidden, *weight, *bias;
  const int64_t* targets;
};
struct LossGradients {
  float *hidden, *weight, *bias;
};

// out[16 g + i][j] = sum over rows k of a[k][16 g + i] w[k][j] for groups g of 16 columns of a; or that is added to out. The operands
// are packed in pieces, `chunks` of 32 rows deep: see pieces.h.
struct PieceProduct {
  const char *a, *w;
  int64_t chunks, a_groups, w_groups;  // groups of 16 columns
  const int64_t* groups;  // those of a to multiply, `count` of them
  int64_t count;
  float* out;
  int64_t rows, stride;  // of out
  bool begins;           // out holds nothing yet
};
struct MatrixUnit {
  void (*multiply)(const PieceProduct&);
  double (*near_product)(int64_t rounds);  // for the benchmarks: see limit_kernels.h
};

struct Kernels {
  void (*forward)(const ForwardArgs&, int threads);
  void (*backward)(const BackwardArgs&, int threads);
  size_t (*pack)(const ForwardArgs&, int threads);  // into `packed`, or returns the bytes it takes where that is null
  // The gradients of weights and biases of rows whose gradients of the gates a backward scan has left, of gates_bytes a row.
  void (*weight_gradients)(const BackwardArgs&, int threads);
  size_t (*pack_backward)(const BackwardArgs&, int threads);  // w_hh or w_ih, into packed_hh or packed_ih, as `pack`
  size_t (*gates_bytes)(const ScanShape&);
  void (*extended_forward)(const ExtendedForwardArgs&, int threads);
  void (*extended_backward)(const ExtendedBackwardArgs&, int threads);
  size_t (*extended_pack)(const ExtendedForwardArgs&, int threads);  // as `pack`
  // One step of every layer, then the head, over and over by one team of threads. In between `next`, on one thread, takes
  // the logits and tells whether there is another round; it must not throw. Layers have packed weights.
  void (*generate)(const ForwardArgs* layers, int64_t count, const HeadArgs& head, int threads, bool (*next)(void*),
                   void* context);
  double (*loss)(const LossArgs&, const LossGradients*, int threads);  // without gradients where that is null
  // A step of gradient descent in float32: values -= rate gradients, with one rounding where there are fused multiply-adds.
  void (*descend)(float* values, const float* gradients, int64_t count, float rate);
  // Numbers from bfloat16 to float32, and back, rounded to the nearest.
  void (*widen)(float* wide, void* half, int64_t count);
  void (*narrow)(float* wide, void* half, int64_t count);
  // For the benchmarks, in float32: see limit_kernels.h.
  double (*near_product)(int64_t batch, int64_t depth, int64_t rounds);
  double (*read_weights)(const float* data, int64_t lines, bool fetch, int64_t rounds);
  double (*near_gates)(Cell cell, bool backward, int64_t rounds);
  const MatrixUnit* matrix_unit;  // null where the instruction set has none
};

// The kernels for a dtype on this machine, or of the instruction set that RNNFAST_CPU_ISA names: generic, avx2, avx512,
// avx512_bf16 or amx. Throws where the processor lacks it.
const Kernels& choose_kernels(DType dtype);

// That of the chosen instruction set, for products of float32, or null.
const MatrixUnit* matrix_unit();

}  // namespace rnnfast
