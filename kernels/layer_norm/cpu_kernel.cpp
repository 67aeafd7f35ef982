// layer_norm and rms_norm on the CPU. Inputs are [rows, columns] with strided rows, outputs dense; statistics and
// parameters are float32. A null mean says RMS.
#include <omp.h>

#include "activations.h"
#include "channels.h"
#include "kernel.h"
#include "memory.h"
#include "stream.h"

namespace {

// A vector of parameters, or the same value everywhere in its place.
struct Parameter {
  const Memory<float> own;
  const float* const values;

  Parameter(const float* given, int64_t columns, float otherwise)
      : own(given ? 0 : columns), values(given ? given : own) {
    for (int64_t i = 0; !given && i < columns; ++i) own[i] = otherwise;
  }
};

// A thread's rows of floats: copies of a narrow dtype's, and what is to be streamed. Else float32 is used where it lies.
struct Buffers {
  float* values;
  int64_t columns;
  float* operator[](int64_t k) const { return values ? values + k * columns : nullptr; }
};

// What a norm in a narrow dtype rounds to it on its way: nothing, x-hat, or each step.
enum Casting : int { kWide = 0, kRoundedBeforeWeight = 1, kRoundedThroughout = 2 };

inline float rounded(float x, bool bfloat16) {
  return bfloat16 ? from_bfloat16(to_bfloat16(x)) : from_half(to_half(x));
}

GENAI_FAST_ONCE void round_span(float* x, int64_t count, int dtype) {
  if (dtype == kBFloat16) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] = rounded(x[i], true);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] = rounded(x[i], false);
  }
}

// 1 / sqrt(mean of squares + eps), each step rounded; `room` holds a row.
GENAI_FAST_ONCE float rounded_rstd(const float* v, int64_t columns, float epsilon, int dtype, float* room) {
  const bool bfloat16 = dtype == kBFloat16;
  for (int64_t i = 0; i < columns; ++i) room[i] = v[i] * v[i];
  round_span(room, columns, dtype);
  float sum, unused;
  sum_pairs(columns, [=](int64_t i, float& s, float&) { s += room[i]; }, &sum, &unused);
  const float mean = rounded(sum / float(columns), bfloat16), variance = rounded(mean + epsilon, bfloat16);
  return rounded(1.0f / __builtin_sqrtf(variance), bfloat16);
}

// h = x + residual;  y = (h - mean) rstd weight + bias. Without a residual, h is x and is not written. `casting` of a
// narrow dtype and RMS alone.
void layer_norm(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride, int dtype, void* y,
                void* h, const float* weight, const float* bias, float* mean, float* rstd, int64_t rows,
                int64_t columns, double eps, int casting, int threads) {
  const Rows x_rows{x, x_stride, dtype}, residual_rows{residual, residual_stride, dtype}, h_rows{h, columns, dtype};
  const StreamedOut y_out(y, rows, columns, dtype), h_out(h, rows, columns, dtype);
  const Parameter w(weight, columns, 1.0f), b(bias, columns, 0.0f);
  const float share = 1.0f / float(columns), epsilon = float(eps);
  const bool parallel = rows * columns >= kParallel;
  const Scratch scratch(dtype != kFloat32 || y_out.streamed ? 3 * columns : 0, parallel, threads);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    const Buffers buffers{scratch.mine(), columns};
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const Piece p{row, 1, 0, columns};
      const float* v = x_rows.read(p, buffers[0]);
      if (residual) {
        const float* const added = residual_rows.read(p, buffers[1]);
        float* const sum = h_out.begin(p, buffers[2]);
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) sum[i] = v[i] + added[i];
        h_out.end(p, sum);
        v = dtype == kFloat32 ? sum : h_rows.read(p, buffers[2]);  // rounded, as backward will see it
      }
      float m = 0.0f, rest = 0.0f, squares, unused;
      if (mean) {
        sum_pairs(columns, [=](int64_t i, float& s, float&) { s += v[i]; }, &m, &unused);
        m *= share;
        // Around a mean that is off by its rounding, which is then known too.
        sum_pairs(columns, [=](int64_t i, float& s, float& q) { s += v[i] - m, q += (v[i] - m) * (v[i] - m); }, &rest,
                  &squares);
        rest *= share;
        mean[row] = m + rest;
      } else {
        sum_pairs(columns, [=](int64_t i, float& q, float&) { q += v[i] * v[i]; }, &squares, &unused);
      }
      const float variance = squares * share - rest * rest;
      float r = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + epsilon);  // NaN stays
      float* const out = y_out.begin(p, buffers[1]);
      if (casting == kRoundedThroughout) r = rounded_rstd(v, columns, epsilon, dtype, out);
      rstd[row] = r;
      if (casting != kWide) {
        for (int64_t i = 0; i < columns; ++i) out[i] = v[i] * r;
        round_span(out, columns, dtype);
        for (int64_t i = 0; i < columns; ++i) out[i] *= w.values[i];
        y_out.end(p, out);
        continue;
      }
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) {
        out[i] = multiply_add(((v[i] - m) - rest) * r, w.values[i], b.values[i]);
      }
      y_out.end(p, out);
    }
    streams_done();
  }
}

