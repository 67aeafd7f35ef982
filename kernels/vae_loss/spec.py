"""vae_loss: what the op is, its cases and its cost."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.spec import Case, Cost, ErrorCase, Expected, Limits, OpSpec, choices_of
from genai_fast.kernels.vae_loss import reference
from genai_fast.kernels.vae_loss.schema import LIBRARY


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

_EXPECTED = dict.fromkeys(("_vae_loss_forward", "_vae_loss_backward"), Expected(elements=lambda c: c["BLOCK"]))

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
    limits=Limits(BENCH_CASES[0].inputs, (63.3, 0.112, 49), 1.05, 1.05),
    gpu_cases=(Case("conv_vae_64-128x12288", _inputs((128, 12288), (128,))),),
    peers={"eager": _eager_sigmoid, "eager (logits)": _eager_logits},
    cost=_cost,
    expected=_EXPECTED,
    choices=dict.fromkeys(("vae_loss/forward", "vae_loss/backward"), _CHOICES),
)
