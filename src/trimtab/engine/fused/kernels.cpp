// What a layer does between its matrix products: each function is one pass over memory.
//
// The plain twins, with the same names, are in plain.py and attention.py; tests hold each of these against its twin.
// Rows are taken one at a time into a buffer that stays in the first-level cache.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// A matrix product [tokens, columns]: values x row_scale x column_scale + bias + delta.
struct Product {
  const void* values;         // int32 where row_scale is set, else float
  const float* row_scale;     // [tokens]
  const float* column_scale;  // [columns]
  const float* bias;          // [columns]
  const float* delta;         // [tokens, columns]
};

// Where rows go: as they are, and as int8 with a scale each.
struct Want {
  float* values;              // [tokens, columns], or null
  int8_t* quantised;          // [tokens, columns], or null
  float* scale;               // [tokens]
  const float* column_scale;  // [columns], folded in before rounding; or null
};

void load(const Product& p, int64_t t, int64_t n, float* __restrict row) {
  if (p.row_scale) {
    const int32_t* v = static_cast<const int32_t*>(p.values) + t * n;
    const float s = p.row_scale[t];
    if (p.column_scale)
      for (int64_t i = 0; i < n; i++) row[i] = v[i] * (s * p.column_scale[i]);
    else
      for (int64_t i = 0; i < n; i++) row[i] = v[i] * s;
  } else {
    std::memcpy(row, static_cast<const float*>(p.values) + t * n, n * sizeof(float));
  }
  if (p.bias)
    for (int64_t i = 0; i < n; i++) row[i] += p.bias[i];
  if (p.delta) {
    const float* d = p.delta + t * n;
    for (int64_t i = 0; i < n; i++) row[i] += d[i];
  }
}

void store(const Want& w, int64_t t, int64_t n, float* __restrict row) {
  if (w.values) std::memcpy(w.values + t * n, row, n * sizeof(float));
  if (!w.quantised) return;
  if (w.column_scale)
    for (int64_t i = 0; i < n; i++) row[i] *= w.column_scale[i];
  // The bits of |x| order like |x|, and a NaN is above all: integers make the search for the largest vector code.
  int32_t bits = 0;
  const float tiny = 1e-30f;
  std::memcpy(&bits, &tiny, 4);
  for (int64_t i = 0; i < n; i++) {
    int32_t b;
    std::memcpy(&b, row + i, 4);
    b &= 0x7fffffff;
    bits = b > bits ? b : bits;
  }
  float largest;
  std::memcpy(&largest, &bits, 4);
  const float up = 127.0f / largest;
  w.scale[t] = largest * (1.0f / 127.0f);
  int8_t* q = w.quantised + t * n;
  for (int64_t i = 0; i < n; i++) q[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(row[i] * up)));
}

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

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Standard normal distribution function by Abramowitz and Stegun, formula 7.1.26 (error below 1.5e-7).
inline float normal_cdf(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  const float tail =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)))) *
      exponential(-z * z) * 0.5f;
  return x < 0 ? tail : 1.0f - tail;
}

// Rotates the halves of a head by cos and sin (times direction) as pairs.
void rotate(float* __restrict head, const float* cos, const float* sin, int64_t half, float direction) {
  for (int64_t i = 0; i < half; i++) {
    const float a = head[i], b = head[half + i], c = cos[i], s = sin[i] * direction;
    head[i] = a * c - b * s;
    head[half + i] = b * c + a * s;
  }
}

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

using Buffer = std::vector<float>;

// Products small enough for the second-level cache: a block of ROWS x VECTORS registers gathers a whole sum.
#ifdef __AVX512F__
constexpr int64_t LANES = 16, VECTORS = 4, ROWS = 6;
#else
constexpr int64_t LANES = 8, VECTORS = 2, ROWS = 4;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
constexpr int64_t CHUNK = 96;  // query rows at a time
constexpr int64_t PARTS = 8;   // sums over tokens that are taken side by side

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

