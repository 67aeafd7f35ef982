"""RMS norms of people's own classes, known by what their forward computes: Llama's, Gemma's and their copies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.chains import global_hooks, obstacle
from genai_fast.fusion.classes import replacement
from genai_fast.fusion.layout import dense_order
from genai_fast.fusion.meaning import Meaning, matches, meaning
from genai_fast.fusion.source import Refused
from genai_fast.ops.dispatch import left_to_torch
from genai_fast.precision import without_autocast

_X, _WEIGHT = ("argument", 0), ("own", "WEIGHT")
_FLOAT = ("constant", torch.float32)
_WIDE = ("to", _X, _FLOAT)


def _normalized(h: Any) -> Any:
    return "mul", h, ("rsqrt", ("add", ("mean", ("square", h)), ("own", "EPS")))


def _narrowed(y: Any) -> Any:
    return "to", y, ("dtype", _X)


class _Kind(NamedTuple):
    """An RMS norm's expression, and when the op computes it: with an offset of the weight, where it is cast."""

    pattern: Any
    offset: float = 0.0
    casts_weight: bool = False  # whether the weight may be float32 beside a narrow x; else the result would be wider
    narrow: bool = True  # whether statistics of a narrow x are float32


def _kinds() -> tuple[_Kind, ...]:
    gemmas = ("add", ("constant", 1), _WEIGHT)
    wide_gemmas = ("add", ("constant", 1), ("to", _WEIGHT, _FLOAT))
    wide, plain = _normalized(_WIDE), _normalized(_X)
    return (
        _Kind(("mul", _WEIGHT, _narrowed(wide))),  # Llama
        _Kind(_narrowed(("mul", wide, wide_gemmas)), 1.0, True),  # Gemma
        _Kind(_narrowed(("mul", wide, gemmas)), 1.0, True),
        _Kind(_narrowed(("mul", wide, _WEIGHT)), 0.0, True),  # OLMo 2
        _Kind(_narrowed(("mul", wide, ("to", _WEIGHT, _FLOAT))), 0.0, True),
        _Kind(("mul", gemmas, _narrowed(wide)), 1.0),
        _Kind(_narrowed(wide)),
        _Kind(("mul", plain, _WEIGHT), narrow=False),
        _Kind(("mul", plain, gemmas), 1.0, narrow=False),
        _Kind(plain, narrow=False),
    )


class RMS(NamedTuple):
    """What a class of RMS norms computes, and by which attributes."""

    kind: _Kind
    weight: str  # "" for none
    eps: str
    meaning: Meaning
    parameter: str  # the name of forward's x


class Fused(NamedTuple):
    """What a fused class keeps of its norm: the computation, and whether it still is that."""

    rms: RMS
    holds: Callable[[], bool]


def rms_of(cls: type[nn.Module]) -> RMS | None:
    """The RMS norm that a class computes; None if it is another computation, or cannot be told."""
    forward = cls.forward
    found = _rms_of(cls, forward, getattr(forward, "__code__", None))
    return found if found is not None and found.meaning.holds() else None


@functools.lru_cache(256)
def _rms_of(cls: type[nn.Module], forward: Any, code: Any) -> RMS | None:
    if code is None or code.co_argcount != 2:
        return None
    try:
        read = meaning(forward, cls)
    except Refused:
        return None
    for kind in _kinds():
        names = matches(kind.pattern, read.expression, {})
        if names is not None:
            return RMS(kind, names.get("WEIGHT", ""), names["EPS"], read, code.co_varnames[1])
    return None


def why_not(rms: RMS, norm: nn.Module) -> str:
    """Why this module is left as it is; "" if it may run as one call."""
    if not rms.meaning.methods.isdisjoint(norm.__dict__):
        return "a method of its own is replaced"
    if not isinstance(getattr(norm, rms.eps, None), (int, float)):
        return f"{rms.eps} is no number"
    weight = getattr(norm, rms.weight, None) if rms.weight else None
    if rms.weight and not (isinstance(weight, torch.Tensor) and weight.dim() == 1):
        return f"{rms.weight} is no vector"
    return ""


