// Attention within the texts of a pack; the plain twin is attention.py.
//
// A job is one key head of one text, or some of a long text's queries: few long texts keep all cores busy, too. Scores
// lie transposed, [keys, queries of all heads that share those keys]: sums and maxima over keys then run along vectors,
// never across them. Queries are scaled before they meet the keys.

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int64_t QUERIES = 96;       // at a time, over all heads of a job
constexpr int64_t PART_TOKENS = 128;  // a text of so many tokens is one part of work, a longer one has several
constexpr int64_t MOST_PARTS = 4;     // each holds gradients of all keys, which are added up in the end

struct Shape {
  int64_t heads, key_heads, dim;
  int64_t width() const { return (heads + 2 * key_heads) * dim; }
  int64_t groups() const { return heads / key_heads; }
};

// Which keys a query sees; window 0 is none.
struct Mask {
  int64_t causal, window;
};

// Queries `part`, part + parts, ... (counted in chunks) of one key head of one text.
struct Job {
  int64_t text, kv, part, parts;
};

std::vector<Job> list_jobs(const int64_t* starts, int64_t texts, int64_t key_heads) {
  std::vector<Job> jobs;
  for (int64_t text = 0; text < texts; text++) {
    const int64_t length = starts[text + 1] - starts[text];
    const int64_t parts = std::clamp<int64_t>(length / PART_TOKENS, 1, MOST_PARTS);
    for (int64_t kv = 0; kv < key_heads; kv++) {
      for (int64_t part = 0; part < parts; part++) jobs.push_back({text, kv, part, parts});
    }
  }
  return jobs;
}

// Rows of a matrix to multiply by: in place where whole vectors stay within a row, else copied.
struct Right {
  const float* values;
  int64_t step;
  Buffer copy;

  void take(const float* from, int64_t from_step, int64_t rows, int64_t n) {
    if (n % LANES) {
      pack(from, from_step, rows, n, copy);
      values = copy.data(), step = padded(n);
    } else {
      values = from, step = from_step;
    }
  }
};

// Some queries of all heads that share a key head, in the order of heads.
struct Chunk {
  int64_t first, rows, queries, width;  // the first query's place in its text; queries = heads x rows
  int64_t step;                         // between rows of `turned`, with room for a vector that hangs over
  Buffer turned;                        // [dim, step]
  std::vector<int32_t> begin, end;      // [width]: the keys that each sees
  int64_t all_begin, all_end;           // the keys that all see

  void place(int64_t row, int64_t count, int64_t groups, int64_t length, Mask mask) {
    first = row, rows = count, queries = groups * count, width = padded(queries), step = width + LANES;
    begin.assign(width, 0), end.assign(width, 0);
    for (int64_t i = 0; i < count; i++) {
      const int64_t query = row + i, ahead = mask.window ? std::min(query + mask.window, length) : length;
      for (int64_t c = i; c < queries; c += count) {
        begin[c] = static_cast<int32_t>(mask.window ? std::max<int64_t>(query - mask.window + 1, 0) : 0);
        end[c] = static_cast<int32_t>(mask.causal ? query + 1 : ahead);
      }
    }
    all_begin = begin[count - 1], all_end = end[0];
  }

  // Calls unmasked(j) for keys that all queries see, masked(j) for the others of the first `seen`.
  template <typename Unmasked, typename Masked>
  void each_key(int64_t seen, Unmasked unmasked, Masked masked) const {
    for (int64_t j = 0; j < seen; j++) {
      if (j >= all_begin && j < all_end)
        unmasked(j);
      else
        masked(static_cast<int32_t>(j));
    }
  }

  // from: the first head's first row; heads lie `dim` apart.
  void turn(const float* from, int64_t from_step, int64_t groups, int64_t dim, float scale, Buffer& to) const {
    to.resize(dim * step);
    for (int64_t h = 0; h < groups; h++) turn_rows(from + h * dim, from_step, rows, dim, to.data() + h * rows, step);
    for (int64_t i = 0; i < dim; i++) {
      float* row = to.data() + i * step;
      for (int64_t c = 0; c < queries; c++) row[c] *= scale;
      std::fill_n(row + queries, width - queries, 0.0f);
    }
  }
};

}  // namespace

