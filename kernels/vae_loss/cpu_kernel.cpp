// vae_loss on the CPU. Inputs are [batch, columns] and [batch, latent] with strided rows; gradients are dense.
#include <omp.h>

#include "kernel.h"
#include "math.h"
#include "memory.h"
#include "rows.h"

namespace {

enum Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

// Sums `term(piece, values...)` over each row: pieces in parallel, then in order.
template <class Term>
void sum_rows(int64_t batch, int64_t columns, int threads, double* out, Term term) {
  const Pieces pieces(batch, columns);
  const Memory<double> partial(pieces.per_row > 1 ? pieces.count() : 0);
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * columns >= kParallel)
  for (int64_t k = 0; k < pieces.count(); ++k) {
    const Piece p = pieces[k];
    term(p, partial ? partial + k : out + p.row);
  }
  for (int64_t row = 0; columns == 0 && row < batch; ++row) out[row] = 0.0;
  if (partial) {
    for (int64_t row = 0; row < batch; ++row) {
      out[row] = 0.0;
      for (int64_t k = 0; k < pieces.per_row; ++k) out[row] += partial[row * pieces.per_row + k];
    }
  }
}

template <class F>
double row_sum(int64_t count, F f) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += f(i);
  return double(sum);
}

void vae_loss(const void* recon, int64_t recon_stride, int recon_dtype, const void* target, int64_t target_stride,
              int target_dtype, const void* mu, int64_t mu_stride, const void* logvar, int64_t logvar_stride,
              int latent_dtype, float* loss, float* reconstruction, float* kl, double beta, int64_t batch,
              int64_t columns, int64_t latent, bool bernoulli, int reduction, int threads) {
  const Rows x_rows{recon, recon_stride, recon_dtype}, t_rows{target, target_stride, target_dtype},
      m_rows{mu, mu_stride, latent_dtype}, v_rows{logvar, logvar_stride, latent_dtype};
  const Memory<double> of_image(2 * batch);
  double* const of_latent = of_image + batch;

  sum_rows(batch, columns, threads, of_image, [&](const Piece& p, double* sums) {
    alignas(64) float a[kPiece], b[kPiece];
    const float* x = x_rows.read(p, a);
    const float* t = t_rows.read(p, b);
    for (int64_t r = 0; r < p.rows; ++r, x += p.columns, t += p.columns) {
      sums[r] = bernoulli ? row_sum(p.columns,
                                    [=](int64_t i) {
                                      // (1 - t) x - ln sigmoid(x)
                                      const float negative = x[i] < 0.0f ? x[i] : 0.0f;
                                      const float e = exp_minus(__builtin_fabsf(x[i]));
                                      return (1.0f - t[i]) * x[i] - negative + log1p_unit(e);
                                    })
                          : row_sum(p.columns, [=](int64_t i) { return (x[i] - t[i]) * (x[i] - t[i]); });
    }
  });
  sum_rows(batch, latent, threads, of_latent, [&](const Piece& p, double* sums) {
    alignas(64) float a[kPiece], b[kPiece];
    const float* m = m_rows.read(p, a);
    const float* v = v_rows.read(p, b);
    for (int64_t r = 0; r < p.rows; ++r, m += p.columns, v += p.columns) {
      sums[r] = -0.5 * row_sum(p.columns, [=](int64_t i) { return 1.0f + v[i] - m[i] * m[i] - exp_fast(v[i]); });
    }
  });

  if (reduction == kNone) {
    for (int64_t row = 0; row < batch; ++row) {
      reconstruction[row] = float(of_image[row]);
      kl[row] = float(of_latent[row]);
      loss[row] = float(of_image[row] + beta * of_latent[row]);
    }
  } else {
    double image_sum = 0.0, latent_sum = 0.0;
    for (int64_t row = 0; row < batch; ++row) image_sum += of_image[row], latent_sum += of_latent[row];
    const double scale = reduction == kMean ? 1.0 / double(batch) : 1.0;
    *reconstruction = float(scale * image_sum);
    *kl = float(scale * latent_sum);
    *loss = float(scale * (image_sum + beta * latent_sum));
  }
}

