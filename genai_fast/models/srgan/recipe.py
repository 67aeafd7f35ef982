"""Super-resolution: recipes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from genai_fast.models.common.recipe import Bench, Graph, Networks, Recipe, Values, by_name
from genai_fast.models.srgan import plain, settings
from genai_fast.models.srgan.model import SRGAN, SRResNet
from genai_fast.models.srgan.networks import Enlarger, SRCritic

_GRAPH = Graph({"images": "batch channels small small"}, ("enlarged",))


def _check_side(values: Values) -> None:
    if values["size"] % values["scale"]:
        raise ValueError(f"size: expected a multiple of the scale, {values['scale']}, got {values['size']}")


def _derived(values: Values) -> Values:
    return {"small": values["size"] // values["scale"]}


def _srresnet(values: Values) -> nn.Module:
    _check_side(values)
    return by_name(SRResNet, values).to(memory_format=torch.channels_last)


def _srgan(values: Values) -> nn.Module:
    _check_side(values)
    networks = {"generator": by_name(Enlarger, values), "critic": by_name(SRCritic, values)}
    return by_name(SRGAN, values | networks).to(memory_format=torch.channels_last)


def _loop(networks: Networks, values: Values, device: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    weights = values["scale"], values["adversarial"], values["lr"]
    return plain.srgan_step(networks["generator"], networks["critic"], *weights, device)


RECIPES = (
    Recipe(
        settings.SRRESNET, SRResNet, plain.PlainEnlarger,
        build=_srresnet, derived=_derived, graph=_GRAPH,
        benches=(Bench("srresnet_64", 4, (3, 64, 64)), Bench("srresnet_96", 16, (3, 96, 96), gpu=True)),
    ),
    Recipe(
        settings.SRGAN, SRGAN,
        lambda values: {"generator": plain.PlainEnlarger, "critic": plain.PlainSRCritic},
        build=_srgan, derived=_derived, network=lambda model: model.generator, loop=_loop, graph=_GRAPH,
        benches=(Bench("srgan_64", 4, (3, 64, 64)), Bench("srgan_96", 16, (3, 96, 96), gpu=True)),
    ),
)  # fmt: skip
