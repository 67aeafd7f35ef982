// batch_norm_act on the CPU. Tensors are dense [outer, channels, inner]; parameters and statistics are float32.
#include "kernel.h"
#include "memory.h"
#include "normalization.h"

namespace {

// Raises if one of two vectors is absent: an empty one has no address either.
void require_both(const char* names, const float* a, const float* b, int64_t channels) {
  if (!a == !b || channels == 0) return;
  genai_fast_raise(Raised::kValueError, "%s: expected both or neither, got one", names);
}

// mean[c], squares[c] = sum (x - mean)^2, rstd[c] = 1 / sqrt(squares / count + eps); running statistics (or null)
// move by momentum.
void batch_norm_statistics(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner, float* mean,
                           float* squares, float* rstd, float* running_mean, float* running_var, double momentum,
                           double eps, int threads) {
  require_both("running_mean and running_var", running_mean, running_var, channels);
  const Channels shape{outer, channels, inner};
  const Tiles tiles(shape);
  const Memory<float> partial(3 * tiles.partials());
  const double total = double(outer * inner);
  channel_moments(x, dtype, shape, tiles, partial, threads, [&](int64_t c, double m, double s) {
    mean[c] = float(m);
    squares[c] = float(s);
    rstd[c] = float(1.0 / __builtin_sqrt(s / total + eps));
    if (running_mean) {
      running_mean[c] = float((1.0 - momentum) * double(running_mean[c]) + momentum * m);
      running_var[c] = float((1.0 - momentum) * double(running_var[c]) + momentum * s / (total - 1.0));
    }
  });
}

// The coefficients of batch norm; each channel's stand `repeat` times in a row, for columns of which `repeat` belong to
// a channel. Null sums: the statistics do not depend on x.
struct OfBatch {
  const Memory<float> values;
  const int64_t columns;

  OfBatch(int64_t channels, int64_t repeat, const float* weight, const float* bias, const float* slopes,
          const float* mean, const float* rstd, const float* sum_dz, const float* sum_dz_x_hat, int64_t count)
      : values(6 * channels * repeat), columns(channels * repeat) {
    const float share = 1.0f / float(count);
    for (int64_t c = 0; c < channels; ++c) {
      const float a = weight ? weight[c] * rstd[c] : rstd[c];
      const float six[6] = {mean[c], a, bias ? bias[c] : 0.0f, sum_dz ? -a * rstd[c] * (sum_dz_x_hat[c] * share) : 0.0f,
                            sum_dz ? -a * (sum_dz[c] * share) : 0.0f, slopes ? slopes[c] : 0.0f};
      for (int64_t i = c * repeat; i < (c + 1) * repeat; ++i) {
        for (int64_t k = 0; k < 6; ++k) values[k * columns + i] = six[k];
      }
    }
  }
  Coefficients get() const {
    float* const v = values;
    return {v, v + columns, v + 2 * columns, v + 3 * columns, v + 4 * columns, v + 5 * columns};
  }
};

void batch_norm_act_apply(const void* x, int dtype, void* y, int64_t outer, int64_t channels, int64_t inner,
                          const float* weight, const float* bias, const float* slopes, const float* mean,
                          const float* rstd, const void* residual, bool after, int activation, double negative_slope,
                          int threads) {
  const OfBatch of(channels, 1, weight, bias, slopes, mean, rstd, nullptr, nullptr, 1);
  normalized(x, residual, after, dtype, y, {outer, channels, inner}, of.get(), activation, float(negative_slope), threads);
}

// beside: the residual, or y if from_output; null, and so is dz, without a residual. grad_slopes: null but of kPrelu.
void batch_norm_act_reduce(const void* grad_y, const void* x, int dtype, int64_t outer, int64_t channels,
                           int64_t inner, const float* weight, const float* bias, const float* slopes,
                           const float* mean, const float* rstd, const void* beside, bool from_output, float* sum_dz,
                           float* sum_dz_x_hat, void* dz, float* grad_slopes, int activation, double negative_slope,
                           int threads) {
  const Tiles tiles({outer, channels, inner});
  const int64_t repeat = tiles.shape.last() ? tiles.per : 1;
  const OfBatch of(channels, repeat, weight, bias, slopes, mean, rstd, nullptr, nullptr, 1);
  const Memory<float> partial((grad_slopes ? 3 : 2) * tiles.partials());
  const Beside kind = !beside ? kNothing : from_output ? kOutput : kResidual;
  gradient_sums<false>(
      grad_y, x, beside, kind, dtype, tiles, of.get(), activation, float(negative_slope), partial, dz, threads,
      [&](int64_t c, double total) { sum_dz[c] = float(total); },
      [&](int64_t c, double total) { sum_dz_x_hat[c] = float(total * double(rstd[c])); },
      [&](int64_t c, double total) { grad_slopes[c] = float(total); });
}

// dx = scale (dz - sum_dz / count - x-hat sum_dz_x_hat / count); null sums: the statistics do not depend on x.
void batch_norm_act_grad(const void* grad_y, const void* x, int dtype, void* grad_x, int64_t outer, int64_t channels,
                         int64_t inner, const float* weight, const float* bias, const float* slopes, const float* mean,
                         const float* rstd, const float* sum_dz, const float* sum_dz_x_hat, int64_t count,
                         int activation, double negative_slope, int threads) {
  require_both("sum_dz and sum_dz_x_hat", sum_dz, sum_dz_x_hat, channels);
  const OfBatch of(channels, 1, weight, bias, slopes, mean, rstd, sum_dz, sum_dz_x_hat, count);
  input_gradient(grad_y, x, dtype, grad_x, {outer, channels, inner}, of.get(), activation,
                 float(negative_slope), threads);
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&batch_norm_statistics>::named("batch_norm_statistics"),
    Entry<&batch_norm_act_apply>::named("batch_norm_act_apply"),
    Entry<&batch_norm_act_reduce>::named("batch_norm_act_reduce"),
    Entry<&batch_norm_act_grad>::named("batch_norm_act_grad"),
    {},
};
