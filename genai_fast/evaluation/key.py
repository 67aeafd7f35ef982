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
    "l1": "mean distance of pixels to the partner's, in [0, 1]; lower is better",
    "psnr": "dB between images and what they should be; higher is better",
    "ssim": "structural similarity to what they should be; 1 is best",
    "psnr_bicubic": "that of bicubic interpolation",
    "ssim_bicubic": "that of bicubic interpolation",
    "nats": "per text; lower is better",
    "tokens": "per text",
    "perplexity": "number of equally likely next tokens; lower is better",
    "bits_per_byte": "of text, whatever the tokenizer; lower is better",
}
for _to, _from in (("b", "a"), ("a", "b")):  # of recipes that translate, for each set
    _TO, _FROM = _to.upper(), _from.upper()
    NAMES |= {f"frechet_distance_{_to}": f"Fréchet distance to {_TO}", f"cycle_{_from}": f"cycle error of {_FROM}"}
    NAMES |= {f"accuracy_{_to}": f"accuracy as {_TO}", f"accuracy_{_to}_real": f"accuracy of {_TO}"}
    NAMES[f"accuracy_{_to}_untranslated"] = f"accuracy of {_FROM} as {_TO}"
    MEANINGS |= {
        f"frechet_distance_{_to}": f"of images translated to {_TO} to held-out ones of {_TO}; lower is better",
        f"accuracy_{_to}": f"share of images translated to {_TO} that a classifier of {_TO} takes for what they show",
        f"accuracy_{_to}_untranslated": f"that share of {_FROM}'s images as they are",
        f"accuracy_{_to}_real": f"that share of {_TO}'s own held-out images",
        f"cycle_{_from}": f"distance of {_FROM}'s pixels from themselves after there and back, in [0, 1]",
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
