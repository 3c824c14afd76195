// What products of attention read, in float32 or, in pairs along each sum, in bfloat16.
#pragma once

#include "vectors.h"

namespace {

// To the nearest bfloat16, an even one between two; its bits are the upper half.
inline Integers rounded(Vector values) {
  const Integers bits = (Integers)values, none = values != values;
  return (none ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) & UPPER;
}

// Of two rows that lie next to each other in a sum.
inline Integers pair_rows(Vector first, Vector second) {
#ifdef __AVX512BF16__
  Integers by_turns;
  for (int32_t i = 0; i < LANES; i++) by_turns[i] = (LANES + i) << 16 | i;
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Integers)_mm512_permutexvar_epi16((__m512i)by_turns, halves);
#else
  return ((rounded(first) >> 16) & 0xffff) | rounded(second);
#endif
}

inline Pair pair_of(float first, float second) { return pair_rows(Vector{first}, Vector{second})[0]; }

// Of neighbours in one row of `n`, each times `scale`.
inline void pair_row(const float* from, int64_t n, float scale, Pair* to) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const Vector first = at(from + i) * scale, second = at(from + i + LANES) * scale;
    _mm512_storeu_si512(to + i / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
  for (; i + LANES <= n; i += LANES) {
    const Vector values = at(from + i) * scale;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), (__m256i)_mm512_cvtneps_pbh((__m512)values));
  }
#endif
  for (; i < n; i += 2) to[i / 2] = pair_of(from[i] * scale, i + 1 < n ? from[i + 1] * scale : 0.0f);
}

// A matrix as a product reads it whose sum goes along its rows, or across them; in place where that can be.
template <class Element>
struct Operand;

template <>
struct Operand<float> {
  const float* values;
  int64_t step;
  Buffer copy;

  // Elements for `n` places of a sum.
  static int64_t places(int64_t n) { return n; }

  void along(const float* from, int64_t from_step, int64_t, int64_t) { values = from, step = from_step; }

  // Whole vectors can be read of each row.
  void across(const float* from, int64_t from_step, int64_t rows, int64_t n) {
    if (n % LANES) {
      pack(from, from_step, rows, n, copy);
      values = copy.data(), step = padded(n);
    } else {
      values = from, step = from_step;
    }
  }

  // to [n, rows] = scale x from [rows, n]; see turn_rows.
  void turn(const float* from, int64_t from_step, int64_t rows, int64_t n, float scale, float* to, int64_t to_step) {
    turn_rows(from, from_step, rows, n, to, to_step);
    for (int64_t i = 0; i < n; i++)
      for (int64_t c = 0; c < rows; c++) to[i * to_step + c] *= scale;
  }
};

template <>
struct Operand<Pair> {
  const Pair* values;
  int64_t step;
  std::vector<Pair> copy;

  static int64_t places(int64_t n) { return (n + 1) / 2; }

  void along(const float* from, int64_t from_step, int64_t rows, int64_t n, float scale = 1.0f) {
    step = places(n);
    copy.resize(rows * step);
    for (int64_t r = 0; r < rows; r++) pair_row(from + r * from_step, n, scale, copy.data() + r * step);
    values = copy.data();
  }

  void across(const float* from, int64_t from_step, int64_t rows, int64_t n) {
    step = padded(n);
    copy.resize(places(rows) * step);
    for (int64_t r = 0; r < rows; r += 2) {
      const float *first = from + r * from_step, *second = r + 1 < rows ? first + from_step : nullptr;
      Pair* to = copy.data() + r / 2 * step;
      int64_t i = 0;
      for (; i + LANES <= n; i += LANES)
        *reinterpret_cast<Integers*>(to + i) = pair_rows(at(first + i), second ? at(second + i) : Vector{});
      for (; i < step; i++) to[i] = i < n ? pair_of(first[i], second ? second[i] : 0.0f) : 0;
    }
    values = copy.data();
  }

  void turn(const float* from, int64_t from_step, int64_t rows, int64_t n, float scale, Pair* to, int64_t to_step) {
    along(from, from_step, rows, n, scale);
    turn_rows(values, step, rows, step, to, to_step);
  }
};

}  // namespace