// Gradients of the three outputs: null, or a pointer with stride 0 (one value) or 1 (one a sample).
struct OutputGradient {
  const float* data;
  int64_t stride;
  float operator[](int64_t row) const { return data ? data[row * stride] : 0.0f; }
};

void vae_loss_backward(const float* grad_loss, int64_t grad_loss_stride, const float* grad_reconstruction,
                       int64_t grad_reconstruction_stride, const float* grad_kl, int64_t grad_kl_stride,
                       const void* recon, int64_t recon_stride, int recon_dtype, const void* target,
                       int64_t target_stride, int target_dtype, const void* mu, int64_t mu_stride, const void* logvar,
                       int64_t logvar_stride, int latent_dtype, void* grad_recon, void* grad_mu, void* grad_logvar,
                       double beta, int64_t batch, int64_t columns, int64_t latent, bool bernoulli, int reduction,
                       int threads) {
  const Rows x_rows{recon, recon_stride, recon_dtype}, t_rows{target, target_stride, target_dtype},
      m_rows{mu, mu_stride, latent_dtype}, v_rows{logvar, logvar_stride, latent_dtype};
  const DenseOut x_out{grad_recon, columns, recon_dtype}, m_out{grad_mu, latent, latent_dtype},
      v_out{grad_logvar, latent, latent_dtype};
  const OutputGradient g{grad_loss, grad_loss_stride}, g_image{grad_reconstruction, grad_reconstruction_stride},
      g_latent{grad_kl, grad_kl_stride};
  const float scale = reduction == kMean ? 1.0f / float(batch) : 1.0f, weight = float(beta);

  const Pieces images(batch, columns);
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * columns >= kParallel)
  for (int64_t k = 0; k < images.count(); ++k) {
    alignas(64) float a[kPiece], b[kPiece], c[kPiece];
    const Piece p = images[k];
    const float* x = x_rows.read(p, a);
    const float* t = t_rows.read(p, b);
    float* dx = x_out.begin(p, c);
    for (int64_t r = 0; r < p.rows; ++r) {
      const float w = scale * (g[p.row + r] + g_image[p.row + r]);
      const int64_t first = r * p.columns, last = first + p.columns;
      if (bernoulli) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
          const float e = exp_minus(__builtin_fabsf(x[i])), sigmoid_of_abs = 1.0f / (1.0f + e);
          dx[i] = w * ((x[i] < 0.0f ? e * sigmoid_of_abs : sigmoid_of_abs) - t[i]);
        }
      } else {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) dx[i] = 2.0f * w * (x[i] - t[i]);
      }
    }
    x_out.end(p, dx);
  }

  const Pieces latents(batch, latent);
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * latent >= kParallel)
  for (int64_t k = 0; k < latents.count(); ++k) {
    alignas(64) float a[kPiece], b[kPiece], c[kPiece], d[kPiece];
    const Piece p = latents[k];
    const float* m = m_rows.read(p, a);
    const float* v = v_rows.read(p, b);
    float* dm = m_out.begin(p, c);
    float* dv = v_out.begin(p, d);
    for (int64_t r = 0; r < p.rows; ++r) {
      const float u = scale * (weight * g[p.row + r] + g_latent[p.row + r]);
#pragma omp simd
      for (int64_t i = r * p.columns; i < (r + 1) * p.columns; ++i) {
        dm[i] = u * m[i];
        dv[i] = 0.5f * u * (exp_fast(v[i]) - 1.0f);
      }
    }
    m_out.end(p, dm);
    v_out.end(p, dv);
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&vae_loss>::named("vae_loss"),
    Entry<&vae_loss_backward>::named("vae_loss_backward"),
    {},
};
