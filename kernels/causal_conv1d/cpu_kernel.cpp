// causal_conv1d on the CPU. Sequences are [N, L, C], channels last: a tap is a matrix product of rows that lie so many
// positions before those of the result, and needs no copy of them.
#include <omp.h>

#include "activations.h"
#include "channels.h"
#include "kernel.h"
#include "matmul.h"
#include "memory.h"
#include "team.h"

namespace {

enum Act : int { kPlain = 0, kSwish = 1, kGated = 2 };  // layout.ACTIVATIONS

constexpr int64_t kLongest = 192;  // positions of a tile

// [N, L, C] with unit stride along the channels, or along the positions.
struct Sequences {
  const void* data;
  int64_t sample, position, channel;
  int dtype;

  bool direct() const { return dtype == kFloat32 && channel == 1; }

  // Rows first .. first + count - 1 of sample n, columns from `column` on, as float32 `row` apart: in place if they are,
  // else in `buffer`, whose rows are `columns` long.
  const float* view(int64_t n, int64_t first, int64_t count, int64_t column, int64_t columns, float* buffer,
                    int64_t* row) const {
    *row = columns;
    if (direct()) {
      *row = position;
      return static_cast<const float*>(data) + n * sample + first * position + column;
    }
    read(n, first, count, column, columns, buffer, columns);
    return buffer;
  }

  GENAI_FAST_ONCE void read(int64_t n, int64_t first, int64_t count, int64_t column, int64_t columns, float* buffer,
                            int64_t row) const {
    const int64_t start = n * sample + first * position + column * channel;
    if (channel == 1) {
      for (int64_t r = 0; r < count; ++r) load_span(data, dtype, start + r * position, columns, buffer + r * row);
      return;
    }
    // Turned by blocks of channels, so that a line of the buffer is written while it is in the cache.
    constexpr int64_t kChannels = 16;
    float lines[kChannels][kLongest];
    for (int64_t c = 0; c < columns; c += kChannels) {
      const int64_t some = least(kChannels, columns - c);
      for (int64_t i = 0; i < some; ++i) load_span(data, dtype, start + (c + i) * channel, count, lines[i]);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < some; ++i) buffer[r * row + c + i] = lines[i][r];
      }
    }
  }
};

// Results [N L, columns] as they are asked for.
struct Out {
  void* data;
  int64_t columns;
  int dtype;
  void store(int64_t row, const float* values) const {
    if (dtype == kFloat32) {
      std::memcpy(static_cast<float*>(data) + row * columns, values, size_t(columns) * sizeof(float));
    } else {
      store_span(data, dtype, row * columns, columns, values);
    }
  }
};

constexpr int64_t kPositions = 96;  // of a tile: whole blocks of 6 and of 8 rows

// The rows first .. first + count - 1 of a tile that a tap reaches, and the position where it begins to read.
struct Reach {
  int64_t first = 0, count = 0, from = 0;
};

// Of a tile of positions at, at + 1, ..: looking back by `shift` positions, or ahead.
Reach reach_of(int64_t at, int64_t positions, int64_t length, int64_t shift, bool ahead) {
  const int64_t first = ahead || at >= shift ? 0 : least(positions, shift - at);
  const int64_t last = ahead ? least(positions, length - shift - at) : positions;
  return {first, last > first ? last - first : 0, ahead ? at + shift : at + first - shift};
}

template <int A>
void finish(const float* z, int64_t columns, float* y) {
  if constexpr (A == kGated) {
    const int64_t half = columns / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) y[i] = tanh_fast(z[i]) * sigmoid(z[half + i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) y[i] = A == kSwish ? activate<kSilu>(z[i], 0.0f) : z[i];
  }
}

