// vector_quantize and segment_sum on the CPU. |x - e|^2 / 2 = |x|^2 / 2 - (x e - |e|^2 / 2): the nearest code has the
// largest score x e - |e|^2 / 2. Scores are matrix products of a tile of rows with a panel of codes, and are compared
// while they are in the first-level cache.
#include <omp.h>

#include "kernel.h"
#include "matmul.h"
#include "memory.h"
#include "rows.h"

namespace {

constexpr int64_t kRowsEach = 48;  // rows of a tile: whole blocks of 4, 6 and 8
constexpr int64_t kPanel = 64;     // codes that are compared at a time, whole vectors of each instruction set

constexpr float kInfinity = __builtin_inff();
using Numbers __attribute__((vector_size(4 * kWidth))) = int32_t;

// A codebook as panels [D, kPanel] of columns, and -|e|^2 / 2 of each code; codes beyond the last are never chosen.
struct Panels {
  int64_t codes, columns, count;
  Memory<float> values, scores;

  Panels(int64_t codes_, int64_t columns_)
      : codes(codes_), columns(columns_), count((codes_ + kPanel - 1) / kPanel), values(count * kPanel * columns_),
        scores(count * kPanel) {}

  void pack(const Rows& from, bool parallel, int threads) {
    const Scratch scratch(columns, parallel, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t p = 0; p < count; ++p) {
      float* const panel = values + p * kPanel * columns;
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t code = p * kPanel + j;
        if (code >= codes) {
          for (int64_t i = 0; i < columns; ++i) panel[i * kPanel + j] = 0.0f;
          scores[code] = -kInfinity;
          continue;
        }
        const float* const e = from.read({code, 1, 0, columns}, scratch.mine());
        double square = 0.0;
        for (int64_t i = 0; i < columns; ++i) {
          panel[i * kPanel + j] = e[i];
          square += double(e[i]) * double(e[i]);
        }
        scores[code] = float(-0.5 * square);
      }
    }
  }
};

// The largest score of a row so far in each lane, and its code.
struct Best {
  Vector score;
  Numbers code;

  void see(const float* scores, int64_t first) {
    Numbers here;
    for (int k = 0; k < kWidth; ++k) here[k] = int32_t(first) + k;
    for (int64_t j = 0; j < kPanel; j += kWidth, here += kWidth) {
      const Vector s = *reinterpret_cast<const VectorAt*>(scores + j);
      const Numbers better = (s > score) & (s < kInfinity);  // neither NaN nor what overflows
      score = better ? s : score;
      code = better ? here : code;
    }
  }

  // Of equal scores that of the first code; 0 if none is a number.
  int64_t first() const {
    float most = -kInfinity;
    int32_t found = 0;
    for (int k = 0; k < kWidth; ++k) {
      if (score[k] > most || (score[k] == most && code[k] < found)) most = score[k], found = code[k];
    }
    return found;
  }
};

void vector_quantize(const void* x, int64_t x_row, int dtype, const void* codebook, int64_t code_row, int code_dtype,
                     void* quantized, int64_t* indices, int64_t rows, int64_t codes, int64_t columns, int threads) {
  const int64_t tiles = (rows + kRowsEach - 1) / kRowsEach;
  const bool parallel = rows * codes * columns >= 8 * kParallel;
  Panels panels(codes, columns);
  panels.pack({codebook, code_row, code_dtype}, parallel, threads);
  const Rows in{x, x_row, dtype};
  const int64_t size = code_dtype == kFloat32 ? 4 : 2;
  const Scratch scratch(kRowsEach * (columns + kPanel), parallel, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t at = tile * kRowsEach, count = rows - at < kRowsEach ? rows - at : kRowsEach;
    float* const scores = scratch.mine();
    int64_t row;
    const float* const seen = in.view({at, count, 0, columns}, scores + kRowsEach * kPanel, &row);
    Best best[kRowsEach];
    for (int64_t r = 0; r < count; ++r) best[r] = {Vector{} - kInfinity, Numbers{}};
    for (int64_t p = 0; p < panels.count; ++p) {
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(scores + r * kPanel, panels.scores + p * kPanel, sizeof(float) * kPanel);
      }
      const float* const panel = panels.values + p * kPanel * columns;
      multiply({Strided::rows(seen, row), columns, panel, kPanel, scores, kPanel, true}, count, kPanel);
      for (int64_t r = 0; r < count; ++r) best[r].see(scores + r * kPanel, p * kPanel);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t code = indices[at + r] = best[r].first();
      std::memcpy(static_cast<char*>(quantized) + (at + r) * columns * size,
                  static_cast<const char*>(codebook) + code * code_row * size, size_t(columns * size));
    }
  }
}

// sums[k] = sum of the rows n with indices[n] = k, in their order, and their number. A segment belongs to one thread, so
// that threads change no bit.
void segment_sum(const void* x, int64_t x_row, int dtype, const int64_t* indices, float* sums, float* counts,
                 int64_t rows, int64_t columns, int64_t segments, int threads) {
  const Rows in{x, x_row, dtype};
  const bool parallel = rows * columns >= kParallel;
  const int64_t parts = parallel ? threads : 1;
  const Memory<double> total(segments * (columns + 1));
  const Scratch scratch(columns, parallel, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = segments * part / parts, end = segments * (part + 1) / parts;
    for (int64_t i = first * (columns + 1); i < end * (columns + 1); ++i) total[i] = 0.0;
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t k = indices[n];
      if (k < first || k >= end) continue;
      const float* const row = in.read({n, 1, 0, columns}, scratch.mine());
      double* const to = total + k * (columns + 1);
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) to[i] += double(row[i]);
      to[columns] += 1.0;
    }
    for (int64_t k = first; k < end; ++k) {
      for (int64_t i = 0; i < columns; ++i) sums[k * columns + i] = float(total[k * (columns + 1) + i]);
      counts[k] = float(total[k * (columns + 1) + columns]);
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&vector_quantize>::named("vector_quantize"),
    Entry<&segment_sum>::named("segment_sum"),
    {},
};
