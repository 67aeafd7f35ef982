// causal_attention on the CPU, in tiles of 64 queries by 64 keys. Scores are kept as [key][query], so that everything
// that belongs to a query (maximum, sum, masks) runs along vectors and nothing is summed across one.
#include <math.h>

#include "activations.h"
#include "kernel.h"
#include "matmul.h"
#include "philox.h"
#include "rows.h"

namespace {

constexpr int64_t kTile = 64;
constexpr float kInfinity = __builtin_inff();

// A [B, H, T, D] tensor: strides of its first three dimensions; channels lie dense.
struct Heads {
  const void* data;
  int64_t batch, head, row;
};

struct Settings {
  int64_t heads, key_heads, queries, keys, channels;  // of the whole tensors
  float scale, cap;                                   // cap 0: none
  int64_t least, most;                                // a query sees keys that lie least .. most - 1 behind it
  const int64_t* seed;                                // null: no dropout
  int64_t offset;
  uint32_t bound;  // the largest word that is dropped
  float grown;     // what the others are multiplied by
  int dtype;

  int64_t width() const { return whole_vectors(channels); }
  int64_t size() const { return dtype == kFloat32 ? 4 : 2; }
  bool in_place() const { return dtype == kFloat32 && channels % kWidth == 0; }
};

// One of the sequences: a sample of the batch, or a part of a packed one.
struct Sequence {
  int64_t batch, query, queries, key, keys;  // first row and count of each kind
  int64_t shift() const { return keys - queries; }  // query i stands at key i + shift
};

struct Sequences {
  const int* starts_q;  // null: one for each sample
  const int* starts_k;
  int64_t queries, keys;
  Sequence operator[](int64_t n) const {
    if (!starts_q) return {n, 0, queries, 0, keys};
    return {0, starts_q[n], starts_q[n + 1] - starts_q[n], starts_k[n], starts_k[n + 1] - starts_k[n]};
  }
};

// Rows of floats for products: where they lie, or copies padded to whole vectors by zeros.
struct Tile {
  const float* data;
  int64_t row;
  Strided by_rows() const { return {data, row, 1, data, 0, 0}; }
  Strided by_columns() const { return {data, 1, row, data, 0, 0}; }
};

const char* at(const Settings& s, const Heads& x, const Sequence& q, int64_t head, int64_t row) {
  return static_cast<const char*>(x.data) + (q.batch * x.batch + head * x.head + row * x.row) * s.size();
}

Tile rows_of(const Settings& s, const Heads& x, const Sequence& q, int64_t head, int64_t first, int64_t count,
             float* buffer) {
  const char* const base = at(s, x, q, head, first);
  if (s.in_place()) return {reinterpret_cast<const float*>(base), x.row};
  const int64_t width = s.width();
  for (int64_t r = 0; r < count; ++r) {
    load_span(base, s.dtype, r * x.row, s.channels, buffer + r * width);
    for (int64_t c = s.channels; c < width; ++c) buffer[r * width + c] = 0.0f;
  }
  return {buffer, width};
}

// out[channel][query] = factor * x[query][channel], 0 for queries that do not exist.
void transpose(const Tile& x, int64_t count, int64_t channels, float factor, float* out) {
  for (int64_t c = 0; c < channels; ++c) {
    float* const line = out + c * kTile;
    for (int64_t r = 0; r < count; ++r) line[r] = factor * x.data[r * x.row + c];
    for (int64_t r = count; r < kTile; ++r) line[r] = 0.0f;
  }
}

// Keys that a tile of queries sees, from the start of a tile of keys on.
struct Span {
  int64_t first, end;
  Span(const Settings& s, const Sequence& q, int64_t query, int64_t count) {
    const int64_t position = query + q.shift();
    first = position - (s.most - 1);  // of the first query
    end = position + count - s.least;  // of the last
    first = first < 0 ? 0 : first / kTile * kTile;
    end = end > q.keys ? q.keys : end;
  }
};

// Whether some query of the tile does not see some key of the other.
bool partly(const Settings& s, int64_t position, int64_t queries, int64_t key, int64_t keys) {
  return position - (key + keys - 1) < s.least || position + queries - 1 - key >= s.most;
}

// Sets what is not seen: scores[key][query].
void hide(const Settings& s, int64_t position, int64_t key, int64_t keys, float hidden, float* scores) {
  const auto inside = [](int64_t i) { return int32_t(i < 0 ? 0 : i > kTile ? kTile : i); };
  for (int64_t j = 0; j < keys; ++j) {
    float* const line = scores + j * kTile;
    const int64_t back = position - (key + j);  // of query 0
    const int32_t low = inside(s.least - back), high = inside(s.most - back);
#pragma omp simd
    for (int32_t i = 0; i < int32_t(kTile); ++i) line[i] = i >= low && i < high ? line[i] : hidden;
  }
}

// kept[key][query]: what dropout multiplies by. `words` has room for a row.
void draw(const Settings& s, const Sequence& q, int64_t head, int64_t query, int64_t queries, int64_t key, int64_t keys,
          uint32_t* words, float* kept) {
  const uint64_t pitch = uint64_t(s.keys + 3) / 4 * 4;
  const int64_t row = (q.batch * s.heads + head) * s.queries + q.query + query + s.offset;
  for (int64_t i = 0; i < queries; ++i) {
    const uint32_t* const drawn = stream(words, uint64_t(row + i) * pitch + uint64_t(q.key + key), keys, *s.seed);
    for (int64_t j = 0; j < keys; ++j) kept[j * kTile + i] = drawn[j] > s.bound ? s.grown : 0.0f;
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = queries; i < kTile; ++i) kept[j * kTile + i] = 0.0f;
  }
}

