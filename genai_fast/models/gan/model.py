"""Generative adversarial networks: two networks in turns, as `genai_fast.training.Step` takes them."""

import contextlib
import copy
from collections.abc import Generator, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from genai_fast.models.common import latents
from genai_fast.models.gan.augment import diff_augment, policy_of
from genai_fast.models.gan.losses import loss_of
from genai_fast.ops import rows

_ADAPTATION, _LEAST_RATE = 0.05, 0.01  # of the discriminator's learning rate: change a step, smallest factor
Turns = Generator[tuple[list[nn.Parameter], torch.Tensor], None, "GANLosses"]


class GANLosses(NamedTuple):
    discriminator: torch.Tensor  # loss of D, 0-d
    generator: torch.Tensor  # loss of G, 0-d
    accuracy: torch.Tensor  # of D, 0-d: share of images, real and generated, that it takes for what they are


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
    """A generator and a discriminator with the non-saturating loss on logits, or another of `losses.LOSSES`.

    D minimises -log D(x) - log(1 - D(G(z))), then G minimises -log D(G(z)) for the same z, D = sigmoid(logits).
    In G's turn no gradients of D's weights are computed.

    R1 adds r1 / 2 |grad D(x)|^2 of the outputs D at real images, a mean over them, to D's loss: it needs second
    derivatives, which torch.compile refuses.

    Args:
        generator: z [B, latent] -> images; has `latent`. With `classes`: (z, labels [B]) -> images.
        discriminator: images -> logits [B]. With `classes`: (images, labels) -> logits.
        classes: number of classes of a conditional pair; 0: labels are not used.
        smoothing: one-sided label smoothing: real images count as real to the degree 1 - smoothing, in [0, 1).
        ema: decay of the moving average of G's weights, which then draws the samples; 0: none, < 1.
        loss: "cross-entropy", "hinge" or "least-squares".
        r1: weight of the gradient penalty, >= 0.
        diff_augment: how images change on their way to D, such as "color,translation,cutout": see `augment`.
        adapt: accuracy of D that its learning rate keeps it at, < 1: in each step of `genai-fast train` the rate is
            multiplied by exp(0.05 (adapt - accuracy)), and stays between 0.01 times and once its own; 0: it is fixed.

    Source: Goodfellow et al. 2014, arXiv:1406.2661; conditional: Mirza & Osindero 2014, arXiv:1411.1784; smoothing:
    Salimans et al. 2016, arXiv:1606.03498; R1: Mescheder et al. 2018, arXiv:1801.04406.
    """

    signed: ClassVar[bool] = True  # images lie in [-1, 1]
    logits: ClassVar[bool] = True  # are what the discriminator gives

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, *, classes: int = 0, smoothing: float = 0.0,
        ema: float = 0.0, loss: str = "cross-entropy", r1: float = 0.0, diff_augment: str = "", adapt: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        owner = type(self).__name__
        for name, value in (("smoothing", smoothing), ("ema", ema), ("adapt", adapt)):
            if not 0 <= value < 1:
                raise ValueError(f"{owner}: {name}: expected 0 <= {name} < 1, got {value}")
        if not r1 >= 0:
            raise ValueError(f"{owner}: r1: expected at least 0, got {r1}")
        if smoothing and loss == "hinge":
            raise ValueError(
                f"{owner}: smoothing: expected 0 with the hinge loss, which has no targets, got {smoothing}"
            )
        self.loss, self.r1, self.adapt, self.policy = loss_of(owner, loss), r1, adapt, policy_of(owner, diff_augment)
        self.nats = loss == "cross-entropy"
        if adapt:
            self.register_buffer("rate", torch.ones(()))
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
        x = x.detach().requires_grad_() if self.r1 else x
        real_logits, fake_logits = self._judge(x, labels, fake.detach(), fake_labels)
        loss = self.loss.discriminator(real_logits.float(), fake_logits.float(), 1 - self.smoothing)
        penalised = loss + self.r1 / 2 * _squared_slope(real_logits, x) if self.r1 else loss
        yield list(self.discriminator.parameters()), penalised
        with frozen(self.discriminator):
            logits = self.discriminator(diff_augment(fake, self.policy), *fake_labels)
        generator_loss = self.loss.generator(logits.float())
        yield list(self.generator.parameters()), generator_loss
        middle = self.loss.middle
        right = (real_logits > middle).float().mean() + (fake_logits < middle).float().mean()
        return GANLosses(loss, generator_loss, right / 2)

    def rate_factors(self) -> dict[str, torch.Tensor]:
        """By what the learning rates of networks are to be multiplied at present, 0-d each."""
        return {"discriminator": self.rate} if self.adapt else {}

    @torch.no_grad()
    def adapt_rates(self, losses: GANLosses) -> None:
        """Move these factors by a step's losses."""
        if self.adapt:
            factor = torch.exp(_ADAPTATION * (self.adapt - losses.accuracy))
            self.rate.mul_(factor).clamp_(_LEAST_RATE, 1.0)

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
        settings = f"classes={self.classes}, smoothing={self.smoothing:g}, ema={self.decay:g}, r1={self.r1:g}"
        return f"{settings}, diff_augment={','.join(self.policy)}, adapt={self.adapt:g}"

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
        x, fake = diff_augment(x, self.policy), diff_augment(fake, self.policy)
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
        generator, discriminator, classes, ema, diff_augment: as GAN takes them; the critic's outputs are no logits.
        n_critic: updates of the critic in a step; `turns` wants n_critic times the images.
        penalty: weight of the gradient penalty.

    Source: Gulrajani et al. 2017, arXiv:1704.00028.
    """

    logits: ClassVar[bool] = False

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, *, classes: int = 0, ema: float = 0.0,
        n_critic: int = 5, penalty: float = 10.0, diff_augment: str = "",
    ) -> None:  # fmt: skip
        super().__init__(generator, discriminator, classes=classes, ema=ema, diff_augment=diff_augment)
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
            generator_loss = -self.discriminator(diff_augment(fake, self.policy), *fake_labels).mean()
        yield list(self.generator.parameters()), generator_loss
        # A critic's zero means nothing: what counts is that the real image of a pair stands above the generated one.
        return GANLosses(loss, generator_loss, (at_real > at_fake).float().mean())

    def _gradient_penalty(self, real: torch.Tensor, fake: torch.Tensor, labels: list[torch.Tensor]) -> torch.Tensor:
        share = rows.drawn(lambda n: torch.rand(n, *(1 for _ in real.shape[1:]), device=real.device), len(real))
        between = torch.lerp(fake.to(real.dtype), real, share).requires_grad_()
        (gradient,) = torch.autograd.grad(self.discriminator(between, *labels).sum(), between, create_graph=True)
        return (gradient.flatten(1).norm(2, dim=1) - 1).square().mean()


def _squared_slope(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The squared length of the logits' gradient at each image, a mean."""
    (gradient,) = torch.autograd.grad(logits.float().sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()
