// group_norm_act on the CPU, a sample at a time, which the caches hold between its passes, or a few groups of it. A dense
// sample is [channels, positions], or [positions, channels] where channels lie last; parameters and statistics are float32.
#include <omp.h>

#include "kernel.h"
#include "memory.h"
#include "normalization.h"

namespace {

constexpr int64_t kUnit = 1 << 14;  // elements that are worth a turn of their own

struct Groups {
  int64_t samples, channels, positions, groups;
  bool last;
  int dtype;

  // The same memory as more and smaller samples of fewer groups each: none lies in one piece where channels lie last.
  Groups in_units() const {
    if (last) return *this;
    int64_t count = 1;
    while (count < groups && (groups % count || count * each() * positions < kUnit)) ++count;
    return {samples * (groups / count), count * each(), positions, count, last, dtype};
  }

  int64_t each() const { return channels / groups; }
  double elements() const { return double(each() * positions); }
  Channels sample() const { return last ? Channels{positions, channels, 1} : Channels{1, channels, positions}; }
  // For the moments: where a group lies in one piece, it counts as a channel.
  Channels statistics() const { return last ? sample() : Channels{1, groups, each() * positions}; }

  const char* at(const void* x, int64_t n) const {
    return static_cast<const char*>(x) + n * channels * positions * (dtype == kFloat32 ? 4 : 2);
  }
  char* at(void* x, int64_t n) const { return const_cast<char*>(at(static_cast<const void*>(x), n)); }
};

struct Parameters {
  const float *weight, *bias, *scale, *shift;  // [channels] twice and [samples, channels] twice, or null
  int64_t channels;

