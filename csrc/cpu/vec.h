// Vectors of the instruction set this file is compiled for: GCC/Clang vector types and the few operations they lack.
//
// Everything lives in namespace RNNFAST_ISA, and a file that includes this one makes no copy of its own of any other function:
// the linker would be free to keep the AVX-512 copy of a shared inline function for every machine. So templates of std are used
// with our own types only, or where they leave nothing but inlined code. tests/cpu/test_build.py looks into the objects.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(RNNFAST_ISA)
#error "define RNNFAST_ISA, the namespace of this instruction set"
#endif

namespace rnnfast::RNNFAST_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr bool MANY_REGISTERS = true;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr bool MANY_REGISTERS = false;
#else
constexpr int VECTOR_BYTES = 16;
#if defined(__aarch64__)
constexpr bool MANY_REGISTERS = true;
#else
constexpr bool MANY_REGISTERS = false;
#endif
#endif

using F32 = float __attribute__((vector_size(VECTOR_BYTES)));
using F64 = double __attribute__((vector_size(VECTOR_BYTES)));
using I32 = int32_t __attribute__((vector_size(VECTOR_BYTES)));
using U32 = uint32_t __attribute__((vector_size(VECTOR_BYTES)));
using I64 = int64_t __attribute__((vector_size(VECTOR_BYTES)));
using U16 = uint16_t __attribute__((vector_size(VECTOR_BYTES / 2)));

struct bf16 {
  uint16_t bits;
};

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using V = F32;
  using Int = I32;
  static constexpr int count = VECTOR_BYTES / 4;
};
template <>
struct Lanes<double> {
  using V = F64;
  using Int = I64;
  static constexpr int count = VECTOR_BYTES / 8;
};
template <class T>
using Vec = typename Lanes<T>::V;

// The type that values of a storage type are computed in.
template <class S>
struct ComputeType {
  using type = S;
};
template <>
struct ComputeType<bf16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeType<S>::type;