// Memory of one thread.
struct Scratch {
  float* const data;
  explicit Scratch(int64_t floats) : data(static_cast<float*>(std::malloc(size_t(floats) * sizeof(float)))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
};

void store(const Settings& s, const Heads& x, const Sequence& q, int64_t head, int64_t row, const float* values) {
  void* const base = const_cast<char*>(at(s, x, q, head, row));
  if (s.dtype == kFloat32) {
    std::memcpy(base, values, size_t(s.channels) * 4);
  } else {
    store_span(base, s.dtype, 0, s.channels, values);
  }
}

// Softmax over keys that come tile by tile, for 64 queries at a time.
struct Online {
  alignas(64) float most[kTile], total[kTile], shrunk[kTile];

  Online() {
    for (int64_t i = 0; i < kTile; ++i) most[i] = -kInfinity, total[i] = 0.0f;
  }

  // Scores become e^(score - most); what was added up before is to be multiplied by `shrunk`.
  void take(float* scores, int64_t keys) {
    alignas(64) float larger[kTile], sum[kTile] = {};
#pragma omp simd
    for (int64_t i = 0; i < kTile; ++i) larger[i] = most[i];
    for (int64_t j = 0; j < keys; ++j) {
      const float* const line = scores + j * kTile;
#pragma omp simd
      for (int64_t i = 0; i < kTile; ++i) larger[i] = line[i] > larger[i] ? line[i] : larger[i];
    }
    alignas(64) float shift[kTile];
#pragma omp simd
    for (int64_t i = 0; i < kTile; ++i) {
      shift[i] = larger[i] == -kInfinity ? 0.0f : larger[i];  // of a query that has seen nothing yet
      shrunk[i] = exp_fast(most[i] - shift[i]);
      most[i] = larger[i];
    }
    for (int64_t j = 0; j < keys; ++j) {
      float* const line = scores + j * kTile;
#pragma omp simd
      for (int64_t i = 0; i < kTile; ++i) {
        line[i] = exp_fast(line[i] - shift[i]);
        sum[i] += line[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kTile; ++i) total[i] = total[i] * shrunk[i] + sum[i];
  }
};

template <bool Capped>
void cap_scores(float* scores, int64_t count, float cap) {
  if constexpr (Capped) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) scores[i] = cap * tanh_fast(scores[i]);
  }
}

struct Forward {
  Settings s;
  Heads q, k, v, out;
  float* lse;

  int64_t room() const {
    return kTile * (4 * s.width() + 2 * kTile) + (s.seed ? stream_room(kTile) : 0) + 16;
  }

