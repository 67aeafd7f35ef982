// y = W x + bias for a few x: the weights pass from memory once, some rows at a time, as they lie in PyTorch.
//
// A sum runs along its row by vectors, then over the lanes, in one order however many x there are: a token gives the
// same bits alone, in a batch, and as part of a prompt.
#pragma once
#include "matmul.h"
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#define GENAI_FAST_INLINE inline __attribute__((always_inline))

GENAI_FAST_INLINE Vector load(const float* p) { return *reinterpret_cast<const VectorAt*>(p); }

using Integers __attribute__((vector_size(4 * kWidth))) = int32_t;

// From bfloat16, and from int8. (By intrinsics: GCC widens such vectors by halves, through memory. Masked ones: GCC 12
// warns of what the others leave undefined.)
#if defined(__AVX512F__)
GENAI_FAST_INLINE Vector load(const uint16_t* p) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Vector(Integers(_mm512_maskz_cvtepu16_epi32(0xFFFF, narrow)) << 16);
}
GENAI_FAST_INLINE Vector load(const int8_t* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return __builtin_convertvector(Integers(_mm512_maskz_cvtepi8_epi32(0xFFFF, narrow)), Vector);
}
GENAI_FAST_INLINE float sum_lanes(Vector v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_maskz_extractf32x8_ps(0xFF, v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#elif defined(__AVX2__)
GENAI_FAST_INLINE Vector load(const uint16_t* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return Vector(Integers(_mm256_cvtepu16_epi32(narrow)) << 16);
}
GENAI_FAST_INLINE Vector load(const int8_t* p) {
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return __builtin_convertvector(Integers(_mm256_cvtepi8_epi32(narrow)), Vector);
}
GENAI_FAST_INLINE float sum_lanes(Vector v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
GENAI_FAST_INLINE Vector load(const uint16_t* p) {
  return Vector{from_bfloat16(p[0]), from_bfloat16(p[1]), from_bfloat16(p[2]), from_bfloat16(p[3])};
}
GENAI_FAST_INLINE Vector load(const int8_t* p) {
  return Vector{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
}
GENAI_FAST_INLINE float sum_lanes(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#endif

// The last elements of a row, and zeros.
template <class W>
__attribute__((noinline)) Vector load_rest(const W* p, int64_t count) {
  W padded[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

inline float widen(float value) { return value; }
inline float widen(uint16_t value) { return from_bfloat16(value); }
inline float widen(int8_t value) { return float(value); }

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

// Rows of weights that are read side by side: as many as hide the memory's latency if there are few x, else fewer, for
// more x to meet them. All sums stay in registers. The rows lie far apart, so that each begins a stream that goes on with
// the row behind it: the processor foresees those, and nothing that jumps to new pages with every row.
constexpr int kStreams = 8, kTogether = 4;
constexpr int64_t kAheadBytes = 2048;  // in a stream
#if defined(__AVX512F__)
constexpr int kFewVectors = 3, kMostVectors = 6;
#else
constexpr int kFewVectors = 1, kMostVectors = 2;
#endif

// Rows row, row + apart, .. of weights, N of them, and R of the x.
template <int N, int R, bool Ahead, class W>
GENAI_FAST_INLINE void multiply_rows_of(const Linear<W>& m, int64_t row, int64_t apart, const Vectors& v) {
  constexpr int kLine = 64 / int(sizeof(W)), kVectors = kLine / kWidth;  // of a cache line
  constexpr int64_t kAhead = kAheadBytes / int64_t(sizeof(W));
  const W* const w = m.weight + row * m.depth;
  const int64_t stream = apart * m.depth;
  Vector sum[N][R] = {};
  const auto step = [&](int64_t k, auto get) __attribute__((always_inline)) {
    Vector x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = load(v.x + r * v.x_row + k);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vector weights = get(w + n * stream + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[n][r] += weights * x[r];
    }
  };
  int64_t k = 0;
  for (; k + kLine <= m.depth; k += kLine) {
    if constexpr (Ahead) {
      for (int n = 0; n < N; ++n) __builtin_prefetch(w + n * stream + k + kAhead);
    }
    for (int i = 0; i < kVectors; ++i) step(k + i * kWidth, [](const W* p) { return load(p); });
  }
  for (; k + kWidth <= m.depth; k += kWidth) step(k, [](const W* p) { return load(p); });
  if (k < m.depth) step(k, [&](const W* p) { return load_rest(p, m.depth - k); });
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const float scale = m.scale ? m.scale[row + n * apart] : 1.0f, bias = m.bias ? m.bias[row + n * apart] : 0.0f;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* const y = v.y + r * v.y_row + row + n * apart;
      const float value = sum_lanes(sum[n][r]) * scale + bias;
      *y = v.add ? *y + value : value;
    }
  }
}

template <int N, int R, class W>
GENAI_FAST_INLINE void multiply_rest_of(const Linear<W>& m, int64_t row, int64_t apart, const Vectors& v,
                                        int64_t count) {
  if (count == R) return multiply_rows_of<N, R, true>(m, row, apart, v);
  if constexpr (R > 1) multiply_rest_of<N, R - 1>(m, row, apart, v, count);
}

// The first block of x comes with the weights from memory, the others find them in the cache.
template <int N, class W>
GENAI_FAST_INLINE void multiply_vectors(const Linear<W>& m, int64_t row, int64_t apart, const Vectors& v,
                                        int64_t count) {
  if (count <= kMostVectors) return multiply_rest_of<N, kMostVectors>(m, row, apart, v, count);
  multiply_rows_of<N, kMostVectors, true>(m, row, apart, v);
  int64_t r = kMostVectors;
  for (; r + kMostVectors <= count; r += kMostVectors) {
    multiply_rows_of<N, kMostVectors, false>(m, row, apart, v.from(r));
  }
  for (; r < count; ++r) multiply_rows_of<N, 1, false>(m, row, apart, v.from(r));
}

// Rows first .. last - 1 of `count` products.
template <class W>
__attribute__((noinline)) void multiply_linear(const Linear<W>& m, int64_t first, int64_t last, const Vectors& v,
                                               int64_t count) {
  const bool few = count <= kFewVectors;
  const int64_t streams = few ? kStreams : kTogether, apart = (last - first) / streams;
  for (int64_t row = first; row < first + apart; ++row) {
    if (few) {
      multiply_rest_of<kStreams, kFewVectors>(m, row, apart, v, count);
    } else {
      multiply_vectors<kTogether>(m, row, apart, v, count);
    }
  }
  for (int64_t row = first + streams * apart; row < last; ++row) multiply_vectors<1>(m, row, 1, v, count);
}

}  // namespace
