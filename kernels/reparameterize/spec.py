"""reparameterize: what the op is, its cases and its cost."""

import torch

from genai_fast.kernels.common.spec import ELEMENTWISE_CHOICES, Case, Cost, ErrorCase, Expected, Limits, OpSpec
from genai_fast.kernels.reparameterize import reference
from genai_fast.kernels.reparameterize.schema import LIBRARY


def _reference_kl(mu, logvar, *, seed, offset=0):
    return reference.reparameterize(mu, logvar, torch.as_tensor(seed, device=mu.device), offset, True)


def _reference(mu, logvar, *, seed, offset=0):
    return reference.reparameterize(mu, logvar, torch.as_tensor(seed, device=mu.device), offset, False)[0]


def _eager_kl(mu, logvar, *, seed=None, offset=0):
    """What people write."""
    std = torch.exp(0.5 * logvar)
    z = mu + torch.randn_like(std) * std
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=tuple(range(1, mu.dim())))


def _eager(mu, logvar, *, seed=None, offset=0):
    std = torch.exp(0.5 * logvar)
    return mu + torch.randn_like(std) * std


def _cost(mu, logvar, *, seed=None, offset=0):
    # Forward reads mu, logvar and writes z; backward reads mu, logvar, dz and writes two gradients.
    # A normal is about 25 floating-point operations, drawn twice.
    if not mu.requires_grad:
        return Cost(flops=33 * mu.numel(), bytes=3 * mu.numel() * mu.element_size())
    return Cost(flops=70 * mu.numel(), bytes=8 * mu.numel() * mu.element_size())


def _pair(*shape, seed=1234, **more):
    return lambda t: dict(mu=t.normal(*shape), logvar=t.normal(*shape), seed=t.seed(seed), **more)


def _heads(t):
    """mu and logvar as two halves of one GEMM's output: rows are strided."""
    h = t.normal(17, 40, grad=False).requires_grad_()
    return dict(mu=h[:, :20], logvar=h[:, 20:], seed=t.seed(7))


def _channels_last(t):
    mu, logvar = (
        t.normal(3, 6, 5, 7, grad=False).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)
    )
    return dict(mu=mu, logvar=logvar, seed=t.seed(8))


def _transposed(t):
    return dict(mu=t.normal(9, 13).t(), logvar=t.normal(13, 9), seed=t.seed(9))


def _special(t):
    values = [0.0, -0.0, 80.0, -80.0, float("inf"), -float("inf"), float("nan"), 1e-30]
    mu, logvar = zip(*[(m, v) for m in values for v in values], strict=True)
    return dict(mu=t.values([mu]), logvar=t.values([logvar]), seed=t.seed(10))


CASES = (
    Case("vector", _pair(7)),
    Case("one_element", _pair(1, 1)),
    Case("odd_rows", _pair(5, 3)),
    Case("latent_20", _pair(128, 20)),
    Case("odd_513", _pair(3, 513)),
    Case("long_row", _pair(2, 9001)),
    Case("image_latent", _pair(2, 4, 8, 8)),
    Case("offset_1", _pair(9, 20, offset=1)),
    Case("offset_past_2_32", _pair(3, 37, offset=2**32 * 4 - 50)),
    Case("negative_seed", _pair(4, 33, seed=-(2**62) - 3)),
    Case("empty_batch", _pair(0, 20)),
    Case("empty_latent", _pair(4, 0)),
    Case("heads", _heads),
    Case("channels_last", _channels_last),
    Case("transposed", _transposed),
    Case("special_values", _special),
    Case(
        "large_logvar", lambda t: dict(mu=t.normal(4, 16), logvar=t.uniform(4, 16, low=-80, high=10, grad=True), seed=3)
    ),
)

