"""Log-mel spectrograms are librosa's, and sounds come back from them; mu-law."""

import math

import numpy as np
import pytest
import torch
from alike import assert_close

from genai_fast.data import audio
from genai_fast.data.audio import Spectrum

SPECTRA = [
    Spectrum(),
    Spectrum(16000, 80, 1024, 256),
    Spectrum(44100, 64, 2048, 512),
    Spectrum(8000, 20, 200, 100),
    Spectrum(1600, 10, 256, 64),  # all of it on the linear part of the scale
]


def voice(rate=22050, seconds=0.5, dtype=torch.float64):
    """A harmonic sound of falling pitch with some noise, as loud as 1."""
    t = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    phase = 2 * math.pi * (150 * t - 40 * t * t)
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sum(torch.sin(k * phase) / k for k in range(1, 12)) * (-3 * t).exp() + 0.003 * noise
    return (x / x.abs().max()).to(dtype)


def of_librosa(x, spectrum):
    librosa = pytest.importorskip("librosa", reason="pip install .[dev]")
    how = {"sr": spectrum.rate, "n_mels": spectrum.mels}
    power = np.abs(librosa.stft(x.numpy(), n_fft=spectrum.n_fft, hop_length=spectrum.hop)) ** 2
    filters = librosa.filters.mel(n_fft=spectrum.n_fft, **how, dtype=np.float64)
    assert_close(audio.mel_filters(spectrum), torch.from_numpy(filters), 1e-12)
    if x.dtype is torch.float64:  # librosa's own function rounds its filters to float32
        return librosa, torch.from_numpy(filters @ power)
    y = librosa.feature.melspectrogram(y=x.numpy(), n_fft=spectrum.n_fft, hop_length=spectrum.hop, **how)
    return librosa, torch.from_numpy(y)


@pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_spectrograms_are_librosas(spectrum, dtype):
    x = voice(spectrum.rate, dtype=dtype)
    librosa, expected = of_librosa(x, spectrum)
    power = audio.mel_power(x, spectrum)
    assert power.shape == (spectrum.mels, 1 + len(x) // spectrum.hop) and power.dtype is dtype
    assert (torch.log1p(power) - torch.log1p(expected)).abs().max() < 1e-4
    for most in (80.0, 30.0, None):
        db = torch.from_numpy(librosa.power_to_db(expected.numpy(), top_db=most))
        difference = (audio.power_to_db(power, top_db=most) - db).abs()
        # Of float32's transforms, both round away what is far below the loudest.
        heard = difference if dtype is torch.float64 else difference[db > db.max() - 50]
        assert heard.max() < 1e-4
    db = torch.from_numpy(librosa.power_to_db(expected.numpy(), ref=np.max))
    assert audio.power_to_db(power, float(power.max())).max().abs() < 1e-6 and db.max() == 0


STORED = {  # (band, frame) -> mel power by librosa 0.11
    (0, 0): 42.970985,
    (5, 3): 2034.6582,
    (17, 10): 0.0025708054,
    (60, 5): 0.00028210115,
    (100, 12): 0.00019067648,
    (127, 21): 0.00017943305,
}


def test_spectrograms_are_what_librosa_gave():
    """For where it is not installed."""
    power = audio.mel_power(voice(), Spectrum())
    for (band, frame), expected in STORED.items():
        assert float(power[band, frame]) == pytest.approx(expected, rel=1e-6)


def test_of_several_sounds_each_is_its_own():
    x = torch.stack([voice(), voice().flip(0), torch.zeros(11025, dtype=torch.float64)])
    power = audio.mel_power(x, Spectrum())
    assert power.shape == (3, 128, 22) and not power[2].any()
    for one, alone in zip(power, x, strict=True):
        assert_close(one, audio.mel_power(alone, Spectrum()), 1e-12)


@pytest.mark.parametrize("scale", ["db", "log1p"])
def test_features_and_back(scale):
    power = torch.tensor([0.0, 1e-4, 3e-3, 1.0, 77.0, 1e4, 1e6])
    features = audio.to_features(power, scale)
    assert features[0] == -1 and features[-1] == 1 and (features.diff() >= 0).all()
    expected = power.clamp(1e-4 if scale == "db" else 0, 1e4)
    torch.testing.assert_close(audio.to_power(features, scale), expected, rtol=1e-3, atol=1e-6)
    beyond, extreme = (audio.to_power(torch.tensor([-far, far]), scale) for far in (3.0, 1.0))
    assert torch.equal(beyond, extreme)


def test_the_error_is_in_decibels():
    quiet, loud = (audio.to_features(torch.full((2, 3, 4), p), "db") for p in (1.0, 10.0))
    assert float(audio.mel_error(loud, quiet, "db")) == pytest.approx(10, abs=1e-4)
    unheard = audio.to_features(torch.full((2, 3, 4), 1e-7), "log1p")
    assert float(audio.mel_error(unheard, torch.full((2, 3, 4), -1.0), "log1p")) == 0
    quiet, loud = (audio.to_features(torch.full((2, 3, 4), p), "log1p") for p in (1.0, 10.0))
    assert float(audio.mel_error(loud, quiet, "log1p")) == pytest.approx(10, abs=1e-3)


def test_linear_power_has_the_mel_power():
    spectrum = Spectrum()
    power = audio.mel_power(voice(), spectrum)
    linear = audio.mel.linear_power(power, spectrum)
    assert linear.shape == (1025, power.shape[1]) and (linear >= 0).all()
    error = (audio.mel_filters(spectrum) @ linear - power).norm() / power.norm()
    assert error < 0.02


def test_griffin_lim_is_as_near_as_librosas():
    librosa = pytest.importorskip("librosa", reason="pip install .[dev]")
    magnitude = audio.mel.stft(voice(), 2048, 512).abs()

    def error(x):
        return float((audio.mel.stft(torch.as_tensor(x), 2048, 512).abs() - magnitude).norm() / magnitude.norm())

    ours = audio.griffin_lim(magnitude, 2048, 512, steps=64)
    theirs = librosa.griffinlim(magnitude.numpy(), n_iter=64, hop_length=512, random_state=0)
    assert ours.shape == ((magnitude.shape[1] - 1) * 512,) == theirs.shape
    assert error(ours) < 1.1 * error(theirs) < 0.2 < error(audio.griffin_lim(magnitude, 2048, 512, steps=0))


@pytest.mark.parametrize("scale", ["db", "log1p"])
def test_a_sound_comes_back(scale):
    spectrum, x = Spectrum(scale=scale), voice(dtype=torch.float32)[: 21 * 512] / 2
    features = audio.to_features(audio.mel_power(x, spectrum), scale)
    both = torch.stack([features, features.flip(1)])
    made = audio.to_sound(both, spectrum, seed=1)
    assert made.shape == (2, 21 * 512) and made.abs().max() <= 1
    assert torch.equal(made, audio.to_sound(both, spectrum, seed=1))
    assert not torch.equal(made, audio.to_sound(both, spectrum, seed=2))
    error = float(audio.mel_error(audio.to_features(audio.mel_power(made[0], spectrum), scale), features, scale))
    assert error < 1.5
    assert audio.to_sound(torch.full((128, 5), -1.0), spectrum).abs().max() < 0.01  # silence
    assert audio.to_sound(torch.ones(128, 5), spectrum).abs().max() == 1  # it would be louder


@pytest.mark.parametrize("levels", [2, 16, 256, 1024])
def test_mu_law(levels):
    codes = torch.arange(levels)
    values = audio.mu_law_decode(codes, levels)
    assert torch.equal(audio.mu_law_encode(values, levels), codes) and (values.diff() > 0).all()
    assert values[0] == -1 and values[-1] == 1 and torch.equal(values, -values.flip(0))
    x = torch.linspace(-1, 1, 4001)
    found = audio.mu_law_encode(x, levels)
    assert found.dtype is torch.int64 and found.min() == 0 and found.max() == levels - 1 and (found.diff() >= 0).all()
    step = math.log(levels) * 2 / (levels - 1)  # of a level, relative to |x| + 1 / (levels - 1)
    assert ((audio.mu_law_decode(found, levels) - x).abs() <= step * (x.abs() + 1 / (levels - 1))).all()
    assert torch.equal(audio.mu_law_encode(torch.tensor([-9.0, 9.0]), levels), torch.tensor([0, levels - 1]))


def test_mu_law_follows_its_formula():
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    librosa = pytest.importorskip("librosa", reason="pip install .[dev]")
    exact = (librosa.mu_compress(x.numpy(), mu=255, quantize=False) + 1) * 127.5
    assert (audio.mu_law_encode(x) - torch.from_numpy(exact)).abs().max() <= 0.5 + 1e-9


def test_mistakes():
    with pytest.raises(ValueError, match=r"mu_law_encode: x: expected floats in \[-1, 1\], got torch.int64"):
        audio.mu_law_encode(torch.arange(3))
    with pytest.raises(ValueError, match=r"codes: expected integers from 0 to 255, got torch.float32"):
        audio.mu_law_decode(torch.rand(3))
    with pytest.raises(ValueError, match="levels: expected at least 2, got 1"):
        audio.mu_law_decode(torch.arange(3), 1)
