"""vae_loss: what the op is, its cases and its cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, LibraryOp, OpSpec, choices_of
from genai_fast.kernels.vae_loss import reference


def _fake(recon, target, mu, logvar, beta_tensor, beta, likelihood, reduction):
    wide = torch.float64 if recon.dtype == torch.float64 else torch.float32
    shape = recon.shape[:1] if reduction == "none" else ()
    return tuple(recon.new_empty(shape, dtype=wide) for _ in range(3))


def _fake_backward(grad_loss, grad_reconstruction, grad_kl, recon, target, mu, logvar, *settings):
    return tuple(x.new_empty(x.shape) for x in (recon, mu, logvar))


LIBRARY = (
    LibraryOp(
        "vae_loss(Tensor recon, Tensor target, Tensor mu, Tensor logvar, Tensor? beta_tensor, float beta,"
        " str likelihood, str reduction, str backend) -> (Tensor loss, Tensor reconstruction, Tensor kl)",
        _fake,
    ),
    LibraryOp(
        "vae_loss_backward(Tensor? grad_loss, Tensor? grad_reconstruction, Tensor? grad_kl, Tensor recon,"
        " Tensor target, Tensor mu, Tensor logvar, Tensor? beta_tensor, float beta, str likelihood,"
        " str reduction, str backend) -> (Tensor grad_recon, Tensor grad_mu, Tensor grad_logvar)",
        _fake_backward,
    ),
)


def _reference(recon, target, mu, logvar, *, likelihood="bernoulli", beta=1.0, reduction="mean"):
    tensor, number = (beta, 0.0) if isinstance(beta, torch.Tensor) else (None, beta)
    return reference.vae_loss(recon, target, mu, logvar, tensor, number, likelihood, reduction)


def _kl(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def _eager_sigmoid(recon, target, mu, logvar, *, likelihood="bernoulli", beta=1.0, reduction="mean"):
    """What people write: a sigmoid at the decoder's end, then BCE or MSE, summed, and KL."""
    if likelihood == "bernoulli":
        error = F.binary_cross_entropy(torch.sigmoid(recon), target, reduction="sum")
    else:
        error = F.mse_loss(recon, target, reduction="sum")
    return ((error + beta * _kl(mu, logvar)) / recon.shape[0],)


def _eager_logits(recon, target, mu, logvar, *, likelihood="bernoulli", beta=1.0, reduction="mean"):
    """The same with BCE on logits."""
    if likelihood == "bernoulli":
        error = F.binary_cross_entropy_with_logits(recon, target, reduction="sum")
    else:
        error = F.mse_loss(recon, target, reduction="sum")
    return ((error + beta * _kl(mu, logvar)) / recon.shape[0],)


def _cost(recon, target, mu, logvar, **settings):
    # Forward reads everything; backward reads it again and writes the gradients of recon, mu and logvar.
    image = (3 * recon.element_size() + 2 * target.element_size()) * recon.numel()
    return Cost(flops=45 * recon.numel() + 30 * mu.numel(), bytes=image + 6 * mu.numel() * mu.element_size())


def _inputs(shape, latent, **more):
    return lambda t: dict(
        recon=t.normal(*shape, scale=3.0),
        target=t.uniform(*shape),
        mu=t.normal(shape[0], *latent),
        logvar=t.normal(shape[0], *latent),
        **more,
    )


def _channels_last(t):
    recon = t.normal(3, 5, 6, 7, grad=False).to(memory_format=torch.channels_last).requires_grad_()
    target = t.uniform(3, 5, 6, 7).to(memory_format=torch.channels_last)
    return dict(recon=recon, target=target, mu=t.normal(3, 8), logvar=t.normal(3, 8))


def _mixed_layout(t):
    heads = t.normal(6, 16)
    return dict(recon=t.normal(31, 6).t(), target=t.uniform(6, 31), mu=heads[:, :8], logvar=heads[:, 8:])


def _special(likelihood):
    values = [0.0, -0.0, 30.0, -120.0, float("inf"), -float("inf"), float("nan"), 1e-30]
    recon, target = zip(*[(x, y) for x in values for y in (0.0, 0.3, 1.0)], strict=True)
    count = len(recon)
    return lambda t: dict(
        recon=t.values(recon).view(count, 1),
        target=t.values(target, grad=False).view(count, 1),
        mu=t.values(values * 3).view(count, 1),
        logvar=t.values(sorted(values * 3)).view(count, 1),
        likelihood=likelihood,
        reduction="none",
    )


CASES = (
    Case("mnist", _inputs((128, 784), (20,))),
    Case("one_element", _inputs((1, 1), (1,))),
    Case("odd", _inputs((5, 3, 7), (3,), reduction="sum", beta=0.5)),
    Case("gaussian", _inputs((6, 33), (5,), likelihood="gaussian", beta=4.0)),
    Case("none", _inputs((6, 33), (5,), reduction="none")),
    Case("gaussian_none", _inputs((7, 130), (2, 3, 3), likelihood="gaussian", reduction="none", beta=0.0)),
    Case("long_row", _inputs((2, 9001), (4100,))),
    Case("beta_tensor", lambda t: {**_inputs((6, 33), (5,))(t), "beta": torch.tensor(0.25, device=t.device)}),
    Case("target_gradient", lambda t: {**_inputs((4, 9), (3,))(t), "target": t.uniform(4, 9, grad=True)}),
    Case("empty_batch", _inputs((0, 9), (3,), reduction="sum")),
    Case("empty_rest", _inputs((3, 0), (0,), reduction="none")),
    Case("channels_last", _channels_last),
    Case("mixed_layout", _mixed_layout),
    Case("special_bernoulli", _special("bernoulli")),
    Case("special_gaussian", _special("gaussian")),
)

