"""Blocks and models as people write them, before and after `fuse`: training (forward and backward) and evaluation.

Both sides have the same memory layout: a change of layout is not counted as a kernel's gain.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from bench import memory
from bench.points import DEVICE, QUICK, ROUNDS
from bench.variants import COMPILED, FUSED, ratios, ready, spreads, walls, warm
from genai_fast import fuse
from genai_fast.models.common.plain_conv import conv_block
from genai_fast.models.gan.plain import PlainDCGANDiscriminator, PlainDCGANGenerator
from genai_fast.profiling import ForeignLoad, compare

EAGER = "eager"
SECONDS = 2.0
TOLERANCE = 2e-3  # of outputs in max-norm and of gradients in 2-norm: rounding, through some ten layers


def _discriminator(dropout: float = 0.0) -> nn.Module:
    """DCGAN's up to the logits, with dropout after each norm's activation."""
    layers: list[nn.Module] = []
    for layer in PlainDCGANDiscriminator().main[:-1]:
        layers.append(layer)
        if dropout and isinstance(layer, nn.LeakyReLU) and len(layers) > 2:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def _dense() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 12544, bias=False), nn.BatchNorm1d(12544), nn.LeakyReLU())


class _CharRNN(nn.Module):
    """The recurrent layers of a character model, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(256, 256, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x)[0]


def _diffusion(channels: int = 256) -> nn.Module:
    """Half a residual block of a diffusion model's U-Net."""
    return nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))


def _cyclegan(channels: int = 128) -> nn.Module:
    """Half a residual block of CycleGAN's generator."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.InstanceNorm2d(channels), nn.ReLU())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dcgan_64_generator_block": (lambda: PlainDCGANGenerator().main[9:12], (64, 128, 16, 16)),
    "dcgan_64_discriminator_block": (lambda: _discriminator()[2:5], (64, 64, 32, 32)),
    "conv_vae_64_first_block": (lambda: conv_block(nn.Conv2d(3, 32, 3, 2, 1)), (64, 3, 64, 64)),
    "conv_vae_64_last_block": (lambda: conv_block(nn.ConvTranspose2d(32, 32, 3, 2, 1, 1)), (64, 32, 32, 32)),
    "dense_to_image_first_block": (_dense, (128, 100)),
    "diffusion_block": (_diffusion, (8, 256, 32, 32)),
    "cyclegan_block": (_cyclegan, (4, 128, 64, 64)),
    "char_rnn_gru": (_CharRNN, (128, 32, 256)),
    "dcgan_64_generator": (lambda: PlainDCGANGenerator().main, (32, 100, 1, 1)),
    "dcgan_64_discriminator": (_discriminator, (32, 3, 64, 64)),
    "dcgan_64_discriminator_dropout": (functools.partial(_discriminator, 0.3), (32, 3, 64, 64)),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Subject:
    """A model, in training or evaluation, in one memory layout."""

    model: str
    training: bool
    layout: str

    def __str__(self) -> str:
        return f"{self.model}-{'training' if self.training else 'evaluation'}-{self.layout}"

    @property
    def op(self) -> str:
        return f"fuse, {'training' if self.training else 'evaluation'}"

    @property
    def case(self) -> str:
        return f"{self.model}-{self.layout}"

    @property
    def variants(self) -> tuple[str, ...]:
        """Whole models are not compiled: it takes a minute each, and the blocks say what it gives."""
        return (EAGER, COMPILED, FUSED) if self.model.endswith("block") else (EAGER, FUSED)

    def _model(self, variant: str, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        model = MODELS[self.model][0]().train(self.training).to(DEVICE, dtype)
        if self.layout != "contiguous":
            model = model.to(memory_format=LAYOUTS[self.layout])
        if variant == COMPILED:
            torch.compiler.reset()
            return torch.compile(model, dynamic=False)
        return fuse(model) if variant == FUSED else model

    def _input(self, dtype: torch.dtype) -> torch.Tensor:
        x = torch.randn(MODELS[self.model][1], generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        x = x.contiguous(memory_format=LAYOUTS[self.layout]) if x.dim() == 4 else x
        return x.requires_grad_(self.training)

    def step(self, variant: str, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Outputs, and in training the gradients of the input and all parameters too."""
        model, x = self._model(variant, dtype), self._input(dtype)
        leaves = [x, *model.parameters()]
        if not self.training:
            return torch.no_grad()(lambda: (model(x),))
        upstream = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

        def forward_backward() -> tuple[torch.Tensor, ...]:
            y = model(x)
            return (y, *torch.autograd.grad(y, leaves, upstream))

        return forward_backward


SUBJECTS = tuple(
    Subject(name, training, layout)
    for name, (_, shape) in MODELS.items()
    for training in (True, False)
    for layout in (LAYOUTS if len(shape) == 4 else ("contiguous",))
    if training or "dropout" not in name  # in evaluation dropout does nothing
)


@functools.cache
def red(subject: Subject) -> str:
    """What the fused model does not share with the plain one in float64; "" if they compute the same.

    In float32 PyTorch's own channels-last statistics are off by 2e-6 here, enough to flip gradients at the kink.
    """
    if "dropout" in subject.model:  # each draws its own mask; the layer's tests compare with equal ones
        subject = Subject(subject.model.removesuffix("_dropout"), subject.training, subject.layout)
    results = zip(subject.step(FUSED)(), subject.step(EAGER, torch.float64)(), strict=True)
    largest = 0.0
    for k, (found, expected) in enumerate(results):
        norm = float("inf") if k == 0 else 2
        size = torch.linalg.vector_norm(expected, norm).item()
        largest = max(largest, size)
        error = torch.linalg.vector_norm(found.double() - expected, norm).item()
        if not error <= TOLERANCE * max(size, 1e-2 * largest):
            return f"{subject}: result {k}: error {error:g} beside {size:g}"
    return ""


def figures(subject: Any, seconds: float = SECONDS, *, rounds: int = ROUNDS, compiled: bool = True) -> dict[str, Any]:
    """Median wall time of each of the subject's variants, interleaved, and the bytes that it holds at most."""
    load = ForeignLoad()
    makers = {v: lambda v=v: warm(subject.step(v)) for v in subject.variants if compiled or v != COMPILED}
    steps, skipped = ready(makers, (COMPILED,))
    clocked = compare(steps, rounds=rounds, seconds=seconds)
    wall = {name: t.median for name, t in clocked.timings.items()}
    variants = walls(wall)
    for name, step in steps.items():
        variants[name]["peak_bytes"] = memory.peak_bytes(step, DEVICE)
    head = {"op": subject.op, "case": subject.case, "dtype": "float32", "device": DEVICE}
    measured = {"ratio": ratios(wall), "spread": spreads(clocked), "foreign_load": load.cores()}
    return {**head, "variants": variants | skipped, **measured}


_QUICK = [f"{name}-training-contiguous" for name in ("conv_vae_64_first_block", "cyclegan_block")]


@pytest.mark.parametrize(
    "subject", [pytest.param(s, id=str(s), marks=[pytest.mark.quick] * (str(s) in _QUICK)) for s in SUBJECTS]
)
@pytest.mark.benchmark(max_time=0.5)
def test_layers(benchmark, measured, quick, subject):
    clock = functools.partial(figures, subject, **(QUICK if quick else {}))
    measured(benchmark, "figures", str(subject), lambda: red(subject), lambda: [clock()])
    step = subject.step(FUSED)
    benchmark(step if DEVICE == "cpu" else lambda: (step(), torch.cuda.synchronize()))
