// Rows of float32, bfloat16 or float16 read and written as float32, and how kernels cut [batch, columns] into pieces.
#pragma once
#include <cstdint>
#include <cstring>

#include "half.h"

namespace {

// For what serves a whole piece at a time: one copy in each kernel file, not one in each of its activations and flags.
#define GENAI_FAST_ONCE __attribute__((noinline))

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return uint16_t(value != value ? 0x7FC0u : rounded);
}

inline void load_span(const void* base, int dtype, int64_t first, int64_t count, float* out) {
  if (dtype == kFloat32) {
    std::memcpy(out, static_cast<const float*>(base) + first, size_t(count) * 4);
  } else if (dtype == kBFloat16) {
    const uint16_t* in = static_cast<const uint16_t*>(base) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(in[i]);
  } else {
    from_halves(static_cast<const uint16_t*>(base) + first, count, out);
  }
}

inline void store_span(void* base, int dtype, int64_t first, int64_t count, const float* in) {
  if (dtype == kBFloat16) {
    uint16_t* out = static_cast<uint16_t*>(base) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(in[i]);
  } else if (dtype == kFloat16) {
    to_halves(in, count, static_cast<uint16_t*>(base) + first);
  }
}

constexpr int64_t kParallel = 16384;  // elements worth a second thread
constexpr int64_t kPiece = 2048;  // elements a piece: its float buffers stay in the first-level cache

// A rectangle of [batch, columns]: whole rows where they are short, a part of one row where it is long.
struct Piece {
  int64_t row, rows, column, columns;
  int64_t count() const { return rows * columns; }
};

struct Pieces {
  int64_t batch, columns, per_row, rows_each;

  Pieces(int64_t batch_, int64_t columns_) : batch(batch_), columns(columns_) {
    per_row = columns > kPiece ? (columns + kPiece - 1) / kPiece : 1;
    rows_each = columns > 0 && columns <= kPiece ? kPiece / columns : 1;
  }
  int64_t count() const { return columns == 0 ? 0 : (batch + rows_each - 1) / rows_each * per_row; }
  Piece operator[](int64_t k) const {
    if (per_row == 1) {
      const int64_t row = k * rows_each;
      return {row, batch - row < rows_each ? batch - row : rows_each, 0, columns};
    }
    const int64_t column = k % per_row * kPiece;
    return {k / per_row, 1, column, columns - column < kPiece ? columns - column : kPiece};
  }
};

// A [batch, columns] input with unit column stride.
struct Rows {
  const void* data;
  int64_t stride;
  int dtype;

  // The piece as float32, rows `row_stride` apart: in place if it is, else copied to `buffer`.
  const float* view(const Piece& p, float* buffer, int64_t* row_stride) const {
    *row_stride = dtype == kFloat32 ? stride : p.columns;
    return dtype == kFloat32 ? static_cast<const float*>(data) + p.row * stride + p.column : read(p, buffer);
  }

  // The piece as dense float32: in place if it already is, else copied to `buffer`.
  const float* read(const Piece& p, float* buffer) const {
    if (dtype == kFloat32 && (p.rows == 1 || stride == p.columns)) {
      return static_cast<const float*>(data) + p.row * stride + p.column;
    }
    copy(p, buffer);
    return buffer;
  }

 private:
  GENAI_FAST_ONCE void copy(const Piece& p, float* buffer) const {
    for (int64_t r = 0; r < p.rows; ++r) {
      load_span(data, dtype, (p.row + r) * stride + p.column, p.columns, buffer + r * p.columns);
    }
  }
};

// A dense [batch, columns] output: kernels fill `begin(...)`, then call `end(...)`.
struct DenseOut {
  void* data;
  int64_t columns;
  int dtype;

  float* begin(const Piece& p, float* buffer) const {
    return dtype == kFloat32 ? static_cast<float*>(data) + p.row * columns + p.column : buffer;
  }
  void end(const Piece& p, const float* values) const {
    if (dtype != kFloat32) copy(p, values);
  }

 private:
  GENAI_FAST_ONCE void copy(const Piece& p, const float* values) const {
    store_span(data, dtype, p.row * columns + p.column, p.count(), values);
  }
};

}  // namespace
