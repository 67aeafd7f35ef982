"""reparameterize on the GPU. Four normals a Philox call; eps is recomputed in backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genai_fast.kernels.common.launch import ceil_div, row_tile
from genai_fast.kernels.common.philox_triton import normals, words
from genai_fast.kernels.common.rows import (
    as_rows,
    columns_of,
    dense_like,
    require_alike,
    require_per_sample,
    require_seed,
)
from genai_fast.kernels.common.tuned import launch

ELEMENTS = 1024  # a program: 8 elements a thread, two Philox calls
NUM_WARPS = 4


@triton.jit
def _tile(batch, columns, offset, splits, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows [ROWS], columns and mask [ROWS, BLOCK], and Philox counters [ROWS, BLOCK / 4] of this program."""
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # batch * columns passes 2**31
    first = (program % splits).to(tl.int64) * BLOCK
    start = row * columns + offset  # position of each row's first element in the stream
    counter = ((start >> 2) + (first >> 2))[:, None] + tl.arange(0, BLOCK // 4)[None, :]
    column = (first + tl.arange(0, BLOCK))[None, :]
    if not ALIGNED:  # rows begin inside a counter's four lanes
        column = column - (start & 3)[:, None]
    mask = (row < batch)[:, None] & (column >= 0) & (column < columns)
    return row, column, mask, counter


@triton.jit
def _std(logvar):
    """exp(logvar / 2) in one instruction, whose argument's rounding costs |logvar| 2**-25 relatively."""
    return tl.exp2(logvar * 0.7213475204444817)


@triton.jit(do_not_specialize=["offset"])
def _reparameterize_forward(
    mu_ptr, logvar_ptr, z_ptr,               # [batch, columns], rows of mu and logvar strided
    kl_ptr,                                  # [batch, splits] or None
    seed_ptr,                                # int64 scalar
    batch, columns, mu_stride, logvar_stride, offset, splits,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """z = mu + exp(logvar / 2) eps;  kl = -1/2 sum(1 + logvar - mu^2 - exp(logvar)) over this program's columns."""
    row, column, mask, counter = _tile(batch, columns, offset, splits, ROWS, BLOCK, ALIGNED)
    eps = tl.reshape(normals(tl.load(seed_ptr), counter), [ROWS, BLOCK])
    mu = tl.load(mu_ptr + row[:, None] * mu_stride + column, mask=mask, other=0.0).to(tl.float32)
    logvar = tl.load(logvar_ptr + row[:, None] * logvar_stride + column, mask=mask, other=0.0).to(tl.float32)
    std = _std(logvar)
    z = mu + std * eps
    tl.store(z_ptr + row[:, None] * columns + column, z.to(z_ptr.dtype.element_ty), mask=mask)
    if kl_ptr is not None:
        # Masked elements load mu = logvar = 0, whose term is 0.
        terms = tl.where(mask, 1.0 + logvar - mu * mu - std * std, 0.0)
        tl.store(kl_ptr + row * splits + tl.program_id(0) % splits, -0.5 * tl.sum(terms, axis=1), mask=row < batch)


@triton.jit(do_not_specialize=["offset"])
def _reparameterize_backward(
    grad_z_ptr, grad_kl_ptr,                 # [batch, columns] or None, [batch] or None
    mu_ptr, logvar_ptr, grad_mu_ptr, grad_logvar_ptr,  # [batch, columns]
    seed_ptr,                                # int64 scalar
    batch, columns, grad_z_stride, grad_kl_stride, mu_stride, logvar_stride, offset, splits,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dmu = dz + mu dkl;  dlogvar = (dz exp(logvar / 2) eps + dkl (exp(logvar) - 1)) / 2."""
    row, column, mask, counter = _tile(batch, columns, offset, splits, ROWS, BLOCK, ALIGNED)
    logvar = tl.load(logvar_ptr + row[:, None] * logvar_stride + column, mask=mask, other=0.0).to(tl.float32)
    std = _std(logvar)
    grad_mu = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_logvar = tl.zeros([ROWS, BLOCK], tl.float32)
    if grad_z_ptr is not None:
        eps = tl.reshape(normals(tl.load(seed_ptr), counter), [ROWS, BLOCK])
        grad_z = tl.load(grad_z_ptr + row[:, None] * grad_z_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad_mu += grad_z
        grad_logvar += 0.5 * (grad_z * std * eps)
    if grad_kl_ptr is not None:
        grad_kl = tl.load(grad_kl_ptr + row * grad_kl_stride, mask=row < batch, other=0.0).to(tl.float32)[:, None]
        mu = tl.load(mu_ptr + row[:, None] * mu_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad_mu += grad_kl * mu
        grad_logvar += 0.5 * (grad_kl * (std * std - 1.0))
    out = row[:, None] * columns + column
    tl.store(grad_mu_ptr + out, grad_mu.to(grad_mu_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_logvar_ptr + out, grad_logvar.to(grad_logvar_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first"])
def _philox_words(out_ptr, seed_ptr, first, count, BLOCK: tl.constexpr):
    """Words of the counters from `first` on, in the order of the stream, as int64 [count]."""
    i = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = words(tl.load(seed_ptr), first + i.to(tl.int64))
    stream = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, stream.to(tl.int64), mask=offs < count)


def _geometry(name: str, x: torch.Tensor, batch: int, columns: int, offset: int):
    """Grid, splits and the constants of a launch."""
    aligned = offset % 4 == 0 and (columns % 4 == 0 or batch == 1)
    chosen = launch(f"reparameterize/{name}", x, (batch, columns), elements=ELEMENTS, num_warps=NUM_WARPS)
    rows, block, splits = row_tile(columns if aligned else columns + 3, chosen["elements"])
    constants = dict(ROWS=rows, BLOCK=block, ALIGNED=aligned, num_warps=chosen["num_warps"])
    return (ceil_div(batch, rows) * splits,), splits, constants


def reparameterize(mu, logvar, seed, offset, with_kl):
    require_alike(mu, logvar)
    require_seed(seed, mu)
    (m, m_stride), (v, v_stride) = as_rows(mu), as_rows(logvar)
    z = dense_like(mu)
    batch, columns = mu.shape[0], columns_of(mu)
    if not with_kl and m.is_contiguous() and v.is_contiguous():
        batch, columns = min(mu.numel(), 1), mu.numel()  # rows do not matter: one long row needs no masks
    grid, splits, constants = _geometry("forward", mu, batch, columns, offset)
    kl = mu.new_empty((batch, splits), dtype=torch.float32) if with_kl else None
    if batch:
        _reparameterize_forward[grid](
            m, v, z, kl, seed, batch, columns, m_stride, v_stride, offset, splits, **constants
        )
    if not with_kl:
        return z, mu.new_empty(0, dtype=torch.float32)
    return z, kl.view(batch) if splits == 1 else kl.sum(1)


def reparameterize_backward(grad_z, grad_kl, mu, logvar, seed, offset):
    require_alike(mu, logvar, grad_z)
    require_seed(seed, mu)
    require_per_sample(mu, grad_kl)
    (m, m_stride), (v, v_stride) = as_rows(mu), as_rows(logvar)
    g, g_stride = (None, 0) if grad_z is None else as_rows(grad_z)
    grad_mu, grad_logvar = dense_like(mu), dense_like(logvar)
    batch, columns = mu.shape[0], columns_of(mu)
    if mu.numel():
        grid, splits, constants = _geometry("backward", mu, batch, columns, offset)
        _reparameterize_backward[grid](
            g, grad_kl, m, v, grad_mu, grad_logvar, seed, batch, columns, g_stride,
            0 if grad_kl is None else grad_kl.stride(0), m_stride, v_stride, offset, splits, **constants,
        )  # fmt: skip
    return grad_mu, grad_logvar


def philox_words(count: int, seed: torch.Tensor, offset: int) -> torch.Tensor:
    """The stream's words at positions offset .. offset + count - 1, as int64 [count]: what tests compare."""
    raw = torch.empty(ceil_div(count + offset % 4, 4) * 4, dtype=torch.int64, device=seed.device)
    _philox_words[(ceil_div(raw.numel(), 256),)](raw, seed, offset // 4, raw.numel(), BLOCK=256)
    return raw[offset % 4 : offset % 4 + count]
