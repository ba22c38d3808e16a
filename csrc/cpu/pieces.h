// Products of float32 on the matrix unit, for the gradients of weights: numbers as three bfloat16 pieces each, whose sum they are.
// Of the nine products of two numbers' pieces the six largest are added up; the others come to less than 2^-24 of theirs.
//
// An operand is packed in tiles of the unit, one for each piece of 16 columns of 32 rows, which lie in the order (rows, columns,
// pieces). w's tiles hold pairs of rows, one below the other; a's hold its columns, one below the other.
#pragma once

#include "kernels.h"
#include "packing.h"

namespace rnnfast::RNNFAST_ISA {

constexpr int64_t PIECES = 3, PIECE_COLUMNS = 16, PIECE_ROWS = 32, PIECE_BYTES = 2 * PIECE_COLUMNS * PIECE_ROWS;
constexpr int64_t piece_chunks(int64_t rows) { return ceil_div(rows, PIECE_ROWS); }
// Of the tiles of 16 columns, so many rows deep.
constexpr int64_t pieces_bytes(int64_t rows) { return piece_chunks(rows) * PIECES * PIECE_BYTES; }

#if defined(__AVX512F__)

// Whether numbers of which the largest has these bits can be split: pieces and products neither overflow nor fall below the normal
// numbers, which the unit takes for zero. Numbers that are much smaller than the largest may, they do not count beside it.
RNNFAST_INLINE bool pieces_hold(uint32_t largest) {
  constexpr uint32_t least = (127 - 50) << 23, most = (127 + 60) << 23;  // 2^-50, 2^60
  return largest == 0 || (largest >= least && largest <= most);
}

RNNFAST_INLINE U32 magnitude(F32 x) { return (U32)x & 0x7fffffff; }
RNNFAST_INLINE U32 larger(U32 a, U32 b) { return a > b ? a : b; }
RNNFAST_INLINE uint32_t largest_lane(U32 v) { return _mm512_reduce_max_epu32((__m512i)v); }

// The pieces of two numbers adjacent in k, in each lane.
RNNFAST_INLINE void split_pair(F32 low, F32 high, U32* pieces) {
#pragma GCC unroll 3
  for (int p = 0; p < PIECES; ++p) {
    // Rounded, but the last, which is what is left and fits.
    const uint32_t half = p < PIECES - 1 ? 0x8000 : 0;
    const U32 l = ((U32)low + half) & 0xffff0000, h = ((U32)high + half) & 0xffff0000;
    pieces[p] = h | l >> 16;
    low -= (F32)l;
    high -= (F32)h;
  }
}

// Packs rows[0..k), of so many columns, as operand w. Returns the bits of the largest number.
inline uint32_t pack_pieces(char* out, const float* const* rows, int64_t k, int64_t columns) {
  constexpr int64_t FETCHED = 8;  // rows ahead
  const int64_t groups = ceil_div(columns, PIECE_COLUMNS);
  U32 largest{};
  for (int64_t i = 0; i < piece_chunks(k) * PIECE_ROWS; i += 2) {
    char* const to = out + (i / PIECE_ROWS * groups * PIECES) * PIECE_BYTES + i % PIECE_ROWS / 2 * 64;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t column = g * PIECE_COLUMNS;
      const int n = int(min64(PIECE_COLUMNS, columns - column));
      if (i + FETCHED + 1 < k) {
        __builtin_prefetch(rows[i + FETCHED] + column);
        __builtin_prefetch(rows[i + FETCHED + 1] + column);
      }
      const F32 low = i < k ? load(rows[i] + column, n) : F32{}, high = i + 1 < k ? load(rows[i + 1] + column, n) : F32{};
      largest = larger(largest, larger(magnitude(low), magnitude(high)));
      U32 pieces[PIECES];
      split_pair(low, high, pieces);
      for (int p = 0; p < PIECES; ++p) std::memcpy(to + (g * PIECES + p) * PIECE_BYTES, &pieces[p], sizeof pieces[p]);
    }
  }
  return largest_lane(largest);
}

