// reparameterize on the CPU. mu and logvar are [batch, columns] with strided rows; everything else is dense.
#include <omp.h>

#include "kernel.h"
#include "memory.h"
#include "philox.h"
#include "rows.h"

namespace {

// z = mu + exp(logvar / 2) eps;  kl[b] = -1/2 sum(1 + logvar - mu^2 - exp(logvar)), if kl is not null.
void reparameterize(const void* mu, int64_t mu_stride, const void* logvar, int64_t logvar_stride, void* z, float* kl,
                    const int64_t* seed, int64_t offset, int64_t batch, int64_t columns, int dtype, int threads) {
  const Pieces pieces(batch, columns);
  const Rows mu_rows{mu, mu_stride, dtype}, logvar_rows{logvar, logvar_stride, dtype};
  const DenseOut z_out{z, columns, dtype};
  // Rows longer than a piece: partial sums first, added in order afterwards, whatever the number of threads.
  const bool in_parts = kl && pieces.per_row > 1;
  const Memory<float> parts(in_parts ? pieces.count() : 0);
  float* const partial = in_parts ? parts : kl;
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * columns >= kParallel)
  for (int64_t k = 0; k < pieces.count(); ++k) {
    alignas(64) float room[normals_room(kPiece)], a[kPiece], b[kPiece], c[kPiece];
    const Piece p = pieces[k];
    const int64_t n = p.count();
    const float* m = mu_rows.read(p, a);
    const float* v = logvar_rows.read(p, b);
    float* out = z_out.begin(p, c);
    const float* eps = normals(room, uint64_t(offset) + uint64_t(p.row * columns + p.column), n, *seed);
    alignas(64) float terms[kPiece];
    if (kl) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float mean = m[i], log_variance = v[i], std = exp_fast(0.5f * log_variance);
        out[i] = multiply_add(std, eps[i], mean);
        terms[i] = 1.0f + log_variance - mean * mean - std * std;
      }
      for (int64_t r = 0; r < p.rows; ++r) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < p.columns; ++i) sum += terms[r * p.columns + i];
        partial[pieces.per_row > 1 ? k : p.row + r] = -0.5f * sum;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = multiply_add(exp_fast(0.5f * v[i]), eps[i], m[i]);
    }
    z_out.end(p, out);
  }
  for (int64_t row = 0; kl && columns == 0 && row < batch; ++row) kl[row] = 0.0f;
  if (in_parts) {
    for (int64_t row = 0; row < batch; ++row) {
      double sum = 0.0;
      for (int64_t k = 0; k < pieces.per_row; ++k) sum += double(partial[row * pieces.per_row + k]);
      kl[row] = float(sum);
    }
  }
}

// dmu = dz + mu dkl;  dlogvar = (dz exp(logvar / 2) eps + dkl (exp(logvar) - 1)) / 2; dz or dkl may be null.
void reparameterize_backward(const void* grad_z, int64_t grad_z_stride, const float* grad_kl, int64_t grad_kl_stride,
                             const void* mu, int64_t mu_stride, const void* logvar, int64_t logvar_stride,
                             void* grad_mu, void* grad_logvar, const int64_t* seed, int64_t offset, int64_t batch,
                             int64_t columns, int dtype, int threads) {
  if (!grad_z && !grad_kl && batch * columns > 0) {
    genai_fast_raise(Raised::kValueError, "grad_z and grad_kl: expected at least one gradient, got none");
  }
  const Pieces pieces(batch, columns);
  const Rows mu_rows{mu, mu_stride, dtype}, logvar_rows{logvar, logvar_stride, dtype},
      grad_rows{grad_z, grad_z_stride, dtype};
  const DenseOut mu_out{grad_mu, columns, dtype}, logvar_out{grad_logvar, columns, dtype};
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * columns >= kParallel)
  for (int64_t k = 0; k < pieces.count(); ++k) {
    alignas(64) float room[normals_room(kPiece)], a[kPiece], b[kPiece], c[kPiece], d[kPiece], e[kPiece];
    const Piece p = pieces[k];
    const int64_t n = p.count();
    const float* m = mu_rows.read(p, a);
    const float* v = logvar_rows.read(p, b);
    float* dm = mu_out.begin(p, c);
    float* dv = logvar_out.begin(p, d);
    if (grad_z) {
      const float* g = grad_rows.read(p, e);
      const float* eps = normals(room, uint64_t(offset) + uint64_t(p.row * columns + p.column), n, *seed);
      if (grad_kl) {
        for (int64_t r = 0; r < p.rows; ++r) {
          const float w = grad_kl[(p.row + r) * grad_kl_stride];
#pragma omp simd
          for (int64_t i = r * p.columns; i < (r + 1) * p.columns; ++i) {
            const float std = exp_fast(0.5f * v[i]), dz = g[i];
            dm[i] = multiply_add(w, m[i], dz);
            dv[i] = 0.5f * multiply_add(std * eps[i], dz, w * (std * std - 1.0f));
          }
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          dm[i] = g[i];
          dv[i] = 0.5f * exp_fast(0.5f * v[i]) * eps[i] * g[i];
        }
      }
    } else {
      for (int64_t r = 0; r < p.rows; ++r) {
        const float w = grad_kl[(p.row + r) * grad_kl_stride];
#pragma omp simd
        for (int64_t i = r * p.columns; i < (r + 1) * p.columns; ++i) {
          dm[i] = w * m[i];
          dv[i] = 0.5f * w * (exp_fast(v[i]) - 1.0f);
        }
      }
    }
    mu_out.end(p, dm);
    logvar_out.end(p, dv);
  }
}

// Raw words of the stream, for tests: [count].
void philox_words(int64_t* out, const int64_t* seed, int64_t offset, int64_t count) {
  uint32_t words[4][kCounters];
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t position = uint64_t(offset) + uint64_t(i);
    philox_block(position / 4, uint32_t(uint64_t(*seed)), uint32_t(uint64_t(*seed) >> 32), words);
    out[i] = words[position % 4][0];
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&reparameterize>::named("reparameterize"),
    Entry<&reparameterize_backward>::named("reparameterize_backward"),
    Entry<&philox_words>::named("philox_words"),
    {},
};
