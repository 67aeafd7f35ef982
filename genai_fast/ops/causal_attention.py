"""Scaled dot-product attention that never holds the matrix of scores: causal, windowed, grouped-query, packed."""

import itertools
import math
from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.ops import checks, rows
from genai_fast.ops.dispatch import KernelFunction, backward_call, library_call
from genai_fast.ops.planned import planned
from genai_fast.precision import autocast_dtype

_OP = "causal_attention"
MOST_CHANNELS = 256


class _CausalAttention(KernelFunction):
    @staticmethod
    def forward(q, k, v, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal, p, offset, backend):
        return library_call(
            "causal_attention", q, k, v, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal, p,
            offset, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, starts_q, starts_k, most_q, most_k, seed, *ctx.settings, ctx.backend = inputs
        ctx.most = most_q, most_k
        ctx.save_for_backward(q, k, v, *output, starts_q, starts_k, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return {}
        q, k, v, out, lse, starts_q, starts_k, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        arguments = (grad_out, grad_lse, q, k, v, out, lse, starts_q, starts_k, *ctx.most, seed, *ctx.settings)
        grad_q, grad_k, grad_v = backward_call("causal_attention_backward", *arguments, ctx.backend)
        return dict(q=grad_q, k=grad_k, v=grad_v)


@planned
def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v over the keys that each query sees, without the matrix of scores in memory.

    Query i is at position i + T_k - T_q among the keys (the last query at the last key) and, if causal, sees no
    key after it. A query that sees none gives 0, with an lse of -inf and gradients of 0.

    Args:
        q: [B, H, T_q, D], float32, bfloat16, float16 or float64; D at most 256. Any strides but the last, which
            is 1: views of one packed projection are taken as they lie.
        k, v: [B, H_kv, T_k, D], where H_kv divides H: each key head serves H / H_kv query heads in a row.
        scale: of the scores, 1 / sqrt(D) if None.
        window: a query sees its own and the window - 1 positions before it (and after it, if not causal).
        softcap: scores become softcap * tanh(score / softcap).
        causal: whether keys after a query are hidden; T_k >= T_q then.
        dropout: share of the probabilities that are dropped, in [0, 1], the others grow by 1 / (1 - dropout).
        seed: of dropout: an int, a 0-d int64 tensor on q's device, or None to draw one from its default generator.
        offset: of dropout: rows [B, H, T_q] of the global tensor that come before this one.
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1], 0 first, rising, T last: where each of N sequences, packed one
            after the other in T, begins; B is 1. cu_seqlens_k is cu_seqlens_q if None.
        max_seqlen_q, max_seqlen_k: the longest sequence. Without them a GPU has to be waited for at every call, to
            read (and check) the beginnings.
        return_lse: also return the logarithm of the sum of exp(score) of each row, before dropout.

    Returns: out [B, H, T_q, D] of q's dtype, dense, in q's order of memory: of a view of a projection [B, T, H D] comes
        one that .transpose(1, 2).flatten(2) takes back without a copy. With return_lse (out, lse), lse float32 [B, H,
        T_q].
    Under autocast q, k and v are cast to its dtype.
    Gradients: q, k, v, from out and lse, to any order (the second and higher through plain PyTorch, which holds the
    scores; torch.compile refuses those). Two backward passes by our kernels give the same bits.
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64). On CUDA plain calls in 16 bits go to the
        fastest of our kernels, cuDNN's and PyTorch's flash attention, measured once for each shape
        (genai_fast.autotune); GENAI_FAST_DETERMINISTIC=1, torch.use_deterministic_algorithms and
        use_backend("triton") keep them with ours.
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated.
    Source: Vaswani et al. 2017; Dao et al. 2022 (FlashAttention); Ainslie et al. 2023 (grouped-query attention).
    """
    check_heads(_OP, q, k, v, "k", "v")
    dtype = autocast_dtype(q.device.type)
    if dtype is not None and q.dtype is not torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    for name, x in (("k", k), ("v", v)):
        checks.same_dtype(_OP, name, x, "q", q)
    settings = scores_settings(_OP, q, scale, window, softcap)
    causal, dropout = checks.flag(_OP, "causal", causal), checks.share(_OP, "dropout", dropout)
    offset = checks.offset(_OP, offset)
    most_q, most_k = q.size(2), k.size(2)
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        cu_seqlens_q, most_q = _sequences("q", cu_seqlens_q, q, max_seqlen_q)
        cu_seqlens_k, most_k = _sequences("k", cu_seqlens_k, k, max_seqlen_k)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"{_OP}: cu_seqlens_k: expected {cu_seqlens_q.numel()} beginnings as cu_seqlens_q has,"
                f" got {cu_seqlens_k.numel()}; give both for the same sequences"
            )
    elif causal and most_k < most_q:
        raise ValueError(
            f"{_OP}: k: expected at least {most_q} positions as q has, got {most_k}: the first queries would see none;"
            f" set causal=False"
        )
    if seed is None and not offset:
        offset = rows.offset(q.numel() // max(q.size(-1), 1))
    seed = checks.seed(_OP, seed, "q", q) if dropout > 0 else None
    out, lse = _CausalAttention.call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, most_q, most_k, seed, *settings, causal, dropout, offset, forced_backend()
    )
    return (out, lse) if return_lse else out


def check_heads(op: str, q: Any, k: Any, v: Any, k_name: str, v_name: str) -> None:
    """q [B, H, T_q, D], k and v [B, H_kv, T_k, D] with dense channels, on one device."""
    for name, x in (("q", q), (k_name, k), (v_name, v)):
        checks.is_floating(op, name, x)
        if x.dim() != 4:
            raise ValueError(f"{op}: {name}: expected [B, H, T, D], got shape {tuple(x.shape)}; reshape it")
        if name != "q":
            checks.same_device(op, name, x, "q", q)
        if x.size(3) > 1 and x.stride(3) != 1:
            raise ValueError(
                f"{op}: {name}: expected a last dimension of stride 1, got stride {x.stride(3)}; call .contiguous()"
            )
    batch, heads, _, channels = q.shape
    if not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(
            f"{op}: q: expected a head dimension of 1 to {MOST_CHANNELS}, got {channels};"
            f" split the heads, or use torch's scaled_dot_product_attention"
        )
    if k.size(0) != batch or k.size(3) != channels:
        raise ValueError(
            f"{op}: {k_name}: expected batch {batch} and head dimension {channels} as q has, got shape"
            f" {tuple(k.shape)}; [B, H_kv, T_k, D]"
        )
    if not k.size(1) or heads % k.size(1):
        raise ValueError(
            f"{op}: {k_name}: expected a number of heads that divides q's {heads}, got {k.size(1)}; repeat or drop some"
        )
    if v.shape != k.shape:
        raise ValueError(f"{op}: {v_name}: expected shape {tuple(k.shape)} as {k_name} has, got {tuple(v.shape)}")


def scores_settings(op: str, q: torch.Tensor, scale: Any, window: Any, softcap: Any) -> tuple[float, int, float]:
    """(scale, window or 0, softcap or 0) as the library ops take them."""
    scale = q.size(3) ** -0.5 if scale is None else checks.real(op, "scale", scale, "a finite float or None")
    width = 0 if window is None else checks.number(window)
    if width is None or isinstance(width, float) or (window is not None and width < 1):
        raise ValueError(f"{op}: window: expected an int of at least 1 or None, got {window!r}")
    if softcap is not None:
        softcap = checks.real(op, "softcap", softcap, "a finite float above 0 or None", math.ulp(0.0))
    # A wider window than there are positions is none; kernels add positions to it in 64 bits.
    return scale, min(width, 2**62), softcap or 0.0


def _sequences(of: str, starts: Any, x: torch.Tensor, most: Any) -> tuple[torch.Tensor, int]:
    """The beginnings, and the longest of the sequences or at least as much; reads and checks them if that is free."""
    name = f"cu_seqlens_{of}"
    if not isinstance(starts, torch.Tensor) or starts.dtype not in (torch.int32, torch.int64) or starts.dim() != 1:
        got = f"{starts.dtype} {tuple(starts.shape)}" if isinstance(starts, torch.Tensor) else type(starts).__name__
        raise TypeError(f"{_OP}: {name}: expected an int32 tensor [N + 1], got {got}")
    checks.same_device(_OP, name, starts, of, x)
    if x.size(0) != 1:
        raise ValueError(f"{_OP}: {of}: expected a batch of 1 with {name}, got {x.size(0)}; pack the sequences in T")
    if most is not None:
        most = checks.integer(_OP, f"max_seqlen_{of}", most, 0)
    capturing = starts.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing or (most is not None and not starts.is_cpu):
        return starts, x.size(2) if most is None else most
    begin = starts.tolist()
    lengths = [b - a for a, b in itertools.pairwise(begin)]
    if not begin or begin[0] != 0 or begin[-1] != x.size(2) or any(n < 0 for n in lengths):
        raise ValueError(
            f"{_OP}: {name}: expected 0, then rising numbers, and {of}'s length {x.size(2)} last,"
            f" got {begin if len(begin) < 9 else f'{begin[:4]} ... {begin[-2:]}'}"
        )
    longest = max(lengths, default=0)
    if most is not None and most < longest:
        raise ValueError(f"{_OP}: max_seqlen_{of}: expected at least {longest}, the longest sequence, got {most}")
    return starts, longest
