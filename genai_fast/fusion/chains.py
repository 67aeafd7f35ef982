"""Which children of a container are torch's own and untouched, and which of those in a row run as one."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _globals

from genai_fast.ops.dispatch import left_to_torch

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
GROUP_NORMS = (nn.GroupNorm, *INSTANCE_NORMS)
UPSAMPLES = (nn.Upsample, nn.UpsamplingNearest2d)
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "none", nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu", nn.GELU: "gelu", nn.ELU: "elu", nn.ReLU6: "relu6", nn.SELU: "selu", nn.Hardswish: "hardswish",
    nn.Softplus: "softplus", nn.Mish: "mish", nn.PReLU: "prelu",
}  # fmt: skip


class Residual(nn.Module):
    """Stands in a chain for the sum with a residual."""


# One letter per child, so that a container is a word and a chain a pattern. Lower case works in place.
_LETTERS: dict[type[nn.Module], str] = dict.fromkeys((*CONVS, *TRANSPOSED), "C") | {nn.Linear: "L"}
_LETTERS |= dict.fromkeys(NORMS, "N") | dict.fromkeys(GROUP_NORMS, "G") | dict.fromkeys(ACTIVATIONS, "A")
_LETTERS |= {nn.Identity: "I", nn.Dropout: "D", Residual: "R", nn.PReLU: "P"}
_LETTERS |= dict.fromkeys(UPSAMPLES, "U")
STOCK = tuple(_LETTERS)
_CHAIN = re.compile("(?:U?C|L)?N(?:R[AaIP]?|[AaIP]R?)?|G(?:R[AaI]?|[AaI]R?)?|U?C[AaI](?![Dd])|UC|[Aa]?[Dd]|.")

# What a plain call of such a module runs: torch's own methods and functions, unless they are replaced.
_METHODS = (
    "__call__", "_call_impl", "forward", "__iter__", "_conv_forward", "_output_padding", "_check_input_dim",
    "_get_no_batch_dim", "_handle_no_batch_input", "_apply_instance_norm",
)  # fmt: skip
_FUNCTIONS: dict[type[nn.Module], tuple[tuple[Any, str], ...]] = {
    nn.Linear: ((F, "linear"),), nn.Embedding: ((F, "embedding"),), nn.RMSNorm: ((F, "rms_norm"),),
    nn.CrossEntropyLoss: ((F, "cross_entropy"),), nn.Dropout: ((F, "dropout"),),
    nn.MultiheadAttention: ((F, "multi_head_attention_forward"), (F, "scaled_dot_product_attention")),
    nn.ReLU: ((F, "relu"), (torch, "relu")), nn.LeakyReLU: ((F, "leaky_relu"),),
    nn.SiLU: ((F, "silu"),), nn.GELU: ((F, "gelu"),), nn.Tanh: ((torch, "tanh"),), nn.Sigmoid: ((torch, "sigmoid"),),
    nn.ELU: ((F, "elu"),), nn.ReLU6: ((F, "hardtanh"),), nn.SELU: ((F, "selu"), (torch, "selu")),
    nn.Hardswish: ((F, "hardswish"),), nn.Softplus: ((F, "softplus"),), nn.Mish: ((F, "mish"),),
    nn.PReLU: ((F, "prelu"),), **dict.fromkeys(UPSAMPLES, ((F, "interpolate"),)),
    **dict.fromkeys(NORMS, ((F, "batch_norm"), (torch, "batch_norm"))),
    nn.GroupNorm: ((F, "group_norm"), (torch, "group_norm")),
    **dict.fromkeys(INSTANCE_NORMS, ((F, "instance_norm"), (torch, "instance_norm"))),
    **{cls: ((F, f"conv{dims}d"),) for dims, cls in enumerate(CONVS, 1)},
    **{cls: ((F, f"conv_transpose{dims}d"),) for dims, cls in enumerate(TRANSPOSED, 1)},
}  # fmt: skip
# Classes whose parameters are read past a call, and those whose forward fuse replaces.
_READ = (
    *STOCK, nn.Embedding, nn.LSTM, nn.GRUCell, nn.GRU, nn.RMSNorm, nn.CrossEntropyLoss, nn.MultiheadAttention,
    nn.Sequential,
)  # fmt: skip
_OWN = {
    cls: [
        (owner, name, getattr(owner, name))
        for owner, name in (*((cls, name) for name in _METHODS), *_FUNCTIONS.get(cls, ()))
        if hasattr(owner, name)
    ]
    for cls in _READ
}
_REPLACEABLE = frozenset((*_METHODS, "weight", "bias", "running_mean", "running_var", "num_batches_tracked"))


class Span(NamedTuple):
    """Children start to stop, their letters, and whether they are a chain that may run as one."""

    start: int
    stop: int
    letters: str
    fused: bool


def obstacle(child: nn.Module) -> str:
    """What is done by a module that only calling it honours; "" if nothing."""
    state = child.__dict__
    if "forward" in state:
        return "its forward is replaced"
    if state.get("_compiled_call_impl") is not None:
        return "it is compiled"
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return "it has hooks"
    if not _REPLACEABLE.isdisjoint(state) and not isinstance(state.get("bias"), bool):  # a recurrent layer's setting
        return "a method or tensor of its own is replaced"
    if state["_buffers"].get("running_mean") is not None and isinstance(child, GROUP_NORMS):
        return "it keeps running statistics"
    return replaced(type(child))


def replaced(cls: type[nn.Module]) -> str:
    """What is no longer torch's own of that which a call of one of torch's classes runs; "" if all of it is."""
    for owner, name, own in _OWN.get(cls, ()):
        if getattr(owner, name) is not own:
            return f"{owner.__name__}.{name} is replaced"
    return ""


def global_hooks() -> bool:
    """Whether hooks are registered on every module."""
    forward = _globals._global_forward_hooks or _globals._global_forward_pre_hooks
    return bool(forward or _globals._global_backward_hooks or _globals._global_backward_pre_hooks)


def watched() -> bool:
    """Whether the calls are followed: a tracer and a mode know children and functions, and hooks see only those."""
    if torch.compiler.is_compiling():
        return False
    tracing = torch.fx._symbolic_trace.is_fx_symbolic_tracing()  # is_fx_tracing() logs a warning
    return global_hooks() or tracing or left_to_torch()


def untouched(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call runs this class's own forward with the module's own parameters, and nothing else."""
    return type(module) is cls and not obstacle(module) and not global_hooks()


