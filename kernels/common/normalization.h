// Normalization of dense [outer, channels, inner] by channel: moments, y = activate(z + residual) with
// z = (x - mean) scale + shift, and its gradients. Statistics are float32 or wider, all arrays hold [channels].
#pragma once
#include <omp.h>

#include "activations.h"
#include "channels.h"

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
inline void tile_moments(const float* x, int64_t stride, const Piece& p, bool last, int64_t per, float* mean,
                         float* rest, float* squares) {
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

// store(channel, mean, sum of squared deviations) for each channel, in float64. Tiles are combined in order (Chan,
// Golub & LeVeque 1983), so that threads change nothing. `means`: room for 3 floats a partial sum.
template <class Store>
void channel_moments(const void* x, int dtype, const Channels& shape, const Tiles& tiles, float* means, int threads,
                     Store store) {
  const Rows rows{x, tiles.shape.columns(), dtype};
  const bool parallel = shape.elements() >= kParallel;
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
  const double total = double(shape.outer * shape.inner);
  for_channels(shape.channels, parallel, threads, [&](int64_t first, int64_t count) {
    double m[kLanes] = {}, s[kLanes] = {};
    for (int64_t g = 0; g < tiles.groups; ++g) {
      for (int64_t k = 0; k < tiles.per; ++k) {
        const int64_t at = (g * shape.channels + first) * tiles.per + k;
        const double n = tiles.elements(g, k);
        for (int64_t c = 0; c < count; ++c) m[c] += n * mean_of(at + c * tiles.per);
      }
    }
    for (int64_t c = 0; c < count; ++c) m[c] /= total;
    for (int64_t g = 0; g < tiles.groups; ++g) {
      for (int64_t k = 0; k < tiles.per; ++k) {
        const int64_t at = (g * shape.channels + first) * tiles.per + k;
        const double n = tiles.elements(g, k);
        for (int64_t c = 0; c < count; ++c) {
          const double d = mean_of(at + c * tiles.per) - m[c];
          s[c] += double(deviations[at + c * tiles.per]) + n * d * d;
        }
      }
    }
    for (int64_t c = 0; c < count; ++c) store(first + c, m[c], s[c]);
  });
}

// What elementwise passes need of each channel: z = (x - mean) scale + shift, and dx = scale dz + linear (x - mean)
// + constant. linear and constant may be null in a forward pass, slopes are null but of kPrelu.
struct Coefficients {
  const float *mean, *scale, *shift, *linear, *constant, *slopes;
};

// An activation that is not compiled into the loops, but computed where a buffer holds z, as few networks have it after a
// norm: the loops take up to a third longer, and the code does not grow with each activation.
constexpr int kBuffered = -1;

constexpr bool is_buffered(int activation) {
  return activation > kGeluTanh && activation != kRelu6 && activation != kHardswish && activation != kPrelu;
}

// z[i] = activate(z[i]).
GENAI_FAST_ONCE inline void activate_buffer(int activation, float slope, float* z, int64_t count) {
  with_one_of<kElu, kSelu, kSoftplus, kMish>(activation, [=](auto a) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] = activate<decltype(a)::value>(z[i], slope);
  });
}

// z[i] = derivative(z[i]), of any activation.
GENAI_FAST_ONCE inline void derive_buffer(int activation, float slope, float* z, int64_t count) {
  with_activation(activation, [=](auto a) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] = derivative<decltype(a)::value>(z[i], slope);
  });
}

// f(Constant<activation, or kBuffered>, Constant<channels lie last>).
template <class F>
void with_loops(int activation, bool last, F f) {
  with_flag(last, [&](auto by_column) {
    if (is_buffered(activation)) return f(Constant<kBuffered>{}, by_column);
    with_one_of<kNone, kRelu, kLeakyRelu, kTanh, kSigmoid, kSilu, kGelu, kGeluTanh, kRelu6, kHardswish, kPrelu>(
        activation, [&](auto a) { f(a, by_column); });
  });
}

