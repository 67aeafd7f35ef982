// What kernels that decode a whole Transformer share: attention of one new token, and checks of what Python passes.
#pragma once
#include "activations.h"
#include "kernel.h"
#include "products.h"

namespace {

template <int N>
struct Count {
  static constexpr int value = N;
};

// out = sum over j < count of p[j] rows[j], rows `width` long and dense.
template <class C>
void weigh_rows(const float* p, const C* rows, int64_t count, int64_t width, float* out) {
  const auto vectors = [&](int64_t at, auto number) {
    constexpr int kVectors = decltype(number)::value;
    Vector sum[kVectors] = {};
    for (int64_t j = 0; j < count; ++j) {
      for (int i = 0; i < kVectors; ++i) sum[i] += p[j] * load(rows + j * width + at + i * kWidth);
    }
    for (int i = 0; i < kVectors; ++i) *reinterpret_cast<VectorAt*>(out + at + i * kWidth) = sum[i];
  };
  int64_t at = 0;
  for (; at + 4 * kWidth <= width; at += 4 * kWidth) vectors(at, Count<4>{});
  for (; at + kWidth <= width; at += kWidth) vectors(at, Count<1>{});
  for (; at < width; ++at) {
    float sum = 0.0f;
    for (int64_t j = 0; j < count; ++j) sum += p[j] * widen(rows[j * width + at]);
    out[at] = sum;
  }
}

// Scores become softcap * tanh(score / softcap) if there is one.
struct Query {
  const float* q;
  int64_t head_dim;
  float softcap;
};

// Memory of a thread: a whole number of vectors for `query`, with zeros behind the head's channels, and the cache's room
// for `scores`.
struct Buffers {
  float *query, *scores;
};

// softmax(q keys^T / sqrt(D)) values, over `count` tokens of one head.
template <class C>
void attend(const Query& one, const C* keys, const C* values, int64_t count, const Buffers& buffers, float* out) {
  const int64_t head_dim = one.head_dim;
  const float scale = 1.0f / __builtin_sqrtf(float(head_dim));
  float *const query = buffers.query, *const p = buffers.scores;
  for (int64_t d = 0; d < head_dim; ++d) query[d] = one.q[d] * scale;
  multiply_linear(Linear<C>{keys, nullptr, nullptr, count, head_dim}, 0, count, {query, 0, p, 0, false}, 1);
  if (one.softcap > 0.0f) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) p[j] = one.softcap * tanh_fast(p[j] / one.softcap);
  }
  float most = p[0], total = 0.0f;
  for (int64_t j = 1; j < count; ++j) most = p[j] > most ? p[j] : most;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < count; ++j) {
    p[j] = exp_fast(p[j] - most);
    total += p[j];
  }
  weigh_rows(p, values, count, head_dim, out);
  const float share = 1.0f / total;
  for (int64_t d = 0; d < head_dim; ++d) out[d] *= share;
}

void require_within(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  genai_fast_raise(Raised::kValueError, "%s: expected %lld to %lld, got %lld", name, (long long)least, (long long)most,
                   (long long)value);
}

}  // namespace