_GOOD = _pair(4, 8)
ERROR_CASES = (
    ErrorCase("shapes", lambda t: dict(mu=t.normal(4, 8), logvar=t.normal(4, 9)), ValueError,
              r"logvar.*expected shape \(4, 8\).*got \(4, 9\)"),
    ErrorCase("dtype_pair", lambda t: dict(mu=t.normal(4, 8), logvar=t.normal(4, 8).double()), TypeError,
              r"logvar.*expected .*got torch\.float64.*\.to\("),
    ErrorCase("integers", lambda t: dict(mu=torch.ones(4, 8, dtype=torch.int64), logvar=t.normal(4, 8)), TypeError,
              r"mu.*floating.*got torch\.int64"),
    ErrorCase("not_a_tensor", lambda t: dict(mu=[1.0], logvar=t.normal(1)), TypeError,
              r"mu.*expected a tensor.*got list"),
    ErrorCase("no_batch", lambda t: dict(mu=t.normal(), logvar=t.normal()), ValueError, r"mu.*batch.*got shape \(\)"),
    ErrorCase("device", lambda t: dict(mu=t.normal(4, 8), logvar=t.normal(4, 8).to("meta")), ValueError,
              r"logvar.*expected device.*got meta"),
    ErrorCase("seed_type", lambda t: {**_GOOD(t), "seed": 1.5}, TypeError, r"seed.*expected.*got float"),
    ErrorCase("seed_shape", lambda t: {**_GOOD(t), "seed": torch.zeros(2, dtype=torch.int64)}, ValueError,
              r"seed.*0-d int64"),
    ErrorCase("seed_dtype", lambda t: {**_GOOD(t), "seed": torch.tensor(1.0)}, TypeError, r"seed.*0-d int64"),
    ErrorCase("seed_range", lambda t: {**_GOOD(t), "seed": 2**63}, ValueError, r"seed.*64 bits"),
    ErrorCase("offset_negative", lambda t: {**_GOOD(t), "offset": -1}, ValueError, r"offset.*>= 0.*got -1"),
    ErrorCase("offset_type", lambda t: {**_GOOD(t), "offset": 0.5}, TypeError, r"offset.*expected an int.*got float"),
)  # fmt: skip

# Each bench case draws its own seed, as a training step does.
BENCH_CASES = (
    Case("vae_mnist-128x20", lambda t: dict(mu=t.normal(128, 20), logvar=t.normal(128, 20))),
    Case("vae_wide-4096x512", lambda t: dict(mu=t.normal(4096, 512), logvar=t.normal(4096, 512))),
    Case("latent_diffusion-16x4x32x32", lambda t: dict(mu=t.normal(16, 4, 32, 32), logvar=t.normal(16, 4, 32, 32))),
)
GPU_CASES = (
    Case("wide-131072x512-forward", lambda t: {n: t.normal(131072, 512, grad=False) for n in ("mu", "logvar")}),
)


def _expected(most):
    """At most so many instructions per element, for rows that fill a block."""
    return Expected(None, lambda c: c["ROWS"] * c["BLOCK"], lambda c: most if c["ROWS"] <= 2 else None)


_EXPECTED = {"_reparameterize_forward": _expected(70), "_reparameterize_backward": _expected(75)}

_SHARED = dict(
    folder="reparameterize",
    source="Kingma & Welling 2013, arXiv:1312.6114",
    library=LIBRARY,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    gpu_cases=GPU_CASES,
    cost=_cost,
    expected=_EXPECTED,
    choices={"reparameterize/forward": ELEMENTWISE_CHOICES, "reparameterize/backward": ELEMENTWISE_CHOICES},
)

REPARAMETERIZE = OpSpec(
    name="reparameterize",
    formula="z = mu + exp(logvar / 2) eps",
    reference=_reference,
    peers={"eager": _eager},
    limits=Limits(BENCH_CASES[2].inputs, (64.5, 68.8), 0.95, 1.05),
    **_SHARED,
)
REPARAMETERIZE_KL = OpSpec(
    name="reparameterize_kl",
    formula="the same z, and KL(N(mu, exp(logvar)) || N(0, I)) per sample",
    reference=_reference_kl,
    peers={"eager": _eager_kl},
    limits=Limits(BENCH_CASES[2].inputs, (75.6, 76.3), 0.9, 1.05),
    **_SHARED,
)
