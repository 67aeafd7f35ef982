"""StyleGAN2: a pair in turns, with lazy regularisation of both networks."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.common import latents
from genai_fast.models.gan.model import GAN, GANLosses, Turns, frozen
from genai_fast.models.stylegan2.networks import StyleGenerator
from genai_fast.ops import rows

R1_EVERY, PATH_EVERY = 16, 8  # steps between regularised ones, whose penalties count as many times
_PATH_DECAY = 0.01  # of the mean length


class StyleGAN2(GAN):
    """A style-based generator and a discriminator with the non-saturating loss on logits.

    D minimises -log D(x) - log(1 - D(G(z))), and every 16 steps 16 gamma / 2 E|grad D(x)|^2 (R1); then G minimises
    -log D(G(z)), and every 8 steps 8 path E(|J^T y| - a)^2, J the derivative of the image by the styles, y noise of
    unit length and a the mean length so far. An image has two styles with probability `mixing`. Penalties need second
    derivatives, which torch.compile refuses; counting steps on the host, the model is not captured as a CUDA graph.
    `truncation` is an attribute: what `decode` passes to the generator.

    Args:
        generator: a `StyleGenerator`.
        discriminator: images -> logits [B].
        ema: as GAN takes it.
        gamma, path: weights of the penalties, >= 0; 0: none.
        mixing: in [0, 1].

    Raises: ValueError on weights out of range.
    Source: Karras et al. 2020, arXiv:1912.04958; R1: Mescheder et al. 2018, arXiv:1801.04406; mixing: Karras et al.
        2019, arXiv:1812.04948.
    """

    varies: ClassVar[bool] = True  # not every step computes the penalties

    steps: torch.Tensor
    length: torch.Tensor

    def __init__(
        self, generator: StyleGenerator, discriminator: nn.Module, *, ema: float = 0.0, gamma: float = 1.0,
        path: float = 2.0, mixing: float = 0.9,
    ) -> None:  # fmt: skip
        super().__init__(generator, discriminator, ema=ema)
        if gamma < 0 or path < 0 or not 0 <= mixing <= 1:
            raise ValueError(
                f"StyleGAN2: expected gamma >= 0, path >= 0 and mixing in [0, 1], got {gamma}, {path} and {mixing}"
            )
        self.gamma, self.path, self.mixing, self.truncation = gamma, path, mixing, 1.0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # so far: which ones are regularised
        self.register_buffer("length", torch.zeros(()))

    def turns(self, x: torch.Tensor) -> Turns:
        """D's update, then G's, on images [B, C, H, W] in [-1, 1]."""
        step = int(self.steps)
        fake = self.generator.synthesis(self._styles(len(x), x.device))
        regularised = self.gamma > 0 and step % R1_EVERY == 0
        x = x.detach().requires_grad_(regularised)
        real_logits, fake_logits = self.discriminator(x), self.discriminator(fake.detach())
        loss = F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()
        yield list(self.discriminator.parameters()), loss + self._r1(x, real_logits) if regularised else loss
        with frozen(self.discriminator):
            generator_loss = F.softplus(-self.discriminator(fake).float()).mean()
        regularised = self.path > 0 and step % PATH_EVERY == 0
        total = generator_loss + self._path_length(max(len(x) // 2, 1), x.device) if regularised else generator_loss
        yield list(self.generator.parameters()), total
        right = (real_logits > 0).float().mean() + (fake_logits < 0).float().mean()
        return GANLosses(loss.detach(), generator_loss.detach(), right.detach() / 2)

    @torch.no_grad()
    def after_step(self) -> None:
        """Count the step, and move the average towards G's weights."""
        self.steps += 1
        super().after_step()

    @torch.no_grad()
    def decode(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Latents [N, latent] -> images [N, C, H, W] about in [-1, 1], with the fixed noise and `truncation`.

        There are no labels.
        """
        with latents.evaluating(self.sampler):
            return self.sampler(z, self.truncation)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}, path={self.path:g}, mixing={self.mixing:g}, ema={self.decay:g}"

    def _styles(self, count: int, device: torch.device) -> torch.Tensor:
        """ws [count, styles, latent] of two z each: with probability `mixing` the second's from some layer on."""
        generator = self.generator
        z = rows.drawn(lambda n: torch.randn(n, 2, self.latent, device=device), count)
        where = rows.drawn(lambda n: torch.rand(n, 2, device=device), count)
        w = generator.mapping(z.flatten(0, 1)).unflatten(0, (count, 2))
        cut = 1 + (where[:, 0] * (generator.styles - 1)).long()
        cut = torch.where(where[:, 1] < self.mixing, cut, generator.styles)
        early = torch.arange(generator.styles, device=device) < cut[:, None]
        return torch.where(early[:, :, None], w[:, :1], w[:, 1:])

    def _r1(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return R1_EVERY * self.gamma / 2 * gradient.float().square().sum((1, 2, 3)).mean()

    def _path_length(self, count: int, device: torch.device) -> torch.Tensor:
        ws = self._styles(count, device)
        images = self.generator.synthesis(ws)
        noise = rows.drawn(lambda n: torch.randn(n, *images.shape[1:], device=device), count)
        noise = noise / math.sqrt(images[0, 0].numel())
        (gradient,) = torch.autograd.grad((images.float() * noise).sum(), ws, create_graph=True)
        lengths = gradient.float().square().sum(2).mean(1).sqrt()
        self.length.lerp_(lengths.detach().mean(), _PATH_DECAY)
        return PATH_EVERY * self.path * (lengths - self.length).square().mean()
