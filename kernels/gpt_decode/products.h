// y = W x + bias for a few x: the weights pass from memory once, some rows at a time, as they lie in PyTorch.
//
// A sum runs along its row by vectors, then over the lanes, in one order however many x there are: a token gives the
// same bits alone, in a batch, and as part of a prompt.
#pragma once
#include "matmul.h"
#include "rows.h"

namespace {

using Bytes __attribute__((vector_size(kWidth))) = int8_t;
using Halves __attribute__((vector_size(2 * kWidth))) = uint16_t;
using Integers __attribute__((vector_size(4 * kWidth))) = int32_t;
using Words __attribute__((vector_size(4 * kWidth))) = uint32_t;

#define GENAI_FAST_INLINE inline __attribute__((always_inline))

GENAI_FAST_INLINE Vector load(const float* p) { return *reinterpret_cast<const VectorAt*>(p); }

GENAI_FAST_INLINE Vector load(const uint16_t* p) {  // bfloat16
  Halves narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  return reinterpret_cast<Vector>(__builtin_convertvector(narrow, Words) << 16);
}

GENAI_FAST_INLINE Vector load(const int8_t* p) {
  Bytes narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  return __builtin_convertvector(__builtin_convertvector(narrow, Integers), Vector);
}

// The last elements of a row, and zeros.
template <class W>
GENAI_FAST_INLINE Vector load_rest(const W* p, int64_t count) {
  W padded[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

inline float widen(float value) { return value; }
inline float widen(uint16_t value) { return from_bfloat16(value); }
inline float widen(int8_t value) { return float(value); }

GENAI_FAST_INLINE float sum_lanes(Vector v) {
  float lanes[kWidth];
  __builtin_memcpy(lanes, &v, sizeof lanes);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// A torch Linear: weight [rows, depth] with a factor for each row (of int8 weights, else null), bias [rows] or null.
template <class W>
struct Linear {
  const W* weight;
  const float *scale, *bias;
  int64_t rows, depth;
};

// x: rows `x_row` apart, with zeros up to a whole vector. y: written, or added to.
struct Vectors {
  const float* x;
  int64_t x_row;
  float* y;
  int64_t y_row;
  bool add;
  Vectors from(int64_t r) const { return {x + r * x_row, x_row, y + r * y_row, y_row, add}; }
};

constexpr int kTogether = 4;  // rows of weights that are read side by side
#if defined(__AVX512F__)
constexpr int kMostVectors = 6;  // 4 x 6 sums in registers
#else
constexpr int kMostVectors = 2;
#endif

// N rows of weights from `row` on, R of the x. `Ahead` fetches the N rows after these, while these are read.
template <int N, int R, bool Ahead, class W>
GENAI_FAST_INLINE void multiply_rows_of(const Linear<W>& m, int64_t row, const Vectors& v) {
  constexpr int kLine = 64 / int(sizeof(W)), kVectors = kLine / kWidth;  // of a cache line
  const W* const w = m.weight + row * m.depth;
  Vector sum[N][R] = {};
  const auto step = [&](int64_t k, auto get) __attribute__((always_inline)) {
    Vector x[R];
    for (int r = 0; r < R; ++r) x[r] = load(v.x + r * v.x_row + k);
    for (int n = 0; n < N; ++n) {
      const Vector weights = get(w + n * m.depth + k);
      for (int r = 0; r < R; ++r) sum[n][r] += weights * x[r];
    }
  };
  int64_t k = 0;
  for (; k + kLine <= m.depth; k += kLine) {
    if constexpr (Ahead) {
      for (int n = 0; n < N; ++n) __builtin_prefetch(w + (N + n) * m.depth + k);
    }
    for (int i = 0; i < kVectors; ++i) step(k + i * kWidth, [](const W* p) { return load(p); });
  }
  for (; k + kWidth <= m.depth; k += kWidth) step(k, [](const W* p) { return load(p); });
  if (k < m.depth) step(k, [&](const W* p) { return load_rest(p, m.depth - k); });
  for (int n = 0; n < N; ++n) {
    const float scale = m.scale ? m.scale[row + n] : 1.0f, bias = m.bias ? m.bias[row + n] : 0.0f;
    for (int r = 0; r < R; ++r) {
      float* const y = v.y + r * v.y_row + row + n;
      const float value = sum_lanes(sum[n][r]) * scale + bias;
      *y = v.add ? *y + value : value;
    }
  }
}

template <int N, int R, class W>
GENAI_FAST_INLINE void multiply_rest_of(const Linear<W>& m, int64_t row, const Vectors& v, int64_t count) {
  if (count == R) return multiply_rows_of<N, R, true>(m, row, v);
  if constexpr (R > 1) multiply_rest_of<N, R - 1>(m, row, v, count);
}

// The first block of x comes with the weights from memory, the others find them in the cache.
template <int N, class W>
GENAI_FAST_INLINE void multiply_vectors(const Linear<W>& m, int64_t row, const Vectors& v, int64_t count) {
  if (count <= kMostVectors) return multiply_rest_of<N, kMostVectors>(m, row, v, count);
  multiply_rows_of<N, kMostVectors, true>(m, row, v);
  int64_t r = kMostVectors;
  for (; r + kMostVectors <= count; r += kMostVectors) multiply_rows_of<N, kMostVectors, false>(m, row, v.from(r));
  for (; r < count; ++r) multiply_rows_of<N, 1, false>(m, row, v.from(r));
}

// Rows first .. last - 1 of `count` products.
template <class W>
__attribute__((noinline)) void multiply_linear(const Linear<W>& m, int64_t first, int64_t last, const Vectors& v,
                                               int64_t count) {
  int64_t row = first;
  for (; row + kTogether <= last; row += kTogether) multiply_vectors<kTogether>(m, row, v, count);
  for (; row < last; ++row) multiply_vectors<1>(m, row, v, count);
}

}  // namespace
