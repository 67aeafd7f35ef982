"""Attention on CUDA by the fastest of three: our kernels, cuDNN's, and PyTorch's flash attention.

Measured once for each shape, forward and backward together, as convolutions are (`genai_fast.autotune`). All three give
the same out and lse, so a backward can be ours after anyone's forward: it is where lse has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.backends import cuda as switches

from genai_fast import autotune, backends
from genai_fast.kernels.causal_attention.layout import empty_alike, heads_inside
from genai_fast.kernels.common import recorder

OURS, CUDNN, FLASH = "kernel", "cudnn", "flash"
LEAST_QUERIES = 16  # fewer are decoding, with more keys at every call: there is nothing to remember
MEASURED = 1 << 37  # multiplications and additions of the part of a batch that is measured: about a millisecond
CLOSE = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}  # of the largest number: how far apart results may be

Tensors = tuple[torch.Tensor, ...]
Heard = Callable[[str, autotune.Choice], None]
listener: ContextVar[Heard | None] = ContextVar("listener", default=None)  # told what serves each call


def causal_attention(own: Callable[..., Any], *arguments: Any) -> Any:
    """The library op, where `own` computes it by our kernels."""
    q, k, v, causal, scale = plain = _plain(*arguments)
    gradients = any(x.requires_grad for x in (q, k, v))
    name = _fastest(plain, gradients, own) if _may_be_served(plain, arguments) else OURS
    return own(*arguments) if name == OURS else recorder.as_step(forward, name, q, k, v, causal, scale)


def causal_attention_backward(own: Callable[..., Any], *arguments: Any) -> Any:
    """The library op's backward."""
    grad_out, grad_lse, q, k, v, out, lse, *rest = arguments
    plain = _plain(q, k, v, *rest)
    served = grad_lse is None and _may_be_served(plain, (q, k, v, *rest))
    name = _fastest(plain, True, own) if served else OURS
    if name == OURS:
        return own(*arguments)
    return recorder.as_step(backward, name, grad_out, q, k, v, out, lse, *plain[3:])


@contextmanager
def heard(tell: Heard) -> Iterator[None]:
    """Inside the block `tell` gets what each call was, and the choice that serves it."""
    token = listener.set(tell)
    try:
        yield
    finally:
        listener.reset(token)


def _plain(q, k, v, starts_q, starts_k, most_q, most_k, seed, scale, window, softcap, causal, share, offset):
    return q, k, v, causal, scale


