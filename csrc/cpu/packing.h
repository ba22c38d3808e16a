// Panels: how the columns of w are dealt, and the packing of both operands of a product for its tiles.
#pragma once

#include "tile.h"

namespace rnnfast::RNNFAST_ISA {

// [first, end) of n that belongs to one of so many members.
struct Slice {
  int64_t first, end;
};
RNNFAST_INLINE Slice slice_of(int64_t n, int64_t member, int64_t members) {
  return {n * member / members, n * (member + 1) / members};
}

// Columns are dealt in panels of `vectors` vectors, the last panel perhaps narrower. A panel holds, for each k unit,
// its vectors side by side, so that the product reads w from end to end.
struct Panels {
  int64_t vectors, total_vectors;
  int64_t count() const { return ceil_div(total_vectors, vectors); }
  int width(int64_t p) const { return int(min64(vectors, total_vectors - p * vectors)); }
};

// The most vectors of a panel that so many rows are multiplied with. Where registers are few, tiles of four rows by three vectors
// load less for each product than those of three by four, and are faster where they are also fewer.
constexpr int most_vectors(int64_t rows) {
  return !MANY_REGISTERS && ceil_div(rows, max_rows(3)) < ceil_div(rows, max_rows(4)) ? 3 : MAX_VECTORS;
}

// `columns` are multiplied with so many rows at a time; 1 stands for any number.
RNNFAST_INLINE Panels plain_panels(int64_t columns, int lanes, int64_t rows = 1) {
  const int64_t n = ceil_div(columns, lanes), most = most_vectors(rows);
  constexpr int64_t MANY = 24;  // of which a last panel that is narrower, or one more for a thread than for another, is a small part
  const int64_t panels = max64(ceil_div(n, n % most == 0 || n >= MANY ? most : MAX_VECTORS), 1);
  return {max64(ceil_div(n, panels), 1), n};
}

template <class O>
int64_t packed_size(const Panels& panels, int64_t k) {
  return panels.total_vectors * LANES<O> * units<O>(k) * Product<O>::depth;
}
// Where the panel that begins with such a vector is.
template <class O>
RNNFAST_INLINE int64_t vector_offset(int64_t vector, int64_t k) {
  return vector * LANES<O> * units<O>(k) * Product<O>::depth;
}
template <class O>
RNNFAST_INLINE int64_t panel_offset(const Panels& panels, int64_t p, int64_t k) {
  return vector_offset<O>(p * panels.vectors, k);
}

// What tile `tile` of `tiles` fetches of the panel that comes next, `width` vectors wide and k deep.
template <class O>
RNNFAST_INLINE Ahead::Stream share_of_panel(const O* panel, int width, int64_t k, int64_t tile, int64_t tiles) {
  const int64_t blocks = ceil_div(units<O>(k), Ahead::WEIGHTS_BLOCK), lines = units<O>(k) * width * VECTOR_BYTES / 64;
  const int64_t each = ceil_div(lines, tiles * blocks);
  return {reinterpret_cast<const char*>(panel) + tile * each * blocks * 64, each};
}

// LANES units adjacent in k, of one row; n numbers are there.
template <class O, class S>
RNNFAST_INLINE typename Product<O>::Unit units_along(const S* p, int64_t n) {
  if constexpr (Product<O>::depth == 1) {
    return load(p, int(min64(n, LANES<O>)));
  } else {
    typename Product<O>::Unit v{};
    if (n >= LANES<O> * 2)
      std::memcpy(&v, p, sizeof v);
    else
      std::memcpy(&v, p, size_t(n) * sizeof(S));
    return v;
  }
}

// One unit of each of n adjacent columns; rows[0], rows[1].. are adjacent in k, null where there is no such k.
template <class O, class S>
RNNFAST_INLINE typename Product<O>::Unit units_across(const S* const* rows, int64_t column, int n) {
  if constexpr (Product<O>::depth == 1) {
    return rows[0] ? load(rows[0] + column, n) : typename Product<O>::Unit{};
  } else {
    const F32 low = rows[0] ? load(rows[0] + column, n) : F32{}, high = rows[1] ? load(rows[1] + column, n) : F32{};
    return (F32)((U32)high | (U32)low >> 16);
  }
}

// The numbers of each unit added up.
template <class O>
RNNFAST_INLINE Vec<typename Product<O>::T> across_sum(typename Product<O>::Unit unit) {
  if constexpr (Product<O>::depth == 1)
    return unit;
  else
    return (F32)((U32)unit << 16) + (F32)((U32)unit & 0xffff0000);
}

// Transposes a square of lanes.
#if defined(__GNUC__) && !defined(__clang__)
template <class V>
RNNFAST_INLINE void transpose(V* rows) {
  constexpr int N = sizeof(V) / sizeof(rows[0][0]);
  using Index = decltype(rows[0] < rows[0]);
#pragma GCC unroll 4
  for (int d = N / 2; d > 0; d /= 2) {
    Index low{}, high{};
    for (int e = 0; e < N; ++e) {
      low[e] = e & d ? N + e - d : e;
      high[e] = e & d ? N + e : e + d;
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & d) continue;
      const V x = rows[i], y = rows[i | d];
      rows[i] = __builtin_shuffle(x, y, low);
      rows[i | d] = __builtin_shuffle(x, y, high);
    }
  }
}
#else
template <class V>
RNNFAST_INLINE void transpose(V* rows) {
  constexpr int N = sizeof(V) / sizeof(rows[0][0]);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < i; ++j) {
      const auto x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
}
#endif

