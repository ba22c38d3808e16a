// The inner loop of a tile for AVX2, in assembly: GCC loads numbers ahead of the products before them, for which 16 registers are
// too few, and then moves sums about or keeps them in memory. Included by tile.h.
//
// For each unit of k up to three vectors of w are read, and then, row by row, the row's number is put in every lane and
// multiplied with each of them; a fourth vector is read for every row. That leaves 12 registers for sums.
#pragma once

namespace rnnfast::RNNFAST_ISA {

// MACRO(row, vector) for each vector of a row; ROW(vectors, row, MACRO) for each row.
#define RNNFAST_VECTORS_1(r, MACRO) MACRO(r, 0)
#define RNNFAST_VECTORS_2(r, MACRO) RNNFAST_VECTORS_1(r, MACRO) MACRO(r, 1)
#define RNNFAST_VECTORS_3(r, MACRO) RNNFAST_VECTORS_2(r, MACRO) MACRO(r, 2)
#define RNNFAST_VECTORS_4(r, MACRO) RNNFAST_VECTORS_3(r, MACRO) MACRO(r, 3)
#define RNNFAST_ROWS_1(NV, ROW, MACRO) ROW(NV, 0, MACRO)
#define RNNFAST_ROWS_2(NV, ROW, MACRO) RNNFAST_ROWS_1(NV, ROW, MACRO) ROW(NV, 1, MACRO)
#define RNNFAST_ROWS_3(NV, ROW, MACRO) RNNFAST_ROWS_2(NV, ROW, MACRO) ROW(NV, 2, MACRO)
#define RNNFAST_ROWS_4(NV, ROW, MACRO) RNNFAST_ROWS_3(NV, ROW, MACRO) ROW(NV, 3, MACRO)
#define RNNFAST_ROWS_5(NV, ROW, MACRO) RNNFAST_ROWS_4(NV, ROW, MACRO) ROW(NV, 4, MACRO)
#define RNNFAST_ROWS_6(NV, ROW, MACRO) RNNFAST_ROWS_5(NV, ROW, MACRO) ROW(NV, 5, MACRO)
#define RNNFAST_ROWS_7(NV, ROW, MACRO) RNNFAST_ROWS_6(NV, ROW, MACRO) ROW(NV, 6, MACRO)
#define RNNFAST_ROWS_8(NV, ROW, MACRO) RNNFAST_ROWS_7(NV, ROW, MACRO) ROW(NV, 7, MACRO)
#define RNNFAST_EACH(NV, r, MACRO) RNNFAST_VECTORS_##NV(r, MACRO)

// What a sum needs in C++, and its instructions; S ends the names of those, "s" or "d".
#define RNNFAST_DECLARE(r, c) Vec<T> s##r##c;
#define RNNFAST_TAKE(r, c) sum[r][c] = s##r##c;
#define RNNFAST_SUM(r, c) [s##r##c] "=&x"(s##r##c),
#define RNNFAST_BEGIN(r, c) "vmovups 32*(" #r "*%c[vectors]+" #c ")(%[start]), %[s" #r #c "]\n"
#define RNNFAST_MULTIPLY(r, c) RNNFAST_MULTIPLY_##c(r)
#define RNNFAST_MULTIPLY_0(r) "vfmadd231p" S " %[w0], %[a], %[s" #r "0]\n"
#define RNNFAST_MULTIPLY_1(r) "vfmadd231p" S " %[w1], %[a], %[s" #r "1]\n"
#define RNNFAST_MULTIPLY_2(r) "vfmadd231p" S " %[w2], %[a], %[s" #r "2]\n"
#define RNNFAST_MULTIPLY_3(r) "vfmadd231p" S " 96(%[w]), %[a], %[s" #r "3]\n"
#define RNNFAST_MULTIPLY_ROW(NV, r, MACRO) \
  "vbroadcasts" S " (%[row" #r "],%[k]), %[a]\n" RNNFAST_VECTORS_##NV(r, MACRO)
#define RNNFAST_ROW(NV, r, MACRO) [row##r] "r"(row[r] + k_units),
#define RNNFAST_READ_1 "vmovups (%[w]), %[w0]\n"
#define RNNFAST_READ_2 RNNFAST_READ_1 "vmovups 32(%[w]), %[w1]\n"
#define RNNFAST_READ_3 RNNFAST_READ_2 "vmovups 64(%[w]), %[w2]\n"
#define RNNFAST_READ_4 RNNFAST_READ_3
#define RNNFAST_KEPT_1 [w0] "=&x"(w0),
#define RNNFAST_KEPT_2 RNNFAST_KEPT_1[w1] "=&x"(w1),
#define RNNFAST_KEPT_3 RNNFAST_KEPT_2[w2] "=&x"(w2),
#define RNNFAST_KEPT_4 RNNFAST_KEPT_3

#define RNNFAST_TILE(ROWS, NV)                                                                                       \
  if constexpr (R == ROWS && VECTORS == NV) {                                                                        \
    RNNFAST_ROWS_##ROWS(NV, RNNFAST_EACH, RNNFAST_DECLARE)                                                           \
    asm volatile(RNNFAST_ROWS_##ROWS(NV, RNNFAST_EACH, RNNFAST_BEGIN)                                                \
                 "1:\n" RNNFAST_READ_##NV RNNFAST_ROWS_##ROWS(NV, RNNFAST_MULTIPLY_ROW, RNNFAST_MULTIPLY)            \
                 "add %[stride], %[w]\n"                                                                             \
                 "add %[size], %[k]\n"                                                                               \
                 "jne 1b\n"                                                                                          \
                 : RNNFAST_ROWS_##ROWS(NV, RNNFAST_EACH, RNNFAST_SUM) RNNFAST_KEPT_##NV[a] "=&x"(a), [w] "+&r"(w),   \
                   [k] "+&r"(k)                                                                                      \
                 : RNNFAST_ROWS_##ROWS(NV, RNNFAST_ROW, )[stride] "r"(w_stride * int64_t(sizeof(T))),                \
                   [start] "r"(start), [size] "i"(sizeof(T)), [vectors] "i"(VECTORS)                                 \
                 : "memory");                                                                                        \
    RNNFAST_ROWS_##ROWS(NV, RNNFAST_EACH, RNNFAST_TAKE)                                                              \
  }
#define RNNFAST_EVERY_TILE                                                                       \
  RNNFAST_TILE(1, 1) RNNFAST_TILE(2, 1) RNNFAST_TILE(3, 1) RNNFAST_TILE(4, 1) RNNFAST_TILE(5, 1) \
  RNNFAST_TILE(6, 1) RNNFAST_TILE(7, 1) RNNFAST_TILE(8, 1) RNNFAST_TILE(1, 2) RNNFAST_TILE(2, 2) \
  RNNFAST_TILE(3, 2) RNNFAST_TILE(4, 2) RNNFAST_TILE(5, 2) RNNFAST_TILE(6, 2) RNNFAST_TILE(1, 3) \
  RNNFAST_TILE(2, 3) RNNFAST_TILE(3, 3) RNNFAST_TILE(4, 3) RNNFAST_TILE(1, 4) RNNFAST_TILE(2, 4) \
  RNNFAST_TILE(3, 4)

// sum[r] = start[r] + row[r][0..k_units) w, for at least one unit. `start` has its rows one behind the other.
template <int R, int VECTORS, class T>
RNNFAST_INLINE void multiply_units(int64_t k_units, const T* const (&row)[R], const T* w, int64_t w_stride, const T* start,
                                   Vec<T> (&sum)[R][VECTORS]) {
  static_assert(R <= max_rows(VECTORS), "there is such a tile");
  int64_t k = -k_units * int64_t(sizeof(T));  // bytes
  [[maybe_unused]] Vec<T> a, w0, w1, w2;
  if constexpr (sizeof(T) == 4) {
#define S "s"
    RNNFAST_EVERY_TILE
#undef S
  } else {
#define S "d"
    RNNFAST_EVERY_TILE
#undef S
  }
}

// sum[r] += row[r][0..k_units) w, from zeros.
template <int R, int NV, class T>
RNNFAST_INLINE void multiply(int64_t k_units, const T* const (&row)[R], const T* w, int64_t w_stride, Ahead* ahead,
                             Vec<T> (&sum)[R][NV]) {
  constexpr int V = Lanes<T>::count;
  alignas(64) static constexpr T zeros[R * NV * V] = {};
  if (k_units == 0) return;
  if (!ahead) return multiply_units(k_units, row, w, w_stride, zeros, sum);
  alignas(64) T so_far[R * NV * V] = {};
  const T* from[R];
  for (int64_t k = 0; k < k_units; k += ahead->block) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) from[r] = row[r] + k;
    ahead->fetch();
    multiply_units(min64(ahead->block, k_units - k), from, w + k * w_stride, w_stride, so_far, sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) store(so_far + (r * NV + c) * V, sum[r][c]);
    }
  }
}

}  // namespace rnnfast::RNNFAST_ISA