template <int R, int W>
inline void block(int64_t inner, const float* a, int64_t row_step, int64_t inner_step, const float* b, int64_t b_step,
                  float* c, int64_t c_step, bool add) {
  Vector sums[R][W];
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++)
      sums[r][w] = add ? *reinterpret_cast<const Vector*>(c + r * c_step + w * LANES) : Vector{};
  for (int64_t i = 0; i < inner; i++) {
    Vector right[W];
    for (int w = 0; w < W; w++) right[w] = *reinterpret_cast<const Vector*>(b + i * b_step + w * LANES);
    for (int r = 0; r < R; r++) {
      const float left = a[r * row_step + i * inner_step];
      for (int w = 0; w < W; w++) sums[r][w] += left * right[w];
    }
  }
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) *reinterpret_cast<Vector*>(c + r * c_step + w * LANES) = sums[r][w];
}

template <int R>
inline void strip(int64_t columns, int64_t inner, const float* a, int64_t row_step, int64_t inner_step, const float* b,
                  int64_t b_step, float* c, int64_t c_step, bool add) {
  int64_t j = 0;
  for (; j + VECTORS * LANES <= columns; j += VECTORS * LANES)
    block<R, VECTORS>(inner, a, row_step, inner_step, b + j, b_step, c + j, c_step, add);
  for (; j + 2 * LANES <= columns; j += 2 * LANES)
    block<R, 2>(inner, a, row_step, inner_step, b + j, b_step, c + j, c_step, add);
  for (; j < columns; j += LANES) block<R, 1>(inner, a, row_step, inner_step, b + j, b_step, c + j, c_step, add);
}

// c [rows, columns] (+)= a [rows, inner] b [inner, columns]; columns is a multiple of LANES, a may be transposed.
void product(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t row_step, int64_t inner_step,
             const float* b, int64_t b_step, float* c, int64_t c_step, bool add) {
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
void pack(const float* from, int64_t step, int64_t rows, int64_t n, Buffer& to) {
  const int64_t width = padded(n);
  to.assign(rows * width, 0.0f);
  for (int64_t r = 0; r < rows; r++) std::memcpy(to.data() + r * width, from + r * step, n * sizeof(float));
}

// The same, transposed: [n, rows].
void pack_transposed(const float* from, int64_t step, int64_t rows, int64_t n, Buffer& to) {
  const int64_t width = padded(rows);
  to.assign(n * width, 0.0f);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < n; i++) to[i * width + r] = from[r * step + i];
}

struct Span {
  int64_t begin, end;
};

// The keys that a query at `place` sees.
inline Span visible(int64_t place, int64_t length, int64_t causal, int64_t window) {
  const int64_t begin = window && place - window + 1 > 0 ? place - window + 1 : 0;
  const int64_t ahead = window ? place + window : length;
  return {begin, causal ? place + 1 : (ahead < length ? ahead : length)};
}

// Softmax of scores x scaling over the span, zeros elsewhere; returns the logarithm of the sum.
// n is a multiple of LANES: no tail is left to scalar code.
float softmax(float* scores, Span span, int64_t n, float scaling) {
  for (int64_t j = 0; j < n; j++) scores[j] = j >= span.begin && j < span.end ? scores[j] * scaling : -3.0e38f;
  Vector lanes = *reinterpret_cast<const Vector*>(scores);
  for (int64_t j = LANES; j < n; j += LANES) {
    const Vector next = *reinterpret_cast<const Vector*>(scores + j);
    lanes = next > lanes ? next : lanes;
  }
  float largest = lanes[0];
  for (int64_t j = 1; j < LANES; j++) largest = lanes[j] > largest ? lanes[j] : largest;
  float sum = 0;
  for (int64_t j = 0; j < n; j++) {
    const float weight = exponential(scores[j] - largest);
    scores[j] = j >= span.begin && j < span.end ? weight : 0.0f;
    sum += scores[j];
  }
  const float inverse = 1.0f / sum;
  for (int64_t j = 0; j < n; j++) scores[j] *= inverse;
  return largest + std::log(sum);
}

}  // namespace

#define EACH_TOKEN _Pragma("omp for schedule(static)") for (int64_t t = 0; t < tokens; t++)
#define PARALLEL _Pragma("omp parallel")