extern "C" {

// projected: [tokens, (heads + 2 key_heads) dim]; texts [t] spans tokens starts[t] to starts[t + 1].
// out: [tokens, heads dim]; sums: [tokens, heads, 2], the largest score and 1 / the sum of exponentials.
void attention_forward(const float* projected, const int64_t* starts, int64_t texts, Shape shape, float scaling,
                       Mask mask, float* out, float* sums) {
  const int64_t width = shape.width(), groups = shape.groups(), dim = shape.dim, heads = shape.heads;
  const std::vector<Job> jobs = list_jobs(starts, texts, shape.key_heads);
  PARALLEL {
    static thread_local Buffer scores, largest, inverse, attended;
    static thread_local Right value;
    static thread_local Chunk chunk;
    _Pragma("omp for schedule(dynamic)") for (size_t number = 0; number < jobs.size(); number++) {
      const Job job = jobs[number];
      const int64_t kv = job.kv, start = starts[job.text], length = starts[job.text + 1] - start;
      const int64_t at_once = std::max<int64_t>(QUERIES / groups, 1);
      const float* key = projected + start * width + (heads + kv) * dim;
      value.take(key + shape.key_heads * dim, width, length, dim);
      for (int64_t row = job.part * at_once; row < length; row += job.parts * at_once) {
        chunk.place(row, std::min(at_once, length - row), groups, length, mask);
        const int64_t seen = mask.causal ? row + chunk.rows : length, n = chunk.width;
        chunk.turn(projected + (start + row) * width + kv * groups * dim, width, groups, dim, scaling, chunk.turned);
        scores.resize(seen * n);
        multiply(seen, n, dim, key, width, 1, chunk.turned.data(), chunk.step, scores.data(), n, false);
        largest.assign(n, -3.0e38f), inverse.assign(n, 0.0f);
        float *most = largest.data(), *sum = inverse.data();
        const int32_t *begin = chunk.begin.data(), *end = chunk.end.data();
        float* all = scores.data();
        chunk.each_key(
            seen,
            [=](int64_t j) {
              const float* s = all + j * n;
              for (int64_t c = 0; c < n; c++) most[c] = s[c] > most[c] ? s[c] : most[c];
            },
            [=](int32_t j) {
              const float* s = all + j * n;
              for (int64_t c = 0; c < n; c++) {
                const float score = j >= begin[c] && j < end[c] ? s[c] : -3.0e38f;
                most[c] = score > most[c] ? score : most[c];
              }
            });
        chunk.each_key(
            seen,
            [=](int64_t j) {
              float* s = all + j * n;
              for (int64_t c = 0; c < n; c++) {
                s[c] = exponential(s[c] - most[c]);
                sum[c] += s[c];
              }
            },
            [=](int32_t j) {
              float* s = all + j * n;
              for (int64_t c = 0; c < n; c++) {
                const float weight = exponential(s[c] - most[c]);
                s[c] = j >= begin[c] && j < end[c] ? weight : 0.0f;
                sum[c] += s[c];
              }
            });
        for (int64_t c = 0; c < n; c++) sum[c] = 1.0f / sum[c];
        const int64_t columns = padded(dim);
        for (int64_t h = 0; h < groups; h++) {
          float* to = out + (start + row) * heads * dim + (kv * groups + h) * dim;
          const float* weights = scores.data() + h * chunk.rows;
          if (columns == dim) {
            multiply(chunk.rows, dim, seen, weights, 1, n, value.values, value.step, to, heads * dim, false);
          } else {
            attended.resize(chunk.rows * columns);
            multiply(chunk.rows, columns, seen, weights, 1, n, value.values, value.step, attended.data(), columns, false);
            for (int64_t i = 0; i < chunk.rows; i++)
              std::memcpy(to + i * heads * dim, attended.data() + i * columns, dim * sizeof(float));
          }
          for (int64_t i = 0; i < chunk.rows; i++) {
            const float share = sum[h * chunk.rows + i];
            for (int64_t d = 0; d < dim; d++) to[i * heads * dim + d] *= share;
            float* kept = sums + ((start + row + i) * heads + kv * groups + h) * 2;
            kept[0] = most[h * chunk.rows + i], kept[1] = share;
          }
        }
      }
    }
  }
}

// The gradient of `projected` (every element is written) from that of the forward's `out`.
void attention_backward(const float* grad, const float* projected, const float* sums, const int64_t* starts,
                        int64_t texts, Shape shape, float scaling, Mask mask, float* grad_projected) {
  const int64_t width = shape.width(), groups = shape.groups(), dim = shape.dim, heads = shape.heads;
  const int64_t columns = padded(dim), to_value = shape.key_heads * dim;
  const std::vector<Job> jobs = list_jobs(starts, texts, shape.key_heads);
  std::vector<Buffer> by_keys(jobs.size()), by_values(jobs.size());  // of texts in parts, and heads of no whole vectors
  const auto is_in_place = [&](const Job& job) { return job.parts == 1 && columns == dim; };
  PARALLEL {
    static thread_local Buffer weights, by_scores, largest, inverse, along, turned_grad, by_query;
    static thread_local Right right_key, right_query, right_grad;
    static thread_local Chunk chunk;
    _Pragma("omp for schedule(dynamic)") for (size_t number = 0; number < jobs.size(); number++) {
      const Job job = jobs[number];
      const int64_t kv = job.kv, start = starts[job.text], length = starts[job.text + 1] - start;
      const int64_t at_once = std::max<int64_t>(QUERIES / groups, 1);
      const float* key = projected + start * width + (heads + kv) * dim;
      const float* value = key + to_value;
      right_key.take(key, width, length, dim);
      float* by_key = grad_projected + start * width + (heads + kv) * dim;
      float* by_value = by_key + to_value;
      int64_t step = width;
      if (is_in_place(job)) {
        for (int64_t j = 0; j < length; j++)
          std::fill_n(by_key + j * width, dim, 0.0f), std::fill_n(by_value + j * width, dim, 0.0f);
      } else {
        by_keys[number].assign(length * columns, 0.0f), by_values[number].assign(length * columns, 0.0f);
        by_key = by_keys[number].data(), by_value = by_values[number].data(), step = columns;
      }
      for (int64_t row = job.part * at_once; row < length; row += job.parts * at_once) {
        chunk.place(row, std::min(at_once, length - row), groups, length, mask);
        const int64_t seen = mask.causal ? row + chunk.rows : length, n = chunk.width, rows = chunk.rows;
        const float* query = projected + (start + row) * width + kv * groups * dim;
        const float* by_out = grad + (start + row) * heads * dim + kv * groups * dim;
        chunk.turn(query, width, groups, dim, scaling, chunk.turned);
        chunk.turn(by_out, heads * dim, groups, dim, 1.0f, turned_grad);
        largest.assign(n, 0.0f), inverse.assign(n, 0.0f), along.assign(n, 0.0f);
        for (int64_t h = 0; h < groups; h++)
          for (int64_t i = 0; i < rows; i++) {
            const float* kept = sums + ((start + row + i) * heads + kv * groups + h) * 2;
            largest[h * rows + i] = kept[0], inverse[h * rows + i] = kept[1];
          }
        weights.resize(seen * n), by_scores.resize(seen * n);
        multiply(seen, n, dim, key, width, 1, chunk.turned.data(), chunk.step, weights.data(), n, false);
        multiply(seen, n, dim, value, width, 1, turned_grad.data(), chunk.step, by_scores.data(), n, false);
        const float *most = largest.data(), *inverse_sum = inverse.data();
        const int32_t *begin = chunk.begin.data(), *end = chunk.end.data();
        float* sum = along.data();
        float *all = weights.data(), *all_by = by_scores.data();
        chunk.each_key(
            seen,
            [=](int64_t j) {
              float *w = all + j * n, *b = all_by + j * n;
              for (int64_t c = 0; c < n; c++) {
                w[c] = exponential(w[c] - most[c]) * inverse_sum[c];
                sum[c] += w[c] * b[c];
              }
            },
            [=](int32_t j) {
              float *w = all + j * n, *b = all_by + j * n;
              for (int64_t c = 0; c < n; c++) {
                const float weight = exponential(w[c] - most[c]) * inverse_sum[c];
                w[c] = j >= begin[c] && j < end[c] ? weight : 0.0f;
                sum[c] += w[c] * b[c];
              }
            });
        for (int64_t j = 0; j < seen; j++) {
          float *w = weights.data() + j * n, *b = by_scores.data() + j * n;
          for (int64_t c = 0; c < n; c++) b[c] = w[c] * (b[c] - sum[c]) * scaling;
        }
        for (int64_t h = 0; h < groups; h++) {
          float* to = grad_projected + (start + row) * width + (kv * groups + h) * dim;
          const float *by = by_scores.data() + h * rows, *weight = weights.data() + h * rows;
          if (columns == dim) {
            multiply(rows, dim, seen, by, 1, n, right_key.values, right_key.step, to, width, false);
          } else {
            by_query.resize(rows * columns);
            multiply(rows, columns, seen, by, 1, n, right_key.values, right_key.step, by_query.data(), columns, false);
            for (int64_t i = 0; i < rows; i++)
              std::memcpy(to + i * width, by_query.data() + i * columns, dim * sizeof(float));
          }
          right_query.take(query + h * dim, width, rows, dim);
          right_grad.take(by_out + h * dim, heads * dim, rows, dim);
          multiply(seen, columns, rows, weight, n, 1, right_grad.values, right_grad.step, by_value, step, true);
          multiply(seen, columns, rows, by, n, 1, right_query.values, right_query.step, by_key, step, true);
        }
      }
    }
    _Pragma("omp for schedule(static)") for (size_t number = 0; number < jobs.size(); number++) {
      const Job job = jobs[number];
      if (job.part || is_in_place(job)) continue;
      const int64_t start = starts[job.text], length = starts[job.text + 1] - start;
      float* to = grad_projected + start * width + (heads + job.kv) * dim;
      for (int64_t part = 0; part < job.parts; part++)
        for (int64_t j = 0; j < length; j++) {
          const float *by_key = by_keys[number + part].data() + j * columns;
          const float* by_value = by_values[number + part].data() + j * columns;
          float *key = to + j * width, *value = key + to_value;
          for (int64_t d = 0; d < dim; d++) {
            key[d] = part ? key[d] + by_key[d] : by_key[d];
            value[d] = part ? value[d] + by_value[d] : by_value[d];
          }
        }
    }
  }
}

}  // extern "C"
