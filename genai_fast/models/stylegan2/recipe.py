"""StyleGAN2: its recipe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from genai_fast.models.common.recipe import Bench, Networks, Recipe, Values, by_name
from genai_fast.models.stylegan2 import plain, settings
from genai_fast.models.stylegan2.model import StyleGAN2
from genai_fast.models.stylegan2.networks import StyleDiscriminator, StyleGenerator


def _build(values: Values) -> nn.Module:
    networks = {"generator": by_name(StyleGenerator, values), "discriminator": by_name(StyleDiscriminator, values)}
    return by_name(StyleGAN2, values | networks).to(memory_format=torch.channels_last)


def _loop(networks: Networks, values: Values, device: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    betas = values["beta1"], values["beta2"]
    weights = values["gamma"], values["path"], values["mixing"]
    return plain.stylegan2_step(networks["generator"], networks["discriminator"], values["lr"], betas, *weights, device)


RECIPES = (
    Recipe(
        settings.STYLEGAN2, StyleGAN2,
        lambda values: {"generator": plain.PlainStyleGenerator, "discriminator": plain.PlainStyleDiscriminator},
        build=_build, network=lambda model: model.sampler, loop=_loop,
        benches=(
            Bench("stylegan2_32", 16, (3, 32, 32), {"ema": 0.0}),
            Bench("stylegan2_64_batch32", 32, (3, 64, 64), {"ema": 0.0, "latent": 512}, gpu=True),
        ),
    ),
)  # fmt: skip
