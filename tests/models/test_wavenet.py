"""WaveNet: what a code depends on, the twin with classes, the decoder, the windows of its data, a whole run."""

import math

import numpy as np
import pytest
import torch

from genai_fast.cli import main
from genai_fast.data.audio import Sounds, WaveFeed, mu_law_decode, mu_law_encode, waves_of, write_wav
from genai_fast.data.errors import DataError
from genai_fast.kernels.wavenet_decode.reference import drawn
from genai_fast.models import WaveNet, WaveNetDecoder
from genai_fast.models.wavenet.plain import PlainWaveNet

SMALL = {"width": 8, "skip": 12, "layers": 3, "cycles": 2}


def _model(**settings):
    torch.manual_seed(0)
    return WaveNet(**{**SMALL, **settings}).eval()


def _codes(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


def test_a_code_depends_on_those_within_reach_before_it():
    model, codes = _model(), _codes(1, 40)
    assert model.reach == 1 + 2 * (1 + 2 + 4)
    with torch.no_grad():
        before = model(codes)
        codes[0, 20] = (codes[0, 20] + 100) % 256
        changed = (model(codes) != before).any(2)[0].nonzero().squeeze(1)
    assert changed.min() == 20 and changed.max() == 20 + model.reach - 1


def test_its_twin_has_the_same_logits_with_classes_and_three_taps():
    model = _model(classes=3, kernel=3)
    twin = PlainWaveNet(**SMALL, classes=3, kernel=3)
    twin.load_state_dict(model.state_dict())
    codes, labels = _codes(4, 50), torch.tensor([2, 0, 1, 1])
    logits = model(codes, labels)
    torch.testing.assert_close(logits, twin(codes, labels), rtol=1e-4, atol=1e-5)
    targets = _codes(4, 50).roll(1)
    targets[0, 30:] = -100
    loss = model.training_step(codes, targets, labels).loss
    torch.testing.assert_close(loss, twin.loss(codes, targets, labels), rtol=1e-5, atol=1e-6)
    assert not torch.equal(logits, model(codes, labels.roll(1)))


@pytest.mark.parametrize("settings", [{}, {"classes": 2, "kernel": 3}, {"kernel": 1, "width": 20}], ids=str)
def test_a_decoder_gives_the_logits_of_the_whole_network(settings):
    model, codes = _model(**settings), _codes(7, 60)
    labels = (torch.arange(7) % 2,) if settings.get("classes") else ()
    silence = torch.full((7, 1), 128)
    with torch.no_grad():
        expected = model(torch.cat([silence, codes[:, :-1]], 1), *labels)
    decoder = WaveNetDecoder(model, 7, *labels)
    found = torch.cat([decoder.follow(codes[:, :25]), decoder.follow(codes[:, 25:])], 1)
    assert float((found - expected).abs().max()) < 1e-4
    assert decoder.length == 60


def test_what_is_drawn_follows_the_uniform_numbers():
    """Each code is the one that the whole network's distribution gives for its uniform number."""
    model, steps = _model(classes=2), 30
    codes = model.draw_codes(3, steps, torch.tensor([1, 0, 1]), seed=5)
    assert torch.equal(codes, model.draw_codes(3, steps, torch.tensor([1, 0, 1]), seed=5))
    uniforms = torch.rand(3, steps, generator=torch.Generator().manual_seed(5))
    before = torch.cat([torch.full((3, 1), 128), codes[:, :-1]], 1)
    with torch.no_grad():
        logits = model(before, torch.tensor([1, 0, 1]))
    expected = torch.stack([drawn(logits[:, t], uniforms[:, t], 1.0) for t in range(steps)], 1)
    assert (codes != expected).sum() <= 1  # where a uniform number falls on a border, rounding decides
    likeliest = model.draw_codes(2, 9, torch.tensor([0, 1]), temperature=0.0)
    assert torch.equal(likeliest, model.draw_codes(2, 9, torch.tensor([0, 1]), temperature=0.0, seed=3))


def test_a_sound_is_the_same_alone_and_in_a_batch_and_with_any_threads():
    model, threads = _model(), torch.get_num_threads()
    codes = _codes(8, 20)
    together = WaveNetDecoder(model, 8).follow(codes)
    try:
        torch.set_num_threads(1)
        alone = torch.cat([WaveNetDecoder(model, 1).follow(row[None]) for row in codes])
        assert torch.equal(WaveNetDecoder(model, 8).follow(codes), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


def test_what_does_not_fit_is_refused():
    for settings, words in (({"kernel": 0}, "kernel: expected at least 1"), ({"classes": -1}, "classes: expected")):
        with pytest.raises(ValueError, match=f"WaveNet: {words}"):
            WaveNet(**settings)
    with pytest.raises(ValueError, match="WaveNet: labels: expected none, got some"):
        _model()(_codes(2, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="WaveNet: labels: expected some, got none"):
        WaveNetDecoder(_model(classes=2), 2)
    with pytest.raises(ValueError, match=r"WaveNet: codes: expected token ids from 0 to 255, got 256"):
        _model()(torch.full((1, 4), 256))
    with pytest.raises(ValueError, match=r"WaveNetDecoder: embedding\.weight: expected torch\.float32"):
        WaveNetDecoder(_model().double(), 1)


def _sounds(*lengths, labels=None):
    offsets = np.cumsum([0, *lengths])
    samples = np.random.default_rng(0).integers(-32767, 32767, offsets[-1]).astype(np.int16)
    classes = () if labels is None else ("a", "b")
    return Sounds("noise", samples, offsets, 8000, None if labels is None else torch.tensor(labels), classes)


def test_every_sample_is_a_target_once_and_follows_its_input():
    waves = waves_of(_sounds(10, 3, 7, labels=[1, 0, 1]), 4)
    assert len(waves) == 3 + 1 + 2 and waves.samples == 20
    expected = torch.cat([mu_law_encode(_sounds(10, 3, 7).sound(k)) for k in range(3)])
    for lead in (0, 2, 50):
        targets, sounds = [], []
        for codes, found, labels in WaveFeed(waves, 4, lead=lead, labels=True).all():
            assert codes.shape == found.shape and codes.size(1) == 4 + lead
            for row, (x, y) in enumerate(zip(codes, found, strict=True)):
                here = (y >= 0).nonzero().squeeze(1)
                targets.append(y[here])
                assert torch.equal(x[here[1:]], y[here[:-1]])  # one sample later
                sounds.append(int(labels[row]))
        assert torch.equal(torch.cat(targets), expected) and sounds == [1, 1, 1, 0, 1, 1]
    first = next(WaveFeed(waves, 6).all())
    assert first[0][0, 0] == first[0][3, 0] == 128  # a sound begins after silence
    assert first[0][1, 0] == expected[3]  # and a window after the sample before it


def test_epochs_have_whole_batches_in_an_order_of_their_own():
    feed = WaveFeed(waves_of(_sounds(40, 21), 4), 3, seed=2)
    epochs = [torch.cat([codes for codes, _ in feed.epoch(k)]) for k in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])
    assert len(epochs[0]) == feed.samples == feed.steps * 3
    with pytest.raises(DataError, match="at least 20 windows of 4 samples"):
        WaveFeed(waves_of(_sounds(40), 4), 20).steps  # noqa: B018


def test_sounds_are_held_out_whole():
    waves = waves_of(_sounds(*range(5, 25)), 4)
    train, held = waves.split(0.25, seed=0)
    assert not set(train.origin.tolist()) & set(held.origin.tolist())
    assert len(held.origin.unique()) == 5 and len(train) + len(held) == len(waves)
    train, held = waves_of(_sounds(40), 4).split(0.3, seed=0)
    assert train.stop.max() == held.start.min() == 28
    with pytest.raises(DataError, match="enough windows in the only sound"):
        waves_of(_sounds(4), 4).split(0.5, seed=0)


def test_train_resume_sample_and_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path / "cache"))
    pitch = {"low": 300.0, "high": 900.0}
    for k, (name, hertz) in enumerate(pitch.items()):
        (tmp_path / "tones" / name).mkdir(parents=True)
        for n in range(5):
            x = 0.8 * torch.sin(torch.arange(400) * (2 * math.pi * (hertz + 10 * n) / 8000) + k)
            write_wav(tmp_path / "tones" / name / f"{n}.wav", x, 8000)
    sizes = {"width": 8, "skip": 8, "layers": 3, "cycles": 1, "block": 128, "seconds": 0.02, "batch-size": 4}
    small = [x for name, value in sizes.items() for x in (f"--{name}", str(value))]
    train = ["train", "wavenet", "--data", "tones", "--conditional", "--validation", "0.2", *small]
    assert main([*train, "--epochs", "2", "--run", "whole"]) == 0
    said = capsys.readouterr()
    assert "bits per sample" in said.out + said.err and "samples.wav" in said.out
    assert main([*train, "--epochs", "1", "--run", "parts"]) == 0
    assert main(["train", "wavenet", "--resume", "--run", "parts", "--epochs", "2"]) == 0
    states = [(tmp_path / "runs" / run / "checkpoint-000000016" / "model.safetensors") for run in ("whole", "parts")]
    assert states[0].read_bytes() == states[1].read_bytes()
    run = tmp_path / "runs" / "whole"
    assert {"samples.wav", "samples.png", "curves.png"} <= {path.name for path in run.iterdir()}
    assert (run / "grids" / "epoch-0002.wav").exists()
    assert main(["sample", "whole", "--count", "2", "--class", "high", "--out", "x.wav"]) == 0
    assert (tmp_path / "x.wav").exists() and (tmp_path / "x.png").exists()
    assert main(["sample", "whole", "--class", "middle", "--out", "y.wav"]) == 2
    assert main(["export", "whole", "--out", "out"]) == 0
    assert (tmp_path / "out" / "model.py").exists()
    assert main(["reconstruct", "whole"]) == 2
    assert main(["train", "wavenet", "--kernel", "0"]) == 2


def test_codes_of_a_sound_survive_there_and_back():
    codes = torch.arange(256)
    assert torch.equal(mu_law_encode(mu_law_decode(codes)), codes)
