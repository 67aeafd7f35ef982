"""Image-to-image translation: recipes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from genai_fast.models.common.recipe import Bench, Graph, Networks, Recipe, Values, by_name
from genai_fast.models.translation import plain, settings
from genai_fast.models.translation.model import CycleGAN, Pix2Pix
from genai_fast.models.translation.networks import PatchCritic, ResNetGenerator, UNetGenerator, initialized, least_side

_LARGE = 256  # pixels from which on the authors take 9 residual blocks
_GRAPH = Graph({"images": "batch channels size size"}, ("translations",))


def _check_side(values: Values) -> None:
    side, least = values["size"], least_side(values["critic_layers"])
    if side % 4 or side < least:
        raise ValueError(
            f"size: expected a multiple of 4 and at least {least} pixels for {values['critic_layers']} critic_layers,"
            f" got {side}"
        )


def _cyclegan(values: Values) -> nn.Module:
    _check_side(values)
    generators = {name: initialized(by_name(ResNetGenerator, values)) for name in ("to_b", "to_a")}
    critics = {name: initialized(by_name(PatchCritic, values)) for name in ("critic_b", "critic_a")}
    return by_name(CycleGAN, values | generators | critics).to(memory_format=torch.channels_last)


def _pix2pix(values: Values) -> nn.Module:
    _check_side(values)
    of_pairs = values | {"channels": 2 * values["channels"], "affine": True}
    networks = {"to_b": by_name(UNetGenerator, values), "critic": by_name(PatchCritic, of_pairs)}
    networks = {name: initialized(network) for name, network in networks.items()}
    return by_name(Pix2Pix, values | networks).to(memory_format=torch.channels_last)


def _cyclegan_loop(networks: Networks, values: Values, device: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    weights = values["cycle"], values["identity"], values["pool"]
    return plain.cyclegan_step(networks, *weights, values["lr"], device)


def _pix2pix_loop(networks: Networks, values: Values, device: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    return plain.pix2pix_step(networks["to_b"], networks["critic"], values["l1"], values["lr"], device)


_BF16 = {"precision": "bfloat16"}

RECIPES = (
    Recipe(
        settings.CYCLEGAN, CycleGAN,
        lambda values: {
            **dict.fromkeys(("to_b", "to_a"), plain.PlainResNetGenerator),
            **dict.fromkeys(("critic_b", "critic_a"), plain.PlainPatchCritic),
        },
        build=_cyclegan, derived=lambda values: {"blocks": values["blocks"] or (9 if values["size"] >= _LARGE else 6)},
        network=lambda model: model.to_b, loop=_cyclegan_loop, graph=_GRAPH,
        benches=(
            Bench("cyclegan_64", 1, (3, 64, 64)),
            Bench("cyclegan_256", 1, (3, 256, 256), gpu=True),
            Bench("cyclegan_256_bfloat16", 1, (3, 256, 256), _BF16, tolerance=0.05, gpu=True),
        ),
    ),
    Recipe(
        settings.PIX2PIX, Pix2Pix,
        lambda values: {"to_b": plain.PlainUNetGenerator, "critic": plain.PlainPairCritic},
        build=_pix2pix, pairs=True, network=lambda model: model.to_b, loop=_pix2pix_loop, graph=_GRAPH,
        benches=(
            Bench("pix2pix_64", 1, (3, 64, 64), {"dropout": 0.0}),
            Bench("pix2pix_256", 1, (3, 256, 256), {"dropout": 0.0}, gpu=True),
            Bench("pix2pix_256_bfloat16", 1, (3, 256, 256), {"dropout": 0.0, **_BF16}, tolerance=0.05, gpu=True),
        ),
    ),
)  # fmt: skip
