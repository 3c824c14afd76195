// The small products of LoRA adapters, with dropout from a seed; the plain twins are in plain.py.

#include "vectors.h"

namespace {

constexpr int64_t PARTS = 8;  // sums over tokens that are taken side by side

// The 32-bit finaliser of MurmurHash3 (Appleby 2011).
inline uint32_t hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// A row with zeros where 16 bits of a hash of (seed, row, column) fall below `dropped`.
void mask_row(const float* from, int64_t seed, int64_t dropped, int64_t row, int64_t n, float* to) {
  if (!dropped) {
    if (from != to) std::memcpy(to, from, n * sizeof(float));
    return;
  }
  const uint32_t start = hash(static_cast<uint32_t>(row) + static_cast<uint32_t>(seed));
  const uint32_t threshold = static_cast<uint32_t>(dropped);
  for (int64_t i = 0; i < n; i++)
    to[i] = (hash(start + static_cast<uint32_t>(i)) & 0xffffu) >= threshold ? from[i] : 0.0f;
}

// One adapter of a product: in its columns start to stop, scaling values a^T b^T is added.
struct Adapter {
  const float* a;  // [rank, n]
  const float* b;  // [stop - start, rank]
  float scaling;
  int64_t start, stop;
  float *by_a, *by_b;  // the gradients of a and b
};

}  // namespace