extern "C" {

void rows_of(const float* values, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      std::memcpy(row, values + t * n, n * sizeof(float));
      store(want, t, n, row);
    }
  }
}

void add_product(const float* residual, Product product, int64_t tokens, int64_t n, float* out) {
  PARALLEL EACH_TOKEN {
    float* row = out + t * n;
    load(product, t, n, row);
    if (residual)
      for (int64_t i = 0; i < n; i++) row[i] += residual[t * n + i];
  }
}

void add_rms_norm(const float* residual, Product product, const float* weight, float epsilon, int64_t tokens,
                  int64_t n, float* total, float* inverse, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float* r = residual + t * n;
      float* sum = total + t * n;
      if (product.values) {
        load(product, t, n, row);
        for (int64_t i = 0; i < n; i++) row[i] += r[i];
      } else {
        std::memcpy(row, r, n * sizeof(float));
      }
      if (sum != r) std::memcpy(sum, row, n * sizeof(float));
      float squares = 0;
      for (int64_t i = 0; i < n; i++) squares += row[i] * row[i];
      const float scale = 1.0f / std::sqrt(squares / n + epsilon);
      inverse[t] = scale;
      for (int64_t i = 0; i < n; i++) row[i] *= scale * weight[i];
      store(want, t, n, row);
    }
  }
}

void rms_norm_backward(const float* grad_residual, Product grad, const float* total, const float* inverse,
                       const float* weight, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float *x = total + t * n, *g = grad_residual + t * n;
      const float scale = inverse[t];
      load(grad, t, n, row);
      float along = 0;
      for (int64_t i = 0; i < n; i++) {
        row[i] *= weight[i];
        along += row[i] * x[i];
      }
      along *= scale * scale / n;
      for (int64_t i = 0; i < n; i++) row[i] = g[i] + scale * (row[i] - x[i] * along);
      store(want, t, n, row);
    }
  }
}

void add_layer_norm(const float* residual, Product product, const float* weight, const float* bias, float epsilon,
                    int64_t tokens, int64_t n, float* total, float* mean, float* inverse, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      load(product, t, n, row);
      float sum = 0;
      for (int64_t i = 0; i < n; i++) {
        row[i] += residual[t * n + i];
        sum += row[i];
      }
      std::memcpy(total + t * n, row, n * sizeof(float));
      const float centre = sum / n;
      float squares = 0;
      for (int64_t i = 0; i < n; i++) {
        row[i] -= centre;
        squares += row[i] * row[i];
      }
      const float scale = 1.0f / std::sqrt(squares / n + epsilon);
      mean[t] = centre;
      inverse[t] = scale;
      for (int64_t i = 0; i < n; i++) row[i] = row[i] * scale * weight[i] + bias[i];
      store(want, t, n, row);
    }
  }
}

void layer_norm_backward(const float* grad_residual, Product grad, const float* total, const float* mean,
                         const float* inverse, const float* weight, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float *x = total + t * n, *g = grad_residual + t * n;
      const float scale = inverse[t], centre = mean[t];
      if (grad.values) {
        load(grad, t, n, row);
        for (int64_t i = 0; i < n; i++) row[i] += g[i];
      } else {
        std::memcpy(row, g, n * sizeof(float));
      }
      float sum = 0, along = 0;
      for (int64_t i = 0; i < n; i++) {
        row[i] *= weight[i];
        sum += row[i];
        along += row[i] * (x[i] - centre);
      }
      sum /= n;
      along *= scale * scale / n;
      for (int64_t i = 0; i < n; i++) row[i] = scale * (row[i] - sum - (x[i] - centre) * along);
      store(want, t, n, row);
    }
  }
}

// gate_up [tokens, 2 n]: the gates, then the ups.
void swiglu(Product gate_up, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(2 * n);
    float *gate = buffer.data(), *up = gate + n;
    EACH_TOKEN {
      load(gate_up, t, 2 * n, gate);
      for (int64_t i = 0; i < n; i++) gate[i] *= sigmoid(gate[i]) * up[i];
      store(want, t, n, gate);
    }
  }
}

