"""Modules called one after another, those in a row that one kernel serves as one call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad

from genai_fast import ops
from genai_fast.backends import FallbackWarning, choose, forced_backend
from genai_fast.fusion import thresholds
from genai_fast.fusion.chains import ACTIVATIONS, global_hooks, letter, runs
from genai_fast.fusion.conv_bn_folding import folded, folds, scaled
from genai_fast.fusion.implementations import (
    CHANNELS_LAST,
    GEMM,
    KERNEL,
    PATCHES,
    SMALL,
    TORCH,
    convolved,
    laid_out,
    path_of,
    restored,
)
from genai_fast.ops.dispatch import needs_graph

_PLAIN = (torch.Tensor, nn.Parameter)


def run(modules: Sequence[nn.Module], x: Any) -> Any:
    """What calling the modules one after another gives."""
    if global_hooks() or _observed():
        return _one_by_one(modules, x)
    given, relaid = x, False
    for start, stop, letters, fused in runs("".join([letter(module) for module in modules])):
        here = modules[start:stop]
        if relaid and letters == ".":  # what is not torch's own may ask for the layout, as x.view does
            x, relaid = restored(x, given), False
        if not (fused and _fits(x)):
            x = _one_by_one(here, x)
            continue
        path = path_of(letters, here, x, _as_one) if letters[0] == "C" else TORCH
        relaid = relaid or path in (CHANNELS_LAST, KERNEL, PATCHES)
        x = _as_one(letters, here, laid_out(x, path), path)
    return restored(x, given) if relaid else x


def _one_by_one(modules: Iterable[nn.Module], x: Any) -> Any:
    for module in modules:
        x = module(x)
    return x


def _observed() -> bool:
    """Whether something transforms the modules or takes derivatives forward: it gets to see torch's own operators."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return bool(
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._get_tracing_state()
    )


def _fits(x: Any) -> bool:
    """Whether the ops take x as the modules would."""
    if type(x) not in _PLAIN:
        return False
    if torch.compiler.is_compiling():
        return True
    return (
        x.layout is torch.strided
        and x.dim() > 1
        and not x.is_meta
        and _served(forced_backend(), x.device.type, x.dtype)
    )


@functools.cache
def _served(forced: str, device: str, dtype: torch.dtype) -> bool:
    """Whether there is a kernel. PyTorch's own modules are faster than the reference, unless that is asked for."""
    _, reason = choose("batch_norm_act_apply", forced, device, dtype)
    if reason:
        warnings.warn(f"FusedSequential calls its modules one by one: {reason}", FallbackWarning, stacklevel=5)
    return not reason


def _as_one(letters: str, modules: Sequence[nn.Module], x: torch.Tensor, path: str) -> Any:
    if letters[-1] in "Dd":
        # Of probability 0 it gives the very tensor it was given, as torch's does, and costs nothing.
        fused = modules[-1].training and modules[-1].p > 0 and thresholds.dropout(x)
        return _act_dropout(modules, x) if fused else _one_by_one(modules, x)
    if "N" not in letters:
        return _convolved_act(modules, x, path)
    conv = modules[0] if letters[0] in "CL" else None
    norm = modules[0 if conv is None else 1]
    group = _process_group(norm)
    if x.numel() == 0 and group is None:
        return _one_by_one(modules, x)  # torch has statistics of nothing, the op refuses
    if torch.compiler.is_compiling() and (group is not None or norm.momentum is None):
        return _one_by_one(modules, x)  # collectives, and a momentum that is read from a tensor: left to torch
    activation, slope = _activation(modules[-1] if letters[-1] in "Aa" else None)
    if path == KERNEL and type(conv) is nn.ConvTranspose2d:
        if group is None and _batch_statistics(norm):
            return _norm_act(norm, None, x, activation, slope, conv)
        if not needs_graph((x, *conv.parameters(), *norm.parameters())):
            norm._check_input_dim(x)
            settings = (conv.stride, conv.padding, conv.output_padding, activation, slope)
            return ops.conv_transpose2d(x, *scaled(conv, norm), *settings)
        return _norm_act(norm, group, convolved(conv, x, KERNEL), activation, slope)
    if conv is not None:
        if path not in (SMALL, GEMM, KERNEL, PATCHES) and not torch.compiler.is_compiling() and folds(conv, norm, x):
            return folded(conv, norm, x, activation, slope)
        x = convolved(conv, x, path)
    if not thresholds.norm(norm, x) or x.size(1) != norm.num_features:
        return _one_by_one(modules[conv is not None :], x)
    return _norm_act(norm, group, x, activation, slope)


def _activation(module: nn.Module | None) -> tuple[str, float]:
    """Name and slope, as ops call them."""
    if module is None:
        return "none", 0.0
    name = ACTIVATIONS[type(module)]
    if name == "gelu" and module.approximate == "tanh":
        name = "gelu_tanh"
    return name, float(getattr(module, "negative_slope", 0.0))


def _convolved_act(modules: Sequence[nn.Module], x: torch.Tensor, path: str) -> torch.Tensor:
    """A convolution, and the activation behind it if there is one."""
    conv, *after = modules
    if path != KERNEL or type(conv) is not nn.ConvTranspose2d:
        return _one_by_one(after, convolved(conv, x, path))
    return convolved(conv, x, path, *_activation(after[0] if after else None))


def _act_dropout(modules: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    first, dropout = modules[0], modules[-1]
    activation, slope = _activation(None if first is dropout else first)
    return ops.act_dropout(x, dropout.p, True, activation, slope, save_output=getattr(first, "inplace", False))


def _process_group(norm: nn.Module) -> Any:
    """The processes that this norm takes its statistics with; None for this one alone."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _batch_statistics(norm: nn.Module) -> bool:
    """Whether the norm uses the batch's statistics."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _norm_act(
    norm: nn.Module, group: Any, x: torch.Tensor, activation: str, slope: float, conv: nn.Module | None = None
) -> torch.Tensor:
    """activation(norm(x)), with all that _BatchNorm.forward does beside; of conv(x) if there is one."""
    norm._check_input_dim(x)
    parameters, buffers = norm._parameters, norm._buffers  # norm.weight looks in three places
    training, momentum = norm.training, norm.momentum
    mean, var = buffers["running_mean"], buffers["running_var"]
    if training:
        seen = buffers["num_batches_tracked"]
        if norm.track_running_stats and seen is not None:
            seen.add_(1)
            if momentum is None:
                momentum = 1.0 / float(seen)
        if not norm.track_running_stats:
            mean = var = None
    momentum = 0.0 if momentum is None else momentum
    affine = (parameters["weight"], parameters["bias"], mean, var)
    if conv is not None:
        return ops.conv_transpose2d_batch_norm_act(
            x, conv.weight, conv.bias, *affine, momentum, norm.eps, conv.stride, conv.padding, conv.output_padding,
            activation, slope,
        )  # fmt: skip
    return ops.batch_norm_act(
        x, *affine, training or (mean is None and var is None), momentum, norm.eps, activation, slope,
        process_group=group,
    )  # fmt: skip
