// The parts of a scan by themselves, on operands that stay near: what one thread can do at most. For the benchmarks.
#pragma once

#include "../cells.h"
#include "memory.h"
#include "packing.h"
#include "pieces.h"
#include "threads.h"

namespace rnnfast::RNNFAST_ISA {

#if !defined(__AVX512BF16__)
// The product of `batch` rows and a panel, both `depth` deep, `rounds` times. Returns the operations done.
inline double near_product(int64_t batch, int64_t depth, int64_t rounds) {
  constexpr int V = LANES<float>;
  const int vectors = most_vectors(batch);
  alignas(64) float sums[MAX_ROWS * MAX_VECTORS * V];
  const int64_t numbers = (batch + vectors * V) * depth;
  const Scratch memory(size_t(numbers) * sizeof(float));
  float *panel = reinterpret_cast<float*>(memory.data()), *rows = panel + vectors * V * depth;
  for (int64_t i = 0; i < numbers; ++i) panel[i] = 0.5f;
  for (int64_t round = 0; round < rounds; ++round)
    for_tiles(batch, vectors, [&](int64_t row, int count, int64_t, int64_t) {
      const float *a[MAX_ROWS], *start[MAX_ROWS];
      for (int r = 0; r < count; ++r) a[r] = rows + (row + r) * depth, start[r] = ZEROS<float>;
      tile_function<float>(count, vectors)(depth, a, panel, start, 0, nullptr, sums, vectors * V, nullptr);
    });
  return 2.0 * double(rounds) * double(batch * depth) * double(vectors * V);
}

// Reads `lines` cache lines, a multiple of 8, from the first to the last or back, fetching those AHEAD lines on.
template <bool BACK, int AHEAD>
void read_lines(const float* data, int64_t lines) {
  constexpr int LINE = 16, SUMS = 8, STEP = BACK ? -LINE : LINE;
  F32 sums[SUMS] = {};
  const float* at = BACK ? data + (lines - 1) * LINE : data;
  for (int64_t line = 0; line < lines; line += SUMS, at += SUMS * STEP) {
#pragma GCC unroll 8
    for (int i = 0; i < SUMS; ++i) {
      if (AHEAD) __builtin_prefetch(at + (i + AHEAD) * STEP, 0, 3);
#pragma GCC unroll 4
      for (int lane = 0; lane < LINE; lane += LANES<float>) sums[i] += load(at + i * STEP + lane);
    }
  }
  for (const F32& sum : sums) asm volatile("" : : "m"(sum));
}

// Reads so many lines `rounds` times, back and forth, as scans walk through weights: what is still near is read first. Returns the
// bytes read. Some processors are quicker where all fetching is left to them.
inline double read_weights(const float* data, int64_t lines, bool fetch, int64_t rounds) {
  constexpr int FAR = 64;
  for (int64_t round = 0; round < rounds; ++round) {
    const bool back = round % 2 != 0;
    if (fetch)
      back ? read_lines<true, FAR>(data, lines) : read_lines<false, FAR>(data, lines);
    else
      back ? read_lines<true, 0>(data, lines) : read_lines<false, 0>(data, lines);
  }
  return 64.0 * double(lines) * double(rounds);
}

// The gate math of a few vectors of units, `rounds` times. Returns the units done.
inline double near_gates(Cell cell, bool backward, int64_t rounds) {
  constexpr int V = LANES<float>, VECTORS = 8, PARTS = 8;
  using M = Math<float>;
  alignas(64) float numbers[PARTS][VECTORS * V], results[PARTS][VECTORS * V];
  for (auto& part : numbers)
    for (float& number : part) number = 0.5f;
  for (int64_t round = 0; round < rounds; ++round) {
    asm volatile("" : : "r"(numbers), "r"(results) : "memory");  // each round is computed
    for (int at = 0; at < VECTORS * V; at += V) {
      F32 x[PARTS];
      for (int i = 0; i < PARTS; ++i) x[i] = load(numbers[i] + at);
      int parts = 1;
      switch (cell) {
        case Cell::rnn_tanh: x[0] = backward ? rnn_tanh_backward(x[0], x[1]) : M::tanh(x[0]); break;
        case Cell::rnn_relu: x[0] = backward ? rnn_relu_backward(x[0], x[1]) : relu(x[0]); break;
        case Cell::lstm:
          parts = backward ? 5 : 6;
          if (backward)
            lstm_backward<M>(x[0], x[1], x[2], x[3], x[5], x[6], x[7], x[4]);
          else
            x[5] = lstm_forward<M>(x[0], x[1], x[2], x[3], x[4]);
          break;
        case Cell::gru:
          parts = 5;
          x[4] = backward ? gru_backward<M>(x[0], x[1], x[2], x[3], x[5], x[6]) : gru_forward<M>(x[0], x[1], x[2], x[3], x[5]);
          break;
      }
      for (int i = 0; i < parts; ++i) store(results[i] + at, x[i]);
    }
  }
  return double(rounds) * VECTORS * V;
}
#endif

#if defined(__AMX_BF16__)
// The product of 128 rows of 32 columns each, in pieces, `rounds` times. Returns the operations done.
inline double near_pieces(int64_t rounds) {
  constexpr int64_t ROWS = 128, GROUPS = 2, COLUMNS = GROUPS * PIECE_COLUMNS, groups[GROUPS] = {0, 1};
  const size_t operand = size_t(GROUPS * pieces_bytes(ROWS));
  const Scratch memory(2 * operand + sizeof(float) * COLUMNS * COLUMNS);
  std::memset(memory.data(), 0, 2 * operand);
  float* const sums = reinterpret_cast<float*>(memory.data() + 2 * operand);
  for (int64_t round = 0; round < rounds; ++round)
    multiply_pieces({memory.data(), memory.data() + operand, piece_chunks(ROWS), GROUPS, GROUPS, groups, GROUPS, sums, COLUMNS,
                     COLUMNS, round == 0});
  return 2.0 * double(rounds * ROWS * COLUMNS * COLUMNS);
}
#endif

}  // namespace rnnfast::RNNFAST_ISA