  template <bool Capped>
  void run(const Sequence& sequence, int64_t head, int64_t query, float* memory) const {
    const int64_t queries = sequence.queries - query < kTile ? sequence.queries - query : kTile;
    const int64_t width = s.width(), key_head = head / (s.heads / s.key_heads), position = query + sequence.shift();
    float* const q_turned = memory;  // [channels][queries]
    float* const scores = q_turned + kTile * width;
    float* const sum = scores + kTile * kTile;  // [queries][width]
    float* const kept = sum + kTile * width;
    float* const buffer = kept + kTile * kTile;  // of rows of k, then of v, and of q
    uint32_t* const words = reinterpret_cast<uint32_t*>(buffer + 2 * kTile * width);
    transpose(rows_of(s, q, sequence, head, sequence.query + query, queries, buffer), queries, s.channels,
              Capped ? s.scale / s.cap : s.scale, q_turned);
    Online online;
    const Span span(s, sequence, query, queries);
    bool started = false;
    for (int64_t key = span.first; key < span.end; key += kTile) {
      const int64_t keys = span.end - key < kTile ? span.end - key : kTile;
      const Tile k_rows = rows_of(s, k, sequence, key_head, sequence.key + key, keys, buffer);
      multiply({k_rows.by_rows(), s.channels, q_turned, kTile, scores, kTile, false}, keys, kTile);
      cap_scores<Capped>(scores, keys * kTile, s.cap);
      if (partly(s, position, queries, key, keys)) hide(s, position, key, keys, -kInfinity, scores);
      online.take(scores, keys);
      if (started) {
        for (int64_t i = 0; i < queries; ++i) {
          const float factor = online.shrunk[i];
          if (factor == 1.0f) continue;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) sum[i * width + c] *= factor;
        }
      }
      if (s.seed) {
        draw(s, sequence, head, query, queries, key, keys, words, kept);
#pragma omp simd
        for (int64_t i = 0; i < keys * kTile; ++i) scores[i] = kept[i] == 0.0f ? 0.0f : scores[i] * kept[i];
      }
      const Tile v_rows = rows_of(s, v, sequence, key_head, sequence.key + key, keys, buffer + kTile * width);
      multiply({Tile{scores, kTile}.by_columns(), keys, v_rows.data, v_rows.row, sum, width, started}, queries, width);
      started = true;
    }
    float* const row_lse = lse + (sequence.batch * s.heads + head) * s.queries + sequence.query + query;
    for (int64_t i = 0; i < queries; ++i) {
      const float total = online.total[i], share = total == 0.0f ? 0.0f : 1.0f / total;
      row_lse[i] = online.most[i] + logf(total);
      float* const row = sum + i * width;
      for (int64_t c = 0; c < s.channels; ++c) row[c] = started ? row[c] * share : 0.0f;
      store(s, out, sequence, head, sequence.query + query + i, row);
    }
  }
};

// Which tile of queries the n-th job is: those with the most keys first.
struct Job {
  int64_t sequence, head, query;
};

// All tiles of queries of all sequences and heads; to be freed.
Job* tiles_of(const Sequences& all, int64_t sequences, int64_t heads, int64_t* count) {
  *count = 0;
  for (int64_t n = 0; n < sequences; ++n) *count += heads * ((all[n].queries + kTile - 1) / kTile);
  Job* const jobs = static_cast<Job*>(std::malloc(size_t(*count + 1) * sizeof(Job)));
  Job* next = jobs;
  for (int64_t n = 0; n < sequences; ++n) {
    const int64_t tiles = (all[n].queries + kTile - 1) / kTile;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t tile = tiles; tile-- > 0;) *next++ = {n, head, tile * kTile};
    }
  }
  return jobs;
}

struct Backward {
  Settings s;
  Heads q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  const float* lse;
  const float* grad_lse;  // or null

  int64_t room(int64_t keys) const {
    return 2 * keys * s.width() + kTile * (8 * s.width() + 3 * kTile) + (s.seed ? stream_room(kTile) : 0) + 16;
  }

  // From scores and from products of the gradient with v: what multiplies the gradient (in place of the scores), and
  // what multiplies q and k.
  template <bool Capped, bool Dropped>
  void gradients(float* scores, float* products, const float* kept, const float* row_lse, const float* delta,
                 int64_t keys) const {
    for (int64_t j = 0; j < keys; ++j) {
      float* const p = scores + j * kTile;
      float* const d = products + j * kTile;
      const float* const factor = kept + j * kTile;
#pragma omp simd
      for (int64_t i = 0; i < kTile; ++i) {
        const float x = Capped ? tanh_fast(p[i]) : p[i];
        const float slope = Capped ? s.scale * (1.0f - x * x) : s.scale;
        const float weight = exp_fast((Capped ? s.cap * x : x) - row_lse[i]);
        const float product = Dropped ? (factor[i] == 0.0f ? 0.0f : d[i] * factor[i]) : d[i];
        d[i] = weight * (product - delta[i]) * slope;
        p[i] = Dropped ? weight * factor[i] : weight;
      }
    }
  }