extern "C" {

// small [tokens, adapters rank] = dropout(values) a^T, each adapter with a mask of its own, and b [adapters rank, width],
// scaled and zero outside of each adapter's columns: small b is what the adapters add to a product.
// Every sum stays in registers; masks are found from the seed and never stored.
void lora_forward(const float* values, const Adapter* parts, int64_t adapters, int64_t rank, int64_t n, int64_t width,
                  int64_t seed, int64_t dropped, int64_t tokens, float* small, float* b) {
  const int64_t columns = padded(rank), all = adapters * rank;
  static thread_local Buffer turned_buffer;  // the caller's; its threads share it through the pointer
  turned_buffer.assign(adapters * n * columns, 0.0f);
  float* turned = turned_buffer.data();
  std::memset(b, 0, all * width * sizeof(float));
  for (int64_t m = 0; m < adapters; m++) {
    turn_rows(parts[m].a, n, rank, n, turned + m * n * columns, columns);
    for (int64_t i = parts[m].start; i < parts[m].stop; i++)
      for (int64_t r = 0; r < rank; r++)
        b[(m * rank + r) * width + i] = parts[m].b[(i - parts[m].start) * rank + r] * parts[m].scaling;
  }
  PARALLEL {
    static thread_local Buffer masked, sums;
    masked.resize(ROWS * n), sums.resize(ROWS * columns);
    _Pragma("omp for schedule(static)") for (int64_t t = 0; t < tokens; t += ROWS) {
      const int64_t rows = tokens - t < ROWS ? tokens - t : ROWS;
      for (int64_t m = 0; m < adapters; m++) {
        for (int64_t r = 0; r < rows; r++)
          mask_row(values + (t + r) * n, seed, dropped, (t + r) * adapters + m, n, masked.data() + r * n);
        multiply(rows, columns, n, masked.data(), n, 1, turned + m * n * columns, columns, sums.data(), columns, false);
        for (int64_t r = 0; r < rows; r++)
          std::memcpy(small + (t + r) * all + m * rank, sums.data() + r * columns, rank * sizeof(float));
      }
    }
  }
}

// From grad, the gradient of the product [tokens, width]: that of each a and b and, where asked for, delta [tokens, n],
// the gradient of values through the adapters, with addend (or null) added.
void lora_backward(const float* values, const Adapter* parts, int64_t adapters, int64_t rank, int64_t n, int64_t width,
                   int64_t seed, int64_t dropped, int64_t tokens, const float* grad, const float* small,
                   const float* addend, float* delta) {
  const int64_t columns = padded(n), outs = padded(width), ranks = padded(rank), all = adapters * rank;
  const int64_t chunk = 4 * ROWS, chunks = (tokens + chunk - 1) / chunk;
  // Sums of a fixed number of parts in a fixed order: the same bits on every run.
  const int64_t side_by_side = chunks < PARTS ? chunks : PARTS;
  static thread_local Buffer weights_buffer, b_buffer, a_sums_buffer, b_sums_buffer;  // shared as above
  weights_buffer.resize(all * columns);
  b_buffer.assign(adapters * width * ranks, 0.0f);
  a_sums_buffer.resize(side_by_side * all * columns);
  b_sums_buffer.resize(side_by_side * all * outs);
  float *weights = weights_buffer.data(), *scaled_b = b_buffer.data();
  float *a_sums = a_sums_buffer.data(), *b_sums = b_sums_buffer.data();
  for (int64_t m = 0; m < adapters; m++) {
    for (int64_t r = 0; r < rank; r++)
      std::memcpy(weights + (m * rank + r) * columns, parts[m].a + r * n, n * sizeof(float));
    for (int64_t i = parts[m].start; i < parts[m].stop; i++)
      for (int64_t r = 0; r < rank; r++)
        scaled_b[(m * width + i) * ranks + r] = parts[m].b[(i - parts[m].start) * rank + r] * parts[m].scaling;
  }
  PARALLEL {
    static thread_local Buffer masked, back, by_small, part_of_grad;
    masked.assign(chunk * columns, 0.0f), back.resize(chunk * columns), by_small.resize(chunk * ranks);
    _Pragma("omp for schedule(static)") for (int64_t part = 0; part < side_by_side; part++) {
      std::memset(a_sums + part * all * columns, 0, all * columns * sizeof(float));
      std::memset(b_sums + part * all * outs, 0, all * outs * sizeof(float));
      for (int64_t c = part * chunks / side_by_side; c < (part + 1) * chunks / side_by_side; c++) {
        const int64_t t = c * chunk, rows = tokens - t < chunk ? tokens - t : chunk;
        if (delta && addend) std::memcpy(delta + t * n, addend + t * n, rows * n * sizeof(float));
        if (delta && !addend) std::memset(delta + t * n, 0, rows * n * sizeof(float));
        for (int64_t m = 0; m < adapters; m++) {
          const int64_t start = parts[m].start, span = parts[m].stop - start;
          const float* g = grad + t * width + start;
          int64_t step = width;
          if (span % LANES) {  // whole vectors would reach past the span
            pack(g, width, rows, span, part_of_grad);
            g = part_of_grad.data();
            step = padded(span);
          }
          multiply(rows, ranks, span, g, step, 1, scaled_b + (m * width + start) * ranks, ranks, by_small.data(),
                   ranks, false);
          multiply(rank, padded(span), rows, small + t * all + m * rank, 1, all, g, step,
                   b_sums + (part * all + m * rank) * outs, outs, true);
          for (int64_t r = 0; r < rows; r++)
            mask_row(values + (t + r) * n, seed, dropped, (t + r) * adapters + m, n, masked.data() + r * columns);
          multiply(rank, columns, rows, by_small.data(), 1, ranks, masked.data(), columns,
                   a_sums + (part * all + m * rank) * columns, columns, true);
          if (!delta) continue;
          multiply(rows, columns, rank, by_small.data(), ranks, 1, weights + m * rank * columns, columns,
                   back.data(), columns, false);
          for (int64_t r = 0; r < rows; r++) {
            float *from = back.data() + r * columns, *to = delta + (t + r) * n;
            mask_row(from, seed, dropped, (t + r) * adapters + m, n, from);
            for (int64_t i = 0; i < n; i++) to[i] += from[i];
          }
        }
      }
    }
    _Pragma("omp for schedule(static)") for (int64_t row = 0; row < all; row++) {
      const Adapter& adapter = parts[row / rank];
      const int64_t r = row % rank;
      std::memset(adapter.by_a + r * n, 0, n * sizeof(float));
      for (int64_t part = 0; part < side_by_side; part++)
        for (int64_t i = 0; i < n; i++) adapter.by_a[r * n + i] += a_sums[(part * all + row) * columns + i];
      for (int64_t i = 0; i < adapter.stop - adapter.start; i++) {
        float sum = 0;
        for (int64_t part = 0; part < side_by_side; part++) sum += b_sums[(part * all + row) * outs + i];
        adapter.by_b[i * rank + r] = sum * adapter.scaling;
      }
    }
  }
}

}  // extern "C"
