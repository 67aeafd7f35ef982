// cross_entropy on the CPU. Rows of logits lie dense; where each begins, a layout of two strides says (layout.py).
#include <omp.h>

#include "kernel.h"
#include "math.h"
#include "memory.h"
#include "pages.h"
#include "rows.h"

namespace {

enum Reduction : int { kNone = 0, kTotal = 1, kMean = 2 };

// Vectors as wide as the machine's: wider ones are taken apart badly.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Lanes __attribute__((vector_size(4 * kLanes))) = float;
using LanesAt __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = float;  // anywhere in memory
using Integers __attribute__((vector_size(4 * kLanes))) = int32_t;
using Words __attribute__((vector_size(4 * kLanes))) = uint32_t;

constexpr float kLowest = -__builtin_inff();

inline Lanes load(const float* x) { return *reinterpret_cast<const LanesAt*>(x); }
inline void store(float* x, const Lanes& v) { *reinterpret_cast<LanesAt*>(x) = v; }
inline Lanes all(float value) { return Lanes{} + value; }

// exp_fast of math.h for x <= 0 (or a little above) in vectors. NaN stays.
inline Lanes exp_below(const Lanes& x) {
  const Lanes shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;
  const Lanes r = n * 2.12194440e-4f + (n * -0.693359375f + x);
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Words bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (127u << 23);  // 2^n
  Lanes power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? Lanes{} : p * power;
}

// Lanes joined to one by `f`, halves first.
template <class F>
inline float joined(const Lanes& v, F f) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof(lane));
  for (int half = kLanes / 2; half; half /= 2) {
    for (int k = 0; k < half; ++k) lane[k] = f(lane[k], lane[k + half]);
  }
  return lane[0];
}

constexpr auto kGreater = [](const auto& a, const auto& b) { return a > b ? a : b; };
constexpr auto kSum = [](const auto& a, const auto& b) { return a + b; };

// Numbers in a row, as float32: at least kLanes, so that the last vector may overlap the one before it.
struct Span {
  const float* data;
  int64_t count;

  int64_t whole() const { return count / kLanes * kLanes; }
  bool has_rest() const { return count % kLanes != 0; }
  const float* last() const { return data + count - kLanes; }
  // The last vector, with `fill` in the lanes that belong to the one before it.
  Lanes rest(float fill) const {
    Integers lane;
    for (int k = 0; k < kLanes; ++k) lane[k] = k;
    return lane < int32_t(kLanes - count % kLanes) ? all(fill) : load(last());
  }
};

// The largest; NaN does not count.
inline float largest(const Span& x) {
  Lanes a = all(kLowest), b = x.has_rest() ? kGreater(load(x.last()), a) : a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= x.count; i += 2 * kLanes) {
    a = kGreater(load(x.data + i), a);
    b = kGreater(load(x.data + i + kLanes), b);
  }
  if (i < x.whole()) a = kGreater(load(x.data + i), a);
  return joined(kGreater(b, a), kGreater);
}

inline float sum_of(const Span& x) {
  Lanes sum = x.has_rest() ? x.rest(0.0f) : Lanes{};
  for (int64_t i = 0; i < x.whole(); i += kLanes) sum += load(x.data + i);
  return joined(sum, kSum);
}

// sum of e^(x - shift). The block after this one is fetched meanwhile: `largest` would have to wait for it.
inline float sum_of_exp(const Span& x, float shift) {
  const float* const next = x.data + x.count;
  Lanes a = {}, b = x.has_rest() ? exp_below(x.rest(kLowest) - shift) : a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= x.count; i += 2 * kLanes) {
    for (int k = 0; k < 2 * kLanes; k += 16) __builtin_prefetch(next + i + k);
    a += exp_below(load(x.data + i) - shift);
    b += exp_below(load(x.data + i + kLanes) - shift);
  }
  if (i < x.whole()) a += exp_below(load(x.data + i) - shift);
  return joined(a + b, kSum);
}

constexpr int64_t kBuffer = kPiece + kLanes;

// How many numbers of a row the block that begins at `first` takes: never a few at the end.
inline int64_t block(int64_t first, int64_t classes) { return classes - first < kBuffer ? classes - first : kPiece; }

// Rows of `classes` numbers.
struct Matrix {
  const void* data;
  int dtype;
  int64_t inner, outer_stride, inner_stride;

  int64_t begin(int64_t row) const {
    return row < inner ? row * inner_stride : row / inner * outer_stride + row % inner * inner_stride;
  }
  // `count` numbers from element `first` on: in place, or in `buffer` with `fill` behind them up to whole vectors.
  Span read(int64_t first, int64_t count, float fill, float* buffer) const {
    if (dtype == kFloat32 && count >= kLanes) return {static_cast<const float*>(data) + first, count};
    const int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
    store(buffer + whole - kLanes, all(fill));
    load_span(data, dtype, first, count, buffer);
    return {buffer, whole};
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
  alignas(64) float buffer[kBuffer];
  float most = kLowest;
  double total = 0.0, sum = 0.0;
  for (int64_t first = 0, count; first < classes; first += count) {
    count = block(first, classes);
    const Span v = x.read(begin + first, count, kLowest, buffer);
    const float here = largest(v), now = here > most ? here : most;
    if (now > most && first) total *= double(exp_fast(most - now));
    most = now;
    // Nothing but -inf and NaN so far: any finite number serves, and NaN stays.
    total += double(sum_of_exp(v, most == kLowest ? 0.0f : most));
    if (with_sum) sum += double(sum_of(x.read(begin + first, count, 0.0f, buffer)));
  }
  return {most, __builtin_logf(float(total)), sum};
}

void cross_entropy(const void* logits, int dtype, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                   const int64_t* target, float* loss, float* lse, float* count, int64_t rows, int64_t classes,
                   int64_t ignore_index, double label_smoothing, double z_loss, int reduction, int threads) {
  const Matrix x{logits, dtype, inner, outer_stride, inner_stride};
  const Memory<float> own(reduction == kNone ? 0 : rows);
  float* const of_row = reduction == kNone ? loss : own;
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
  if (grad != logits) expect_writes(grad, rows * classes * size);
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
    alignas(64) float from_buffer[kBuffer], to_buffer[kBuffer];
    for (int64_t first = 0, count; first < classes; first += count) {
      count = block(first, classes);
      const Span v = x.read(from + first, count, 0.0f, from_buffer);
      const bool direct = v.data != from_buffer;
      float* const w = direct ? static_cast<float*>(grad) + to + first : to_buffer;
      const auto slope = [&](const Lanes& z) { return exp_below((z - most) - log_sum) * factor - share; };
      const Lanes rest = v.has_rest() ? slope(load(v.last())) : Lanes{};  // before it is overwritten
      for (int64_t i = 0; i < v.whole(); i += kLanes) store(w + i, slope(load(v.data + i)));
      if (v.has_rest()) store(w + v.count - kLanes, rest);
      if (t >= first && t < first + count) w[t - first] -= hit;
      if (direct) continue;
      if (dtype == kFloat32) {
        std::memcpy(static_cast<float*>(grad) + to + first, w, size_t(count) * 4);
      } else {
        store_span(grad, dtype, to + first, count, w);
      }
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&cross_entropy>::named("cross_entropy"),
    Entry<&cross_entropy_backward>::named("cross_entropy_backward"),
    {},
};
