// gated_act on the CPU. gate and up may be halves of one tensor: rows have any stride. The biases are float32.
#include <omp.h>

#include "activations.h"
#include "channels.h"
#include "kernel.h"
#include "memory.h"

namespace {

template <class F>
void with_flags(bool first, bool second, F f) {
  with_flag(first, [&](auto a) { with_flag(second, [&](auto b) { f(a, b); }); });
}

// The activations of gates: layout.py.
template <class F>
void with_gate(int activation, F f) {
  with_one_of<kSilu, kGelu, kGeluTanh, kSigmoid, kRelu, kTanh, kNone>(activation, f);
}

// One factor of each element where there are multipliers: a multiplication by 1 costs as much as any.
template <bool Scaled>
inline float times(float x, float factor) {
  return Scaled ? x * factor : x;
}

// y = d activate(m (gate + bias[i])) (up + bias[columns + i]); bias may be null.
void gated_act(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int dtype, void* y,
               int64_t rows, int64_t columns, const float* bias, int activation, double m, double d, int threads) {
  const float of_gate = float(m), of_y = float(d);
  const Pieces pieces(rows, columns);
  const Rows gates{gate, gate_stride, dtype}, ups{up, up_stride, dtype};
  const DenseOut out{y, columns, dtype};
  with_gate(activation, [&](auto a) {
    with_flags(bias != nullptr, m != 1.0 || d != 1.0, [&](auto biased, auto scaled) {
      constexpr bool kBiased = decltype(biased)::value, kScaled = decltype(scaled)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns >= kParallel)
      for (int64_t k = 0; k < pieces.count(); ++k) {
        alignas(64) float g_buffer[kPiece], u_buffer[kPiece], to[kPiece];
        const Piece p = pieces[k];
        int64_t g_stride, u_stride;
        const float* g = gates.view(p, g_buffer, &g_stride);
        const float* u = ups.view(p, u_buffer, &u_stride);
        float* const begin = out.begin(p, to);
        float* w = begin;
        const float* const b = bias + (kBiased ? p.column : 0);
        for (int64_t r = 0; r < p.rows; ++r, g += g_stride, u += u_stride, w += p.columns) {
#pragma omp simd
          for (int64_t i = 0; i < p.columns; ++i) {
            const float z = times<kScaled>(kBiased ? g[i] + b[i] : g[i], of_gate);
            const float v = times<kScaled>(kBiased ? u[i] + b[columns + i] : u[i], of_y);
            w[i] = activate<decltype(a)::value>(z, 0.0f) * v;
          }
        }
        out.end(p, begin);
      }
    });
  });
}

// dgate = d m dy (up + bias) act'(m (gate + bias));  dup = d dy act(m (gate + bias));  grad_bias = their sums over the
// rows, or null.
void gated_act_backward(const void* grad_y, int64_t y_stride, const void* gate, int64_t gate_stride, const void* up,
                        int64_t up_stride, int dtype, void* grad_gate, void* grad_up, int64_t grad_stride,
                        float* grad_bias, int64_t rows, int64_t columns, const float* bias, int activation, double m,
                        double d, int threads) {
  const float of_gates = float(m), of_y = float(d);
  constexpr int64_t kPart = 1024;  // columns of a tile
  const Tiles tiles({rows, columns, 1}, 2 * kTile, kPart);
  const Rows g_rows{grad_y, y_stride, dtype}, gates{gate, gate_stride, dtype}, ups{up, up_stride, dtype};
  const DenseOut gate_out{grad_gate, grad_stride, dtype}, up_out{grad_up, grad_stride, dtype};
  const bool parallel = rows * columns >= kParallel;
  const int64_t partials = grad_bias ? tiles.partials() : 0;
  const Memory<float> sums(2 * partials);
  with_gate(activation, [&](auto a) {
    with_flags(bias != nullptr, m != 1.0 || d != 1.0, [&](auto biased, auto scaled) {
      with_flag(grad_bias != nullptr, [&](auto summed) {
        constexpr bool kBiased = decltype(biased)::value, kScaled = decltype(scaled)::value;
        constexpr bool kSummed = decltype(summed)::value;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
        for (int64_t k = 0; k < tiles.count(); ++k) {
          alignas(64) float dy_buffer[kPart], g_buffer[kPart], u_buffer[kPart], dg_buffer[kPart], du_buffer[kPart];
          const Piece p = tiles[k];
          float* const gate_sum = sums + (kSummed ? tiles.partial(p) : 0);
          float* const up_sum = gate_sum + partials;
          for (int64_t i = 0; kSummed && i < p.columns; ++i) gate_sum[i] = up_sum[i] = 0.0f;
          const float* const b = bias + (kBiased ? p.column : 0);
          for (int64_t r = 0; r < p.rows; ++r) {
            const Piece row{p.row + r, 1, p.column, p.columns};
            const float* const dy = g_rows.read(row, dy_buffer);
            const float* const g = gates.read(row, g_buffer);
            const float* const u = ups.read(row, u_buffer);
            float* const dg = gate_out.begin(row, dg_buffer);
            float* const du = up_out.begin(row, du_buffer);
#pragma omp simd
            for (int64_t i = 0; i < p.columns; ++i) {
              const float z = times<kScaled>(kBiased ? g[i] + b[i] : g[i], of_gates);
              const float v = kBiased ? u[i] + b[columns + i] : u[i], grad = times<kScaled>(dy[i], of_y);
              const float slope = grad * v * derivative<decltype(a)::value>(z, 0.0f);
              const float of_gate = times<kScaled>(slope, of_gates);
              const float of_up = grad * activate<decltype(a)::value>(z, 0.0f);
              dg[i] = of_gate;
              du[i] = of_up;
              if constexpr (kSummed) {
                gate_sum[i] += of_gate;
                up_sum[i] += of_up;
              }
            }
            gate_out.end(row, dg);
            up_out.end(row, du);
          }
        }
      });
    });
  });
  for (int64_t half = 0; grad_bias && half < 2; ++half) {
    float* const to = grad_bias + half * columns;
    sum_tiles(tiles, sums + half * partials, parallel, threads, [=](int64_t c, double total) { to[c] = float(total); });
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&gated_act>::named("gated_act"),
    Entry<&gated_act_backward>::named("gated_act_backward"),
    {},
};
