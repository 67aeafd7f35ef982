// Gradients of the transposed convolution to few channels. A pixel of x added to a patch [KH, KW, Co] of the result:
// with the patches of a row of pixels as a matrix, both gradients are products of matrices that stay in the cache.
#pragma once
#include <omp.h>

#include "channels.h"
#include "cpu_images.h"

namespace {

// The patches of grad_y, dense [N, OH, OW, Co], for kSpan pixels at most. Its rows are kept for the next row of x.
class Patches {
 public:
  // `memory` has room(few, v, h) floats.
  Patches(const void* grad_y, int dtype, int64_t few, const Axis& v, const Axis& h, float* memory)
      : grad_y_(grad_y), dtype_(dtype), few_(few), v_(v), h_(h), stride_(row(few, h)), rows_(memory),
        values_(memory + in_lines(v.kernel * stride_)) {}

  static int64_t room(int64_t few, const Axis& v, const Axis& h) {
    return in_lines(v.kernel * row(few, h)) + in_lines(kSpan * whole_vectors(v.kernel * h.kernel * few));
  }

  int64_t columns() const { return whole_vectors(v_.kernel * h_.kernel * few_); }

  // [rows][count][KH, KW, Co, nothing of worth up to a whole vector]: of pixels from `first` on in rows from y on of
  // sample n of x, kSpan at most.
  const float* read(int64_t n, int64_t y, int64_t rows, int64_t first, int64_t count) {
    for (int64_t r = 0; r < rows; ++r) read_row(n, y + r, first, count, values_ + r * count * columns());
    return values_;
  }

 private:
  static int64_t row(int64_t few, const Axis& h) { return ((kSpan - 1) * h.stride + h.kernel) * few; }

  void read_row(int64_t n, int64_t y, int64_t first, int64_t count, float* values) {
    if (n != sample_ || first != first_ || y != y_ + 1) next_ = 0;
    sample_ = n, first_ = first, y_ = y;
    const int64_t begin = y * v_.stride, width = h_.kernel * few_;
    for (next_ = most(next_, begin); next_ < begin + v_.kernel; ++next_) fill(next_, first, count);
    const float* rows[kMostKernel];
    for (int64_t ky = 0; ky < v_.kernel; ++ky) rows[ky] = rows_ + (begin + ky) % v_.kernel * stride_;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t ky = 0; ky < v_.kernel; ++ky) {
        const float* const from = rows[ky] + i * h_.stride * few_;
        float* const to = values + i * columns() + ky * width;
        // Whole vectors: what is too much is overwritten by what comes after it.
        for (int64_t j = 0; j < width; j += kWidth) {
          *reinterpret_cast<VectorAt*>(to + j) = *reinterpret_cast<const VectorAt*>(from + j);
          asm volatile("" ::: "memory");  // or GCC calls memcpy for a few bytes
        }
      }
    }
  }

  // Row `at` of the padded plane, as far as the patches reach; zeros outside grad_y.
  void fill(int64_t at, int64_t first, int64_t count) {
    float* const to = rows_ + at % v_.kernel * stride_;
    const int64_t row = at - v_.pad, begin = first * h_.stride - h_.pad, all = (count - 1) * h_.stride + h_.kernel;
    const bool exists = row >= 0 && row < v_.out;
    const int64_t lower = exists ? least(most(-begin, 0), all) : all, upper = most(least(h_.out - begin, all), lower);
    for (int64_t i = 0; i < lower * few_; ++i) to[i] = 0.0f;
    for (int64_t i = upper * few_; i < all * few_; ++i) to[i] = 0.0f;
    if (lower == upper) return;
    const int64_t from = ((sample_ * v_.out + row) * h_.out + begin + lower) * few_;
    load_span(grad_y_, dtype_, from, (upper - lower) * few_, to + lower * few_);
  }

  const void* grad_y_;
  int dtype_;
  int64_t few_;
  Axis v_, h_;
  const int64_t stride_;
  float *const rows_, *const values_;
  int64_t sample_ = -1, first_ = -1, y_ = -1, next_ = 0;
};