  // z = (x-hat weight + bias) (1 + scale) + shift, at an index of [samples, channels].
  float factor(int64_t at) const { return (weight ? weight[at % channels] : 1.0f) * modulation(at); }
  float modulation(int64_t at) const { return scale ? 1.0f + scale[at] : 1.0f; }
  float addend(int64_t at) const {
    return (bias ? bias[at % channels] * modulation(at) : 0.0f) + (shift ? shift[at] : 0.0f);
  }
};

// f(sample, memory of `count` floats for it, threads for it): samples side by side where they are many, else one by one.
template <class F>
void over_samples(const Groups& g, int64_t count, int threads, F f) {
  const bool large = g.samples * g.channels * g.positions >= kParallel;
  const bool side_by_side = large && threads > 1 && (g.samples % threads == 0 || g.samples >= 4 * threads);
  const Scratch scratch(count, side_by_side, threads);
  if (!side_by_side) {  // in no region, not even of one thread: f's own would get new threads at every call
    for (int64_t n = 0; n < g.samples; ++n) f(n, scratch.mine(), threads);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < g.samples; ++n) f(n, scratch.mine(), 1);
}

// mean[g] and rstd[g] of a sample's groups; `means` and `squares` are of its channels.
void combine(const Groups& g, const double* means, const double* squares, double eps, float* mean, float* rstd) {
  for (int64_t k = 0, c = 0; k < g.groups; ++k) {
    const int64_t end = c + g.each();
    double m = 0.0, s = 0.0;
    for (int64_t i = c; i < end; ++i) m += means[i];
    m /= double(g.each());
    for (; c < end; ++c) s += squares[c] + double(g.positions) * (means[c] - m) * (means[c] - m);
    mean[k] = float(m);
    rstd[k] = float(1.0 / __builtin_sqrt(s / g.elements() + eps));
  }
}

// The first three coefficients of a sample, into `values`: 5 rows of [channels].
Coefficients coefficients(const Groups& g, const Parameters& p, int64_t n, const float* mean, const float* rstd,
                          float* values) {
  float *const scale = values + g.channels, *const shift = scale + g.channels;
  for (int64_t c = 0; c < g.channels; ++c) {
    const int64_t k = n * g.groups + c / g.each(), at = n * g.channels + c;
    values[c] = mean[k];
    scale[c] = rstd[k] * p.factor(at);
    shift[c] = p.addend(at);
  }
  return {values, scale, shift, shift + g.channels, shift + 2 * g.channels, nullptr};
}

void group_norm_act_forward(const void* x, int dtype, void* y, int64_t samples, int64_t channels, int64_t positions,
                            int last, int64_t groups, const float* weight, const float* bias, const float* scale,
                            const float* shift, const void* residual, bool after, float* mean, float* rstd, double eps,
                            int activation, double negative_slope, int threads) {
  const Groups g = Groups{samples, channels, positions, groups, last != 0, dtype}.in_units();
  const Parameters p{weight, bias, scale, shift, channels};
  const Channels shape = g.sample(), summed = g.statistics();
  const Tiles tiles(summed);
  const int64_t partial = 3 * tiles.partials(), most = partial > 5 * g.channels ? partial : 5 * g.channels;
  over_samples(g, in_lines(most) + 4 * g.channels, threads, [&](int64_t n, float* work, int mine) {
    float *const m = mean + n * g.groups, *const r = rstd + n * g.groups;
    double *const means = reinterpret_cast<double*>(work + in_lines(most)), *const squares = means + g.channels;
    channel_moments(g.at(x, n), dtype, summed, tiles, work, mine, [&](int64_t c, double average, double deviations) {
      if (last) {
        means[c] = average, squares[c] = deviations;
      } else {
        m[c] = float(average), r[c] = float(1.0 / __builtin_sqrt(deviations / g.elements() + eps));
      }
    });
    if (last) combine(g, means, squares, eps, m, r);
    const Coefficients of = coefficients(g, p, n, mean, rstd, work);
    normalized(g.at(x, n), residual ? g.at(residual, n) : nullptr, after, dtype, g.at(y, n), shape, of, activation,
               float(negative_slope), mine);
  });
}

// sum_dz and sum_dz_x_hat are [samples, channels]; beside: the residual, or y if from_output; null,
// and so is dz, without a residual.
void group_norm_act_backward(const void* grad_y, const void* x, int dtype, void* grad_x, void* dz, int64_t samples,
                             int64_t channels, int64_t positions, int last, int64_t groups, const float* weight,
                             const float* bias, const float* scale, const float* shift, const void* beside,
                             bool from_output, const float* mean, const float* rstd, float* sum_dz,
                             float* sum_dz_x_hat, int activation, double negative_slope, int threads) {
  const Groups g = Groups{samples, channels, positions, groups, last != 0, dtype}.in_units();
  const Parameters p{weight, bias, scale, shift, channels};
  const Channels shape = g.sample();
  const Tiles tiles(shape);
  const float slope = float(negative_slope);
  // What takes an exponential is computed once, and waits where the result will be.
  const bool waits = beside || (dtype == kFloat32 && takes_exponential(activation));
  const Beside kind = !beside ? kNothing : from_output ? kOutput : kResidual;
  over_samples(g, in_lines(5 * g.channels) + 2 * tiles.partials(), threads, [&](int64_t n, float* work, int mine) {
    const Coefficients of = coefficients(g, p, n, mean, rstd, work);
    float *const linear = work + 3 * g.channels, *const constant = linear + g.channels;
    float *const sums = sum_dz + n * g.channels, *const products = sum_dz_x_hat + n * g.channels;
    void* const waiting = waits ? g.at(beside ? dz : grad_x, n) : nullptr;
    gradient_sums<true>(
        g.at(grad_y, n), g.at(x, n), beside ? g.at(beside, n) : nullptr, kind, dtype, tiles, of, activation, slope,
        work + in_lines(5 * g.channels), waiting, mine, [&](int64_t c, double total) { sums[c] = float(total); },
        [&](int64_t c, double total) { products[c] = float(total * double(rstd[n * g.groups + c / g.each()])); },
        [](int64_t, double) {});
    for (int64_t k = 0, c = 0; k < g.groups; ++k) {
      const int64_t end = c + g.each();
      double first = 0.0, second = 0.0;
      for (int64_t i = c; i < end; ++i) {
        const double factor = double(p.factor(n * g.channels + i));
        first += factor * double(sums[i]), second += factor * double(products[i]);
      }
      const double r = double(rstd[n * g.groups + k]);
      for (; c < end; ++c) {
        constant[c] = float(-r * first / g.elements());
        linear[c] = float(-r * r * second / g.elements());
      }
    }
    input_gradient(waits ? waiting : g.at(grad_y, n), g.at(x, n), dtype, g.at(grad_x, n), shape, of,
                   waits ? int(kNone) : activation, slope, mine);
  });
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&group_norm_act_forward>::named("group_norm_act_forward"),
    Entry<&group_norm_act_backward>::named("group_norm_act_backward"),
    {},
};
