"""The VQ-VAE and its prior: recipes."""

from __future__ import annotations

from genai_fast.models.common.recipe import Bench, Graph, Recipe, Values, channels_last
from genai_fast.models.vq_vae import settings
from genai_fast.models.vq_vae.model import VQVAE
from genai_fast.models.vq_vae.plain import PlainVQGPT, PlainVQVAE
from genai_fast.models.vq_vae.prior import VQGPT


def _block(values: Values) -> Values:
    """The tokens that the GPT sees at once."""
    return {"block": (values["size"] >> values["halvings"]) ** 2}


RECIPES = (
    Recipe(
        settings.VQ_VAE, VQVAE, PlainVQVAE, build=channels_last(VQVAE),
        benches=(
            Bench("vq_vae", 128, (1, 28, 28)),
            Bench("vq_vae_64", 32, (3, 64, 64)),
            Bench("vq_vae_256", 32, (3, 256, 256), {"halvings": 3}, gpu=True),
        ),
    ),
    Recipe(
        settings.VQ_GPT, VQGPT, PlainVQGPT, build=channels_last(VQGPT), derived=_block, labels_if_any=True,
        graph=Graph({"ids": "batch tokens"}, ("logits",), "logits"), codes_of="vq-vae",
        benches=(Bench("vq_gpt", 64, (1, 28, 28), {"layers": 3, "heads": 6, "width": 192}),),
    ),
)  # fmt: skip
