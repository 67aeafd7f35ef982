// cross_entropy on the CPU. Rows of logits lie dense; where each begins, a layout of two strides says (layout.py).
#include <omp.h>

#include "activations.h"
#include "kernel.h"
#include "memory.h"
#include "pages.h"
#include "rows.h"

namespace {

enum Reduction : int { kEach = 0, kTotal = 1, kMean = 2 };

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

// Rows of `classes` numbers; a cap c above 0 reads each as c tanh(x / c).
struct Matrix {
  const void* data;
  int dtype;
  int64_t inner, outer_stride, inner_stride;
  float cap = 0.0f;

  int64_t begin(int64_t row) const {
    return row < inner ? row * inner_stride : row / inner * outer_stride + row % inner * inner_stride;
  }
  // `count` numbers from element `first` on: in place, or in `buffer` with `fill` behind them up to whole vectors.
  Span read(int64_t first, int64_t count, float fill, float* buffer) const {
    if (dtype == kFloat32 && count >= kLanes && cap == 0.0f) return {static_cast<const float*>(data) + first, count};
    const int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
    store(buffer + whole - kLanes, all(fill));
    load_span(data, dtype, first, count, buffer);
    if (cap != 0.0f) capped(buffer, count);
    return {buffer, whole};
  }
  float at(int64_t element) const {
    float value;
    load_span(data, dtype, element, 1, &value);
    if (cap != 0.0f) capped(&value, 1);
    return value;
  }

 private:
  GENAI_FAST_ONCE void capped(float* x, int64_t count) const {
    const float share = 1.0f / cap;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] = cap * tanh_fast(x[i] * share);
  }
};

GENAI_FAST_ONCE double weighted_sum(const float* x, const float* weights, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += double(weights[i]) * double(x[i]);
  return sum;
}

struct Row {
  float largest, log_sum;  // lse = largest + log_sum: apart, so that x - lse is exact where logits are large
  double sum;              // of the logits, if asked for
};

// One pass over a row: each block is read from memory once, and again from the first-level cache. Weights: of the sum.
inline Row reduce(const Matrix& x, int64_t begin, int64_t classes, bool with_sum, const float* weights) {
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
    if (!with_sum) continue;
    const Span plain = x.read(begin + first, count, 0.0f, buffer);
    sum += weights ? weighted_sum(plain.data, weights + first, count) : double(sum_of(plain));
  }
  return {most, __builtin_logf(float(total)), sum};
}

// Where the largest number of a row stands first; 0 where all are -inf or NaN. Of the numbers themselves: a cap makes
// large ones equal.
GENAI_FAST_ONCE int64_t first_largest(Matrix x, int64_t begin, int64_t classes) {
  alignas(64) float buffer[kBuffer];
  x.cap = 0.0f;
  float most = kLowest;
  int64_t found = 0;
  for (int64_t first = 0, count; first < classes; first += count) {
    count = block(first, classes);
    const Span v = x.read(begin + first, count, kLowest, buffer);
    const float here = largest(v);
    if (!(here > most)) continue;
    most = here;
    for (found = first; v.data[found - first] != here;) ++found;
  }
  return found;
}

// The mean of all classes' weights, which smoothing gives to lse; 1 without weights.
double mean_of(const float* weights, int64_t classes) {
  double sum = 0.0;
  for (int64_t i = 0; weights && i < classes; ++i) sum += double(weights[i]);
  return weights ? sum / double(classes) : 1.0;
}

// w_t (1 - e) (lse - x_t) + e mean(w (lse - x)) + z lse^2, and the mean of the first two over `count`'s sum of w_t, of
// the last over its number of rows. weights, count and predicted may be null.
void cross_entropy(const void* logits, int dtype, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                   const int64_t* target, const float* weights, float* loss, float* lse, float* count,
                   int64_t* predicted, int64_t rows, int64_t classes, int64_t ignore_index, double label_smoothing,
                   double z_loss, double cap, int reduction, int threads) {
  const Matrix x{logits, dtype, inner, outer_stride, inner_stride, float(cap)};
  const Memory<float> own(reduction == kEach ? 0 : rows);
  float* const of_row = reduction == kEach ? loss : own;
  const bool smooth = label_smoothing != 0.0, apart = weights && reduction == kMean;
  const double kept = 1.0 - label_smoothing, weight_mean = smooth ? mean_of(weights, classes) : 1.0;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * classes >= kParallel)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = target[row], begin = x.begin(row);
    if (predicted) predicted[row] = t == ignore_index ? -1 : first_largest(x, begin, classes);
    if (t == ignore_index) {
      of_row[row] = lse[row] = lse[rows + row] = 0.0f;
      continue;
    }
    const Row r = reduce(x, begin, classes, smooth, weights);
    const double most = double(r.largest), log_sum = double(r.log_sum), z = most + log_sum;
    double value = __builtin_nan("");  // for a target that is no class
    if (t >= 0 && t < classes) {
      const double below = most - double(x.at(begin + t));
      value = weights ? kept * double(weights[t]) * (below + log_sum) : kept * below + log_sum;
      if (smooth) value += label_smoothing * (weight_mean * most - r.sum / double(classes));
      if (smooth && weights) value += label_smoothing * weight_mean * log_sum;
      if (z_loss != 0.0 && !apart) value += z_loss * z * z;
    }
    of_row[row] = float(value);
    lse[row] = r.largest;
    lse[rows + row] = r.log_sum;
  }
  if (reduction == kEach) return;
  double sum = 0.0, weight = 0.0, penalty = 0.0;
  int64_t counted = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = target[row];
    sum += double(of_row[row]);
    if (t == ignore_index) continue;
    ++counted;
    if (!apart) continue;
    const double z = double(lse[row]) + double(lse[rows + row]);
    weight += t >= 0 && t < classes ? double(weights[t]) : __builtin_nan("");
    if (z_loss != 0.0) penalty += z_loss * z * z;
  }
  const double parts = apart ? weight : double(counted);
  if (count) count[0] = float(parts), count[1] = float(counted);
  *loss = float(reduction == kMean ? sum / parts + (apart ? penalty / double(counted) : 0.0) : sum);
}