// y = activate(z + residual), or activate(z) + residual if `after`; the residual or null.
inline void normalized(const void* x, const void* residual, bool after, int dtype, void* y, const Channels& shape,
                       const Coefficients& of, int activation, float negative, int threads) {
  const Pieces pieces(shape.rows(), shape.columns());
  const Rows in{x, shape.columns(), dtype}, added{residual, shape.columns(), dtype};
  const DenseOut out{y, shape.columns(), dtype};
  const auto run = [&](auto a, auto last, auto more) {
    constexpr int A = decltype(a)::value;
    constexpr bool kLast = decltype(last)::value, kMore = decltype(more)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (shape.elements() >= kParallel)
    for (int64_t k = 0; k < pieces.count(); ++k) {
      alignas(64) float from[kPiece], to[kPiece], also[kPiece];
      const Piece p = pieces[k];
      const float* v = in.read(p, from);
      const float* b = kMore ? added.read(p, also) : nullptr;
      float* const begin = out.begin(p, to);
      float* w = begin;
      for (int64_t r = 0; r < p.rows; ++r, v += p.columns, w += p.columns) {
        const int64_t at = kLast ? p.column : shape.channel_of(p.row + r);
        const Param<kLast> m(of.mean + at), scale(of.scale + at), shift(of.shift + at);
        const Slope<A == kPrelu, kLast> slope(of.slopes, at, negative);
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) {
          float z = multiply_add(v[i] - m[i], scale[i], shift[i]);
          if constexpr (kMore) z += b[i];
          w[i] = A == kBuffered ? z : activate<A>(z, slope[i]);
        }
        if constexpr (kMore) b += p.columns;
      }
      if constexpr (A == kBuffered) activate_buffer(activation, negative, begin, p.count());
      if (!kMore && residual) {
        b = added.read(p, also);
#pragma omp simd
        for (int64_t i = 0; i < p.count(); ++i) begin[i] += b[i];
      }
      out.end(p, begin);
    }
  };
  with_loops(activation, shape.last(), [&](auto a, auto last) {
    with_flag(residual && !after, [&](auto more) { run(a, last, more); });
  });
}

// What a backward pass finds the derivative with, besides x: nothing, the residual, or y itself.
enum Beside : int { kNothing = 0, kResidual = 1, kOutput = 2 };