// z[l] = sum over the taps k of x[l -+ (K - 1 - k) dilation] weight[k] + bias + condition; y = act(z), and z itself if it
// is asked for. weight [K, C, padded(columns)]; `ahead`: the taps look ahead (the gradient of x).
void causal_conv1d(const void* x, int64_t x_sample, int64_t x_position, int64_t x_channel, int dtype,
                   const float* weight, const float* bias, const void* condition, int64_t condition_sample, int64_t condition_position,
                   void* y, void* z, int64_t batch, int64_t length, int64_t channels, int64_t columns, int64_t kernel,
                   int64_t dilation, bool ahead, int activation, int threads) {
  const Sequences in{x, x_sample, x_position, x_channel, dtype};
  const Sequences given{condition, condition_sample, condition_position, 1, dtype};
  const int64_t wide = padded(columns), half = activation == kGated ? columns / 2 : columns;
  const int64_t tiles = (length + kPositions - 1) / kPositions, all = batch * tiles;
  const bool parallel = batch * length * columns * channels * kernel >= 8 * kParallel && all > 1;
  const Out out{y, half, dtype}, kept{z, columns, dtype};
  const Scratch scratch(kPositions * (wide + channels) + in_lines(columns), parallel, threads);
  with_one_of<kPlain, kSwish, kGated>(activation, [&](auto a) {
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t item = 0; item < all; ++item) {
      const int64_t n = item / tiles, at = item % tiles * kPositions, positions = least(kPositions, length - at);
      float* const sums = scratch.mine();
      float* const buffer = sums + kPositions * wide;
      float* const line = buffer + kPositions * channels;
      for (int64_t r = 0; r < positions; ++r) {
        float* const s = sums + r * wide;
        if (bias) {
          std::memcpy(s, bias, size_t(columns) * sizeof(float));
        } else {
          std::memset(s, 0, size_t(columns) * sizeof(float));
        }
        for (int64_t i = columns; i < wide; ++i) s[i] = 0.0f;
        if (condition) {
          int64_t row;
          const float* const c = given.view(n, at + r, 1, 0, columns, line, &row);
#pragma omp simd
          for (int64_t i = 0; i < columns; ++i) s[i] += c[i];
        }
      }
      for (int64_t k = kernel - 1; k >= 0; --k) {
        const Reach reach = reach_of(at, positions, length, (kernel - 1 - k) * dilation, ahead);
        if (reach.count == 0) continue;
        int64_t row;
        const float* const rows = in.view(n, reach.from, reach.count, 0, channels, buffer, &row);
        multiply({Strided::rows(rows, row), channels, weight + k * channels * wide, wide, sums + reach.first * wide,
                  wide, true},
                 reach.count, wide);
      }
      for (int64_t r = 0; r < positions; ++r) {
        const int64_t to = n * length + at + r;
        float* const direct = dtype == kFloat32 ? static_cast<float*>(y) + to * half : line;
        finish<decltype(a)::value>(sums + r * wide, columns, direct);
        if (direct == line) out.store(to, line);
        if (z) kept.store(to, sums + r * wide);
      }
    }
  });
}

constexpr int64_t kTogether = kLongest;  // positions whose products with dz are added up while both are in the cache

// gradient [K, columns, padded(channels)]: sum over all positions of dz[l, i] x[l - (K - 1 - k) dilation, j]. The
// positions are cut into `groups` parts, whose sums are added in order, so that threads change no bit.
void causal_conv1d_grad_weight(const void* grad_z, int64_t z_sample, int64_t z_position, int64_t z_channel,
                               const void* x, int64_t x_sample, int64_t x_position, int64_t x_channel, int dtype,
                               float* gradient, int64_t batch, int64_t length, int64_t channels, int64_t columns,
                               int64_t kernel, int64_t dilation, int64_t groups, int threads) {
  const Sequences in{x, x_sample, x_position, x_channel, dtype}, dz{grad_z, z_sample, z_position, z_channel, dtype};
  const int64_t wide = padded(channels), size = columns * wide;
  const int64_t tiles = (length + kTogether - 1) / kTogether, all = batch * tiles;
  const bool parallel = batch * length * columns * channels * kernel >= 8 * kParallel;
  const Memory<float> sums(groups * kernel * size);
  const Scratch scratch(kTogether * (columns + wide), parallel, threads);
  // Whole vectors of x are read. Only those that lie so, with a row after the last, can be read where they are.
  const bool direct = in.direct() && channels == wide;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (parallel)
  for (int64_t k = 0; k < kernel; ++k) {
    for (int64_t g = 0; g < groups; ++g) {
      float* const to = sums + (g * kernel + k) * size;
      std::memset(to, 0, size_t(size) * sizeof(float));
      float *const dz_buffer = scratch.mine(), *const x_buffer = dz_buffer + kTogether * columns;
      for (int64_t item = all * g / groups; item < all * (g + 1) / groups; ++item) {
        const int64_t n = item / tiles, at = item % tiles * kTogether, positions = least(kTogether, length - at);
        const Reach reach = reach_of(at, positions, length, (kernel - 1 - k) * dilation, false);
        if (reach.count == 0) continue;
        int64_t dz_row, x_row = wide;
        const float* const d = dz.view(n, at + reach.first, reach.count, 0, columns, dz_buffer, &dz_row);
        const float* seen = x_buffer;
        if (direct) {
          seen = in.view(n, reach.from, reach.count, 0, channels, x_buffer, &x_row);
        } else {
          in.read(n, reach.from, reach.count, 0, channels, x_buffer, wide);
          for (int64_t r = 0; r < reach.count; ++r) {
            for (int64_t i = channels; i < wide; ++i) x_buffer[r * wide + i] = 0.0f;
          }
        }
        multiply({{d, 1, dz_row, d, 1, dz_row}, reach.count, seen, x_row, to, wide, true}, columns, wide);
      }
    }
  }
  for_channels(kernel * size, parallel, threads, [&](int64_t first, int64_t count) {
    double total[kLanes] = {};
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < count; ++i) total[i] += double(sums[g * kernel * size + first + i]);
    }
    for (int64_t i = 0; i < count; ++i) gradient[first + i] = float(total[i]);
  });
}

