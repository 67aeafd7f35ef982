"""What ops ask of their arguments; each error names op, argument, expected, got and remedy."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from genai_fast.backends import is_plain
from genai_fast.kernels.common.activations import ACTIVATIONS, output_gives_derivative, slope_of
from genai_fast.ops.dispatch import readable
from genai_fast.precision import autocast_dtype

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_floating(op: str, name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(x).__name__}; pass a torch.Tensor")
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{op}: {name}: expected a floating-point tensor (float32, bfloat16, float16, float64), got {x.dtype};"
            f" convert it with .float()"
        )
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise TypeError(
            f"{op}: {name}: expected a dense tensor (torch.strided), got {kind}; convert it with .to_dense()"
        )


def number(value: Any) -> Any:
    """Python's own int or float for any number, NumPy's scalars among them, or torch.compile's symbol; else None."""
    if type(value) in (float, int) or isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def real(op: str, name: str, value: Any, expected: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high], as a float; `expected` says so in words."""
    found = value if type(value) is float else number(value)
    if found is None or not low <= found <= high or not -math.inf < found < math.inf:
        raise ValueError(f"{op}: {name}: expected {expected}, got {value!r}")
    return float(found)


def epsilon(op: str, value: Any, limit: str, low: float) -> float:
    """What is added to a variance: finite and at least `low`; `limit` says so in words."""
    found = number(value)
    if found is None or not low <= found < math.inf:
        raise ValueError(f"{op}: eps: expected a finite eps {limit}, got eps {value}")
    return float(found)


def integer(op: str, name: str, value: Any, least: int | None = None, what: str = "an int") -> int:
    """An int of 64 bits, NumPy's among them; torch.compile's symbols as they are."""
    found = number(value)
    if found is None or isinstance(found, (float, torch.SymFloat)):
        raise TypeError(f"{op}: {name}: expected {what}, got {type(value).__name__}")
    if least is not None and found < least:
        raise ValueError(f"{op}: {name}: expected at least {least}, got {value}")
    if type(found) is int and not -(2**63) <= found < 2**63:
        raise ValueError(f"{op}: {name}: expected {what} that fits into 64 bits, got {value}")
    return found


def flag(op: str, name: str, value: Any) -> bool:
    """A bool, NumPy's among them, or 0 or 1."""
    if value is True or value is False or isinstance(value, torch.SymBool):
        return value  # type: ignore[return-value]  # a symbol of torch.compile's
    if isinstance(value, np.bool_) or (isinstance(value, numbers.Integral) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{op}: {name}: expected a bool, got {value!r}")


def needs_no_gradient(op: str, name: str, tensors: Iterable[torch.Tensor | None]) -> None:
    """Raise if autograd would record what an op without gradients makes of these."""
    if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors]):
        raise ValueError(
            f"{op}: {name}: expected tensors that need no gradient, got one that requires it; decode under"
            f" torch.no_grad()"
        )


def has_batch(op: str, name: str, x: torch.Tensor) -> None:
    if x.dim() == 0:
        raise ValueError(f"{op}: {name}: expected a batch as first dimension, got shape (); add one with .unsqueeze(0)")


def matches(op: str, name: str, x: Any, other_name: str, other: torch.Tensor) -> None:
    """x is a floating-point tensor with the other's device and shape, and dtype unless autocast mixes dtypes."""
    is_floating(op, name, x)
    same_device(op, name, x, other_name, other)
    if x.shape != other.shape:
        raise ValueError(
            f"{op}: {name}: expected shape {tuple(other.shape)} as {other_name} has, got {tuple(x.shape)};"
            f" reshape or expand it"
        )
    if autocast_dtype(x.device.type) is None:
        same_dtype(op, name, x, other_name, other)


