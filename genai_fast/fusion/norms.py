"""The ways to run a norm or a dropout with the activation next to it as one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.layout import for_norm, keeps_order
from genai_fast.fusion.operands import Chain, Norm, fit, needs_gradient, tensors_are_plain
from genai_fast.kernels.common.activations import output_gives_derivative


class Implementation(NamedTuple):
    """A way to run a chain: `why_not` gives the reason why it does not serve chain and input, or ""."""

    name: str
    why_not: Callable[[Chain, torch.Tensor], str]
    run: Callable[[Chain, torch.Tensor], torch.Tensor]


def _norm_why_not(chain: Chain, x: torch.Tensor) -> str:
    norm = chain.norm
    if norm.group is None and x.numel() == 0:
        return "the batch is empty"  # torch has statistics of nothing, the op refuses
    if torch.compiler.is_compiling() and (norm.group is not None or (norm.momentum is None and norm.training)):
        return "torch.compile: collectives, or a momentum that is read from a tensor"
    if not tensors_are_plain(*norm.tensors):
        return "a parameter is of a tensor subclass"
    if any(t is not None and t.shape != (x.size(1),) for t in norm.tensors):
        return "the channels do not match"  # torch's own error comes from the module
    if reason := norm.why_refused(x):
        return reason
    if norm.of_batch and norm.group is None and x.numel() == x.size(1):
        return "one value per channel"  # torch refuses it in training
    if reason := chain.activation.why_refused(x) or residual_why_not(chain, x):
        return reason
    if norm.module is not None and type(norm.module) is nn.SyncBatchNorm:
        return ""  # torch's refuses CPU tensors
    return thresholds.norm(norm.training, x, chain.activation.weight is not None)


def _norm_act(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    """activation(norm(x)), with all that _BatchNorm.forward does besides."""
    norm, act = chain.norm, chain.activation
    if norm.module is not None:
        norm.module._check_input_dim(x)
    momentum = norm.counted()
    return ops.batch_norm_act(
        for_norm(x), *norm.tensors, norm.of_batch, momentum, norm.eps, act.name, act.slope, _added(chain),
        process_group=norm.group, residual_after=_is_after(chain), act_weight=act.act_weight(x),
    )  # fmt: skip


def _added(chain: Chain) -> torch.Tensor | None:
    return None if chain.residual is None else chain.residual.tensor


def _is_after(chain: Chain) -> bool:
    return chain.residual is not None and chain.residual.after


def residual_why_not(chain: Chain, x: torch.Tensor) -> str:
    """Why the residual, if there is one, is not added in the norm's call."""
    if chain.residual is None:
        return ""
    residual, act = chain.residual.tensor, chain.activation
    if not is_plain(residual) or residual.shape != x.shape or residual.dtype is not x.dtype:
        return "the residual does not match"
    if residual.device != x.device or residual.stride() != x.stride() or for_norm(x).stride() != x.stride():
        return "the residual lies otherwise in memory"
    kept = chain.residual.after or (act.keeps_result and output_gives_derivative(act.name, act.slope))
    if not kept and needs_gradient(x, residual, chain.norm.weight, chain.norm.bias):
        return "backward would keep the residual, which a program may change"  # PyTorch keeps the sum
    return ""


def _group_norm_why_not(chain: Chain, x: torch.Tensor) -> str:
    norm, dims = chain.norm, _BATCHED.get(type(chain.norm.module))
    parameters = [t for t in (norm.weight, norm.bias) if t is not None]
    if norm.groups and chain.activation.name == "none" and x.is_cpu and chain.residual is None:
        return "PyTorch's group norm is one call too, and no slower"
    if x.dim() < 2 or (dims is not None and x.dim() != dims):
        return "the input is no batch"
    if not tensors_are_plain(*parameters):
        return "a parameter is of a tensor subclass"
    channels, groups = x.size(1), norm.groups or x.size(1)
    if groups < 1 or channels % groups or x.numel() <= max(x.size(0), 1) * groups:
        return "groups or input do not match"  # or a group has one value: torch's own error comes from the module
    if not norm.eps > 0.0:  # PyTorch's kernels disagree on planes of one value: instance norm gives 0, group norm NaN
        return "eps is not positive"
    if any(t.shape != (channels,) for t in parameters) or not fit(x, *parameters):
        return "the parameters do not match"
    if not (norm.groups and x.is_cpu) and chain.residual is not None and not x.is_contiguous():
        return "the residual lies otherwise in memory"  # the result is contiguous
    if reason := residual_why_not(chain, x):
        return reason
    return thresholds.group_norm(norm.groups is None, needs_gradient(x, *parameters), x)


def _group_norm_act(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    norm, act = chain.norm, chain.activation
    x = for_norm(x if norm.groups and x.is_cpu else x.contiguous())  # as PyTorch's norms lay out their results
    groups = norm.groups or x.size(1)
    given = (norm.weight, norm.bias, norm.eps, act.name, act.slope, _added(chain))
    return ops.group_norm_act(x, groups, *given, residual_after=_is_after(chain))


def _dropout_why_not(chain: Chain, x: torch.Tensor) -> str:
    if not chain.dropout.training:
        return "evaluation: nothing is dropped"
    if not torch.compiler.is_compiling() and not keeps_order(x):
        return "the result would lie otherwise in memory"
    # Of probability 0 it gives the very tensor it was given, as torch's does, and costs nothing.
    try:
        return thresholds.dropout(x) if 0 < chain.dropout.p <= 1 else f"p is {chain.dropout.p}"
    except (TypeError, ValueError, RuntimeError):  # the module says so itself
        return f"p is {chain.dropout.p!r}"


def _act_dropout(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    return ops.act_dropout(x, float(chain.dropout.p), True, chain.activation.name, chain.activation.slope)


def _prelu_why_not(chain: Chain, x: torch.Tensor) -> str:
    if torch.compiler.is_compiling():
        return "torch.compile"
    if x.numel() == 0 or not keeps_order(x):
        return "the input is empty, or the result would lie otherwise in memory"
    return chain.activation.why_refused(x) or thresholds.prelu(needs_gradient(x, chain.activation.weight), x)


def _prelu(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    return ops.bias_act(x, None, "prelu", act_weight=chain.activation.act_weight(x))


def _always(chain: Chain, x: torch.Tensor) -> str:
    return ""


NORMS = (
    Implementation("batch_norm_act", _norm_why_not, _norm_act),
    Implementation("modules", _always, Chain.by_modules),
)
GROUP_NORMS = (
    Implementation("group_norm_act", _group_norm_why_not, _group_norm_act),
    Implementation("modules", _always, Chain.by_modules),
)
DROPOUTS = (
    Implementation("act_dropout", _dropout_why_not, _act_dropout),
    Implementation("modules", _always, lambda chain, x: chain.dropout(chain.activation(x))),
)
PRELUS = (
    Implementation("bias_act", _prelu_why_not, _prelu),
    Implementation("modules", _always, lambda chain, x: chain.activation(x)),
)


def without_convolution(chain: Chain) -> tuple[Implementation, ...]:
    """The ways to run a chain that has no convolution."""
    if chain.norm is not None:
        return NORMS if isinstance(chain.norm, Norm) else GROUP_NORMS
    return PRELUS if chain.dropout is None else DROPOUTS


# Dimensions of a batch, which instance norm's modules ask for.
_BATCHED = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
