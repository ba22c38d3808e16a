// The one product of this library, out += a w on a tile of a few rows by a few vectors of columns.
//
// Each element of the result adds its products in the order of k, SUM_BLOCK of them in an accumulator and then to where it
// stands, whatever the tile's shape and place: so a result depends neither on the batch around a row nor on how the work is cut
// or shared.
//
// A *unit* is the part of an operand that one vector lane multiplies at once: a number, or a pair of bfloat16 numbers
// adjacent in k where the processor has such a product. O is the type of an operand, S that of a tensor in memory.
#pragma once

#include "vec.h"

namespace rnnfast::RNNFAST_ISA {

template <class O>
struct Product {
  using T = O;
  using Unit = Vec<O>;  // one unit for each lane
  static constexpr int depth = 1;
  RNNFAST_INLINE Unit broadcast(const O* a) { return splat(*a); }
  RNNFAST_INLINE Vec<T> add(Vec<T> sum, Unit a, Unit w) { return fma(a, w, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Product<bf16> {
  using T = float;
  using Unit = F32;  // the bits of a pair of bf16 in each lane
  static constexpr int depth = 2;
  RNNFAST_INLINE Unit broadcast(const bf16* a) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    return (F32)_mm512_set1_epi32(pair);
  }
  RNNFAST_INLINE F32 add(F32 sum, Unit a, Unit w) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
  }
};
#endif

template <class O>
constexpr int LANES = Lanes<typename Product<O>::T>::count;
template <class O>
constexpr int64_t units(int64_t k) {
  return (k + Product<O>::depth - 1) / Product<O>::depth;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
RNNFAST_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
RNNFAST_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- the tile ------------------------------------------------------------------------------------------------------

constexpr int MAX_VECTORS = 4;
// What the sums of a tile start from where there is nothing before them.
template <class O>
alignas(64) constexpr typename Product<O>::T ZEROS[MAX_VECTORS * LANES<O>] = {};
// Vectors of two panels, one after the other, that are multiplied at once with so few rows: those of one would be too few sums to
// hide how long a product takes.
constexpr int PAIR = 6;
#if defined(__AMX_BF16__)
constexpr int MAX_ROWS = 16, PAIR_ROWS = 0;
constexpr int max_rows(int) { return MAX_ROWS; }
#else
constexpr int MAX_ROWS = 8, PAIR_ROWS = 2;
// Rows of a tile that leave registers for its vectors of w and a broadcast.
constexpr int max_rows(int vectors) {
  return MANY_REGISTERS ? (vectors == 4 ? 6 : 8) : (vectors == 4 ? 3 : vectors == 3 ? 4 : vectors == 2 ? 6 : 8);
}
#endif

// Rows that are read and written next: parts of tensors, which the tiles at work fetch a few lines at a time, an equal share each.
// Rows lie too many and too far apart for the processor to see them coming.
class RowsAhead {
 public:
  // Fetched under so many pieces of a step.
  explicit RowsAhead(int64_t pieces = 1) : pieces_(pieces) {}
  // `count` rows, of which `bytes` each, `stride` bytes from one to the next.
  void add(const void* data, int64_t bytes, int64_t count, int64_t stride) {
    if (!data) return;
    if (bytes == stride) bytes *= count, count = 1;
    const int64_t width = ceil_div(bytes, 64);
    parts_[count_++] = {static_cast<const char*>(data), width * count, width, stride};
    left_ += width * count;
  }
  bool any() const { return left_ > 0; }
  // This, where anything is left, spread over the blocks of k of all pieces of so many tiles.
  RowsAhead* under(int64_t tiles, int64_t k_units, int64_t block) {
    if (left_ > 0 && lines_ == 0) {
      lines_ = ceil_div(left_, pieces_ * tiles * ceil_div(k_units, block));
      data_ = parts_[0].data, left_of_part_ = parts_[0].lines;
    }
    return left_ > 0 ? this : nullptr;
  }
  // The lines of a block. To be written, where there is such an instruction: a line that other cores have, too, would be asked for
  // once more when it is.
  void fetch() {
    if (left_ == 0) return;
    int64_t n = min64(lines_, min64(left_, left_of_part_)), next = column_;
    const Part& part = parts_[part_];
    const int64_t width = part.width, jump = part.stride - 64 * width;
    const char* at = data_;
    left_ -= n;
    left_of_part_ -= n;
    do {
      __builtin_prefetch(at, 1, 2);
      at += 64;
      if (++next == width) at += jump, next = 0;
    } while (--n > 0);
    if (left_of_part_ == 0 && left_ > 0) {
      const Part& following = parts_[++part_];
      at = following.data, left_of_part_ = following.lines, next = 0;
    }
    data_ = at, column_ = next;
  }

 private:
  // `width` lines of each row, `stride` bytes from one row to the next.
  struct Part {
    const char* data;
    int64_t lines, width, stride;
  };
  int64_t pieces_;
  Part parts_[4];
  int count_ = 0, part_ = 0;  // parts, and the one at work
  int64_t lines_ = 0, left_ = 0;  // of a block, and in all
  const char* data_ = nullptr;
  int64_t left_of_part_ = 0, column_ = 0;  // lines of the part from data_ on, and of its row before it
};

// Memory that a tile fetches into the second-level cache while it computes, a few lines in each block of k units: so it streams
// in at an even rate.
struct Ahead {
  // Units of k from one turn to the next: weights are so many lines that they must come evenly, but a turn costs the product something,
  // that of the rows some more, and any where sums leave their registers for it much.
  static constexpr int64_t WEIGHTS_BLOCK = MANY_REGISTERS ? 8 : 32, ROWS_BLOCK = 32;
  // Lines one after the other, so many a block.
  struct Stream {
    const char* data = nullptr;
    int64_t lines = 0;
    void fetch() {
      const char* at = data;
      data += 64 * lines;
      for (; at < data; at += 64) __builtin_prefetch(at, 0, 2);
    }
  };
  Stream weights;             // that a core's cache cannot hold: under all tiles of the panel before, and not under their own first
  RowsAhead* rows = nullptr;  // that come next, or null
  int64_t block;              // units of k to the next turn
  int64_t units = 0;          // of k so far

  explicit Ahead(Stream panel) : weights(panel), block(panel.lines > 0 ? WEIGHTS_BLOCK : ROWS_BLOCK) {}
  // With an equal share of the rows, where a piece has so many tiles, all of them k_units deep.
  Ahead(Stream panel, RowsAhead& next, int64_t tiles, int64_t k_units) : Ahead(panel) {
    rows = next.under(tiles, k_units, ROWS_BLOCK);
  }
  // Null where there is nothing to fetch.
  Ahead* any() { return weights.lines > 0 || rows ? this : nullptr; }
  void fetch() {
    weights.fetch();
    if (rows && units % ROWS_BLOCK == 0) rows->fetch();
    units += block;
  }
};

// A panel of w: for each unit of k some vectors, packed after those of the unit before, or columns of a matrix with a row for each
// unit, `stride` elements from one to the next.
template <class O>
struct Panel {
  const O* data;
  int64_t stride = 0;  // or 0 where it is packed
  Panel(const O* packed) : data(packed) {}
  Panel(const O* columns, int64_t row_stride) : data(columns), stride(row_stride) {}
};

// Units of k whose products are added up one by one: in a longer sum each would be rounded to the size that it has come to.
constexpr int64_t SUM_BLOCK = 256;

}  // namespace rnnfast::RNNFAST_ISA

#if defined(__AVX2__) && !defined(__AVX512F__)
#include "avx2.h"
#else

namespace rnnfast::RNNFAST_ISA {

// sum[r] += row[r][0..k_units) w, from zeros.
template <int R, int NV, class O>
RNNFAST_INLINE void multiply(int64_t k_units, const O* const (&row)[R], const O* w, int64_t w_stride, Ahead* ahead,
                             Vec<typename Product<O>::T> (&sum)[R][NV]) {
  using P = Product<O>;
  constexpr int V = LANES<O>;
  int64_t k = 0, unit = NV == PAIR ? PAIR / 2 * V * P::depth : w_stride;
  asm("" : "+r"(unit));  // if GCC knew it, it would read lines in another order, in which the processor sees fewer of them coming
  const auto multiply_unit = [&](int64_t at) __attribute__((always_inline)) {
    const O* w_k = w + at * unit;
    typename P::Unit wk[NV];
#pragma GCC unroll 6
    for (int c = 0; c < NV; ++c) {
      const bool in_second = NV == PAIR && c >= PAIR / 2;
      std::memcpy(&wk[c], w_k + (in_second ? w_stride : 0) + (in_second ? c - PAIR / 2 : c) * V * P::depth, sizeof wk[c]);
      // GCC would read it from memory for each of so few rows, which takes longer than their products.
      if (MANY_REGISTERS && R > 1 && R < 4) in_register(wk[c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      in_order();
      const typename P::Unit ak = P::broadcast(row[r] + at * P::depth);
#pragma GCC unroll 6
      for (int c = 0; c < NV; ++c) {
        sum[r][c] = P::add(sum[r][c], ak, wk[c]);
        in_place(sum[r][c]);
      }
    }
  };
  // Two at a time: a core whose other thread is busy is short of instructions, and this saves some that are no products.
  const auto multiply_to = [&](int64_t end) __attribute__((always_inline)) {
    for (; k + 2 <= end; k += 2) {
      multiply_unit(k);
      multiply_unit(k + 1);
    }
    if (k < end) multiply_unit(k++);
  };
  if (!ahead) multiply_to(k_units);
  while (k < k_units) {
    ahead->fetch();
    multiply_to(min64(k + ahead->block, k_units));
  }
}

}  // namespace rnnfast::RNNFAST_ISA
#endif

namespace rnnfast::RNNFAST_ISA {

// to(r, c) = the sum of at most SUM_BLOCK products of row[r] and vector c of w, and first(r, c), which is added last: every product
// added to a large start would be rounded to its size.
template <int R, int NV, class O, class First, class To>
RNNFAST_INLINE void add_block(int64_t k_units, const O* const (&row)[R], const O* w, int64_t w_stride, Ahead* ahead, First first,
                              To to) {
  Vec<typename Product<O>::T> sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 6
    for (int c = 0; c < NV; ++c) sum[r][c] = Vec<typename Product<O>::T>{};
  }
  multiply(k_units, row, w, w_stride, ahead, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 6
    for (int c = 0; c < NV; ++c) store(to(r, c), sum[r][c] + load(first(r, c)));
  }
}

// `tile` of at most SUM_BLOCK units, of w with w_stride elements from one unit to the next; a function of its own, as the compiler
// else moves the sums of the inner loop about.
template <int R, int NV, class O>
__attribute__((noinline)) void tile_block(int64_t k_units, const O* const* a, const O* w, int64_t w_stride,
                                          const typename Product<O>::T* const* start, int64_t offset,
                                          const typename Product<O>::T* last, typename Product<O>::T* out, int64_t out_stride,
                                          Ahead* ahead) {
  constexpr int V = LANES<O>;
  const O* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = a[r];
  add_block<R, NV>(
      k_units, row, w, w_stride, ahead,
      [&](int r, int c) __attribute__((always_inline)) { return c % 3 == 2 && last ? last : start[r] + offset + c * V; },
      [&](int r, int c) __attribute__((always_inline)) { return out + r * out_stride + c * V; });
}

// `tile` of more than SUM_BLOCK units.
template <int R, int NV, class O>
__attribute__((noinline)) void tile_blocks(int64_t k_units, const O* const* a, const O* w, int64_t w_stride,
                                           const typename Product<O>::T* const* start, int64_t offset,
                                           const typename Product<O>::T* last, typename Product<O>::T* out, int64_t out_stride,
                                           Ahead* ahead) {
  tile_block<R, NV, O>(SUM_BLOCK, a, w, w_stride, start, offset, last, out, out_stride, ahead);
  for (int64_t k = SUM_BLOCK; k < k_units; k += SUM_BLOCK) {
    const O* a_k[R];
    const typename Product<O>::T* so_far[R];
    for (int r = 0; r < R; ++r) {
      a_k[r] = a[r] + k * Product<O>::depth;
      so_far[r] = out + r * out_stride;
    }
    tile_block<R, NV, O>(min64(k_units - k, SUM_BLOCK), a_k, w + k * w_stride, w_stride, so_far, 0, nullptr, out, out_stride, ahead);
  }
}

// Row r of the tile adds a[r] . w to start[r][offset...]; where `last` is given, each third vector starts from that instead.
template <int R, int NV, class O>
void tile(int64_t k_units, const O* const* a, Panel<O> w, const typename Product<O>::T* const* start, int64_t offset,
          const typename Product<O>::T* last, typename Product<O>::T* out, int64_t out_stride, Ahead* ahead) {
  const int64_t stride = w.stride ? w.stride : NV * LANES<O> * Product<O>::depth;
  const auto add = k_units <= SUM_BLOCK ? tile_block<R, NV, O> : tile_blocks<R, NV, O>;
  add(k_units, a, w.data, stride, start, offset, last, out, out_stride, ahead);
}

template <class O>
using TileFn = decltype(&tile<1, 1, O>);

}  // namespace rnnfast::RNNFAST_ISA

#if defined(__AMX_BF16__)
#include "amx.h"
#else
namespace rnnfast::RNNFAST_ISA {
RNNFAST_INLINE void end_tiles() {}
}  // namespace rnnfast::RNNFAST_ISA
#endif

namespace rnnfast::RNNFAST_ISA {

// The tile function for a number of rows, at most max_rows(vectors), and of vectors, at most MAX_VECTORS.
template <class O>
TileFn<O> tile_function(int rows, int vectors) {
#if defined(__AMX_BF16__)
#define RNNFAST_TILES(NV) \
  {amx_tile<1, NV>, amx_tile<2, NV>, amx_tile<3, NV>, amx_tile<4, NV>, amx_tile<5, NV>, amx_tile<6, NV>, \
   amx_tile<7, NV>, amx_tile<8, NV>, amx_tile<9, NV>, amx_tile<10, NV>, amx_tile<11, NV>, amx_tile<12, NV>, \
   amx_tile<13, NV>, amx_tile<14, NV>, amx_tile<15, NV>, amx_tile<16, NV>}
#else
#define RNNFAST_TILES(NV) \
  {tile<1, NV, O>, tile<2, NV, O>, tile<3, NV, O>, tile<(4 <= max_rows(NV) ? 4 : 1), NV, O>, \
   tile<(5 <= max_rows(NV) ? 5 : 1), NV, O>, tile<(6 <= max_rows(NV) ? 6 : 1), NV, O>, \
   tile<(7 <= max_rows(NV) ? 7 : 1), NV, O>, tile<(8 <= max_rows(NV) ? 8 : 1), NV, O>}
#endif
  static constexpr TileFn<O> table[MAX_VECTORS][MAX_ROWS] = {
      RNNFAST_TILES(1), RNNFAST_TILES(2), RNNFAST_TILES(3), RNNFAST_TILES(4)};
#undef RNNFAST_TILES
  return table[vectors - 1][rows - 1];
}

// The most rows of a strip: a tile of so many there is for every width of a panel.
constexpr int FEW_ROWS = 3;

// Tiles of the same few rows by several panels, or pairs of panels, which lie one after the other from w on and are multiplied from
// the first to the last, or `back`; each panel has its sums after those of the one before. Little stands between these tiles: for one
// row it would take a good part of their time.
template <int R, int NV, class O>
void strip(int64_t k_units, const O* const* a, const O* w, int64_t panels, bool back, const typename Product<O>::T* const* start,
           int64_t offset, const typename Product<O>::T* last, typename Product<O>::T* out) {
  using T = typename Product<O>::T;
  constexpr int V = LANES<O>;
  const int64_t size = k_units * NV * V * Product<O>::depth, step = back ? -1 : 1;
  for (int64_t i = 0, p = back ? panels - 1 : 0; i < panels; ++i, p += step) {
    T* const to = out + p * R * NV * V;
    const T* const third = last ? last + p * (NV / 3) * V : nullptr;
#if defined(__AMX_BF16__)
    amx_tile<R, NV>(k_units, a, w + p * size, start, offset + p * NV * V, third, to, NV * V, nullptr);
#else
    constexpr int PANEL = NV == PAIR ? PAIR / 2 : NV;
    constexpr int64_t UNIT = PANEL * V * Product<O>::depth;
    for (int64_t k = 0; k < k_units; k += SUM_BLOCK) {  // as tile_blocks
      const O* row[R];
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) row[r] = a[r] + k * Product<O>::depth;
      const auto here = [&](int r, int c) __attribute__((always_inline)) {
        return to + ((c / PANEL * R + r) * PANEL + c % PANEL) * V;
      };
      const auto first = [&](int r, int c) __attribute__((always_inline)) -> const T* {
        const T* const begin = c % 3 == 2 && third ? third + c / 3 * V : start[r] + offset + (p * NV + c) * V;
        return k > 0 ? here(r, c) : begin;
      };
      const int64_t stride = NV == PAIR ? k_units * UNIT : UNIT;
      add_block<R, NV>(min64(k_units - k, SUM_BLOCK), row, w + p * size + k * UNIT, stride, nullptr, first, here);
    }
#endif
  }
}
template <class O>
using StripFn = decltype(&strip<1, 1, O>);
// For a number of rows, at most FEW_ROWS, and of vectors, at most MAX_VECTORS, or PAIR with at most PAIR_ROWS.
template <class O>
StripFn<O> strip_function(int rows, int vectors) {
#define RNNFAST_STRIPS(NV) {strip<1, NV, O>, strip<2, NV, O>, strip<3, NV, O>}
  static constexpr StripFn<O> table[MAX_VECTORS][FEW_ROWS] = {
      RNNFAST_STRIPS(1), RNNFAST_STRIPS(2), RNNFAST_STRIPS(3), RNNFAST_STRIPS(4)};
#undef RNNFAST_STRIPS
  if constexpr (PAIR_ROWS > 0)
    if (vectors == PAIR) return rows == 1 ? strip<1, PAIR, O> : strip<2, PAIR, O>;
  return table[vectors - 1][rows - 1];
}

// Calls f(first row, rows, part, parts) for parts of at most so many rows, nearly equal, that cover n rows.
template <class F>
RNNFAST_INLINE void for_parts(int64_t n, int64_t most, F f) {
  const int64_t count = n <= most ? n > 0 : ceil_div(n, most);
  for (int64_t i = 0, row = 0; i < count; ++i) {
    const int64_t next = count == 1 ? n : n * (i + 1) / count;
    f(row, int(next - row), i, count);
    row = next;
  }
}
// Calls f(first row, rows, tile, tiles) for the tiles of n rows by so many vectors.
template <class F>
RNNFAST_INLINE void for_tiles(int64_t n, int vectors, F f) {
  for_parts(n, max_rows(vectors), f);
}

}  // namespace rnnfast::RNNFAST_ISA