// dz [rows, 2 half] of y = tanh(a) sigmoid(b), z = (a, b) dense; sums [2 half] over the rows, or null.
void causal_conv1d_gate_backward(const void* grad_y, int64_t y_row, const void* z, int dtype, void* grad_z,
                                 float* sums, int64_t rows, int64_t half, int threads) {
  constexpr int64_t kPart = 1024;
  const Tiles tiles({rows, half, 1}, 2 * kTile, kPart);
  const Rows dys{grad_y, y_row, dtype}, as{z, 2 * half, dtype};
  const DenseOut out{grad_z, 2 * half, dtype};
  const bool parallel = rows * half >= kParallel;
  const int64_t partials = sums ? tiles.partials() : 0;
  const Memory<float> partial(2 * partials);
  with_flag(sums != nullptr, [&](auto summed) {
    constexpr bool kSummed = decltype(summed)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t item = 0; item < tiles.count(); ++item) {
      alignas(64) float dy_buffer[kPart], a_buffer[kPart], b_buffer[kPart], da_buffer[kPart], db_buffer[kPart];
      const Piece p = tiles[item];
      float* const a_sum = partial + (kSummed ? tiles.partial(p) : 0);
      float* const b_sum = a_sum + partials;
      for (int64_t i = 0; kSummed && i < p.columns; ++i) a_sum[i] = b_sum[i] = 0.0f;
      for (int64_t r = 0; r < p.rows; ++r) {
        const Piece first{p.row + r, 1, p.column, p.columns}, second{p.row + r, 1, half + p.column, p.columns};
        const float* const dy = dys.read(first, dy_buffer);
        const float* const a = as.read(first, a_buffer);
        const float* const b = as.read(second, b_buffer);
        float* const da = out.begin(first, da_buffer);
        float* const db = out.begin(second, db_buffer);
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) {
          const float t = tanh_fast(a[i]), s = sigmoid(b[i]), dys_ = dy[i] * s;
          const float of_a = dys_ * (1.0f - t * t), of_b = dys_ * t * (1.0f - s);
          da[i] = of_a;
          db[i] = of_b;
          if constexpr (kSummed) {
            a_sum[i] += of_a;
            b_sum[i] += of_b;
          }
        }
        out.end(first, da);
        out.end(second, db);
      }
    }
  });
  for (int64_t h = 0; sums && h < 2; ++h) {
    float* const to = sums + h * half;
    sum_tiles(tiles, partial + h * partials, parallel, threads, [=](int64_t c, double total) { to[c] = float(total); });
  }
}

constexpr int64_t kRowsEach = 64, kWide = 256;  // positions and channels of a tile of the depthwise convolution

// A tile of [N, L, C] and the rows that each of K taps sees of it, with zeros beyond the ends.
template <int K>
struct Taps {
  const float* rows[K];
  int64_t stride[K];
  Reach reach[K];
  const float* zeros;

  const float* row(int k, int64_t r) const {
    const int64_t from = r - reach[k].first;
    return from < 0 || from >= reach[k].count ? zeros : rows[k] + from * stride[k];
  }
};