// Packs vector c of a panel from a matrix stored column after column: column e of the vector is columns[e][0..k), or
// zero where columns[e] is null.
template <class O, class S>
void pack_columns(O* panel, int width, int c, const S* const* columns, int64_t k) {
  using Unit = typename Product<O>::Unit;
  constexpr int V = LANES<O>, depth = Product<O>::depth;
  for (int64_t u = 0; u < units<O>(k); u += V) {
    Unit block[V];
    for (int e = 0; e < V; ++e)
      block[e] = columns[e] ? units_along<O>(columns[e] + u * depth, k - u * depth) : Unit{};
    transpose(block);
    for (int i = 0; i < V && u + i < units<O>(k); ++i)
      std::memcpy(panel + ((u + i) * width + c) * V * depth, &block[i], sizeof(Unit));
  }
}

// Packs a panel from a matrix stored row after row: row(k) points at row k, of which columns first.. are taken and
// `columns` exist.
template <class O, class Row>
void pack_rows(O* panel, int width, Row row, int64_t k, int64_t first, int64_t columns) {
  constexpr int V = LANES<O>, depth = Product<O>::depth;
  constexpr int64_t FETCHED = 16;  // rows ahead, of which the processor does not see so small a part coming
  for (int64_t u = 0; u < units<O>(k); ++u) {
    decltype(row(0)) rows[2] = {row(u * depth), depth == 2 && u * 2 + 1 < k ? row(u * 2 + 1) : nullptr};
    for (int64_t i = u * depth + FETCHED; i < min64((u + 1) * depth + FETCHED, k); ++i) {
      const auto* const next = row(i);
      for (int64_t j = first; j < min64(first + width * V, columns); j += 64 / int64_t(sizeof(*next))) __builtin_prefetch(next + j);
    }
    for (int c = 0; c < width; ++c) {
      const int64_t column = first + c * V, n = min64(V, columns - column);
      typename Product<O>::Unit unit{};
      if (n > 0) unit = units_across<O>(rows, column, int(n));
      std::memcpy(panel + (u * width + c) * V * depth, &unit, sizeof unit);
    }
  }
}

// This thread's share of a weight of k rows of `columns` in each of so many lanes, row(lane, 0..k), to be multiplied with rows of k.
template <class O, class Row>
void pack_weight(O* to, const Panels& of, int64_t lanes, int64_t k, int64_t columns, Row row, int thread, int threads) {
  for (int64_t i = thread; i < lanes * of.count(); i += threads) {
    const int64_t lane = i / of.count(), p = i % of.count();
    pack_rows<O>(to + lane * packed_size<O>(of, k) + panel_offset<O>(of, p, k), of.width(p),
                 [&](int64_t r) { return row(lane, r); }, k, p * of.vectors * LANES<O>, columns);
  }
}

// The transpose of rows row(0..k) as operand a: column first + m becomes out[m * stride + 0..k), padded with zeros to
// whole vectors of units; `columns` of them. Adds each column to its sum, where there are sums, of whole vectors. Rows that are
// `far` are fetched two vectors ahead.
template <class O, class Row>
void pack_transposed(O* out, int64_t stride, Row row, int64_t k, int64_t first, int64_t columns, typename Product<O>::T* sums,
                     bool far = false) {
  using Unit = typename Product<O>::Unit;
  constexpr int V = LANES<O>, depth = Product<O>::depth;
  for (int64_t u = 0; u < units<O>(k); u += V) {
    for (int64_t m = 0; m < columns; m += V) {
      const int n = int(min64(V, columns - m));
      Unit block[V];
      for (int i = 0; i < V; ++i) {
        const int64_t at = (u + i) * depth;
        decltype(row(0)) rows[2] = {at < k ? row(at) : nullptr, depth == 2 && at + 1 < k ? row(at + 1) : nullptr};
        block[i] = rows[0] ? units_across<O>(rows, first + m, n) : Unit{};
        if (far && m + 2 * V < columns)
          for (int r = 0; r < depth; ++r)
            if (rows[r]) __builtin_prefetch(rows[r] + first + m + 2 * V);
      }
      if (sums) {
        Vec<typename Product<O>::T> sum{};  // of the block, which rounds less than one long sum
        for (const Unit& unit : block) sum += across_sum<O>(unit);
        store(sums + m, load(sums + m) + sum);
      }
      transpose(block);
      for (int e = 0; e < n; ++e) std::memcpy(out + (m + e) * stride + u * depth, &block[e], sizeof(Unit));
    }
  }
}

}  // namespace rnnfast::RNNFAST_ISA