_GOOD = _inputs((4, 9), (3,))
ERROR_CASES = (
    ErrorCase("target_shape", lambda t: {**_GOOD(t), "target": t.uniform(4, 8)}, ValueError,
              r"target.*expected shape \(4, 9\).*got \(4, 8\)"),
    ErrorCase("target_dtype", lambda t: {**_GOOD(t), "target": t.uniform(4, 9).double()}, TypeError,
              r"target.*expected .*got torch\.float64"),
    ErrorCase("target_integers", lambda t: {**_GOOD(t), "target": torch.ones(4, 9, dtype=torch.uint8)}, TypeError,
              r"target.*floating.*got torch\.uint8"),
    ErrorCase("batch", lambda t: {**_GOOD(t), "mu": t.normal(5, 3), "logvar": t.normal(5, 3)}, ValueError,
              r"mu.*batch.*expected 4.*got 5"),
    ErrorCase("logvar_shape", lambda t: {**_GOOD(t), "logvar": t.normal(4, 2)}, ValueError,
              r"logvar.*expected shape \(4, 3\).*got \(4, 2\)"),
    ErrorCase("beta_negative", lambda t: {**_GOOD(t), "beta": -0.1}, ValueError, r"beta.*>= 0.*got -0\.1"),
    ErrorCase("beta_nan", lambda t: {**_GOOD(t), "beta": float("nan")}, ValueError, r"beta.*>= 0.*got nan"),
    ErrorCase("beta_vector", lambda t: {**_GOOD(t), "beta": torch.ones(4)}, ValueError, r"beta.*0-d.*got shape \(4,\)"),
    ErrorCase("beta_type", lambda t: {**_GOOD(t), "beta": "1"}, TypeError, r"beta.*expected a float.*got str"),
    ErrorCase("likelihood", lambda t: {**_GOOD(t), "likelihood": "bernouli"}, ValueError,
              r"likelihood.*'bernoulli', 'gaussian', got 'bernouli'"),
    ErrorCase("reduction", lambda t: {**_GOOD(t), "reduction": "avg"}, ValueError,
              r"reduction.*'mean', 'sum', 'none', got 'avg'"),
    ErrorCase("device", lambda t: {**_GOOD(t), "target": t.uniform(4, 9).to("meta")}, ValueError,
              r"target.*expected device.*got meta"),
)  # fmt: skip

BENCH_CASES = (
    Case("vae_mnist-128x784", _inputs((128, 784), (20,))),
    Case("conv_vae_64-64x12288", _inputs((64, 12288), (128,))),
    Case("gaussian-64x12288", _inputs((64, 12288), (128,), likelihood="gaussian")),
)

_SIZES = {
    name: "i32"
    for name in ("columns", "latent", "recon_stride", "target_stride", "mu_stride", "logvar_stride", "splits")
}
_BLOCKS = dict(BLOCK=1024, BLOCK_LATENT=128)


def _compile_case(likelihood, name, dtype, backward):
    pointers = dict(recon_ptr=dtype, target_ptr=dtype, mu_ptr=dtype, logvar_ptr=dtype)
    constants = dict(BERNOULLI=likelihood == "bernoulli", **_BLOCKS)
    if not backward:
        return CompileCase(
            f"{likelihood}-{name}",
            "_vae_loss_forward",
            {**pointers, "partial_ptr": "*fp32", "kl_ptr": "*fp32", **_SIZES, **constants},
            elements=1024,
        )
    upstream = dict(
        grad_loss_ptr="*fp32", grad_reconstruction_ptr=None, grad_kl_ptr=None, beta_ptr=None, grad_recon_ptr=dtype,
        grad_mu_ptr=dtype, grad_logvar_ptr=dtype, grad_loss_stride="i32", grad_reconstruction_stride="i32",
        grad_kl_stride="i32", beta="fp32", scale="fp32",
    )  # fmt: skip
    return CompileCase(
        f"{likelihood}_backward-{name}",
        "_vae_loss_backward",
        {**pointers, **upstream, **_SIZES, **constants},
        elements=1024,
    )


_COMPILE_CASES = (
    *(
        _compile_case(likelihood, dtype[1:], dtype, backward)
        for likelihood in ("bernoulli", "gaussian")
        for dtype in ("*fp32", "*bf16")
        for backward in (False, True)
    ),
    CompileCase(
        "finalise", "_vae_loss_finalise",
        dict(
            partial_ptr="*fp32", kl_rows_ptr="*fp32", beta_ptr=None, loss_ptr="*fp32", reconstruction_ptr="*fp32",
            kl_ptr="*fp32", batch="i32", splits="i32", beta="fp32", scale="fp32", NONE=False, ROWS=64, SPLITS=8,
        ),
    ),
)  # fmt: skip

_CHOICES = choices_of(BLOCK=(512, 2048, 2048, 4096), num_warps=(4, 4, 8, 8))

VAE_LOSS = OpSpec(
    name="vae_loss",
    folder="vae_loss",
    formula="-log p(x | recon) + beta KL(N(mu, exp(logvar)) || N(0, I))",
    source="Kingma & Welling 2013, arXiv:1312.6114; beta: Higgins et al. 2017",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    gpu_cases=(Case("conv_vae_64-128x12288", _inputs((128, 12288), (128,))),),
    peers={"eager": _eager_sigmoid, "eager (logits)": _eager_logits},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    choices=dict.fromkeys(("vae_loss/forward", "vae_loss/backward"), _CHOICES),
)
