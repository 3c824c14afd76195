// Rows times a frozen weight, in float32 or int8; the plain twins are linear and linear_backward in plain.py.
//
// A weight lies in tiles of TILE x TILE. A panel of WIDTH columns stays in the second-level cache while all rows go past it.

#include "amx.h"
#include "panels.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t DEPTH = 768;  // of the sum, at a time: a panel takes 192 KiB
constexpr int64_t CHAIN = 288;  // products summed one after the other: sums of sums round less

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

// Where a block's sums come from: taken from rows and panel, or lying there already from its first row on.
struct TakeFloats {
  const float* values;
  int64_t step, depth;
  const float* panel;

  template <int R>
  void take(int64_t row, const Place& place, Vector* total) const {
    sum_floats<R>(values + row * step, step, panel, depth, Ahead(place), total);
  }
};

struct TakeBytes {
  const uint8_t* values;
  int64_t inner;
  const int8_t* panel;

  template <int R>
  void take(int64_t row, const Place& place, Integers* total) const {
    sum_bytes<R>(values + row * inner, panel, inner, Ahead(place), total);
  }
};

template <class T>
struct Taken {
  const T* sums;  // [rows, WIDTH]
  int64_t first;

  template <int R, class Whole>
  void take(int64_t row, const Place&, Whole* total) const {
    for (int i = 0; i < R * VECTORS; i++)
      total[i] = *reinterpret_cast<const Whole*>(sums + (row - first) * WIDTH + i * LANES);
  }
};

// Rows in float32, and a part of their inner places; the first of those parts brings what is added.
template <class Sums>
struct Floats {
  Sums sums;
  bool first;

