"""SRResNet, trained by squared error, and SRGAN, a critic beside it."""

from collections.abc import Generator
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.models.gan.losses import loss_of
from genai_fast.models.gan.model import frozen
from genai_fast.models.srgan.networks import Enlarger
from genai_fast.models.srgan.plain import lowered


class SRResNetLoss(NamedTuple):
    loss: torch.Tensor  # mean squared error of pixels in [-1, 1], 0-d float32


class SRGANLosses(NamedTuple):
    generator: torch.Tensor  # content loss and weighted adversarial one, 0-d
    critic: torch.Tensor  # 0-d
    content: torch.Tensor  # mean squared error of pixels, 0-d


class SRResNet(Enlarger):
    """`Enlarger` trained by mean squared error on large images [B, C, H, W] in [-1, 1] and what `lower` makes of them.

    Args and Raises: as of `Enlarger`, and ValueError on images whose sides are no multiples of the scale.
    Source: Ledig et al. 2017, arXiv:1609.04802.
    """

    def lower(self, x: torch.Tensor) -> torch.Tensor:
        """Large images as small ones: bicubic, antialiased."""
        return _lower("SRResNet", x, self.scale)

    def training_step(self, x: torch.Tensor) -> SRResNetLoss:
        """The loss on large images x."""
        return SRResNetLoss(_error(self(self.lower(x)), x))


class SRGAN(nn.Module):
    """A network that enlarges images, and a critic that tells what it makes from originals.

    The critic minimises -log D(x) - log(1 - D(G(low x))); then G minimises |G(low x) - x|^2 - adversarial log D(G(low
    x)), |.|^2 the mean squared error of pixels; or another of `gan.losses.LOSSES` takes the place of logarithms.
    Begin with the weights of an `SRResNet`.

    Args:
        generator: an `Enlarger`.
        critic: images -> logits [B].
        adversarial: weight of the adversarial loss.
        loss: "cross-entropy", "hinge" or "least-squares".

    Raises: ValueError on a negative weight, another loss, and on images whose sides are no multiples of the scale.
    Source: Ledig et al. 2017, arXiv:1609.04802, where a trained classifier's features may take the place of pixels.
    """

    signed: ClassVar[bool] = True  # images lie in [-1, 1]

    def __init__(
        self, generator: Enlarger, critic: nn.Module, *, adversarial: float = 1e-3, loss: str = "cross-entropy"
    ) -> None:
        super().__init__()
        if not adversarial >= 0:
            raise ValueError(f"SRGAN: adversarial: expected at least 0, got {adversarial}")
        self.generator, self.critic, self.adversarial = generator, critic, adversarial
        self.loss = loss_of("SRGAN", loss)
        self.scale, self.reach = generator.scale, generator.reach

    def networks(self) -> dict[str, nn.Module]:
        """What is trained, in the order of the turns."""
        return {"critic": self.critic, "generator": self.generator}

    def lower(self, x: torch.Tensor) -> torch.Tensor:
        """Large images as small ones: bicubic, antialiased."""
        return _lower("SRGAN", x, self.scale)

    def upscale(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, channels, H, W] in [-1, 1] -> enlarged ones, by running statistics."""
        return self.generator.upscale(x)

    def turns(self, x: torch.Tensor) -> Generator[tuple[list[nn.Parameter], torch.Tensor], None, SRGANLosses]:
        """The critic's update, then the generator's, on large images x [B, C, H, W] in [-1, 1]."""
        made = self.generator(self.lower(x))
        loss = self.loss.discriminator(self.critic(x).float(), self.critic(made.detach()).float(), 1.0)
        yield list(self.critic.parameters()), loss
        with frozen(self.critic):
            logits = self.critic(made)
        content = _error(made, x)
        generator_loss = content + self.adversarial * self.loss.generator(logits.float())
        yield list(self.generator.parameters()), generator_loss
        return SRGANLosses(generator_loss, loss, content)

    def extra_repr(self) -> str:
        return f"adversarial={self.adversarial:g}"


def _lower(owner: str, x: torch.Tensor, scale: int) -> torch.Tensor:
    if x.dim() != 4 or any(side % scale for side in x.shape[2:]):
        raise ValueError(
            f"{owner}: expected images [B, C, H, W] whose sides are multiples of {scale}, got {tuple(x.shape)}; resize"
            f" them"
        )
    return lowered(x, scale)


def _error(made: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(made.float(), x.float())
