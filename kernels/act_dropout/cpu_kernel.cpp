// act_dropout on the CPU: dense tensors in the order of their memory, which is the order of the stream.
#include <omp.h>

#include "activations.h"
#include "kernel.h"
#include "philox.h"
#include "rows.h"

namespace {

// y = activate(x) scale where the element's word is above `bound`, else 0; a null seed keeps all.
void act_dropout(const void* x, int dtype, void* y, int64_t count, const int64_t* seed, int64_t offset, uint32_t bound,
                 double scale_, int activation, double negative_slope, int threads) {
  const Pieces pieces(1, count);
  const Rows in{x, count, dtype};
  const DenseOut out{y, count, dtype};
  const float slope = float(negative_slope), scale = float(scale_);
  with_activation(activation, [&](auto a) {
    constexpr int A = decltype(a)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= kParallel)
    for (int64_t k = 0; k < pieces.count(); ++k) {
      alignas(64) float from[kPiece], to[kPiece];
      const Piece p = pieces[k];
      const float* v = in.read(p, from);
      float* w = out.begin(p, to);
      if (seed) {
        alignas(64) uint32_t room[stream_room(kPiece)];
        const uint32_t* word = stream(room, uint64_t(offset) + uint64_t(p.column), p.columns, *seed);
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) {
          const float kept = scale * activate<A>(v[i], slope);
          w[i] = word[i] > bound ? kept : 0.0f;
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) w[i] = activate<A>(v[i], slope);
      }
      out.end(p, w);
    }
  });
}

// dx = dy act'(x) scale where the element was kept, else 0; or from `saved` = y, where act(x) = share y.
void act_dropout_backward(const void* grad_y, const void* saved, int dtype, void* grad_x, int64_t count,
                          const int64_t* seed, int64_t offset, uint32_t bound, double scale_, double share_,
                          bool from_output, int activation, double negative_slope, int threads) {
  const Pieces pieces(1, count);
  const Rows g_rows{grad_y, count, dtype}, s_rows{saved, count, dtype};
  const DenseOut out{grad_x, count, dtype};
  const float slope = float(negative_slope), scale = float(scale_), share = float(share_);
  with_derivative(activation, from_output, [&](auto a, auto output) {
    constexpr int A = decltype(a)::value;
    constexpr bool kOutput = decltype(output)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= kParallel)
    for (int64_t k = 0; k < pieces.count(); ++k) {
      alignas(64) float g_buffer[kPiece], s_buffer[kPiece], to[kPiece];
      const Piece p = pieces[k];
      const float* g = g_rows.read(p, g_buffer);
      const float* v = s_rows.read(p, s_buffer);
      float* w = out.begin(p, to);
      if (A == kRelu && kOutput) {  // y > 0 says both: kept, and x > 0
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) w[i] = v[i] > 0.0f ? scale * g[i] : 0.0f;
      } else if (seed) {
        alignas(64) uint32_t room[stream_room(kPiece)];
        const uint32_t* word = stream(room, uint64_t(offset) + uint64_t(p.column), p.columns, *seed);
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) {
          const float kept = scale * g[i] * derivative_from<A, kOutput>(kOutput ? share * v[i] : v[i], slope);
          w[i] = word[i] > bound ? kept : 0.0f;
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < p.columns; ++i) w[i] = g[i] * derivative_from<A, kOutput>(v[i], slope);
      }
      out.end(p, w);
    }
  });
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&act_dropout>::named("act_dropout"),
    Entry<&act_dropout_backward>::named("act_dropout_backward"),
    {},
};