template <int K>
Taps<K> taps_of(const Sequences& in, int64_t n, int64_t at, int64_t positions, int64_t length, int64_t dilation,
                bool ahead, int64_t column, int64_t columns, float* buffer, const float* zeros) {
  Taps<K> taps{};
  taps.zeros = zeros;
  for (int k = 0; k < K; ++k) {
    const Reach r = taps.reach[k] = reach_of(at, positions, length, (K - 1 - k) * dilation, ahead);
    taps.rows[k] = in.view(n, r.from, r.count, column, columns, buffer + k * kRowsEach * kWide, &taps.stride[k]);
  }
  return taps;
}

// How [N, L, C] is cut: by channels, then samples, then positions.
struct Cut {
  int64_t batch, length, channels, tiles, across;
  Cut(int64_t batch_, int64_t length_, int64_t channels_)
      : batch(batch_), length(length_), channels(channels_), tiles((length_ + kRowsEach - 1) / kRowsEach),
        across((channels_ + kWide - 1) / kWide) {}
  int64_t count() const { return across * batch * tiles; }
  int64_t n(int64_t item) const { return item / tiles % batch; }
  int64_t at(int64_t item) const { return item % tiles * kRowsEach; }
  int64_t positions(int64_t item) const { return least(kRowsEach, length - at(item)); }
  int64_t column(int64_t item) const { return item / tiles / batch * kWide; }
  int64_t columns(int64_t item) const { return least(kWide, channels - column(item)); }
};

// y[l, c] = act(sum over the taps of x[l -+ (K - 1 - k) dilation, c] weight[k, c] + bias[c]); weight [K, C].
void depthwise(const Sequences& in, const float* weight, const float* bias, void* y, int to_dtype, const Cut& cut,
               int64_t kernel, int64_t dilation, bool ahead, bool swish, int threads) {
  const bool parallel = cut.batch * cut.length * cut.channels >= kParallel;
  const int64_t tap_buffers = in.direct() ? 0 : kernel * kRowsEach * kWide;
  const Scratch scratch(tap_buffers + 2 * kWide, parallel, threads);
  with_one_of<1, 2, 3, 4>(int(kernel), [&](auto taps_) {
    with_flag(swish, [&](auto swished) {
      constexpr int K = decltype(taps_)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
      for (int64_t item = 0; item < cut.count(); ++item) {
        const int64_t n = cut.n(item), at = cut.at(item), column = cut.column(item), columns = cut.columns(item);
        float *const line = scratch.mine(), *const zeros = line + kWide;
        std::memset(zeros, 0, size_t(kWide) * sizeof(float));
        const Taps<K> taps = taps_of<K>(in, n, at, cut.positions(item), cut.length, dilation, ahead, column, columns,
                                        zeros + kWide, zeros);
        for (int64_t r = 0; r < cut.positions(item); ++r) {
          const int64_t to = (n * cut.length + at + r) * cut.channels + column;
          float* const out = to_dtype == kFloat32 ? static_cast<float*>(y) + to : line;
          const float *x[K], *w[K];
          for (int k = 0; k < K; ++k) x[k] = taps.row(k, r), w[k] = weight + k * cut.channels + column;
#pragma omp simd
          for (int64_t i = 0; i < columns; ++i) {
            float z = bias ? bias[column + i] : 0.0f;
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) z += x[k][i] * w[k][i];
            out[i] = decltype(swished)::value ? activate<kSilu>(z, 0.0f) : z;
          }
          if (out == line) store_span(y, to_dtype, to, columns, line);
        }
      }
    });
  });
}

void depthwise_causal_conv1d(const void* x, int64_t x_sample, int64_t x_position, int64_t x_channel, int dtype,
                             const float* weight, const float* bias, void* y, int64_t batch, int64_t length, int64_t channels,
                             int64_t kernel, int64_t dilation, int activation, int threads) {
  depthwise({x, x_sample, x_position, x_channel, dtype}, weight, bias, y, dtype, Cut(batch, length, channels), kernel, dilation,
            false, activation == kSwish, threads);
}

