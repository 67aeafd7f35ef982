"""WaveNet on the fused causal convolution."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from genai_fast import ops
from genai_fast.models.common import checks
from genai_fast.models.common import labels as class_labels
from genai_fast.models.wavenet.plain import PlainWaveNet, PlainWaveNetLayer


class WaveNetLosses(NamedTuple):
    loss: torch.Tensor  # nats a sample, 0-d float32


class WaveNet(PlainWaveNet):
    """A sound's mu-law codes, each from those before it; keys embedding.*, layers.*, head.*.

    The distribution of a code is a softmax over all levels. Each layer is `ops.causal_conv1d` with its gate and, of a
    conditional model, its class; everything between the layers is [B, T, C] in memory.

    Args:
        width: channels of the residual path.
        skip: channels of the skip connections.
        layers: of a cycle, of dilations 1, 2, 4, ..
        cycles: how often the dilations start again.
        kernel: taps of each convolution.
        classes: number of labels that condition it; 0: none.
        levels: of a sample (`data.audio.mu_law_encode`).

    Raises: ValueError on sizes that do not fit.
    Source: van den Oord et al. 2016, arXiv:1609.03499.
    """

    signed: ClassVar[bool] = True  # samples are in [-1, 1]

    def __init__(
        self, width: int = 64, skip: int = 128, layers: int = 10, cycles: int = 2, kernel: int = 2, classes: int = 0,
        levels: int = 256,
    ) -> None:  # fmt: skip
        checks.positive("WaveNet", width=width, skip=skip, layers=layers, cycles=cycles, kernel=kernel, levels=levels)
        if classes < 0:
            raise ValueError(f"WaveNet: classes: expected at least 0, got {classes}")
        super().__init__(width, skip, layers, cycles, kernel, classes, levels)
        self.classes, self.levels = classes, levels

    @property
    def reach(self) -> int:
        """Codes that the distribution of the next one depends on."""
        return 1 + sum(layer.before for layer in self.layers)

    def forward(self, codes: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Codes [B, T] [and labels [B]] -> logits of the code after each, [B, T, levels]."""
        checks.token_ids("WaveNet", "codes", codes, self.levels)
        self.check_labels(labels, len(codes))
        x = self.embedding(codes)
        last = self.layers[-1]
        skips = None
        for layer in self.layers:
            h = _gated(layer, x, labels)
            skip = F.linear(h, layer.skip.weight.squeeze(2))
            skips = skip if skips is None else skips + skip
            if layer is not last:
                x = x + F.linear(h, layer.residual.weight.squeeze(2), layer.residual.bias)
        hidden = F.linear(torch.relu(skips), self.head[1].weight.squeeze(2), self.head[1].bias)
        return F.linear(torch.relu(hidden), self.head[3].weight.squeeze(2), self.head[3].bias)

    def training_step(
        self, codes: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor | None = None
    ) -> WaveNetLosses:
        """Codes and those that follow them, [B, T] each; a target of -100 does not count."""
        logits = self(codes, labels)
        return WaveNetLosses(ops.cross_entropy(logits.flatten(0, 1), targets.flatten()))

    def draw_codes(
        self, count: int, steps: int, labels: torch.Tensor | None = None, *, temperature: float = 1.0,
        seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`count` sounds of `steps` codes, [count, steps] int64 on the model's device; silence comes before them.

        Args:
            labels: [count] of a conditional model; None: each class in turn.
            seed: gives the same uniform numbers on every device; None draws from torch's default generator.
        """
        from genai_fast.models.wavenet.decoding import WaveNetDecoder

        if self.classes and labels is None:
            labels = torch.arange(count) % self.classes
        return WaveNetDecoder(self, count, labels).draw(steps, temperature=temperature, seed=seed)

    def check_labels(self, labels: torch.Tensor | None, count: int) -> None:
        """Raises ValueError: there are labels and no classes, or the other way round, or they are not [count]."""
        if (labels is None) != (self.classes == 0):
            got = "none" if labels is None else "some"
            raise ValueError(f"WaveNet: labels: expected {'some' if self.classes else 'none'}, got {got}")
        if labels is not None:
            class_labels.check("WaveNet", labels, count, self.classes)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, classes={self.classes}, reach={self.reach}"


def _gated(layer: PlainWaveNetLayer, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """tanh(a) sigmoid(b) of a layer's convolution of x [B, T, C]."""
    condition = None if layer.condition is None else layer.condition(labels)
    conv = layer.conv
    return ops.causal_conv1d(
        x.mT, conv.weight, conv.bias, condition, dilation=conv.dilation[0], activation="gated_tanh"
    ).mT