// store_dz(channel, sum of dz), store_product(channel, sum of dz (x - mean)) and of kPrelu store_slope(channel, sum of
// grad_y z over z <= 0) for each channel, in float64; dz is grad_y times the derivative, and goes to `dz` if that is not
// null: there must be one beside a residual or y. The coefficients stand `tiles.per` times in a row for each channel
// where `tiles.shape.last()`. `sums`: room for 2 floats a partial sum, of kPrelu for 3. kKeeps: whether dz may be asked for beside nothing, of what takes an exponential.
template <bool kKeeps, class StoreDz, class StoreProduct, class StoreSlope>
void gradient_sums(const void* grad_y, const void* x, const void* beside, Beside kind, int dtype, const Tiles& tiles,
                   const Coefficients& of, int activation, float negative, float* sums, void* dz, int threads,
                   StoreDz store_dz, StoreProduct store_product, StoreSlope store_slope) {
  const Channels shape = tiles.shape;
  const int64_t columns = shape.columns();
  const Rows x_rows{x, columns, dtype}, g_rows{grad_y, columns, dtype}, b_rows{beside, columns, dtype};
  const DenseOut dz_rows{dz, columns, dtype};
  const bool parallel = shape.elements() >= kParallel;
  float *const products = sums + tiles.partials(), *const by_slopes = products + tiles.partials();
  const auto run = [&](auto a, auto last, auto what, auto keep) {
    constexpr int A = decltype(a)::value, kWhat = decltype(what)::value;
    constexpr bool kSlopes = A == kPrelu;
    constexpr bool kLast = decltype(last)::value, kKeep = decltype(keep)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t k = 0; k < tiles.count(); ++k) {
      alignas(64) float x_buffer[kTile], g_buffer[kTile], b_buffer[kWhat ? kTile : 1], dz_buffer[kKeep ? kTile : 1],
          derivatives[A == kBuffered ? kTile : 1];
      const Piece p = tiles[k];
      int64_t stride;
      const float* v = x_rows.view(p, x_buffer, &stride);
      const float* g = g_rows.view(p, g_buffer, &stride);
      const float* b = kWhat ? b_rows.view(p, b_buffer, &stride) : nullptr;
      const auto z_of = [](float d, float scale, float shift, const float* residual, int64_t i) {
        const float z = multiply_add(d, scale, shift);
        return kWhat == kResidual ? z + residual[i] : z;
      };
      if constexpr (A == kBuffered) {
        for (int64_t r = 0; r < p.rows; ++r) {
          const int64_t at = kLast ? p.column : shape.channel_of(p.row + r);
          const Param<kLast> m(of.mean + at), scale(of.scale + at), shift(of.shift + at);
          const float *const row = v + r * stride, *const more = kWhat ? b + r * stride : nullptr;
          float* const to = derivatives + r * p.columns;
#pragma omp simd
          for (int64_t i = 0; i < p.columns; ++i) to[i] = z_of(row[i] - m[i], scale[i], shift[i], more, i);
        }
        derive_buffer(activation, negative, derivatives, p.count());
      }
      float* s = sums + tiles.partial(p);
      float* q = products + tiles.partial(p);
      float* t = kSlopes ? by_slopes + tiles.partial(p) : nullptr;
      if (kLast) {
        for (int64_t i = 0; i < p.columns; ++i) s[i] = q[i] = 0.0f;
        for (int64_t i = 0; kSlopes && i < p.columns; ++i) t[i] = 0.0f;
      }
      for (int64_t r = 0; r < p.rows; ++r, v += stride, g += stride) {
        const int64_t at = kLast ? p.column : shape.channel_of(p.row + r);
        const Param<kLast> m(of.mean + at), scale(of.scale + at), shift(of.shift + at);
        const Piece row{p.row + r, 1, p.column, p.columns};
        float* const u = kKeep ? dz_rows.begin(row, dz_buffer) : nullptr;
        const float* const known = derivatives + (A == kBuffered ? r * p.columns : 0);
        const Slope<kSlopes, kLast> slope(of.slopes, at, negative);
        const auto add = [=](int64_t i, float& sum, float& product) {
          const float d = v[i] - m[i];
          float factor;
          if constexpr (A == kBuffered) {
            factor = known[i];
          } else if constexpr (kWhat == kOutput) {
            factor = derivative_from_output<A>(b[i], slope[i]);
          } else {
            factor = derivative<A>(z_of(d, scale[i], shift[i], b, i), slope[i]);
          }
          const float value = g[i] * factor;
          if constexpr (kKeep) u[i] = value;
          sum += value;
          product += value * d;
        };
        if constexpr (kLast) {
#pragma omp simd
          for (int64_t i = 0; i < p.columns; ++i) add(i, s[i], q[i]);
        } else {
          sum_pairs(p.columns, add, s + r * tiles.per, q + r * tiles.per);
        }
        if constexpr (kSlopes) {  // again, of what the caches hold
          const auto add_slope = [=](int64_t i, float& sum, float&) {
            const float z = z_of(v[i] - m[i], scale[i], shift[i], b, i);
            const float product = g[i] * z;  // always, so that the choice becomes no branch
            sum += z > 0.0f ? 0.0f : product;
          };
          if constexpr (kLast) {
#pragma omp simd
            for (int64_t i = 0; i < p.columns; ++i) add_slope(i, t[i], t[i]);
          } else {
            float unused;
            sum_pairs(p.columns, add_slope, t + r * tiles.per, &unused);
          }
        }
        if constexpr (kWhat) b += stride;
        if constexpr (kKeep) dz_rows.end(row, u);
      }
    }
  };
  constexpr Constant<true> kept{};
  const bool from_y = kind == kOutput && activation != kNone && output_gives_derivative(activation);
  if (kind != kNothing && !from_y) {
    with_flag(shape.last(), [&](auto last) {
      if (activation == kPrelu) return run(Constant<kPrelu>{}, last, Constant<kResidual>{}, kept);
      run(Constant<kBuffered>{}, last, Constant<kResidual>{}, kept);
    });
  } else {
    with_loops(activation, shape.last(), [&](auto a, auto last) {
      constexpr int A = decltype(a)::value;
      if constexpr (A > kNone && output_gives_derivative(A)) {
        if (from_y) return run(a, last, Constant<kOutput>{}, kept);
      }
      if constexpr (kKeeps && (A == kBuffered || takes_exponential(A))) {
        if (dz) return run(a, last, Constant<kNothing>{}, kept);
      }
      run(a, last, Constant<kNothing>{}, Constant<false>{});
    });
  }
  sum_tiles(tiles, sums, parallel, threads, store_dz);
  sum_tiles(tiles, products, parallel, threads, store_product);
  if (activation == kPrelu) sum_tiles(tiles, by_slopes, parallel, threads, store_slope);
}