#define RNNFAST_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
RNNFAST_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
RNNFAST_INLINE F64 fma(F64 a, F64 b, F64 c) { return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__FMA__)
RNNFAST_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
RNNFAST_INLINE F64 fma(F64 a, F64 b, F64 c) { return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#elif defined(__aarch64__)
RNNFAST_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
RNNFAST_INLINE F64 fma(F64 a, F64 b, F64 c) { return (F64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
RNNFAST_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
RNNFAST_INLINE F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
#endif

template <class T>
RNNFAST_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// Has the compiler keep x in a register, where it has many.
template <class V>
RNNFAST_INLINE void in_register([[maybe_unused]] V& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
}

// Keeps GCC from reading early what comes behind, into registers that are needed for something else.
RNNFAST_INLINE void in_order() {
#if defined(__aarch64__) && !defined(__clang__)
  asm volatile("" : : : "memory");
#endif
}

// Keeps GCC from copying a sum of a loop to another register, and back at its end.
template <class V>
RNNFAST_INLINE void in_place([[maybe_unused]] V& x) {
#if defined(__aarch64__) && !defined(__clang__)
  asm("" : "+w"(x));
#endif
}

// The sum of the lanes of a vector: of its halves, of theirs, and so on, as each addition of a chain waits for the one before.
template <class T, int COUNT = Lanes<T>::count, class V>
RNNFAST_INLINE T total(const V& v) {
  if constexpr (COUNT == 2) {
    return v[0] + v[1];
  } else {
    typedef T Half __attribute__((vector_size(COUNT / 2 * sizeof(T))));  // GCC drops the attribute of an alias
    Half halves[2];
    std::memcpy(halves, &v, sizeof halves);
    return total<T, COUNT / 2>(halves[0] + halves[1]);
  }
}

// c - a b, rounded as `fma` is.
#if defined(__AVX512F__)
RNNFAST_INLINE F32 fnma(F32 a, F32 b, F32 c) { return (F32)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c); }
RNNFAST_INLINE F64 fnma(F64 a, F64 b, F64 c) { return (F64)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__FMA__)
RNNFAST_INLINE F32 fnma(F32 a, F32 b, F32 c) { return (F32)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c); }
RNNFAST_INLINE F64 fnma(F64 a, F64 b, F64 c) { return (F64)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#elif defined(__aarch64__)
RNNFAST_INLINE F32 fnma(F32 a, F32 b, F32 c) { return (F32)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
RNNFAST_INLINE F64 fnma(F64 a, F64 b, F64 c) { return (F64)vfmsq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
RNNFAST_INLINE F32 fnma(F32 a, F32 b, F32 c) { return c - a * b; }
RNNFAST_INLINE F64 fnma(F64 a, F64 b, F64 c) { return c - a * b; }
#endif

// x, but at least low. A NaN stays one.
#if defined(__AVX512F__)
RNNFAST_INLINE F32 at_least(float low, F32 x) { return (F32)_mm512_max_ps((__m512)splat(low), (__m512)x); }
#elif defined(__AVX2__)
RNNFAST_INLINE F32 at_least(float low, F32 x) { return (F32)_mm256_max_ps((__m256)splat(low), (__m256)x); }
#elif defined(__aarch64__)
RNNFAST_INLINE F32 at_least(float low, F32 x) { return (F32)vmaxq_f32((float32x4_t)splat(low), (float32x4_t)x); }
#else
RNNFAST_INLINE F32 at_least(float low, F32 x) { return x < splat(low) ? splat(low) : x; }
#endif
RNNFAST_INLINE F64 at_least(double low, F64 x) { return x < splat(low) ? splat(low) : x; }

RNNFAST_INLINE float widen(float x) { return x; }
RNNFAST_INLINE double widen(double x) { return x; }
RNNFAST_INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

RNNFAST_INLINE F32 load(const float* p) {
  F32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
RNNFAST_INLINE F64 load(const double* p) {
  F64 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
RNNFAST_INLINE F32 widen(U16 x) { return (F32)(__builtin_convertvector(x, U32) << 16); }
RNNFAST_INLINE F32 load(const bf16* p) {
  U16 v;
  std::memcpy(&v, p, sizeof v);
  return widen(v);
}

RNNFAST_INLINE void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }
RNNFAST_INLINE void store(double* p, F64 v) { std::memcpy(p, &v, sizeof v); }
// Round to nearest, ties to even; a NaN stays one.
RNNFAST_INLINE U16 narrow(F32 v) {
  const U32 bits = (U32)v;
  const U32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector((v == v ? rounded : (bits | 0x400000)) >> 16, U16);
}
RNNFAST_INLINE void store(bf16* p, F32 v) {
  const U16 half = narrow(v);
  std::memcpy(p, &half, sizeof half);
}

// Some lanes of a vector, of the last units of a row; nothing behind them is touched.
#if defined(__AVX512F__)
RNNFAST_INLINE F32 load_part(const float* p, int n) { return (F32)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
RNNFAST_INLINE F64 load_part(const double* p, int n) { return (F64)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p); }
RNNFAST_INLINE void store_part(float* p, F32 v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v); }
RNNFAST_INLINE void store_part(double* p, F64 v, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v); }
#endif
// Kept out of line where it takes a loop.
template <class S>
__attribute__((noinline)) Vec<Compute<S>> load_part(const S* p, int n) {
  S lanes[Lanes<Compute<S>>::count] = {};
  for (int e = 0; e < n; ++e) lanes[e] = p[e];
  return load(lanes);
}
template <class S>
__attribute__((noinline)) void store_part(S* p, Vec<Compute<S>> v, int n) {
  S lanes[Lanes<Compute<S>>::count];
  store(lanes, v);
  for (int e = 0; e < n; ++e) p[e] = lanes[e];
}

// The first n lanes; the others are zero.
template <class S>
RNNFAST_INLINE Vec<Compute<S>> load(const S* p, int n) {
  if (n >= Lanes<Compute<S>>::count) return load(p);
  return load_part(p, n);
}
template <class S>
RNNFAST_INLINE void store(S* p, Vec<Compute<S>> v, int n) {
  if (n >= Lanes<Compute<S>>::count) return store(p, v);
  store_part(p, v, n);
}

// ---- exp, tanh, sigmoid --------------------------------------------------------------------------------------------

// exp(r) - 1 = r + r^2 p(r) on |r| <= ln2/2. float: our own minimax fit, relative error 1.4e-8; double: Taylor, 2e-17.
RNNFAST_INLINE F32 expm1_reduced(F32 r) {
  F32 p = fma(splat(0x1.6bec02p-10f), r, splat(0x1.122778p-7f));
  p = fma(p, r, splat(0x1.555674p-5f));
  p = fma(p, r, splat(0x1.5554b0p-3f));
  p = fma(p, r, splat(0x1.fffffep-2f));
  return fma(r * r, p, r);
}
RNNFAST_INLINE F64 expm1_reduced(F64 r) {
  double factorial = 6227020800.0;  // 13!
  F64 p = splat(1 / factorial);
#pragma GCC unroll 16
  for (int n = 13; n > 2; --n) {
    factorial /= n;
    p = fma(p, r, splat(1 / factorial));
  }
  return fma(r * r, p, r);
}

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float lowest = -87.f, log2e = 0x1.715476p0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr int mantissa_bits = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double lowest = -708., log2e = 0x1.71547652b82fep0, ln2_high = 0x1.62e42feep-1,
                          ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round = 0x1.8p52;
  static constexpr int mantissa_bits = 52, bias = 1023;
};

// 2^n and exp(r) - 1 with x = n ln2 + r, for x in [lowest, -lowest].
template <class T>
struct SplitExp {
  Vec<T> scale, m;
  RNNFAST_INLINE SplitExp of(Vec<T> x) {
    using C = ExpConstants<T>;
    const Vec<T> t = fma(x, splat(C::log2e), splat(C::round));
    const Vec<T> n = t - splat(C::round);
    const Vec<T> r = fnma(n, splat(C::ln2_low), fnma(n, splat(C::ln2_high), x));
    using Int = typename Lanes<T>::Int;
    return {(Vec<T>)(((Int)t + C::bias) << C::mantissa_bits), expm1_reduced(r)};
  }
};

template <class T>
struct Math {
  using V = Vec<T>;
  using Int = typename Lanes<T>::Int;
  static constexpr T lowest = ExpConstants<T>::lowest;

  // 1 / (1 + e^-x), with relative accuracy for negative x, too; 0 below `lowest`, where it would hardly be a normal number.
  RNNFAST_INLINE V sigmoid(V x) {
    const auto s = SplitExp<T>::of(at_least(lowest, -at_least(lowest, x)));
    return x < splat(lowest) ? V{} : splat(T(1)) / (splat(T(1)) + fma(s.scale, s.m, s.scale));
  }
  // With e = e^(-2|x|) and m = 1 - e: m / (2 - m), which has no cancellation near 0; from |x| = 0.55 on
  // 1 - 2e / (2 - m), which is rounded once where tanh is close to 1 and its slope depends on the last bit.
  RNNFAST_INLINE V tanh(V x) {
    const Int sign = (Int)x & (Int)splat(T(-0.0));
    const V negative = (V)((Int)x | (Int)splat(T(-0.0)));
    const V twice = at_least(lowest, negative + negative);
    const auto s = SplitExp<T>::of(twice);
    const V e = fma(s.scale, s.m, s.scale), m = fnma(s.scale, s.m, splat(T(1)) - s.scale);
    const auto large = twice < splat(T(-1.1));
    const V q = (large ? e + e : m) / (splat(T(2)) - m);
    return (V)((Int)(large ? splat(T(1)) - q : q) | sign);
  }
};

}  // namespace rnnfast::RNNFAST_ISA
