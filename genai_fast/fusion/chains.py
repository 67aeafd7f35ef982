"""Which children of a container are torch's own and untouched, and which of those in a row run as one."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from torch import nn
from torch.nn.modules import module as _globals

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# What somebody may put on an instance beside its class: methods that only its own forward calls, tensors that are no
# parameters or buffers.
_PUT_ON = ("_conv_forward", "_output_padding", "_check_input_dim", "weight", "bias", "running_mean", "running_var")
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "none", nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu", nn.GELU: "gelu",
}  # fmt: skip

# One letter a child, so that a container is a word and a run a pattern. Lower case works in place.
_LETTERS: dict[type[nn.Module], str] = {
    **dict.fromkeys((*CONVS, *TRANSPOSED), "C"),
    nn.Linear: "L",
    **dict.fromkeys(NORMS, "N"),
    **dict.fromkeys(ACTIVATIONS, "A"),
    nn.Identity: "I",
    nn.Dropout: "D",
}
STOCK = tuple(_LETTERS)
_RUN = re.compile("[CL]?N[AaI]?|C[AaI](?![Dd])|[Aa]?[Dd]|.")


class Run(NamedTuple):
    """Children start to stop, their letters, and whether they run as one."""

    start: int
    stop: int
    letters: str
    fused: bool


def obstacle(child: nn.Module) -> str:
    """What somebody has done to a module that only calling it honours; "" if nothing."""
    state = child.__dict__
    if "forward" in state:
        return "its forward is replaced"
    if state.get("_compiled_call_impl") is not None:
        return "it is compiled"
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return "it has hooks"
    if any(name in state for name in _PUT_ON):
        return "a method or tensor of its own is replaced"
    return ""


def global_hooks() -> bool:
    """Whether hooks are registered on every module."""
    return bool(
        _globals._global_forward_hooks
        or _globals._global_forward_pre_hooks
        or _globals._global_backward_hooks
        or _globals._global_backward_pre_hooks
    )


def letter(child: nn.Module) -> str:
    """What a child counts as: C (convolution), L (Linear), N (batch norm), A (activation), I (Identity, which gives the
    very tensor it was given), D (Dropout), or "." (other).

    Only torch's classes themselves count: a subclass (a parametrized module is one) may do anything.
    """
    found = _LETTERS.get(type(child), ".")
    if found == "." or obstacle(child):
        return "."
    return found.lower() if child.__dict__.get("inplace") else found


@functools.cache
def _runs(word: str) -> tuple[Run, ...]:
    found, owned = [], False
    for match in _RUN.finditer(word):
        run = match.group()
        # What works in place on a tensor that is not the container's own is seen outside: U-Nets live with it.
        fused = run not in ("L", "A", "a", "I", ".") and (owned or run[0] not in "ad")
        found.append(Run(match.start(), match.end(), run, fused))
        owned = run[0] in "CLN" or (owned and run != ".")
    return tuple(found)


def runs(word: str) -> tuple[Run, ...]:
    """The children, given as one letter each, cut into what runs as one and what is called by itself."""
    return _runs(word)


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
runs._dynamo_marked_constant = True
