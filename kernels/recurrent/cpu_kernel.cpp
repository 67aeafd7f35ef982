// The recurrence of a GRU on the CPU, over a whole sequence, in float32.
//
// Threads stay for the whole sequence, with one barrier a step. Each owns some vectors of hidden units and packs their
// weights for itself, so that it reads them from its own cache. Every sum has one order, however many threads there are.
#include "activations.h"
#include "kernel.h"
#include "matmul.h"
#include "memory.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t kRows = 64;    // of the batch, whose products stay in the second-level cache
constexpr int64_t kDepth = 128;  // of weights that stay in that cache while they meet all rows
constexpr int64_t kParallelProducts = 1 << 20;  // multiplications of a step that are worth a second thread

struct Sizes {
  int64_t steps, batch, hidden;
  int64_t states() const { return batch * hidden; }
  bool parallel() const { return 3 * hidden * states() >= kParallelProducts; }
};

// As `multiply`, a part of the depth after the other.
inline void multiply_deep(const Product& p, int64_t rows, int64_t columns) {
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    Product part = p;
    part.a.data += k * p.a.column;
    part.a.soon += k * p.a.soon_column;
    part.depth = least(kDepth, p.depth - k);
    part.b += k * p.b_row;
    part.add = p.add || k > 0;
    multiply(part, rows, columns);
  }
}

// [H][3 kWidth] of weight [3 H, H]: for each k the three gates of the units from `unit` on, zeros beyond the last.
void pack_gates(const float* weight, int64_t hidden, int64_t unit, float* packed) {
  for (int64_t gate = 0; gate < 3; ++gate) {
    for (int64_t j = 0; j < kWidth; ++j) {
      const bool exists = unit + j < hidden;
      const float* const row = weight + (gate * hidden + (exists ? unit + j : 0)) * hidden;
      float* const to = packed + gate * kWidth + j;
      for (int64_t k = 0; k < hidden; ++k) to[k * 3 * kWidth] = exists ? row[k] : 0.0f;
    }
  }
}

// One row of a batch and one vector of units: x are the gates from the input and p the products with the state before,
// h that state, all at the first unit. r = sigmoid(xr + pr), z = sigmoid(xz + pz), n = tanh(xn + r (pn + bias)),
// next = n + z (h - n). Count units, 0: any number.
template <bool Keep, int64_t Count>
inline void cell(const float* x, const float* p, const float* bias, const float* h, float* next, float* saved,
                 int64_t hidden, int64_t count) {
  const int64_t units = Count ? Count : count;
#pragma omp simd
  for (int64_t i = 0; i < units; ++i) {
    const float r = sigmoid(x[i] + p[i]), z = sigmoid(x[hidden + i] + p[kWidth + i]);
    const float hn = p[2 * kWidth + i] + bias[i], n = tanh_fast(multiply_add(r, hn, x[2 * hidden + i]));
    next[i] = multiply_add(z, h[i] - n, n);
    if constexpr (Keep) {
      saved[i] = r;
      saved[hidden + i] = z;
      saved[2 * hidden + i] = n;
      saved[3 * hidden + i] = hn;
    }
  }
}

template <bool Keep>
inline void cell_of(const float* x, const float* p, const float* bias, const float* h, float* next, float* saved,
                    int64_t hidden, int64_t count) {
  if (count == kWidth) return cell<Keep, kWidth>(x, p, bias, h, next, saved, hidden, count);
  cell<Keep, 0>(x, p, bias, h, next, saved, hidden, count);
}

// gates [T, B, 3 H], h0 [B, H], weight [3 H, H], bias_n [H] or null -> y [T, B, H], saved [T, B, 4 H] or null: r, z, n,
// and the state's part of n. y is rounded to `dtype`; then the state itself stands in `state` [B, H], which starts as h0
// and is null for float32. Products are of y, the rest of the step is of the state.
void gru(const float* gates, const float* h0, const float* weight, const float* bias_n, float* y, float* state,
         float* saved, int64_t steps, int64_t batch, int64_t hidden, int dtype, int threads) {
  const Sizes size{steps, batch, hidden};
  Barrier everyone;
  constexpr int64_t columns = 3 * kWidth;
  const int64_t vectors = whole_vectors(hidden) / kWidth;  // of hidden units
  const Memory<float> all_packed(vectors * hidden * columns), all_products(kRows * vectors * columns);
#pragma omp parallel num_threads(threads) if (size.parallel())
  {
    const Share mine(vectors);
    float* const packed = all_packed + mine.first * hidden * columns;
    for (int64_t v = mine.first; v < mine.last; ++v) {
      pack_gates(weight, hidden, v * kWidth, packed + (v - mine.first) * hidden * columns);
    }
    const int64_t width = (mine.last - mine.first) * columns;
    float* const products = all_products + kRows * mine.first * columns;
    alignas(64) const float zeros[kWidth] = {};
    for (int64_t t = 0; t < steps; ++t) {
      const float* const before = t ? y + (t - 1) * size.states() : h0;
      for (int64_t first = 0; first < batch; first += kRows) {
        const int64_t rows = least(kRows, batch - first);
        const Strided a = Strided::rows(before + first * hidden, hidden);
        for (int64_t v = mine.first; v < mine.last; ++v) {
          const int64_t k = v - mine.first;
          multiply_deep({a, hidden, packed + k * hidden * columns, columns, products + k * columns, width, false}, rows,
                        columns);
        }
        // Row by row, so that gates and results pass in the order of memory.
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t row = t * batch + first + i;
          for (int64_t v = mine.first; v < mine.last; ++v) {
            const int64_t unit = v * kWidth, count = least(kWidth, hidden - unit), at = (first + i) * hidden + unit;
            const float *const x = gates + row * 3 * hidden + unit, *const b = bias_n ? bias_n + unit : zeros;
            const float* const p = products + i * width + (v - mine.first) * columns;
            float* const to = y + row * hidden + unit;
            float* const next = state ? state + at : to;
            const float* const h = state ? next : before + at;
            if (saved) {
              cell_of<true>(x, p, b, h, next, saved + row * 4 * hidden + unit, hidden, count);
            } else {
              cell_of<false>(x, p, b, h, next, nullptr, hidden, count);
            }
            if (state) {
              uint16_t rounded[kWidth];
              store_span(rounded, dtype, 0, count, next);
              load_span(rounded, dtype, 0, count, to);
            }
          }
        }
      }
      everyone.wait();
    }
  }
}

