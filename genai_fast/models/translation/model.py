"""CycleGAN and pix2pix: generators and critics in turns, as `genai_fast.training.Step` takes them."""

from collections.abc import Generator, Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.common import checks, latents
from genai_fast.models.gan.losses import loss_of
from genai_fast.models.gan.model import frozen
from genai_fast.ops import rows


class CycleGANLosses(NamedTuple):
    generator: torch.Tensor  # of both generators, weighted, 0-d
    critic: torch.Tensor  # of both critics, 0-d
    cycle: torch.Tensor  # L1 distance after there and back, of both sets, 0-d
    identity: torch.Tensor  # L1 distance of an image from what its own set's generator makes of it, 0-d


class Pix2PixLosses(NamedTuple):
    generator: torch.Tensor  # weighted, 0-d
    critic: torch.Tensor  # 0-d
    l1: torch.Tensor  # distance from the partner, 0-d


class ImagePool(nn.Module):
    """Keeps up to `size` generated images; gives back those that it is called with, or older ones.

    Until it is full it keeps every image and gives it back. Then it gives back, for each with probability 1/2, one of
    its own instead, which the new one replaces; those of one batch are distinct. Nothing waits for the device, so a
    captured step serves. The images are buffers (a step that is not finite leaves them as they were) and no part of the
    state dict; each of several processes has its own.

    Args:
        size: images; 0: every image is given back.
        shape: (C, H, W) of one.

    Source: Shrivastava et al. 2017, arXiv:1612.07828; Zhu et al. 2017, arXiv:1703.10593, section 4.
    """

    def __init__(self, size: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if size < 0:
            raise ValueError(f"ImagePool: size: expected at least 0, got {size}")
        self.size = size
        # The last row takes what is not kept: which rows are written is known to the device alone.
        self.register_buffer("images", torch.zeros(size + 1 if size else 0, *shape), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W] -> as many images, without a gradient."""
        if not self.size:
            return x
        checks.images("ImagePool", x, self.images.shape[1:])
        number, places = torch.arange(len(x), device=x.device), self.size
        place = self.count + number
        filling = place < places
        swapped = rows.drawn(lambda n: torch.rand(n, device=x.device), len(x)) < 0.5
        swapped &= (self.count >= places) & (number < places)  # distinct images are no more than the pool has
        place = torch.where(filling, place, torch.rand(places, device=x.device).argsort()[number % places])
        new = x.to(self.images.dtype)
        given = torch.where(swapped.view(-1, 1, 1, 1), self.images.index_select(0, place), new)
        self.images.index_copy_(0, torch.where(filling | swapped, place, places), new)
        self.count.add_(len(x)).clamp_(max=places)
        return given.to(x.dtype)

    def carried(self) -> dict[str, torch.Tensor]:
        """Copies: images [size, 1, C, H, W] and their count [1, 1]; of several processes joined, a column of each."""
        return {"images": self.images[: self.size, None].clone(), "count": self.count.view(1, 1).clone()}

    def load_carried(self, state: Mapping[str, torch.Tensor]) -> None:
        """What `carried` gave: the first column, or of none an empty pool, as of a process that joins others.

        Raises: ValueError on another shape.
        """
        images, count = state.get("images"), state.get("count")
        wanted, columns = (self.size, *self.images.shape[1:]), 0 if count is None else count.numel()
        if images is None or count is None or images.shape != (wanted[0], columns, *wanted[1:]):
            got = "nothing" if images is None or count is None else f"{tuple(images.shape)} and {tuple(count.shape)}"
            raise ValueError(f"load_carried: expected images [{wanted[0]}, N, ...] and counts [1, N], got {got}")
        if not columns:
            self.count.zero_()
            return
        self.images[: self.size].copy_(images[:, 0])
        self.count.copy_(count[0, 0])

    def extra_repr(self) -> str:
        return f"size={self.size}"


class CycleGAN(nn.Module):
    """Two generators between two sets of images, A and B, that have no pairs, and a critic of each set.

    The generators minimise, on images a and b, with the critics D and least squares,
    E[(D_B(G(a)) - 1)^2] + E[(D_A(F(b)) - 1)^2] + cycle (|F(G(a)) - a| + |G(F(b)) - b|) + identity (|G(b) - b| +
    |F(a) - a|), |.| the mean absolute value, G `to_b` and F `to_a`. Then each critic minimises
    E[(D(x) - 1)^2] / 2 + E[D(x')^2] / 2, x' from the history pool of what its generator made.

    Args:
        to_b, to_a: images [B, C, H, W] in [-1, 1] -> images of that shape, without batch norm: several sets of images
            go through in one pass.
        critic_b, critic_a: images -> judgements of any shape, without batch norm.
        shape: (C, H, W) of the images.
        cycle, identity: weights.
        pool: images of each history pool; 0: none.

    Raises: ValueError on a negative weight or size.
    Source: Zhu et al. 2017, arXiv:1703.10593; least squares: Mao et al. 2017, arXiv:1611.04076.
    """

    signed: ClassVar[bool] = True  # images lie in [-1, 1]
    targets: ClassVar[tuple[str, ...]] = ("b", "a")

    def __init__(
        self, to_b: nn.Module, to_a: nn.Module, critic_b: nn.Module, critic_a: nn.Module, *,
        shape: tuple[int, int, int], cycle: float = 10.0, identity: float = 5.0, pool: int = 50,
    ) -> None:  # fmt: skip
        super().__init__()
        _not_negative("CycleGAN", cycle=cycle, identity=identity)
        self.to_b, self.to_a, self.critic_b, self.critic_a = to_b, to_a, critic_b, critic_a
        self.cycle, self.identity = cycle, identity
        self.pool_b, self.pool_a = ImagePool(pool, shape), ImagePool(pool, shape)

    def networks(self) -> dict[str, nn.Module]:
        """What is trained, in the order of the turns."""
        return {"to_b": self.to_b, "to_a": self.to_a, "critic_b": self.critic_b, "critic_a": self.critic_a}

    def turns(
        self, a: torch.Tensor, b: torch.Tensor
    ) -> Generator[tuple[list[nn.Parameter], torch.Tensor], None, CycleGANLosses]:
        """The generators' update, then the critics', on images a and b [B, C, H, W] in [-1, 1]."""
        # What one network is to do with two batches it does in one pass: no norm mixes images.
        own_a, own_b = ([x] if self.identity else [] for x in (a, b))
        fake_b, *same_b = self.to_b(torch.cat([a, *own_b])).split(len(a))
        fake_a, *same_a = self.to_a(torch.cat([b, *own_a])).split(len(b))
        cycle = _distance(self.to_a(fake_b), a) + _distance(self.to_b(fake_a), b)
        identity = cycle.new_zeros(())
        if self.identity:
            identity = _distance(same_b[0], b) + _distance(same_a[0], a)
        with frozen(self.critic_b), frozen(self.critic_a):
            fooled = _square(self.critic_b(fake_b), 1.0) + _square(self.critic_a(fake_a), 1.0)
        generator_loss = fooled + self.cycle * cycle + self.identity * identity
        yield [*self.to_b.parameters(), *self.to_a.parameters()], generator_loss
        loss = self._critics_loss(self.critic_b, b, self.pool_b(fake_b.detach()))
        loss = loss + self._critics_loss(self.critic_a, a, self.pool_a(fake_a.detach()))
        yield [*self.critic_b.parameters(), *self.critic_a.parameters()], loss
        return CycleGANLosses(generator_loss, loss, cycle, identity)

    def translator(self, to: str) -> nn.Module:
        """The generator of images of set `to`."""
        return {"b": self.to_b, "a": self.to_a}[to]

    @torch.no_grad()
    def translate(self, x: torch.Tensor, to: str = "b") -> torch.Tensor:
        """Images [N, C, H, W] in [-1, 1] of one set -> as they would be in the set `to`."""
        with latents.evaluating(self.translator(to)):
            return self.translator(to)(x)

    def carried(self) -> dict[str, torch.Tensor]:
        """The history pools: see `ImagePool.carried`."""
        pools = {"b": self.pool_b, "a": self.pool_a}
        return {f"{to}.{name}": x for to, pool in pools.items() for name, x in pool.carried().items()}

    def load_carried(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises: ValueError on pools of another size or of other images."""
        for to, pool in (("b", self.pool_b), ("a", self.pool_a)):
            pool.load_carried(
                {name.removeprefix(f"{to}."): x for name, x in state.items() if name.startswith(f"{to}.")}
            )

    def extra_repr(self) -> str:
        return f"cycle={self.cycle:g}, identity={self.identity:g}"

    @staticmethod
    def _critics_loss(critic: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        at_real, at_fake = critic(torch.cat([real, fake.to(real.dtype)])).split(len(real))
        return 0.5 * (_square(at_real, 1.0) + _square(at_fake, 0.0))


class Pix2Pix(nn.Module):
    """A generator from images a to their partners b, and a critic that sees both.

    The critic minimises the cross-entropy of pairs, (a, b) real and (a, G(a)) made, halved; then G minimises the
    cross-entropy of (a, G(a)) against real, plus l1 |G(a) - b|, |.| the mean absolute value; or another loss of
    `gan.losses.LOSSES` takes the place of the cross-entropies.

    Args:
        to_b: images [B, C, H, W] in [-1, 1] -> images of that shape.
        critic: pairs [B, 2 C, H, W] -> logits of any shape, without batch norm.
        l1: weight of the distance.
        loss: "cross-entropy", "hinge" or "least-squares".

    Raises: ValueError on a negative weight and another loss.
    Source: Isola et al. 2017, arXiv:1611.07004.
    """

    signed: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = ("b",)

    def __init__(self, to_b: nn.Module, critic: nn.Module, *, l1: float = 100.0, loss: str = "cross-entropy") -> None:
        super().__init__()
        _not_negative("Pix2Pix", l1=l1)
        self.loss = loss_of("Pix2Pix", loss)
        self.to_b, self.critic, self.l1 = to_b, critic, l1

    def networks(self) -> dict[str, nn.Module]:
        """What is trained, in the order of the turns."""
        return {"critic": self.critic, "to_b": self.to_b}

    def turns(
        self, a: torch.Tensor, b: torch.Tensor
    ) -> Generator[tuple[list[nn.Parameter], torch.Tensor], None, Pix2PixLosses]:
        """The critic's update, then the generator's, on images a and their partners b [B, C, H, W] in [-1, 1]."""
        fake = self.to_b(a)
        pairs = torch.cat([torch.cat([a, b], 1), torch.cat([a, fake.detach().to(a.dtype)], 1)])
        at_real, at_fake = self.critic(pairs).split(len(a))
        loss = 0.5 * self.loss.discriminator(at_real.float(), at_fake.float(), 1.0)
        yield list(self.critic.parameters()), loss
        with frozen(self.critic):
            logits = self.critic(torch.cat([a.to(fake.dtype), fake], 1))
        l1 = _distance(fake, b)
        generator_loss = self.loss.generator(logits.float()) + self.l1 * l1
        yield list(self.to_b.parameters()), generator_loss
        return Pix2PixLosses(generator_loss, loss, l1)

    def translator(self, to: str) -> nn.Module:
        """The generator of images of set `to`, "b"."""
        return {"b": self.to_b}[to]

    @torch.no_grad()
    def translate(self, x: torch.Tensor, to: str = "b") -> torch.Tensor:
        """Images [N, C, H, W] in [-1, 1] -> what is made of them, without dropout."""
        with latents.evaluating(self.translator(to)):
            return self.translator(to)(x)

    def extra_repr(self) -> str:
        return f"l1={self.l1:g}"


def _not_negative(owner: str, **weights: float) -> None:
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(f"{owner}: {name}: expected at least 0, got {value}")


def _distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(x.float(), y.float())


def _square(judged: torch.Tensor, target: float) -> torch.Tensor:
    return (judged.float() - target).square().mean()