// grad_x [N, H, W, Ci], dense, = patches x weight [KH, KW, Co, Ci], whose rows have room for whole vectors.
void conv_transpose_grad_input(const void* grad_y, int dtype, const float* weight, int64_t weight_row, void* grad_x,
                               int64_t batch, int64_t channels, int64_t few, int64_t height, int64_t width,
                               int64_t out_height, int64_t out_width, int64_t kernel_height, int64_t kernel_width,
                               int64_t stride_height, int64_t stride_width, int64_t pad_height, int64_t pad_width,
                               int threads) {
  const Axis v{height, out_height, kernel_height, stride_height, pad_height};
  const Axis h{width, out_width, kernel_width, stride_width, pad_width};
  require_extents(batch, channels, few, v, h);
  const int64_t columns = whole_vectors(channels), depth = v.kernel * h.kernel * few;
  const bool in_place = dtype == kFloat32 && columns == channels;
  const int64_t tiles = up(width, kSpan), span = up(width, tiles);
  const int64_t band = batch * tiles < 8 * threads ? most(up(height, threads), 4) : height, bands = up(height, band);
  const bool parallel = batch * height * width * channels * depth >= kParallelProducts;
  const int64_t patches_room = Patches::room(few, v, h);
  const Scratch scratch(patches_room + span * columns, parallel, threads);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    Patches patches(grad_y, dtype, few, v, h, scratch.mine());
    float* const buffer = scratch.mine() + patches_room;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * bands * tiles; ++task) {
      const int64_t n = task / (bands * tiles), first_row = task / tiles % bands * band;
      const int64_t first = task % tiles * span, count = least(span, width - first);
      for (int64_t y = first_row; y < least(first_row + band, height); ++y) {
        const int64_t at = ((n * height + y) * width + first) * channels;
        float* const to = in_place ? static_cast<float*>(grad_x) + at : buffer;
        const float* const a = patches.read(n, y, 1, first, count);
        multiply({{a, patches.columns(), 1, a, 0, 0}, depth, weight, weight_row, to, columns, false}, count, columns);
        for (int64_t i = 0; !in_place && i < count; ++i) {
          float* const values = buffer + i * columns;
          if (dtype == kFloat32) {
            std::memcpy(static_cast<float*>(grad_x) + at + i * channels, values, size_t(channels) * 4);
          } else {
            store_span(grad_x, dtype, at + i * channels, channels, values);
          }
        }
      }
    }
  }
}

constexpr int64_t kChunks = 32;  // sums that can be taken at a time, whatever the number of threads

// grad_weight[Ci, KH, KW, Co] = x^T x patches: a sum for each chunk of rows, then the sum of these in order.
void conv_transpose_grad_weight(const void* grad_y, int dtype, const void* x, int64_t x_sample, int64_t x_channel,
                                int64_t x_row, int64_t x_pixel, float* grad_weight, int64_t batch, int64_t channels,
                                int64_t few, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                                int64_t kernel_height, int64_t kernel_width, int64_t stride_height,
                                int64_t stride_width, int64_t pad_height, int64_t pad_width, int threads) {
  const Axis v{height, out_height, kernel_height, stride_height, pad_height};
  const Axis h{width, out_width, kernel_width, stride_width, pad_width};
  require_extents(batch, channels, few, v, h);
  const Image image{x, dtype, channels, x_sample, x_channel, x_row, x_pixel, channels * x_channel <= kNear};
  const int64_t used = v.kernel * h.kernel * few, columns = whole_vectors(used), sum = channels * columns;
  const int64_t tiles = up(width, kSpan), span = up(width, tiles);
  const int64_t rows = batch * height, chunk = most(up(rows, kChunks), 1), chunks = up(rows, chunk);
  const bool parallel = rows * width * channels * columns >= kParallelProducts;
  const bool joined = width <= kSpan && image.row == width * image.pixel;  // several rows count as one
  const Memory<float> sums(chunks * sum);
  const int64_t patches_room = Patches::room(few, v, h);
  const Scratch scratch(patches_room + kSpan * channels, parallel, threads);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    Patches patches(grad_y, dtype, few, v, h, scratch.mine());
    float* const input = scratch.mine() + patches_room;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < chunks; ++k) {
      std::memset(sums + k * sum, 0, size_t(sum) * 4);
      const int64_t end = least((k + 1) * chunk, rows);
      for (int64_t first = 0; first < width; first += span) {
        const int64_t count = least(span, width - first);
        for (int64_t row = k * chunk, taken; row < end; row += taken) {
          const int64_t n = row / height, y = row % height;
          taken = joined ? least(least(kSpan / width, height - y), end - row) : 1;
          const Strided p = image.pixels(n, y, first, taken * count, input);
          const Strided a{p.data, p.column, p.row, p.data + taken * image.row, p.column, p.row};
          const float* const b = patches.read(n, y, taken, first, count);
          multiply({a, taken * count, b, columns, sums + k * sum, columns, true}, channels, columns);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t first = 0; first < used; first += kLanes) {
        const int64_t count = least(kLanes, used - first);
        double total[kLanes] = {};
        for (int64_t k = 0; k < chunks; ++k) {
          const float* const values = sums + k * sum + c * columns + first;
          for (int64_t i = 0; i < count; ++i) total[i] += double(values[i]);
        }
        for (int64_t i = 0; i < count; ++i) grad_weight[c * used + first + i] = float(total[i]);
      }
    }
  }
}

}  // namespace
