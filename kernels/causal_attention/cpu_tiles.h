// Attention on the CPU, in tiles of 64 queries (one vector of them if there are no more) by 64 keys. Scores are kept as
// [key][query], so that what belongs to a query (maximum, sum, masks) runs along vectors and nothing is summed across one.
#pragma once
#include "activations.h"
#include "matmul.h"
#include "memory.h"
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
  const int* lengths;  // of the keys of each sample, if not all have as many
  Sequence operator[](int64_t n) const {
    if (!starts_q) return {n, 0, queries, 0, lengths ? lengths[n] : keys};
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

inline const char* at(const Settings& s, const Heads& x, const Sequence& q, int64_t head, int64_t row) {
  return static_cast<const char*>(x.data) + (q.batch * x.batch + head * x.head + row * x.row) * s.size();
}

inline Tile rows_of(const Settings& s, const Heads& x, const Sequence& q, int64_t head, int64_t first, int64_t count,
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

// out[channel][query] = factor * x[query][channel], 0 for queries that do not exist. Queries lie in lanes.
template <int64_t Lanes>
void transpose(const Tile& x, int64_t count, int64_t channels, float factor, float* out) {
  for (int64_t c = 0; c < channels; ++c) {
    float* const line = out + c * Lanes;
    for (int64_t r = 0; r < count; ++r) line[r] = factor * x.data[r * x.row + c];
    for (int64_t r = count; r < Lanes; ++r) line[r] = 0.0f;
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
inline bool partly(const Settings& s, int64_t position, int64_t queries, int64_t key, int64_t keys) {
  return position - (key + keys - 1) < s.least || position + queries - 1 - key >= s.most;
}

// Sets what is not seen: scores[key][query].
template <int64_t Lanes>
void hide(const Settings& s, int64_t position, int64_t key, int64_t keys, float hidden, float* scores) {
  const auto inside = [](int64_t i) { return int32_t(i < 0 ? 0 : i > Lanes ? Lanes : i); };
  for (int64_t j = 0; j < keys; ++j) {
    float* const line = scores + j * Lanes;
    const int64_t back = position - (key + j);  // of query 0
    const int32_t low = inside(s.least - back), high = inside(s.most - back);
#pragma omp simd
    for (int32_t i = 0; i < int32_t(Lanes); ++i) line[i] = i >= low && i < high ? line[i] : hidden;
  }
}

// kept[key][query]: what dropout multiplies by. `words` has room for a row.
template <int64_t Lanes>
void draw(const Settings& s, const Sequence& q, int64_t head, int64_t query, int64_t queries, int64_t key, int64_t keys,
          uint32_t* words, float* kept) {
  const uint64_t pitch = uint64_t(s.keys + 3) / 4 * 4;
  const uint64_t row = uint64_t((q.batch * s.heads + head) * s.queries + q.query + query) + uint64_t(s.offset);
  for (int64_t i = 0; i < queries; ++i) {
    const uint32_t* const drawn = stream(words, (row + uint64_t(i)) * pitch + uint64_t(q.key + key), keys, *s.seed);
    for (int64_t j = 0; j < keys; ++j) kept[j * Lanes + i] = drawn[j] > s.bound ? s.grown : 0.0f;
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t i = queries; i < Lanes; ++i) kept[j * Lanes + i] = 0.0f;
  }
}

inline void store(const Settings& s, const Heads& x, const Sequence& q, int64_t head, int64_t row, const float* values) {
  void* const base = const_cast<char*>(at(s, x, q, head, row));
  if (s.dtype == kFloat32) {
    std::memcpy(base, values, size_t(s.channels) * 4);
  } else {
    store_span(base, s.dtype, 0, s.channels, values);
  }
}

// Softmax over keys that come tile by tile, for a vector or a tile of queries.
template <int64_t Lanes>
struct Online {
  alignas(64) float most[Lanes], total[Lanes], shrunk[Lanes];

  Online() {
    for (int64_t i = 0; i < Lanes; ++i) most[i] = -kInfinity, total[i] = 0.0f;
  }

  // Scores become e^(score - most); what was added up before is to be multiplied by `shrunk`.
  void take(float* scores, int64_t keys) {
    alignas(64) float larger[Lanes], sum[Lanes] = {};
#pragma omp simd
    for (int64_t i = 0; i < Lanes; ++i) larger[i] = most[i];
    for (int64_t j = 0; j < keys; ++j) {
      const float* const line = scores + j * Lanes;
#pragma omp simd
      for (int64_t i = 0; i < Lanes; ++i) larger[i] = line[i] > larger[i] ? line[i] : larger[i];
    }
    alignas(64) float shift[Lanes];
#pragma omp simd
    for (int64_t i = 0; i < Lanes; ++i) {
      shift[i] = larger[i] == -kInfinity ? 0.0f : larger[i];  // of a query that has seen nothing yet
      shrunk[i] = exp_fast(most[i] - shift[i]);
      most[i] = larger[i];
    }
    for (int64_t j = 0; j < keys; ++j) {
      float* const line = scores + j * Lanes;
#pragma omp simd
      for (int64_t i = 0; i < Lanes; ++i) {
        line[i] = exp_fast(line[i] - shift[i]);
        sum[i] += line[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < Lanes; ++i) total[i] = total[i] * shrunk[i] + sum[i];
  }
};

template <bool Capped>
void cap_scores(float* scores, int64_t count, float cap) {
  if constexpr (Capped) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) scores[i] = cap * tanh_fast(scores[i]);
  }
}

}  // namespace