void swiglu_backward(Product grad, Product gate_up, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(3 * n);
    float *gate = buffer.data(), *up = gate + n, *g = up + n;
    EACH_TOKEN {
      load(grad, t, n, g);
      load(gate_up, t, 2 * n, gate);
      for (int64_t i = 0; i < n; i++) {
        const float s = sigmoid(gate[i]), a = gate[i], u = up[i];
        gate[i] = g[i] * u * s * (1.0f + a * (1.0f - s));
        up[i] = g[i] * a * s;
      }
      store(want, t, 2 * n, gate);
    }
  }
}

void gelu(Product inner, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      load(inner, t, n, row);
      for (int64_t i = 0; i < n; i++) row[i] *= normal_cdf(row[i]);
      store(want, t, n, row);
    }
  }
}

void gelu_backward(Product grad, Product inner, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(2 * n);
    float *row = buffer.data(), *g = row + n;
    EACH_TOKEN {
      load(grad, t, n, g);
      load(inner, t, n, row);
      for (int64_t i = 0; i < n; i++) {
        const float x = row[i];
        row[i] = g[i] * (normal_cdf(x) + x * 0.39894228f * exponential(-0.5f * x * x));
      }
      store(want, t, n, row);
    }
  }
}

// Projected rows with their query and key heads rotated by their positions; values stay.
void rotate_heads(Product projected, const float* cos, const float* sin, int64_t tokens, int64_t heads,
                  int64_t key_heads, int64_t dim, float* out) {
  const int64_t all = heads + 2 * key_heads, half = dim / 2;
  PARALLEL EACH_TOKEN {
    float* row = out + t * all * dim;
    load(projected, t, all * dim, row);
    if (!cos) continue;
    for (int64_t h = 0; h < heads + key_heads; h++)
      rotate(row + h * dim, cos + t * half, sin + t * half, half, 1.0f);
  }
}

void rotate_heads_backward(const float* grad, const float* cos, const float* sin, int64_t tokens, int64_t heads,
                           int64_t key_heads, int64_t dim, Want want) {
  const int64_t all = heads + 2 * key_heads, half = dim / 2;
  PARALLEL {
    Buffer buffer(all * dim);
    float* row = buffer.data();
    EACH_TOKEN {
      std::memcpy(row, grad + t * all * dim, all * dim * sizeof(float));
      for (int64_t h = 0; cos && h < heads + key_heads; h++)
        rotate(row + h * dim, cos + t * half, sin + t * half, half, -1.0f);
      store(want, t, all * dim, row);
    }
  }
}

// Attention within each text of a pack, for one key head and its query heads at a time.
// projected: [tokens, (heads + 2 key_heads) dim]; texts [t] spans tokens starts[t] to starts[t + 1].
// out: [tokens, heads dim]; log_sums: [tokens, heads], from which the backward finds the weights again.
void attention_forward(const float* projected, const int64_t* starts, int64_t texts, int64_t heads, int64_t key_heads,
                       int64_t dim, float scaling, int64_t causal, int64_t window, float* out, float* log_sums) {
  const int64_t width = (heads + 2 * key_heads) * dim, groups = heads / key_heads;
#pragma omp parallel
  {
    Buffer kt, v, weights, attended;
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < texts * key_heads; job++) {
      const int64_t text = job / key_heads, kv = job % key_heads, first = starts[text];
      const int64_t length = starts[text + 1] - first, keys = padded(length), columns = padded(dim);
      const float* key = projected + first * width + (heads + kv) * dim;
      pack_transposed(key, width, length, dim, kt);
      pack(key + key_heads * dim, width, length, dim, v);
      weights.resize(CHUNK * keys);
      attended.resize(CHUNK * columns);
      for (int64_t h = kv * groups; h < (kv + 1) * groups; h++)
        for (int64_t row = 0; row < length; row += CHUNK) {
          const int64_t rows = length - row < CHUNK ? length - row : CHUNK;
          const int64_t seen = causal ? row + rows : length;
          const float* query = projected + (first + row) * width + h * dim;
          product(rows, padded(seen), dim, query, width, 1, kt.data(), keys, weights.data(), keys, false);
          for (int64_t i = 0; i < rows; i++) {
            const Span span = visible(row + i, length, causal, window);
            const float log_sum = softmax(weights.data() + i * keys, span, padded(seen), scaling);
            log_sums[(first + row + i) * heads + h] = log_sum;
          }
          product(rows, columns, seen, weights.data(), keys, 1, v.data(), columns, attended.data(), columns, false);
          for (int64_t i = 0; i < rows; i++)
            std::memcpy(out + ((first + row + i) * heads + h) * dim, attended.data() + i * columns, dim * sizeof(float));
        }
    }
  }
}