def has_channels(op: str, x: Any) -> None:
    is_floating(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x: expected [N, C] or [N, C, ...], got shape {tuple(x.shape)}; add dimensions")


def per_channel(
    op: str, parameters: dict[str, torch.Tensor | None], x: torch.Tensor, channels: int | None = None
) -> None:
    """Each parameter is None or [C] on x's device, all of one dtype: that of x, or float32 beside a narrower x.

    C are x's channels, or those that the weight makes of them.
    """
    source = "x has" if channels is None else "weight gives"
    channels = x.size(1) if channels is None else channels
    shape, dtype, place, on_cpu = (channels,), x.dtype, x.get_device(), x.is_cpu
    for p in parameters.values():
        # The usual case by what costs least: x.device would cost more than all the rest.
        if p is not None and not (
            is_plain(p) and p.dtype is dtype and p.shape == shape and p.is_cpu == on_cpu and p.get_device() == place
        ):
            break
    else:
        return
    for name, p in parameters.items():
        if p is not None:
            _parameter(op, name, p, x, shape, f"as {source} {channels} channels", "channels come second")
    if len({p.dtype for p in parameters.values() if p is not None}) > 1:
        got = ", ".join(f"{name} {p.dtype}" for name, p in parameters.items() if p is not None)
        raise TypeError(f"{op}: expected parameters and running statistics of one dtype, got {got}; convert with .to()")


def per_sample_channel(op: str, parameters: dict[str, torch.Tensor | None], x: torch.Tensor) -> None:
    """Each parameter is None or [N, C] as x's first dimensions are, on its device; in x's dtype or float32."""
    for name, p in parameters.items():
        if p is not None:
            _parameter(op, name, p, x, tuple(x.shape[:2]), "of samples and channels of x", "reshape it")


def per_column(op: str, parameters: dict[str, torch.Tensor | None], x: torch.Tensor) -> None:
    """Each parameter is None or [D], D being x's last dimension, on x's device; in x's dtype or float32.

    Autocast mixes dtypes: x, or its partner, may then be wider than the parameters.
    """
    autocast = autocast_dtype(x.device.type) is not None
    columns = x.size(-1)
    for name, p in parameters.items():
        if p is not None:
            reason = f"as x has {columns} in its last dimension"
            _parameter(op, name, p, x, (columns,), reason, "reshape it", any_dtype=autocast)


def _parameter(
    op: str, name: str, p: Any, x: torch.Tensor, shape: tuple[int, ...], reason: str, remedy: str, *,
    any_dtype: bool = False,
) -> None:  # fmt: skip
    """p is of that shape on x's device, in x's dtype or in float32 beside a narrower x."""
    is_floating(op, name, p)
    same_device(op, name, p, "x", x)
    if p.shape != shape:
        raise ValueError(f"{op}: {name}: expected shape {shape} {reason}, got {tuple(p.shape)}; {remedy}")
    if not any_dtype and p.dtype is not x.dtype and (p.dtype is not torch.float32 or x.dtype is torch.float64):
        allowed = f"{x.dtype}" if x.dtype in (torch.float32, torch.float64) else f"{x.dtype} or torch.float32"
        raise TypeError(f"{op}: {name}: expected {allowed} beside x of {x.dtype}, got {p.dtype}; convert it with .to()")


def activation(op: str, name: Any, slope: Any) -> float:
    """The slope, for None the activation's own, once both are known to fit."""
    one_of(op, "activation", name, ACTIVATIONS)
    return real(op, "negative_slope", slope_of(name, slope), "a finite float")


def activation_with_weight(
    op: str, x: torch.Tensor, name: Any, slope: Any, weight: Any
) -> tuple[float, torch.Tensor | None]:
    """The slope, and of prelu the weight [1] or [C], for ops that have this activation too."""
    if name != "prelu":
        if weight is not None:
            raise ValueError(f"{op}: act_weight: expected None with activation {name!r}, got a weight; pass 'prelu'")
        one_of(op, "activation", name, (*ACTIVATIONS, "prelu"))
        return activation(op, name, slope), None
    if not isinstance(weight, torch.Tensor):
        raise TypeError(
            f"{op}: act_weight: expected a tensor with activation 'prelu', got {type(weight).__name__}; pass [1] or [C]"
        )
    per_channel(op, {"act_weight": weight}, x, 1 if weight.shape == (1,) else None)
    return 0.0, weight


def saves_output(op: str, activation: str, slope: float, asked: Any, always: tuple[str, ...]) -> bool:
    """Whether backward keeps the result instead of the input: if asked, and for the activations in `always`."""
    if flag(op, "save_output", asked) and not output_gives_derivative(activation, slope):
        of = f"{activation} and negative_slope {slope}" if activation == "leaky_relu" else activation
        raise ValueError(
            f"{op}: save_output: expected False with {of}, whose result does not give the derivative, got True;"
            f" leave it out"
        )
    return bool(asked) or activation in always


def sizes(op: str, name: str, value: Any, dimensions: int, least: int) -> tuple[int, ...]:
    """One int for each dimension, from that many or from one for all."""
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dimensions
    found = [number(v) for v in given]
    if len(given) != dimensions or any(v is None or isinstance(v, float) for v in found):
        many = "an int" if dimensions == 1 else f"an int or {dimensions} ints"
        raise TypeError(f"{op}: {name}: expected {many}, got {value!r}")
    if min(found) < least:
        raise ValueError(f"{op}: {name}: expected at least {least}, got {value!r}")
    return tuple(integer(op, name, v) for v in found)


def share(op: str, name: str, value: Any) -> float:
    return _in_range(op, name, value, "a share in [0, 1]", 1.0)


def factor(op: str, name: str, value: Any) -> float:
    return _in_range(op, name, value, "a finite factor >= 0", math.inf)


def _in_range(op: str, name: str, value: Any, expected: str, high: float, kinds: str = "a float") -> float:
    if number(value) is None:
        raise TypeError(f"{op}: {name}: expected {kinds}, got {type(value).__name__}")
    return real(op, name, value, expected, 0.0, high)


def same_device(op: str, name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{op}: {name}: expected device {other.device} as {other_name} has, got {x.device};"
            f" move it with .to({other_name}.device)"
        )


def same_dtype(op: str, name: str, x: torch.Tensor, other_name: str, other: torch.Tensor, or_else: str = "") -> None:
    if x.dtype is not other.dtype:
        raise TypeError(
            f"{op}: {name}: expected {other.dtype} as {other_name} has, got {x.dtype}; convert it with"
            f" .to({other_name}.dtype){or_else}"
        )


def one_of(op: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def scalar(op: str, name: str, value: Any, like: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """A factor >= 0 as (tensor or None, float): a 0-d tensor stays one, so that schedules change it in a graph."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0:
            raise ValueError(f"{op}: {name}: expected a float or a 0-d tensor, got shape {tuple(value.shape)}")
        is_floating(op, name, value)
        if readable(value):
            real(op, name, value.item(), "a finite factor >= 0", 0.0)
        return value, 0.0
    found = _in_range(op, name, value, "a finite factor >= 0", math.inf, "a float or a 0-d tensor")
    if torch.compiler.is_compiling():
        # An operator's float argument is a constant of the compiled graph: each new value would compile again. Only
        # as a factor of a tensor does a float stay an input.
        return torch.ones((), dtype=torch.float32, device=like.device) * value, 0.0
    return None, found


def offset(op: str, value: Any) -> int:
    found = integer(op, "offset", value, None, "an int (elements before this tensor's first)")
    if found < 0:
        raise ValueError(f"{op}: offset: expected >= 0 elements, got {value}")
    return found


def draw_seed(like: torch.Tensor) -> torch.Tensor:
    """A fresh 0-d int64 seed on like's device, from that device's default generator."""
    return torch.randint(2**63 - 1, (), device=like.device)


def seed(op: str, value: Any, like_name: str, like: torch.Tensor) -> torch.Tensor:
    """The seed as a 0-d int64 tensor on like's device; None draws one from that device's default generator."""
    if value is None:
        if torch.compiler.is_compiling():
            # AOTAutograd makes one of calls with the same arguments, except of torch.empty's: so each draw has its own.
            return torch.ops.genai_fast.draw_seed(torch.empty((), dtype=torch.int64, device=like.device))
        return draw_seed(like)  # the same without the dispatcher, which costs more than the draw
    if isinstance(value, torch.Tensor):
        if value.dtype is not torch.int64:
            raise TypeError(f"{op}: seed: expected an int, a 0-d int64 tensor or None, got dtype {value.dtype}")
        if value.dim() != 0:
            raise ValueError(f"{op}: seed: expected an int, a 0-d int64 tensor or None, got shape {tuple(value.shape)}")
        same_device(op, "seed", value, like_name, like)
        return value
    value = integer(op, "seed", value, None, "an int, a 0-d int64 tensor or None")
    return torch.full((), value, dtype=torch.int64, device=like.device)
