// Vectors, exponentials and products small enough for the second-level cache.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// Reduction by powers of two, then a minimax polynomial (Cephes): a relative error of a few 1e-7.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t power = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return p * scale;
}

using Buffer = std::vector<float>;

// Products small enough for the second-level cache: a block of ROWS x VECTORS registers gathers a whole sum.
#ifdef __AVX512F__
constexpr int64_t LANES = 16, VECTORS = 4, ROWS = 6;
#else
constexpr int64_t LANES = 8, VECTORS = 2, ROWS = 4;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4)));

inline Vector at(const float* p) { return *reinterpret_cast<const Vector*>(p); }

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Two neighbours of a sum in bfloat16, the first in the lower half.
typedef int32_t Pair;
constexpr int32_t UPPER = static_cast<int32_t>(0xffff0000u);

inline Integers at(const Pair* p) { return *reinterpret_cast<const Integers*>(p); }

inline Vector add_product(Vector sum, float left, Vector right) { return sum + left * right; }

inline Vector add_product(Vector sum, Pair left, Integers right) {
#ifdef __AVX512BF16__
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
#else
  const Integers both = Integers{} + left;
  return sum + (Vector)(both << 16) * (Vector)(right << 16) + (Vector)(both & UPPER) * (Vector)(right & UPPER);
#endif
}

// Element: float, or Pair, of which each stands for two places of `inner`.
template <int R, int W, class Element>
inline void block(int64_t inner, const Element* a, int64_t row_step, int64_t inner_step, const Element* b,
                  int64_t b_step, float* c, int64_t c_step, bool add) {
  Vector sums[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) sums[r][w] = add ? at(c + r * c_step + w * LANES) : Vector{};
  for (int64_t i = 0; i < inner; i++) {
    decltype(at(b)) right[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) right[w] = at(b + i * b_step + w * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Element left = a[r * row_step + i * inner_step];
#pragma GCC unroll 8
      for (int w = 0; w < W; w++) sums[r][w] = add_product(sums[r][w], left, right[w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int w = 0; w < W; w++) *reinterpret_cast<Vector*>(c + r * c_step + w * LANES) = sums[r][w];
}

template <int R, class Element>
inline void strip(int64_t columns, int64_t inner, const Element* a, int64_t row_step, int64_t inner_step,
                  const Element* b, int64_t b_step, float* c, int64_t c_step, bool add) {
  int64_t j = 0, left = columns / LANES;
#define BLOCK(W) \
  block<R, W>(inner, a, row_step, inner_step, b + j, b_step, c + j, c_step, add), j += W * LANES, left -= W
  while (left >= VECTORS && left != 5) BLOCK(VECTORS);  // 5 are 3 and 2: a block of one vector waits for its sums
  while (left >= 3) BLOCK(3);
  while (left >= 2) BLOCK(2);
  while (left) BLOCK(1);
#undef BLOCK
}

// c [rows, columns] (+)= a [rows, inner] b [inner, columns]; columns is a multiple of LANES, a may be transposed.
template <class Element>
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const Element* a, int64_t row_step,
                     int64_t inner_step, const Element* b, int64_t b_step, float* c, int64_t c_step, bool add) {
  int64_t r = 0;
#define STRIP(R) strip<R>(columns, inner, a + r * row_step, row_step, inner_step, b, b_step, c + r * c_step, c_step, add)
  for (; r + ROWS <= rows; r += ROWS) STRIP(ROWS);
  switch (rows - r) {
    case 1: STRIP(1); break;
    case 2: STRIP(2); break;
    case 3: STRIP(3); break;
    case 4: STRIP(4); break;
    case 5: STRIP(5); break;
  }
#undef STRIP
}

// [rows, n] of rows `step` apart, with each row filled up by zeros to a multiple of LANES.
inline void pack(const float* from, int64_t step, int64_t rows, int64_t n, Buffer& to) {
  const int64_t width = padded(n);
  to.assign(rows * width, 0.0f);
  for (int64_t r = 0; r < rows; r++) std::memcpy(to.data() + r * width, from + r * step, n * sizeof(float));
}

// Of pairs of rows that lie D apart, exchanges the halves: one stage of a transposition.
template <int D>
inline void exchange(Vector (&rows)[LANES]) {
  Integers low, high;
  for (int i = 0; i < LANES; i++) {
    low[i] = i & D ? LANES + (i ^ D) : i;
    high[i] = i & D ? LANES + i : i ^ D;
  }
  for (int i = 0; i < LANES; i++)
    if (!(i & D)) {
      const Vector a = rows[i], b = rows[i | D];
#ifdef __clang__
      for (int j = 0; j < LANES; j++) {
        rows[i][j] = low[j] < LANES ? a[low[j]] : b[low[j] - LANES];
        rows[i | D][j] = high[j] < LANES ? a[high[j]] : b[high[j] - LANES];
      }
#else
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i | D] = __builtin_shuffle(a, b, high);
#endif
    }
}

inline void transpose(Vector (&rows)[LANES]) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  if (LANES > 8) exchange<8 % LANES>(rows);
}

// to [n, rows] = from [rows, n]. Whole vectors are written: up to LANES - 1 places after each row of `to` get zeros.
template <class Element>
inline void turn_rows(const Element* from, int64_t step, int64_t rows, int64_t n, Element* to, int64_t to_step) {
  using Lanes = decltype(at(from));
  for (int64_t r = 0; r < rows; r += LANES) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
      Vector block[LANES] = {};
      for (int64_t k = 0; k < LANES && r + k < rows; k++) block[k] = (Vector)at(from + (r + k) * step + i);
      transpose(block);
      for (int64_t k = 0; k < LANES; k++) *reinterpret_cast<Lanes*>(to + (i + k) * to_step + r) = (Lanes)block[k];
    }
    for (; i < n; i++)
      for (int64_t k = r; k < rows && k < r + LANES; k++) to[i * to_step + k] = from[k * step + i];
  }
}

}  // namespace

#define EACH_TOKEN _Pragma("omp for schedule(static)") for (int64_t t = 0; t < tokens; t++)
#define PARALLEL _Pragma("omp parallel")
