"""Runs in folders: begun, resumed, opened again, sampled."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genai_fast import atomic_files, config
from genai_fast.config import Config, ConfigError, ImageConfig, TextConfig
from genai_fast.data import hugging_face_files
from genai_fast.data.errors import brief
from genai_fast.data.text import Tokenizer
from genai_fast.errors import UsageError, require
from genai_fast.models.common.recipe import Pretrained
from genai_fast.models.registry import RECIPES
from genai_fast.precision import float32_products
from genai_fast.runs import pictures
from genai_fast.runs.audio_task import AudioTask
from genai_fast.runs.image_task import ImageTask
from genai_fast.runs.text_task import TextTask
from genai_fast.runs.translation_task import TranslationTask
from genai_fast.runs.wave_task import WaveTask
from genai_fast.terminal import say
from genai_fast.training import accumulation, checkpoint, distributed, parallel
from genai_fast.training.loop import METRICS, finishing, fit
from genai_fast.training.meter import epochs
from genai_fast.training.optimizer import make_optimizer
from genai_fast.training.tensorboard import Board

CONFIG, CURVES = "config.toml", "curves.png"
_NAMED = 8  # tensors that do not match, in a message
_OF_DATA = ("data", "size", "validation", "seed")  # what a run has in common with that whose codes it learns
# What a resumed run may change.
ON_RESUME = (
    "epochs", "threads", "device", "log_every", "checkpoint_every", "keep", "grid_every", "quality_every",
    "sample_every", "tensorboard",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A finished run, in memory."""

    folder: Path
    config: Config
    model: nn.Module
    task: ImageTask | TextTask
    record: dict[str, Any]  # of the last epoch


@dataclass(frozen=True)
class Opened:
    """A run's model, on the CPU and in evaluation mode."""

    folder: Path
    recipe: str
    config: Config
    model: nn.Module
    shape: tuple[int, ...] = ()  # (C, H, W) of an image, (mels, frames) of a sound, (samples,) of a window of one
    classes: tuple[str, ...] = ()  # names of the labels
    tokenizer: Tokenizer | None = None  # of a model of text


def task_of(name: str) -> type[ImageTask] | type[TextTask]:
    """What recipe `name` trains on."""
    if issubclass(RECIPES[name].config, TextConfig):
        return TextTask
    if RECIPES[name].sounds:
        return AudioTask
    if RECIPES[name].waves:
        return WaveTask
    return TranslationTask if RECIPES[name].translates else ImageTask


def new_folder(out: Path, name: str) -> Path:
    """out/name, or out/name-2, -3, ... if that is taken."""
    number, folder = 1, out / name
    while folder.exists():
        number += 1
        folder = out / f"{name}-{number}"
    return folder