// dx = scale dz + linear (x - mean) + constant, dz = grad_y times the derivative at z.
inline void input_gradient(const void* grad_y, const void* x, int dtype, void* grad_x, const Channels& shape,
                           const Coefficients& of, int activation, float negative, int threads) {
  const Pieces pieces(shape.rows(), shape.columns());
  const int64_t columns = shape.columns();
  const Rows x_rows{x, columns, dtype}, g_rows{grad_y, columns, dtype};
  const DenseOut out{grad_x, columns, dtype};
  with_loops(activation, shape.last(), [&](auto a, auto last) {
    constexpr int A = decltype(a)::value;
    constexpr bool kLast = decltype(last)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (shape.elements() >= kParallel)
    for (int64_t k = 0; k < pieces.count(); ++k) {
      alignas(64) float x_buffer[kPiece], g_buffer[kPiece], to[kPiece], derivatives[A == kBuffered ? kPiece : 1];
      const Piece p = pieces[k];
      const float* v = x_rows.read(p, x_buffer);
      const float* g = g_rows.read(p, g_buffer);
      float* const begin = out.begin(p, to);
      if constexpr (A == kBuffered) {
        for (int64_t r = 0; r < p.rows; ++r) {
          const int64_t at = kLast ? p.column : shape.channel_of(p.row + r);
          const Param<kLast> m(of.mean + at), scale(of.scale + at), shift(of.shift + at);
          const float* const row = v + r * p.columns;
          float* const z = derivatives + r * p.columns;
#pragma omp simd
          for (int64_t i = 0; i < p.columns; ++i) z[i] = multiply_add(row[i] - m[i], scale[i], shift[i]);
        }
        derive_buffer(activation, negative, derivatives, p.count());
      }
      float* w = begin;
      for (int64_t r = 0; r < p.rows; ++r, v += p.columns, g += p.columns, w += p.columns) {
        const int64_t at = kLast ? p.column : shape.channel_of(p.row + r);
        const Param<kLast> m(of.mean + at), scale(of.scale + at), shift(of.shift + at), linear(of.linear + at),
            constant(of.constant + at);
        const Slope<A == kPrelu, kLast> slope(of.slopes, at, negative);
        const float* const known = derivatives + (A == kBuffered ? r * p.columns : 0);
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) {
          const float d = v[i] - m[i];
          float factor;
          if constexpr (A == kBuffered) {
            factor = known[i];
          } else {
            factor = derivative<A>(multiply_add(d, scale[i], shift[i]), slope[i]);
          }
          w[i] = multiply_add(scale[i], g[i] * factor, multiply_add(linear[i], d, constant[i]));
        }
      }
      out.end(p, begin);
    }
  });
}

}  // namespace
