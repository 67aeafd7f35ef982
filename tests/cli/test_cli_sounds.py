"""The VAE of sounds on a folder of real files: trained, resumed, sampled, interpolated, reconstructed."""

import io
import wave

import numpy as np
import pytest
from commands import call, records
from PIL import Image

from genai_fast.models.registry import RECIPES
from genai_fast.runs import run as runs
from genai_fast.training import checkpoint

soundfile = pytest.importorskip("soundfile", reason="pip install .[audio]")
pytest.importorskip("soxr", reason="pip install .[audio]")

RATE = 8000
SMALL = ["--rate", RATE, "--seconds", 0.3, "--mels", 24, "--n-fft", 512, "--hop", 128, "--width", 8, "--layers", 2]
QUICK = ["--latent", 4, "--epochs", 2, "--batch-size", 8, "--log-every", 1, "--validation", 0.3]
CLIP = (round(0.3 * RATE / 128) - 1) * 128  # samples


def plucked(hz):
    t = np.arange(CLIP) / RATE
    return np.sin(2 * np.pi * hz * t) * np.exp(-4 * t) + 0.3 * np.sin(4 * np.pi * hz * t) * np.exp(-8 * t)


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """30 sounds in two classes, WAV and FLAC, and one broken file."""
    folder = tmp_path_factory.mktemp("sounds") / "tones"
    for name, base in (("low", 200), ("high", 900)):
        (folder / name).mkdir(parents=True)
        for k in range(15):
            soundfile.write(folder / name / f"{k:02}.{'flac' if k % 2 else 'wav'}", plucked(base + 20 * k), RATE)
    (folder / "low" / "broken.wav").write_bytes(b"RIFF")
    return folder


