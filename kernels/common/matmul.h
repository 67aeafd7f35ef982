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

// In a register. (GCC keeps small arrays of these in registers, and those of floats in memory.)
using Vector __attribute__((vector_size(4 * kWidth))) = float;
// Anywhere in memory.
using VectorAt __attribute__((vector_size(4 * kWidth), aligned(4), may_alias)) = float;

constexpr int64_t whole_vectors(int64_t columns) { return (columns + kWidth - 1) / kWidth * kWidth; }
// Whole vectors of each instruction set: how Python pads the rows of a matrix.
constexpr int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// a[i][k] = data[i row + k column]. While a block of rows from i on is read, soon[i soon_row + k soon_column] is
// fetched into the cache: what is read next, which the processor does not foresee where it has many streams to follow.
struct Strided {
  const float* data;
  int64_t row, column;
  const float* soon;
  int64_t soon_row, soon_column;

  // Rows of which each lies dense, or nearly so: the block after this one is fetched.
  static Strided rows(const float* data, int64_t row) { return {data, row, 1, data + kBlock * row, row, kBlock}; }

  Strided from(int64_t i) const { return {data + i * row, row, column, soon + i * soon_row, soon_row, soon_column}; }
};

// c[i][j] = sum over k < depth of a[i][k] b[k][j], in the order of k; on top of what is there if `add`.
struct Product {
  Strided a;
  int64_t depth;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool add;

  Product at(int64_t i, int64_t j) const { return {a.from(i), depth, b + j, b_row, c + i * c_row + j, c_row, add}; }
};

template <int R, int V>
inline __attribute__((always_inline)) void multiply_block(const Product& p) {
  Vector sum[R][V] = {};
  for (int r = 0; p.add && r < R; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = *reinterpret_cast<const VectorAt*>(p.c + r * p.c_row + v * kWidth);
  }
  for (int64_t k = 0; k < p.depth; ++k) {
    if constexpr (R == kBlock || V == 4) __builtin_prefetch(p.a.soon + k * p.a.soon_column);
    Vector w[V];
    for (int v = 0; v < V; ++v) w[v] = *reinterpret_cast<const VectorAt*>(p.b + k * p.b_row + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const float x = p.a.data[r * p.a.row + k * p.a.column];
      for (int v = 0; v < V; ++v) sum[r][v] += x * w[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) *reinterpret_cast<VectorAt*>(p.c + r * p.c_row + v * kWidth) = sum[r][v];
  }
}

template <int R, int V>
inline __attribute__((always_inline)) void multiply_rest(const Product& p, int64_t rows) {
  if (rows == R) return multiply_block<R, V>(p);
  if constexpr (R > 1) multiply_rest<R - 1, V>(p, rows);
}

// Not inlined, or the caller's variables would compete for the registers.
template <int V>
__attribute__((noinline)) void multiply_rows(const Product& p, int64_t rows) {
  constexpr int kRows = V == 4 ? 6 : kBlock;  // 6 x 4 read less for each product than 8 x 2, with the same registers
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) multiply_block<kRows, V>(p.at(i, 0));
  if (i < rows) multiply_rest<kRows - 1, V>(p.at(i, 0), rows - i);
}

// The rows i < rows and columns j < columns: whole vectors, for which b and c have room.
inline void multiply(const Product& p, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns;) {
    const int64_t left = (columns - j) / kWidth;
#if defined(__AVX512F__)
    const int64_t taken = left == 4 || left > 6 ? 4 : left < 3 ? left : 3;  // 3 + 2 is better than 4 + 1
#else
    const int64_t taken = left == 4 ? 2 : left < 3 ? left : 3;  // 2 + 2 is better than 3 + 1
#endif
    switch (taken) {
      case 1: multiply_rows<1>(p.at(0, j), rows); break;
      case 2: multiply_rows<2>(p.at(0, j), rows); break;
#if defined(__AVX512F__)
      case 4: multiply_rows<4>(p.at(0, j), rows); break;
#endif
      default: multiply_rows<3>(p.at(0, j), rows);
    }
    j += taken * kWidth;
  }
}

}  // namespace