// Packs columns column(0), column(1).. of row(0..k) as operand a, with the bits of the largest number of each 16 columns, which are
// contiguous. Adds each column to its sum, where there are sums, of whole vectors.
template <class Row, class Column>
void pack_pieces_transposed(char* out, Row row, int64_t k, Column column, int64_t columns, uint32_t* largest, float* sums) {
  const int64_t groups = ceil_div(columns, PIECE_COLUMNS), chunks = piece_chunks(k);
  std::memset(largest, 0, size_t(groups) * sizeof *largest);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* rows[PIECE_ROWS];
    for (int64_t i = 0; i < PIECE_ROWS; ++i) rows[i] = chunk * PIECE_ROWS + i < k ? row(chunk * PIECE_ROWS + i) : nullptr;
    for (int64_t g = 0; g < groups; ++g) {
      const int n = int(min64(PIECE_COLUMNS, columns - g * PIECE_COLUMNS));
      const int64_t at = column(g * PIECE_COLUMNS);
      U32 most{}, pieces[PIECES][PIECE_ROWS / 2];
      F32 sum{};
      for (int64_t i = 0; i < PIECE_ROWS; i += 2) {
        const F32 low = rows[i] ? load(rows[i] + at, n) : F32{};
        const F32 high = rows[i + 1] ? load(rows[i + 1] + at, n) : F32{};
        most = larger(most, larger(magnitude(low), magnitude(high)));
        sum += low + high;
        U32 pair[PIECES];
        split_pair(low, high, pair);
        for (int p = 0; p < PIECES; ++p) pieces[p][i / 2] = pair[p];
      }
      const uint32_t bits = largest_lane(most);
      if (bits > largest[g]) largest[g] = bits;
      if (sums) store(sums + g * PIECE_COLUMNS, load(sums + g * PIECE_COLUMNS) + sum);
      for (int p = 0; p < PIECES; ++p) {
        transpose(pieces[p]);
        std::memcpy(out + ((chunk * groups + g) * PIECES + p) * PIECE_BYTES, pieces[p], PIECE_BYTES);
      }
    }
  }
}

#endif

#if defined(__AMX_BF16__)

// The sums of A groups of a by W groups of w.
template <int A, int W>
RNNFAST_INLINE void multiply_tiles(const PieceProduct& x, const char* a_0, const char* a_1, const char* w, float (*sums)[16 * 16]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t a_step = x.a_groups * PIECES * PIECE_BYTES, w_step = x.w_groups * PIECES * PIECE_BYTES;
  for (int64_t chunk = 0; chunk < x.chunks; ++chunk, a_0 += a_step, a_1 += a_step, w += w_step) {
    const auto load_a = [&](int piece) __attribute__((always_inline)) {
      _tile_loadd(4, a_0 + piece * PIECE_BYTES, 64);
      if constexpr (A > 1) _tile_loadd(5, a_1 + piece * PIECE_BYTES, 64);
    };
    const auto load_w = [&](int piece) __attribute__((always_inline)) {
      _tile_loadd(6, w + piece * PIECE_BYTES, 64);
      if constexpr (W > 1) _tile_loadd(7, w + (PIECES + piece) * PIECE_BYTES, 64);
    };
    const auto multiply = [&]() __attribute__((always_inline)) {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (W > 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (A > 1) _tile_dpbf16ps(2, 5, 6);
      if constexpr (A > 1 && W > 1) _tile_dpbf16ps(3, 5, 7);
    };
    // In an order that loads one operand for each product but one.
    load_a(1), load_w(0), multiply();
    load_w(1), multiply();
    load_a(0), multiply();
    load_w(2), multiply();
    load_w(0), multiply();
    load_a(2), multiply();
  }
  _tile_stored(0, sums[0], 64);
  if constexpr (W > 1) _tile_stored(1, sums[1], 64);
  if constexpr (A > 1) _tile_stored(2, sums[2], 64);
  if constexpr (A > 1 && W > 1) _tile_stored(3, sums[3], 64);
  asm volatile("" : : : "memory");  // the instructions' macros do not tell the compiler what memory they write
}

inline void multiply_pieces(const PieceProduct& x) {
  alignas(64) float sums[4][16 * 16];
  asm volatile("" : : : "memory");
  _tile_loadconfig(&amx_config<16>);
  for (int64_t i = 0; i < x.count; i += 2) {
    const int64_t pair = min64(2, x.count - i);
    const auto a_group = [&](int64_t j) { return x.a + x.groups[i + j] * PIECES * PIECE_BYTES; };
    const char *const a_0 = a_group(0), *const a_1 = a_group(pair - 1);
    for (int64_t n = 0; n < x.w_groups; n += 2) {
      const char* const w = x.w + n * PIECES * PIECE_BYTES;
      const int64_t width = min64(2, x.w_groups - n);
      if (pair > 1)
        width > 1 ? multiply_tiles<2, 2>(x, a_0, a_1, w, sums) : multiply_tiles<2, 1>(x, a_0, a_1, w, sums);
      else
        width > 1 ? multiply_tiles<1, 2>(x, a_0, a_1, w, sums) : multiply_tiles<1, 1>(x, a_0, a_1, w, sums);
      for (int64_t j = 0; j < pair; ++j) {
        const int64_t first = x.groups[i + j] * PIECE_COLUMNS, rows = min64(PIECE_COLUMNS, x.rows - first);
        float* out = x.out + first * x.stride + n * PIECE_COLUMNS;
        for (int64_t r = 0; r < rows; ++r, out += x.stride)
          for (int64_t c = 0; c < width; ++c) {
            const F32 sum = load(sums[2 * j + c] + r * 16);
            store(out + c * 16, x.begins ? sum : load(out + c * 16) + sum);
          }
      }
    }
  }
  _tile_release();
}

#endif

}  // namespace rnnfast::RNNFAST_ISA
