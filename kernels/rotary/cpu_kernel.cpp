// rotary on the CPU: rows of channels, [batch, second, third] of them, that are read with strides and written densely.
#include <omp.h>

#include "kernel.h"
#include "memory.h"
#include "rows.h"

namespace {

// Pair i of a row is (2 i, 2 i + 1) if Interleaved, else (i, pairs + i). Full: so are its cosines and sines; the inverse
// is the transpose.
template <bool Interleaved, bool Full>
void rotate(const float* x, const float* cosine, const float* sine, bool inverse, int64_t pairs, float* y) {
  constexpr int64_t kStep = Interleaved ? 2 : 1, kTable = Full ? kStep : 1;
  const int64_t apart = Interleaved ? 1 : pairs, other = Full ? apart : 0;
  const float *const sine_a = sine + (inverse ? other : 0), *const sine_b = sine + (inverse ? 0 : other);
  const float sign = inverse ? -1.0f : 1.0f;
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[kStep * i], b = x[kStep * i + apart];
    y[kStep * i] = a * cosine[kTable * i] - b * (sign * sine_a[kTable * i]);
    y[kStep * i + apart] = b * cosine[kTable * i + other] + a * (sign * sine_b[kTable * i]);
  }
}

template <bool Interleaved>
void rotate(const float* x, const float* cosine, const float* sine, bool inverse, bool full, int64_t pairs, float* y) {
  if (full) {
    rotate<Interleaved, true>(x, cosine, sine, inverse, pairs, y);
  } else {
    rotate<Interleaved, false>(x, cosine, sine, inverse, pairs, y);
  }
}

// Tables [axes, samples, known, rotated], or [..., rotated / 2] unless full: strides of the first three and `step`
// between columns. Pairs from ends[a - 1] to ends[a] turn by axis a.
constexpr int64_t kAxes = 4;

struct Table {
  const void* data;
  int dtype;
  int64_t axis, sample, row, step;

  // `columns` of a row: where they lie, or collected in `buffer`.
  const float* read(int64_t at, int64_t position, const int64_t* ends, bool full, bool interleaved, int64_t pairs,
                    float* buffer) const {
    const int64_t begin = at * sample + position * row, columns = full ? 2 * pairs : pairs;
    if (step == 1 && ends[0] >= pairs) return Rows{data, 0, dtype}.read({0, 1, begin, columns}, buffer);
    const int64_t wide = full && interleaved ? 2 : 1;
    for (int64_t a = 0, first = 0; a < kAxes && first < pairs; first = ends[a++]) {
      for (int64_t half = 0; half < columns; half += wide * pairs) {
        copy(begin + a * axis, half + wide * first, half + wide * (ends[a] < pairs ? ends[a] : pairs), buffer);
      }
    }
    return buffer;
  }

 private:
  void copy(int64_t begin, int64_t first, int64_t end, float* buffer) const {
    if (step == 1) return load_span(data, dtype, begin + first, end - first, buffer + first);
    for (int64_t k = first; k < end; ++k) load_span(data, dtype, begin + k * step, 1, buffer + k);
  }
};

// A token's position is offset + its index, or what `positions` says; one that the tables lack gives NaN. Tokens are
// second if by_token, else third.
void rotary(const void* x, int64_t x_batch, int64_t x_second, int64_t x_third, int dtype, const void* cosine,
            int64_t cosine_axis, int64_t cosine_sample, int64_t cosine_row, const void* sine, int64_t sine_axis,
            int64_t sine_sample, int64_t sine_row, int table_dtype, int64_t cosine_step, int64_t sine_step,
            int64_t end_0, int64_t end_1, int64_t end_2, int64_t known, const int64_t* positions,
            int64_t positions_stride, int64_t offset, void* y, int64_t batch, int64_t second, int64_t third,
            int64_t columns, int64_t rotated, bool by_token, bool interleaved, bool inverse, bool full, int threads) {
  const Rows in{x, 0, dtype};
  const Table cosines{cosine, table_dtype, cosine_axis, cosine_sample, cosine_row, cosine_step};
  const Table sines{sine, table_dtype, sine_axis, sine_sample, sine_row, sine_step};
  const DenseOut out{y, columns, dtype};
  const int64_t rows = batch * second * third, pairs = rotated / 2, ends[kAxes] = {end_0, end_1, end_2, pairs};
  const int64_t each = columns > 0 && columns < kPiece ? kPiece / columns : 1;
  const bool parallel = rows * columns >= kParallel;
  constexpr int64_t kFar = int64_t(1) << 62;  // beyond any table, and no sum with an index overflows
  offset = offset > kFar ? kFar : offset < -kFar ? -kFar : offset;
  const Scratch scratch(4 * columns, parallel, threads);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    float* const room = scratch.mine();
    float* const buffer = room + columns;
    float* const angles = buffer + columns;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += each) {
      int64_t sample = first / (second * third), i = first / third % second, j = first % third, held = -1, of = 0;
      const float *c = nullptr, *s = nullptr;
      for (int64_t row = first; row < rows && row < first + each; ++row) {
        const int64_t token = by_token ? i : j;
        const int64_t position = positions ? positions[sample * positions_stride + token] : offset + token;
        const float* const v = in.read({0, 1, sample * x_batch + i * x_second + j * x_third, columns}, room);
        float* const w = out.begin({row, 1, 0, columns}, buffer);
        if (position < 0 || position >= known) {
          for (int64_t k = 0; k < rotated; ++k) w[k] = __builtin_nanf("");
        } else {
          if (position != held || sample != of) {
            c = cosines.read(sample, position, ends, full, interleaved, pairs, angles);
            s = sines.read(sample, position, ends, full, interleaved, pairs, angles + rotated);
            held = position, of = sample;
          }
          if (interleaved) {
            rotate<true>(v, c, s, inverse, full, pairs, w);
          } else {
            rotate<false>(v, c, s, inverse, full, pairs, w);
          }
        }
        for (int64_t k = rotated; k < columns; ++k) w[k] = v[k];
        out.end({row, 1, 0, columns}, w);
        if (++j == third) {
          j = 0;
          if (++i == second) i = 0, ++sample;
        }
      }
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&rotary>::named("rotary"),
    {},
};
