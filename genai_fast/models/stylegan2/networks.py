"""StyleGAN2's generator and discriminator: the layers of `plain.py`, computed by the fused ops."""

import math
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.layers.modulated import convolved, demodulation
from genai_fast.models.common import checks
from genai_fast.models.stylegan2 import plain
from genai_fast.ops import rows

Network = TypeVar("Network", bound=nn.Module)

_GAIN = math.sqrt(2)  # of leaky ReLU, which is positively homogeneous: its argument may be multiplied instead


class _EqualLinear(plain.PlainEqualLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = _GAIN if self.act else 1.0
        y = F.linear(x * (self.scale * gain), self.weight)  # less to scale than the weight
        return ops.bias_act(y, self.bias * (self.rate * gain), "leaky_relu" if self.act else "none")


class _StyledConv(plain.PlainStyledConv):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        conv, style = self.conv, self.style(w) * self.conv.scale
        y = convolved(x, conv.weight, style, conv.filter if conv.up else None)
        factor = demodulation(conv.weight, style) * _GAIN
        noise, place = self.noise, {"device": y.device, "dtype": torch.float32}
        if self.training:
            noise = rows.drawn(lambda n: torch.randn(n, 1, *y.shape[2:], **place), len(y))
        noise = noise * (self.strength * _GAIN)
        y = torch.addcmul(noise.to(y.dtype), y, factor[:, :, None, None].to(y.dtype))
        return ops.bias_act(y, self.bias * _GAIN)


class _ToImage(plain.PlainToImage):
    def forward(self, x: torch.Tensor, w: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        y = convolved(x, self.conv.weight, self.style(w) * self.conv.scale)
        y = y + self.bias[:, None, None].to(y.dtype)
        return y if image is None else y + ops.upfirdn2d(image, self.conv.filter, 2, padding=(2, 1, 2, 1), gain=4.0)


class _EqualConv(plain.PlainEqualConv):
    gain: float = 1.0  # of the result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.weight.size(-1)
        gain, padding, stride = self.gain * (_GAIN if self.act else 1.0), kernel // 2, 1
        if self.down and kernel == 1:
            x = ops.upfirdn2d(x, self.filter, 1, 2, padding=1)
        elif self.down:
            x, padding, stride = ops.upfirdn2d(x, self.filter, padding=2), 0, 2
        y = F.conv2d(x, self.weight * (self.scale * gain), stride=stride, padding=padding)
        return ops.bias_act(y, self.bias * gain) if self.act else y


class _Block(plain.PlainStyleBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.second.gain = self.skip.gain = math.sqrt(0.5)  # before the sum rather than after it
        return self.second(self.first(x)) + self.skip(x)


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    plain.PlainEqualLinear: _EqualLinear,
    plain.PlainStyledConv: _StyledConv,
    plain.PlainToImage: _ToImage,
    plain.PlainEqualConv: _EqualConv,
    plain.PlainStyleBlock: _Block,
}


def _ours(network: Network) -> Network:
    """The same modules with the forward of their subclasses here."""
    for module in network.modules():
        module.__class__ = _OURS.get(type(module), type(module))
    return network


class StyleGenerator(plain.PlainStyleGenerator):
    """z [B, latent] -> image [B, channels, size, size], about in [-1, 1], by way of a style w [B, latent].

    Each convolution is modulated by w and adds noise, drawn at each call in training, fixed in evaluation; each size
    adds to the doubled image of the last. `forward(z, truncation)` moves w towards its mean: less variety, fewer
    failures.

    Args:
        size: 28, or 8 or more and a power of 2; other multiples of 2 begin with a larger map.
        latent: length of z and of w.
        width: channels of the largest feature maps; half the side has twice as many, up to 512.
        channels: of the image.
        layers: dense layers from z to w.

    Raises: ValueError on sizes below 1, and on a size that is odd or makes the first map larger than 15 pixels.
    Source: Karras et al. 2020, arXiv:1912.04958.
    """

    signed: ClassVar[bool] = True

    def __init__(
        self, size: int = 64, *, latent: int = 512, width: int = 32, channels: int = 3, layers: int = 8
    ) -> None:
        _check("StyleGenerator", size, latent=latent, width=width, channels=channels, layers=layers)
        super().__init__(size, latent, width, channels, layers)
        _ours(self)


class StyleDiscriminator(plain.PlainStyleDiscriminator):
    """Image [B, channels, size, size] in [-1, 1] -> logits [B]: residual blocks and minibatch standard deviation.

    The score of an image depends a little on the others of its group, of up to 4 images.

    Args:
        size, width, channels: as of `StyleGenerator`.

    Raises: ValueError as `StyleGenerator`, and on images of another shape.
    Source: Karras et al. 2020, arXiv:1912.04958; standard deviation: Karras et al. 2018, arXiv:1710.10196.
    """

    signed: ClassVar[bool] = True

    def __init__(self, size: int = 64, *, width: int = 32, channels: int = 3) -> None:
        _check("StyleDiscriminator", size, width=width, channels=channels)
        super().__init__(size, width, channels)
        self.shape = (channels, size, size)
        _ours(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        checks.images("StyleDiscriminator", x, self.shape)
        return super().forward(x)


def _check(owner: str, size: int, **values: int) -> None:
    checks.positive(owner, size=size, **values)
    if size < 8 or size % 2 or plain.first_side(size) > 15:
        raise ValueError(f"{owner}: size: expected 28, 32, 64 or another multiple of a power of 2, got {size}")