// Gradients of one row and one vector of units. `grad` is that of the state, here and then of the state before, as far
// as it does not go through the products.
template <int64_t Count>
inline void cell_backward(const float* grad_y, const float* saved, const float* h, float* grad, float* grad_gates,
                          float* grad_n, int64_t hidden, int64_t count) {
  const int64_t units = Count ? Count : count;
#pragma omp simd
  for (int64_t i = 0; i < units; ++i) {
    const float r = saved[i], z = saved[hidden + i], n = saved[2 * hidden + i], hn = saved[3 * hidden + i];
    const float g = grad[i] + grad_y[i], dn = g * (1.0f - z) * (1.0f - n * n);
    grad_gates[i] = dn * hn * (r * (1.0f - r));
    grad_gates[hidden + i] = g * (h[i] - n) * (z * (1.0f - z));
    grad_gates[2 * hidden + i] = dn;
    grad_n[i] = dn * r;
    grad[i] = g * z;
  }
}

// Vectors of one product with `left` of them to go: as `multiply` takes them.
inline int64_t panel_vectors(int64_t left) { return left == 4 ? 2 : least(left, 3); }

// grad_y [T, B, H] or null, grad_last [B, H] or null -> grad_gates [T, B, 3 H], grad_n [T, B, H] (of the state's part of
// n), grad_h0 [B, H].
void gru_backward(const float* grad_y, const float* grad_last, const float* saved, const float* y, const float* h0,
                  const float* weight, float* grad_gates, float* grad_n, float* grad_h0, int64_t steps, int64_t batch,
                  int64_t hidden, int threads) {
  const Sizes size{steps, batch, hidden};
  Barrier everyone;
  alignas(64) const float zeros[kWidth] = {};
  const Memory<float> all_packed(3 * hidden * whole_vectors(hidden)), all_grad(batch * whole_vectors(hidden));
#pragma omp parallel num_threads(threads) if (size.parallel())
  {
    const Share mine(whole_vectors(hidden) / kWidth);  // vectors of hidden units
    const int64_t unit = mine.first * kWidth, columns = (mine.last - mine.first) * kWidth;
    const int64_t units = least(columns, hidden - unit);  // below 1 for a thread without any
    float* const packed = all_packed + 3 * hidden * unit;  // a panel after the other, [3 H][its columns]
    for (int64_t j = 0; j < columns;) {
      const int64_t width = panel_vectors((columns - j) / kWidth) * kWidth;
      for (int64_t k = 0; k < 3 * hidden; ++k) {
        float* const to = packed + 3 * hidden * j + k * width;
        for (int64_t i = 0; i < width; ++i) to[i] = j + i < units ? weight[k * hidden + unit + j + i] : 0.0f;
      }
      j += width;
    }
    float* const grad = all_grad + batch * unit;
    for (int64_t i = 0; i < batch * columns; ++i) {
      const int64_t row = i / columns, j = i % columns;
      grad[i] = grad_last && j < units ? grad_last[row * hidden + unit + j] : 0.0f;
    }
    for (int64_t t = steps - 1; t >= 0; --t) {
      const float* const before = t ? y + (t - 1) * size.states() : h0;
      for (int64_t i = 0; i < batch; ++i) {
        const int64_t row = t * batch + i;
        for (int64_t j = 0; j < units; j += kWidth) {
          const int64_t at = row * hidden + unit + j;
          const float *const g = grad_y ? grad_y + at : zeros, *const s = saved + row * 4 * hidden + unit + j;
          const float* const h = before + i * hidden + unit + j;
          float *const d = grad + i * columns + j, *const dg = grad_gates + row * 3 * hidden + unit + j;
          if (units - j >= kWidth) {
            cell_backward<kWidth>(g, s, h, d, dg, grad_n + at, hidden, kWidth);
          } else {
            cell_backward<0>(g, s, h, d, dg, grad_n + at, hidden, units - j);
          }
        }
      }
      everyone.wait();
      // The state before met the weights of r and z, whose gradients are those of the gates, and those of n.
      const Strided rz = Strided::rows(grad_gates + t * 3 * size.states(), 3 * hidden);
      const Strided n = Strided::rows(grad_n + t * size.states(), hidden);
      for (int64_t j = 0; j < columns;) {
        const int64_t width = panel_vectors((columns - j) / kWidth) * kWidth;
        const float* const panel = packed + 3 * hidden * j;
        multiply_deep({rz, 2 * hidden, panel, width, grad + j, columns, true}, batch, width);
        multiply_deep({n, hidden, panel + 2 * hidden * width, width, grad + j, columns, true}, batch, width);
        j += width;
      }
    }
    for (int64_t i = 0; i < batch; ++i) {
      for (int64_t j = 0; j < units; ++j) grad_h0[i * hidden + unit + j] = grad[i * columns + j];
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&gru>::named("gru"),
    Entry<&gru_backward>::named("gru_backward"),
    {},
};
