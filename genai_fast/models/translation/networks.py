"""Generators that turn one picture into another, and the critic that judges patches."""

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.fusion.run import run
from genai_fast.layers import FusedSequential, InstanceNormAct
from genai_fast.models.common import checks
from genai_fast.models.common.networks import fused
from genai_fast.models.translation import plain


def initialized(network: nn.Module) -> nn.Module:
    """Initialise as the authors do, in place: convolutions N(0, 0.02), norms' weights N(1, 0.02), biases 0."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.InstanceNorm2d, InstanceNormAct)) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
    return network


def _joined(layers: Iterable[nn.Module]) -> nn.Sequential:
    """The layers in a row, where each instance norm has the activation after it, and keeps the memory format.

    PyTorch's makes its result contiguous: between convolutions in channels_last all would be copied twice.
    """
    made: list[nn.Module] = []
    for layer in layers:
        before = made[-1] if made else None
        if isinstance(before, nn.InstanceNorm2d):
            name = "leaky_relu" if isinstance(layer, nn.LeakyReLU) else "relu"
            slope = getattr(layer, "negative_slope", None)
            made[-1] = InstanceNormAct(
                before.num_features, before.eps, before.affine, activation=name, negative_slope=slope
            )
            layer = nn.Identity()  # keeps the place of the activation, and with it the keys
        made.append(layer)
    return FusedSequential(*made)


class ResidualBlock(nn.Module):
    """x [B, width, H, W] -> x + norm(conv(relu(norm(conv(x))))): 3 x 3 convolutions with reflected borders.

    The second instance norm adds x in its own pass. The keys are `conv_block.1.*` and `conv_block.5.*`.

    Args:
        block: the same in plain PyTorch, whose convolutions are taken.
    """

    def __init__(self, block: plain.PlainResidualBlock) -> None:
        super().__init__()
        pad, first, _, _, pad_again, second, _ = block.conv_block
        norms = InstanceNormAct(first.out_channels, activation="relu"), InstanceNormAct(second.out_channels)
        # The activation is in the norm; Identity keeps the place of the authors' ReLU, and with it the keys.
        self.conv_block = nn.Sequential(pad, first, norms[0], nn.Identity(), pad_again, second, norms[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *layers, norm = self.conv_block
        return norm(run(layers, x), x)


class ResNetGenerator(nn.Module):
    """Image [B, channels, H, W] in [-1, 1] -> image of that shape; H and W are multiples of 4, at least 8.

    Conv k7, two of k3 s2, `blocks` residual blocks at a quarter of the side, two transposed ones back, Conv k7, tanh;
    instance norm and ReLU between, reflected borders. The keys are those of the authors' PyTorch code, such as
    `model.1.weight`, and its CycleGAN checkpoints load.

    Args:
        channels: of the images.
        width: channels of the first feature map.
        blocks: residual blocks; the authors take 6 for 128 pixels and 9 for 256.

    Raises: ValueError on a size below 1, and on images of other channels or sides.
    Source: Zhu et al. 2017, arXiv:1703.10593; Johnson, Alahi & Fei-Fei 2016, arXiv:1603.08155.
    """

    signed: ClassVar[bool] = True

    def __init__(self, channels: int = 3, *, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        checks.positive("ResNetGenerator", channels=channels, width=width, blocks=blocks)
        self.channels = channels
        layers = plain.PlainResNetGenerator(channels, width, blocks).model
        self.model = _joined(ResidualBlock(m) if isinstance(m, plain.PlainResidualBlock) else m for m in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.size(1) != self.channels or any(side < 8 or side % 4 for side in x.shape[2:]):
            raise ValueError(
                f"ResNetGenerator: expected images [B, {self.channels}, H, W], H and W multiples of 4 and at least 8,"
                f" got {tuple(x.shape)}; resize them"
            )
        return self.model(x)


class UNetGenerator(nn.Module):
    """Image [B, channels, size, size] in [-1, 1] -> image of that shape, by way of few pixels and of skips.

    Conv k4 s2 while the side is even, 8 times at most, transposed ones back; what each half way made is joined to what
    comes back. Instance norm with a weight, which is the authors' batch norm for a batch of one image, but makes no
    image depend on others; LeakyReLU(0.2) on the way down, ReLU and dropout on the way up, tanh.

    Args:
        size: side of the images, a multiple of 4; a power of two is halved to one pixel.
        channels: of the images.
        width: channels of the first feature map; each one below has twice as many, at most 8 times as many.
        dropout: probability, in the authors' places: three layers of 256 pixels, two of 128, one of 64.

    Raises: ValueError on a size below 1 or no multiple of 4, and on images of another shape.
    Source: Isola et al. 2017, arXiv:1611.07004; Ronneberger, Fischer & Brox 2015, arXiv:1505.04597.
    """

    signed: ClassVar[bool] = True

    def __init__(self, size: int = 256, *, channels: int = 3, width: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        checks.positive("UNetGenerator", size=size, channels=channels, width=width)
        if size % 4:
            raise ValueError(f"UNetGenerator: size: expected a multiple of 4, got {size}; resize the images")
        self.shape = (channels, size, size)
        layers = plain.PlainUNetGenerator(size, channels, width, dropout)
        self.down = nn.ModuleList(map(fused, layers.down))
        self.up = nn.ModuleList(map(fused, layers.up))
        self.last = fused(layers.last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        checks.images("UNetGenerator", x, self.shape)
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        skips.pop()
        for layer in self.up:
            x = torch.cat([F.relu(skips.pop()), layer(x)], 1)
        return self.last(x)


class PatchCritic(nn.Module):
    """Image [B, channels, H, W] -> what it judges each patch to be, [B, 1, h, w], without a sigmoid (PatchGAN).

    Conv k4 s2 `critic_layers` times and twice s1, with instance norm (not in the first and last) and LeakyReLU(0.2). Of
    3 layers a patch has 70 x 70 pixels, of 2 34, of 1 16. The keys are those of the authors' PyTorch code.

    Args:
        channels: of the images.
        width: channels of the first feature map; each one after has twice as many, at most 8 times as many.
        critic_layers: convolutions of stride 2.
        affine: whether norms have weights and biases.

    Raises: ValueError on a size below 1, and on images smaller than 3 * 2**critic_layers pixels.
    Source: Isola et al. 2017, arXiv:1611.07004.
    """

    signed: ClassVar[bool] = True

    def __init__(self, channels: int = 3, *, width: int = 64, critic_layers: int = 3, affine: bool = False) -> None:
        super().__init__()
        checks.positive("PatchCritic", channels=channels, width=width, critic_layers=critic_layers)
        self.channels, self.least = channels, least_side(critic_layers)
        self.model = _joined(plain.PlainPatchCritic(channels, width, critic_layers, affine).model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.size(1) != self.channels or min(x.shape[2:]) < self.least:
            raise ValueError(
                f"PatchCritic: expected images [B, {self.channels}, H, W] of at least {self.least} pixels a side, got"
                f" {tuple(x.shape)}; resize them, or fewer critic_layers"
            )
        return self.model(x)


def least_side(critic_layers: int) -> int:
    """Pixels of the smallest image that a critic judges: its last norm has 2 x 2 positions."""
    return 3 << critic_layers
