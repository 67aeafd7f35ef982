"""What each figure of a run means, in a few words."""

from __future__ import annotations

from collections.abc import Mapping

NAMES = {
    "frechet_distance": "Fréchet distance", "kl": "KL", "bits_per_dim": "bits per dimension", "l1": "L1",
    "negative_elbo": "negative ELBO", "mel_error_mean": "mel error of the mean",
    "psnr": "PSNR", "ssim": "SSIM", "psnr_bicubic": "PSNR of bicubic", "ssim_bicubic": "SSIM of bicubic",
}  # fmt: skip
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
    "commitment": "distance of an image's vectors from their codes, as the loss weighs it",
    "codes_used": "perplexity of the codes in a batch: how many there are if all are equally frequent",
    "l1": "mean distance of pixels to the partner's, in [0, 1]; lower is better",
    "psnr": "dB between images and what they should be; higher is better",
    "ssim": "structural similarity to what they should be; 1 is best",
    "psnr_bicubic": "that of bicubic interpolation",
    "ssim_bicubic": "that of bicubic interpolation",
    "negative_elbo": "reconstruction + KL, whatever beta; lower is better",
    "mel_error": "dB between the spectrograms of sounds and of their reconstructions; lower is better",
    "mel_error_mean": "that of the mean spectrogram in training, in place of reconstructions",
    "nats": "per text; lower is better",
    "tokens": "per text",
    "perplexity": "number of equally likely next tokens; lower is better",
    "bits_per_sample": "of a sound's samples; lower is better",
    "bits_per_byte": "of text, whatever the tokenizer; lower is better",
}


def _of_set(to: str, other: str) -> dict[str, tuple[str, str]]:
    """Name and meaning of what recipes that translate say of the set `to`, A or B."""
    k = to.lower()
    return {
        f"frechet_distance_{k}": (
            f"Fréchet distance to {to}",
            f"of images translated to {to} to held-out ones of {to}; lower is better",
        ),
        f"accuracy_{k}": (
            f"accuracy as {to}",
            f"share of images translated to {to} that a classifier of {to} takes for what they show",
        ),
        f"accuracy_{k}_untranslated": (f"accuracy of {other} as {to}", f"that share of {other}'s images as they are"),
        f"accuracy_{k}_real": (f"accuracy of {to}", f"that share of {to}'s own held-out images"),
        f"cycle_{k}": (
            f"cycle error of {to}",
            f"mean distance of {to}'s pixels from themselves after there and back, in [0, 1]; lower is better",
        ),
    }


for _figure, (_name, _meaning) in (_of_set("B", "A") | _of_set("A", "B")).items():
    NAMES[_figure], MEANINGS[_figure] = _name, _meaning
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
