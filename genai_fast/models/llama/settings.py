"""Llama: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, TextConfig, changed, setting


@dataclass(frozen=True)
class LlamaConfig(TextConfig):
    """Rates and decay: Touvron et al. 2023."""

    layers: int = setting(6, "Transformer blocks", low=1)
    heads: int = setting(6, "attention heads", low=1)
    kv_heads: int = setting(2, "heads of keys and values, a divisor of --heads; 0: as many", low=0)
    width: int = setting(384, "width of the hidden state", low=1)
    head_dim: int = setting(0, "channels of a head, even; 0: width / heads", low=0, high=256)
    hidden: int = setting(0, "hidden channels of the gated MLP; 0: 8/3 of the width, up to a multiple of 32", low=0)
    window: int = setting(0, "tokens that a token sees, with itself; 0: all", low=0)
    full_layers: int = setting(0, "first layers, in which a token sees all tokens in spite of --window", low=0)
    softcap: float = setting(0.0, "attention scores become s tanh(score / s); 0: they stay", low=0)
    rope_theta: float = setting(10000.0, "base of the rotary embedding's wavelengths", above=0)
    rope_scaling: str = setting(
        "",
        "scaling of the rotary embedding: linear:FACTOR or"
        " llama3:FACTOR,LOW_FREQ_FACTOR,HIGH_FREQ_FACTOR,ORIGINAL_MAX_POSITIONS",
    )
    norm_eps: float = setting(1e-5, "added to the mean square in norms", low=0)
    bias: str = setting(
        "none",
        "linear layers with a bias: qkv (queries, keys, values: Qwen 2), attention (its output too), all (the MLP too)",
        choices=("none", "qkv", "attention", "all"),
    )
    qk_norm: bool = setting(False, "normalize the queries and keys of each head (Qwen 3)")
    tied: bool = setting(True, "use the embedding as the weight of the output layer")
    shard: bool = setting(False, "shard weights, gradients and optimizer state across processes (FSDP2)")
    batch_size: int = changed(TextConfig, "batch_size", 16)
    epochs: int = changed(TextConfig, "epochs", 10)
    beta2: float = changed(TextConfig, "beta2", 0.95)
    weight_decay: float = changed(TextConfig, "weight_decay", 0.1)
    warmup: int = changed(TextConfig, "warmup", 100)
    decay: str = changed(TextConfig, "decay", "cosine")


LLAMA = Command(
    "llama",
    "decoder-only Transformer as LLaMA, Mistral and Qwen are",
    LlamaConfig,
    (
        "genai-fast train llama --data BOOK.txt --layers 6 --width 384 --block 256",
        "genai-fast train llama --data LETTERS --init LLAMA-FOLDER --lr 2e-5 --epochs 3",
    ),
)

COMMANDS = (LLAMA,)
