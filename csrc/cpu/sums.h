// Sums over many rows, whose error does not grow with their number.
#pragma once

#include "tile.h"

namespace rnnfast::RNNFAST_ISA {

// Columns that `sum_rows` adds at a time, at most, and rows of a block of it.
constexpr int64_t SUM_COLUMNS = 256, SUM_ROWS = 32;

// Adds the sums of a block of rows to those of the blocks before it, with what an addition rounds off kept in `lost` for the next
// one (Kahan 1965): the error does not grow with the number of blocks. What stands behind the last of n is rubbish.
template <class T>
void add_block(T* sums, T* lost, const T* block, int64_t n) {
  for (int64_t m = 0; m < n; m += Lanes<T>::count) {
    const Vec<T> sum = load(sums + m), more = load(block + m) - load(lost + m), next = sum + more;
    const Vec<T> error = (next - sum) - more;
    store(sums + m, next);
    store(lost + m, error - error == Vec<T>{} ? error : Vec<T>{});  // an infinite sum stays infinite
  }
}

// Adds what `add` adds for the rows [row, end_row) to sums[m] and lost[m], for n columns at most SUM_COLUMNS, for which `block` has
// room.
template <class T, class F>
void add_rows(T* sums, T* lost, T* block, int64_t n, int64_t row, int64_t end_row, F add) {
  while (row < end_row) {
    std::memset(block, 0, SUM_COLUMNS * sizeof(T));
    for (const int64_t end = min64(row + SUM_ROWS, end_row); row < end; ++row) add(block, row);
    add_block(sums, lost, block, n);
  }
}
// sums[m] = what `add` adds for every row; there is room for three times SUM_COLUMNS.
template <class T, class F>
void sum_rows(T* sums, int64_t n, int64_t rows, F add) {
  std::memset(sums, 0, 2 * SUM_COLUMNS * sizeof(T));
  add_rows(sums, sums + SUM_COLUMNS, sums + 2 * SUM_COLUMNS, n, 0, rows, add);
}

}  // namespace rnnfast::RNNFAST_ISA
