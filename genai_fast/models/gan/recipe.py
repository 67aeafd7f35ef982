"""Generative adversarial networks: recipes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from genai_fast.errors import UsageError
from genai_fast.models.common.recipe import Bench, Networks, Recipe, Values, by_name
from genai_fast.models.gan import dcgan, dense, plain, settings
from genai_fast.models.gan.model import GAN, WGANGP

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
        settings.MLP_GAN, GAN,
        lambda values: {"generator": plain.PlainMLPGenerator, "discriminator": plain.PlainMLPDiscriminator},
        build=_pair(dense.MLPGenerator, dense.MLPDiscriminator, init=False), square=False, network=_sampler,
        loop=_loop,
        benches=(Bench("mlp_gan", 128, (1, 28, 28)),),
    ),
    Recipe(
        settings.DCGAN, GAN, _plain_dcgan,
        build=_dcgan, derived=_derived, network=_sampler, loop=_loop,
        benches=(
            Bench("dcgan_64", 64, _SHAPE),
            Bench("dense_dcgan", 128, (1, 28, 28), {"network": "dense"}, tolerance=0.05),
            Bench("dcgan_64_bfloat16", 64, _SHAPE, _BF16, tolerance=0.05),
            Bench("dcgan_64_batch128", 128, _SHAPE, gpu=True),
            Bench("dcgan_64_bfloat16_batch128", 128, _SHAPE, _BF16, tolerance=0.05, gpu=True),
        ),
    ),
    Recipe(
        settings.CGAN, GAN,
        lambda values: {"generator": plain.PlainConditionalGenerator},
        build=_pair(dcgan.ConditionalGenerator, dcgan.ConditionalDiscriminator), labelled=True, network=_sampler,
        loop=None,
    ),
    Recipe(
        settings.WGAN_GP, WGANGP,
        lambda values: {"generator": plain.PlainDCGANGenerator},
        build=_pair(dcgan.DCGANGenerator, dcgan.DCGANDiscriminator, WGANGP), network=_sampler, loop=None,
    ),
)  # fmt: skip
