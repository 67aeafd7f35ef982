"""Floating-point operations of a training step, by PyTorch's formulas (`torch.utils.flop_counter`).

Only what multiplies matrices counts: products, convolutions, attention, recurrent layers; a multiplication and an
addition are two operations. A fused op counts as its reference does.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genai_fast.backends import LIBRARIES, select, survey

_ATEN = torch.ops.aten
# They multiply matrices too, but there are no formulas for them.
_UNKNOWN = {
    "mv", "addmv", "_addmm_activation", "_int_mm", "_grouped_mm", "_scaled_grouped_mm", "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd", "_cdist_forward", "miopen_rnn",
}  # fmt: skip
_PLAIN = ("aten", "prim", "prims", "genai_fast", "profiler")


class FlopCount(TorchDispatchMode):
    """Counts while it is entered, forward and backward; what a captured graph replays is not seen.

    by_dtype: operations by the dtype of the factors; unknown: names of ops seen that have no formula; convolutions:
    of images, (all, those whose input was not channels_last).

    Args:
        references: run the reference in place of each fused op, and count that; else fused ops are named in unknown.
    """

    supports_higher_order_operators = True

    def __init__(self, references: bool = True) -> None:
        super().__init__()
        self._references = references
        self.by_dtype: Counter[torch.dtype] = Counter()
        self.unknown: set[str] = set()
        self.convolutions = (0, 0)
        self._formulas = _formulas()

    @property
    def total(self) -> int:
        return sum(self.by_dtype.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.unknown.add(str(func))
            return func(*args, **kwargs)
        packet, name = func._overloadpacket, func._schema.name.partition("::")[2]
        fused = func.namespace == "genai_fast" and name in LIBRARIES
        if fused and self._references:
            device, dtype, _ = survey(args)
            with self:
                return select(name, "reference", device, dtype)(*args[:-1])
        if packet not in self._formulas:
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        if packet in self._formulas:
            factor = next(x for x in args if isinstance(x, torch.Tensor))
            self.by_dtype[factor.dtype] += self._formulas[packet](*args, **kwargs, out_val=out)
            if packet is _ATEN.convolution and factor.dim() == 4:
                seen, other = self.convolutions
                last = factor.is_contiguous(memory_format=torch.channels_last)
                self.convolutions = (seen + 1, other + (not last))
        elif fused or func.namespace not in _PLAIN or name in _UNKNOWN:
            self.unknown.add(func._schema.name)
        return out


def _formulas() -> dict[Any, Callable[..., int]]:
    # Here, as the import writes to the log where there is no Triton.
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    def attention(q: Any, k: Any, v: Any, *more: Any, **named: Any) -> int:
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    def attention_backward(gradient: Any, q: Any, k: Any, v: Any, *more: Any, **named: Any) -> int:
        return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)

    def recurrent(x: Any, *more: Any, **named: Any) -> int:
        """Each step of each sequence multiplies by every matrix."""
        weights = more[0] if isinstance(more[0], (list, tuple)) else more[:2]
        return 2 * (x.numel() // x.shape[-1]) * sum(w.numel() for w in weights if w.dim() == 2)

    def recurrent_backward(*arguments: Any, **named: Any) -> int:
        return 2 * recurrent(*arguments)

    def linear(x: Any, weight: Any, *more: Any, **named: Any) -> int:
        return 2 * x.numel() * weight.shape[0]

    formulas = {
        **flop_registry,
        _ATEN._scaled_dot_product_flash_attention_for_cpu: attention,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        _ATEN.mkldnn_rnn_layer: recurrent,
        _ATEN.mkldnn_rnn_layer_backward: recurrent_backward,
        _ATEN._cudnn_rnn: recurrent,
        _ATEN._cudnn_rnn_backward: recurrent_backward,
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        formulas[torch.ops.mkldnn._linear_pointwise] = linear
    return formulas