// dx = g (w_t (1 - e) + e mean(w)) e^(x - lse) + 2 z lse h e^(x - lse) - g e w / V - g w_t (1 - e) [i == t], times
// 1 - (x / c)^2 under a cap: g and h are the gradient over `count`'s two numbers. It may be written over x.
void cross_entropy_backward(const float* grad_loss, int64_t grad_loss_stride, const void* logits, int dtype,
                            int64_t inner, int64_t outer_stride, int64_t inner_stride, const int64_t* target,
                            const float* lse, const float* count, const float* weights, void* grad,
                            int64_t grad_inner, int64_t grad_outer_stride, int64_t grad_inner_stride, int64_t rows,
                            int64_t classes, int64_t ignore_index, double label_smoothing, double z_loss, double cap,
                            int threads) {
  const Matrix x{logits, dtype, inner, outer_stride, inner_stride, float(cap)};
  const Matrix out{grad, dtype, grad_inner, grad_outer_stride, grad_inner_stride};
  const int64_t size = dtype == kFloat32 ? 4 : 2;
  const double weight_mean = label_smoothing != 0.0 ? mean_of(weights, classes) : 0.0;
  const float cap_share = cap != 0.0 ? 1.0f / float(cap) : 0.0f;
  if (grad != logits) expect_writes(grad, rows * classes * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * classes >= kParallel)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = target[row], from = x.begin(row), to = out.begin(row);
    if (t == ignore_index) {
      std::memset(static_cast<char*>(grad) + to * size, 0, size_t(classes * size));
      continue;
    }
    const float most = lse[row], log_sum = lse[rows + row];
    const bool inside = t >= 0 && t < classes;
    const double upstream = inside ? double(grad_loss[row * grad_loss_stride]) : __builtin_nan("");
    const double g = upstream / (count ? double(count[0]) : 1.0), h = upstream / (count ? double(count[1]) : 1.0);
    const double of_target = weights && inside ? double(weights[t]) * (1.0 - label_smoothing) : 1.0 - label_smoothing;
    const double of_lse = 2.0 * z_loss * (double(most) + double(log_sum));
    const double weighted = g * (of_target + label_smoothing * weight_mean) + h * of_lse;
    const float factor = float(weights ? weighted : g * (1.0 + of_lse));
    const float share = float(g * label_smoothing / double(classes)), hit = float(g * of_target);
    const float same = weights ? 0.0f : share;
    alignas(64) float from_buffer[kBuffer], to_buffer[kBuffer];
    for (int64_t first = 0, count; first < classes; first += count) {
      count = block(first, classes);
      const Span v = x.read(from + first, count, 0.0f, from_buffer);
      const bool direct = v.data != from_buffer;
      float* const w = direct ? static_cast<float*>(grad) + to + first : to_buffer;
      const auto slope = [&](const Lanes& z) { return exp_below((z - most) - log_sum) * factor - same; };
      const Lanes rest = v.has_rest() ? slope(load(v.last())) : Lanes{};  // before it is overwritten
      for (int64_t i = 0; i < v.whole(); i += kLanes) store(w + i, slope(load(v.data + i)));
      if (v.has_rest()) store(w + v.count - kLanes, rest);
      if (weights && share != 0.0f) {  // NaN too
        for (int64_t i = 0; i < count; ++i) w[i] -= share * weights[first + i];
      }
      if (t >= first && t < first + count) w[t - first] -= hit;
      if (cap_share != 0.0f) {
        for (int64_t i = 0; i < count; ++i) w[i] *= 1.0f - (v.data[i] * cap_share) * (v.data[i] * cap_share);
      }
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
