"""WaveNet in plain PyTorch: dilated causal convolutions with gates over a sound's mu-law codes."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn


class PlainWaveNetLayer(nn.Module):
    """h = tanh(a) sigmoid(b), (a, b) = a dilated causal convolution of x [B, C, T] [+ the class's condition].

    Gives what goes to the skips, and x + a projection of h; the last layer gives no x.
    """

    def __init__(self, width: int, skip: int, kernel: int, dilation: int, classes: int, last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, 2 * width, kernel, dilation=dilation)
        self.condition = nn.Embedding(classes, 2 * width) if classes else None
        self.skip = nn.Conv1d(width, skip, 1, bias=False)
        self.residual = None if last else nn.Conv1d(width, width, 1)
        self.before = (kernel - 1) * dilation

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        z = self.conv(F.pad(x, (self.before, 0)))
        if self.condition is not None:
            z = z + self.condition(labels)[:, :, None]
        a, b = z.chunk(2, 1)
        h = torch.tanh(a) * torch.sigmoid(b)
        return self.skip(h), None if self.residual is None else x + self.residual(h)


class PlainWaveNet(nn.Module):
    """Codes [B, T], int64 in [0, levels), [and labels [B]] -> logits of the code after each, [B, T, levels].

    Each cycle has `layers` layers with dilations 1, 2, 4, ..; the sum of their skips goes through two layers with ReLU.
    """

    def __init__(
        self, width: int = 64, skip: int = 128, layers: int = 10, cycles: int = 2, kernel: int = 2, classes: int = 0,
        levels: int = 256,
    ) -> None:  # fmt: skip
        super().__init__()
        dilations = [1 << k for k in range(layers)] * cycles
        self.embedding = nn.Embedding(levels, width)
        self.layers = nn.ModuleList(
            PlainWaveNetLayer(width, skip, kernel, d, classes, k + 1 == len(dilations)) for k, d in enumerate(dilations)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, skip, 1), nn.ReLU(), nn.Conv1d(skip, levels, 1))

    def forward(self, codes: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x, skips = self.embedding(codes).mT, 0.0
        for layer in self.layers:
            skip, x = layer(x, labels)
            skips = skips + skip
        return self.head(skips).mT

    def loss(self, codes: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Nats a sample; targets below 0 do not count."""
        return F.cross_entropy(self(codes, labels).flatten(0, 1), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(
        self, count: int, steps: int, labels: torch.Tensor | None = None, temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:  # fmt: skip
        """`steps` times the next code of each of `count` sounds, [count]; silence comes before them.

        Each step computes again all that its code depends on.
        """
        reach = 1 + sum(layer.before for layer in self.layers)
        codes = torch.full((count, 1), self.embedding.num_embeddings // 2)
        for _ in range(steps):
            logits = self(codes[:, -reach:], labels)[:, -1]
            if temperature == 0:
                drawn = logits.argmax(1, keepdim=True)
            else:
                drawn = (logits / temperature).softmax(1).multinomial(1, generator=generator)
            codes = torch.cat([codes, drawn], 1)
            yield drawn[:, 0]