def _may_be_served(plain: tuple[Any, ...], arguments: tuple[Any, ...]) -> bool:
    """Whether a peer computes the same: no window, cap, packed sequences or dropout, and masks that agree."""
    q, k, v, causal, scale = plain
    starts_q, window, softcap, share = (arguments[n] for n in (3, 9, 10, 12))
    return (
        _on_gpu(q) and q.dtype in CLOSE and k.dtype is q.dtype and v.dtype is q.dtype and q.dim() == 4
        and starts_q is None and not window and not softcap and not share and scale > 0.0
        and q.size(2) >= LEAST_QUERIES and q.numel() > 0 and k.numel() > 0 and k.shape == v.shape
        and (not causal or q.size(2) == k.size(2)) and q.size(3) % 8 == 0
        and all(x.stride(3) == 1 for x in (q, k, v))
    )  # fmt: skip


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def _fastest(plain: tuple[Any, ...], gradients: bool, own: Callable[..., Any]) -> str:
    recorder.reads(autotune.standing)  # a plan holds as long as the choice does
    q, k, _, causal, _ = plain
    off = [n for n, on in ((CUDNN, switches.cudnn_sdp_enabled()), (FLASH, switches.flash_sdp_enabled())) if not on]
    family = (
        "attention", q.shape[3], "heads", q.size(1), k.size(1), "causal" if causal else "full", str(q.dtype),
        "gradients" if gradients else "forward", *(("tokens first",) if heads_inside(q) else ()),
        *(("keys tokens first",) if heads_inside(k) else ()), *(f"without {name}" for name in off),
    )  # fmt: skip
    each = 4 * q.size(1) * q.size(2) * k.size(2) * q.size(3)
    batch = 1 << (min(q.size(0), max(MEASURED // each, 1)).bit_length() - 1)

    def candidates() -> tuple[dict[str, autotune.Maker], str]:
        made = _MadeUp(plain, batch, gradients)
        names = (OURS, *(name for name in (CUDNN, FLASH) if name not in off and _available(name, *plain)))
        return {name: made.maker(name) for name in names}, OURS

    with recorder.unwatched():
        choice = autotune.choose(family, (batch, q.size(2), k.size(2)), q.device, candidates)
    if (tell := listener.get()) is not None:
        tell(f"attention {'x'.join(map(str, q.shape))} over {k.size(2)} keys", choice)
    return choice.name


def _available(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> bool:
    """What PyTorch says of its own implementations."""
    parameters = switches.SDPAParams(q, k, v, None, 0.0, causal, q.size(1) != k.size(1))
    if name == CUDNN:
        return torch.backends.cudnn.enabled and switches.can_use_cudnn_attention(parameters)
    return switches.is_flash_attention_available() and switches.can_use_flash_attention(parameters)


def forward(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Tensors:
    """(out, lse) by a peer, as our kernels give them."""
    if name == CUDNN:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        lse = lse.view(q.shape[:3])
    else:
        tokens = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *tokens, None, None, q.size(2), k.size(2), 0.0, causal, False, scale=scale
        )
        out = out.transpose(1, 2)
    return _laid(out, q), lse.contiguous()


def backward(
    name: str, grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, causal: bool, scale: float,
) -> Tensors:  # fmt: skip
    """Gradients of q, k and v by a peer."""
    grad_out = grad_out.to(q.dtype)
    grad_out = grad_out if grad_out.stride() == out.stride() else _laid(grad_out, out)
    sizes = (q.size(2), k.size(2), 0.0, causal)
    if name == CUDNN:
        state = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, which there is none of
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse.unsqueeze(3), state, state, None, None, None, *sizes, scale=scale
        )
    else:
        tokens = [x.transpose(1, 2) for x in (grad_out, q, k, v, out)]
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        found = torch.ops.aten._flash_attention_backward(
            *tokens, lse, None, None, *sizes, state, state.new_empty(()), scale=scale
        )
        found = [x.transpose(1, 2) for x in found]
    return tuple(_laid(g, x) for g, x in zip(found, (q, k, v), strict=True))


def _laid(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y in the memory order of `empty_alike(x)`."""
    wanted = empty_alike(x)
    return y if y.stride() == wanted.stride() else wanted.copy_(y)


class _MadeUp:
    """Tensors like a call's, made once for all that are measured, and what our kernels make of them."""

    def __init__(self, plain: tuple[Any, ...], batch: int, gradients: bool) -> None:
        self._like, self._batch, self._gradients = plain, batch, gradients
        self._given: tuple[Any, ...] = ()

    def maker(self, name: str) -> autotune.Maker:
        def make() -> Callable[[], Any]:
            if not self._given:
                self._prepare()
            if name != OURS:
                self._compare(name)
            return lambda: self._call(name)

        return make

    def _prepare(self) -> None:
        generator = torch.Generator(self._like[0].device).manual_seed(0)  # not the user's: measuring must not move it
        made = []
        for x in (*self._like[:3], self._like[0]):
            like = empty_alike(x.detach()[: self._batch])
            made.append(like.copy_(torch.randn(like.shape, generator=generator, device=like.device)))
        self._given = tuple(made)

    def _call(self, name: str) -> Tensors:
        *_, causal, scale = self._like
        q, k, v, grad_out = self._given
        settings = (None, None, q.size(2), k.size(2), None, scale, 0, 0.0, causal, 0.0, 0)
        if name == OURS:
            out, lse = backends.implementation("causal_attention", "triton")(q, k, v, *settings)
        else:
            out, lse = forward(name, q, k, v, causal, scale)
        if not self._gradients:
            return out, lse
        if name == OURS:
            last = backends.implementation("causal_attention_backward", "triton")
            return out, lse, *last(grad_out, None, q, k, v, out, lse, *settings)
        return out, lse, *backward(name, grad_out, q, k, v, out, lse, causal, scale)

    def _compare(self, name: str) -> None:
        """Raise unless a peer's results are ours but for rounding: then it is left out, and a warning says why."""
        for ours, theirs in zip(self._call(OURS), self._call(name), strict=True):
            apart = (ours.float() - theirs.float()).abs().max() / ours.float().abs().max().clamp_min(1e-30)
            if theirs.shape != ours.shape or not bool(apart <= CLOSE[self._given[0].dtype]):
                raise RuntimeError(f"expected results as our kernels give, got some that are {float(apart):.2g} apart")


backends.PEERS.update(causal_attention=causal_attention, causal_attention_backward=causal_attention_backward)