  template <int R>
  void block(int64_t row, const Place& place) const {
    Vector total[R * VECTORS];
    sums.template take<R>(row, place, total);
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
template <class Sums>
struct Bytes {
  Sums sums;
  const float* row_scale;
  const float* column_scale;  // at the panel's first column; or null
  const int32_t* sums_of_weight;

  template <int R>
  void block(int64_t row, const Place& place) const {
    Integers total[R * VECTORS];
    sums.template take<R>(row, place, total);
    Vector scaled[R * VECTORS];
#pragma GCC unroll 8
    for (int w = 0; w < VECTORS; w++) {
      const Integers shift = *reinterpret_cast<const Integers*>(sums_of_weight + w * LANES) * 128;
      const Vector scale = column_scale ? at(column_scale + w * LANES) : Vector{} + 1.0f;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        scaled[r * VECTORS + w] =
            __builtin_convertvector(total[r * VECTORS + w] - shift, Vector) * (scale * row_scale[row + r]);
    }
    add_extra<R>(place, scaled);
    put<R>(place, scaled);
  }
};

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

// The squares of a weight [columns, inner], or, backward, [inner, columns].
struct Squares {
  const float* tiles;
  int64_t across;
  bool backward;

  const float* at(int64_t inner, int64_t column) const {
    return backward ? tiles + (inner / TILE * across + column / TILE) * TILE * TILE + column % TILE
                    : tiles + (column / TILE * across + inner / TILE) * TILE * TILE + column % TILE * TILE;
  }
};

#ifdef HAS_AMX

void product_by_bytes(const uint8_t* values, const float* row_scale, const int8_t* panels, const int32_t* sums_of_weight,
                      const float* column_scale, int64_t tokens, int64_t columns, int64_t inner, const Extra& extra,
                      float* out) {
  PARALLEL {
    const amx::Tiles tiles;
    alignas(64) int32_t sums[amx::BLOCK * WIDTH];
    share_rows(tokens, columns, amx::BLOCK, [&](int64_t panel, int64_t begin, int64_t end) {
      const int64_t column = panel * WIDTH;
      const float* const panel_scale = column_scale ? column_scale + column : nullptr;
      for (int64_t row = begin; row < end; row += amx::BLOCK) {
        const int64_t first = std::min(row, tokens - amx::BLOCK);  // so that it does not go past the last row
        amx::fetch_share(panels + (column + WIDTH) * inner, WIDTH * inner, row - begin, end - begin);  // of the next panel
        amx::sum_bytes(values + first * inner, inner, panels + column * inner, sums);
        const Bytes<Taken<int32_t>> kind = {{sums, first}, row_scale, panel_scale, sums_of_weight + column};
        rows_of_panel(kind, row, std::min(row + amx::BLOCK, end), column, columns, extra, out);
      }
    });
  }
}

void product_by_halves(const float* values, const Squares& squares, int64_t tokens, int64_t columns, int64_t inner,
                       const Extra& extra, float* out) {
  static thread_local amx::Aligned split;
  const int64_t rows = (tokens + amx::BLOCK - 1) / amx::BLOCK * amx::BLOCK;
  uint16_t* const left = split.of(amx::PARTS * rows * std::min(DEPTH, (inner + TILE - 1) / TILE * TILE));
  PARALLEL {
    const amx::Tiles tiles;
    alignas(64) float sums[amx::BLOCK * WIDTH];
    static thread_local amx::Aligned panel_parts;
    uint16_t* const right = panel_parts.of(amx::PARTS * DEPTH * WIDTH);
    for (int64_t from = 0; from < inner; from += DEPTH) {
      const int64_t depth = std::min(DEPTH, (inner - from + TILE - 1) / TILE * TILE), step = depth / amx::HALVES * amx::STEP;
      EACH_TOKEN amx::split_row(values + t * inner + from, inner - from, depth,
                                left + t / amx::SIDE * step + t % amx::SIDE * amx::HALVES);
      share_panels(tokens, columns, amx::BLOCK, [&](int64_t panel, int64_t begin, int64_t end) {
        const int64_t column = panel * WIDTH;
        for (int64_t i = 0; i < depth; i += TILE)
          amx::split_square(squares.at(from + i, column), squares.backward, right + i / amx::HALVES * amx::STEP, step);
        for (int64_t row = begin; row < end; row += amx::BLOCK) {
          amx::sum_halves(left + row / amx::SIDE * step, right, depth, sums);
          const Floats<Taken<float>> kind = {{sums, row}, from == 0};
          rows_of_panel(kind, row, std::min(row + amx::BLOCK, end), column, columns, extra, out);
        }
      });
#pragma omp barrier
    }
  }
}

#endif

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

// Whether this processor has a matrix unit that may be used.
int64_t has_amx() { return amx::is_on(); }

// Use it, or not, from now on; where there is none, nothing changes.
void use_amx(int64_t use) {
  static const bool is_there = amx::is_on();
  amx::is_on() = is_there && use;
}

// out [tokens, columns] = values [tokens, inner] W^T + extra. tiles [columns / TILE, inner / TILE, TILE, TILE] of W
// [columns, inner]; or, to multiply by W itself (backward), of W [inner, columns].
void product(const float* values, const float* tiles, int64_t backward, int64_t tokens, int64_t columns, int64_t inner,
             Extra extra, float* out) {
  const Squares squares = {tiles, ((backward ? columns : inner) + TILE - 1) / TILE, backward != 0};
#ifdef HAS_AMX
  if (amx::is_on()) return product_by_halves(values, squares, tokens, columns, inner, extra, out);
#endif
  PARALLEL {
    static thread_local Buffer buffer;
    buffer.resize((DEPTH + 8) * WIDTH);
    for (int64_t from = 0; from < inner; from += DEPTH)
      share_panels(tokens, columns, ROWS, [&](int64_t panel, int64_t begin, int64_t end) {
        const int64_t column = panel * WIDTH, depth = std::min(DEPTH, inner - from);
        for (int64_t i = 0; i < depth; i += TILE) {
          float* to = buffer.data() + i * WIDTH;
          const float* square = squares.at(from + i, column);
          if (backward)
            for (int64_t k = 0; k < TILE; k++) std::memcpy(to + k * WIDTH, square + k * TILE, WIDTH * sizeof(float));
          else
            turn(square, to);
        }
        const Floats<TakeFloats> kind = {{values + from, inner, depth, buffer.data()}, from == 0};
        rows_of_panel(kind, begin, end, column, columns, extra, out);
      });
  }
}

// out [tokens, columns] = (values - 128) x row_scale W^T x column_scale + extra.
// panels [columns / TILE, inner / 4, TILE, 4] of W [columns, inner]; sums_of_weight [columns].
void product_int8(const uint8_t* values, const float* row_scale, const int8_t* panels, const int32_t* sums_of_weight,
                  const float* column_scale, int64_t tokens, int64_t columns, int64_t inner, Extra extra, float* out) {
#ifdef HAS_AMX
  if (amx::is_on() && tokens >= amx::BLOCK && inner % amx::BYTES == 0)
    return product_by_bytes(values, row_scale, panels, sums_of_weight, column_scale, tokens, columns, inner, extra, out);
#endif
  PARALLEL share_panels(tokens, columns, ROWS, [&](int64_t panel, int64_t begin, int64_t end) {
    const int64_t column = panel * WIDTH;
    const Bytes<TakeBytes> kind = {{values, inner, panels + column / TILE * TILE * inner + column % TILE * 4}, row_scale,
                                   column_scale ? column_scale + column : nullptr, sums_of_weight + column};
    rows_of_panel(kind, begin, end, column, columns, extra, out);
  });
}

}  // extern "C"
