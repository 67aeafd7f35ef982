// adam_step on the CPU: one pass over all tensors.
#include <omp.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "kernel.h"

namespace {

// A row of the caller's table: addresses of parameter, gradient, both moments (float32, dense) and the tensor's own
// step count (float32), and the number of elements.
struct Row {
  float* parameter;
  const float* gradient;
  float *mean, *square, *step;
  int64_t count;
};

// Numbers below 1.2e-38 count as 0 while this lives, in this thread. The first moment of a unit that died decays into
// them within a thousand steps, and then each costs a hundred times as much on many processors.
struct FlushDenormals {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040u); }  // results to zero, operands as zero
  ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

void adam_step(const Row* rows, int64_t tensors, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool decoupled, int threads) {
  const float b2 = float(beta2), a1 = float(1.0 - beta1), a2 = float(1.0 - beta2), epsilon = float(eps);
  const float shrink = decoupled ? float(1.0 - lr * weight_decay) : 1.0f;
  const float decay = decoupled ? 0.0f : float(weight_decay);
  int64_t total = 0;
  for (int64_t k = 0; k < tensors; ++k) {
    total += rows[k].count;
    *rows[k].step += 1.0f;
  }
#pragma omp parallel num_threads(threads) if (total >= 32768)
  {
    [[maybe_unused]] const FlushDenormals flush;
    // Each thread takes an equal span of the elements of all tensors laid end to end.
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = total * me / team, last = total * (me + 1) / team;
    int64_t begin = 0;
    for (int64_t k = 0; k < tensors && begin < last; ++k) {
      const Row row = rows[k];
      const int64_t end = begin + row.count;
      const int64_t from = first > begin ? first - begin : 0, to = (last < end ? last : end) - begin;
      begin = end;
      if (from >= to) continue;
      const double step = double(*row.step);
      const float rate = float(lr / (1.0 - __builtin_pow(beta1, step)));
      const float root = float(1.0 / __builtin_sqrt(1.0 - __builtin_pow(beta2, step)));
      float* const p = row.parameter;
      const float* const g = row.gradient;
      float* const m = row.mean;
      float* const v = row.square;
#pragma omp simd
      for (int64_t i = from; i < to; ++i) {
        const float gradient = g[i] + decay * p[i];
        const float mean = m[i] + a1 * (gradient - m[i]);
        const float square = b2 * v[i] + a2 * gradient * gradient;
        m[i] = mean;
        v[i] = square;
        p[i] = shrink * p[i] - rate * mean / (__builtin_sqrtf(square) * root + epsilon);
      }
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {Entry<&adam_step>::named("adam_step"), {}};
