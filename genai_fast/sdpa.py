"""F.scaled_dot_product_attention on our kernels, inside any model: PyTorch's own switch of the flash backend."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn import attention

from genai_fast.backends import choose, is_plain
from genai_fast.ops import causal_attention
from genai_fast.ops.dispatch import left_to_torch, library_call, observed
from genai_fast.ops.register import override

_FORWARD, _BACKWARD = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
_CPU_FORWARD, _CPU_BACKWARD = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
_NAME = "genai_fast"
# Where ours is the faster one: CUDA's flash backend takes only the narrow types, and a CPU has instructions for those.
_DTYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float32,)}
_MOST_CHANNELS = 256


class SDPASwitch(contextlib.AbstractContextManager):
    """What `enable_sdpa` did; `remove()` undoes it, and so does the end of a `with` block unless it was on before."""

    def __init__(self, library: torch.library.Library, priority: list[int] | None) -> None:
        self._library, self._priority, self.calls = library, priority, 0

    def remove(self) -> None:
        """Everything as it was before. A second call does nothing."""
        global _active
        if _active is not self:
            return
        self._library._destroy()
        if self._priority is not None:
            torch._C._set_sdp_priority_order(self._priority)
        _active = None

    def __exit__(self, *exception: object) -> None:
        self.calls -= 1
        if _active is self and not self.calls:
            attention.restore_flash_attention_impl()


_active: SDPASwitch | None = None


def enable_sdpa() -> SDPASwitch:
    """Serve torch.nn.functional.scaled_dot_product_attention with ops.causal_attention's kernels, process-wide.

    Serves float16 and bfloat16 on CUDA, in place of the flash backend, which then has priority, and float32 on a CPU.
    On CUDA that is the fastest of our kernels, cuDNN's and flash attention, as ops.causal_attention finds it.
    Calls with a mask, is_causal with T_q != T_k or more than 256 channels per head are served as before, and so is
    dropout on CUDA, where PyTorch's own kernel has it. On a CPU dropout drops other probabilities than PyTorch's would,
    of the same share: one number of the same default generator seeds them all, where PyTorch draws one for each score.
    Compiled models keep what they were compiled with, so enable it first; in those dropout is PyTorch's.

    Returns: A switch: `remove()`, or the end of a `with` block, restores everything; a nested block leaves it on.
    Raises RuntimeError: no kernel of ours runs here; the message gives the reason.
    """
    global _active
    if _active is not None:
        _active.calls += 1
        return _active
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend, reason = choose("causal_attention", "", device)
    if backend == "reference":
        raise RuntimeError(f"enable_sdpa: expected a kernel for {device} tensors, but {reason}")
    attention.register_flash_attention_impl(_NAME, register_fn=_register)
    attention.activate_flash_attention_impl(_NAME)
    assert _active is not None
    _active.calls = 1
    return _active


def active() -> SDPASwitch | None:
    """What `enable_sdpa` did in this process and has not been removed."""
    return _active


def _register() -> SDPASwitch:
    global _active
    library = torch.library.Library("aten", "IMPL")
    override(library, _CPU_FORWARD, "CPU", _cpu_forward)
    override(library, _CPU_BACKWARD, "CPU", _cpu_backward)
    override(library, "scaled_dot_product_attention", "AutogradCPU", _with_dropout)  # whose flash kernel has none
    priority = None
    if torch.cuda.is_available():
        override(library, _FORWARD, "CUDA", _cuda_forward)
        override(library, _BACKWARD, "CUDA", _cuda_backward)
        priority = torch._C._get_sdp_priority_order()
        flash = attention.SDPBackend.FLASH_ATTENTION.value
        torch._C._set_sdp_priority_order([flash, *(b for b in priority if b != flash)])
    _active = SDPASwitch(library, priority)
    return _active


def _served(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, is_causal: bool) -> bool:
    return (
        q.dtype in _DTYPES[q.device.type] and k.dtype is q.dtype and v.dtype is q.dtype and dropout_p == 0.0
        and q.dim() == 4 and q.size(3) <= _MOST_CHANNELS and k.shape == v.shape and k.size(3) == q.size(3)
        and (not is_causal or q.size(2) == k.size(2))
    )  # fmt: skip


def _settings(q: torch.Tensor, k: torch.Tensor, is_causal: bool, scale: float | None) -> tuple[Any, ...]:
    """What the library ops take between their tensors and the backend."""
    scale = q.size(3) ** -0.5 if scale is None else scale
    return None, None, q.size(2), k.size(2), None, scale, 0, 0.0, is_causal, 0.0, 0, ""


def _forward(q, k, v, is_causal, scale):
    return library_call("causal_attention", q, k, v, *_settings(q, k, is_causal, scale))


def _backward(grad_out, q, k, v, out, lse, is_causal, scale):
    settings = _settings(q, k, is_causal, scale)
    return library_call("causal_attention_backward", grad_out, None, q, k, v, out, lse, *settings)


def _cuda_forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    if return_debug_mask or not _served(q, k, v, dropout_p, is_causal):
        return NotImplemented
    out, lse = _forward(q, k, v, is_causal, scale)
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which nobody reads
    return out, lse, None, None, q.size(2), k.size(2), state, state.new_empty(()), q.new_empty(0)


def _cuda_backward(
    grad_out, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, state, unused, *, scale=None
):
    if not _served(q, k, v, dropout_p, is_causal):
        return NotImplemented
    return _backward(grad_out, q, k, v, out, lse, is_causal, scale)


def _with_dropout(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    fits = (
        0.0 < dropout_p <= 1.0 and attn_mask is None and not observed() and not left_to_torch()
        and torch.backends.cuda.flash_sdp_enabled()  # sdpa_kernel(SDPBackend.MATH) asks for another one
        and all(map(is_plain, (q, k, v))) and _served(q, k, v, 0.0, is_causal)
        and q.shape[:2] == k.shape[:2] and all(x.numel() and (x.stride(3) == 1 or x.size(3) == 1) for x in (q, k, v))
    )  # fmt: skip
    if not fits:
        return NotImplemented
    # Contiguous as PyTorch's result with dropout is, whatever the order of q: a program may take a view of it.
    return causal_attention(q, k, v, scale=scale, causal=is_causal, dropout=dropout_p).contiguous()


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """In the memory order [B, T, H, ...], which PyTorch's CPU kernel promises to torch.compile."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_forward(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    if attn_mask is not None or not _served(q, k, v, dropout_p, is_causal):
        return NotImplemented
    out, lse = _forward(q, k, v, is_causal, scale)
    return out, _tokens_first(lse)


def _cpu_backward(grad_out, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    if attn_mask is not None or not _served(q, k, v, dropout_p, is_causal):
        return NotImplemented
    return tuple(map(_tokens_first, _backward(grad_out, q, k, v, out, lse, is_causal, scale)))
