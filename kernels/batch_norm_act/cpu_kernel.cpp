// batch_norm_act on the CPU. Tensors are dense [outer, channels, inner]; parameters and statistics are float32.
#include <omp.h>

#include "activations.h"
#include "channels.h"
#include "kernel.h"

namespace {

constexpr int64_t kParallel = 16384;  // elements worth a second thread

// Mean and sum of squared deviations of each channel of one tile, which the caches hold for the second look.
void tile_moments(const float* x, const Piece& p, bool last, int64_t per, float* mean, float* squares) {
  if (last) {
    for (int64_t c = 0; c < p.columns; ++c) mean[c] = squares[c] = 0.0f;
    for (int64_t r = 0; r < p.rows; ++r) {
      const float* row = x + r * p.columns;
#pragma omp simd
      for (int64_t c = 0; c < p.columns; ++c) mean[c] += row[c];
    }
    const float scale = 1.0f / float(p.rows);
    for (int64_t c = 0; c < p.columns; ++c) mean[c] *= scale;
    for (int64_t r = 0; r < p.rows; ++r) {
      const float* row = x + r * p.columns;
#pragma omp simd
      for (int64_t c = 0; c < p.columns; ++c) {
        const float d = row[c] - mean[c];
        squares[c] += d * d;
      }
    }
    return;
  }
  for (int64_t r = 0; r < p.rows; ++r, x += p.columns) {
    float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < p.columns; ++i) sum += x[i];
    const float m = sum / float(p.columns);
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < p.columns; ++i) square += (x[i] - m) * (x[i] - m);
    mean[r * per] = m;
    squares[r * per] = square;
  }
}

// mean[c], squares[c] = sum (x - mean)^2, rstd[c] = 1 / sqrt(squares / count + eps); running statistics (or null)
// move by momentum. Tiles are combined in order (Chan, Golub & LeVeque 1983).
void batch_norm_statistics(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner, float* mean,
                           float* squares, float* rstd, float* running_mean, float* running_var, double momentum,
                           double eps, int threads) {
  const Channels shape{outer, channels, inner};
  const Tiles tiles(shape);
  const Rows rows{x, shape.columns(), dtype};
  const bool parallel = shape.elements() >= kParallel;
  float* const means = static_cast<float*>(std::malloc(size_t(2 * tiles.size() + 1) * sizeof(float)));
  float* const deviations = means + tiles.size();
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t k = 0; k < tiles.pieces.count(); ++k) {
    alignas(64) float buffer[kTile];
    const Piece p = tiles.pieces[k];
    const int64_t at = tiles.index(k, p);
    tile_moments(rows.read(p, buffer), p, shape.last(), tiles.per, means + at, deviations + at);
  }
  const double total = double(outer * inner);
  for_channels(channels, parallel, threads, [&](int64_t first, int64_t count) {
    double m[kLanes] = {}, s[kLanes] = {};
    for (int64_t g = 0; g < tiles.groups; ++g) {
      for (int64_t k = 0; k < tiles.per; ++k) {
        const float* tile = means + (g * channels + first) * tiles.per + k;
        const double n = tiles.count(g, k);
        for (int64_t c = 0; c < count; ++c) m[c] += n * double(tile[c * tiles.per]);
      }
    }
    for (int64_t c = 0; c < count; ++c) m[c] /= total;
    for (int64_t g = 0; g < tiles.groups; ++g) {
      for (int64_t k = 0; k < tiles.per; ++k) {
        const int64_t at = (g * channels + first) * tiles.per + k;
        const double n = tiles.count(g, k);
        for (int64_t c = 0; c < count; ++c) {
          const double d = double(means[at + c * tiles.per]) - m[c];
          s[c] += double(deviations[at + c * tiles.per]) + n * d * d;
        }
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = first + c;
      mean[at] = float(m[c]);
      squares[at] = float(s[c]);
      rstd[at] = float(1.0 / __builtin_sqrt(s[c] / total + eps));
      if (running_mean) {
        running_mean[at] = float((1.0 - momentum) * double(running_mean[at]) + momentum * m[c]);
        running_var[at] = float((1.0 - momentum) * double(running_var[at]) + momentum * s[c] / (total - 1.0));
      }
    }
  });
  std::free(means);
}