  // All of one head of keys, in the order of the queries: `sum_k` and `sum_v` are its gradients so far.
  template <bool Capped>
  void run(const Sequence& sequence, int64_t key_head, float* memory) const {
    const int64_t width = s.width(), group = s.heads / s.key_heads;
    float* const sum_k = memory;
    float* const sum_v = sum_k + sequence.keys * width;
    float* const buffers = sum_v + sequence.keys * width;
    for (int64_t i = 0; i < 2 * sequence.keys * width; ++i) memory[i] = 0.0f;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      for (int64_t query = 0; query < sequence.queries; query += kTile) {
        queries_of<Capped>(sequence, head, key_head, query, sum_k, sum_v, buffers);
      }
    }
    for (int64_t key = 0; key < sequence.keys; ++key) {
      store(s, grad_k, sequence, key_head, sequence.key + key, sum_k + key * width);
      store(s, grad_v, sequence, key_head, sequence.key + key, sum_v + key * width);
    }
  }

  template <bool Capped>
  void queries_of(const Sequence& sequence, int64_t head, int64_t key_head, int64_t query, float* sum_k, float* sum_v,
                  float* memory) const {
    const int64_t queries = sequence.queries - query < kTile ? sequence.queries - query : kTile;
    const int64_t width = s.width(), position = query + sequence.shift(), first = sequence.query + query;
    float* const q_turned = memory;  // [channels][queries]
    float* const g_turned = q_turned + kTile * width;
    float* const scores = g_turned + kTile * width;
    float* const products = scores + kTile * kTile;
    float* const kept = products + kTile * kTile;
    float* const sum_q = kept + kTile * kTile;
    float* const buffer = sum_q + kTile * width;  // of rows of q, of the gradient, of k and of v
    uint32_t* const words = reinterpret_cast<uint32_t*>(buffer + 4 * kTile * width);
    const auto part = [&](int64_t n) { return buffer + n * kTile * width; };
    const Tile q_rows = rows_of(s, q, sequence, head, first, queries, part(0));
    const Tile g_rows = rows_of(s, grad_out, sequence, head, first, queries, part(1));
    const Tile out_rows = rows_of(s, out, sequence, head, first, queries, part(2));
    transpose(q_rows, queries, s.channels, Capped ? s.scale / s.cap : s.scale, q_turned);
    transpose(g_rows, queries, s.channels, 1.0f, g_turned);
    alignas(64) float row_lse[kTile], delta[kTile];
    const int64_t row = (sequence.batch * s.heads + head) * s.queries + first;
    for (int64_t i = 0; i < kTile; ++i) {
      row_lse[i] = kInfinity, delta[i] = 0.0f;
      if (i >= queries) continue;
      if (lse[row + i] != -kInfinity) row_lse[i] = lse[row + i];  // else it sees nothing
      const float* const g = g_rows.data + i * g_rows.row;
      const float* const o = out_rows.data + i * out_rows.row;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < s.channels; ++c) sum += g[c] * o[c];
      delta[i] = grad_lse ? sum - grad_lse[row + i] : sum;
    }
    const Span span(s, sequence, query, queries);
    bool started = false;
    for (int64_t key = span.first; key < span.end; key += kTile) {
      const int64_t keys = span.end - key < kTile ? span.end - key : kTile;
      const Tile k_rows = rows_of(s, k, sequence, key_head, sequence.key + key, keys, part(2));
      const Tile v_rows = rows_of(s, v, sequence, key_head, sequence.key + key, keys, part(3));
      multiply({k_rows.by_rows(), s.channels, q_turned, kTile, scores, kTile, false}, keys, kTile);
      multiply({v_rows.by_rows(), s.channels, g_turned, kTile, products, kTile, false}, keys, kTile);
      if (s.seed) draw(s, sequence, head, query, queries, key, keys, words, kept);
      with_flag(s.seed != nullptr, [&](auto dropped) {
        gradients<Capped, decltype(dropped)::value>(scores, products, kept, row_lse, delta, keys);
      });
      if (partly(s, position, queries, key, keys)) {
        hide(s, position, key, keys, 0.0f, scores);
        hide(s, position, key, keys, 0.0f, products);
      }
      const Tile p{scores, kTile}, d{products, kTile};
      multiply({p.by_rows(), queries, g_rows.data, g_rows.row, sum_v + key * width, width, true}, keys, width);
      multiply({d.by_rows(), queries, q_rows.data, q_rows.row, sum_k + key * width, width, true}, keys, width);
      multiply({d.by_columns(), keys, k_rows.data, k_rows.row, sum_q, width, started}, queries, width);
      started = true;
    }
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t c = 0; !started && c < width; ++c) sum_q[i * width + c] = 0.0f;
      store(s, grad_q, sequence, head, first + i, sum_q + i * width);
    }
  }
};