// dx = rstd (g - mean(g) - x-hat mean(g x-hat)) + dh with g = dy weight, where h's own gradient dh may be null; RMS is
// without mean(g). Sums over the rows of dy x-hat, which is rounded as forward did, and of dy, unless null: chunks of
// rows, then the chunks in order.
void layer_norm_backward(const void* grad_y, int64_t grad_y_stride, const void* grad_h, int64_t grad_h_stride,
                         const void* h, int64_t h_stride, int dtype, void* grad_x, const float* weight,
                         const float* mean, const float* rstd, float* grad_weight, float* grad_bias, int64_t rows,
                         int64_t columns, int casting, int threads) {
  constexpr int64_t kMostRows = 64, kChunks = 32;
  const int64_t each = rows > kMostRows * kChunks ? kMostRows : rows ? (rows + kChunks - 1) / kChunks : 1;
  const int64_t chunks = (rows + each - 1) / each;
  const bool summed = grad_weight || grad_bias, parallel = rows * columns >= kParallel;
  const Memory<float> partials(summed ? 2 * chunks * columns : 0);
  const Rows g_rows{grad_y, grad_y_stride, dtype}, dh_rows{grad_h, grad_h_stride, dtype}, h_rows{h, h_stride, dtype};
  const StreamedOut out(grad_x, rows, columns, dtype);
  const Parameter w(weight, columns, 1.0f);
  const float share = 1.0f / float(columns);
  const Scratch scratch(dtype != kFloat32 || out.streamed ? 4 * columns : 0, parallel, threads);
  with_flag(summed, [&](auto flag) { with_flag(casting != kWide, [&](auto cast) {
    constexpr bool kSummed = decltype(flag)::value, kCast = decltype(cast)::value;
    const bool bfloat16 = dtype == kBFloat16;
#pragma omp parallel num_threads(threads) if (parallel)
    {
      const Buffers buffers{scratch.mine(), columns};
#pragma omp for schedule(static)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        float* const dw = partials + (kSummed ? 2 * chunk * columns : 0);
        float* const db = dw + (kSummed ? columns : 0);
        if (kSummed) std::memset(dw, 0, size_t(2 * columns) * sizeof(float));
        const int64_t end = (chunk + 1) * each < rows ? (chunk + 1) * each : rows;
        for (int64_t row = chunk * each; row < end; ++row) {
          const Piece p{row, 1, 0, columns};
          const float* const g = g_rows.read(p, buffers[0]);
          const float* const v = h_rows.read(p, buffers[1]);
          const float* const weights = w.values;
          const float m = mean ? mean[row] : 0.0f, r = rstd[row];
          float first, second;
          sum_pairs(
              columns,
              [=](int64_t i, float& s, float& q) {
                const float x_hat = (v[i] - m) * r, of_x_hat = g[i] * weights[i];
                s += of_x_hat;
                q += of_x_hat * x_hat;
                if constexpr (kSummed) {
                  dw[i] += g[i] * (kCast ? rounded(x_hat, bfloat16) : x_hat);
                  db[i] += g[i];
                }
              },
              &first, &second);
          first = mean ? first * share : 0.0f;
          second *= share;
          float* const dx = out.begin(p, buffers[2]);
          if (grad_h) {
            const float* const dh = dh_rows.read(p, buffers[3]);
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) {
              dx[i] = multiply_add(r, g[i] * weights[i] - first - (v[i] - m) * r * second, dh[i]);
            }
          } else {
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) dx[i] = r * (g[i] * weights[i] - first - (v[i] - m) * r * second);
          }
          out.end(p, dx);
        }
      }
      streams_done();
    }
  }); });
  if (!summed) return;
  for_channels(columns, parallel, threads, [&](int64_t at, int64_t count) {
    double dw[kLanes] = {}, db[kLanes] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* const partial = partials + 2 * chunk * columns + at;
      for (int64_t i = 0; i < count; ++i) dw[i] += double(partial[i]), db[i] += double(partial[columns + i]);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (grad_weight) grad_weight[at + i] = float(dw[i]);
      if (grad_bias) grad_bias[at + i] = float(db[i]);
    }
  });
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&layer_norm>::named("layer_norm"),
    Entry<&layer_norm_backward>::named("layer_norm_backward"),
    {},
};
