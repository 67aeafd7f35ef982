"""The VQ-VAE and its prior: settings."""

from __future__ import annotations

from dataclasses import dataclass

from genai_fast.config import Command, ImageConfig, changed, setting
from genai_fast.models.gpt.settings import GPTConfig


@dataclass(frozen=True)
class VQVAEConfig(ImageConfig):
    codebook: int = setting(512, "codes in the codebook", low=1, high=1 << 20)
    embedding: int = setting(64, "numbers of a code", low=1)
    hidden: int = setting(128, "channels of the feature maps", low=2)
    blocks: int = setting(2, "residual blocks in the encoder, and in the decoder", low=0)
    halvings: int = setting(2, "halvings of the side from the image to its plane of codes", low=1, high=10)
    commitment: float = setting(0.25, "weight of the vectors' distance from their codes", low=0)
    codebook_decay: float = setting(
        0.99,
        "decay of the moving averages that the codes are; 0: the codes are trained by gradients",
        low=0,
        high=0.9999,
    )
    revive: float = setting(
        0.1,
        "share of an equal use of all codes below which a code is replaced by a vector of the batch",
        low=0,
        high=0.9,
    )


@dataclass(frozen=True)
class VQGPTConfig(ImageConfig):
    """The sizes of the VQ-VAE are those of the run `codes`; rates and decay as of gpt."""

    codes: str = setting("", "run of vq-vae whose codes it learns; data and their split are that run's by default")
    codebook: int = changed(VQVAEConfig, "codebook", 512)
    embedding: int = changed(VQVAEConfig, "embedding", 64)
    hidden: int = changed(VQVAEConfig, "hidden", 128)
    blocks: int = changed(VQVAEConfig, "blocks", 2)
    halvings: int = changed(VQVAEConfig, "halvings", 2)
    layers: int = changed(GPTConfig, "layers", 4)
    heads: int = changed(GPTConfig, "heads", 4)
    width: int = changed(GPTConfig, "width", 256)
    dropout: float = changed(GPTConfig, "dropout", 0.1)
    batch_size: int = changed(ImageConfig, "batch_size", 64)
    clip: float = changed(ImageConfig, "clip", 1.0)
    beta2: float = changed(ImageConfig, "beta2", 0.95)
    weight_decay: float = changed(ImageConfig, "weight_decay", 0.1)
    warmup: int = changed(ImageConfig, "warmup", 100)
    decay: str = changed(ImageConfig, "decay", "cosine")


VQ_VAE = Command(
    "vq-vae",
    "autoencoder whose latents are codes of a codebook",
    VQVAEConfig,
    (
        "genai-fast train vq-vae --data mnist --epochs 20",
        "genai-fast train vq-vae --data PHOTOS --size 128 --halvings 3 --precision bfloat16",
    ),
)
VQ_GPT = Command(
    "vq-gpt",
    "Transformer that draws the codes of a vq-vae, of a class where the data have labels",
    VQGPTConfig,
    (
        "genai-fast train vq-gpt --codes vq-vae-mnist --epochs 30",
        "genai-fast train vq-gpt --codes vq-vae-PHOTOS --layers 6 --width 384 --heads 6",
    ),
)

COMMANDS = (VQ_VAE, VQ_GPT)
