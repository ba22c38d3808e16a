// The tile product of bfloat16 on the matrix unit of Intel processors (AMX): 16 rows by 16 columns by 32 of k an
// instruction. The panels are those of the vector product: 16 units, one below the other, are an operand of the unit.
// Included by tile.h.
#pragma once

namespace rnnfast::RNNFAST_ISA {

// Of the matrix unit: R rows in the tiles of sums (0 to 3) and of a (4); 16 units of w in each of 5, 6 and 7.
struct AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
  constexpr explicit AmxConfig(int r) {
    for (int t = 0; t < 5; ++t) rows[t] = uint8_t(r);
    for (int t = 5; t < 8; ++t) rows[t] = 16;
  }
};

template <int R>
constexpr AmxConfig amx_config{R};

// What this thread's matrix unit is configured for. It stays so from tile to tile: to configure it takes as long as a small tile.
inline thread_local const AmxConfig* amx_configured = nullptr;

template <int NV>
RNNFAST_INLINE void amx_multiply(const void* a, int64_t a_bytes, const void* w, int64_t w_bytes) {
  const auto vector = [w](int c) { return static_cast<const char*>(w) + c * 64; };
  _tile_loadd(4, a, a_bytes);
  _tile_loadd(5, vector(0), w_bytes);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (NV > 1) {
    _tile_loadd(6, vector(1), w_bytes);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (NV > 2) {
    _tile_loadd(7, vector(2), w_bytes);
    _tile_dpbf16ps(2, 4, 7);
  }
  if constexpr (NV > 3) {
    _tile_loadd(5, vector(3), w_bytes);
    _tile_dpbf16ps(3, 4, 5);
  }
}

// As `tile`, of which it is the other form; see there.
template <int R, int NV>
void amx_tile(int64_t k_units, const bf16* const* a, Panel<bf16> panel, const float* const* start, int64_t offset,
              const float* last, float* out, int64_t out_stride, Ahead* ahead) {
  constexpr int64_t UNITS = 16, DEPTH = 2 * UNITS;  // of one instruction
  alignas(64) bf16 rows[16 * DEPTH], columns[NV * UNITS * DEPTH];
  alignas(64) float sums[NV][16 * 16];
  const bf16* w = panel.data;  // it is packed: units of w are not columns of a matrix
  const int64_t stride = R > 1 ? a[1] - a[0] : DEPTH;
  bool even = true;
  for (int r = 2; r < R; ++r) even &= a[r] - a[r - 1] == stride;
  // The instructions' macros do not tell the compiler what memory they read: it must not delay its stores past them.
  const auto settle = [] { asm volatile("" : : : "memory"); };

  if (amx_configured != &amx_config<R>) {
    amx_configured = &amx_config<R>;
    _tile_loadconfig(amx_configured);
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t u = 0;
  for (; u + UNITS <= k_units; u += UNITS, w += UNITS * NV * 32) {
    // A block is half as many units, or twice as many.
    static_assert(2 * Ahead::WEIGHTS_BLOCK == UNITS && Ahead::ROWS_BLOCK == 2 * UNITS);
    if (ahead && (ahead->block < UNITS || u % (2 * UNITS) == 0)) ahead->fetch();
    if (ahead && ahead->block < UNITS) ahead->fetch();
    if (even) {
      amx_multiply<NV>(a[0] + u * 2, stride * 2, w, NV * 64);
      continue;
    }
    for (int r = 0; r < R; ++r) std::memcpy(rows + r * DEPTH, a[r] + u * 2, 64);
    settle();
    amx_multiply<NV>(rows, 64, w, NV * 64);
  }
  if (u < k_units) {  // the rest of k, filled up with zeros
    const size_t rest = size_t(k_units - u);
    std::memset(rows, 0, sizeof rows);
    std::memset(columns, 0, sizeof columns);
    for (int r = 0; r < R; ++r) std::memcpy(rows + r * DEPTH, a[r] + u * 2, rest * 4);
    std::memcpy(columns, w, rest * NV * 64);
    settle();
    amx_multiply<NV>(rows, 64, columns, NV * 64);
  }
  _tile_stored(0, sums[0], 64);
  if constexpr (NV > 1) _tile_stored(1, sums[1], 64);
  if constexpr (NV > 2) _tile_stored(2, sums[2], 64);
  if constexpr (NV > 3) _tile_stored(3, sums[3], 64);
  settle();
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < NV; ++c) {
      const F32 first = load(c == NV - 1 && last ? last : start[r] + offset + c * 16);
      store(out + r * out_stride + c * 16, load(sums[c] + r * 16) + first);
    }
}

// At the end of a thread's part of a call: other code may use the unit, and the system would go on saving its state.
RNNFAST_INLINE void end_tiles() {
  if (amx_configured) _tile_release();
  amx_configured = nullptr;
}

}  // namespace rnnfast::RNNFAST_ISA
