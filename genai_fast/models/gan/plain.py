"""Generators and discriminators as their authors write them, and the loop that trains them.

Discriminators end in a sigmoid, for nn.BCELoss; ours end in logits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

from genai_fast.models.common.plain_conv import HalfTurn


class PlainMLPGenerator(nn.Module):
    """z [B, latent] -> image [B, *shape]: the MLP of many a first GAN."""

    def __init__(
        self, shape: tuple[int, ...] = (1, 28, 28), latent: int = 100, widths: tuple[int, ...] = (256, 512, 1024)
    ) -> None:
        super().__init__()
        layers = []
        for n_in, n_out in itertools.pairwise((latent, *widths)):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(inplace=True)]
        self.main = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(shape)), nn.Tanh(), nn.Unflatten(1, shape))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class PlainMLPDiscriminator(nn.Module):
    """Image [B, *shape] -> probability [B]."""

    def __init__(
        self, shape: tuple[int, ...] = (1, 28, 28), widths: tuple[int, ...] = (1024, 512, 256), dropout: float = 0.0,
        slope: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        layers = []
        for n_in, n_out in itertools.pairwise((math.prod(shape), *widths)):
            layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(slope, inplace=True)]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.main = nn.Sequential(*layers, nn.Linear(widths[-1], 1), nn.Sigmoid())

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.main(img.flatten(1)).squeeze(1)


class PlainSelfAttention(nn.Module):
    """x + gain attention(x), [B, C, H, W]: every pixel looks at all of them. The gain is 0 at first (SAGAN)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1, bias=False) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (conv(x).flatten(2) for conv in (self.query, self.key, self.value))  # [B, C / 8, H W]
        share = torch.softmax(query.transpose(1, 2) @ key, dim=2)  # [B, H W, H W]
        seen = (value @ share.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gain * self.out(seen)


class PlainDCGANGenerator(nn.Module):
    """z [B, latent] or [B, latent, 1, 1] -> image [B, channels, size, size], the layers of PyTorch's DCGAN example.

    size is 28, 32, 64 or 128; attention the side of a feature map with self-attention, or 0.
    """

    def __init__(
        self, size: int = 64, latent: int = 100, width: int = 64, channels: int = 3, attention: int = 0
    ) -> None:
        super().__init__()
        side = 7 if size == 28 else 4
        n_in = width * size // side // 2
        layers = [nn.ConvTranspose2d(latent, n_in, side, 1, 0, bias=False)]
        while n_in >= width:
            n_out = n_in // 2 if n_in > width else channels
            layers += [nn.BatchNorm2d(n_in), nn.ReLU(True)]
            layers += [PlainSelfAttention(n_in)] if side == attention else []
            layers.append(nn.ConvTranspose2d(n_in, n_out, 4, 2, 1, bias=False))
            n_in, side = n_in // 2, side * 2
        self.main = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z.view(z.size(0), -1, 1, 1))


class PlainDCGANDiscriminator(nn.Module):
    """Image [B, channels, size, size] -> probability [B], the layers of PyTorch's DCGAN example.

    attention: the side of a feature map with self-attention, or 0.
    """

    def __init__(self, size: int = 64, width: int = 64, channels: int = 3, attention: int = 0) -> None:
        super().__init__()
        last = 7 if size == 28 else 4
        side, layers, n_in = size // 2, [], channels
        while side >= last:
            n_out = width * size // side // 2
            layers.append(nn.Conv2d(n_in, n_out, 4, 2, 1, bias=False))
            layers += [nn.BatchNorm2d(n_out)] if layers[1:] else []
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            layers += [PlainSelfAttention(n_out)] if side == attention else []
            n_in, side = n_out, side // 2
        self.main = nn.Sequential(*layers, nn.Conv2d(n_in, 1, last, 1, 0, bias=False), nn.Sigmoid())

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.main(img).view(-1)


