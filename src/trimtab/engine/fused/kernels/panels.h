// How a product is shared out: each thread takes panels of WIDTH columns and goes past all rows with each, in blocks of
// R x WIDTH sums that stay in registers while all is added to them that goes with the product.
#pragma once

#include <omp.h>

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int64_t WIDTH = VECTORS * LANES, TILE = 64;

// What is added to a product [tokens, columns]: addend, bias and small lora_b; each may be null.
struct Extra {
  const float* addend;  // [tokens, columns]
  const float* bias;    // [columns]
  const float* small;   // [tokens, rank]
  const float* lora_b;  // [rank, columns]
  int64_t rank;
};

// The same from one row and column on, with the steps between rows.
struct Place {
  float* out;
  int64_t step;
  Extra extra;
  int64_t lora_step;
};

// sums [R, VECTORS] += what is to be added there.
template <int R>
inline void add_extra(const Place& place, Vector* sums) {
  const Extra& e = place.extra;
  if (e.addend) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int w = 0; w < VECTORS; w++) sums[r * VECTORS + w] += at(e.addend + r * place.step + w * LANES);
  }
  if (e.bias) {
#pragma GCC unroll 8
    for (int w = 0; w < VECTORS; w++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r * VECTORS + w] += at(e.bias + w * LANES);
  }
  for (int64_t i = 0; i < e.rank; i++) {
#pragma GCC unroll 8
    for (int w = 0; w < VECTORS; w++) {
      const Vector right = at(e.lora_b + i * place.lora_step + w * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r * VECTORS + w] += e.small[r * e.rank + i] * right;
    }
  }
}

template <int R>
inline void put(const Place& place, const Vector* sums) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int w = 0; w < VECTORS; w++)
      *reinterpret_cast<Vector*>(place.out + r * place.step + w * LANES) = sums[r * VECTORS + w];
}

// Where a block goes, and what is added to it, for both to be fetched while the sums are taken: a line after each part
// of a sum, since in one go these fetches would hold it up.
struct Ahead {
  const float* out;
  int64_t step, to_addend;

  explicit Ahead(const Place& place)
      : out(place.out), step(place.step), to_addend(place.extra.addend ? place.extra.addend - place.out : 0) {}

  void fetch(int64_t part) const {
    const float* line = out + part / VECTORS * step + part % VECTORS * LANES;
    __builtin_prefetch(line, 1);
    __builtin_prefetch(line + to_addend);
  }
};

// One block of R rows; where it hangs over the last column, in a place of full width.
template <int R, class Kind>
inline void whole_or_edge(const Kind& kind, int64_t row, const Place& place, int64_t columns) {
  if (columns >= WIDTH) return kind.template block<R>(row, place);
  float out[R * WIDTH] = {}, addend[R * WIDTH] = {}, bias[WIDTH] = {};
  static thread_local Buffer lora_b;
  const Extra& e = place.extra;
  for (int r = 0; r < R; r++) {
    std::memcpy(out + r * WIDTH, place.out + r * place.step, columns * sizeof(float));
    if (e.addend) std::memcpy(addend + r * WIDTH, e.addend + r * place.step, columns * sizeof(float));
  }
  if (e.bias) std::memcpy(bias, e.bias, columns * sizeof(float));
  lora_b.assign(e.rank * WIDTH, 0.0f);
  for (int64_t i = 0; i < e.rank; i++)
    std::memcpy(lora_b.data() + i * WIDTH, e.lora_b + i * place.lora_step, columns * sizeof(float));
  kind.template block<R>(row, Place{out, WIDTH, Extra{addend, bias, e.small, lora_b.data(), e.rank}, WIDTH});
  for (int r = 0; r < R; r++) std::memcpy(place.out + r * place.step, out + r * WIDTH, columns * sizeof(float));
}

template <int R, class Kind>
inline void rest(int64_t rows, const Kind& kind, int64_t row, const Place& place, int64_t columns) {
  if (rows == R)
    whole_or_edge<R>(kind, row, place, columns);
  else if constexpr (R > 1)
    rest<R - 1>(rows, kind, row, place, columns);
}

// Rows begin to end of the panel that starts at `column`.
template <class Kind>
inline void rows_of_panel(const Kind& kind, int64_t begin, int64_t end, int64_t column, int64_t columns, const Extra& e,
                          float* out) {
  for (int64_t row = begin; row < end; row += ROWS) {
    const int64_t offset = row * columns + column;
    const Extra here = {e.addend ? e.addend + offset : nullptr, e.bias ? e.bias + column : nullptr,
                        e.small ? e.small + row * e.rank : nullptr, e.lora_b ? e.lora_b + column : nullptr, e.rank};
    rest<ROWS>(std::min(ROWS, end - row), kind, row, Place{out + offset, columns, here, columns}, columns - column);
  }
}

// visit(panel, first row, last row): this thread's share of all panels; as few of them as can be in two halves, of whole
// blocks of rows.
template <class Visit>
inline void share_panels(int64_t tokens, int64_t columns, int64_t block, Visit visit) {
  if (!tokens) return;
  const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
  const int64_t share = ((tokens + threads - 1) / threads + block - 1) / block * block;
  const int64_t blocks = (tokens + share - 1) / share, all = (columns + WIDTH - 1) / WIDTH * blocks;
  const int64_t last = all * (me + 1) / threads;
  for (int64_t i = all * me / threads; i < last;) {
    const int64_t panel = i / blocks, next = std::min((panel + 1) * blocks, last);
    const int64_t row = i % blocks * share;
    visit(panel, row, std::min(row + (next - i) * share, tokens));
    i = next;
  }
}

// The same with all panels for this thread's share of the rows: what comes before and after a product has its rows there.
template <class Visit>
inline void share_rows(int64_t tokens, int64_t columns, int64_t block, Visit visit) {
  const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
  const int64_t share = ((tokens + threads - 1) / threads + block / 2) / block * block;
  const int64_t begin = std::min(me * share, tokens), end = me + 1 == threads ? tokens : std::min(begin + share, tokens);
  if (begin < end)
    for (int64_t panel = 0; panel * WIDTH < columns; panel++) visit(panel, begin, end);
}

}  // namespace
