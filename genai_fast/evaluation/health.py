"""What is wrong with a training run, in plain words, from an epoch's figures and samples."""

import math
from collections.abc import Mapping

import torch

# Thresholds, each with why. A diagnosis is made beyond them, not at them.
LEAST_DIVERSITY = 0.2  # of MNIST: 10 samples over and over 0.03, 50 0.14, one digit of ten 0.56, a GAN of 12 epochs 0.8
WINNING_ACCURACY = 0.99  # of the discriminator: with it 1 - accuracy, and the generator's signal, is noise
WINNING_LOSS = 4.0  # nats of the generator: -ln D(G(z)), so the discriminator gives its images under 2 %
LOSING_ACCURACY = 0.2  # worse than guessing: labels swapped, or it is far behind the generator
CHANCE = 0.05  # accuracy within 0.5 +- this is guessing: right at the end of training, ...
LEAST_COVERAGE = 0.1  # ... wrong while so little of the data is covered
SATURATION = 0.005  # a pixel is at an extreme within this of 0 or 1: |tanh| > 0.99
EXCESS_SATURATION = 0.15  # share of pixels at the extremes beyond the data's share
LEAST_KL = 0.01  # nats a latent unit: Var(mu) of about 0.01, as for an inactive unit


def warnings_of(
    figures: Mapping[str, float] | None = None,
    *,
    samples: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    diversity: float | None = None,
    coverage: float | None = None,
    discriminator_accuracy: float | None = None,
    generator_loss: float | None = None,
    active_units: int | None = None,
    kl: float | None = None,
    latent: int | None = None,
) -> list[str]:
    """Diagnoses of a GAN's or a VAE's epoch, each a sentence with remedies; none for what is not given.

    For every model:
      not finite: a figure, or any value of `samples`; nothing else is judged by it.
      mode collapse: diversity < LEAST_DIVERSITY.
      saturation: the share of `samples`' pixels at 0 or 1 (within SATURATION) exceeds that of `real` by more than
        EXCESS_SATURATION.
    For a GAN:
      the discriminator wins: accuracy > WINNING_ACCURACY and generator_loss > WINNING_LOSS.
      the discriminator loses: accuracy < LOSING_ACCURACY.
      the discriminator guesses: accuracy within CHANCE of 0.5 and coverage < LEAST_COVERAGE. Without coverage nothing
        is said, as guessing is also how good training ends.
    For a VAE:
      posterior collapse: active_units = 0, or kl < LEAST_KL latent (latent 1 if not given).

    Args:
        figures: any named numbers of the epoch, checked for being finite alone.
        samples, real: generated images (of a VAE its means, not binary draws) and data, [N, ...] in [0, 1], floating;
            saturation needs both.
        diversity: `sample_diversity`'s. coverage: `precision_recall_density_coverage`'s, in [0, 1].
        discriminator_accuracy: share of real and generated images, half of each, that it tells right, in [0, 1].
        generator_loss: the non-saturating -ln D(G(z)), nats a sample. A critic's (WGAN) has no such unit: leave it out.
        active_units: `active_units`' of the encoder's means. kl: nats a sample. latent: units of z.

    Returns: Sentences "what: figures; remedy: ...", empty if all is well.
    Source: Goodfellow 2016, arXiv:1701.00160 (GANs); Bowman et al. 2016, arXiv:1511.06349 (posterior collapse).
    """
    own = {"diversity": diversity, "coverage": coverage, "generator_loss": generator_loss, "kl": kl}
    own["discriminator_accuracy"] = discriminator_accuracy
    given = {**(figures or {}), **{name: value for name, value in own.items() if value is not None}}
    bad = [name for name, value in given.items() if not math.isfinite(value)]
    if samples is not None and not bool(torch.isfinite(samples).all()):
        bad.append("samples")
        samples = None
    said = []
    if bad:
        said.append(
            f"not finite: {', '.join(bad)}; remedy: smaller learning rates, clipped gradients,"
            f" and a restart from the last checkpoint that was finite"
        )
    # Comparisons with NaN are false, so what is not a number makes no further diagnosis.
    if diversity is not None and diversity < LEAST_DIVERSITY:
        said.append(
            f"mode collapse: samples have {diversity:.2f} of the data's diversity, expected at least"
            f" {LEAST_DIVERSITY:g}; remedy: more epochs if these are the first; then for a GAN WGAN-GP, spectral norm"
            f" on the discriminator or a smaller learning rate for the generator, for a VAE a smaller beta"
        )
    said += _discriminator(discriminator_accuracy, generator_loss, coverage)
    if samples is not None and real is not None:
        share, data = _extreme(samples), _extreme(real)
        if share - data > EXCESS_SATURATION:
            said.append(
                f"saturation: {share:.0%} of the samples' pixels are at black or white, {data:.0%} of the data's;"
                f" remedy: a smaller learning rate for the generator, EMA of its weights, or spectral norm"
            )
    if active_units == 0:
        said.append("posterior collapse: no latent unit depends on the data (active units 0); remedy: a smaller beta")
    elif kl is not None and kl < LEAST_KL * (latent or 1):
        said.append(
            f"posterior collapse: KL is {kl:.3g} nats per sample, expected {LEAST_KL * (latent or 1):g} or more;"
            f" remedy: a smaller beta"
        )
    return said


def _discriminator(accuracy: float | None, generator_loss: float | None, coverage: float | None) -> list[str]:
    if accuracy is None:
        return []
    if accuracy > WINNING_ACCURACY and generator_loss is not None and generator_loss > WINNING_LOSS:
        return [
            f"the discriminator wins: its accuracy is {accuracy:.3f} and the generator's loss {generator_loss:.2f}"
            f" nats, so the generator learns little; remedy: label smoothing, spectral norm on the discriminator,"
            f" a smaller learning rate for it, or WGAN-GP"
        ]
    if accuracy < LOSING_ACCURACY:
        return [
            f"the discriminator loses: its accuracy is {accuracy:.2f}, worse than guessing; remedy: a smaller"
            f" learning rate for the generator, and a check that real images are labelled 1"
        ]
    if abs(accuracy - 0.5) <= CHANCE and coverage is not None and coverage < LEAST_COVERAGE:
        return [
            f"the discriminator guesses: its accuracy is {accuracy:.2f} though samples cover {coverage:.0%} of the"
            f" data; remedy: a smaller learning rate for the generator, or less label smoothing"
        ]
    return []


def _extreme(images: torch.Tensor) -> float:
    """Share of pixels within SATURATION of 0 or 1."""
    return float(((images <= SATURATION) | (images >= 1.0 - SATURATION)).double().mean())
