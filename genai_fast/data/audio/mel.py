"""Log-mel spectrograms and their inverse, in plain PyTorch; `export` copies functions from here.

Nothing here may read a global but functions, classes and imports.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Spectrum(NamedTuple):
    """How sounds become log-mel spectrograms.

    rate: samples per second. mels: bands. n_fft: samples of a window. hop: samples from frame to frame.
    scale: of the features, "db" (decibels) or "log1p" (log(1 + x)).
    """

    rate: int = 22050
    mels: int = 128
    n_fft: int = 2048
    hop: int = 512
    scale: str = "db"


def mel_filters(spectrum: Spectrum) -> torch.Tensor:
    """Triangles on Slaney's mel scale from 0 to rate / 2, each of area 1 Hz: [mels, n_fft / 2 + 1], float64.

    The scale is linear below 1 kHz, 15 mels, and logarithmic above, a factor of 6.4 in 27 mels.

    Source: Slaney 1998, Auditory Toolbox; the same as `librosa.filters.mel`.
    """
    step, knee, ratio = 200 / 3, 1000.0, math.log(6.4) / 27
    highest = spectrum.rate / 2
    top = highest / step if highest < knee else knee / step + math.log(highest / knee) / ratio
    mels = torch.linspace(0, top, spectrum.mels + 2, dtype=torch.float64)
    edges = torch.where(mels < knee / step, mels * step, knee * torch.exp(ratio * (mels - knee / step)))
    bins = torch.linspace(0, highest, spectrum.n_fft // 2 + 1, dtype=torch.float64)
    slopes = edges[:, None] - bins
    widths = edges.diff()[:, None]
    triangles = torch.minimum(-slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]).clamp(min=0)
    return triangles * (2 / (edges[2:] - edges[:-2]))[:, None]


def stft(x: torch.Tensor, n_fft: int, hop: int) -> torch.Tensor:
    """Short-time Fourier transform of x [..., T] with a Hann window: [..., n_fft / 2 + 1, 1 + T // hop], complex.

    Frame k is centred on sample k hop; zeros surround x.
    """
    window = torch.hann_window(n_fft, dtype=x.dtype, device=x.device)
    return torch.stft(x, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True)


def mel_power(x: torch.Tensor, spectrum: Spectrum) -> torch.Tensor:
    """Power in mel bands of sounds x [..., T]: [..., mels, 1 + T // hop], dtype of x.

    Equal to `librosa.feature.melspectrogram` with the same settings.
    """
    power = stft(x, spectrum.n_fft, spectrum.hop).abs().square()
    return mel_filters(spectrum).to(x) @ power


def power_to_db(
    power: torch.Tensor, ref: float = 1.0, amin: float = 1e-10, top_db: float | None = 80.0
) -> torch.Tensor:
    """10 log10(power / ref), both no less than amin; nor less than top_db below the largest. As librosa's."""
    db = 10 * torch.log10(power.clamp(min=amin)) - 10 * math.log10(max(amin, ref))
    return db if top_db is None else db.clamp(min=float(db.max()) - top_db)


def to_features(power: torch.Tensor, scale: str) -> torch.Tensor:
    """Mel power as what models see, in [-1, 1]: of "db" -40 to 40 dB, of "log1p" log(1 + x) from 0 to log(1 + 1e4).

    With the windows of the default a low sine of full scale has 41 dB, loud speech 30.
    """
    power = power.clamp(max=1e4)
    if scale == "log1p":
        return torch.log1p(power) * (2 / math.log1p(1e4)) - 1
    return power_to_db(power, amin=1e-4, top_db=None) / 40


def to_power(features: torch.Tensor, scale: str) -> torch.Tensor:
    """The inverse of `to_features`; what is beyond [-1, 1] is taken for these."""
    x = features.clamp(-1, 1)
    if scale == "log1p":
        return torch.expm1((x + 1) * (math.log1p(1e4) / 2))
    return torch.pow(10.0, 4 * x)


def linear_power(mel: torch.Tensor, spectrum: Spectrum, steps: int = 50) -> torch.Tensor:
    """Power at each frequency that has about this mel power [..., mels, T]: [..., n_fft / 2 + 1, T].

    Non-negative least squares by accelerated projected gradients, of bands scaled to filters of norm 1.

    Source: Beck & Teboulle 2009 (FISTA).
    """
    filters = mel_filters(spectrum).to(mel)
    scale = filters.norm(dim=1, keepdim=True).clamp(min=1e-10)
    filters, mel = filters / scale, mel / scale
    rate = 1 / float(torch.linalg.matrix_norm(filters.double(), 2)) ** 2
    x = ahead = torch.zeros(*mel.shape[:-2], filters.size(1), mel.size(-1), dtype=mel.dtype, device=mel.device)
    for k in range(steps):
        before, x = x, (ahead - rate * (filters.T @ (filters @ ahead - mel))).clamp(min=0)
        ahead = x + k / (k + 3) * (x - before)
    return x


def griffin_lim(
    magnitude: torch.Tensor, n_fft: int, hop: int, steps: int = 64, momentum: float = 0.99, seed: int = 0
) -> torch.Tensor:
    """A sound whose short-time magnitudes are about these, [..., n_fft / 2 + 1, T] -> [..., (T - 1) hop].

    Phases begin at random, by the seed alike on every device, and are moved to those of what the sound itself has.

    Source: Griffin & Lim 1984; momentum: Perraudin, Balazs & Søndergaard 2013.
    """
    window = torch.hann_window(n_fft, dtype=magnitude.dtype, device=magnitude.device)
    flat = magnitude.flatten(0, -3) if magnitude.dim() > 2 else magnitude[None]
    angles = torch.rand(flat.shape, generator=torch.Generator().manual_seed(seed)).to(flat) * (2 * math.pi)
    spectra, before = torch.polar(flat, angles), torch.zeros((), dtype=flat.dtype, device=flat.device)
    length = (flat.size(-1) - 1) * hop
    for _ in range(steps):
        x = torch.istft(spectra, n_fft, hop, window=window, length=length)
        rebuilt = stft(x, n_fft, hop)
        ahead = rebuilt - before * (momentum / (1 + momentum))
        spectra, before = flat * ahead / ahead.abs().clamp(min=1e-16), rebuilt
    x = torch.istft(spectra, n_fft, hop, window=window, length=length)
    return x.view(*magnitude.shape[:-2], -1)


def to_sound(features: torch.Tensor, spectrum: Spectrum, steps: int = 64, seed: int = 0) -> torch.Tensor:
    """Sounds of features [..., mels, T]: [..., (T - 1) hop] float32; one that is louder than 1 is scaled to 1."""
    power = linear_power(to_power(features.float(), spectrum.scale), spectrum)
    x = griffin_lim(power.sqrt(), spectrum.n_fft, spectrum.hop, steps, seed=seed)
    return x / x.abs().amax(-1, keepdim=True).clamp(min=1)


def mel_error(made: torch.Tensor, x: torch.Tensor, scale: str) -> torch.Tensor:
    """Mean distance of features [..., mels, T] in decibels of mel power, -40 dB and less being alike: 0-d."""
    both = [power_to_db(to_power(each.float(), scale), amin=1e-4, top_db=None) for each in (made, x)]
    return (both[0] - both[1]).abs().mean()