def doubles(upsample: nn.Module) -> bool:
    """Whether it repeats pixels, and doubles the size or has a size of its own, which may be the double."""
    state = upsample.__dict__
    factor, mode, size = (state.get(name) for name in ("scale_factor", "mode", "size"))
    if mode != "nearest" or state.get("align_corners") is not None or state.get("recompute_scale_factor"):
        return False
    if size is not None:
        return factor is None
    factors = factor if isinstance(factor, Sequence) else (factor,)
    return len(factors) > 0 and all(isinstance(f, (int, float)) and f == 2 for f in factors)


def letter(child: nn.Module, random: bool = True) -> str:
    """What a child counts as: C (convolution), L (Linear), N (batch norm), G (group or instance norm), A (activation),
    I (Identity, which returns the very tensor it was given), P (PReLU), U (upsampling to twice the size by nearest
    neighbour), D (Dropout), R (a residual's sum), or "." (other).

    Only torch's classes themselves count: a subclass (a parametrized module is one) may do anything. Dropout does not
    where the random numbers must be PyTorch's (not `random`).
    """
    found = _LETTERS.get(type(child), ".")
    if found == "." or (found == "D" and not random) or (found == "U" and not doubles(child)) or obstacle(child):
        return "."
    return found.lower() if child.__dict__.get("inplace") else found


@functools.cache
def _spans(word: str) -> tuple[Span, ...]:
    found, owned = [], False
    for match in _CHAIN.finditer(word):
        letters = match.group()
        # What works in place on a tensor that is not the container's own is seen outside: U-Nets rely on it.
        fused = letters not in ("L", "A", "a", "I", "R", "U", ".") and (owned or letters[0] not in "ad")
        found.append(Span(match.start(), match.end(), letters, fused))
        owned = letters[0] in "CLNGPU" or (owned and letters != ".")
    return tuple(found)


def spans(word: str) -> tuple[Span, ...]:
    """The children, given as one letter each, cut into chains that may run as one and single calls."""
    return _spans(word)


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
spans._dynamo_marked_constant = True