// What elementwise passes need of each channel: z = (x - mean) scale + shift, and in dx = scale dz + linear (x - mean)
// + constant the last two.
struct Coefficients {
  float *mean, *scale, *shift, *linear, *constant;

  Coefficients(int64_t channels, const float* weight, const float* bias, const float* mean_, const float* rstd,
               const float* sum_dz, const float* sum_dz_x_hat, int64_t count) {
    mean = static_cast<float*>(std::malloc(size_t(5 * channels + 1) * sizeof(float)));
    scale = mean + channels, shift = scale + channels, linear = shift + channels, constant = linear + channels;
    const float share = 1.0f / float(count);
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = mean_[c];
      scale[c] = weight ? weight[c] * rstd[c] : rstd[c];
      shift[c] = bias ? bias[c] : 0.0f;
      linear[c] = sum_dz ? -scale[c] * rstd[c] * (sum_dz_x_hat[c] * share) : 0.0f;
      constant[c] = sum_dz ? -scale[c] * (sum_dz[c] * share) : 0.0f;
    }
  }
  Coefficients(const Coefficients&) = delete;
  ~Coefficients() { std::free(mean); }
};

// f(Constant<activation>, Constant<channels lie last>).
template <class F>
void specialised(int activation, bool last, F f) {
  with_activation(activation, [&](auto a) {
    if (last) {
      f(a, Constant<true>{});
    } else {
      f(a, Constant<false>{});
    }
  });
}

void batch_norm_act_apply(const void* x, int dtype, void* y, int64_t outer, int64_t channels, int64_t inner,
                          const float* weight, const float* bias, const float* mean, const float* rstd, int activation,
                          double negative_slope, int threads) {
  const Channels shape{outer, channels, inner};
  const Pieces pieces(shape.rows(), shape.columns());
  const Rows in{x, shape.columns(), dtype};
  const DenseOut out{y, shape.columns(), dtype};
  const Coefficients of(channels, weight, bias, mean, rstd, nullptr, nullptr, 1);
  const float slope = float(negative_slope);
  specialised(activation, shape.last(), [&](auto a, auto last) {
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
        const Param<kLast> m(of.mean + at), scale(of.scale + at), shift(of.shift + at);
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) {
          w[i] = activate<decltype(a)::value>(multiply_add(v[i] - m[i], scale[i], shift[i]), slope);
        }
      }
      out.end(p, begin);
    }
  });
}

