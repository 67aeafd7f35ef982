"""The library ops of causal_attention and decode_attention: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.causal_attention.layout import empty_alike
from genai_fast.kernels.common.schema import LibraryOp, wide_dtype

_SETTINGS = "float scale, SymInt window, float softcap, bool causal, float share, SymInt offset, str backend"
_PACKED = "Tensor? starts_q, Tensor? starts_k, SymInt most_q, SymInt most_k, Tensor? seed"


def _empty_lse(q):
    return torch.empty(q.shape[:3], dtype=wide_dtype(q), device=q.device)


CAUSAL_LIBRARY = (
    LibraryOp(
        f"causal_attention(Tensor q, Tensor k, Tensor v, {_PACKED}, {_SETTINGS}) -> (Tensor, Tensor)",
        lambda q, *rest: (empty_alike(q), _empty_lse(q)),
    ),
    LibraryOp(
        "causal_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
        f" Tensor lse, {_PACKED}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
        lambda grad_out, grad_lse, q, k, v, *rest: tuple(empty_alike(x) for x in (q, k, v)),
    ),
)
DECODE_LIBRARY = (
    LibraryOp(
        "decode_attention(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? k, Tensor? v,"
        " float scale, SymInt window, float softcap, str backend) -> (Tensor, Tensor)",
        lambda q, *rest: (empty_alike(q), _empty_lse(q)),
    ),
)
LIBRARY = (*CAUSAL_LIBRARY, *DECODE_LIBRARY)
