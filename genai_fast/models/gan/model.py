"""Generative adversarial networks: two networks in turns, as `genai_fast.training.Step` takes them."""

import contextlib
import copy
from collections.abc import Generator, Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from genai_fast.models.common import latents
from genai_fast.ops import rows

Turns = Generator[tuple[list[nn.Parameter], torch.Tensor], None, "GANLosses"]


class GANLosses(NamedTuple):
    discriminator: torch.Tensor  # loss of D, 0-d
    generator: torch.Tensor  # loss of G, 0-d
    accuracy: torch.Tensor  # of D, 0-d: share of images, real and generated, on the right side of 0


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters need no gradient inside: a graph built here reaches only the module's inputs."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class GAN(nn.Module):
    """A generator and a discriminator with the non-saturating loss on logits.

    D minimises -log D(x) - log(1 - D(G(z))), then G minimises -log D(G(z)) for the same z, D = sigmoid(logits).
    In G's turn no gradients of D's weights are computed.

    Args:
        generator: z [B, latent] -> images; has `latent`. With `classes`: (z, labels [B]) -> images.
        discriminator: images -> logits [B]. With `classes`: (images, labels) -> logits.
        classes: number of classes of a conditional pair; 0: labels are not used.
        smoothing: one-sided label smoothing: real images count as real to the degree 1 - smoothing, in [0, 1).
        ema: decay of the moving average of G's weights, which then draws the samples; 0: none, < 1.

    Source: Goodfellow et al. 2014, arXiv:1406.2661; conditional: Mirza & Osindero 2014, arXiv:1411.1784; smoothing:
    Salimans et al. 2016, arXiv:1606.03498.
    """

    signed: ClassVar[bool] = True  # images lie in [-1, 1]
    logits: ClassVar[bool] = True  # are what the discriminator gives

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, *, classes: int = 0, smoothing: float = 0.0,
        ema: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("smoothing", smoothing), ("ema", ema)):
            if not 0 <= value < 1:
                raise ValueError(f"{type(self).__name__}: {name}: expected 0 <= {name} < 1, got {value}")
        self.generator, self.discriminator = generator, discriminator
        self.latent, self.classes, self.smoothing, self.decay = generator.latent, classes, smoothing, ema
        # The average is a network of its own: saved with the rest, and nothing that trains G can touch it.
        self.average = copy.deepcopy(generator).requires_grad_(False) if ema else None
        # Real and generated images in one pass, unless the statistics of a batch would mix them.
        self._joined = not any(isinstance(m, _BatchNorm) for m in discriminator.modules())

    def networks(self) -> dict[str, nn.Module]:
        """What is trained, in the order of the turns."""
        return {"discriminator": self.discriminator, "generator": self.generator}

    def turns(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Turns:
        """D's update, then G's, on images [B, C, H, W] in [-1, 1] and, of a conditional pair, their labels [B]."""
        fake, fake_labels = self._generate(x)
        real_logits, fake_logits = self._judge(x, labels, fake.detach(), fake_labels)
        loss = _cross_entropy(real_logits, 1 - self.smoothing) + _cross_entropy(fake_logits, 0.0)
        yield list(self.discriminator.parameters()), loss
        with frozen(self.discriminator):
            logits = self.discriminator(fake, *fake_labels)
        generator_loss = _cross_entropy(logits, 1.0)
        yield list(self.generator.parameters()), generator_loss
        right = (real_logits > 0).float().mean() + (fake_logits < 0).float().mean()
        return GANLosses(loss, generator_loss, right / 2)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards G's weights."""
        if self.average is None:
            return
        weights = [p.detach() for p in self.generator.parameters()]
        torch._foreach_lerp_(list(self.average.parameters()), weights, 1 - self.decay)
        for mean, buffer in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            mean.copy_(buffer)

    @property
    def sampler(self) -> nn.Module:
        """The network that draws samples: the average if there is one, else the generator."""
        return self.generator if self.average is None else self.average

    @torch.no_grad()
    def decode(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Latents [N, latent] (and labels [N]) -> images [N, C, H, W] in [-1, 1], by running statistics."""
        with latents.evaluating(self.sampler):
            return self.sampler(z) if labels is None else self.sampler(z, labels)

    def sample(self, count: int, *, labels: torch.Tensor | None = None, seed: int | None = None) -> torch.Tensor:
        """Images [count, C, H, W] in [-1, 1] for z ~ N(0, I); a seed gives the same z on every device.

        Of a conditional pair, `labels` [count] are the classes; None: each in turn.
        """
        device = next(self.generator.parameters()).device
        if self.classes and labels is None:
            labels = torch.arange(count) % self.classes
        z = latents.normal(count, self.latent, seed)
        return self.decode(z.to(device), None if labels is None else labels.to(device))

    def extra_repr(self) -> str:
        return f"classes={self.classes}, smoothing={self.smoothing:g}, ema={self.decay:g}"

    def _generate(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """As many images as x has, and the labels that were drawn for them."""
        z = rows.drawn(lambda n: torch.randn(n, self.latent, device=x.device), len(x))
        labels = ()
        if self.classes:
            labels = (rows.drawn(lambda n: torch.randint(self.classes, (n,), device=x.device), len(x)),)
        return self.generator(z, *labels), labels

    def _judge(
        self, x: torch.Tensor, labels: torch.Tensor | None, fake: torch.Tensor, fake_labels: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the real images and of the generated ones."""
        real_labels = () if labels is None else (labels,)
        if not self._joined:
            return self.discriminator(x, *real_labels), self.discriminator(fake, *fake_labels)
        pairs = zip((x, *real_labels), (fake, *fake_labels), strict=True)
        return self.discriminator(*(torch.cat(pair) for pair in pairs)).chunk(2)


class WGANGP(GAN):
    """A generator and a critic that estimates the Wasserstein distance, with a gradient penalty.

    The critic minimises E[D(G(z))] - E[D(x)] + penalty E[(|grad D(x')| - 1)^2], x' uniform between real and generated
    images, `n_critic` times, each on its own share of the batch; then G minimises -E[D(G(z))]. The penalty is one of
    each image by itself, so the critic must have no batch norm. It needs second derivatives, which torch.compile
    refuses.

    Args:
        generator, discriminator, classes, ema: as GAN takes them; the critic's outputs are no logits.
        n_critic: updates of the critic in a step; `turns` wants n_critic times the images.
        penalty: weight of the gradient penalty.

    Source: Gulrajani et al. 2017, arXiv:1704.00028.
    """

    logits: ClassVar[bool] = False

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, *, classes: int = 0, ema: float = 0.0,
        n_critic: int = 5, penalty: float = 10.0,
    ) -> None:  # fmt: skip
        super().__init__(generator, discriminator, classes=classes, ema=ema)
        if not self._joined:
            raise ValueError(
                "WGANGP: discriminator: expected a critic without batch norm, whose penalty would mix images, got one"
                " with it; remedy: instance norm or no norm"
            )
        if n_critic < 1 or penalty < 0:
            raise ValueError(f"WGANGP: expected n_critic >= 1 and penalty >= 0, got {n_critic} and {penalty}")
        self.n_critic, self.penalty = n_critic, penalty

    def turns(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Turns:
        """`n_critic` updates of the critic and one of G, on images [n_critic B, C, H, W] in [-1, 1]."""
        if len(x) % self.n_critic:
            raise ValueError(f"WGANGP: expected a multiple of n_critic={self.n_critic} images, got {len(x)}")
        critic = list(self.discriminator.parameters())
        shares = [s.chunk(self.n_critic) for s in (x, *(() if labels is None else (labels,)))]
        for real, *real_labels in zip(*shares, strict=True):
            with torch.no_grad():
                fake, fake_labels = self._generate(real)
            at_real, at_fake = self._judge(real, *(real_labels or [None]), fake, fake_labels)
            loss = at_fake.mean() - at_real.mean() + self.penalty * self._gradient_penalty(real, fake, real_labels)
            yield critic, loss
        fake, fake_labels = self._generate(real)
        with frozen(self.discriminator):
            generator_loss = -self.discriminator(fake, *fake_labels).mean()
        yield list(self.generator.parameters()), generator_loss
        # A critic's zero means nothing: what counts is that the real image of a pair stands above the generated one.
        return GANLosses(loss, generator_loss, (at_real > at_fake).float().mean())

    def _gradient_penalty(self, real: torch.Tensor, fake: torch.Tensor, labels: list[torch.Tensor]) -> torch.Tensor:
        share = rows.drawn(lambda n: torch.rand(n, *(1 for _ in real.shape[1:]), device=real.device), len(real))
        between = torch.lerp(fake.to(real.dtype), real, share).requires_grad_()
        (gradient,) = torch.autograd.grad(self.discriminator(between, *labels).sum(), between, create_graph=True)
        return (gradient.flatten(1).norm(2, dim=1) - 1).square().mean()


def _cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
    """Binary cross-entropy of logits against one target for all, a mean, in float32."""
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
