"""StyleGAN2's generator and discriminator as their authors describe them, and the loop that trains them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def resampled(
    x: torch.Tensor, filter: torch.Tensor, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Zeros between pixels, padding before and after, a filter [K] in both directions, every down-th pixel."""
    b, c, h, w = x.shape
    x = F.pad(x.reshape(b, c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(b, c, h * up, w * up)
    x = F.pad(x, (*padding, *padding))
    weight = torch.outer(filter, filter).flip(0, 1) * up * up
    return F.conv2d(x, weight.to(x.dtype).expand(c, 1, *weight.shape), groups=c)[:, :, ::down, ::down]


def first_side(size: int) -> int:
    """Side of the smallest feature map: 4, or 7 for images of 28 pixels."""
    while size % 2 == 0 and size >= 8:
        size //= 2
    return size


def sides_of(size: int) -> list[int]:
    """Sides of the feature maps, the smallest first."""
    side = first_side(size)
    return [side << k for k in range((size // side).bit_length())]


def channels_at(side: int, size: int, width: int) -> int:
    return min(width * size // side, 512)


class PlainEqualLinear(nn.Module):
    """x [B, inputs] -> [B, outputs]; weights are N(0, 1) / rate and scaled at run time, which evens learning rates."""

    def __init__(self, inputs: int, outputs: int, rate: float = 1.0, start: float = 0.0, act: bool = False) -> None:
        super().__init__()
        self.rate, self.scale, self.act = rate, rate / math.sqrt(inputs), act
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), start / rate))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight * self.scale, self.bias * self.rate)
        return F.leaky_relu(y, 0.2) * math.sqrt(2) if self.act else y


class PlainMapping(nn.Module):
    """z [B, latent] -> w [B, latent]: z at length sqrt(latent), then dense layers at a hundredth of the learning rate.

    `average`: w's mean, by a moving average in training.
    """

    def __init__(self, latent: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(PlainEqualLinear(latent, latent, 0.01, act=True) for _ in range(layers)))
        self.register_buffer("average", torch.zeros(latent))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        w = self.layers(z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8))
        if self.training:
            with torch.no_grad():
                self.average.lerp_(w.mean(0).to(self.average.dtype), 0.005)
        return w


class PlainModulatedConv(nn.Module):
    """x [B, inputs, H, W], style [B, inputs] -> [B, outputs, H, W] or twice the size.

    Each sample's style scales the weight's input channels; then, if `demodulate`, output channels get length 1.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, up: bool = False, demodulate: bool = True) -> None:
        super().__init__()
        self.up, self.demodulate, self.scale = up, demodulate, 1 / math.sqrt(inputs * kernel * kernel)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.register_buffer("filter", torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8, persistent=False)

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        weight = self.weight * self.scale * style[:, None, :, None, None]
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, b * c, h, w)
        if self.up:
            y = F.conv_transpose2d(x, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=b)
            y = y.view(b, -1, *y.shape[2:])
            return resampled(y, self.filter, padding=(1, 1)) * 4
        y = F.conv2d(x, weight.flatten(0, 1), padding=weight.size(-1) // 2, groups=b)
        return y.view(b, -1, h, w)


class PlainStyledConv(nn.Module):
    """A modulated convolution, noise, bias, leaky ReLU. Noise is drawn in training, else an image of its own."""

    def __init__(self, inputs: int, outputs: int, latent: int, side: int, up: bool = False) -> None:
        super().__init__()
        self.style = PlainEqualLinear(latent, inputs, start=1.0)
        self.conv = PlainModulatedConv(inputs, outputs, 3, up)
        self.strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("noise", torch.randn(side, side))

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = self.conv(x, self.style(w))
        noise = torch.randn(len(y), 1, *y.shape[2:], device=y.device) if self.training else self.noise
        y = y + (noise * self.strength).to(y.dtype)
        return F.leaky_relu(y + self.bias[:, None, None].to(y.dtype), 0.2) * math.sqrt(2)


class PlainToImage(nn.Module):
    """Features [B, inputs, H, W], w -> image [B, channels, H, W], added to the doubled image of the last size."""

    def __init__(self, inputs: int, channels: int, latent: int) -> None:
        super().__init__()
        self.style = PlainEqualLinear(latent, inputs, start=1.0)
        self.conv = PlainModulatedConv(inputs, channels, 1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, w: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        y = self.conv(x, self.style(w))
        y = y + self.bias[:, None, None].to(y.dtype)
        return y if image is None else y + resampled(image, self.conv.filter, up=2, padding=(2, 1))


class PlainStyleGenerator(nn.Module):
    """z [B, latent] -> image [B, channels, size, size], about in [-1, 1].

    truncation: w moves towards its mean to this fraction of its distance.
    """

    def __init__(self, size: int = 64, latent: int = 512, width: int = 32, channels: int = 3, layers: int = 8) -> None:
        super().__init__()
        self.latent = latent
        self.mapping = PlainMapping(latent, layers)
        sides = sides_of(size)
        widths = [channels_at(side, size, width) for side in sides]
        self.constant = nn.Parameter(torch.randn(widths[0], sides[0], sides[0]))
        convs, images = [PlainStyledConv(widths[0], widths[0], latent, sides[0])], []
        for before, after, side in zip(widths, widths[1:], sides[1:]):  # noqa: B905
            convs += [
                PlainStyledConv(before, after, latent, side, up=True),
                PlainStyledConv(after, after, latent, side),
            ]
        for n in widths:
            images.append(PlainToImage(n, channels, latent))
        self.convs, self.images = nn.ModuleList(convs), nn.ModuleList(images)
        self.styles = len(convs) + 1  # of an image: each convolution's, and the last image's

    def synthesis(self, ws: torch.Tensor) -> torch.Tensor:
        """ws [B, styles, latent] -> image; an image's layer has the style of the convolution after it."""
        x = self.convs[0](self.constant.expand(len(ws), -1, -1, -1), ws[:, 0])
        image = self.images[0](x, ws[:, 1], None)
        for k in range(1, len(self.images)):
            x = self.convs[2 * k - 1](x, ws[:, 2 * k - 1])
            x = self.convs[2 * k](x, ws[:, 2 * k])
            image = self.images[k](x, ws[:, 2 * k + 1], image)
        return image

    def forward(self, z: torch.Tensor, truncation: float = 1.0) -> torch.Tensor:
        w = self.mapping(z.flatten(1))
        if truncation != 1.0:
            w = torch.lerp(self.mapping.average.to(w.dtype), w, truncation)
        return self.synthesis(w[:, None].expand(-1, self.styles, -1))


class PlainEqualConv(nn.Module):
    """A convolution with weights scaled at run time, after a filter and with stride 2 if `down`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, down: bool = False, act: bool = True) -> None:
        super().__init__()
        self.down, self.act, self.scale = down, act, 1 / math.sqrt(inputs * kernel * kernel)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if act else None
        self.register_buffer("filter", torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.weight.size(-1)
        weight, bias, padding = self.weight * self.scale, self.bias, kernel // 2
        if self.down and kernel == 1:
            x = resampled(x, self.filter, down=2, padding=(1, 1))
        elif self.down:
            x, padding = resampled(x, self.filter, padding=(2, 2)), 0
        y = F.conv2d(x, weight, bias, stride=2 if self.down and kernel > 1 else 1, padding=padding)
        return F.leaky_relu(y, 0.2) * math.sqrt(2) if self.act else y


class PlainStyleBlock(nn.Module):
    """x [B, inputs, H, W] -> [B, outputs, H / 2, W / 2]: two convolutions, and one around them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = PlainEqualConv(inputs, inputs, 3)
        self.second = PlainEqualConv(inputs, outputs, 3, down=True)
        self.skip = PlainEqualConv(inputs, outputs, 1, down=True, act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x)) + self.skip(x)) / math.sqrt(2)