// The gradient of `projected` (every element is written) from that of `out`.
void attention_backward(const float* grad, const float* projected, const float* out, const float* log_sums,
                        const int64_t* starts, int64_t texts, int64_t heads, int64_t key_heads, int64_t dim,
                        float scaling, int64_t causal, int64_t window, float* grad_projected) {
  const int64_t width = (heads + 2 * key_heads) * dim, groups = heads / key_heads;
#pragma omp parallel
  {
    Buffer k, kt, vt, weights, by_weights, g, q, by_query, by_key, by_value;
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < texts * key_heads; job++) {
      const int64_t text = job / key_heads, kv = job % key_heads, first = starts[text];
      const int64_t length = starts[text + 1] - first, keys = padded(length), columns = padded(dim);
      const float* key = projected + first * width + (heads + kv) * dim;
      pack(key, width, length, dim, k);
      pack_transposed(key, width, length, dim, kt);
      pack_transposed(key + key_heads * dim, width, length, dim, vt);
      weights.resize(CHUNK * keys);
      by_weights.resize(CHUNK * keys);
      by_query.resize(CHUNK * columns);
      by_key.assign(length * columns, 0.0f);
      by_value.assign(length * columns, 0.0f);
      for (int64_t h = kv * groups; h < (kv + 1) * groups; h++)
        for (int64_t row = 0; row < length; row += CHUNK) {
          const int64_t rows = length - row < CHUNK ? length - row : CHUNK;
          const int64_t seen = causal ? row + rows : length, token = first + row;
          pack(projected + token * width + h * dim, width, rows, dim, q);
          pack(grad + (token * heads + h) * dim, heads * dim, rows, dim, g);
          product(rows, padded(seen), dim, q.data(), columns, 1, kt.data(), keys, weights.data(), keys, false);
          product(rows, padded(seen), dim, g.data(), columns, 1, vt.data(), keys, by_weights.data(), keys, false);
          for (int64_t i = 0; i < rows; i++) {
            const float* o = out + ((token + i) * heads + h) * dim;
            float along = 0;
            for (int64_t d = 0; d < dim; d++) along += o[d] * g[i * columns + d];
            float *w = weights.data() + i * keys, *b = by_weights.data() + i * keys;
            const Span span = visible(row + i, length, causal, window);
            const float log_sum = log_sums[(token + i) * heads + h];
            for (int64_t j = 0; j < padded(seen); j++) {
              const bool sees = j >= span.begin && j < span.end;
              const float weight = exponential(w[j] * scaling - log_sum);
              w[j] = sees ? weight : 0.0f;
              b[j] = w[j] * (b[j] - along) * scaling;
            }
          }
          product(rows, columns, seen, by_weights.data(), keys, 1, k.data(), columns, by_query.data(), columns, false);
          for (int64_t i = 0; i < rows; i++)
            std::memcpy(grad_projected + (token + i) * width + h * dim, by_query.data() + i * columns,
                        dim * sizeof(float));
          product(seen, columns, rows, weights.data(), 1, keys, g.data(), columns, by_value.data(), columns, true);
          product(seen, columns, rows, by_weights.data(), 1, keys, q.data(), columns, by_key.data(), columns, true);
        }
      float* by = grad_projected + first * width + (heads + kv) * dim;
      for (int64_t j = 0; j < length; j++) {
        std::memcpy(by + j * width, by_key.data() + j * columns, dim * sizeof(float));
        std::memcpy(by + j * width + key_heads * dim, by_value.data() + j * columns, dim * sizeof(float));
      }
    }
  }
}

