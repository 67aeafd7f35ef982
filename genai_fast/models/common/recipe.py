"""A recipe: all that the rest of the house knows of a model that `genai-fast train NAME` trains."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from genai_fast.config import AudioConfig, Command, Config, TranslationConfig, WaveformConfig
from genai_fast.errors import UsageError
from genai_fast.models.common.plain_loop import loss_step

Values = dict[str, Any]
"""The settings, and what the data adds: `shape`, `channels`, `size`, `input_size` and `classes` of images, `shape`,
`mels` and `frames` of spectrograms, `shape` and `classes` of waveforms, `vocabulary` and `end` of text. A constructor
gets those that its parameters name."""
Networks = dict[str, nn.Module]


def arguments(kind: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are parameters of `kind`, in its order."""
    return {name: values[name] for name in inspect.signature(kind).parameters if name in values}


def by_name(kind: Callable[..., nn.Module], values: Mapping[str, Any]) -> nn.Module:
    return kind(**arguments(kind, values))


def channels_last(kind: Callable[..., nn.Module]) -> Callable[[Values], nn.Module]:
    """A `build` whose weights are laid out as most convolutions are fastest; not those of kernel 5 and few channels."""
    return lambda values: by_name(kind, values).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Graph:
    """What ONNX export traces of a plain twin.

    inputs: name -> axes, in words: "batch" may have any size, "tokens" and "<name>_tokens" any up to the block, others
    are a setting's; inputs with an axis of a setting's size are floats, others ids.
    method: what is traced. A recurrent network's is one step, since a loop over tokens would have a fixed length.
    """

    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    method: str = "forward"


@dataclass(frozen=True)
class Bench:
    """A training step that is measured beside the same in plain PyTorch.

    name: of the system, in records.
    batch: samples a step.
    shape: (C, H, W) of an image, (mels, frames) of a spectrogram, (samples,) of a waveform,
        (tokens,) of a text.
    settings: over the recipe's own. Dropout, clipping and decay, which the plain loop does not have, are off.
    tolerance: of the losses, relative: noise, dropout and a narrow type differ.
    gpu: a CPU takes too long for it.
    """

    name: str
    batch: int
    shape: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int = 512
    tolerance: float = 5e-3
    gpu: bool = False


class Pretrained(Protocol):
    """A module that reads another library's folder of weights, settings and tokenizer."""

    TYPES: tuple[str, ...]  # model_type in config.json, of the folders that it reads

    def tokenizer(self, folder: Path) -> Any:
        """The folder's tokenizer, of as many ids as the model has."""

    def found(self, path: Path) -> Path | None:
        """The folder that a path names; None if it names something else."""

    def sized(self, folder: Path, settings: Any) -> Any:
        """A run's settings with the sizes of the folder's model."""

    def load(self, folder: Path, model: Any) -> str:
        """Put the weights into a model of these sizes; returns what was done, in a line."""

    def opened(self, folder: Path, settings: type[Any]) -> tuple[Any, nn.Module]:
        """(settings, model) of the folder."""

    def written(self, model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(settings, tensors) of a model as such a folder has them; UsageError: the library has no such model."""


@dataclass(frozen=True)
class Recipe:
    """A kind of model and its settings.

    command: its name, summary, settings and examples on the command line.
    model: the class of what is trained: see `contract` and `protocol` for what it may offer.
    plain: its twin in plain PyTorch, with the same keys and `loss(*batch)`: what `export` writes and the bench measures
        beside. Of networks in turns: values -> the class of each by name, the one that is exported first.
    build: values -> model. None: `model` with the values that it has parameters for.
    derived: values -> more of them.
    labelled: it needs labels.
    labels_if_any: it takes them where there are some.
    codes_of: the recipe whose codes it learns: setting `codes` names the run, and its model is loaded into `vq`.
    square: its images must be square.
    pairs: of a recipe that translates, images of one number or file name in both sets belong together.
    feed: how text comes: windows, streams, sequences or pairs; "" for images and sounds.
    network: model -> the network that draws: the twin's.
    loop: (plain networks, values, device) -> a function of a batch that takes a plain training step.
    summed: the plain loss is a sum over the batch, where ours is a mean.
    draws: an exported script draws samples, if the model has them; False: it reconstructs pictures.
    graph: None: of waveforms, the logits of codes; of images, what draws them, or what reconstructs them if nothing
        does.
    unrolled: torch.compile takes many minutes, as it unrolls the loop over tokens.
    pretrained: reads other libraries' files of such a model; None: there is nothing of the kind.
    """

    command: Command
    model: type[nn.Module]
    plain: type[nn.Module] | Callable[[Values], dict[str, type[nn.Module]]]
    build: Callable[[Values], nn.Module] | None = None
    derived: Callable[[Values], Values] = lambda values: {}
    labelled: bool = False
    labels_if_any: bool = False
    codes_of: str = ""
    square: bool = True
    pairs: bool = False
    feed: str = ""
    network: Callable[[nn.Module], nn.Module] = lambda model: model
    loop: Callable[[Networks, Values, str], Callable[..., Any]] = lambda networks, values, device: loss_step(
        networks[""], device, values["lr"]
    )
    summed: bool = False
    draws: bool = True
    graph: Graph | None = None
    unrolled: bool = False
    pretrained: Pretrained | None = None
    benches: tuple[Bench, ...] = ()

    @property
    def takes_labels(self) -> bool:
        return self.labelled or self.labels_if_any

    @property
    def translates(self) -> bool:
        """A batch is images of two sets."""
        return issubclass(self.config, TranslationConfig)

    @property
    def sounds(self) -> bool:
        """A batch is log-mel spectrograms of sounds."""
        return issubclass(self.config, AudioConfig)

    @property
    def waves(self) -> bool:
        """A batch is mu-law codes of sounds."""
        return issubclass(self.config, WaveformConfig)

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def config(self) -> type[Config]:
        return self.command.config

    def values(self, settings: Config, *of_data: Any) -> Values:
        """Settings and what the data adds: (shape, classes) of images and sounds, (vocabulary, end) of text."""
        values = {f.name: getattr(settings, f.name) for f in fields(settings)}
        if self.feed:
            values |= dict(zip(("vocabulary", "end"), of_data, strict=True))
        elif self.sounds:
            (mels, frames), _ = of_data
            values |= {"shape": (mels, frames), "mels": mels, "frames": frames}
        elif self.waves:
            shape, classes = of_data
            values |= {"shape": shape, "classes": classes}
        else:
            shape, classes = of_data
            if self.square and shape[1] != shape[2]:
                raise UsageError(f"expected square images, got {shape[1]} x {shape[2]}; remedy: --size PIXELS")
            values |= {"shape": shape, "channels": shape[0], "size": shape[1], "input_size": math.prod(shape)}
            values["classes"] = classes if self.takes_labels else 0
        return values | self.derived(values)

    def make(self, settings: Config, *of_data: Any) -> nn.Module:
        """The model for such data, as `values` takes it.

        Raises UsageError, ValueError: the settings and the data do not go together.
        """
        values = self.values(settings, *of_data)
        return by_name(self.model, values) if self.build is None else self.build(values)

    def twins(self, values: Values) -> dict[str, tuple[type[nn.Module], dict[str, Any]]]:
        """The plain class of each network, and its arguments; the first draws."""
        kinds = {"": self.plain} if isinstance(self.plain, type) else self.plain(values)
        return {name: (kind, arguments(kind, values)) for name, kind in kinds.items()}
