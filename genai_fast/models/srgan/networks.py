"""The network that enlarges images, and the critic of large ones."""

from typing import ClassVar

import torch
from torch import nn

from genai_fast.models.common import checks
from genai_fast.models.common.networks import ImageNetwork, fused
from genai_fast.models.srgan import plain

_LITTLE = 0.01  # what the last weights are multiplied by where their result is added to an image


class _Block(ImageNetwork):
    """x + main(x): the layers of a plain block, fused."""

    def __init__(self, block: plain.PlainSRBlock) -> None:
        super().__init__()
        self.main = fused(block.main)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.main(x)


class Enlarger(nn.Module):
    """Image [B, channels, H, W] in [-1, 1] -> [B, channels, scale H, scale W], of any size; values may exceed [-1, 1].

    Conv k9, `blocks` residual blocks with batch norm and PReLU, a skip around all of them, a convolution and a pixel
    shuffle for each doubling, Conv k9. Its keys do not depend on `residual`.

    Args:
        scale: 2 or 4.
        channels: of the images.
        width: channels of the feature maps.
        blocks: residual blocks.
        residual: what the layers make is added to the bicubically enlarged image, and is little at first: training then
            begins near bicubic interpolation rather than far below it. The authors' network has no such path.

    Raises: ValueError on another scale, a size below 1, and images of other channels.
    Source: Ledig et al. 2017, arXiv:1609.04802; pixel shuffle: Shi et al. 2016, arXiv:1609.05158.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, *, scale: int = 4, channels: int = 3, width: int = 64, blocks: int = 16, residual: bool = True
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        checks.positive(owner, channels=channels, width=width, blocks=blocks)
        if scale not in (2, 4):
            raise ValueError(f"{owner}: scale: expected 2 or 4, got {scale}")
        layers = plain.PlainEnlarger(scale, channels, width, blocks)
        if residual:
            with torch.no_grad():
                layers.last[-1].weight.mul_(_LITTLE)
                layers.last[-1].bias.zero_()
        self.scale, self.channels, self.residual = scale, channels, residual
        self.reach = 2 * blocks + 10  # 4 of the first kernel, 1 of each other, less of those on what is enlarged
        self.first, self.last = fused(layers.first), fused(layers.last)
        inner = (_Block(m) if isinstance(m, plain.PlainSRBlock) else m for m in layers.blocks)
        self.blocks = fused(nn.Sequential(*inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.size(1) != self.channels:
            raise ValueError(
                f"{type(self).__name__}: expected images [B, {self.channels}, H, W], got {tuple(x.shape)}; convert them"
            )
        h = self.first(x)
        y = self.last(h + self.blocks(h))
        return y + plain.enlarged(x, self.scale) if self.residual else y

    @torch.no_grad()
    def upscale(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, channels, H, W] in [-1, 1] -> enlarged ones, by running statistics."""
        training = self.training
        self.eval()
        try:
            return self(x)
        finally:
            self.train(training)


class SRCritic(nn.Module):
    """Image [B, channels, size, size] in [-1, 1] -> logits [B] of being an original.

    Eight convolutions k3, every second of stride 2, with batch norm (not the first) and LeakyReLU(0.2), two dense
    layers.

    Args:
        size: side of the images.
        channels: of the images.
        width: channels of the first feature map; the last has 8 times as many.

    Raises: ValueError on a size below 1, and on images of another shape.
    Source: Ledig et al. 2017, arXiv:1609.04802.
    """

    signed: ClassVar[bool] = True

    def __init__(self, size: int = 96, *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        checks.positive("SRCritic", size=size, channels=channels, width=width)
        self.shape = (channels, size, size)
        self.main = fused(plain.PlainSRCritic(size, channels, width).main)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        checks.images("SRCritic", x, self.shape)
        return self.main(x).squeeze(1)
