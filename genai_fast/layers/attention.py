"""nn.MultiheadAttention whose attention is one call of ours."""

import functools
from typing import Any

from torch import nn

from genai_fast.fusion import multihead
from genai_fast.fusion.classes import replaced_forward

_MORE = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


class MultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention: same constructor, keys and results; where no weights are asked for, attention is one call.

    `need_weights=False`, then, with no mask or a causal one (on CUDA only by `is_causal=True`), and batches of three
    dimensions. Dropout draws other numbers than PyTorch's; torch.manual_seed reproduces them. All else is PyTorch's
    own: weights, other masks, `add_bias_kv`, `add_zero_attn`, torch.compile, torch.func, and dtypes other than
    float32 on a CPU, float16 and bfloat16 on CUDA. Unlike PyTorch's kernels ours has second derivatives.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as for
            nn.MultiheadAttention.
    """

    @functools.wraps(nn.MultiheadAttention.forward)
    def forward(self, query: Any, key: Any, value: Any, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        if (now := replaced_forward(self)) is not None:
            return now(self, query, key, value, *args, **named)
        given = dict(zip(_MORE, args, strict=False)) | named
        usual = len(args) <= len(_MORE) and given.keys() <= set(_MORE)  # else PyTorch says what is wrong
        given.pop("average_attn_weights", None)
        if given.pop("need_weights", True) or not usual or not multihead.is_served(self, query, key, value, **given):
            return super().forward(query, key, value, *args, **named)
        return multihead.attend(self, query, key, value, given.get("attn_mask") is not None), None
