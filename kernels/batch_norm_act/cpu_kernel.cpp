// batch_norm_act on the CPU. Tensors are dense [outer, channels, inner]; parameters and statistics are float32.
#include <omp.h>

#include "activations.h"
#include "channels.h"
#include "kernel.h"
#include "memory.h"

namespace {

inline float sum_of(float a) { return a; }
inline float sum_of(float a, float b, float c, float d) { return (a + b) + (c + d); }

// f(c, x[r][c] ..) over the rows, four at a time: what it adds to each column is read and written less often.
template <class F>
void over_rows(const float* x, int64_t stride, const Piece& p, F f) {
  int64_t r = 0;
  for (; r + 4 <= p.rows; r += 4, x += 4 * stride) {
#pragma omp simd
    for (int64_t c = 0; c < p.columns; ++c) f(c, x[c], x[c + stride], x[c + 2 * stride], x[c + 3 * stride]);
  }
  for (; r < p.rows; ++r, x += stride) {
#pragma omp simd
    for (int64_t c = 0; c < p.columns; ++c) f(c, x[c]);
  }
}

// The mean is off by the rounding of its sum, so that deviations from it add up to `rest`: this becomes what the mean
// lacks, and the squares those around both together.
inline void correct(float count, float* rest, float* squares) {
  const float share = *rest / count, square = *squares - *rest * share;
  const bool finite = share - share == 0.0f;
  *rest = finite ? share : 0.0f;
  *squares = !finite || square > 0.0f ? square : 0.0f;
}

// Mean, in two numbers, and sum of squared deviations of each channel of one tile, which the caches hold for the second
// look.
void tile_moments(const float* x, int64_t stride, const Piece& p, bool last, int64_t per, float* mean, float* rest,
                  float* squares) {
  if (last) {
    for (int64_t c = 0; c < p.columns; ++c) mean[c] = squares[c] = rest[c] = 0.0f;
    over_rows(x, stride, p, [=](int64_t c, auto... v) { mean[c] += sum_of(v...); });
    const float scale = 1.0f / float(p.rows);
    for (int64_t c = 0; c < p.columns; ++c) mean[c] *= scale;
    over_rows(x, stride, p, [=](int64_t c, auto... v) {
      const float m = mean[c];
      rest[c] += sum_of((v - m)...);
      squares[c] += sum_of((v - m) * (v - m)...);
    });
    for (int64_t c = 0; c < p.columns; ++c) correct(float(p.rows), rest + c, squares + c);
    return;
  }
  for (int64_t r = 0; r < p.rows; ++r, x += stride) {
    float sum, unused;
    sum_pairs(p.columns, [=](int64_t i, float& s, float&) { s += x[i]; }, &sum, &unused);
    const float m = sum / float(p.columns);
    mean[r * per] = m;
    sum_pairs(p.columns, [=](int64_t i, float& s, float& q) { s += x[i] - m, q += (x[i] - m) * (x[i] - m); },
              rest + r * per, squares + r * per);
    correct(float(p.columns), rest + r * per, squares + r * per);
  }
}

// Raises if one of two vectors is absent: an empty one has no address either.
void require_both(const char* names, const float* a, const float* b, int64_t channels) {
  if (!a == !b || channels == 0) return;
  genai_fast_raise(Raised::kValueError, "%s: expected both or neither, got one", names);
}

// mean[c], squares[c] = sum (x - mean)^2, rstd[c] = 1 / sqrt(squares / count + eps); running statistics (or null)
// move by momentum. Tiles are combined in order (Chan, Golub & LeVeque 1983).
void batch_norm_statistics(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner, float* mean,
                           float* squares, float* rstd, float* running_mean, float* running_var, double momentum,
                           double eps, int threads) {
  require_both("running_mean and running_var", running_mean, running_var, channels);
  const Channels shape{outer, channels, inner};
  const Tiles tiles(shape);
  const Rows rows{x, tiles.shape.columns(), dtype};
  const bool parallel = shape.elements() >= kParallel;
  const Memory<float> means(3 * tiles.partials());
  float *const rests = means + tiles.partials(), *const deviations = rests + tiles.partials();
  const auto mean_of = [&](int64_t at) { return double(means[at]) + double(rests[at]); };
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t k = 0; k < tiles.count(); ++k) {
    alignas(64) float buffer[kTile];
    const Piece p = tiles[k];
    const int64_t at = tiles.partial(p);
    int64_t stride;
    const float* const v = rows.view(p, buffer, &stride);
    tile_moments(v, stride, p, tiles.shape.last(), tiles.per, means + at, rests + at, deviations + at);
  }
  const double total = double(outer * inner);
  for_channels(channels, parallel, threads, [&](int64_t first, int64_t count) {
    double m[kLanes] = {}, s[kLanes] = {};
    for (int64_t g = 0; g < tiles.groups; ++g) {
      for (int64_t k = 0; k < tiles.per; ++k) {
        const int64_t at = (g * channels + first) * tiles.per + k;
        const double n = tiles.elements(g, k);
        for (int64_t c = 0; c < count; ++c) m[c] += n * mean_of(at + c * tiles.per);
      }
    }
    for (int64_t c = 0; c < count; ++c) m[c] /= total;
    for (int64_t g = 0; g < tiles.groups; ++g) {
      for (int64_t k = 0; k < tiles.per; ++k) {
        const int64_t at = (g * channels + first) * tiles.per + k;
        const double n = tiles.elements(g, k);
        for (int64_t c = 0; c < count; ++c) {
          const double d = mean_of(at + c * tiles.per) - m[c];
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
}

// What elementwise passes need of each channel: z = (x - mean) scale + shift, and in dx = scale dz + linear (x - mean)
// + constant the last two.
struct Coefficients {
  const Memory<float> mean;
  float *scale, *shift, *linear, *constant;

  // Each channel's stand `repeat` times in a row, for columns of which `repeat` belong to a channel.
  Coefficients(int64_t channels, int64_t repeat, const float* weight, const float* bias, const float* mean_,
               const float* rstd, const float* sum_dz, const float* sum_dz_x_hat, int64_t count)
      : mean(5 * channels * repeat) {
    const int64_t columns = channels * repeat;
    scale = mean + columns, shift = scale + columns, linear = shift + columns, constant = linear + columns;
    const float share = 1.0f / float(count);
    for (int64_t c = 0; c < channels; ++c) {
      const float a = weight ? weight[c] * rstd[c] : rstd[c];
      for (int64_t i = c * repeat; i < (c + 1) * repeat; ++i) {
        mean[i] = mean_[c];
        scale[i] = a;
        shift[i] = bias ? bias[c] : 0.0f;
        linear[i] = sum_dz ? -a * rstd[c] * (sum_dz_x_hat[c] * share) : 0.0f;
        constant[i] = sum_dz ? -a * (sum_dz[c] * share) : 0.0f;
      }
    }
  }
};

// f(Constant<activation>, Constant<channels lie last>).
template <class F>
void specialised(int activation, bool last, F f) {
  with_activation(activation, [&](auto a) { with_flag(last, [&](auto flag) { f(a, flag); }); });
}

void batch_norm_act_apply(const void* x, int dtype, void* y, int64_t outer, int64_t channels, int64_t inner,
                          const float* weight, const float* bias, const float* mean, const float* rstd, int activation,
                          double negative_slope, int threads) {
  const Channels shape{outer, channels, inner};
  const Pieces pieces(shape.rows(), shape.columns());
  const Rows in{x, shape.columns(), dtype};
  const DenseOut out{y, shape.columns(), dtype};
  const Coefficients of(channels, 1, weight, bias, mean, rstd, nullptr, nullptr, 1);
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
  const Rows x_rows{x, tiles.shape.columns(), dtype}, g_rows{grad_y, tiles.shape.columns(), dtype};
  const bool by_column = tiles.shape.last();
  const Coefficients of(channels, by_column ? tiles.per : 1, weight, bias, mean, rstd, nullptr, nullptr, 1);
  const float slope = float(negative_slope);
  const bool parallel = shape.elements() >= kParallel;
  const Memory<float> sums(2 * tiles.partials());
  float* const products = sums + tiles.partials();
  specialised(activation, by_column, [&](auto a, auto last) {
    constexpr bool kLast = decltype(last)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t k = 0; k < tiles.count(); ++k) {
      alignas(64) float x_buffer[kTile], g_buffer[kTile];
      const Piece p = tiles[k];
      int64_t stride;
      const float* v = x_rows.view(p, x_buffer, &stride);
      const float* g = g_rows.view(p, g_buffer, &stride);
      float* s = sums + tiles.partial(p);
      float* q = products + tiles.partial(p);
      if (kLast) {
        for (int64_t i = 0; i < p.columns; ++i) s[i] = q[i] = 0.0f;
      }
      for (int64_t r = 0; r < p.rows; ++r, v += stride, g += stride) {
        const int64_t at = kLast ? p.column : shape.channel_of(p.row + r);
        const Param<kLast> m(of.mean + at), scale(of.scale + at), shift(of.shift + at);
        const float negative = slope;  // Clang does not find it in two lambdas
        const auto add = [=](int64_t i, float& sum, float& product) {
          const float d = v[i] - m[i];
          const float dz = g[i] * derivative<decltype(a)::value>(multiply_add(d, scale[i], shift[i]), negative);
          sum += dz;
          product += dz * d;
        };
        if constexpr (kLast) {
#pragma omp simd
          for (int64_t i = 0; i < p.columns; ++i) add(i, s[i], q[i]);
        } else {
          sum_pairs(p.columns, add, s + r * tiles.per, q + r * tiles.per);
        }
      }
    }
  });
  sum_tiles(tiles, sums, parallel, threads, [&](int64_t c, double total) { sum_dz[c] = float(total); });
  sum_tiles(tiles, products, parallel, threads,
            [&](int64_t c, double total) { sum_dz_x_hat[c] = float(total * double(rstd[c])); });
}

// dx = scale (dz - sum_dz / count - x-hat sum_dz_x_hat / count); null sums: the statistics do not depend on x.
void batch_norm_act_grad(const void* grad_y, const void* x, int dtype, void* grad_x, int64_t outer, int64_t channels,
                         int64_t inner, const float* weight, const float* bias, const float* mean, const float* rstd,
                         const float* sum_dz, const float* sum_dz_x_hat, int64_t count, int activation,
                         double negative_slope, int threads) {
  require_both("sum_dz and sum_dz_x_hat", sum_dz, sum_dz_x_hat, channels);
  const Channels shape{outer, channels, inner};
  const Pieces pieces(shape.rows(), shape.columns());
  const Rows x_rows{x, shape.columns(), dtype}, g_rows{grad_y, shape.columns(), dtype};
  const DenseOut out{grad_x, shape.columns(), dtype};
  const Coefficients of(channels, 1, weight, bias, mean, rstd, sum_dz, sum_dz_x_hat, count);
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
