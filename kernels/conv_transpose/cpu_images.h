// What transposed convolutions to few channels and their gradients share: axes, images, memory.
#pragma once
#include "matmul.h"
#include "memory.h"
#include "rows.h"

namespace {

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// One axis of the convolution: input i adds to results i stride - pad + k, k < kernel.
struct Axis {
  int64_t in, out, kernel, stride, pad;
  int64_t taps() const { return up(kernel, stride); }  // inputs that add to one result, at most
};

constexpr int kMostKernel = 6;  // taps of an axis
constexpr int kMostLanes = 16;  // of stride_w Co results side by side: stride 2 and 8 channels
constexpr int64_t kNear = 1 << 17;  // floats of an image that the second-level cache holds

// An input [N, C, H, W] whose channels or pixels lie one beside the other.
struct Image {
  const void* data;
  int dtype;
  int64_t channels, sample, channel, row, pixel;  // extent, then strides
  bool near;                                      // an image lies within kNear

  // Pixels first <= i < first + count of a row as float32: in place, or in `buffer`.
  Strided pixels(int64_t n, int64_t y, int64_t first, int64_t count, float* buffer) const {
    const int64_t at = n * sample + y * row + first * pixel;
    if (dtype == kFloat32) {
      const float* const values = static_cast<const float*>(data) + at;
      if (channel == 1) return Strided::rows(values, pixel);
      if (near) return {values, 1, channel, values + row, 1, channel};
    }
    if (channel == 1) {
      for (int64_t i = 0; i < count; ++i) load_span(data, dtype, at + i * pixel, channels, buffer + i * channels);
      return Strided::rows(buffer, channels);
    }
    // Planes: lines so far apart that they evict each other are read once, and whole.
    for (int64_t c = 0; c < channels; ++c) load_span(data, dtype, at + c * channel, count, buffer + c * count);
    return {buffer, 1, count, buffer, 0, 0};
  }
};

constexpr int64_t kSpan = 64;                   // groups in a tile: bounds what a thread holds
constexpr int64_t kParallelProducts = 1 << 18;  // multiplications worth a second thread

// Raises unless all fits: fixed arrays have room for no larger kernels, and nothing may be divided by 0.
inline void require_extents(int64_t batch, int64_t channels, int64_t few, const Axis& v, const Axis& h) {
  const auto fits = [](const Axis& a) {
    return a.in >= 1 && a.out >= 1 && a.kernel >= 1 && a.kernel <= kMostKernel && a.stride >= 1 && a.pad >= 0;
  };
  if (batch >= 0 && channels >= 1 && few >= 1 && few * h.stride <= kMostLanes && fits(v) && fits(h)) return;
  genai_fast_raise(Raised::kValueError,
                   "x, weight and result: expected at least one channel and pixel each, kernel sizes of 1 to %d and a"
                   " row of the stride of at most %d results, got channels %lld and %lld, pixels %lld x %lld and %lld x"
                   " %lld, kernel %lld x %lld", kMostKernel, kMostLanes, (long long)channels, (long long)few,
                   (long long)v.in, (long long)h.in, (long long)v.out, (long long)h.out, (long long)v.kernel,
                   (long long)h.kernel);
}

}  // namespace
