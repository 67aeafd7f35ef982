"""The variational recurrent network: settings and recipe."""

from dataclasses import dataclass

from genai_fast.config import TextConfig, changed, setting
from genai_fast.models.common.recipe import Bench, Graph, Recipe
from genai_fast.models.vrnn.model import VRNN
from genai_fast.models.vrnn.plain import PlainVRNN


@dataclass(frozen=True)
class VRNNConfig(TextConfig):
    embedding: int = setting(64, "width of a token's embedding", low=1)
    hidden: int = setting(256, "width of the recurrent state", low=1)
    latent: int = setting(32, "dimensions of each step's latent", low=1)
    beta: float = setting(1.0, "weight of the KL term", low=0)
    batch_size: int = changed(TextConfig, "batch_size", 32)
    block: int = changed(TextConfig, "block", 64)


RECIPES = (
    Recipe(
        "vrnn", "variational recurrent network over text", VRNNConfig, VRNN, PlainVRNN,
        feed="windows", unrolled=True,
        graph=Graph(
            {"ids": "batch", "phi_z": "batch embedding", "h": "batch hidden", "noise": "batch latent"},
            ("logits", "phi_z_after", "h_after"), "step",
        ),
        benches=(Bench("vrnn", 32, (64,), vocabulary=256),),
        examples=("genai-fast train vrnn --data BOOK.txt --tokenizer char --block 64",),
    ),
)  # fmt: skip
