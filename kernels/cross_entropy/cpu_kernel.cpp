// cross_entropy on the CPU. Rows of logits lie dense; where each begins, a layout of two strides says (layout.py).
#include <omp.h>

#include "kernel.h"
#include "math.h"
#include "rows.h"

namespace {

enum Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

constexpr int kLanes = 16;
using Lanes __attribute__((vector_size(4 * kLanes))) = float;
using LanesAt __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = float;  // anywhere in memory

constexpr float kLowest = -__builtin_inff();

// The largest; NaN does not count.
inline float largest(const float* x, int64_t count) {
  Lanes a, b;
  for (int k = 0; k < kLanes; ++k) a[k] = b[k] = kLowest;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Lanes u = *reinterpret_cast<const LanesAt*>(x + i), v = *reinterpret_cast<const LanesAt*>(x + i + kLanes);
    a = u > a ? u : a;
    b = v > b ? v : b;
  }
  a = b > a ? b : a;
  float most = kLowest;
  for (int k = 0; k < kLanes; ++k) most = a[k] > most ? a[k] : most;
  for (; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

inline float sum_of(const float* x, int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

// sum of e^(x - shift)
inline float sum_of_exp(const float* x, int64_t count, float shift) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += exp_fast(x[i] - shift);
  return sum;
}

// Rows of `classes` numbers.
struct Matrix {
  const void* data;
  int dtype;
  int64_t inner, outer_stride, inner_stride;

  int64_t begin(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }

  // `count` numbers from element `first` on as float32: in place, or copied to `buffer`.
  const float* read(int64_t first, int64_t count, float* buffer) const {
    if (dtype == kFloat32) return static_cast<const float*>(data) + first;
    load_span(data, dtype, first, count, buffer);
    return buffer;
  }
  float at(int64_t element) const {
    float value;
    if (dtype == kFloat32) return static_cast<const float*>(data)[element];
    load_span(data, dtype, element, 1, &value);
    return value;
  }
};

struct Row {
  float largest, log_sum;  // lse = largest + log_sum: apart, so that x - lse is exact where logits are large
  double sum;              // of the logits, if asked for
};

// One pass over a row: each block is read from memory once, and again from the first-level cache.
inline Row reduce(const Matrix& x, int64_t begin, int64_t classes, bool with_sum) {
  alignas(64) float buffer[kPiece];
  float most = kLowest;
  double total = 0.0, sum = 0.0;
  for (int64_t first = 0; first < classes; first += kPiece) {
    const int64_t count = classes - first < kPiece ? classes - first : kPiece;
    const float* const v = x.read(begin + first, count, buffer);
    const float here = largest(v, count), now = here > most ? here : most;
    if (now > most) total *= double(exp_fast(most - now));
    most = now;
    // Nothing but -inf and NaN so far: any finite number serves, and NaN stays.
    total += double(sum_of_exp(v, count, most == kLowest ? 0.0f : most));
    if (with_sum) sum += double(sum_of(v, count));
  }
  return {most, float(__builtin_log(total)), sum};
}

void cross_entropy(const void* logits, int dtype, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                   const int64_t* target, float* loss, float* lse, float* count, int64_t rows, int64_t classes,
                   int64_t ignore_index, double label_smoothing, double z_loss, int reduction, int threads) {
  const Matrix x{logits, dtype, inner, outer_stride, inner_stride};
  float* const of_row =
      reduction == kNone ? loss : static_cast<float*>(std::malloc(size_t(rows + 1) * sizeof(float)));
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * classes >= kParallel)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = target[row];
    if (t == ignore_index) {
      of_row[row] = lse[row] = lse[rows + row] = 0.0f;
      continue;
    }
    const int64_t begin = x.begin(row);
    const Row r = reduce(x, begin, classes, label_smoothing != 0.0);
    const double most = double(r.largest), z = most + double(r.log_sum);
    double value = __builtin_nan("");  // for a target that is no class
    if (t >= 0 && t < classes) {
      value = (1.0 - label_smoothing) * (most - double(x.at(begin + t))) + double(r.log_sum);
      if (label_smoothing != 0.0) value += label_smoothing * (most - r.sum / double(classes));
      if (z_loss != 0.0) value += z_loss * z * z;
    }
    of_row[row] = float(value);
    lse[row] = r.largest;
    lse[rows + row] = r.log_sum;
  }
  if (reduction == kNone) return;
  double sum = 0.0;
  int64_t counted = 0;
  for (int64_t row = 0; row < rows; ++row) sum += double(of_row[row]), counted += target[row] != ignore_index;
  if (count) *count = float(counted);
  *loss = float(reduction == kMean ? sum / double(counted) : sum);
  std::free(of_row);
}

// dx = g ((1 + 2 z lse) e^(x - lse) - e / V - (1 - e) [i == target]), which may be written over x.
void cross_entropy_backward(const float* grad_loss, int64_t grad_loss_stride, const void* logits, int dtype,
                            int64_t inner, int64_t outer_stride, int64_t inner_stride, const int64_t* target,
                            const float* lse, const float* count, void* grad, int64_t grad_inner,
                            int64_t grad_outer_stride, int64_t grad_inner_stride, int64_t rows, int64_t classes,
                            int64_t ignore_index, double label_smoothing, double z_loss, int threads) {
  const Matrix x{logits, dtype, inner, outer_stride, inner_stride};
  const Matrix out{grad, dtype, grad_inner, grad_outer_stride, grad_inner_stride};
  const int64_t size = dtype == kFloat32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * classes >= kParallel)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = target[row], from = x.begin(row), to = out.begin(row);
    if (t == ignore_index) {
      std::memset(static_cast<char*>(grad) + to * size, 0, size_t(classes * size));
      continue;
    }
    const float most = lse[row], log_sum = lse[rows + row];
    double g = double(grad_loss[row * grad_loss_stride]) / (count ? double(*count) : 1.0);
    if (t < 0 || t >= classes) g = __builtin_nan("");
    const float factor = float(g * (1.0 + 2.0 * z_loss * (double(most) + double(log_sum))));
    const float share = float(g * label_smoothing / double(classes)), hit = float(g * (1.0 - label_smoothing));
    alignas(64) float from_buffer[kPiece], to_buffer[kPiece];
    for (int64_t first = 0; first < classes; first += kPiece) {
      const int64_t columns = classes - first < kPiece ? classes - first : kPiece;
      const float* const v = x.read(from + first, columns, from_buffer);
      float* const w = dtype == kFloat32 ? static_cast<float*>(grad) + to + first : to_buffer;
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) w[i] = factor * exp_fast((v[i] - most) - log_sum) - share;
      if (t >= first && t < first + columns) w[t - first] -= hit;
      store_span(grad, dtype, to + first, columns, w);
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&cross_entropy>::named("cross_entropy"),
    Entry<&cross_entropy_backward>::named("cross_entropy_backward"),
    {},
};
