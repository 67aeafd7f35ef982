"""GPT: settings and recipe."""

from dataclasses import dataclass

from genai_fast.config import TextConfig, changed, setting
from genai_fast.models.common.recipe import Bench, Graph, Recipe
from genai_fast.models.gpt import pretrained
from genai_fast.models.gpt.model import GPT
from genai_fast.models.gpt.plain import PlainGPT


@dataclass(frozen=True)
class GPTConfig(TextConfig):
    """Rates and decay: Brown et al. 2020."""

    layers: int = setting(6, "Transformer blocks", low=1)
    heads: int = setting(6, "attention heads", low=1)
    width: int = setting(384, "width of the hidden state", low=1)
    dropout: float = setting(0.1, "dropout probability", low=0, high=0.9)
    shard: bool = setting(False, "shard weights, gradients and optimizer state across processes (FSDP2)")
    batch_size: int = changed(TextConfig, "batch_size", 16)
    epochs: int = changed(TextConfig, "epochs", 10)
    beta2: float = changed(TextConfig, "beta2", 0.95)
    weight_decay: float = changed(TextConfig, "weight_decay", 0.1)
    warmup: int = changed(TextConfig, "warmup", 100)
    decay: str = changed(TextConfig, "decay", "cosine")


_PLAIN = {"dropout": 0.0, "weight_decay": 0.0, "beta2": 0.999}
_GPT2 = {**_PLAIN, "precision": "bfloat16", "block": 1024, "layers": 12, "heads": 12, "width": 768}

RECIPES = (
    Recipe(
        "gpt", "decoder-only Transformer that writes text", GPTConfig, GPT, PlainGPT,
        feed="windows", pretrained=pretrained, graph=Graph({"ids": "batch tokens"}, ("logits",)),
        benches=(
            Bench("gpt_nano", 16, (256,), _PLAIN),
            Bench("gpt_nano_bfloat16", 16, (256,), {**_PLAIN, "precision": "bfloat16"}, tolerance=0.05),
            Bench("gpt2_bfloat16", 8, (1024,), _GPT2, vocabulary=50257, tolerance=0.05, gpu=True),
        ),
        examples=(
            "genai-fast train gpt --data BOOK.txt --layers 6 --width 384 --block 256",
            "genai-fast train gpt --data LETTERS --init gpt-BOOK --lr 1e-4 --epochs 3",
            "genai-fast train gpt --data LETTERS --init GPT2-FOLDER --lr 5e-5 --epochs 3",
        ),
    ),
)  # fmt: skip
