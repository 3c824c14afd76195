// What a layer does between its matrix products: each function is one pass over memory.
//
// The plain twins, with the same names, are in plain.py; tests hold each of these against its twin.
// Rows are taken one at a time into a buffer that stays in the first-level cache.

#include "vectors.h"

namespace {

// Where rows go: as they are, and as bytes (int8 with 128 added) with a scale each.
struct Want {
  float* values;              // [tokens, columns], or null
  uint8_t* quantised;         // [tokens, columns], or null
  float* scale;               // [tokens]
  const float* column_scale;  // [columns], folded in before rounding; or null
};

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
  // Beside 1.5 x 2^23 a float has no digits after the point: the sum is rounded, and its lowest byte is the integer.
  const float rounding = 12582912.0f + 128.0f;
  uint8_t* q = w.quantised + t * n;
  for (int64_t i = 0; i < n; i++) {
    const float rounded = row[i] * up + rounding;
    uint32_t integer;
    std::memcpy(&integer, &rounded, 4);
    q[i] = static_cast<uint8_t>(integer);
  }
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Standard normal distribution function by Abramowitz and Stegun, formula 7.1.26 (error below 1.5e-7); bell = exp(-x^2 / 2).
inline float normal_cdf(float x, float bell) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  const float tail =
      t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)))) *
      bell * 0.5f;
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

}  // namespace

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

void rms_norm(const float* values, const float* weight, float epsilon, int64_t tokens, int64_t n, float* inverse,
              Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float* x = values + t * n;
      float squares = 0;
      for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
      const float scale = 1.0f / std::sqrt(squares / n + epsilon);
      inverse[t] = scale;
      for (int64_t i = 0; i < n; i++) row[i] = x[i] * (scale * weight[i]);
      store(want, t, n, row);
    }
  }
}

void rms_norm_backward(const float* grad_residual, const float* grad, const float* values, const float* inverse,
                       const float* weight, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float *x = values + t * n, *g = grad_residual + t * n, *by_normed = grad + t * n;
      const float scale = inverse[t];
      float along = 0;
      for (int64_t i = 0; i < n; i++) {
        row[i] = by_normed[i] * weight[i];
        along += row[i] * x[i];
      }
      along *= scale * scale / n;
      for (int64_t i = 0; i < n; i++) row[i] = g[i] + scale * (row[i] - x[i] * along);
      store(want, t, n, row);
    }
  }
}

void layer_norm(const float* values, const float* weight, const float* bias, float epsilon, int64_t tokens, int64_t n,
                float* mean, float* inverse, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float* x = values + t * n;
      float sum = 0;
      for (int64_t i = 0; i < n; i++) sum += x[i];
      const float centre = sum / n;
      float squares = 0;
      for (int64_t i = 0; i < n; i++) {
        row[i] = x[i] - centre;
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

void layer_norm_backward(const float* grad, const float* values, const float* mean, const float* inverse,
                         const float* weight, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float *x = values + t * n, *g = grad + t * n;
      const float scale = inverse[t], centre = mean[t];
      float sum = 0, along = 0;
      for (int64_t i = 0; i < n; i++) {
        row[i] = g[i] * weight[i];
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
void swiglu(const float* gate_up, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float *gate = gate_up + t * 2 * n, *up = gate + n;
      for (int64_t i = 0; i < n; i++) row[i] = gate[i] * sigmoid(gate[i]) * up[i];
      store(want, t, n, row);
    }
  }
}

void swiglu_backward(const float* grad, const float* gate_up, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(2 * n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float *g = grad + t * n, *gate = gate_up + t * 2 * n, *up = gate + n;
      for (int64_t i = 0; i < n; i++) {
        const float s = sigmoid(gate[i]), a = gate[i];
        row[i] = g[i] * up[i] * s * (1.0f + a * (1.0f - s));
        row[n + i] = g[i] * a * s;
      }
      store(want, t, 2 * n, row);
    }
  }
}

void gelu(const float* inner, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float* x = inner + t * n;
      for (int64_t i = 0; i < n; i++) row[i] = x[i] * normal_cdf(x[i], exponential(-0.5f * x[i] * x[i]));
      store(want, t, n, row);
    }
  }
}

void gelu_backward(const float* grad, const float* inner, int64_t tokens, int64_t n, Want want) {
  PARALLEL {
    Buffer buffer(n);
    float* row = buffer.data();
    EACH_TOKEN {
      const float *g = grad + t * n, *inner_row = inner + t * n;
      for (int64_t i = 0; i < n; i++) {
        const float x = inner_row[i], bell = exponential(-0.5f * x * x);
        row[i] = g[i] * (normal_cdf(x, bell) + x * 0.39894228f * bell);
      }
      store(want, t, n, row);
    }
  }
}

// Query and key heads of projected rows, rotated by their positions in place; values stay.
void rotate_heads(float* projected, const float* cos, const float* sin, int64_t tokens, int64_t heads,
                  int64_t key_heads, int64_t dim) {
  const int64_t all = heads + 2 * key_heads, half = dim / 2;
  PARALLEL EACH_TOKEN {
    for (int64_t h = 0; h < heads + key_heads; h++)
      rotate(projected + (t * all + h) * dim, cos + t * half, sin + t * half, half, 1.0f);
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

}  // extern "C"