Settings settings(int64_t heads, int64_t key_heads, int64_t queries, int64_t keys, int64_t channels, int dtype,
                  double scale, double cap, int64_t window, bool causal, const int64_t* seed, int64_t offset,
                  int64_t bound, double grown) {
  constexpr int64_t kFar = int64_t(1) << 40;
  const int64_t most = window ? window : kFar, least = causal ? 0 : 1 - most;
  return {heads, key_heads, queries, keys, channels, float(scale), float(cap), least, most, seed, offset,
          uint32_t(bound), float(grown), dtype};
}

// Strides of tensors by address: three each, in the order of the tensors.
struct Strides {
  const int64_t* values;
  Heads of(const void* data, int n) const { return {data, values[3 * n], values[3 * n + 1], values[3 * n + 2]}; }
};

void causal_attention(const void* q, const void* k, const void* v, const void* out, const int64_t* strides, float* lse,
                      const int* starts_q, const int* starts_k, int64_t sequences, int64_t heads, int64_t key_heads,
                      int64_t queries, int64_t keys, int64_t channels, int dtype, double scale, double cap,
                      int64_t window, bool causal, const int64_t* seed, int64_t offset, int64_t bound, double grown,
                      int threads) {
  const Settings s = settings(heads, key_heads, queries, keys, channels, dtype, scale, cap, window, causal, seed,
                              offset, bound, grown);
  const Strides by{strides};
  const Forward forward{s, by.of(q, 0), by.of(k, 1), by.of(v, 2), by.of(out, 3), lse};
  const Sequences all{starts_q, starts_k, queries, keys};
  int64_t count;
  Job* const jobs = tiles_of(all, sequences, heads, &count);
  with_flag(cap != 0.0, [&](auto capped) {
#pragma omp parallel num_threads(threads) if (count > 1)
    {
      Scratch scratch(forward.room());
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < count; ++n) {
        forward.template run<decltype(capped)::value>(all[jobs[n].sequence], jobs[n].head, jobs[n].query, scratch.data);
      }
    }
  });
  std::free(jobs);
}

void causal_attention_backward(const void* q, const void* k, const void* v, const void* out, const void* grad_out,
                               const void* grad_q, const void* grad_k, const void* grad_v, const int64_t* strides,
                               const float* lse, const float* grad_lse, const int* starts_q, const int* starts_k,
                               int64_t sequences, int64_t heads, int64_t key_heads, int64_t queries, int64_t keys,
                               int64_t channels, int dtype, double scale, double cap, int64_t window, bool causal,
                               const int64_t* seed, int64_t offset, int64_t bound, double grown, int threads) {
  const Settings s = settings(heads, key_heads, queries, keys, channels, dtype, scale, cap, window, causal, seed,
                              offset, bound, grown);
  const Strides by{strides};
  const Backward backward{s, by.of(q, 0), by.of(k, 1), by.of(v, 2), by.of(out, 3), by.of(grad_out, 4),
                          by.of(grad_q, 5), by.of(grad_k, 6), by.of(grad_v, 7), lse, grad_lse};
  const Sequences all{starts_q, starts_k, queries, keys};
  int64_t longest = 0;
  for (int64_t n = 0; n < sequences; ++n) longest = all[n].keys > longest ? all[n].keys : longest;
  with_flag(cap != 0.0, [&](auto capped) {
#pragma omp parallel num_threads(threads) if (sequences * key_heads > 1)
    {
      Scratch scratch(backward.room(longest));
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < sequences * key_heads; ++n) {
        backward.template run<decltype(capped)::value>(all[n / key_heads], n % key_heads, scratch.data);
      }
    }
  });
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&causal_attention>::named("causal_attention"),
    Entry<&causal_attention_backward>::named("causal_attention_backward"),
    {},
};