def device_of(name: str) -> torch.device:
    """The device that a configuration names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: expected one that works here, got {name!r} ({reason})") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu or cuda, got {name!r}")
    return device


def train(name: str, settings: Config, folder: Path, *, resume: bool = False) -> Trained:
    """Train recipe `name` in `folder`: leaves config.toml, metrics.jsonl, checkpoints, pictures or texts there.

    With `resume`, resumes from the folder's newest checkpoint; starts again, and says so, if there is none yet.
    Of the processes that torchrun started, the first one decides on the folder, writes and speaks.

    Raises:
        UsageError: data, device, packages or the folder do not serve; nothing has been written then.
        DiskError: the folder cannot be written to, or no longer; the last checkpoint stands.
        TrainingStopped, TrainingInterrupted: as `fit` does.
    """
    with distributed.processes(settings), _products(settings):
        return _train(name, settings, distributed.agreed(folder), resume)


@contextlib.contextmanager
def _products(settings: Config) -> Iterator[None]:
    """How float32 products are computed inside the block."""
    if not settings.tf32:
        yield
        return
    if device_of(settings.device).type != "cuda":
        raise ConfigError("--tf32: expected a CUDA device, got a CPU; remedy: leave it out, or --precision bfloat16")
    with float32_products("tf32", "tf32"):
        yield


def _train(name: str, settings: Config, folder: Path, resume: bool) -> Trained:
    kind = task_of(name)
    for module in ("safetensors.torch", "rich.progress", "matplotlib.figure", *kind.packages):
        require(module, "train")  # now rather than after the training
    if settings.tensorboard:
        require("tensorboard", "tensorboard")
    if RECIPES[name].codes_of and not settings.codes:
        of = RECIPES[name].codes_of
        raise UsageError(f"{name}: expected --codes RUN, a run of {of}, got none; remedy: genai-fast train {of} first")
    if not resume and (found := _pretrained(name, settings.init)):
        reader, begun = found
        settings = reader.sized(begun, settings)
    device = device_of(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with contextlib.ExitStack() as stack:
        if resume and distributed.first() and folder.is_dir():  # before anything in it is read
            stack.enter_context(atomic_files.held(folder))
        with distributed.machine_by_machine():
            task = kind(name, settings, folder if resume else None)
        distributed.check_alike(task.about)
        newest = distributed.agreed(next(iter(checkpoint.found(folder)), None)) if resume else None
        if newest:
            _check_same_data(newest, task.about)
        if not resume:
            _check_new(folder)
        torch.manual_seed(settings.seed)
        model = _made(name, task)
        accumulation.check(model, settings.accumulate)
        if settings.accumulate > 1 and distributed.size() > 1:
            raise ConfigError("--accumulate: expected 1 in several processes, which share the batch already")
        if resume and not newest and distributed.first():
            say(f"{folder}: stopped before its first checkpoint; starting again")
        if RECIPES[name].codes_of and not newest:
            _take_codes(name, settings, model)
        if settings.init and not newest:
            _begin_with(name, Path(settings.init), model)
        model = parallel.placed(model, device, settings)
        feeds = task.feeds(model)
        optimizer = make_optimizer(model, settings)
        state = checkpoint.restore(newest, model, optimizer, threads=not settings.threads) if newest else None
        optimizer = parallel.sharded(model, optimizer, device, settings)
        stack.enter_context(checkpoint.writing(folder, name))
        board = None
        if distributed.first():
            if not resume:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(atomic_files.held(folder))
                _check_new(folder)  # again: another process may have trained in it since
            atomic_files.write_text(folder / CONFIG, config.to_toml(settings, name))
            say(f"{name} on {task.described}")
            task.prepare(folder)
            if settings.tensorboard:
                board = stack.enter_context(Board(folder, state["step"] if state else 0))
        more = {"about": task.about, "after_epoch": task.watch(model, folder, board), "board": board}
        record = fit(model, optimizer, *feeds, settings, folder, resume=state, **more)
        model = parallel.whole_model(model, task.model).eval()
        if distributed.first():
            with finishing(folder, name):
                task.finish(model, folder)
                pictures.curves(epochs(folder / METRICS), f"{name} on {task.described}", folder / CURVES)
    return Trained(folder, settings, model, task, record)


def _made(name: str, task: ImageTask | TextTask) -> nn.Module:
    try:
        return task.model()
    except UsageError:
        raise
    except (RuntimeError, MemoryError, OverflowError) as error:  # it finds no memory
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"{name}: expected sizes of a model that fits, got: {reason}; remedy: smaller ones") from error


def _check_new(folder: Path) -> None:
    if any(folder.glob("checkpoint-*")):  # one that stopped before its first may be started again
        raise UsageError(f"{folder}: a run of this name exists; remedy: --resume, or another name with --run")


def _check_same_data(newest: Path, about: dict[str, Any]) -> None:
    """A run continues with the data that it began with; checkpoints of earlier versions have no digest of it."""
    found = checkpoint.read_state(newest)["about"]
    if found == about or found == {k: v for k, v in about.items() if k != "data"}:
        return
    if {**found, "data": ""} == {**about, "data": ""}:
        raise UsageError(
            f"{newest}: expected the data that the run began with, got as many samples with other contents; remedy: put"
            f" the data back, or begin a new run from this one's weights with --init {newest.parent}"
        )
    raise UsageError(f"{newest}: expected a run of {found}, got {about}; remedy: resume with the same data")


def _pretrained(name: str, source: str) -> tuple[Pretrained, Path] | None:
    """What reads the files that --init names, and their folder, if they are another library's."""
    reader = RECIPES[name].pretrained
    folder = reader.found(Path(source)) if reader and source else None
    return (reader, folder) if reader and folder else None


def _begin_with(name: str, source: Path, model: nn.Module) -> None:
    """Put the weights of another run, or of a safetensors file, into the model; names those that do not fit."""
    if found := _pretrained(name, str(source)):
        reader, folder = found
        text = reader.load(folder, model)
        if distributed.first():
            say(text)
        return
    path = source if source.is_file() else checkpoint.latest(source) / "model.safetensors"
    try:
        taken, left = checkpoint.load_matching(path, model)
    except checkpoint.CheckpointError:  # nothing fits; an exported network does into that which is exported
        if (network := RECIPES[name].network(model)) is model:
            raise
        taken, left = checkpoint.load_matching(path, network)
    text = f"{path}: {taken} tensors taken"
    if left:
        text += f", these do not match: {'; '.join(left[:_NAMED])}" + (" ..." if len(left) > _NAMED else "")
    if distributed.first():
        say(text)