void batch_norm_act_reduce(const void* grad_y, const void* x, int dtype, int64_t outer, int64_t channels,
                           int64_t inner, const float* weight, const float* bias, const float* mean, const float* rstd,
                           float* sum_dz, float* sum_dz_x_hat, int activation, double negative_slope, int threads) {
  const Channels shape{outer, channels, inner};
  const Tiles tiles(shape);
  const Rows x_rows{x, shape.columns(), dtype}, g_rows{grad_y, shape.columns(), dtype};
  const Coefficients of(channels, weight, bias, mean, rstd, nullptr, nullptr, 1);
  const float slope = float(negative_slope);
  const bool parallel = shape.elements() >= kParallel;
  float* const sums = static_cast<float*>(std::malloc(size_t(2 * tiles.size() + 1) * sizeof(float)));
  float* const products = sums + tiles.size();
  specialised(activation, shape.last(), [&](auto a, auto last) {
    constexpr bool kLast = decltype(last)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t k = 0; k < tiles.pieces.count(); ++k) {
      alignas(64) float x_buffer[kTile], g_buffer[kTile];
      const Piece p = tiles.pieces[k];
      const float* v = x_rows.read(p, x_buffer);
      const float* g = g_rows.read(p, g_buffer);
      float* s = sums + tiles.index(k, p);
      float* q = products + tiles.index(k, p);
      if (kLast) {
        for (int64_t i = 0; i < p.columns; ++i) s[i] = q[i] = 0.0f;
      }
      for (int64_t r = 0; r < p.rows; ++r, v += p.columns, g += p.columns) {
        const int64_t at = kLast ? p.column : shape.channel_of(p.row + r);
        const Param<kLast> m(of.mean + at), scale(of.scale + at), shift(of.shift + at);
        if constexpr (kLast) {
#pragma omp simd
          for (int64_t i = 0; i < p.columns; ++i) {
            const float d = v[i] - m[i];
            const float dz = g[i] * derivative<decltype(a)::value>(multiply_add(d, scale[i], shift[i]), slope);
            s[i] += dz;
            q[i] += dz * d;
          }
        } else {
          float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
          for (int64_t i = 0; i < p.columns; ++i) {
            const float d = v[i] - m[i];
            const float dz = g[i] * derivative<decltype(a)::value>(multiply_add(d, scale[i], shift[i]), slope);
            sum += dz;
            product += dz * d;
          }
          s[r * tiles.per] = sum;
          q[r * tiles.per] = product;
        }
      }
    }
  });
  for_channels(channels, parallel, threads, [&](int64_t first, int64_t count) {
    double s[kLanes] = {}, q[kLanes] = {};
    for (int64_t g = 0; g < tiles.groups; ++g) {
      for (int64_t k = 0; k < tiles.per; ++k) {
        const int64_t at = (g * channels + first) * tiles.per + k;
        for (int64_t c = 0; c < count; ++c) {
          s[c] += double(sums[at + c * tiles.per]);
          q[c] += double(products[at + c * tiles.per]);
        }
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      sum_dz[first + c] = float(s[c]);
      sum_dz_x_hat[first + c] = float(q[c] * double(rstd[first + c]));
    }
  });
  std::free(sums);
}

// dx = scale (dz - sum_dz / count - x-hat sum_dz_x_hat / count); null sums: the statistics do not depend on x.
void batch_norm_act_grad(const void* grad_y, const void* x, int dtype, void* grad_x, int64_t outer, int64_t channels,
                         int64_t inner, const float* weight, const float* bias, const float* mean, const float* rstd,
                         const float* sum_dz, const float* sum_dz_x_hat, int64_t count, int activation,
                         double negative_slope, int threads) {
  const Channels shape{outer, channels, inner};
  const Pieces pieces(shape.rows(), shape.columns());
  const Rows x_rows{x, shape.columns(), dtype}, g_rows{grad_y, shape.columns(), dtype};
  const DenseOut out{grad_x, shape.columns(), dtype};
  const Coefficients of(channels, weight, bias, mean, rstd, sum_dz, sum_dz_x_hat, count);
  const float slope = float(negative_slope);
  specialised(activation, shape.last(), [&](auto a, auto last) {
    constexpr bool kLast = decltype(last)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (shape.elements() >= kParallel)
    for (int64_t k = 0; k < pieces.count(); ++k) {
      alignas(64) float x_buffer[kPiece], g_buffer[kPiece], to[kPiece];
      const Piece p = pieces[k];
      const float* v = x_rows.read(p, x_buffer);
      const float* g = g_rows.read(p, g_buffer);
      float* const begin = out.begin(p, to);
      float* w = begin;
      for (int64_t r = 0; r < p.rows; ++r, v += p.columns, g += p.columns, w += p.columns) {
        const int64_t at = kLast ? p.column : shape.channel_of(p.row + r);
        const Param<kLast> m(of.mean + at), scale(of.scale + at), shift(of.shift + at), linear(of.linear + at),
            constant(of.constant + at);
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) {
          const float d = v[i] - m[i];
          const float dz = g[i] * derivative<decltype(a)::value>(multiply_add(d, scale[i], shift[i]), slope);
          w[i] = multiply_add(scale[i], dz, multiply_add(linear[i], d, constant[i]));
        }
      }
      out.end(p, begin);
    }
  });
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&batch_norm_statistics>::named("batch_norm_statistics"),
    Entry<&batch_norm_act_apply>::named("batch_norm_act_apply"),
    Entry<&batch_norm_act_reduce>::named("batch_norm_act_reduce"),
    Entry<&batch_norm_act_grad>::named("batch_norm_act_grad"),
    {},
};
