// bias_act on the CPU. Tensors are dense [outer, channels, inner]; the bias is float32, or null beside one channel.
#include <omp.h>

#include "activations.h"
#include "channels.h"
#include "kernel.h"
#include "memory.h"

namespace {

constexpr float kNoBias = 0.0f;

// y = activate(x + bias[c]).
void bias_act(const void* x, int dtype, void* y, int64_t outer, int64_t channels, int64_t inner, const float* bias,
              int activation, double negative_slope, int threads) {
  const Channels shape{outer, channels, inner};
  const Pieces pieces(shape.rows(), shape.columns());
  const Rows in{x, shape.columns(), dtype};
  const DenseOut out{y, shape.columns(), dtype};
  const float slope = float(negative_slope);
  if (!bias) bias = &kNoBias;
  with_activation(activation, [&](auto a) {
    with_flag(shape.last(), [&](auto last) {
      constexpr bool kLast = decltype(last)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (shape.elements() >= kParallel)
      for (int64_t k = 0; k < pieces.count(); ++k) {
        alignas(64) float from[kPiece], to[kPiece];
        const Piece p = pieces[k];
        const float* v = in.read(p, from);
        float* const begin = out.begin(p, to);
        float* w = begin;
        for (int64_t r = 0; r < p.rows; ++r, v += p.columns, w += p.columns) {
          const Param<kLast> b(bias + (kLast ? p.column : shape.channel_of(p.row + r)));
#pragma omp simd
          for (int64_t i = 0; i < p.columns; ++i) w[i] = activate<decltype(a)::value>(v[i] + b[i], slope);
        }
        out.end(p, begin);
      }
    });
  });
}

// dx = dy act'(x + bias), or from `saved` = y;  grad_bias[c] = sum of dx, if it is not null.
void bias_act_backward(const void* grad_y, const void* saved, int dtype, void* grad_x, float* grad_bias, int64_t outer,
                       int64_t channels, int64_t inner, const float* bias, bool from_output, int activation,
                       double negative_slope, int threads) {
  const Channels shape{outer, channels, inner};
  const Tiles tiles(shape, 2 * kTile, 1024);
  const bool by_column = tiles.shape.last();
  const int64_t columns = tiles.shape.columns(), repeat = by_column ? tiles.per : 1;
  const Rows g_rows{grad_y, columns, dtype}, s_rows{saved, columns, dtype};
  const DenseOut out{grad_x, columns, dtype};
  const float slope = float(negative_slope);
  const bool parallel = shape.elements() >= kParallel;
  const Memory<float> shift(channels * repeat);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = c * repeat; i < (c + 1) * repeat; ++i) shift[i] = bias ? bias[c] : 0.0f;
  }
  const Memory<float> sums(tiles.partials());
  with_derivative(activation, from_output, [&](auto a, auto output) {
    with_flag(by_column, [&](auto last) {
      constexpr bool kLast = decltype(last)::value, kOutput = decltype(output)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
      for (int64_t k = 0; k < tiles.count(); ++k) {
        alignas(64) float g_buffer[kTile], s_buffer[kTile], to[kTile];
        const Piece p = tiles[k];
        float* const sum = sums + tiles.partial(p);
        if constexpr (kLast) {
          for (int64_t i = 0; i < p.columns; ++i) sum[i] = 0.0f;
        }
        for (int64_t r = 0; r < p.rows; ++r) {
          const Piece row{p.row + r, 1, p.column, p.columns};
          const float* const g = g_rows.read(row, g_buffer);
          const float* const v = s_rows.read(row, s_buffer);
          float* const w = out.begin(row, to);
          const Param<kLast> b(shift + (kLast ? p.column : shape.channel_of(row.row)));
          const float negative = slope;  // Clang does not find it in two lambdas
          const auto add = [=](int64_t i, float& total) {
            const float z = kOutput ? v[i] : v[i] + b[i];
            w[i] = g[i] * derivative_from<decltype(a)::value, kOutput>(z, negative);
            total += w[i];
          };
          if constexpr (kLast) {
#pragma omp simd
            for (int64_t i = 0; i < p.columns; ++i) add(i, sum[i]);
          } else {
            float unused;  // a simd reduction of relu and leaky_relu is not vectorized by GCC 12: seven times as long
            sum_pairs(p.columns, [=](int64_t i, float& s, float&) { add(i, s); }, sum + r * tiles.per, &unused);
          }
          out.end(row, w);
        }
      }
    });
  });
  if (grad_bias) {
    sum_tiles(tiles, sums, parallel, threads, [&](int64_t c, double total) { grad_bias[c] = float(total); });
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&bias_act>::named("bias_act"),
    Entry<&bias_act_backward>::named("bias_act_backward"),
    {},
};
