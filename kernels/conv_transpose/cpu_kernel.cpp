// Transposed convolution to few channels on the CPU, with bias and activation.
//
// A row of pixels times all weights, [W, Ci] x [Ci, KH KW Co], gives what each pixel adds to its neighbourhood of the
// result: its shares. A row of the result is a sum of shares of the few rows around it, which stay in the cache.
#include <omp.h>

#include "activations.h"
#include "cpu_gradients.h"
#include "cpu_images.h"
#include "kernel.h"

namespace {

// The stride_w Co results one beside the other that take shares of the same pixels: a group. It fills some of L lanes.
template <int L>
struct Lanes {
  using Floats __attribute__((vector_size(4 * L))) = float;
  using FloatsAt __attribute__((vector_size(4 * L), aligned(4), may_alias)) = float;
  using Bits __attribute__((vector_size(4 * L))) = int32_t;
};

constexpr int kMostParts = kMostKernel * kMostKernel;  // of a sum

// What sums to groups: part i of group g lies at from[i] + g step. Of the first `cut` parts only `partial` lanes count.
struct Parts {
  const float* from[kMostParts];
  int64_t count, cut, partial, step;
};

// to[g group + lane] = bias[lane] + sum of parts. Lanes beyond the group are overwritten by the next. N parts, 0: any.
template <int L, int N>
__attribute__((noinline)) void add_parts(const Parts& parts, int64_t group, const float* bias, int64_t count,
                                         float* to) {
  using Floats = typename Lanes<L>::Floats;
  using FloatsAt = typename Lanes<L>::FloatsAt;
  using Bits = typename Lanes<L>::Bits;
  const int64_t n = N ? N : parts.count;
  const float* from[N ? N : kMostParts];
  Bits mask[N ? N : kMostParts];
  for (int64_t i = 0; i < n; ++i) {
    from[i] = parts.from[i];
    for (int lane = 0; lane < L; ++lane) mask[i][lane] = i < parts.cut && lane >= parts.partial ? 0 : -1;
  }
  const Floats start = *reinterpret_cast<const FloatsAt*>(bias);
  for (int64_t g = 0; g < count; ++g) {
    Floats sum = start;
    for (int64_t i = 0; i < n; ++i) {
      const Floats part = *reinterpret_cast<const FloatsAt*>(from[i] + g * parts.step);
      sum += reinterpret_cast<Floats>(reinterpret_cast<Bits>(part) & mask[i]);
    }
    *reinterpret_cast<FloatsAt*>(to + g * group) = sum;
  }
}

template <int L>
void add_parts(const Parts& parts, int64_t group, const float* bias, int64_t count, float* to) {
  switch (parts.count) {
    case 1: return add_parts<L, 1>(parts, group, bias, count, to);
    case 2: return add_parts<L, 2>(parts, group, bias, count, to);
    case 3: return add_parts<L, 3>(parts, group, bias, count, to);
    case 4: return add_parts<L, 4>(parts, group, bias, count, to);
    case 6: return add_parts<L, 6>(parts, group, bias, count, to);
    case 9: return add_parts<L, 9>(parts, group, bias, count, to);
    default: return add_parts<L, 0>(parts, group, bias, count, to);
  }
}

// packed [Ci, KH, KW, Co], each channel's in whole vectors, of weights [Ci, Co, KH, KW] of any strides.
void pack_weights(const float* weight, int64_t channels, int64_t few, int64_t height, int64_t width,
                  int64_t channel_stride, int64_t few_stride, int64_t row_stride, int64_t column_stride,
                  float* packed) {
  const int64_t columns = whole_vectors(height * width * few);
  for (int64_t c = 0; c < channels; ++c) {
    float* to = packed + c * columns;
    for (int64_t ky = 0; ky < height; ++ky) {
      for (int64_t kx = 0; kx < width; ++kx) {
        const float* const from = weight + c * channel_stride + ky * row_stride + kx * column_stride;
        for (int64_t f = 0; f < few; ++f) *to++ = from[f * few_stride];
      }
    }
    while (to < packed + (c + 1) * columns) *to++ = 0.0f;
  }
}

void conv_transpose(const void* x, int dtype, int64_t x_sample, int64_t x_channel, int64_t x_row, int64_t x_pixel,
                    const float* weight, int64_t w_channel, int64_t w_few, int64_t w_row, int64_t w_column,
                    const float* bias, void* y, int64_t batch, int64_t channels, int64_t few, int64_t height,
                    int64_t width, int64_t out_height, int64_t out_width, int64_t kernel_height, int64_t kernel_width,
                    int64_t stride_height, int64_t stride_width, int64_t pad_height, int64_t pad_width, int activation,
                    double negative_slope, int threads) {
  const Axis v{height, out_height, kernel_height, stride_height, pad_height};
  const Axis h{width, out_width, kernel_width, stride_width, pad_width};
  require_extents(batch, channels, few, v, h);
  const Image image{x, dtype, channels, x_sample, x_channel, x_row, x_pixel, channels * x_channel <= kNear};
  const DenseOut out{y, h.out * few, dtype};  // channels last, a row of pixels in one
  const float slope = float(negative_slope);
  const int64_t row_columns = h.kernel * few, columns = whole_vectors(v.kernel * row_columns);
  const int64_t group = h.stride * few, partial = row_columns - (h.taps() - 1) * group;
  const Memory<float> packed(channels * columns);
  pack_weights(weight, channels, few, v.kernel, h.kernel, w_channel, w_few, w_row, w_column, packed);
  float lane_bias[kMostLanes] = {};
  for (int64_t i = 0; bias && i < group; ++i) lane_bias[i] = bias[i % few];

  // A task is a tile of a band of rows of a sample; one sample may have to do for all threads.
  const int64_t out_groups = up(h.out, h.stride), tiles = up(out_groups, kSpan), span = up(out_groups, tiles);
  const int64_t band = batch * tiles < 8 * threads ? most(up(v.out, threads), 8) : most(v.out, 1);
  const int64_t bands = up(v.out, band);
  const int64_t pixels = span + h.taps(), slot = pixels * columns;
  const bool parallel = batch * height * width * channels * columns >= kParallelProducts;
  const int64_t of_input = in_lines(pixels * channels), of_shares = in_lines(v.taps() * slot);
  const int64_t of_sums = in_lines((span + 1) * group);
  const Scratch scratch(of_input + of_shares + of_sums + span * group, parallel, threads);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    float* const input = scratch.mine();
    float* const shares = input + of_input;  // row y in slot y % taps
    float* const sums = shares + of_shares;
    float* const buffer = sums + of_sums;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * bands * tiles; ++task) {
      const int64_t n = task / (bands * tiles), first_row = task / tiles % bands * band;
      const int64_t first = task % tiles * span * h.stride, count = least(span * h.stride, h.out - first);
      const int64_t first_group = (first + h.pad) / h.stride;
      const int64_t groups = (first + h.pad + count - 1) / h.stride - first_group + 1;
      // The tile takes `all` pixels from `begin` on. Those from `lower` to `upper` exist, the others' shares are 0.
      const int64_t begin = first_group - (h.taps() - 1), all = groups + h.taps() - 1;
      const int64_t lower = least(most(-begin, 0), all), upper = most(least(h.in - begin, all), lower);
      int64_t next = 0;
      for (int64_t row = first_row; row < least(first_row + band, v.out); ++row) {
        const int64_t at = row + v.pad, from = most(up(at - v.kernel + 1, v.stride), 0);
        const int64_t to = least(at / v.stride, v.in - 1);
        for (next = most(next, from); next <= to; ++next) {
          float* const share = shares + next % v.taps() * slot;
          for (int64_t i = 0; i < lower * columns; ++i) share[i] = 0.0f;
          for (int64_t i = upper * columns; i < all * columns; ++i) share[i] = 0.0f;
          const Strided a = image.pixels(n, next, begin + lower, upper - lower, input);
          multiply({a, channels, packed, columns, share + lower * columns, columns, false}, upper - lower, columns);
        }
        Parts parts{{}, 0, partial < group ? to - from + 1 : 0, partial, columns};
        for (int64_t tap = h.taps() - 1; tap >= 0; --tap) {
          for (int64_t y_in = from; y_in <= to; ++y_in) {
            parts.from[parts.count++] = shares + y_in % v.taps() * slot + (h.taps() - 1 - tap) * columns +
                                        (at - y_in * v.stride) * row_columns + tap * group;
          }
        }
        (group <= 8 ? add_parts<8> : add_parts<16>)(parts, group, lane_bias, groups, sums);
        const float* const values = sums + (first + h.pad - first_group * h.stride) * few;
        const Piece piece{n * v.out + row, 1, first * few, count * few};
        float* const results = out.begin(piece, buffer);
        with_activation(activation, [&](auto a) {
#pragma omp simd
          for (int64_t i = 0; i < count * few; ++i) results[i] = activate<decltype(a)::value>(values[i], slope);
        });
        out.end(piece, results);
      }
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&conv_transpose>::named("conv_transpose"),
    Entry<&conv_transpose_grad_input>::named("conv_transpose_grad_input"),
    Entry<&conv_transpose_grad_weight>::named("conv_transpose_grad_weight"),
    {},
};
