"""A decoder-only Transformer with GPT-2's names, on the fused ops."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast import ops
from genai_fast.layers import LayerNorm
from genai_fast.models.common import checks
from genai_fast.models.common.generation import WriteOn
from genai_fast.models.common.language import TiedHead, head_loss
from genai_fast.models.common.protocol import Decoder
from genai_fast.models.common.submodules import first_rows, linear_gelu, norm_of_sum
from genai_fast.models.gpt import checkpoint

# (layer, q, k, v), each [B, H, T, D] -> [B, H, T, D]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class GPTLosses(NamedTuple):
    loss: torch.Tensor  # nats a token, 0-d float32


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: torch.Tensor, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        # Views of one projection; split along its last dimension, so that their gradients join in one pass.
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.c_attn(x).split(x.size(2), 2))
        return self.c_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(linear_gelu(self.c_fc, x))


class _Block(nn.Module):
    """(branch, h) -> (branch, h): what is still to be added to the stream h goes with it into the next norm."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.ln_1 = LayerNorm(width, bias=bias)
        self.attn = _Attention(width, heads, bias)
        self.ln_2 = LayerNorm(width, bias=bias)
        self.mlp = _MLP(width, bias)

    def forward(
        self, branch: torch.Tensor | None, h: torch.Tensor, attend: Callable[..., torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, h = (self.ln_1(h), h) if branch is None else norm_of_sum(self.ln_1, branch, h)
        y, h = norm_of_sum(self.ln_2, _dropped(self.attn(y, attend), self), h)
        return _dropped(self.mlp(y), self), h


class GPT(WriteOn, TiedHead):
    """A decoder-only Transformer: pre-norm blocks, GELU (tanh), learned positions, the head tied to the embedding.

    Parameters have GPT-2's names: transformer.wte, .wpe, .h.<i>.ln_1, .attn.c_attn, .attn.c_proj, .ln_2, .mlp.c_fc,
    .mlp.c_proj, transformer.ln_f and lm_head; matrices are [out, in]. `GPT.from_gpt2` reads GPT-2's files.

    Args:
        vocabulary: number of token ids.
        block: the most tokens that it sees at once.
        layers, heads, width: blocks, attention heads in each, channels; heads divides width.
        dropout: share dropped of the embedding, the attention's probabilities and each branch, in [0, 1).
        bias: whether the linear layers and norms have biases.

    Initialised as GPT-2: N(0, 0.02), biases 0, both projections into the stream N(0, 0.02 / sqrt(2 layers)).
    Under autocast the stream between the blocks stays float32; everything else is in autocast's dtype.
    Raises: ValueError on sizes that do not fit.
    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners; Vaswani et al. 2017.
    """

    embedding = "transformer.wte"

    def __init__(
        self, vocabulary: int, block: int = 256, layers: int = 6, heads: int = 6, width: int = 384, *,
        dropout: float = 0.0, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.positive("GPT", vocabulary=vocabulary, block=block, layers=layers, heads=heads, width=width)
        if width % heads:
            raise ValueError(f"GPT: heads: expected a divisor of width={width}, got {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"GPT: dropout: expected 0 <= dropout < 1, got {dropout}")
        self.vocabulary, self.block, self.heads, self.width, self.dropout = vocabulary, block, heads, width, dropout
        embeddings = {"wte": nn.Embedding(vocabulary, width), "wpe": nn.Embedding(block, width)}
        blocks = nn.ModuleList(_Block(width, heads, dropout, bias) for _ in range(layers))
        self.transformer = nn.ModuleDict({**embeddings, "h": blocks, "ln_f": LayerNorm(width, bias=bias)})
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.tie_head()
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    @classmethod
    def nano(cls, vocabulary: int, block: int = 256, *, dropout: float = 0.0) -> GPT:
        """6 layers of 6 heads, 384 channels: 10.6 M parameters beside the embeddings."""
        return cls(vocabulary, block, 6, 6, 384, dropout=dropout)

    @classmethod
    def gpt2(cls, vocabulary: int = 50257, block: int = 1024, *, dropout: float = 0.0) -> GPT:
        """The smallest GPT-2: 12 layers of 12 heads, 768 channels, 124 M parameters."""
        return cls(vocabulary, block, 12, 12, 768, dropout=dropout)

    @classmethod
    def from_gpt2(cls, path: str | os.PathLike[str], *, heads: int | None = None) -> GPT:
        """The model of a GPT-2 checkpoint: .safetensors, a torch file of tensors, or a folder with one of the two.

        Args:
            path: nothing in the file is executed; layouts as of `load_gpt2`. A config.json in the folder counts.
            heads: what the files say if None, and width / 64 if they say nothing.

        Raises:
            UsageError: the file cannot be read, is no such checkpoint, or its settings are of another network.
            ValueError: as `load_gpt2`.
        """
        from genai_fast.data import gpt2_files  # a model that reads no file does without data's modules

        tensors, heads = gpt2_files.read(path, heads)
        return load_gpt2(None, tensors, heads=heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T], int64 (or int32), T <= block -> logits [B, T, V] of the token after each."""
        return self.lm_head(self._features(x))

    def training_step(self, x: torch.Tensor, y: torch.Tensor) -> GPTLosses:
        """The cross-entropy of y [B, T] given x [B, T], both int64; positions where y is -100 do not count."""
        return GPTLosses(head_loss(self.lm_head, self._features(x), y, self.vocabulary))

    def run(self, x: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Ids [B, T] and rows of positions [T, C] or [B, T, C] -> what the head multiplies, [B, T, C].

        `attend` is the attention of each layer: here generation keeps its keys and values.
        """
        branch, h = None, _dropped(self.transformer.wte(x) + positions, self)
        for layer, block in enumerate(self.transformer.h):
            branch, h = block(branch, h, functools.partial(attend, layer))
        return norm_of_sum(self.transformer.ln_f, branch, h)[0]

    def check_ids(self, x: torch.Tensor) -> None:
        """x is [B, T] of ids with 1 <= T <= block; the ids themselves are looked at on the CPU alone."""
        checks.text("GPT", x, self.vocabulary, self.block)

    def cached_decoder(self, batch: int, weights: str = "float32") -> Decoder:
        """See `models.decoder_for`."""
        from genai_fast.models.gpt.decoding import cached_decoder  # which knows this class

        return cached_decoder(self, batch, weights)

    def shards(self) -> list[list[nn.Module]]:
        """The modules whose weights, gradients and optimizer state are divided together among processes."""
        return [[block.attn, block.mlp] for block in self.transformer.h]

    def extra_repr(self) -> str:
        return (
            f"vocabulary={self.vocabulary}, block={self.block}, layers={len(self.transformer.h)}, heads={self.heads},"
            f" width={self.width}, dropout={self.dropout:g}"
        )

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        self.check_ids(x)
        p = self.dropout if self.training else 0.0
        places = first_rows(self.transformer.wpe, x.size(1), x.device)
        return self.run(x, places, lambda layer, q, k, v: ops.causal_attention(q, k, v, dropout=p))


def load_gpt2(model: GPT | None, tensors: Mapping[str, Any], *, heads: int | None = None) -> GPT:
    """Put the tensors of a GPT-2 checkpoint into a model, or into a new one of their sizes.

    Args:
        model: of the checkpoint's sizes; None: a new one, on the CPU in float32, without dropout.
        tensors: name -> tensor. Names with or without "transformer." and torch.compile's "_orig_mod."; matrices
            [in, out] (Conv1D, Hugging Face) or [out, in] (nn.Linear); "attn.bias" and "attn.masked_bias" are masks and
            left out; lm_head.weight may be missing.
        heads: of a new model; width / 64 if None, which is what GPT-2's own have.

    Returns: the model.
    Raises: ValueError on a tensor that is missing, unexpected, of another shape, or an lm_head that is not tied,
        before the model is changed.
    """
    state, sizes = checkpoint.converted(tensors)
    if model is None:
        if heads is None and sizes["width"] % 64:
            raise ValueError(
                f"load_gpt2: heads: expected a number of heads, as a width of {sizes['width']} is no multiple of 64,"
                f" got None; remedy: heads="
            )
        with torch.device("meta"):
            model = GPT(**sizes, heads=heads or sizes["width"] // 64)
        checkpoint.check(state, model.state_dict())
        model.to_empty(device="cpu")
    else:
        checkpoint.check(state, model.state_dict())
    model.load_state_dict(state)
    return model


def _dropped(x: torch.Tensor, module: GPT | _Block) -> torch.Tensor:
    if not (module.training and module.dropout):
        return x
    return ops.act_dropout(x, module.dropout, True, "none")
