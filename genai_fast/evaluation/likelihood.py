"""Bits per dimension from a model's negative log-likelihood."""

import math


def bits_per_dim(nats: float, dimensions: int, likelihood: str, levels: int = 256, signed: bool = False) -> float:
    """The negative log-likelihood of a sample as bits a dimension: what a code by this model would need, or a bound.

    Bernoulli: nats / (D ln 2). A probability already; of data other than 0 and 1 it is a cross-entropy, no code length.

    Gaussian: (nats / D + ln(pi) / 2) / ln 2 + log2(levels). This library's reconstruction term is the plain squared
    error sum (x - m)^2, which lacks the constant of the density that it stands for:
        -ln N(x; m, v) = (x - m)^2 / (2 v) + ln(2 pi v) / 2 = (x - m)^2 + ln(pi) / 2 at v = 1/2.
    That is a density, and a code is for one of `levels` values: with data in [0, 1] a value's bin is 1 / levels wide
    and its mass about N(x; m, v) / levels, so log2(levels) bits are added; on [-1, 1] bins are 2 / levels wide, so
    log2(levels / 2) (Theis et al. 2016, sec. 3.1). Variance 1/2 is wide for data in
    [0, 1]: the bits have a floor of log2(levels) + log2(pi) / 2, 8.83 for 256. The bins are those of
    dequantised data; pixels k / 255 stand 1 / 255 apart, 0.006 bits less.

    Args:
        nats: negative log-likelihood a sample, as the losses give it: reconstruction, or reconstruction + kl for the
            bound -ELBO. Not the loss at a beta other than 1, which bounds nothing.
        dimensions: D, values a sample (C H W of an image), >= 1.
        likelihood: "bernoulli" or "gaussian", as `ops.vae_loss` has it.
        levels: values that a dimension of the data may take, >= 2; unused for Bernoulli.
        signed: data on [-1, 1] instead of [0, 1]; unused for Bernoulli.

    Raises ValueError: another likelihood, or dimensions or levels out of range.
    Source: Theis, van den Oord & Bethge 2016, arXiv:1511.01844.
    """
    if likelihood not in ("bernoulli", "gaussian"):
        raise ValueError(
            f"bits_per_dim: likelihood: expected 'bernoulli' or 'gaussian', got {likelihood!r}; remedy: the loss's own"
        )
    if dimensions < 1:
        raise ValueError(f"bits_per_dim: dimensions: expected at least 1, got {dimensions}; remedy: C * H * W")
    if levels < 2:
        raise ValueError(f"bits_per_dim: levels: expected at least 2, got {levels}; remedy: 256 for 8-bit pixels")
    nats_a_dimension = nats / dimensions
    if likelihood == "bernoulli":
        return nats_a_dimension / math.log(2.0)
    width = (2.0 if signed else 1.0) / levels
    return (nats_a_dimension + 0.5 * math.log(math.pi) - math.log(width)) / math.log(2.0)
