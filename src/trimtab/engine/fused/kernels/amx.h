// Sums of products by the matrix unit of Intel processors (AMX: Intel 64 manual, volume 1, chapter 18). It multiplies
// bytes, and bfloat16; float32 is split into three of those, and the six products that count are added: as exact as a
// sum in float32 (Henry, Tang & Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype").
#pragma once

#include <algorithm>

#include "vectors.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define HAS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx {
namespace {

constexpr int64_t SIDE = 16;         // rows of a tile; each has 64 bytes
constexpr int64_t BLOCK = 2 * SIDE;  // rows of sums at a time
constexpr int64_t COLUMNS = 64;      // of a panel
constexpr int64_t BYTES = 64, HALVES = 32, PARTS = 3;

#ifdef HAS_AMX

// Memory that grows, from a cache line's start on: lines that a tile's row shares would be fetched twice.
class Aligned {
  std::vector<uint16_t> memory;

 public:
  uint16_t* of(int64_t size) {
    if (memory.size() < static_cast<size_t>(size + 32)) memory.resize(size + 32);
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
};

// Whether to use the unit; Linux gives it to a process that asks.
inline bool& is_on() {
  static bool on = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return on;
}

// The unit, set to tiles of 16 rows for this thread as long as this lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// Brings nearer, of `bytes`, the share of a block of rows that begins at `row` of `rows`.
inline void fetch_share(const int8_t* from, int64_t bytes, int64_t row, int64_t rows) {
  for (int64_t i = row / BLOCK * 64; i < bytes; i += (rows + BLOCK - 1) / BLOCK * 64) _mm_prefetch(from + i, _MM_HINT_T1);
}

// Tiles 0 to 3 are sums of the rows of tiles 4 and 5 times the columns of 6 and 7.
inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// to: [BLOCK, COLUMNS], at the first of 32 columns.
template <class T>
inline void store(T* to) {
  constexpr int64_t step = COLUMNS * sizeof(T);
  _tile_stored(0, to, step);
  _tile_stored(1, to + SIDE, step);
  _tile_stored(2, to + SIDE * COLUMNS, step);
  _tile_stored(3, to + SIDE * COLUMNS + SIDE, step);
}

// BLOCK rows of bytes with 128 added, `inner` apart. panel: [inner / 4, COLUMNS, 4].
inline void sum_bytes(const uint8_t* rows, int64_t inner, const int8_t* panel, int32_t* sums) {
  for (int64_t column = 0; column < COLUMNS; column += 2 * SIDE) {
    clear();
    for (int64_t i = 0; i < inner; i += BYTES) {
      const int8_t* right = panel + i * COLUMNS + column * 4;
      _tile_loadd(4, rows + i, inner);
      _tile_loadd(6, right, COLUMNS * 4);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, right + SIDE * 4, COLUMNS * 4);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(5, rows + SIDE * inner + i, inner);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    store(sums + column);
  }
}

inline void multiply_halves() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Floats as tiles of bfloat16: for each HALVES places of the sum, the PARTS of SIDE rows, or of SIDE columns in pairs.
constexpr int64_t TILE_HALVES = SIDE * HALVES, STEP = PARTS * TILE_HALVES;

// rows: [BLOCK / SIDE, depth / HALVES, STEP], panel: [COLUMNS / SIDE, depth / HALVES, STEP].
inline void sum_halves(const uint16_t* rows, const uint16_t* panel, int64_t depth, float* sums) {
  const int64_t step = depth / HALVES * STEP;
  for (int64_t column = 0; column < COLUMNS; column += 2 * SIDE, panel += 2 * step) {
    clear();
    for (int64_t i = 0; i < step; i += STEP) {
      const auto load_rows = [&](int64_t part) {
        _tile_loadd(4, rows + i + part * TILE_HALVES, 64);
        _tile_loadd(5, rows + step + i + part * TILE_HALVES, 64);
      };
      const auto load_columns = [&](int64_t part) {
        _tile_loadd(6, panel + i + part * TILE_HALVES, 64);
        _tile_loadd(7, panel + step + i + part * TILE_HALVES, 64);
      };
      load_rows(2);  // small products first
      load_columns(0);
      multiply_halves();
      load_rows(1);
      multiply_halves();
      load_columns(1);
      multiply_halves();
      load_rows(0);
      multiply_halves();
      load_columns(2);
      multiply_halves();
      load_columns(0);
      multiply_halves();
    }
    store(sums + column);
  }
}

// A vector of float32 as the sum of three that are bfloat16, to the last bit.
struct Split {
  Integers part[PARTS];

  explicit Split(Vector values) {
    const Integers upper = Integers{} + static_cast<int32_t>(0xffff0000u);
    for (int p = 0; p < PARTS; p++) {
      part[p] = (Integers)values & upper;
      values -= (Vector)part[p];
    }
  }
};

// Of HALVES places of a sum, the first SIDE and the second lie in pairs.
inline Integers pair(Integers first, Integers second) {
  return (Integers)_mm512_or_si512(_mm512_srli_epi32((__m512i)first, 16), (__m512i)second);
}

inline void split_pair(Vector first, Vector second, uint16_t* to) {
  const Split a(first), b(second);
  for (int p = 0; p < PARTS; p++) *reinterpret_cast<Integers*>(to + p * TILE_HALVES) = pair(a.part[p], b.part[p]);
}

// A row of `n` values as a row of each tile, with zeros up to `depth`; `to` is that row of the first tile.
inline void split_row(const float* values, int64_t n, int64_t depth, uint16_t* to) {
  const auto load = [&](int64_t i) {
    const __mmask16 there = n - i >= LANES ? 0xffff : n > i ? (1u << (n - i)) - 1 : 0;
    return (Vector)_mm512_maskz_loadu_ps(there, values + i);
  };
  for (int64_t i = 0; i < depth; i += HALVES, to += STEP) split_pair(load(i), load(i + SIDE), to);
}

// A square [COLUMNS, COLUMNS] of a weight as tiles; its rows are what is summed over in the backward, else its columns.
// `step` is that from SIDE columns of the product to the next.
inline void split_square(const float* square, bool over_rows, uint16_t* to, int64_t step) {
  for (int64_t n = 0; n < COLUMNS; n += SIDE, to += step)
    for (int64_t i = 0; i < COLUMNS; i += HALVES) {
      Vector halves[2][SIDE];
      for (int h = 0; h < 2; h++) {
        const int64_t at_inner = i + h * SIDE;
        for (int64_t r = 0; r < SIDE; r++)
          halves[h][r] = at(over_rows ? square + (at_inner + r) * COLUMNS + n : square + (n + r) * COLUMNS + at_inner);
        if (!over_rows) transpose(halves[h]);
      }
      for (int64_t r = 0; r < SIDE; r++)
        split_pair(halves[0][r], halves[1][r], to + i / HALVES * STEP + r * HALVES);
    }
}

#else

inline bool& is_on() {
  static bool on = false;
  return on;
}

#endif

}  // namespace
}  // namespace amx
