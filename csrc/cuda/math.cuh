// How a scan computes: the type its tensors have, the type it accumulates in, the type of what is multiplied, and the
// unit that multiplies.
#pragma once

#include <cstring>

#include "hardware.h"

namespace rnnfast::cuda {

// The bits of `from` as a To.
template <class To, class From>
RNNFAST_DEVICE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// count / size, given 1.0f / size: the half is more than all roundings below 2^20.
RNNFAST_DEVICE int quotient(int count, float per_size) { return static_cast<int>((count + 0.5f) * per_size); }

struct Float32 {
  using Stored = float;
  using Sum = float;
  using Operand = float;
  static constexpr bool kTensorCores = false;
  static RNNFAST_DEVICE float operand(float x) { return x; }
};

struct Float64 {
  using Stored = double;
  using Sum = double;
  using Operand = double;
  static constexpr bool kTensorCores = false;
  static RNNFAST_DEVICE double operand(double x) { return x; }
};

// float32 tensors, products in TF32: what torch.backends.cuda.matmul.allow_tf32 allows.
struct Tf32 : hw::MmaTf32 {
  using Stored = float;
  using Sum = float;
  using Operand = float;
  static constexpr bool kTensorCores = true;
  static RNNFAST_DEVICE float operand(float x) { return hw::round_tf32(x); }
};

template <class Half, class Mma>
struct HalfMath : Mma {
  using Stored = Half;
  using Sum = float;
  using Operand = Half;
  static constexpr bool kTensorCores = true;
  static RNNFAST_DEVICE Half operand(float x) {
    Half out;
    hw::narrow(x, out);
    return out;
  }
};
struct BFloat16 : HalfMath<hw::bfloat16, hw::MmaBf16> {};
struct Float16 : HalfMath<hw::float16, hw::MmaF16> {};

}  // namespace rnnfast::cuda