def with_deviation(x: torch.Tensor, most: int = 4) -> torch.Tensor:
    """x [B, C, H, W] with one more channel: the standard deviation over groups of at most `most` samples, a mean."""
    b, c, h, w = x.shape
    group = max(g for g in range(1, most + 1) if b % g == 0) if b else 1
    y = x.reshape(group, -1, c, h, w).float()
    y = (y - y.mean(0)).square().mean(0)
    y = (y + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat([x, y.to(x.dtype).repeat(group)[:, None, None, None].expand(b, 1, h, w)], 1)


class PlainStyleDiscriminator(nn.Module):
    """Image [B, channels, size, size] -> logits [B]."""

    def __init__(self, size: int = 64, width: int = 32, channels: int = 3) -> None:
        super().__init__()
        sides = sides_of(size)
        widths = [channels_at(side, size, width) for side in sides[::-1]]
        blocks = [PlainStyleBlock(a, b) for a, b in itertools.pairwise(widths)]
        self.main = nn.Sequential(PlainEqualConv(channels, widths[0], 1), *blocks)
        self.last = PlainEqualConv(widths[-1] + 1, widths[-1], 3)
        dense = PlainEqualLinear(widths[-1] * sides[0] ** 2, widths[-1], act=True)
        self.head = nn.Sequential(nn.Flatten(), dense, PlainEqualLinear(widths[-1], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(with_deviation(self.main(x)))).squeeze(1)


def mixed(generator: nn.Module, count: int, mixing: float, device: torch.device) -> torch.Tensor:
    """ws [count, styles, latent] of two z each: with probability `mixing` the second's styles from some layer on."""
    z = torch.randn(count, 2, generator.latent, device=device)
    where = torch.rand(count, 2, device=device)
    w = generator.mapping(z.flatten(0, 1)).unflatten(0, (count, 2))
    cut = 1 + (where[:, 0] * (generator.styles - 1)).long()
    cut = torch.where(where[:, 1] < mixing, cut, generator.styles)
    early = torch.arange(generator.styles, device=device) < cut[:, None]
    return torch.where(early[:, :, None], w[:, :1], w[:, 1:])


def stylegan2_step(
    generator: nn.Module,
    discriminator: nn.Module,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.0, 0.99),
    gamma: float = 1.0,
    path: float = 2.0,
    mixing: float = 0.9,
    device: str = "cpu",
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """D with R1 every 16 steps, then G with path length regularisation every 8; Adam.

    Returns a function of images that takes one step and returns the losses of D and G without the regularisers.
    """
    generator, discriminator = generator.to(device), discriminator.to(device)
    adams = [torch.optim.Adam(n.parameters(), lr=lr, betas=betas) for n in (discriminator, generator)]
    count, mean = 0, torch.zeros((), device=device)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal count
        fake = generator.synthesis(mixed(generator, len(x), mixing, x.device))
        if r1 := count % 16 == 0:
            x = x.detach().requires_grad_()
        logits = discriminator(x)
        loss_d = F.softplus(-logits).mean() + F.softplus(discriminator(fake.detach())).mean()
        penalty = 0.0
        if r1:
            (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
            penalty = 16 * gamma / 2 * gradient.square().sum((1, 2, 3)).mean()
        adams[0].zero_grad()
        (loss_d + penalty).backward()
        adams[0].step()
        discriminator.requires_grad_(False)
        loss_g, penalty = F.softplus(-discriminator(fake)).mean(), 0.0
        discriminator.requires_grad_(True)
        if count % 8 == 0:
            ws = mixed(generator, max(len(x) // 2, 1), mixing, x.device)
            images = generator.synthesis(ws)
            noise = torch.randn(images.shape, device=x.device) / math.sqrt(images[0, 0].numel())
            (gradient,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
            lengths = gradient.square().sum(2).mean(1).sqrt()
            mean.lerp_(lengths.detach().mean(), 0.01)
            penalty = 8 * path * (lengths - mean).square().mean()
        adams[1].zero_grad()
        (loss_g + penalty).backward()
        adams[1].step()
        count += 1
        return loss_d.detach(), loss_g.detach()

    return step
