// The entry points of one instruction set; kernels.cpp is compiled once for each.
#pragma once

#include "../scan.h"

namespace rnnfast {

struct Kernels {
  const char* isa;
  void (*forward)(const ForwardArgs&, int threads);
  void (*backward)(const BackwardArgs&, int threads);
  // For bfloat16 where the processor multiplies it; null: the functions above do it in float32.
  void (*forward_bf16)(const ForwardArgs&, int threads);
  void (*backward_bf16)(const BackwardArgs&, int threads);
};

// The kernels for this machine, or for the instruction set that RNNFAST_CPU_ISA names: generic, avx2, avx512 or
// avx512_bf16. Throws where the processor lacks it.
const Kernels& choose_kernels();

}  // namespace rnnfast