// dz = dy act'(z) goes to memory of its own; its products with what each tap sees are summed on the way. Then dx is the
// same convolution of dz, looking ahead. sums [K + 1, C]: the weight's gradient, then the bias's.
void depthwise_causal_conv1d_backward(const void* grad_y, int64_t y_sample, int64_t y_position, int64_t y_channel,
                                      const void* x, int64_t x_sample, int64_t x_position, int64_t x_channel, int dtype,
                                      const float* weight, const float* bias, void* grad_x, float* sums, int64_t batch,
                                      int64_t length, int64_t channels, int64_t kernel, int64_t dilation,
                                      int activation, int threads) {
  const Sequences in{x, x_sample, x_position, x_channel, dtype}, dys{grad_y, y_sample, y_position, y_channel, dtype};
  const Cut cut(batch, length, channels);
  const bool parallel = batch * length * channels >= kParallel, swish = activation == kSwish;
  const Memory<float> dz(swish ? batch * length * channels : 0), partial((kernel + 1) * cut.count() * kWide);
  const int64_t buffers = in.direct() && dys.direct() ? 0 : (kernel + 1) * kRowsEach * kWide;
  const Scratch scratch(buffers + kWide, parallel, threads);
  with_one_of<1, 2, 3, 4>(int(kernel), [&](auto taps_) {
    with_flag(swish, [&](auto swished) {
      constexpr int K = decltype(taps_)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
      for (int64_t item = 0; item < cut.count(); ++item) {
        const int64_t n = cut.n(item), at = cut.at(item), column = cut.column(item), columns = cut.columns(item);
        float *const zeros = scratch.mine(), *const buffer = zeros + kWide;
        std::memset(zeros, 0, size_t(kWide) * sizeof(float));
        float* const sum = partial + item * (K + 1) * kWide;
        std::memset(sum, 0, size_t((K + 1) * kWide) * sizeof(float));
        const Taps<K> taps =
            taps_of<K>(in, n, at, cut.positions(item), length, dilation, false, column, columns, buffer, zeros);
        int64_t dy_row;
        const float* dy = dys.view(n, at, cut.positions(item), column, columns, buffer + K * kRowsEach * kWide, &dy_row);
        for (int64_t r = 0; r < cut.positions(item); ++r, dy += dy_row) {
          float* const to = dz + (decltype(swished)::value ? (n * length + at + r) * channels + column : 0);
          const float *s[K], *w[K];
          for (int k = 0; k < K; ++k) s[k] = taps.row(k, r), w[k] = weight + k * channels + column;
#pragma omp simd
          for (int64_t i = 0; i < columns; ++i) {
            float d = dy[i];
            if constexpr (decltype(swished)::value) {
              float z = bias ? bias[column + i] : 0.0f;
#pragma GCC unroll 4
              for (int k = 0; k < K; ++k) z += s[k][i] * w[k][i];
              d *= derivative<kSilu>(z, 0.0f);
              to[i] = d;
            }
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) sum[k * kWide + i] += d * s[k][i];
            sum[K * kWide + i] += d;
          }
        }
      }
    });
  });
  const int64_t each = batch * cut.tiles;  // items of the same channels
  static_assert(kWide % kLanes == 0, "channels that are added together are of one tile");
  for_channels(channels, parallel, threads, [&](int64_t first, int64_t count) {
    for (int64_t k = 0; k <= kernel; ++k) {
      const float* of_item = partial + (first / kWide * each * (kernel + 1) + k) * kWide + first % kWide;
      double total[kLanes] = {};
      for (int64_t j = 0; j < each; ++j, of_item += (kernel + 1) * kWide) {
        for (int64_t i = 0; i < count; ++i) total[i] += double(of_item[i]);
      }
      for (int64_t i = 0; i < count; ++i) sums[k * channels + first + i] = float(total[i]);
    }
  });
  if (swish) {
    const Sequences of_z{dz, length * channels, channels, 1, kFloat32};
    depthwise(of_z, weight, nullptr, grad_x, dtype, cut, kernel, dilation, true, false, threads);
  } else {
    depthwise(dys, weight, nullptr, grad_x, dtype, cut, kernel, dilation, true, false, threads);
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&causal_conv1d>::named("causal_conv1d"),
    Entry<&causal_conv1d_grad_weight>::named("causal_conv1d_grad_weight"),
    Entry<&causal_conv1d_gate_backward>::named("causal_conv1d_gate_backward"),
    Entry<&depthwise_causal_conv1d>::named("depthwise_causal_conv1d"),
    Entry<&depthwise_causal_conv1d_backward>::named("depthwise_causal_conv1d_backward"),
    {},
};
