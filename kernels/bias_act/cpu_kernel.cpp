// bias_act on the CPU. Tensors are dense [outer, channels, inner]; the bias is float32, or null beside one channel.
#include <omp.h>

#include "activations.h"
#include "channels.h"
#include "kernel.h"
#include "memory.h"

namespace {

// f(Constant<A>) for the activation of that code.
template <class F>
void with_any_activation(int activation, F f) {
  if (activation == kPrelu) return f(Constant<kPrelu>{});
  with_activation(activation, f);
}

// y = activate(x + bias[c]); slopes [channels] of kPrelu, else null.
void bias_act(const void* x, int dtype, void* y, int64_t outer, int64_t channels, int64_t inner, const float* bias,
              const float* slopes, int activation, double negative_slope, int threads) {
  const Channels shape{outer, channels, inner};
  const Pieces pieces(shape.rows(), shape.columns());
  const Rows in{x, shape.columns(), dtype};
  const DenseOut out{y, shape.columns(), dtype};
  const float negative = float(negative_slope);
  const Memory<float> none(bias ? 0 : channels);
  if (!bias) {
    for (int64_t c = 0; c < channels; ++c) none[c] = 0.0f;
    bias = none;
  }
  with_any_activation(activation, [&](auto a) {
    constexpr int A = decltype(a)::value;
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
          const int64_t at = kLast ? p.column : shape.channel_of(p.row + r);
          const Param<kLast> b(bias + at);
          const Slope<A == kPrelu, kLast> slope(slopes, at, negative);
#pragma omp simd
          for (int64_t i = 0; i < p.columns; ++i) w[i] = activate<A>(v[i] + b[i], slope[i]);
        }
        out.end(p, begin);
      }
    });
  });
}

// dx = dy act'(x + bias), or from `saved` = y; grad_bias[c] = sum of dx, and of kPrelu grad_slopes[c] = sum of dy z over
// z <= 0, if they are not null.
void bias_act_backward(const void* grad_y, const void* saved, int dtype, void* grad_x, float* grad_bias,
                       float* grad_slopes, int64_t outer, int64_t channels, int64_t inner, const float* bias,
                       const float* slopes, bool from_output, int activation, double negative_slope, int threads) {
  const Channels shape{outer, channels, inner};
  const Tiles tiles(shape, 2 * kTile, 1024);
  const bool by_column = tiles.shape.last();
  const int64_t columns = tiles.shape.columns(), repeat = by_column ? tiles.per : 1;
  const Rows g_rows{grad_y, columns, dtype}, s_rows{saved, columns, dtype};
  const DenseOut out{grad_x, columns, dtype};
  const float negative = float(negative_slope);
  const bool parallel = shape.elements() >= kParallel;
  const Memory<float> shift(channels * repeat), spread(slopes ? channels * repeat : 0);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = c * repeat; i < (c + 1) * repeat; ++i) {
      shift[i] = bias ? bias[c] : 0.0f;
      if (slopes) spread[i] = slopes[c];
    }
  }
  const Memory<float> sums(tiles.partials()), products(slopes ? tiles.partials() : 0);
  const auto run = [&](auto a, auto output) {
    with_flag(by_column, [&](auto last) {
      constexpr int A = decltype(a)::value;
      constexpr bool kLast = decltype(last)::value, kOutput = decltype(output)::value, kSlopes = A == kPrelu;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
      for (int64_t k = 0; k < tiles.count(); ++k) {
        alignas(64) float g_buffer[kTile], s_buffer[kTile], to[kTile];
        const Piece p = tiles[k];
        float *const sum = sums + tiles.partial(p), *const below = products + (kSlopes ? tiles.partial(p) : 0);
        if constexpr (kLast) {
          for (int64_t i = 0; i < p.columns; ++i) sum[i] = 0.0f;
          for (int64_t i = 0; kSlopes && i < p.columns; ++i) below[i] = 0.0f;
        }
        for (int64_t r = 0; r < p.rows; ++r) {
          const Piece row{p.row + r, 1, p.column, p.columns};
          const float* const g = g_rows.read(row, g_buffer);
          const float* const v = s_rows.read(row, s_buffer);
          float* const w = out.begin(row, to);
          const int64_t at = kLast ? p.column : shape.channel_of(row.row);
          const Param<kLast> b(shift + at);
          const Slope<kSlopes, kLast> slope(spread, at, negative);
          const auto add = [=](int64_t i, float& total, float&) {
            const float z = kOutput ? v[i] : v[i] + b[i];
            w[i] = g[i] * derivative_from<A, kOutput>(z, slope[i]);
            total += w[i];
          };
          const auto add_slope = [=](int64_t i, float& total, float&) {
            const float z = v[i] + b[i], product = g[i] * z;  // always, so that the choice becomes no branch
            total += z > 0.0f ? 0.0f : product;
          };
          if constexpr (kLast) {
#pragma omp simd
            for (int64_t i = 0; i < p.columns; ++i) add(i, sum[i], sum[i]);
#pragma omp simd
            for (int64_t i = 0; i < (kSlopes ? p.columns : 0); ++i) add_slope(i, below[i], below[i]);
          } else {
            float unused;  // a simd reduction of relu and leaky_relu is not vectorized by GCC 12: seven times as long
            sum_pairs(p.columns, add, sum + r * tiles.per, &unused);
            if constexpr (kSlopes) sum_pairs(p.columns, add_slope, below + r * tiles.per, &unused);
          }
          out.end(row, w);
        }
      }
    });
  };
  if (activation == kPrelu) {
    run(Constant<kPrelu>{}, Constant<false>{});
  } else {
    with_derivative(activation, from_output, run);
  }
  if (grad_bias) {
    sum_tiles(tiles, sums, parallel, threads, [&](int64_t c, double total) { grad_bias[c] = float(total); });
  }
  if (grad_slopes) {
    sum_tiles(tiles, products, parallel, threads, [&](int64_t c, double total) { grad_slopes[c] = float(total); });
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&bias_act>::named("bias_act"),
    Entry<&bias_act_backward>::named("bias_act_backward"),
    {},
};