def with_codes(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of recipe `name` with those of the run whose codes it learns: its sizes, data and their split.

    Raises: UsageError: `codes` is no run of the right recipe; ConfigError: other sizes were asked for.
    """
    if not given.get("codes"):
        return given
    source, recipe = _codes_of(name, given["codes"]), RECIPES[name]
    images = {f.name for f in fields(ImageConfig)}
    sizes = {f.name for f in fields(source.config)} & {f.name for f in fields(recipe.config)} - images
    for key in sorted(sizes & given.keys()):
        if given[key] != (own := getattr(source.config, key)):
            raise ConfigError(f"{key}: expected {own} as {source.folder} has, got {given[key]}; remedy: omit it")
    return {key: getattr(source.config, key) for key in (*sizes, *_OF_DATA)} | given


def _codes_of(name: str, source: str) -> Opened:
    opened = open_run(Path(source))
    if opened.recipe != RECIPES[name].codes_of:
        raise UsageError(f"--codes: expected a run of {RECIPES[name].codes_of}, got {source}, one of {opened.recipe}")
    return opened


def _take_codes(name: str, settings: Config, model: nn.Module) -> None:
    """Put the model whose codes are learned into `model.vq`."""
    source = _codes_of(name, settings.codes)
    if source.shape != model.vq.shape:
        raise UsageError(
            f"--codes: expected a run on images of {model.vq.shape} as the data have, got {source.shape}; remedy: omit"
            f" --data and --size"
        )
    own = model.vq.state_dict()  # with moving averages, which codes that were trained by gradients lack
    model.vq.load_state_dict({**own, **source.model.state_dict()})


def saved_settings(name: str, folder: Path, changes: dict[str, Any]) -> Config:
    """The settings of a run, with the changes that a resumed run may make.

    Repeating a setting changes nothing, so a job that begins with `--resume` may be started again as it is.
    """
    path = folder / CONFIG
    saved = config.read(path, name) if path.exists() else {}
    fixed = [key for key, value in changes.items() if key not in ON_RESUME and saved.get(key) != value]
    if fixed:
        flags, allowed = (", ".join(f"--{k.replace('_', '-')}" for k in keys) for keys in (fixed, ON_RESUME))
        raise ConfigError(f"--resume keeps the run's settings: only {allowed} may change, got {flags}")
    if not path.exists():
        raise UsageError(f"{folder}: expected a run ({CONFIG} in it), got none; remedy: leave --resume out")
    return config.build(RECIPES[name].config, {**saved, **changes}, str(path))


def _reader_of(folder: Path) -> tuple[str, Pretrained]:
    """The recipe of a Hugging Face folder's model, and what reads it; without a type, it is a GPT-2."""
    readers = {name: recipe.pretrained for name, recipe in RECIPES.items() if recipe.pretrained}
    kind = hugging_face_files.model_type(folder)
    for name, reader in readers.items():
        if (kind or "gpt2") in reader.TYPES:
            return name, reader
    types = ", ".join(known for reader in readers.values() for known in reader.TYPES)
    raise UsageError(f"{folder / 'config.json'}: model_type: expected one of {types}, got {brief(kind)}")


def _tokenizer_of(reader: Pretrained, folder: Path, model: nn.Module) -> Tokenizer:
    tokenizer = reader.tokenizer(folder)
    if tokenizer.size != model.vocabulary:
        raise UsageError(
            f"{folder}: expected a tokenizer of {model.vocabulary} ids as the model's, got {tokenizer.size}; remedy:"
            f" the files that belong together"
        )
    return tokenizer


def open_run(folder: Path, best: bool = False) -> Opened:
    """The newest model of a run, or the best on held-out data; or what another library's folder holds."""
    if hugging_face_files.found(folder):
        name, reader = _reader_of(folder)
        settings, model = reader.opened(folder, RECIPES[name].config)
        return Opened(folder, name, settings, model.eval(), tokenizer=_tokenizer_of(reader, folder, model))
    chosen = checkpoint.best(folder) if best else checkpoint.latest(folder)
    about = checkpoint.read_state(chosen)["about"]
    try:
        name = about["recipe"]
        settings = config.build(RECIPES[name].config, config.read(folder / CONFIG, name), str(folder / CONFIG))
        model, said = task_of(name).open(name, settings, about, folder)
    except (KeyError, TypeError) as error:
        raise UsageError(f"{chosen}: expected a run of {', '.join(RECIPES)}, got {about}") from error
    checkpoint.load_model(chosen, model)
    return Opened(folder, name, settings, model.eval(), **said)
