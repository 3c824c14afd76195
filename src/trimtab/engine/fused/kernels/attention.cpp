// Attention within the texts of a pack; the plain twin is attention.py.
//
// A job is one key head of one text, or some of a long text's queries: few long texts keep all cores busy, too. Scores
// lie transposed, [keys, queries of all heads that share those keys]: sums and maxima over keys then run along vectors,
// never across them. Queries are scaled before they meet the keys. Products are of float32, or of bfloat16 with sums in
// float32; all between them is float32.

#include <algorithm>

#include "operands.h"

namespace {

constexpr int64_t QUERIES = 96;       // at a time, over all heads of a job
constexpr int64_t PART_TOKENS = 128;  // a text of less than two of these is not parted
constexpr int64_t MOST_PARTS = 4;     // each holds gradients of all keys, which are added up in the end
constexpr double LARGEST_JOB = 1.0 / 6.0;  // of all work, where texts can be parted; not by threads, which change no result

struct Shape {
  int64_t heads, key_heads, dim;
  int64_t width() const { return (heads + 2 * key_heads) * dim; }
  int64_t groups() const { return heads / key_heads; }
};

// An even number, since pairs of columns belong to one head.
int64_t rows_at_once(int64_t groups) { return std::max<int64_t>(QUERIES / groups / 2 * 2, 2); }

// Which keys a query sees; window 0 is none.
struct Mask {
  int64_t causal, window;
};

// Queries `part`, part + parts, ... (counted in chunks) of one key head of one text.
struct Job {
  int64_t text, kv, part, parts;
};

// The largest jobs first, so that the last ones end together. Parts of one text lie next to each other.
std::vector<Job> list_jobs(const int64_t* starts, int64_t texts, int64_t key_heads, Mask mask) {
  const auto work = [=](int64_t text) {
    const int64_t length = starts[text + 1] - starts[text];
    return static_cast<double>(length) * static_cast<double>(mask.window ? std::min(length, mask.window) : length);
  };
  double all = 0.0;
  for (int64_t text = 0; text < texts; text++) all += work(text) * static_cast<double>(key_heads);
  const double most = all * LARGEST_JOB;
  std::vector<Job> jobs;
  for (int64_t text = 0; text < texts; text++) {
    const int64_t length = starts[text + 1] - starts[text];
    const int64_t possible = std::clamp<int64_t>(length / PART_TOKENS, 1, MOST_PARTS);
    const double wanted = most > 0.0 ? std::ceil(work(text) / most - 1e-9) : 1.0;
    const int64_t parts = std::clamp<int64_t>(static_cast<int64_t>(wanted), 1, possible);
    for (int64_t kv = 0; kv < key_heads; kv++) {
      for (int64_t part = 0; part < parts; part++) jobs.push_back({text, kv, part, parts});
    }
  }
  std::stable_sort(jobs.begin(), jobs.end(), [=](const Job& one, const Job& other) {
    return work(one.text) * other.parts > work(other.text) * one.parts;
  });
  return jobs;
}

// Some queries of all heads that share a key head, in the order of heads.
struct Chunk {
  int64_t rows, per_head;         // queries of each head; with at most one column of zeros
  int64_t queries, width;         // columns: heads x per_head, and whole vectors of them
  int64_t step;                   // between rows of what is turned, with room for a vector that hangs over
  std::vector<int32_t> begin, end;  // [width]: the keys that each sees
  int64_t all_begin, all_end;       // the keys that all see

