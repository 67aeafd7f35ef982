// c = a b for a small b: blocks of c stay in registers while a is read by broadcasts, so that a has any strides.
#pragma once
#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kBlock = 8;  // lanes of a vector, and rows of c in registers: 8 x 3 of 32 vectors
#elif defined(__AVX__)
constexpr int kWidth = 8, kBlock = 4;  // 4 x 3 of 16
#else
constexpr int kWidth = 4, kBlock = 4;
#endif

// In a register, and anywhere in memory. (GCC keeps arrays of these in registers, arrays of floats in memory.)
using Vector __attribute__((vector_size(4 * kWidth))) = float;
using VectorAt __attribute__((vector_size(4 * kWidth), aligned(4), may_alias)) = float;

constexpr int64_t whole_vectors(int64_t columns) { return (columns + kWidth - 1) / kWidth * kWidth; }

// a[i][k] = data[i row + k column]. While a block of rows from i on is read, soon[i soon_row + k soon_column] is fetched
// into the cache: what will be read next, which the processor does not guess where it has many streams to follow.
struct Strided {
  const float* data;
  int64_t row, column;
  const float* soon;
  int64_t soon_row, soon_column;

  // Rows of which each lies dense, or nearly so: the block after this one is fetched.
  static Strided rows(const float* data, int64_t row) { return {data, row, 1, data + kBlock * row, row, kBlock}; }

  Strided from(int64_t i) const { return {data + i * row, row, column, soon + i * soon_row, soon_row, soon_column}; }
};

// Not inlined, or the caller's variables would compete for the registers.
template <int R, int V>
__attribute__((noinline)) void multiply_block(Strided a, int64_t depth, const float* b, int64_t b_row, float* c,
                                              int64_t c_row) {
  Vector sum[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (R == kBlock) __builtin_prefetch(a.soon + k * a.soon_column);
    Vector w[V];
    for (int v = 0; v < V; ++v) w[v] = *reinterpret_cast<const VectorAt*>(b + k * b_row + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const float x = a.data[r * a.row + k * a.column];
      for (int v = 0; v < V; ++v) sum[r][v] += x * w[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) *reinterpret_cast<VectorAt*>(c + r * c_row + v * kWidth) = sum[r][v];
  }
}

template <int R, int V>
inline void multiply_rest(const Strided& a, int64_t rows, int64_t depth, const float* b, int64_t b_row, float* c,
                          int64_t c_row) {
  if (rows == R) return multiply_block<R, V>(a, depth, b, b_row, c, c_row);
  if constexpr (R > 1) multiply_rest<R - 1, V>(a, rows, depth, b, b_row, c, c_row);
}

template <int V>
inline void multiply_rows(const Strided& a, int64_t rows, int64_t depth, const float* b, int64_t b_row, float* c,
                          int64_t c_row) {
  int64_t i = 0;
  for (; i + kBlock <= rows; i += kBlock) multiply_block<kBlock, V>(a.from(i), depth, b, b_row, c + i * c_row, c_row);
  if (i < rows) multiply_rest<kBlock - 1, V>(a.from(i), rows - i, depth, b, b_row, c + i * c_row, c_row);
}

// c[i][j] = sum over k of a[i][k] b[k][j], in the order of k, for j < columns: whole vectors, for which b and c have room.
inline void multiply(const Strided& a, int64_t rows, int64_t depth, const float* b, int64_t b_row, int64_t columns,
                     float* c, int64_t c_row) {
  for (int64_t j = 0; j < columns;) {
    const int64_t left = (columns - j) / kWidth;
    const int64_t taken = left == 4 ? 2 : left < 3 ? left : 3;  // 2 + 2 is better than 3 + 1
    switch (taken) {
      case 1: multiply_rows<1>(a, rows, depth, b + j, b_row, c + j, c_row); break;
      case 2: multiply_rows<2>(a, rows, depth, b + j, b_row, c + j, c_row); break;
      default: multiply_rows<3>(a, rows, depth, b + j, b_row, c + j, c_row);
    }
    j += taken * kWidth;
  }
}

}  // namespace