class PlainConditionalGenerator(nn.Module):
    """z [B, latent], labels [B] -> image [B, channels, size, size]: DCGAN's layers on z and the label's embedding."""

    def __init__(
        self, classes: int = 10, size: int = 64, latent: int = 100, width: int = 64, channels: int = 3,
        embedding: int = 100, attention: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(classes, embedding)
        self.main = PlainDCGANGenerator(size, latent + embedding, width, channels, attention).main

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.main(torch.cat([z, self.embed(labels)], dim=1)[:, :, None, None])


class PlainDenseGenerator(nn.Module):
    """z [B, latent] -> image [B, channels, 4 side, 4 side], by way of a dense layer."""

    def __init__(
        self, latent: int = 100, channels: int = 1, side: int = 7, momentum: float = 0.2, slope: float = 0.2,
        eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(latent, 256 * side * side, bias=False),
            nn.BatchNorm1d(256 * side * side, eps=eps, momentum=momentum),
            nn.LeakyReLU(slope),
            nn.Unflatten(1, (256, side, side)),
            nn.ConvTranspose2d(256, 128, 5, stride=1, padding=2, bias=False),
            nn.BatchNorm2d(128, eps=eps, momentum=momentum),
            nn.LeakyReLU(slope),
            nn.ConvTranspose2d(128, 64, 5, stride=2, padding=2, output_padding=1, bias=False),
            nn.BatchNorm2d(64, eps=eps, momentum=momentum),
            nn.LeakyReLU(slope),
            nn.ConvTranspose2d(64, channels, 5, stride=2, padding=2, output_padding=1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class PlainDenseGeneratorK4(nn.Module):
    """z [B, latent] -> image [B, channels, 4 side, 4 side], with kernels of 4, without norms or with three."""

    def __init__(
        self, latent: int = 100, channels: int = 1, side: int = 7, slope: float = 0.2, batch_norm: bool = False,
        momentum: float = 0.1, eps: float = 1e-5, last_kernel: int = 7,
    ) -> None:  # fmt: skip
        super().__init__()
        n, settings = 128 * side * side, {"eps": eps, "momentum": momentum}
        norms = [nn.BatchNorm1d(n, **settings), *(nn.BatchNorm2d(128, **settings) for _ in range(2))]
        first, *others = ([norm, nn.LeakyReLU(slope, inplace=True)][not batch_norm :] for norm in norms)
        layers = [nn.Linear(latent, n, bias=not batch_norm), *first, nn.Unflatten(1, (128, side, side))]
        for behind in others:
            layers += [nn.ConvTranspose2d(128, 128, 4, stride=2, padding=1, bias=not batch_norm), *behind]
        self.main = nn.Sequential(*layers, nn.Conv2d(128, channels, last_kernel, padding=last_kernel // 2), nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class PlainDenseDiscriminator(nn.Module):
    """Image [B, channels, size, size] -> probability [B]."""

    def __init__(
        self, size: int = 28, channels: int = 1, widths: tuple[int, ...] = (64, 128), dropout: float = 0.3,
        slope: float = 0.2, batch_norm: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        layers = []
        for n_in, n_out in itertools.pairwise((channels, *widths)):
            layers.append(nn.Conv2d(n_in, n_out, 5, 2, 2, bias=not batch_norm))
            layers += [nn.BatchNorm2d(n_out, eps=eps, momentum=momentum)] if batch_norm else []
            layers += [nn.LeakyReLU(slope, inplace=True), nn.Dropout(dropout)]
        flat = widths[-1] * (size >> len(widths)) ** 2
        self.main = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 1), nn.Sigmoid())

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.main(img).squeeze(1)


class PlainKerasGenerator(PlainDenseGenerator):
    """z [B, latent] -> image [B, channels, 4 side, 4 side]: the Keras listing's layers, padding and defaults."""

    def __init__(self, latent: int = 100, channels: int = 1, side: int = 7, momentum: float = 0.2) -> None:
        super().__init__(latent, channels, side, momentum, slope=0.3, eps=1e-3)
        self.main.append(HalfTurn())


class PlainKerasDiscriminator(PlainDenseDiscriminator):
    """Image [B, channels, size, size] -> probability [B]: the same listing's, with batch norm and without dropout."""

    def __init__(self, size: int = 28, channels: int = 1, momentum: float = 0.2) -> None:
        super().__init__(size, channels, dropout=0.0, slope=0.3, batch_norm=True, momentum=momentum, eps=1e-3)
        self.main.insert(0, HalfTurn())


class PlainKerasGeneratorK4(nn.Module):
    """z [B, latent] -> image [B, channels, 4 side, 4 side], with kernels of 4, a ReLU before the first norm, biases."""

    def __init__(self, latent: int = 100, channels: int = 3, side: int = 7, momentum: float = 0.2) -> None:
        super().__init__()
        n, settings = 128 * side * side, {"eps": 1e-3, "momentum": momentum}
        layers = [nn.Linear(latent, n), nn.ReLU(), nn.BatchNorm1d(n, **settings), nn.LeakyReLU(0.3)]
        layers.append(nn.Unflatten(1, (128, side, side)))
        for _ in range(2):
            layers += [nn.ConvTranspose2d(128, 128, 4, 2, 1), nn.BatchNorm2d(128, **settings), nn.LeakyReLU(0.3)]
        self.main = nn.Sequential(*layers, nn.Conv2d(128, channels, 3, padding=1), nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class PlainKerasDiscriminatorK4(nn.Module):
    """Image [B, channels, size, size] -> probability [B]: kernels of 3, the norms after the activations."""

    def __init__(self, size: int = 28, channels: int = 3, momentum: float = 0.2) -> None:
        super().__init__()
        layers = [HalfTurn()]
        for n_in in (channels, 128):
            norm = nn.BatchNorm2d(128, eps=1e-3, momentum=momentum)
            layers += [nn.Conv2d(n_in, 128, 3, 2, 1), nn.LeakyReLU(0.2), norm]
        self.main = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (size // 4) ** 2, 1), nn.Sigmoid())

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.main(img).squeeze(1)


def gan_step(
    generator: nn.Module, discriminator: nn.Module, latent: int, device: str = "cpu"
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The loop of PyTorch's DCGAN example for z [B, latent]: D on real and on generated images, then G; BCE, Adam.

    Returns a function of images that takes one step and returns the losses of D and G.
    """
    generator, discriminator, bce = generator.to(device), discriminator.to(device), nn.BCELoss()
    adams = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n in (discriminator, generator)]

    def judge(x: torch.Tensor, target: float) -> torch.Tensor:
        return bce(discriminator(x), torch.full((len(x),), target, device=device))

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        discriminator.zero_grad()
        real = judge(x, 1.0)
        real.backward()
        z = torch.randn(len(x), latent, device=device)
        fake = generator(z)
        generated = judge(fake.detach(), 0.0)
        generated.backward()
        adams[0].step()
        generator.zero_grad()
        loss = judge(fake, 1.0)
        loss.backward()
        adams[1].step()
        return real.detach() + generated.detach(), loss.detach()

    return step
