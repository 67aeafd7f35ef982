"""Tiny models of transformers and diffusers with random weights; nothing is downloaded."""

import torch

VOCABULARY, TOKENS = 96, 24

_SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
# Class of the configuration and of the model, and settings of its own.
_LANGUAGE = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=8)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(sliding_window=8, query_pre_attn_scalar=16)),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(sliding_window=8, query_pre_attn_scalar=16)),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        dict(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY),
    ),
}  # fmt: skip
LANGUAGE_MODELS = tuple(_LANGUAGE)
WITH_RMS_NORM = tuple(name for name in _LANGUAGE if name != "gpt2")


def language_model(name: str, **settings):
    """In training mode, without dropout."""
    import transformers

    config, model, more = _LANGUAGE[name]
    given = {**({} if name == "gpt2" else _SMALL), **more, **settings}
    if name == "gpt2":
        given = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2, **given)
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**given)).train()
    with torch.no_grad():  # weights of norms that are not all 1
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(batch: int = 2, seed: int = 1):
    return torch.randint(3, VOCABULARY, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def autoencoder():
    """diffusers' AutoencoderKL, of two levels."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=16,
    ).train()  # fmt: skip


def unet(**settings):
    """diffusers' UNet2DModel, of two levels, one with attention."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, **settings,
    ).train()  # fmt: skip
