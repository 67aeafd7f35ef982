"""The systems whose training step is measured: as their authors write them in plain PyTorch, and as we train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from genai_fast.models import dcgan_init, peers
from genai_fast.training import settings
from genai_fast.training.config import Config
from genai_fast.training.recipes import make
from genai_fast.training.step import Step, make_optimizer

RunStep = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class System:
    """A model, a batch and an optimizer.

    plain(device) and the recipe's own step take images [batch, *shape], in [-1, 1] or [0, 1] as the model wants.
    """

    recipe: str
    config: Config
    batch: int
    shape: tuple[int, int, int]
    plain: Callable[[str], RunStep]
    signed: bool = True
    plain_scale: int = 1  # the plain script's loss over ours: those that sum over the batch say the batch
    tolerance: float = 5e-3  # of the losses, relative: noise, dropout and a narrow type differ

    def images(self, device: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch, *self.shape, generator=generator).to(device)
        return x * 2 - 1 if self.signed else x

    def fused(self, device: str) -> Step:
        """What `genai-fast train` runs."""
        model = make(self.recipe, self.config, self.shape, 0).to(device)
        bfloat16 = self.config.precision == "bfloat16"
        return Step(model, make_optimizer(model, self.config), bfloat16=bfloat16)


def _dcgan(device: str) -> RunStep:
    pair = peers.EagerDCGANGenerator(), peers.EagerDCGANDiscriminator()
    return peers.gan_step(*map(dcgan_init, pair), 100, device)


SYSTEMS = {
    "mlp_vae": System(
        "vae", settings.VAEConfig(), 128, (1, 28, 28), lambda d: peers.vae_step(peers.EagerMLPVAE(), d), signed=False,
        plain_scale=128,
    ),
    "mlp_gan": System(
        "mlp-gan", settings.GANConfig(), 128, (1, 28, 28),
        lambda d: peers.gan_step(peers.EagerMLPGenerator(), peers.EagerMLPDiscriminator(), 100, d),
    ),
    "dense_dcgan": System(
        "dcgan", settings.DCGANConfig(network="dense"), 128, (1, 28, 28),
        lambda d: peers.gan_step(peers.EagerDenseGenerator(), peers.EagerDenseDiscriminator(), 100, d), tolerance=0.05,
    ),
    "dcgan_64": System("dcgan", settings.DCGANConfig(), 64, (3, 64, 64), _dcgan),
    "dcgan_64_bfloat16": System(
        "dcgan", settings.DCGANConfig(precision="bfloat16"), 64, (3, 64, 64), _dcgan, tolerance=0.05
    ),
    "conv_vae_64": System(
        "conv-vae", settings.ConvVAEConfig(), 64, (3, 64, 64), lambda d: peers.vae_step(peers.EagerConvVAE(), d)
    ),
}  # fmt: skip
