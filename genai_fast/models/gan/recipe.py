"""Generative adversarial networks: settings and recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from genai_fast.config import ImageConfig, changed, setting
from genai_fast.errors import UsageError
from genai_fast.models.common.recipe import Bench, Networks, Recipe, Values, by_name
from genai_fast.models.gan import dcgan, dense, plain
from genai_fast.models.gan.model import GAN, WGANGP


@dataclass(frozen=True)
class GANConfig(ImageConfig):
    """What all pairs share. Rates: Radford et al. 2015."""

    lr: float = changed(ImageConfig, "lr", 2e-4)
    beta1: float = changed(ImageConfig, "beta1", 0.5)
    lr_discriminator: float = setting(0.0, "learning rate of the discriminator; 0: that of --lr", low=0)
    latent: int = setting(100, "dimensions of the latent space", low=1)
    smoothing: float = setting(0.0, "one-sided label smoothing: target 1 - x for real images", low=0, high=0.9)
    ema: float = setting(0.0, "decay of the generator's exponential moving average; 0: none", low=0, high=0.99999)


@dataclass(frozen=True)
class DCGANConfig(GANConfig):
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    network: str = setting(
        "dcgan",
        "dcgan (28, 32, 64 or 128 pixels); dense, dense-k4: dense layer first, dropout in the discriminator",
        choices=("dcgan", "dense", "dense-k4"),
    )
    width: int = setting(64, "channels of the largest feature maps (dcgan)", low=1)
    dropout: float = setting(
        -1.0, "dropout probability in the discriminator; -1: that of its authors", low=-1, high=0.9
    )
    spectral: bool = setting(False, "spectral norm instead of batch norm in the discriminator")


@dataclass(frozen=True)
class ConditionalGANConfig(GANConfig):
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    width: int = setting(64, "channels of the largest feature maps", low=1)


@dataclass(frozen=True)
class WGANGPConfig(GANConfig):
    """Rates: Gulrajani et al. 2017."""

    lr: float = changed(ImageConfig, "lr", 1e-4)
    beta1: float = changed(ImageConfig, "beta1", 0.0)
    beta2: float = changed(ImageConfig, "beta2", 0.9)
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    n_critic: int = setting(5, "critic updates per generator update", low=1)
    penalty: float = setting(10.0, "weight of the gradient penalty", low=0)
    norm: str = setting("instance", "norm in the critic", choices=("instance", "none"))
    width: int = setting(64, "channels of the largest feature maps", low=1)


_DROPOUT = {"dcgan": 0.0, "dense": 0.3, "dense-k4": 0.3}  # of D, as the authors of these networks have it
_GENERATORS = {
    "dense": (dense.DenseGenerator, plain.PlainDenseGenerator),
    "dense-k4": (dense.DenseGeneratorK4, plain.PlainDenseGeneratorK4),
}


def _pair(
    generator: type[nn.Module], discriminator: type[nn.Module], kind: type[GAN] = GAN, *, init: bool = True
) -> Callable[[Values], nn.Module]:
    """A `build`; init: as DCGAN's authors do it, and in channels_last."""

    def build(values: Values) -> nn.Module:
        pair = {"generator": by_name(generator, values), "discriminator": by_name(discriminator, values)}
        if not init:
            return by_name(kind, values | pair)
        pair = {name: dcgan.dcgan_init(network) for name, network in pair.items()}  # both made before
        return by_name(kind, values | pair).to(memory_format=torch.channels_last)

    return build


def _dcgan(values: Values) -> nn.Module:
    network, side = values["network"], values["size"]
    if network == "dcgan":
        return _pair(dcgan.DCGANGenerator, dcgan.DCGANDiscriminator)(values)
    if values["spectral"]:
        raise UsageError(f"--spectral: expected --network dcgan, got {network}; remedy: leave one of them out")
    if side % 4:
        raise UsageError(f"--network {network}: expected a side of a multiple of 4, got {side}; remedy: --size")
    return _pair(_GENERATORS[network][0], dense.DenseDiscriminator, init=False)(values)


def _derived(values: Values) -> Values:
    dropout = values["dropout"] if values["dropout"] >= 0 else _DROPOUT[values["network"]]
    return {"dropout": dropout, "norm": "none" if values["spectral"] else "batch", "side": values["size"] // 4}


def _plain_dcgan(values: Values) -> dict[str, type[nn.Module]]:
    if values["network"] == "dcgan":
        return {"generator": plain.PlainDCGANGenerator, "discriminator": plain.PlainDCGANDiscriminator}
    return {"generator": _GENERATORS[values["network"]][1], "discriminator": plain.PlainDenseDiscriminator}


def _loop(networks: Networks, values: Values, device: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return plain.gan_step(networks["generator"], networks["discriminator"], values["latent"], device)


def _sampler(gan: nn.Module) -> nn.Module:
    return gan.sampler


_SHAPE = (3, 64, 64)
_BF16 = {"precision": "bfloat16"}

RECIPES = (
    Recipe(
        "mlp-gan", "generative adversarial network of dense layers", GANConfig, GAN,
        lambda values: {"generator": plain.PlainMLPGenerator, "discriminator": plain.PlainMLPDiscriminator},
        build=_pair(dense.MLPGenerator, dense.MLPDiscriminator, init=False), square=False, network=_sampler,
        loop=_loop,
        benches=(Bench("mlp_gan", 128, (1, 28, 28)),),
        examples=("genai-fast train mlp-gan --data mnist --smoothing 0.1",),
    ),
    Recipe(
        "dcgan", "deep convolutional GAN", DCGANConfig, GAN, _plain_dcgan,
        build=_dcgan, derived=_derived, network=_sampler, loop=_loop,
        benches=(
            Bench("dcgan_64", 64, _SHAPE),
            Bench("dense_dcgan", 128, (1, 28, 28), {"network": "dense"}, tolerance=0.05),
            Bench("dcgan_64_bfloat16", 64, _SHAPE, _BF16, tolerance=0.05),
            Bench("dcgan_64_batch128", 128, _SHAPE, gpu=True),
            Bench("dcgan_64_bfloat16_batch128", 128, _SHAPE, _BF16, tolerance=0.05, gpu=True),
        ),
        examples=(
            "genai-fast train dcgan --data PHOTOS --size 64 --flip 0.5 --ema 0.999",
            "genai-fast train dcgan --data mnist --network dense --epochs 30",
            "genai-fast train dcgan --run dcgan-PHOTOS --resume --epochs 100",
        ),
    ),
    Recipe(
        "cgan", "conditional DCGAN, for labelled images", ConditionalGANConfig, GAN,
        lambda values: {"generator": plain.PlainConditionalGenerator},
        build=_pair(dcgan.ConditionalGenerator, dcgan.ConditionalDiscriminator), labelled=True, network=_sampler,
        loop=None,
        examples=("genai-fast train cgan --data mnist --width 32",),
    ),
    Recipe(
        "wgan-gp", "Wasserstein GAN with gradient penalty", WGANGPConfig, WGANGP,
        lambda values: {"generator": plain.PlainDCGANGenerator},
        build=_pair(dcgan.DCGANGenerator, dcgan.DCGANDiscriminator, WGANGP), network=_sampler, loop=None,
        examples=("genai-fast train wgan-gp --data cifar-10-batches-py --n-critic 5 --penalty 10",),
    ),
)  # fmt: skip