// small [tokens, adapters rank] = dropout(values) a^T, each adapter with a mask of its own.
// a: [adapters rank, n]. Every sum stays in registers; masks are found from the seed and never stored.
void lora_forward(const float* values, const float* a, int64_t seed, int64_t dropped, int64_t tokens, int64_t adapters,
                  int64_t rank, int64_t n, float* small) {
  const int64_t columns = padded(rank), all = adapters * rank;
  Buffer turned(adapters * n * columns, 0.0f);
  for (int64_t m = 0; m < adapters; m++)
    for (int64_t r = 0; r < rank; r++)
      for (int64_t i = 0; i < n; i++) turned[(m * n + i) * columns + r] = a[(m * rank + r) * n + i];
  PARALLEL {
    Buffer masked(ROWS * n), sums(ROWS * columns);
    _Pragma("omp for schedule(static)") for (int64_t t = 0; t < tokens; t += ROWS) {
      const int64_t rows = tokens - t < ROWS ? tokens - t : ROWS;
      for (int64_t m = 0; m < adapters; m++) {
        for (int64_t r = 0; r < rows; r++)
          mask_row(values + (t + r) * n, seed, dropped, (t + r) * adapters + m, n, masked.data() + r * n);
        product(rows, columns, n, masked.data(), n, 1, turned.data() + m * n * columns, columns, sums.data(), columns,
                false);
        for (int64_t r = 0; r < rows; r++)
          std::memcpy(small + (t + r) * all + m * rank, sums.data() + r * columns, rank * sizeof(float));
      }
    }
  }
}

// by_a [adapters rank, n] = by_small^T dropout(values), and delta [tokens, n], the gradient of values (or null).
void lora_backward(const float* values, const float* a, const float* by_small, int64_t seed, int64_t dropped,
                   int64_t tokens, int64_t adapters, int64_t rank, int64_t n, float* by_a, float* delta) {
  const int64_t columns = padded(n), all = adapters * rank, chunk = 4 * ROWS;
  Buffer weights;
  pack(a, n, all, n, weights);
  const int64_t chunks = (tokens + chunk - 1) / chunk;
  // Sums of a fixed number of parts in a fixed order: the same bits on every run.
  const int64_t parts = chunks < PARTS ? chunks : PARTS;
  Buffer sums(parts * all * columns, 0.0f);
  PARALLEL {
    Buffer masked(chunk * columns, 0.0f), back(chunk * columns);
    _Pragma("omp for schedule(static)") for (int64_t part = 0; part < parts; part++)
      for (int64_t c = part * chunks / parts; c < (part + 1) * chunks / parts; c++) {
        const int64_t t = c * chunk, rows = tokens - t < chunk ? tokens - t : chunk;
        if (delta) std::memset(delta + t * n, 0, rows * n * sizeof(float));
        for (int64_t m = 0; m < adapters; m++) {
          for (int64_t r = 0; r < rows; r++)
            mask_row(values + (t + r) * n, seed, dropped, (t + r) * adapters + m, n, masked.data() + r * columns);
          const float* g = by_small + t * all + m * rank;
          product(rank, columns, rows, g, 1, all, masked.data(), columns, sums.data() + (part * all + m * rank) * columns,
                  columns, true);
          if (!delta) continue;
          product(rows, columns, rank, g, all, 1, weights.data() + m * rank * columns, columns, back.data(), columns,
                  false);
          for (int64_t r = 0; r < rows; r++) {
            float *from = back.data() + r * columns, *to = delta + (t + r) * n;
            mask_row(from, seed, dropped, (t + r) * adapters + m, n, from);
            for (int64_t i = 0; i < n; i++) to[i] += from[i];
          }
        }
      }
  }
  for (int64_t r = 0; r < all; r++) {
    std::memset(by_a + r * n, 0, n * sizeof(float));
    for (int64_t part = 0; part < parts; part++)
      for (int64_t i = 0; i < n; i++) by_a[r * n + i] += sums[(part * all + r) * columns + i];
  }
}

}  // extern "C"
