"""Configuration: a dataclass; a flat TOML file overrides its defaults, and command-line flags override both."""

import dataclasses
import difflib
import json
import math
import tomllib
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from genai_fast.errors import UsageError
from genai_fast.spelling import spelled


class ConfigError(UsageError):
    """An invalid setting; the message names key, expected and got, or the nearest valid key."""


def setting(
    default: Any, help: str, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf,
    choices: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """A field of a configuration: default, help text, and what is allowed: low <= x <= high, x > above."""
    return field(default=default, metadata={"help": help, "low": low, "above": above, "high": high, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Settings of every recipe."""

    data: str = setting("", "what to train on")
    strict: bool = setting(False, "stop at a broken file instead of skipping it")
    validation: float = setting(0.1, "fraction of the data held out for validation", above=0, high=0.9)
    init: str = setting(
        "",
        "run to take the initial weights from, for fine-tuning; layers that do not match are listed; gpt and"
        " llama: also a folder of Hugging Face's files, whose sizes and tokenizer the run gets",
    )
    epochs: int = setting(50, "passes over the data", low=1)
    batch_size: int = setting(128, "samples per step, over all processes", low=1)
    lr: float = setting(1e-3, "learning rate of Adam", above=0)
    warmup: int = setting(0, "steps of linear learning-rate warm-up, at most a tenth of the run", low=0)
    decay: str = setting(
        "none",
        "learning-rate schedule; cosine ends at a tenth of --lr, linear falls to 0 over the second half of the run",
        choices=("none", "cosine", "linear"),
    )
    beta1: float = setting(0.9, "decay of Adam's first moment", low=0, high=0.9999)
    beta2: float = setting(0.999, "decay of Adam's second moment", low=0, high=0.999999)
    weight_decay: float = setting(0.0, "decoupled weight decay (AdamW), for matrices only", low=0)
    clip: float = setting(0.0, "gradient clipping: largest norm; 0: none", low=0)
    precision: str = setting("float32", "autocast precision of the layers", choices=("float32", "bfloat16", "float16"))
    tf32: bool = setting(False, "multiply float32 in TF32 on CUDA: faster, with a mantissa of ten bits")
    accumulate: int = setting(
        1, "gradient accumulation steps: the batch is computed in that many parts, to save memory", low=1
    )
    seed: int = setting(0, "random seed of weights, split, order and noise", low=0, high=2**32 - 1)
    threads: int = setting(0, "CPU threads; 0: PyTorch's default", low=0, high=4096)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda if available")
    log_every: int = setting(20, "steps between records in metrics.jsonl", low=1)
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: at the end of each epoch", low=0)
    keep: int = setting(2, "number of newest checkpoints to keep, in addition to the best on held-out data", low=1)
    tensorboard: bool = setting(False, "also write figures, grids and texts for TensorBoard, in the run's tensorboard/")

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(type(self), f.name, getattr(self, f.name)))


@dataclass(frozen=True)
class ImageConfig(Config):
    """Settings of every recipe for images."""

    data: str = setting(
        "mnist",
        "mnist (5,000 of its 70,000 images), digits (1,797 of 8 x 8), or a path: a folder or zip of pictures, a folder"
        " of IDX files (such as all of MNIST), an IDX, .npy or .npz file, CIFAR-10 batches",
    )
    size: int = setting(0, "side in pixels to which pictures are scaled; 0: unscaled, all of one size", low=0)
    flip: float = setting(0.0, "probability of mirroring an image left to right", low=0, high=1)
    crop: int = setting(0, "largest shift in pixels", low=0)
    rotate: float = setting(0.0, "largest angle of rotation in degrees", low=0, high=180)
    zoom: float = setting(0.0, "largest share by which an image is enlarged or made smaller", low=0, high=0.9)
    jitter: float = setting(0.0, "strength of random brightness, contrast and saturation", low=0, high=1)
    sync_bn: bool = setting(False, "batch norm statistics over all processes, not per process")
    grid_every: int = setting(1, "epochs between grids of samples in grids/; 0: none", low=0)
    quality_every: int = setting(
        1, "epochs between comparisons of samples with held-out images (at least 6); 0: none", low=0
    )


@dataclass(frozen=True)
class TranslationConfig(ImageConfig):
    """Settings of every recipe that translates between two sets of images."""

    data: str = setting("", "pictures of set A, in any form that other recipes for images take")
    data_b: str = setting(
        "", "pictures of set B; for pix2pix the partners of A's by file name, or by order if there are no names"
    )


@dataclass(frozen=True)
class TextConfig(Config):
    """Settings of every recipe for text."""

    data: str = setting(
        "pydoc", "pydoc (Python's own documentation), or a path: .txt, .md, .html, .jsonl, a folder or zip of these"
    )
    tokenizer: str = setting("bpe", "kind of tokenizer", choices=("bpe", "char", "byte"))
    vocabulary: int = setting(1024, "vocabulary size of a bpe tokenizer", low=257, high=1 << 20)
    block: int = setting(256, "context length in tokens", low=2)
    sample_every: int = setting(1, "epochs between texts in samples/; 0: none", low=0)
    clip: float = setting(1.0, "gradient clipping: largest norm; 0: none", low=0)


@dataclass(frozen=True)
class AudioConfig(Config):
    """Settings of every recipe for sounds."""

    data: str = setting(
        "spoken-digits",
        "spoken-digits (2,160 by espeak-ng), or a path: a folder or zip of WAV, FLAC and OGG files, or one such file",
    )
    rate: int = setting(22050, "samples per second, to which sounds are resampled", low=1000, high=192_000)
    seconds: float = setting(0.75, "length of a clip; longer sounds are cut into several", above=0, high=3600)
    trim: float = setting(
        0.0, "cut off both ends as far as they are this many dB below the loudest part; 0: not, spoken-digits 40", low=0
    )
    mels: int = setting(128, "mel bands of the spectrogram", low=1, high=4096)
    n_fft: int = setting(2048, "samples of the spectrogram's window", low=4, high=1 << 16)
    hop: int = setting(512, "samples from one frame of the spectrogram to the next, at most half a window", low=1)
    scale: str = setting(
        "db",
        "scale of the spectrogram: decibels, or log(1 + x), in which quiet parts count little",
        choices=("db", "log1p"),
    )
    grid_every: int = setting(1, "epochs between spectrograms and sounds of samples in grids/; 0: none", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_fft % 2 or 2 * self.hop > self.n_fft:
            raise ConfigError(
                f"n_fft, hop: expected an even number and at most half of it, got {self.n_fft} and {self.hop}"
            )
        if self.frames < 2:
            raise ConfigError(
                f"seconds: expected at least 2 frames of {self.hop} samples, got {self.seconds:g}; remedy:"
                f" {2 * self.hop / self.rate:.2g} or more"
            )

    @property
    def frames(self) -> int:
        """Of a clip."""
        return round(self.seconds * self.rate / self.hop)


def changed(kind: type[Config], key: str, default: Any) -> Any:
    """A setting of `kind` with another default."""
    return field(default=default, metadata=kind.__dataclass_fields__[key].metadata)


@dataclass(frozen=True)
class WaveformConfig(Config):
    """Settings of every recipe for sounds as they are, sample by sample."""

    data: str = changed(AudioConfig, "data", "spoken-digits")
    rate: int = changed(AudioConfig, "rate", 8000)
    seconds: float = setting(0.5, "length of the sounds that are drawn", above=0, high=600)
    trim: float = changed(AudioConfig, "trim", 0.0)
    block: int = setting(2048, "samples of a training window; sounds are cut into such", low=2, high=1 << 20)
    grid_every: int = setting(
        1, "epochs between sounds that are drawn, and their spectrograms, in grids/; 0: none", low=0
    )
    clip: float = setting(1.0, "gradient clipping: largest norm; 0: none", low=0)


class Command(NamedTuple):
    """What `genai-fast train NAME` says of itself before its model, and with it torch, is imported."""

    name: str
    summary: str
    config: type[Config]
    examples: tuple[str, ...]


def types(kind: type[Config]) -> dict[str, type]:
    """The type of each setting: bool, int, float or str."""
    return typing.get_type_hints(kind)


def _checked(kind: type[Config], key: str, value: Any) -> Any:
    wanted = types(kind)[key]
    if key == "precision" and isinstance(value, str):
        value = spelled(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{key}: expected {wanted.__name__}, got {value!r} ({type(value).__name__})")
    allowed = kind.__dataclass_fields__[key].metadata
    if allowed["choices"] and value not in allowed["choices"]:
        raise ConfigError(f"{key}: expected {' or '.join(allowed['choices'])}, got {value!r}")
    if wanted in (str, bool):
        return value
    if not (math.isfinite(value) and allowed["low"] <= value <= allowed["high"] and value > allowed["above"]):
        signs = {"low": ">=", "above": ">", "high": "<="}
        bounds = [f"{sign} {_plain(allowed[name])}" for name, sign in signs.items() if math.isfinite(allowed[name])]
        raise ConfigError(f"{key}: expected a number {' and '.join(bounds)}, got {value!r}")
    return value


def _plain(x: float) -> str:
    """All digits of a bound."""
    return str(x) if isinstance(x, int) else f"{x:g}"


def build(kind: type[Config], values: dict[str, Any], source: str) -> Config:
    """A configuration from key-value pairs; `source` (a file, "flags") goes into the messages."""
    valid = [f.name for f in fields(kind)]
    for key, value in values.items():
        if key not in valid:
            near = difflib.get_close_matches(key.replace("-", "_"), valid, 1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(valid)}"
            raise ConfigError(f"{source}: unknown key {key!r}; {hint}")
        if isinstance(value, dict):
            raise ConfigError(f"{source}: {key}: expected {key} = value, got a table [{key}]")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def read(path: Path, recipe: str) -> dict[str, Any]:
    """The key-value pairs of a TOML file. A key `recipe`, which saved files have, must name this recipe."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: expected a TOML file, got {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = '; a string needs quotes, as in data = "mnist"' if str(error).startswith("Invalid value") else ""
        raise ConfigError(f"{path}: expected TOML, got {error}{hint}") from error
    found = values.pop("recipe", recipe)
    if found != recipe:
        raise ConfigError(f"{path}: expected settings of recipe {recipe!r}, got {found!r}")
    return values


def to_toml(config: Config, recipe: str) -> str:
    """Every setting, as TOML that `read` takes."""
    pairs = {"recipe": recipe, **dataclasses.asdict(config)}
    lines = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in pairs.items())
    return lines.replace("\x7f", "\\u007f")  # a JSON string is a TOML string but for DEL, which TOML wants escaped
