"""vae_loss on the GPU: partial sums by row and column block, then one program adds them in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.launch import ceil_div, next_power_of_2
from genai_fast.kernels.common.math_triton import exp, log1p_unit
from genai_fast.kernels.common.rows import as_rows, columns_of, dense_like, require_alike, require_per_sample
from genai_fast.kernels.common.tuned import launch

BLOCK = 1024  # columns a program, 8 a thread: 16 spill on sm_100
BLOCK_LATENT = 512
FINALISE = 4096  # partial sums a step of the last program
NUM_WARPS = 4
REDUCTION = {"none": 0, "sum": 1, "mean": 2}


@triton.jit
def _vae_loss_forward(
    recon_ptr, target_ptr,                   # [batch, columns]
    mu_ptr, logvar_ptr,                      # [batch, latent]
    partial_ptr, kl_ptr,                     # [batch, splits], [batch]
    columns, latent, recon_stride, target_stride, mu_stride, logvar_stride, splits,
    BERNOULLI: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LATENT: tl.constexpr,
):  # fmt: skip
    """-log p(target | recon) over one block of columns; a row's first program adds the row's KL."""
    program = tl.program_id(0)
    row, split = (program // splits).to(tl.int64), program % splits
    column = split.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    x = tl.load(recon_ptr + row * recon_stride + column, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + row * target_stride + column, mask=mask, other=0.0).to(tl.float32)
    if BERNOULLI:  # noqa: SIM108
        # (1 - t) x - ln sigmoid(x)
        terms = (1.0 - t) * x - tl.where(x < 0.0, x, 0.0) + log1p_unit(exp(-tl.abs(x)))
    else:
        terms = (x - t) * (x - t)
    tl.store(partial_ptr + program, tl.sum(tl.where(mask, terms, 0.0), axis=0))
    if split == 0:
        total = tl.zeros([BLOCK_LATENT], tl.float32)
        for first in range(0, latent, BLOCK_LATENT):
            offs = first + tl.arange(0, BLOCK_LATENT)
            mu = tl.load(mu_ptr + row * mu_stride + offs, mask=offs < latent, other=0.0).to(tl.float32)
            logvar = tl.load(logvar_ptr + row * logvar_stride + offs, mask=offs < latent, other=0.0).to(tl.float32)
            total += 1.0 + logvar - mu * mu - exp(logvar)  # masked elements give 0
        tl.store(kl_ptr + row, -0.5 * tl.sum(total, axis=0))


@triton.jit
def _vae_loss_finalise(
    partial_ptr, kl_rows_ptr, beta_ptr,      # [batch, splits], [batch], 0-d or None
    loss_ptr, reconstruction_ptr, kl_ptr,    # [batch] or 0-d
    batch, splits, beta, scale,
    NONE: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """loss = reconstruction + beta kl, by sample or summed over the batch and scaled; one program."""
    if beta_ptr is not None:
        beta = tl.load(beta_ptr).to(tl.float32)
    image_sum = tl.zeros([ROWS], tl.float32)
    latent_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, batch, ROWS):
        row = first + tl.arange(0, ROWS)
        image = tl.zeros([ROWS], tl.float32)
        for split in range(0, splits, SPLITS):
            offs = split + tl.arange(0, SPLITS)
            part = tl.load(
                partial_ptr + row[:, None].to(tl.int64) * splits + offs[None, :],
                mask=(row < batch)[:, None] & (offs < splits)[None, :],
                other=0.0,
            )
            image += tl.sum(part, axis=1)
        latent = tl.load(kl_rows_ptr + row, mask=row < batch, other=0.0)
        if NONE:
            tl.store(reconstruction_ptr + row, image, mask=row < batch)
            tl.store(kl_ptr + row, latent, mask=row < batch)
            tl.store(loss_ptr + row, image + beta * latent, mask=row < batch)
        else:
            image_sum += image
            latent_sum += latent
    if not NONE:
        image_total = scale * tl.sum(image_sum, axis=0)
        latent_total = scale * tl.sum(latent_sum, axis=0)
        tl.store(reconstruction_ptr, image_total)
        tl.store(kl_ptr, latent_total)
        tl.store(loss_ptr, image_total + beta * latent_total)


@triton.jit
def _vae_loss_backward(
    grad_loss_ptr, grad_reconstruction_ptr, grad_kl_ptr,   # [batch] or 0-d, or None
    recon_ptr, target_ptr, mu_ptr, logvar_ptr, beta_ptr,
    grad_recon_ptr, grad_mu_ptr, grad_logvar_ptr,          # [batch, columns], [batch, latent] twice
    grad_loss_stride, grad_reconstruction_stride, grad_kl_stride,
    columns, latent, recon_stride, target_stride, mu_stride, logvar_stride, splits, beta, scale,
    BERNOULLI: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LATENT: tl.constexpr,
):  # fmt: skip
    """drecon = w (sigmoid(recon) - target) or 2 w (recon - target);  dmu = u mu;  dlogvar = u (exp(logvar) - 1) / 2."""
    program = tl.program_id(0)
    row, split = (program // splits).to(tl.int64), program % splits
    if beta_ptr is not None:
        beta = tl.load(beta_ptr).to(tl.float32)
    w = 0.0
    u = 0.0
    if grad_loss_ptr is not None:
        grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride).to(tl.float32)
        w += grad_loss
        u += beta * grad_loss
    if grad_reconstruction_ptr is not None:
        w += tl.load(grad_reconstruction_ptr + row * grad_reconstruction_stride).to(tl.float32)
    if grad_kl_ptr is not None:
        u += tl.load(grad_kl_ptr + row * grad_kl_stride).to(tl.float32)
    w *= scale
    u *= scale

    column = split.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    x = tl.load(recon_ptr + row * recon_stride + column, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + row * target_stride + column, mask=mask, other=0.0).to(tl.float32)
    if BERNOULLI:  # noqa: SIM108
        grad = w * (1.0 / (1.0 + exp(-x)) - t)
    else:
        grad = 2.0 * w * (x - t)
    tl.store(grad_recon_ptr + row * columns + column, grad.to(grad_recon_ptr.dtype.element_ty), mask=mask)

    if split == 0:
        for first in range(0, latent, BLOCK_LATENT):
            offs = first + tl.arange(0, BLOCK_LATENT)
            inside = offs < latent
            mu = tl.load(mu_ptr + row * mu_stride + offs, mask=inside, other=0.0).to(tl.float32)
            logvar = tl.load(logvar_ptr + row * logvar_stride + offs, mask=inside, other=0.0).to(tl.float32)
            out = row * latent + offs
            tl.store(grad_mu_ptr + out, (u * mu).to(grad_mu_ptr.dtype.element_ty), mask=inside)
            grad_logvar = 0.5 * u * (exp(logvar) - 1.0)
            tl.store(grad_logvar_ptr + out, grad_logvar.to(grad_logvar_ptr.dtype.element_ty), mask=inside)


def _beta(beta_tensor, beta, device):
    """(pointer or None, value): a 0-d CPU tensor beside CUDA tensors is read here, which needs no synchronisation."""
    if beta_tensor is not None and beta_tensor.device != device:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"vae_loss: beta: expected a tensor on {device} in a CUDA graph, which would repeat the number of now,"
                f" got one on {beta_tensor.device}; move it there"
            )
        return None, float(beta_tensor)
    return beta_tensor, beta


def _scale(batch, reduction):
    return 1.0 / batch if reduction == "mean" and batch else 1.0


def _tile(name, recon, batch, columns):
    """BLOCK and num_warps, and the blocks of a row."""
    chosen = launch(f"vae_loss/{name}", recon, (batch, columns), BLOCK=BLOCK, num_warps=NUM_WARPS)
    chosen["BLOCK"] = min(chosen["BLOCK"], next_power_of_2(columns))
    return chosen, max(ceil_div(columns, chosen["BLOCK"]), 1)


def vae_loss(recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction):
    require_alike(recon, target, dtype=False)
    require_alike(mu, logvar)
    require_per_sample(recon, mu)
    (x, x_stride), (t, t_stride), (m, m_stride), (v, v_stride) = map(as_rows, (recon, target, mu, logvar))
    batch, columns, latent = recon.shape[0], columns_of(recon), columns_of(mu)
    chosen, splits = _tile("forward", recon, batch, columns)
    partial = recon.new_empty((batch, splits), dtype=torch.float32)
    kl_rows = recon.new_empty(batch, dtype=torch.float32)
    shape = (batch,) if reduction == "none" else ()
    outputs = tuple(recon.new_empty(shape, dtype=torch.float32) for _ in range(3))
    pointer, beta = _beta(beta_tensor, beta, recon.device)
    if batch:
        _vae_loss_forward[(batch * splits,)](
            x, t, m, v, partial, kl_rows, columns, latent, x_stride, t_stride, m_stride, v_stride, splits,
            BERNOULLI=likelihood == "bernoulli", BLOCK_LATENT=min(BLOCK_LATENT, next_power_of_2(latent)), **chosen,
        )  # fmt: skip
    width = min(next_power_of_2(splits), FINALISE)
    _vae_loss_finalise[(1,)](
        partial, kl_rows, pointer, *outputs, batch, splits, beta, _scale(batch, reduction),
        NONE=reduction == "none", ROWS=min(FINALISE // width, next_power_of_2(batch)), SPLITS=width,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return outputs


def vae_loss_backward(
    grad_loss, grad_reconstruction, grad_kl, recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction
):
    require_alike(recon, target, dtype=False)
    require_alike(mu, logvar)
    require_per_sample(recon, mu)
    require_per_sample(recon, grad_loss, grad_reconstruction, grad_kl, one=reduction != "none")
    (x, x_stride), (t, t_stride), (m, m_stride), (v, v_stride) = map(as_rows, (recon, target, mu, logvar))
    batch, columns, latent = recon.shape[0], columns_of(recon), columns_of(mu)
    chosen, splits = _tile("backward", recon, batch, columns)
    grads = tuple(dense_like(tensor) for tensor in (recon, mu, logvar))
    upstream = (grad_loss, grad_reconstruction, grad_kl)
    pointer, beta = _beta(beta_tensor, beta, recon.device)
    if batch:
        _vae_loss_backward[(batch * splits,)](
            *upstream, x, t, m, v, pointer, *grads,
            *(g.stride(0) if g is not None and g.dim() else 0 for g in upstream),
            columns, latent, x_stride, t_stride, m_stride, v_stride, splits, beta, _scale(batch, reduction),
            BERNOULLI=likelihood == "bernoulli", BLOCK_LATENT=min(BLOCK_LATENT, next_power_of_2(latent)), **chosen,
        )  # fmt: skip
    return grads
