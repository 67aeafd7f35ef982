// adam_step on the CPU: one pass over all tensors.
#include <omp.h>

#include "kernel.h"

namespace {

// `table` is [tensors, 5]: addresses of parameter, gradient, first and second moment (float32, dense), and length.
void adam_step(const int64_t* table, int64_t tensors, double step, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool decoupled, int threads) {
  const float rate = float(lr / (1.0 - __builtin_pow(beta1, step)));
  const float root = float(1.0 / __builtin_sqrt(1.0 - __builtin_pow(beta2, step)));
  const float b2 = float(beta2), a1 = float(1.0 - beta1), a2 = float(1.0 - beta2), epsilon = float(eps);
  const float shrink = decoupled ? float(1.0 - lr * weight_decay) : 1.0f;
  const float decay = decoupled ? 0.0f : float(weight_decay);
  int64_t total = 0;
  for (int64_t k = 0; k < tensors; ++k) total += table[5 * k + 4];
#pragma omp parallel num_threads(threads) if (total >= 32768)
  {
    // Each thread takes an equal span of the elements of all tensors laid end to end.
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = total * me / team;
    const int64_t last = total * (me + 1) / team;
    int64_t begin = 0;
    for (int64_t k = 0; k < tensors && begin < last; ++k) {
      const int64_t end = begin + table[5 * k + 4];
      const int64_t from = first > begin ? first - begin : 0, to = (last < end ? last : end) - begin;
      float* const p = reinterpret_cast<float*>(table[5 * k]);
      const float* const g = reinterpret_cast<const float*>(table[5 * k + 1]);
      float* const m = reinterpret_cast<float*>(table[5 * k + 2]);
      float* const v = reinterpret_cast<float*>(table[5 * k + 3]);
#pragma omp simd
      for (int64_t i = from; i < to; ++i) {
        const float gradient = g[i] + decay * p[i];
        const float mean = m[i] + a1 * (gradient - m[i]);
        const float square = b2 * v[i] + a2 * gradient * gradient;
        m[i] = mean;
        v[i] = square;
        p[i] = shrink * p[i] - rate * mean / (__builtin_sqrtf(square) * root + epsilon);
      }
      begin = end;
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {Entry<&adam_step>::named("adam_step"), {}};
