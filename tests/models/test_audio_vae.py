"""The VAE of sounds: its shapes, Keras' form, its errors, and what it learns of tones."""

import pytest
import torch
from alike import assert_close, norm_calls
from torch import nn

from genai_fast import models, ops
from genai_fast.data.audio import Clips
from genai_fast.models.audio_vae.plain import PlainAudioVAE
from genai_fast.models.audio_vae.settings import AudioVAEConfig
from genai_fast.models.registry import RECIPES, make
from genai_fast.runs.audio_task import spectrum_of
from genai_fast.runs.run import task_of
from genai_fast.training import Step, make_optimizer
from genai_fast.training.batches import SoundFeed

SMALL = {"latent": 4, "widths": (8, 16)}


@pytest.mark.parametrize("frames", [1, 2, 5, 12, 13, 32, 33])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_sounds_of_any_length(frames, kernel):
    model = models.AudioVAE(10, frames, kernel=kernel, **SMALL)
    x = torch.rand(3, 10, frames) * 2 - 1
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (3, 4) and model.decode(mu).shape == x.shape == model.reconstruct(x).shape
    assert model.sample(2, seed=1).shape == (2, 10, frames)


def test_kerass_form():
    model = models.AudioVAE(128, 32, widths=(32, 64), hidden=100, norm=False, latent=2)
    kinds = [(type(m).__name__, *m.weight.shape) for m in model.modules() if hasattr(m, "weight")]
    assert kinds[:3] == [("Conv1d", 32, 128, 3), ("Conv1d", 64, 32, 3), ("Linear", 100, 64 * 8)]
    assert ("ConvTranspose1d", 64, 32, 3) in kinds and not any("Norm" in kind for kind, *_ in kinds)
    settings = AudioVAEConfig(width=32, layers=2, hidden=100, norm=False, latent=2)
    made = make("audio-vae", settings, (128, 32), 0)
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_it_runs_on_the_fused_ops(small_is_fused, monkeypatch):
    torch.manual_seed(0)
    model, drawn = models.AudioVAE(10, 16, **SMALL), []
    before = ops.reparameterize
    monkeypatch.setattr(ops, "reparameterize", lambda *a, **k: drawn.append(a) or before(*a, **k))
    with norm_calls() as calls:
        model.training_step(torch.rand(8, 10, 16))
    assert len(drawn) == 1 and calls == ["relu"] * 4  # two convolutions, two transposed ones


@torch.no_grad()
def test_the_plain_twin_computes_the_same():
    torch.manual_seed(0)
    model, plain = models.AudioVAE(10, 13, hidden=7, **SMALL), PlainAudioVAE(10, 13, widths=(8, 16), hidden=7, latent=4)
    plain.load_state_dict(model.state_dict())
    x = torch.rand(6, 10, 13) * 2 - 1
    for training in (True, False):
        model.train(training), plain.train(training)
        for ours, theirs in zip(model.encode(x), plain.encode(x), strict=True):
            assert_close(ours, theirs)
        assert_close(model.decode(torch.ones(6, 4)), plain.decode(torch.ones(6, 4)))


MISTAKES = {
    "mels": (lambda: models.AudioVAE(0), "AudioVAE: mels: expected at least 1, got 0"),
    "widths": (lambda: models.AudioVAE(widths=()), "AudioVAE: widths: expected at least 1, got 0"),
    "kernel": (lambda: models.AudioVAE(kernel=4), "AudioVAE: kernel: expected an odd number, got 4; remedy: 5"),
    "hidden": (lambda: models.AudioVAE(hidden=-1), "AudioVAE: hidden: expected at least 0, got -1"),
    "shape": (lambda: models.AudioVAE(8, 4, **SMALL).encode(torch.rand(2, 8, 5)), r"\[B, 8, 4\], got \(2, 8, 5\)"),
    "setting": (lambda: make("audio-vae", AudioVAEConfig(kernel=2), (8, 4), 0), r"^audio-vae: .*got 2; remedy: 3$"),
    "hop": (lambda: AudioVAEConfig(hop=1025), "n_fft, hop: expected an even number and at most half of it"),
    "window": (lambda: AudioVAEConfig(n_fft=1001), "n_fft, hop: expected an even number"),
    "seconds": (lambda: AudioVAEConfig(seconds=0.01), "seconds: expected at least 2 frames of 512 samples, got 0.01"),
    "scale": (lambda: AudioVAEConfig(scale="bark"), "scale: expected db or log1p, got 'bark'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    call, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_settings_say_what_a_clip_is():
    settings = AudioVAEConfig(rate=16000, seconds=1.0, hop=160, n_fft=400, mels=40, scale="log1p")
    assert settings.frames == 100 and spectrum_of(settings) == (16000, 40, 400, 160, "log1p")
    assert RECIPES["audio-vae"].sounds and not RECIPES["vae"].sounds
    assert task_of("audio-vae").__name__ == "AudioTask"


def bands(count):
    """Spectrograms [count, 12, 16] in [0, 1] of one of three bands that sounds for one of three times."""
    x = torch.zeros(count, 12, 16)
    for k in range(count):
        x[k, 4 * (k % 3) : 4 * (k % 3) + 3, : 5 * (k // 3 % 3 + 1)] = 0.8
    return x


def test_it_learns_bands_and_lengths():
    """From few numbers: its reconstructions of held-out sounds are nearer than the mean is."""
    torch.manual_seed(0)
    settings = AudioVAEConfig(batch_size=30, width=16, layers=2, latent=4, lr=3e-3)
    noise = 0.05 * torch.rand(180, 12, 16, generator=torch.Generator().manual_seed(1))
    clips = Clips("bands", bands(180) + noise, origin=torch.arange(180))
    train, held = clips.split(0.2, 0)
    model = make("audio-vae", settings, clips.shape, 0)
    step, feed = Step(model, make_optimizer(model, settings)), SoundFeed(model, train, settings)
    assert feed.names == ("spectrograms", "labels") and feed.steps == 5 and feed.samples == 144
    for epoch in range(60):
        for batch in feed.epoch(epoch):
            step(*batch)
    x = held.batch(slice(None), signed=True)
    model.eval()
    error = nn.functional.mse_loss(model.reconstruct(x), x)
    assert error < 0.1 * nn.functional.mse_loss(train.batch(slice(None), signed=True).mean(0).expand_as(x), x)
    between = model.interpolate(x[0], x[1], 5)
    assert_close(between[[0, -1]], model.reconstruct(x[:2]), 1e-5)
