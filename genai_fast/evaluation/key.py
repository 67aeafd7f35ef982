"""What each figure of a run means, in a few words."""

from __future__ import annotations

from collections.abc import Mapping

NAMES = {"frechet_distance": "Fréchet distance", "kl": "KL", "bits_per_dim": "bits per dimension"}
MEANINGS = {
    "loss": "what training minimizes; lower is better",
    "reconstruction": "nats per sample to describe it given its latent; lower is better",
    "kl": "nats per sample in the latent; near 0: it is not used",
    "bits_per_dim": "(reconstruction + KL) per pixel value in bits; lower is better",
    "frechet_distance": "of samples to held-out images, in features of our own; lower is better",
    "precision": "share of samples that look like real images; 1 is best",
    "recall": "share of real images that samples look like; 1 is best",
    "density": "neighbourhoods of real images that a sample is in; 1 as real images are",
    "coverage": "share of real images with a sample near by; 1 is best",
    "diversity": "distance between samples over that between real images; 1 is best",
    "nats": "per text; lower is better",
    "tokens": "per text",
    "perplexity": "number of equally likely next tokens; lower is better",
    "bits_per_byte": "of text, whatever the tokenizer; lower is better",
}
_NARROW = ("precision", "recall", "density", "coverage")


def name_of(figure: str) -> str:
    """A figure's name in text: "Fréchet distance" of "frechet_distance"."""
    return NAMES.get(figure, figure.replace("_", " "))


def as_text(figures: Mapping[str, float]) -> str:
    """One line per figure: name, value, meaning."""
    names = {figure: name_of(figure) for figure in figures}
    width = max(map(len, names.values()), default=0)
    lines = [f"  {names[f]:<{width}}  {value:<8.3g}  {MEANINGS.get(f, '')}".rstrip() for f, value in figures.items()]
    if all(figures.get(name) == 0 for name in _NARROW):
        lines.append("  precision to coverage are 0 until samples are almost right: it is too early for them")
    return "\n".join(lines)