@pytest.fixture(scope="module")
def trained(tones, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert call("train", "audio-vae", "--data", tones, *SMALL, *QUICK, "--out", out, "--run", "tones") == 0
    return out / "tones"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def samples_of(path):
    """Of a WAV file: mono, 16 bits."""
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def assert_written(path, count, columns):
    """Sounds with a gap after each, none silent; and their spectrograms, in colour."""
    x = samples_of(path).reshape(count, CLIP + RATE // 5)
    assert not x[:, CLIP:].any() and (np.abs(x[:, :CLIP]).max(1) > 0).all()
    picture = np.asarray(Image.open(path.with_suffix(".png")))
    across, down = columns, -(-count // columns)
    assert picture.ndim == 3 and (picture.shape[1] - 2) % across == 0 and (picture.shape[0] - 2) % down == 0
    assert picture.std() > 5


def test_training_leaves_sounds_pictures_and_figures(trained, capsys):
    names = {path.name for path in trained.iterdir()}
    assert {"samples.wav", "samples.png", "reconstructions.wav", "reconstructions.png", "curves.png"} <= names
    assert {path.name for path in (trained / "grids").iterdir()} == {
        f"epoch-000{k}.{s}" for k in "12" for s in ("wav", "png")
    }
    assert_written(trained / "samples.wav", 16, 4)
    assert_written(trained / "reconstructions.wav", 16, 8)
    last = records(trained, "epoch")[-1]
    figures = last["validation"]
    assert set(last["train"]) == {"loss", "reconstruction", "kl"}
    assert set(figures) == {"loss", "reconstruction", "kl", "negative_elbo", "mel_error", "mel_error_mean"}
    assert figures["negative_elbo"] == pytest.approx(figures["loss"], rel=1e-5)  # beta is 1
    assert 0 < figures["mel_error"] < 40 and 0 < figures["mel_error_mean"] < 40


def test_it_goes_on_exactly(trained, tones, here, capsys):
    words = ["train", "audio-vae", "--data", tones, *SMALL, *QUICK, "--run", "again"]
    words[words.index("--epochs") + 1] = 1
    assert call(*words) == 0
    assert "1 of 31 sounds are broken and left out: low/broken.wav" in capsys.readouterr().err
    assert call("train", "audio-vae", "--run", "again", "--resume", "--epochs", 2) == 0
    said = capsys.readouterr().out
    assert "mel error" in said and "next: " in said and "--out samples.wav" in said
    ours, expected = (checkpoint.latest(folder) / "model.safetensors" for folder in (here / "runs" / "again", trained))
    assert ours.read_bytes() == expected.read_bytes()


def test_resuming_wants_the_same_sounds(tones, here, capsys, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.tile(plucked(300), 30), RATE)
    words = ["--run", "one", "--resume", "--epochs", 3]
    assert call("train", "audio-vae", "--data", tmp_path / "a.wav", *SMALL, *QUICK, "--run", "one") == 0
    soundfile.write(tmp_path / "a.wav", np.tile(plucked(330), 30), RATE)
    assert call("train", "audio-vae", *words) == 2
    assert "expected the data that the run began with" in capsys.readouterr().err


def test_samples(trained, here, capsys):
    assert call("sample", trained, "--count", 3, "--seed", 5, "--out", "x.wav") == 0
    assert "x.wav: 3 samples of " in capsys.readouterr().out
    assert_written(here / "x.wav", 3, 2)
    assert call("sample", trained, "--count", 2, "--seed", 5, "--out", "each") == 0
    assert sorted(p.name for p in (here / "each").iterdir()) == [
        f"00000{k}.{s}" for k in (0, 1) for s in ("png", "wav")
    ]
    assert call("sample", trained, "--best") == call("sample", trained) == 0
    assert_written(here / "samples.wav", 16, 4)
    assert (here / "samples-2.wav").exists() and (here / "samples-2.png").exists()
    assert call("sample", trained, "--count", 3, "--seed", 5, "--out", "x.wav") == 0
    assert "replaces the former file" in capsys.readouterr().out


def test_between_two_sounds_and_between_latents(trained, tones, here, capsys):
    ends = [tones / "low" / "00.wav", tones / "high" / "03.flac"]
    assert call("interpolate", trained, "--between", *ends, "--steps", 5, "--out", "way.wav") == 0
    assert_written(here / "way.wav", 5, 5)
    assert call("interpolate", trained, "--pairs", 2, "--steps", 4) == 0
    assert_written(here / "interpolation.wav", 8, 4)
    capsys.readouterr()
    assert call("interpolate", trained, "--between", ends[0], "none.wav") == 2
    assert "none.wav: expected a sound in WAV, FLAC or OGG, got No such file" in capsys.readouterr().err


def test_reconstructions(trained, tones, here, capsys):
    assert call("reconstruct", trained, "--count", 3) == 0
    assert_written(here / "reconstructed.wav", 6, 6)
    assert call("reconstruct", trained, "--data", tones / "low", "--out", "low.wav", "--count", 12) == 0
    assert_written(here / "low.wav", 24, 8)
    assert "12 sounds of low, each before its reconstruction" in capsys.readouterr().out


MISTAKES = {
    "a picture": (
        ("sample", "{}", "--out", "x.png"),
        "--out: expected the name of a WAV file or of a folder, got x.png",
    ),
    "a class": (("sample", "{}", "--class", "low"), "--class: expected a run of a conditional model"),
    "no folder": (("sample", "{}", "--out", "none/x.wav"), "expected a file in an existing folder"),
    "no count": (("sample", "{}", "--count", "0"), "--count: expected at least 1, got 0"),
    "not wav": (("interpolate", "{}", "--out", "x.ogg"), "--out: expected the name of a WAV file, got x.ogg"),
    "no steps": (("interpolate", "{}", "--steps", "1"), "--steps: expected at least 2"),
    "inpaint": (("inpaint", "{}", "--data", "x", "--box", "0,0,1,1"), "expected a run of a model that can inpaint"),
    "generate": (("generate", "{}"), "expected a run of a text model, got one of audio-vae; remedy: sample"),
    "size": (("train", "audio-vae", "--size", "64"), "unknown argument --size"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(trained, case, capsys, here):
    words, message = MISTAKES[case]
    assert call(*(word.format(trained) for word in words)) == 2
    assert message in capsys.readouterr().err and not [p for p in here.iterdir() if p.suffix in (".wav", ".png")]


def test_only_sounds_lie_between_files(here, capsys):
    words = ["train", "vae", "--data", "digits", "--hidden", 8, "--latent", 2, "--epochs", 1, "--run", "d"]
    assert call(*words) == 0
    assert call("interpolate", "d", "--between", "a.wav", "b.wav") == 2
    assert "--between: expected a run of a model of sounds, got one of vae" in capsys.readouterr().err
    assert call("sample", "d", "--out", "x.wav") == 2
    assert "expected the name of a PNG file or of a folder, got x.wav" in capsys.readouterr().err


def test_a_plane_of_labelled_sounds(tones, here):
    words = ["train", "audio-vae", "--data", tones, *SMALL, *QUICK, "--run", "plane", "--grid-every", 0]
    words[words.index("--latent") + 1] = 2
    assert call(*words) == 0
    assert (here / "runs" / "plane" / "latent.png").exists() and not (here / "runs" / "plane" / "grids").exists()


def test_a_checkpoint_of_another_length_is_refused(trained):
    about = {**checkpoint.read_state(checkpoint.latest(trained))["about"], "shape": [24, 99]}
    settings = runs.saved_settings("audio-vae", trained, {})
    with pytest.raises(ValueError, match=r"expected spectrograms of \(24, 19\) in its checkpoint, got \[24, 99\]"):
        runs.task_of("audio-vae").open("audio-vae", settings, about, trained)


def test_the_figures_have_meanings():
    from genai_fast.evaluation import key

    assert {"negative_elbo", "mel_error", "mel_error_mean"} <= key.MEANINGS.keys() and RECIPES["audio-vae"].benches
    assert io.StringIO(key.as_text({"mel_error": 2.5})).read().startswith("  mel error  2.5")
