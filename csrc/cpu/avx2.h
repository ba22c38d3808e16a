// The inner loop of a tile for AVX2, in assembly: GCC loads numbers ahead of the products before them, for which 16 registers are
// too few, and then moves sums about or keeps them in memory. Included by tile.h.
//
// For each unit of k up to three vectors of w are read, and then, row by row, the row's number is put in every lane and
// multiplied with each of them; a fourth vector is read for every row. That leaves 12 registers for sums, which they do not leave
// while something is fetched between two blocks of k: that takes no vectors.
#pragma once

namespace rnnfast::RNNFAST_ISA {

// MACRO(row, vector) for each vector of a row; ROW(vectors, row, MACRO) for each row.
#define RNNFAST_VECTORS_1(r, MACRO) MACRO(r, 0)
#define RNNFAST_VECTORS_2(r, MACRO) RNNFAST_VECTORS_1(r, MACRO) MACRO(r, 1)
#define RNNFAST_VECTORS_3(r, MACRO) RNNFAST_VECTORS_2(r, MACRO) MACRO(r, 2)
#define RNNFAST_VECTORS_4(r, MACRO) RNNFAST_VECTORS_3(r, MACRO) MACRO(r, 3)
#define RNNFAST_VECTORS_6(r, MACRO) RNNFAST_VECTORS_4(r, MACRO) MACRO(r, 4) MACRO(r, 5)
#define RNNFAST_ROWS_1(NV, ROW, MACRO) ROW(NV, 0, MACRO)
#define RNNFAST_ROWS_2(NV, ROW, MACRO) RNNFAST_ROWS_1(NV, ROW, MACRO) ROW(NV, 1, MACRO)
#define RNNFAST_ROWS_3(NV, ROW, MACRO) RNNFAST_ROWS_2(NV, ROW, MACRO) ROW(NV, 2, MACRO)
#define RNNFAST_ROWS_4(NV, ROW, MACRO) RNNFAST_ROWS_3(NV, ROW, MACRO) ROW(NV, 3, MACRO)
#define RNNFAST_ROWS_5(NV, ROW, MACRO) RNNFAST_ROWS_4(NV, ROW, MACRO) ROW(NV, 4, MACRO)
#define RNNFAST_ROWS_6(NV, ROW, MACRO) RNNFAST_ROWS_5(NV, ROW, MACRO) ROW(NV, 5, MACRO)
#define RNNFAST_ROWS_7(NV, ROW, MACRO) RNNFAST_ROWS_6(NV, ROW, MACRO) ROW(NV, 6, MACRO)
#define RNNFAST_ROWS_8(NV, ROW, MACRO) RNNFAST_ROWS_7(NV, ROW, MACRO) ROW(NV, 7, MACRO)
#define RNNFAST_EACH(NV, r, MACRO) RNNFAST_VECTORS_##NV(r, MACRO)
#define RNNFAST_EACH_ROW(NV, r, MACRO) MACRO(r)

// What a sum is in C++.
#define RNNFAST_DECLARE(r, c) Vec<T> s##r##c{};
#define RNNFAST_TAKE(r, c) sum[r][c] = s##r##c;
#define RNNFAST_SUM(r, c) [s##r##c] "+x"(s##r##c),

// Pointers to rows, in registers of the asm's own: it can have 30 operands, and a sum counts as two.
#define RNNFAST_ROW_0 "%%r8"
#define RNNFAST_ROW_1 "%%r9"
#define RNNFAST_ROW_2 "%%r10"
#define RNNFAST_ROW_3 "%%r11"
#define RNNFAST_ROW_4 "%%r12"
#define RNNFAST_ROW_5 "%%r13"
#define RNNFAST_ROW_6 "%%r14"
#define RNNFAST_ROW_7 "%%r15"
#define RNNFAST_CLOBBER_1 "r8"
#define RNNFAST_CLOBBER_2 RNNFAST_CLOBBER_1, "r9"
#define RNNFAST_CLOBBER_3 RNNFAST_CLOBBER_2, "r10"
#define RNNFAST_CLOBBER_4 RNNFAST_CLOBBER_3, "r11"
#define RNNFAST_CLOBBER_5 RNNFAST_CLOBBER_4, "r12"
#define RNNFAST_CLOBBER_6 RNNFAST_CLOBBER_5, "r13"
#define RNNFAST_CLOBBER_7 RNNFAST_CLOBBER_6, "r14"
#define RNNFAST_CLOBBER_8 RNNFAST_CLOBBER_7, "r15"
#define RNNFAST_LOAD_ROW(r) "mov 24+8*" #r "(%[tile]), " RNNFAST_ROW_##r "\n"

// The instructions of a unit of k, the first of two or the second, whose vectors of w are `at`. S ends the names of those that take
// numbers, "s" or "d", of SIZE bytes.
#define RNNFAST_READ_1(at) "vmovups (" at "), %%ymm12\n"
#define RNNFAST_READ_2(at) RNNFAST_READ_1(at) "vmovups 32(" at "), %%ymm13\n"
#define RNNFAST_READ_3(at) RNNFAST_READ_2(at) "vmovups 64(" at "), %%ymm14\n"
#define RNNFAST_READ_4(at) RNNFAST_READ_3(at)
#define RNNFAST_MULTIPLY_0(r, at) "vfmadd231p" S " %%ymm12, %%ymm15, %[s" #r "0]\n"
#define RNNFAST_MULTIPLY_1(r, at) "vfmadd231p" S " %%ymm13, %%ymm15, %[s" #r "1]\n"
#define RNNFAST_MULTIPLY_2(r, at) "vfmadd231p" S " %%ymm14, %%ymm15, %[s" #r "2]\n"
#define RNNFAST_MULTIPLY_3(r, at) "vfmadd231p" S " 96(" at "), %%ymm15, %[s" #r "3]\n"
#define RNNFAST_FIRST(r, c) RNNFAST_MULTIPLY_##c(r, "%[w]")
#define RNNFAST_SECOND(r, c) RNNFAST_MULTIPLY_##c(r, "%[w],%%rax")
#define RNNFAST_FIRST_ROW(NV, r, MACRO) \
  "vbroadcasts" S " (" RNNFAST_ROW_##r ",%[k]), %%ymm15\n" RNNFAST_VECTORS_##NV(r, MACRO)
#define RNNFAST_SECOND_ROW(NV, r, MACRO) \
  "vbroadcasts" S " " SIZE "(" RNNFAST_ROW_##r ",%[k]), %%ymm15\n" RNNFAST_VECTORS_##NV(r, MACRO)
#define RNNFAST_FIRST_UNIT(ROWS, NV) RNNFAST_READ_##NV("%[w]") RNNFAST_ROWS_##ROWS(NV, RNNFAST_FIRST_ROW, RNNFAST_FIRST)
#define RNNFAST_SECOND_UNIT(ROWS, NV) RNNFAST_READ_##NV("%[w],%%rax") RNNFAST_ROWS_##ROWS(NV, RNNFAST_SECOND_ROW, RNNFAST_SECOND)

// The same for a pair of panels. r10 and r11 are where the second one lies from the first, of this unit of k and of the next.
#define RNNFAST_LOAD_PAIR "mov 16(%[tile]), %%r10\n" "lea (%%r10,%%rax), %%r11\n"
#define RNNFAST_PAIR_ROW(r, unit) "vbroadcasts" S " " unit "(" RNNFAST_ROW_##r ",%[k]), %%ymm15\n"
#define RNNFAST_PAIR_MULTIPLY(r, c0, c1, c2)                 \
  "vfmadd231p" S " %%ymm12, %%ymm15, %[s" #r #c0 "]\n"       \
  "vfmadd231p" S " %%ymm13, %%ymm15, %[s" #r #c1 "]\n"       \
  "vfmadd231p" S " %%ymm14, %%ymm15, %[s" #r #c2 "]\n"
#define RNNFAST_PAIR_1(unit, first, second)                                               \
  RNNFAST_READ_3(first) RNNFAST_PAIR_ROW(0, unit) RNNFAST_PAIR_MULTIPLY(0, 0, 1, 2)       \
  RNNFAST_READ_3(second) RNNFAST_PAIR_MULTIPLY(0, 3, 4, 5)
#define RNNFAST_PAIR_2(unit, first, second)                                               \
  RNNFAST_READ_3(first) RNNFAST_PAIR_ROW(0, unit) RNNFAST_PAIR_MULTIPLY(0, 0, 1, 2)       \
  RNNFAST_PAIR_ROW(1, unit) RNNFAST_PAIR_MULTIPLY(1, 0, 1, 2)                             \
  RNNFAST_READ_3(second) RNNFAST_PAIR_MULTIPLY(1, 3, 4, 5)                                \
  RNNFAST_PAIR_ROW(0, unit) RNNFAST_PAIR_MULTIPLY(0, 3, 4, 5)

// Two units at a time, as everywhere; an odd one is the first.
#define RNNFAST_LOOP(ROWS, NV, PREPARE, FIRST_UNIT, SECOND_UNIT, ...)                                                    \
  if constexpr (R == ROWS && VECTORS == NV) {                                                                            \
    RNNFAST_ROWS_##ROWS(NV, RNNFAST_EACH, RNNFAST_DECLARE)                                                               \
    do {                                                                                                                 \
      if (ahead) ahead->fetch();                                                                                         \
      tile.end = min64(k + block, end);                                                                                  \
      asm volatile(RNNFAST_ROWS_##ROWS(NV, RNNFAST_EACH_ROW, RNNFAST_LOAD_ROW)                                           \
                   "mov (%[tile]), %%rdx\n"                                                                              \
                   "sub %[k], %%rdx\n"                                                                                   \
                   "mov 8(%[tile]), %%rax\n" PREPARE                                                                     \
                   "test $" SIZE ", %%rdx\n"                                                                             \
                   "mov (%[tile]), %%rdx\n"                                                                              \
                   "je 1f\n" FIRST_UNIT                                                                                  \
                   "add %%rax, %[w]\n"                                                                                   \
                   "add $" SIZE ", %[k]\n"                                                                               \
                   "cmp %%rdx, %[k]\n"                                                                                   \
                   "je 2f\n"                                                                                             \
                   "1:\n" FIRST_UNIT SECOND_UNIT                                                                         \
                   "lea (%[w],%%rax,2), %[w]\n"                                                                          \
                   "add $2*" SIZE ", %[k]\n"                                                                             \
                   "cmp %%rdx, %[k]\n"                                                                                   \
                   "jne 1b\n"                                                                                            \
                   "2:\n"                                                                                                \
                   : RNNFAST_ROWS_##ROWS(NV, RNNFAST_EACH, RNNFAST_SUM)[w] "+r"(w), [k] "+r"(k)                          \
                   : [tile] "r"(&tile)                                                                                   \
                   : "memory", "cc", "rax", "rdx", __VA_ARGS__, "xmm12", "xmm13", "xmm14", "xmm15");                     \
    } while (k < end);                                                                                                   \
    RNNFAST_ROWS_##ROWS(NV, RNNFAST_EACH, RNNFAST_TAKE)                                                                  \
  }
#define RNNFAST_TILE(ROWS, NV) \
  RNNFAST_LOOP(ROWS, NV, , RNNFAST_FIRST_UNIT(ROWS, NV), RNNFAST_SECOND_UNIT(ROWS, NV), RNNFAST_CLOBBER_##ROWS)
#define RNNFAST_PAIR(ROWS)                                                                                            \
  RNNFAST_LOOP(ROWS, 6, RNNFAST_LOAD_PAIR, RNNFAST_PAIR_##ROWS("", "%[w]", "%[w],%%r10"),                             \
               RNNFAST_PAIR_##ROWS(SIZE, "%[w],%%rax", "%[w],%%r11"), RNNFAST_CLOBBER_##ROWS, "r10", "r11")
#define RNNFAST_EVERY_TILE                                                                       \
  RNNFAST_TILE(1, 1) RNNFAST_TILE(2, 1) RNNFAST_TILE(3, 1) RNNFAST_TILE(4, 1) RNNFAST_TILE(5, 1) \
  RNNFAST_TILE(6, 1) RNNFAST_TILE(7, 1) RNNFAST_TILE(8, 1) RNNFAST_TILE(1, 2) RNNFAST_TILE(2, 2) \
  RNNFAST_TILE(3, 2) RNNFAST_TILE(4, 2) RNNFAST_TILE(5, 2) RNNFAST_TILE(6, 2) RNNFAST_TILE(1, 3) \
  RNNFAST_TILE(2, 3) RNNFAST_TILE(3, 3) RNNFAST_TILE(4, 3) RNNFAST_TILE(1, 4) RNNFAST_TILE(2, 4) \
  RNNFAST_TILE(3, 4) RNNFAST_PAIR(1) RNNFAST_PAIR(2)

// sum[r] += row[r][0..k_units) w, from zeros.
template <int R, int VECTORS, class T>
RNNFAST_INLINE void multiply(int64_t k_units, const T* const (&row)[R], const T* w, int64_t w_stride, Ahead* ahead,
                             Vec<T> (&sum)[R][VECTORS]) {
  static_assert(R <= (VECTORS == PAIR ? PAIR_ROWS : max_rows(VECTORS)), "there is such a tile");
  if (k_units == 0) return;
  struct {
    int64_t end, stride, second;  // bytes
    const T* row[R];
  } tile;
  tile.second = w_stride * int64_t(sizeof(T));
  tile.stride = VECTORS == PAIR ? int64_t(PAIR / 2 * sizeof(Vec<T>)) : tile.second;
  for (int r = 0; r < R; ++r) tile.row[r] = row[r];
  const int64_t end = k_units * int64_t(sizeof(T)), block = ahead ? ahead->block * int64_t(sizeof(T)) : end;
  int64_t k = 0;
  if constexpr (sizeof(T) == 4) {
#define S "s"
#define SIZE "4"
    RNNFAST_EVERY_TILE
#undef S
#undef SIZE
  } else {
#define S "d"
#define SIZE "8"
    RNNFAST_EVERY_TILE
#undef S
#undef SIZE
  }
}

}  // namespace rnnfast::RNNFAST_ISA
