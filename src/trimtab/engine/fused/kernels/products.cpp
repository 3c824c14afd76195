// Rows times a frozen weight, in float32 or int8; the plain twins are linear and linear_backward in plain.py.
//
// A weight lies in tiles of TILE x TILE. Each thread takes panels of WIDTH columns; a panel stays in the
// second-level cache while all rows go past it, and a block of ROWS x WIDTH sums stays in registers.

#include <omp.h>

#include <algorithm>

#include "vectors.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t WIDTH = VECTORS * LANES, TILE = 64;
constexpr int64_t DEPTH = 768;  // of the sum, at a time: a panel takes 192 KiB
constexpr int64_t CHAIN = 288;  // products summed one after the other: sums of sums round less

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

// The sums of R rows. Functions of their own: inlined, their registers would be spilled around what follows.
// values: rows `step` apart, panel: [depth, WIDTH], total: [R, VECTORS].
template <int R>
[[gnu::noinline]] void sum_floats(const float* values, int64_t step, const float* panel, int64_t depth,
                                  Ahead ahead, Vector* total) {
  int64_t part = 0;
  for (int64_t from = 0; from < depth; from += CHAIN) {
    Vector sums[R][VECTORS] = {};
    for (int64_t i = from; i < std::min(from + CHAIN, depth);) {
      ahead.fetch(part++);
      for (const int64_t stop = std::min(i + CHAIN / 8, depth); i < stop; i++, panel += WIDTH) {
        Vector right[VECTORS];
#pragma GCC unroll 8
        for (int w = 0; w < VECTORS; w++) {
          right[w] = at(panel + w * LANES);
          __builtin_prefetch(panel + 8 * WIDTH + w * LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const float left = values[r * step + i];
#pragma GCC unroll 8
          for (int w = 0; w < VECTORS; w++) sums[r][w] += left * right[w];
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int w = 0; w < VECTORS; w++) total[r * VECTORS + w] = from ? total[r * VECTORS + w] + sums[r][w] : sums[r][w];
  }
}

// sums += the products of four bytes each, the left ones unsigned.
inline Integers dot4(Integers sums, int32_t left, Integers right) {
#ifdef __AVX512VNNI__
  return (Integers)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(left), (__m512i)right);
#else
  for (int byte = 0; byte < 4; byte++)
    sums += static_cast<int32_t>((static_cast<uint32_t>(left) >> (8 * byte)) & 0xffu) * ((right << (24 - 8 * byte)) >> 24);
  return sums;
#endif
}

// panel: [inner / 4, TILE, 4].
template <int R>
[[gnu::noinline]] void sum_bytes(const uint8_t* values, const int8_t* panel, int64_t inner, Ahead ahead,
                                 Integers* total) {
  const int64_t share = (inner / 4 / (R * VECTORS) + 1) * 4;
  Integers sums[R][VECTORS] = {};
  int64_t i = 0;
  for (int part = 0; part < R * VECTORS; part++) {
    ahead.fetch(part);
    for (const int64_t stop = std::min(i + share, inner); i < stop; i += 4, panel += 4 * TILE) {
      Integers right[VECTORS];
#pragma GCC unroll 8
      for (int w = 0; w < VECTORS; w++) {
        right[w] = *reinterpret_cast<const Integers*>(panel + 4 * w * LANES);
        __builtin_prefetch(panel + 4 * 8 * TILE + 4 * w * LANES);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int32_t left;
        std::memcpy(&left, values + r * inner + i, 4);
#pragma GCC unroll 8
        for (int w = 0; w < VECTORS; w++) sums[r][w] = dot4(sums[r][w], left, right[w]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int w = 0; w < VECTORS; w++) total[r * VECTORS + w] = sums[r][w];
}

// Rows in float32, and `depth` of their inner places; `first` of those parts brings what is added.
struct Floats {
  const float* values;
  int64_t step, depth;
  const float* panel;
  bool first;

  template <int R>
  void block(int64_t row, const Place& place) const {
    Vector total[R * VECTORS];
    sum_floats<R>(values + row * step, step, panel, depth, Ahead(place), total);
    if (first) {
      add_extra<R>(place, total);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int w = 0; w < VECTORS; w++) total[r * VECTORS + w] += at(place.out + r * place.step + w * LANES);
    }
    put<R>(place, total);
  }
};

// Rows as bytes with 128 added.
struct Bytes {
  const uint8_t* values;
  const float* row_scale;
  int64_t inner;
  const int8_t* panel;
  const float* column_scale;  // at the panel's first column; or null
  const int32_t* sums_of_weight;

  template <int R>
  void block(int64_t row, const Place& place) const {
    Integers total[R * VECTORS];
    sum_bytes<R>(values + row * inner, panel, inner, Ahead(place), total);
    Vector sums[R * VECTORS];
#pragma GCC unroll 8
    for (int w = 0; w < VECTORS; w++) {
      const Integers shift = *reinterpret_cast<const Integers*>(sums_of_weight + w * LANES) * 128;
      const Vector scale = column_scale ? at(column_scale + w * LANES) : Vector{} + 1.0f;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        sums[r * VECTORS + w] =
            __builtin_convertvector(total[r * VECTORS + w] - shift, Vector) * (scale * row_scale[row + r]);
    }
    add_extra<R>(place, sums);
    put<R>(place, sums);
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

// visit(panel, first row, last row): this thread's share of all panels; as few of them as can be in two halves.
template <class Visit>
inline void share_panels(int64_t tokens, int64_t columns, Visit visit) {
  if (!tokens) return;
  const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
  const int64_t share = ((tokens + threads - 1) / threads + ROWS - 1) / ROWS * ROWS;
  const int64_t blocks = (tokens + share - 1) / share, all = (columns + WIDTH - 1) / WIDTH * blocks;
  const int64_t last = all * (me + 1) / threads;
  for (int64_t i = all * me / threads; i < last;) {
    const int64_t panel = i / blocks, next = std::min((panel + 1) * blocks, last);
    const int64_t row = i % blocks * share;
    visit(panel, row, std::min(row + (next - i) * share, tokens));
    i = next;
  }
}

// [WIDTH, TILE] of a tile, to [TILE, WIDTH].
inline void turn(const float* tile, float* to) {
  for (int64_t i = 0; i < TILE; i += LANES)
    for (int64_t n = 0; n < WIDTH; n += LANES) {
      Vector rows[LANES];
      for (int r = 0; r < LANES; r++) rows[r] = at(tile + (n + r) * TILE + i);
      transpose(rows);
      for (int r = 0; r < LANES; r++) *reinterpret_cast<Vector*>(to + (i + r) * WIDTH + n) = rows[r];
    }
}

}  // namespace

extern "C" {

// Whether bytes are multiplied by instructions made for it.
int64_t has_int8() {
#ifdef __AVX512VNNI__
  return 1;
#else
  return 0;
#endif
}

// out [tokens, columns] = values [tokens, inner] W^T + extra. tiles [columns / TILE, inner / TILE, TILE, TILE] of W
// [columns, inner]; or, to multiply by W itself (backward), of W [inner, columns].
void product(const float* values, const float* tiles, int64_t backward, int64_t tokens, int64_t columns, int64_t inner,
             Extra extra, float* out) {
  const int64_t across = ((backward ? columns : inner) + TILE - 1) / TILE;
  PARALLEL {
    static thread_local Buffer buffer;
    buffer.resize((DEPTH + 8) * WIDTH);
    for (int64_t from = 0; from < inner; from += DEPTH)
      share_panels(tokens, columns, [&](int64_t panel, int64_t begin, int64_t end) {
        const int64_t column = panel * WIDTH, depth = std::min(DEPTH, inner - from);
        for (int64_t i = 0; i < depth; i += TILE) {
          float* to = buffer.data() + i * WIDTH;
          if (backward) {
            const float* tile = tiles + ((from + i) / TILE * across + column / TILE) * TILE * TILE + column % TILE;
            for (int64_t k = 0; k < TILE; k++) std::memcpy(to + k * WIDTH, tile + k * TILE, WIDTH * sizeof(float));
          } else {
            turn(tiles + (column / TILE * across + (from + i) / TILE) * TILE * TILE + column % TILE * TILE, to);
          }
        }
        rows_of_panel(Floats{values + from, inner, depth, buffer.data(), from == 0}, begin, end, column, columns, extra,
                      out);
      });
  }
}

// out [tokens, columns] = (values - 128) x row_scale W^T x column_scale + extra.
// panels [columns / TILE, inner / 4, TILE, 4] of W [columns, inner]; sums_of_weight [columns].
void product_int8(const uint8_t* values, const float* row_scale, const int8_t* panels, const int32_t* sums_of_weight,
                  const float* column_scale, int64_t tokens, int64_t columns, int64_t inner, Extra extra, float* out) {
  PARALLEL share_panels(tokens, columns, [&](int64_t panel, int64_t begin, int64_t end) {
    const int64_t column = panel * WIDTH;
    const Bytes kind = {values, row_scale, inner,
                        panels + column / TILE * TILE * inner + column % TILE * 4,
                        column_scale ? column_scale + column : nullptr, sums_of_weight + column};
    rows_of_panel(kind, begin, end, column, columns, extra, out);
  });
}

}  // extern "C"
