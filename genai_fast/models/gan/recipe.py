"""Generative adversarial networks: recipes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from genai_fast.errors import UsageError
from genai_fast.models.common.recipe import Bench, Networks, Recipe, Values, by_name
from genai_fast.models.gan import dcgan, dense, plain, plain_critics, settings
from genai_fast.models.gan.model import GAN, WGANGP

_DROPOUT = {"dcgan": 0.0, "dense": 0.3, "dense-k4": 0.3}  # of D, as the authors of these networks have it
# Generator, discriminator, and the same in plain PyTorch.
_NETWORKS: dict[str, tuple[type[nn.Module], ...]] = {
    "dcgan": (
        dcgan.DCGANGenerator, dcgan.DCGANDiscriminator, plain.PlainDCGANGenerator, plain.PlainDCGANDiscriminator,
    ),
    "dense": (
        dense.DenseGenerator, dense.DenseDiscriminator, plain.PlainDenseGenerator, plain.PlainDenseDiscriminator,
    ),
    "dense-k4": (
        dense.DenseGeneratorK4, dense.DenseDiscriminator, plain.PlainDenseGeneratorK4, plain.PlainDenseDiscriminator,
    ),
    "keras": (
        dense.KerasGenerator, dense.KerasDiscriminator, plain.PlainKerasGenerator, plain.PlainKerasDiscriminator,
    ),
    "keras-k4": (
        dense.KerasGeneratorK4, dense.KerasDiscriminatorK4, plain.PlainKerasGeneratorK4,
        plain.PlainKerasDiscriminatorK4,
    ),
}  # fmt: skip


def _pair(
    generator: type[nn.Module], discriminator: type[nn.Module], kind: type[GAN] = GAN, *, init: str = "dcgan"
) -> Callable[[Values], nn.Module]:
    """A `build`; init: as DCGAN's authors do it, and in channels_last; as Keras does it; "" leaves PyTorch's own."""

    def build(values: Values) -> nn.Module:
        pair = {"generator": by_name(generator, values), "discriminator": by_name(discriminator, values)}
        if not init:
            return by_name(kind, values | pair)
        begin = dcgan.dcgan_init if init == "dcgan" else dense.keras_init
        pair = {name: begin(network) for name, network in pair.items()}  # both made before
        gan = by_name(kind, values | pair)
        return gan.to(memory_format=torch.channels_last) if init == "dcgan" else gan

    return build


def _dcgan(values: Values) -> nn.Module:
    network, side = values["network"], values["size"]
    if network != "dcgan" and values["spectral"]:
        raise UsageError(f"--spectral: expected --network dcgan, got {network}; remedy: leave one of them out")
    if network != "dcgan" and side % 4:
        raise UsageError(f"--network {network}: expected a side of a multiple of 4, got {side}; remedy: --size")
    if network != "dcgan" and values["attention"]:
        raise UsageError(f"--attention: expected --network dcgan, got {network}; remedy: leave one of them out")
    if network.startswith("keras") and values["dropout"] > 0:
        raise UsageError(f"--dropout: expected none with --network {network}, got {values['dropout']:g}")
    return _pair(*_NETWORKS[network][:2], init=network.partition("-")[0].replace("dense", ""))(values)


def _derived(values: Values) -> Values:
    dropout = values["dropout"] if values["dropout"] >= 0 else _DROPOUT.get(values["network"], 0.0)
    return {"dropout": dropout, "side": values["size"] // 4} | _norm(values)


def _norm(values: Values) -> Values:
    return {"norm": "none" if values["spectral"] else "batch"}


def _plain_dcgan(values: Values) -> dict[str, type[nn.Module]]:
    return dict(zip(("generator", "discriminator"), _NETWORKS[values["network"]][2:], strict=True))


def _loop(networks: Networks, values: Values, device: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return plain.gan_step(networks["generator"], networks["discriminator"], values["latent"], device)


def _conditional_loop(networks: Networks, values: Values, device: str) -> Callable[..., plain_critics.Losses]:
    pair = networks["generator"], networks["discriminator"]
    return plain_critics.cgan_step(*pair, values["latent"], values["classes"], device)


def _critic_loop(networks: Networks, values: Values, device: str) -> Callable[..., plain_critics.Losses]:
    pair = networks["generator"], networks["discriminator"]
    settings = values["latent"], values["n_critic"], values["penalty"], device, values["lr"]
    return plain_critics.wgan_gp_step(*pair, *settings, (values["beta1"], values["beta2"]))


def _sampler(gan: nn.Module) -> nn.Module:
    return gan.sampler


_SHAPE = (3, 64, 64)
_BF16 = {"precision": "bfloat16"}

RECIPES = (
    Recipe(
        settings.MLP_GAN, GAN,
        lambda values: {"generator": plain.PlainMLPGenerator, "discriminator": plain.PlainMLPDiscriminator},
        build=_pair(dense.MLPGenerator, dense.MLPDiscriminator, init=""), square=False, network=_sampler,
        loop=_loop,
        benches=(Bench("mlp_gan", 128, (1, 28, 28)),),
    ),
    Recipe(
        settings.DCGAN, GAN, _plain_dcgan,
        build=_dcgan, derived=_derived, network=_sampler, loop=_loop,
        benches=(
            Bench("dcgan_64", 64, _SHAPE),
            Bench("dense_dcgan", 128, (1, 28, 28), {"network": "dense"}, tolerance=0.05),
            Bench("keras_dcgan", 128, (1, 28, 28), {"network": "keras"}, tolerance=0.05),
            Bench("dcgan_64_bfloat16", 64, _SHAPE, _BF16, tolerance=0.05),
            Bench("dcgan_64_batch128", 128, _SHAPE, gpu=True),
            Bench("dcgan_64_bfloat16_batch128", 128, _SHAPE, _BF16, tolerance=0.05, gpu=True),
        ),
    ),
    Recipe(
        settings.CGAN, GAN,
        lambda values: {
            "generator": plain.PlainConditionalGenerator, "discriminator": plain_critics.PlainConditionalDiscriminator,
        },
        build=_pair(dcgan.ConditionalGenerator, dcgan.ConditionalDiscriminator), derived=_norm, labelled=True,
        network=_sampler, loop=_conditional_loop, benches=(Bench("cgan_64", 64, _SHAPE),),
    ),
    Recipe(
        settings.WGAN_GP, WGANGP,
        lambda values: {"generator": plain.PlainDCGANGenerator, "discriminator": plain_critics.PlainCritic},
        build=_pair(dcgan.DCGANGenerator, dcgan.DCGANDiscriminator, WGANGP), network=_sampler, loop=_critic_loop,
        benches=(Bench("wgan_gp_32", 64, (3, 32, 32)),),
    ),
)  # fmt: skip