  void place(int64_t row, int64_t count, int64_t groups, int64_t length, Mask mask) {
    rows = count, per_head = (count + 1) / 2 * 2;
    queries = groups * per_head, width = padded(queries), step = width + LANES;
    begin.assign(width, 0), end.assign(width, 0);
    for (int64_t i = 0; i < count; i++) {
      const int64_t query = row + i, ahead = mask.window ? std::min(query + mask.window, length) : length;
      for (int64_t c = i; c < queries; c += per_head) {
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

  // Turned queries, or what goes with them, as the right side of a product; heads lie `dim` apart.
  template <class Element>
  void turn(const float* from, int64_t from_step, int64_t groups, int64_t dim, float scale,
            std::vector<Element>& to) const {
    static thread_local Operand<Element> operand;
    const int64_t places = operand.places(dim);
    to.resize(places * step);
    for (int64_t h = 0; h < groups; h++)
      operand.turn(from + h * dim, from_step, rows, dim, scale, to.data() + h * per_head, step);
    for (int64_t i = 0; i < places; i++) {
      for (int64_t c = rows; c < queries; c += per_head) std::fill_n(to.data() + i * step + c, per_head - rows, Element{});
      std::fill_n(to.data() + i * step + queries, width - queries, Element{});
    }
  }
};

template <class Element>
void forward(const float* projected, const int64_t* starts, int64_t texts, Shape shape, float scaling, Mask mask,
             float* out, float* sums) {
  const int64_t width = shape.width(), groups = shape.groups(), dim = shape.dim, heads = shape.heads;
  const std::vector<Job> jobs = list_jobs(starts, texts, shape.key_heads, mask);
  PARALLEL {
    static thread_local Buffer scores, largest, inverse, attended;
    static thread_local std::vector<Element> turned;
    static thread_local Operand<Element> key, value, weights;
    static thread_local Chunk chunk;
    _Pragma("omp for schedule(dynamic)") for (size_t number = 0; number < jobs.size(); number++) {
      const Job job = jobs[number];
      const int64_t kv = job.kv, start = starts[job.text], length = starts[job.text + 1] - start;
      const int64_t at_once = rows_at_once(groups);
      const float* of_keys = projected + start * width + (heads + kv) * dim;
      key.along(of_keys, width, length, dim);
      value.across(of_keys + shape.key_heads * dim, width, length, dim);
      for (int64_t row = job.part * at_once; row < length; row += job.parts * at_once) {
        chunk.place(row, std::min(at_once, length - row), groups, length, mask);
        const int64_t seen = mask.causal ? row + chunk.rows : length, n = chunk.width;
        chunk.turn(projected + (start + row) * width + kv * groups * dim, width, groups, dim, scaling, turned);
        scores.resize(seen * n);
        multiply(seen, n, key.places(dim), key.values, key.step, 1, turned.data(), chunk.step, scores.data(), n, false);
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
        weights.across(scores.data(), n, seen, n);
        const int64_t columns = padded(dim), places = weights.places(seen);
        for (int64_t h = 0; h < groups; h++) {
          float* to = out + (start + row) * heads * dim + (kv * groups + h) * dim;
          const Element* left = weights.values + h * chunk.per_head;
          if (columns == dim) {
            multiply(chunk.rows, dim, places, left, 1, n, value.values, value.step, to, heads * dim, false);
          } else {
            attended.resize(chunk.rows * columns);
            multiply(chunk.rows, columns, places, left, 1, n, value.values, value.step, attended.data(), columns, false);
            for (int64_t i = 0; i < chunk.rows; i++)
              std::memcpy(to + i * heads * dim, attended.data() + i * columns, dim * sizeof(float));
          }
          for (int64_t i = 0; i < chunk.rows; i++) {
            const float share = sum[h * chunk.per_head + i];
            for (int64_t d = 0; d < dim; d++) to[i * heads * dim + d] *= share;
            float* kept = sums + ((start + row + i) * heads + kv * groups + h) * 2;
            kept[0] = most[h * chunk.per_head + i], kept[1] = share;
          }
        }
      }
    }
  }
}

template <class Element>
void backward(const float* grad, const float* projected, const float* sums, const int64_t* starts, int64_t texts,
              Shape shape, float scaling, Mask mask, float* grad_projected) {
  const int64_t width = shape.width(), groups = shape.groups(), dim = shape.dim, heads = shape.heads;
  const int64_t columns = padded(dim), to_value = shape.key_heads * dim;
  const std::vector<Job> jobs = list_jobs(starts, texts, shape.key_heads, mask);
  std::vector<Buffer> by_keys(jobs.size()), by_values(jobs.size());  // of texts in parts, and heads of no whole vectors
  const auto is_in_place = [&](const Job& job) { return job.parts == 1 && columns == dim; };
  PARALLEL {
    static thread_local Buffer weights, by_scores, largest, inverse, along, by_query;
    static thread_local std::vector<Element> turned, turned_grad;
    static thread_local Operand<Element> key, value, right_key, right_query, right_grad, left_weight, left_by, turned_by;
    static thread_local Chunk chunk;
    _Pragma("omp for schedule(dynamic)") for (size_t number = 0; number < jobs.size(); number++) {
      const Job job = jobs[number];
      const int64_t kv = job.kv, start = starts[job.text], length = starts[job.text + 1] - start;
      const int64_t at_once = rows_at_once(groups);
      const float* of_keys = projected + start * width + (heads + kv) * dim;
      key.along(of_keys, width, length, dim);
      value.along(of_keys + to_value, width, length, dim);
      right_key.across(of_keys, width, length, dim);
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
        chunk.turn(query, width, groups, dim, scaling, turned);
        chunk.turn(by_out, heads * dim, groups, dim, 1.0f, turned_grad);
        largest.assign(n, 0.0f), inverse.assign(n, 0.0f), along.assign(n, 0.0f);
        for (int64_t h = 0; h < groups; h++)
          for (int64_t i = 0; i < rows; i++) {
            const float* kept = sums + ((start + row + i) * heads + kv * groups + h) * 2;
            largest[h * chunk.per_head + i] = kept[0], inverse[h * chunk.per_head + i] = kept[1];
          }
        weights.resize(seen * n), by_scores.resize(seen * n);
        multiply(seen, n, key.places(dim), key.values, key.step, 1, turned.data(), chunk.step, weights.data(), n, false);
        multiply(seen, n, value.places(dim), value.values, value.step, 1, turned_grad.data(), chunk.step,
                 by_scores.data(), n, false);
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
        turned_by.across(by_scores.data(), n, seen, n);
        left_by.along(by_scores.data(), n, seen, n);
        left_weight.along(weights.data(), n, seen, n);
        const int64_t in_seen = key.places(seen), in_rows = key.places(rows);
        for (int64_t h = 0; h < groups; h++) {
          float* to = grad_projected + (start + row) * width + (kv * groups + h) * dim;
          const Element* by = turned_by.values + h * chunk.per_head;
          if (columns == dim) {
            multiply(rows, dim, in_seen, by, 1, n, right_key.values, right_key.step, to, width, false);
          } else {
            by_query.resize(rows * columns);
            multiply(rows, columns, in_seen, by, 1, n, right_key.values, right_key.step, by_query.data(), columns, false);
            for (int64_t i = 0; i < rows; i++)
              std::memcpy(to + i * width, by_query.data() + i * columns, dim * sizeof(float));
          }
          right_query.across(query + h * dim, width, rows, dim);
          right_grad.across(by_out + h * dim, heads * dim, rows, dim);
          const int64_t column = key.places(h * chunk.per_head);
          multiply(seen, columns, in_rows, left_weight.values + column, left_weight.step, 1, right_grad.values,
                   right_grad.step, by_value, step, true);
          multiply(seen, columns, in_rows, left_by.values + column, left_by.step, 1, right_query.values,
                   right_query.step, by_key, step, true);
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

}  // namespace

extern "C" {

// Whether products of bfloat16 are faster than those of float32. AMD's take as long for twice as many places; Intel's
// run on one port in place of two (not measured).
int64_t has_bfloat16() {
#ifdef __AVX512BF16__
  return __builtin_cpu_is("amd") ? 1 : 0;
#else
  return 0;
#endif
}

// projected: [tokens, (heads + 2 key_heads) dim]; texts [t] spans tokens starts[t] to starts[t + 1].
// out: [tokens, heads dim]; sums: [tokens, heads, 2], the largest score and 1 / the sum of exponentials.
void attention_forward(const float* projected, const int64_t* starts, int64_t texts, Shape shape, float scaling,
                       Mask mask, int64_t bfloat16, float* out, float* sums) {
  (bfloat16 ? forward<Pair> : forward<float>)(projected, starts, texts, shape, scaling, mask, out, sums);
}

// The gradient of `projected` (every element is written) from that of the forward's `out`.
void attention_backward(const float* grad, const float* projected, const float* sums, const int64_t* starts,
                        int64_t texts, Shape shape, float scaling, Mask mask, int64_t bfloat16,
                        float* grad_projected) {
  (bfloat16 ? backward<Pair> : backward<float>)(grad, projected, sums, starts, texts, shape, scaling, mask,
                                                grad_projected);
}

}  // extern "C"