def _serves(x: Any) -> bool:
    """Whether a kernel takes this input and is worth its call."""
    if torch.compiler.is_compiling() or not is_plain(x) or thresholds.written_rms_norm(x):  # a compiler fuses it itself
        return False
    if x.dtype is torch.float64 or x.dim() == 0 or x.size(-1) == 0:  # of float64 they have statistics in float32
        return False
    return not (left_to_torch() or choose("layer_norm", forced_backend(), x.device.type, x.dtype)[1])


def _settings(rms: RMS, norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor | None, float] | None:
    """weight and eps if the op computes what forward does of x."""
    if why_not(rms, norm) or not (rms.kind.narrow or x.dtype is torch.float32):
        return None
    weight, eps = (getattr(norm, rms.weight) if rms.weight else None), float(getattr(norm, rms.eps))
    if weight is not None:
        wider = rms.kind.casts_weight and weight.dtype is torch.float32
        if not is_plain(weight) or weight.shape != x.shape[-1:] or weight.device != x.device:
            return None
        if weight.dtype is not x.dtype and not wider:
            return None
    return (weight, eps) if 0.0 <= eps < float("inf") else None


def _normalize(rms: RMS, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if x.dtype is not torch.float32 and torch.is_grad_enabled():
        x = x.clone()  # such a class keeps float32 copies for its backward: x itself may be changed in place
    order = None if x.is_contiguous() else dense_order(x)
    with without_autocast(x.device.type):  # which changes neither what such a class computes nor its dtype
        if order is None:
            return ops.rms_norm(x, weight, eps, offset=rms.kind.offset)
        back = [order.index(k) for k in range(x.dim())]  # the result lies as x, as torch's elementwise ones do
        return ops.rms_norm(x.permute(order), weight, eps, offset=rms.kind.offset).permute(back)


def members(cls: type[nn.Module], rms: RMS) -> dict[str, Any]:
    """Of a class that computes it by one call."""
    theirs, now = cls.forward, replacement(cls, "forward")

    def holds() -> bool:
        return rms.meaning.holds()

    holds._dynamo_marked_constant = True  # as assume_constant_result does it

    @functools.wraps(theirs)
    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        x = given[0] if given else named.get(rms.parameter)
        if not _serves(x) or len(given) + len(named) != 1 or now() is not None or not holds():
            return cls.forward(self, *given, **named)  # as it is now
        found = _settings(rms, self, x)
        return theirs(self, x) if found is None else _normalize(rms, x, *found)

    return {"forward": forward, "_rms_norm": Fused(rms, lambda: now() is None and holds())}


def fused(norm: Any) -> Fused | None:
    """What is known of a norm that runs as one call; None of other modules."""
    return vars(type(norm)).get("_rms_norm")


def sum_and_norm(a: Any, b: Any, norm: Any, sums: int) -> tuple[Any, ...]:
    """a + b, `sums` times, and its norm."""
    known = fused(norm)
    found = None if known is None or torch.compiler.is_compiling() else _of_sum(known, a, b, norm)
    if found is None:
        total = a + b
        return (*[total] * sums, norm(total))
    y, total = found
    return (*[total] * sums, y)


def _of_sum(known: Fused, a: Any, b: Any, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(norm(a + b), a + b) in one call; None if the op does not compute both as they would be."""
    if not _serves(a) or not is_plain(b) or a.shape != b.shape or a.dtype is not b.dtype or a.device != b.device:
        return None
    if a.dtype is not torch.float32 and torch.is_grad_enabled():
        return None  # of a narrow sum such a norm keeps a copy, so that the sum may be changed in place
    if not a.is_contiguous() or not b.is_contiguous() or obstacle(norm) or global_hooks() or not known.holds():
        return None
    settings = _settings(known.rms, norm, a)
    if settings is None:
        return None
    with without_autocast(a.device.type):
        return ops.rms_norm(a, *settings, residual=b, offset=known.rms.kind.offset)
