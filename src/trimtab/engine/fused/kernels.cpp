// What a layer does between its matrix products: each function is one pass over memory.
//
// The plain twins, with the same names, are in kernels.py; tests hold each of these against its twin.
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

// Cody and Waite's reduction, then Taylor's polynomial: within 2 units in the last place.
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

// row += what comes back through each mask: dropped [masks, n] x keep [masks, n].
void add_dropped(const float* dropped, const int8_t* keep, int64_t t, int64_t masks, int64_t n, float* __restrict row) {
  if (!dropped) return;
  for (int64_t m = 0; m < masks; m++) {
    const float* d = dropped + (t * masks + m) * n;
    const int8_t* k = keep + (t * masks + m) * n;
    for (int64_t i = 0; i < n; i++) row[i] += d[i] * k[i];
  }
}

// Rotates the halves of a head by cos and sin (times direction) as pairs.
void rotate(float* __restrict head, const float* cos, const float* sin, int64_t half, float direction) {
  for (int64_t i = 0; i < half; i++) {
    const float a = head[i], b = head[half + i], c = cos[i], s = sin[i] * direction;
    head[i] = a * c - b * s;
    head[half + i] = b * c + a * s;
  }
}

// The 32-bit finaliser of MurmurHash3 (Appleby 2011), applied twice.
inline uint32_t hash(uint32_t x) {
  for (int round = 0; round < 2; round++) {
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    x ^= x >> 16;
  }
  return x;
}

using Buffer = std::vector<float>;

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

void add_parts(const float* residual, Product product, const float* dropped, const int8_t* keep, int64_t masks,
               int64_t tokens, int64_t n, float* out) {
  PARALLEL EACH_TOKEN {
    float* row = out + t * n;
    load(product, t, n, row);
    if (residual)
      for (int64_t i = 0; i < n; i++) row[i] += residual[t * n + i];
    add_dropped(dropped, keep, t, masks, n, row);
  }
}

void drop(const float* values, const int8_t* keep, int64_t masks, int64_t tokens, int64_t n, float* out) {
  PARALLEL EACH_TOKEN {
    const float* v = values + t * n;
    for (int64_t m = 0; m < masks; m++) {
      const int8_t* k = keep + (t * masks + m) * n;
      float* o = out + (t * masks + m) * n;
      for (int64_t i = 0; i < n; i++) o[i] = v[i] * k[i];
    }
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

void rms_norm_backward(const float* grad_residual, Product grad, const float* dropped, const int8_t* keep,
                       int64_t masks, const float* total, const float* inverse, const float* weight, int64_t tokens,
                       int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float *x = total + t * n, *g = grad_residual + t * n;
      const float scale = inverse[t];
      load(grad, t, n, row);
      add_dropped(dropped, keep, t, masks, n, row);
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

void layer_norm_backward(const float* grad_residual, Product grad, const float* dropped, const int8_t* keep,
                         int64_t masks, const float* total, const float* mean, const float* inverse,
                         const float* weight, int64_t tokens, int64_t n, Want want) {
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
      add_dropped(dropped, keep, t, masks, n, row);
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

// Query, key and value heads of a projected row go to their rows in attention's order.
void split_heads(Product projected, const int64_t* query_back, const int64_t* key_back, const float* cos,
                 const float* sin, int64_t tokens, int64_t heads, int64_t key_heads, int64_t dim, float* query,
                 float* key, float* value) {
  const int64_t all = heads + 2 * key_heads, half = dim / 2;
  PARALLEL {
    Buffer buffer(all * dim);
    float* row = buffer.data();
    EACH_TOKEN {
      load(projected, t, all * dim, row);
      for (int64_t h = 0; h < all; h++) {
        float* head = row + h * dim;
        if (cos && h < heads + key_heads) rotate(head, cos + t * half, sin + t * half, half, 1.0f);
        float* to = h < heads               ? query + query_back[t * heads + h] * dim
                    : h < heads + key_heads ? key + key_back[t * key_heads + h - heads] * dim
                                            : value + key_back[t * key_heads + h - heads - key_heads] * dim;
        std::memcpy(to, head, dim * sizeof(float));
      }
    }
  }
}

void merge_heads(const float* attended, const int64_t* back, int64_t tokens, int64_t heads, int64_t dim, Want want) {
  PARALLEL {
    Buffer buffer(heads * dim);
    float* row = buffer.data();
    EACH_TOKEN {
      for (int64_t h = 0; h < heads; h++)
        std::memcpy(row + h * dim, attended + back[t * heads + h] * dim, dim * sizeof(float));
      store(want, t, heads * dim, row);
    }
  }
}

void merge_heads_backward(Product grad, const int64_t* back, int64_t tokens, int64_t heads, int64_t dim, float* out) {
  PARALLEL {
    Buffer buffer(heads * dim);
    float* row = buffer.data();
    EACH_TOKEN {
      load(grad, t, heads * dim, row);
      for (int64_t h = 0; h < heads; h++)
        std::memcpy(out + back[t * heads + h] * dim, row + h * dim, dim * sizeof(float));
    }
  }
}

void split_heads_backward(const float* query, const float* key, const float* value, const int64_t* query_back,
                          const int64_t* key_back, const float* cos, const float* sin, int64_t tokens, int64_t heads,
                          int64_t key_heads, int64_t dim, Want want) {
  const int64_t all = heads + 2 * key_heads, half = dim / 2;
  PARALLEL {
    Buffer buffer(all * dim);
    float* row = buffer.data();
    EACH_TOKEN {
      for (int64_t h = 0; h < all; h++) {
        const float* from = h < heads               ? query + query_back[t * heads + h] * dim
                            : h < heads + key_heads ? key + key_back[t * key_heads + h - heads] * dim
                                                    : value + key_back[t * key_heads + h - heads - key_heads] * dim;
        float* head = row + h * dim;
        std::memcpy(head, from, dim * sizeof(float));
        if (cos && h < heads + key_heads) rotate(head, cos + t * half, sin + t * half, half, -1.0f);
      }
      store(want, t, all * dim, row);
    }
  }
}

// Ones, with zeros where a hash of (seed, place) falls below the threshold: 16 random bits an element.
void keep_mask(int64_t seed, int64_t dropped, int64_t elements, int8_t* keep) {
  const uint32_t start = static_cast<uint32_t>(seed), threshold = static_cast<uint32_t>(dropped);
  const int64_t pairs = elements / 2;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < pairs; i++) {
    const uint32_t bits = hash(static_cast<uint32_t>(i) * 0x9e3779b9u + start);
    keep[2 * i] = (bits & 0xffffu) >= threshold;
    keep[2 * i + 1] = (bits >> 16) >= threshold;
  }
  if (elements % 2) keep[elements - 1] = (hash(static_cast<uint32_t>(pairs) * 0x9e3779b9u + start) >> 16) >= threshold;
}

}  // extern "C"
