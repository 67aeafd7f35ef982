"""Sound files as they are: formats, folders, zips, what is broken, the cache, clips; espeak-ng's digits."""

import io
import os
import stat
import sys
import zipfile

import numpy as np
import pytest
import torch

from genai_fast import errors
from genai_fast.data import DataError, DataWarning, audio
from genai_fast.data.audio import Spectrum, sound, sources, spoken
from genai_fast.errors import UsageError

soundfile = pytest.importorskip("soundfile", reason="pip install .[audio]")
pytest.importorskip("soxr", reason="pip install .[audio]")


def tone(hz=440.0, rate=22050, seconds=0.5, loud=0.25):
    return loud * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)


def encoded(x, rate=22050, kind="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, x, rate, format=kind, subtype=subtype)
    return file.getvalue()


def pitch(x, rate=22050):
    """The strongest frequency in Hz."""
    windowed = x.double().numpy() * np.hanning(len(x))
    return np.abs(np.fft.rfft(windowed, 1 << 17)).argmax() * rate / (1 << 17)


@pytest.fixture
def folder(tmp_path):
    """Two classes of three tones each."""
    for k, name in enumerate(("low", "high")):
        (tmp_path / "tones" / name).mkdir(parents=True)
        for n in range(3):
            (tmp_path / "tones" / name / f"{n}.wav").write_bytes(
                encoded(tone(200 * (k + 1) + n, seconds=0.3 + 0.1 * n))
            )
    return tmp_path / "tones"


@pytest.mark.parametrize(
    ("kind", "subtype", "rate"),
    [
        ("WAV", "PCM_U8", 22050), ("WAV", "PCM_16", 22050), ("WAV", "PCM_24", 44100), ("WAV", "FLOAT", 16000),
        ("WAV", "DOUBLE", 96000), ("WAVEX", "PCM_16", 8000), ("FLAC", "PCM_16", 22050), ("FLAC", "PCM_24", 48000),
        ("OGG", "VORBIS", 44100), ("OGG", "OPUS", 48000),
    ],
)  # fmt: skip
def test_formats(tmp_path, kind, subtype, rate):
    path = tmp_path / "a.sound"
    path.write_bytes(encoded(tone(rate=rate), rate, kind, subtype))
    found = audio.load(path, cache=False)
    x = found.sound(0)
    assert len(found) == 1 and found.rate == 22050 and found.samples.dtype == np.int16
    assert abs(len(x) - 11025) <= 40 and abs(pitch(x) - 440) < 1
    assert x.abs().max() == 1  # as loud as it can be


def test_channels_are_averaged(tmp_path):
    both = np.stack([tone(300), tone(300) + tone(700, loud=0.5), -tone(300) - tone(700, loud=0.5)], 1)
    (tmp_path / "a.wav").write_bytes(encoded(both))
    assert abs(pitch(audio.load(tmp_path / "a.wav", cache=False).sound(0)) - 300) < 1


def test_long_files_are_read_in_parts(tmp_path, monkeypatch):
    (tmp_path / "a.flac").write_bytes(encoded(tone(rate=44100), 44100, "FLAC"))
    whole = audio.load(tmp_path / "a.flac", cache=False).sound(0)
    monkeypatch.setattr(sound, "_BLOCK", 1000)
    assert torch.equal(audio.load(tmp_path / "a.flac", cache=False).sound(0), whole)


@pytest.mark.parametrize("trim", [20.0, 40.0, 60.0])
def test_silence_is_trimmed_as_librosa_does(trim):
    x = np.concatenate([np.zeros(5000), tone() * np.linspace(0, 1, 11025) ** 2, 1e-4 * np.ones(3000)]).astype(
        np.float32
    )
    start, end = sound.loud_part(x, trim)
    assert 4000 < start < end <= len(x)
    librosa = pytest.importorskip("librosa", reason="pip install .[dev]")
    assert librosa.effects.trim(x, top_db=trim)[1].tolist() == [start, end]


def test_trimming_on_request(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded(np.concatenate([np.zeros(9000), tone(), np.zeros(9000)])))
    as_it_is, trimmed = (audio.load(tmp_path, trim=trim).sound(0) for trim in (0, 40))  # both are kept
    assert len(as_it_is) == 29025 and 11025 <= len(trimmed) <= 11025 + 4096


def test_classes_are_subfolders_of_folders_and_zips(folder, tmp_path):
    found = audio.load(folder)
    assert found.classes == ("high", "low") and found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.names[:2] == ("high/0.wav", "high/1.wav") and found.name == "tones"
    assert all(abs(pitch(found.sound(k)) - (400 if k < 3 else 200) - k % 3) < 1 for k in range(6))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in folder.rglob("*.wav"):
            file.write(path, f"all/{path.relative_to(folder).as_posix()}")
        file.writestr("__MACOSX/all/low/._0.wav", b"x")
        file.writestr("all/readme.txt", b"x")
    packed = audio.load(tmp_path / "a.zip")
    assert packed.classes == found.classes and np.array_equal(packed.samples, found.samples)


def test_stray_files_are_named_and_left_out(folder):
    (folder / "stray.wav").write_bytes(encoded(tone()))
    (folder / ".hidden.wav").write_bytes(b"x")
    os.mkfifo(folder / "low" / "pipe.wav")
    (folder / "low" / "up").symlink_to(folder)
    with pytest.warns(DataWarning, match=r"sounds lie beside or below the folders of classes.*stray.wav"):
        assert len(audio.load(folder)) == 6
    with pytest.raises(DataError, match="move or remove them"):
        audio.load(folder, strict=True)


FLAC = encoded(tone(), kind="FLAC")
# Its length, 36 bits from the middle of byte 21 on, claims 2**36 - 1 samples.
LONG = FLAC[:21] + bytes([FLAC[21] | 0x0F]) + b"\xff" * 4 + FLAC[26:]
BROKEN = {
    "empty": (b"", ""),
    "text": (b"no sound " * 99, ""),
    "head": (encoded(tone())[:30], ""),
    "short": (FLAC[: len(FLAC) // 2], ""),
    "long": (LONG, "samples of 1 channels in"),
    "silent": (encoded(np.zeros(2000)), "silence"),
    "no samples": (encoded(np.zeros(0)), "silence"),
    "nan": (encoded(np.full(2000, np.nan), subtype="FLOAT"), "not finite"),
    "inf": (encoded(np.full(2000, np.inf), subtype="FLOAT"), "not finite"),
    "aiff": (encoded(tone(), kind="AIFF"), "format AIFF; remedy: convert it"),
    "slow": (encoded(tone(), rate=10), "10 samples per second; expected 1,000"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_and_left_out(folder, case):
    content, why = BROKEN[case]
    (folder / "low" / "broken.wav").write_bytes(content)
    with pytest.warns(DataWarning, match=rf"1 of 7 sounds are broken and left out: low/broken.wav \(.*{why}") as said:
        found = audio.load(folder)
    assert len(found) == 6 and found.skipped == ("low/broken.wav",) and "\n" not in str(said[0].message)
    with pytest.warns(DataWarning, match="broken and left out"):  # from the cache
        assert audio.load(folder).labels.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(DataError, match=r"low/broken.wav: expected a sound, got .*; 1 of 7 files are broken"):
        audio.load(folder, strict=True)


def test_when_all_are_broken_there_is_nothing(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a.wav: expected a sound, got .*; 1 of 1 files are broken"):
        audio.load(tmp_path)
    with pytest.raises(DataError, match="expected spoken-digits or the path of a file or folder, got no such file"):
        audio.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected sounds \(.wav, .flac, .*got none"):
        audio.load(tmp_path / "empty")
    with pytest.raises(DataError, match="rate, trim: expected at least 1 sample"):
        audio.load(tmp_path, 0)
    with pytest.raises(DataError, match="expected a sound in WAV, FLAC or OGG, got"):
        audio.read_sound(tmp_path / "a.wav", audio.Treatment(22050))


def test_the_cache_is_of_the_files_and_of_what_was_made_of_them(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path / "cache"))
    first, calls = audio.load(folder), []
    read = sources.read_samples
    monkeypatch.setattr(sources, "read_samples", lambda *a: calls.append(a) or read(*a))
    again = audio.load(folder)
    assert not calls and isinstance(again.samples, np.memmap) and np.array_equal(again.samples, first.samples)
    assert audio.load(folder, 16000).rate == 16000 and len(calls) == 6
    (folder / "low" / "0.wav").write_bytes(encoded(tone(900)))
    assert abs(pitch(audio.load(folder).sound(3)) - 900) < 1 and len(calls) == 12
    for entry in (tmp_path / "cache" / "sounds").iterdir():
        (entry / "samples.npy").write_bytes(b"damaged")
    assert len(audio.load(folder)) == 6 and len(calls) == 18
    assert len(audio.load(folder, cache=False)) == 6 and len(calls) == 24
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(DataWarning, match="cannot be written"):
        assert len(audio.load(folder, cache=tmp_path / "file")) == 6


@pytest.mark.parametrize("cache", [None, False])
def test_clips(folder, cache):
    spectrum, sounds = Spectrum(hop=512), audio.load(folder, cache=cache)  # of 0.3, 0.4 and 0.5 s
    clips = audio.clips_of(sounds, spectrum, 11, cache=cache)  # 5,120 samples, 0.23 s
    assert clips.shape == (128, 11) and clips.origin.tolist() == [0, 1, 1, 2, 2, 3, 4, 4, 5, 5]
    assert clips.labels.tolist() == [0] * 5 + [1] * 5 and clips.classes == ("high", "low")
    x = sounds.sound(1)
    for clip, part in ((1, x[:5120]), (2, torch.nn.functional.pad(x[5120:], (0, 10240 - len(x))))):
        features = audio.to_features(audio.mel_power(part, spectrum), "db")
        assert (clips.batch(torch.tensor([clip]), signed=True)[0] - features).abs().max() < 1e-5
    again = audio.clips_of(sounds, spectrum, 11, cache=cache)
    assert torch.equal(again.stored, clips.stored) and again.digest == clips.digest
    long = audio.clips_of(sounds, spectrum, 100, cache=cache)  # 2.3 s: each is padded
    assert len(long) == 6 and (long.stored[..., 60:] == 0).all()


def test_all_clips_of_a_sound_are_held_out_together(folder):
    clips = audio.clips_of(audio.load(folder), Spectrum(), 6)
    train, held = clips.split(0.34, seed=3)
    assert len(train) + len(held) == len(clips) and len(held.origin.unique()) == 2
    assert not {*train.origin.tolist()} & {*held.origin.tolist()}
    assert torch.equal(clips.split(0.34, seed=3)[1].origin, held.origin)
    assert {tuple(clips.split(0.34, seed)[1].origin.unique().tolist()) for seed in range(9)} != {(0, 1)}
    alone = audio.clips_of(audio.load(folder / "low" / "2.wav"), Spectrum(), 6)
    train, held = alone.split(0.25, seed=0)
    assert (len(train), len(held)) == (3, 1) and torch.equal(held.pixels, alone.stored[3:])
    with pytest.raises(DataError, match=r"expected enough sounds to hold out 0.01 of them, got 6"):
        clips.split(0.01, 0)
    with pytest.raises(DataError, match="expected at least 2 frames and sounds of 16000 samples"):
        audio.clips_of(audio.load(folder), Spectrum(rate=16000), 6)


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf'{package} does not import .*pip install ".\[audio\]"'):
        audio.load(folder)


def test_without_libsndfile_the_package_is_named(folder, monkeypatch):
    def fail(module):
        raise OSError("sndfile library not found")

    monkeypatch.setattr(errors.importlib, "import_module", fail)
    with pytest.raises(UsageError, match=r"soundfile does not import \(sndfile library not found\)"):
        audio.load(folder)


@pytest.fixture
def espeak(tmp_path, monkeypatch):
    """A program of that name, which says a tone; and few words to say. Its file of calls."""
    (tmp_path / "word.wav").write_bytes(encoded(tone(seconds=0.3)))
    program, calls = tmp_path / "bin" / "espeak-ng", tmp_path / "calls"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\ncase "$1" in --version) echo "eSpeak NG 9  Data at: {tmp_path}";;\n'
        f"*) cat {tmp_path}/word.wav;; esac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spoken, "_ACCENTS", ("en-us", "en-gb"))
    monkeypatch.setattr(spoken, "_VOICES", ("f1",))
    monkeypatch.setattr(spoken, "_TAKES", 1)
    return calls


def test_digits_are_spoken_once(espeak):
    found = audio.load("spoken-digits")
    assert found.classes == tuple("0123456789") and found.labels.bincount().tolist() == [2] * 10
    assert found.names[0] == "0/en-gb-f1-0.wav" and abs(pitch(found.sound(0)) - 440) < 1
    calls = espeak.read_text().splitlines()
    assert len([c for c in calls if "--stdout" in c]) == 20 and any(c.startswith("-v en-us+f1 -s ") for c in calls)
    assert np.array_equal(audio.load("spoken-digits").samples, found.samples)
    assert espeak.read_text().splitlines()[len(calls) :] == ["--version"]


def test_a_program_that_does_not_speak(espeak, tmp_path):
    (tmp_path / "bin" / "espeak-ng").write_text("#!/bin/sh\necho broken library >&2\nexit 1\n")
    with pytest.raises(UsageError, match="expected speech, got broken library"):
        audio.load("spoken-digits")


def test_without_the_program_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"expected the program espeak-ng.*apt-get install espeak-ng.*--data FOLDER"):
        audio.load("spoken-digits")


def test_the_real_program_speaks():
    if not spoken.shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    digits = spoken.SpokenDigits()
    assert len(digits.arranged.names) == 2160
    for name in ("0/en-us-m1-0.wav", "7/en-gb-x-rp-f5-2.wav"):
        samples = sound.read_samples(digits.open(name), audio.Treatment(22050, spoken.TRIM))
        assert 0.2 < len(samples) / 22050 < 1.2 and np.abs(samples).max() == 32767
        power = audio.mel_power(sound.as_floats(samples), Spectrum())
        assert (audio.to_features(power, "db").amax(0) > 0).float().mean() > 0.6  # most frames are above 0 dB


def test_wav_files_are_written(tmp_path):
    x = torch.tensor([0.0, 0.5, -1.0, 2.0, float("nan")])
    audio.write_wav(tmp_path / "a.wav", x, 8000)
    samples, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert rate == 8000 and samples.tolist() == [0, 16384, -32767, 32767, 0]
