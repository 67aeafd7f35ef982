"""The ways to run a chain as one, and the choice among them.

An `Implementation` says why it does not serve a chain on an input, or runs it. The lists here are in order: without a
measurement the first that serves is taken. Convolutions are measured, on tensors made up for it: `autotune`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import autotune, ops
from genai_fast.backends import forced_backend
from genai_fast.fusion import conv_bn_folding, im2col, thresholds
from genai_fast.fusion.layout import guarded, of_result, relaid
from genai_fast.fusion.norms import NORMS, Implementation, without_convolution
from genai_fast.fusion.operands import (
    Chain,
    Convolution,
    like,
    memory_format,
    needs_gradient,
    suggests_channels_last,
    tensors_are_plain,
)
from genai_fast.kernels.conv_transpose.shapes import FEW_CHANNELS, LARGEST_KERNEL, LARGEST_STRIDE, miscounted
from genai_fast.ops.conv2d import serves as conv2d_why_not
from genai_fast.ops.conv_transpose import serves as conv_transpose_why_not
from genai_fast.precision import autocast_dtype

# Multiplications of the part of a batch that is measured: milliseconds. Matrix products of patches gain less from more
# rows than oneDNN's convolutions do, and lose where a small part of the batch says that they win.
_MEASURED = {"cpu": 1 << 27, "cuda": 1 << 34}
_MEASURED_WITH_PATCHES = 1 << 30


class Decision(NamedTuple):
    """What serves a call of a chain, why the others do not, and the times in microseconds if it was measured."""

    name: str
    reasons: dict[str, str]
    microseconds: dict[str, float]


Listener = Callable[[Sequence[nn.Module], Decision], None]
listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def decide(modules: Sequence[nn.Module], chain: Chain, x: torch.Tensor) -> Implementation:
    """What serves this call; the listener, if any, is told why."""
    if chain.conv is not None:
        options, chosen, times = _options(chain), *_fastest(chain, x)
    else:
        options, times = without_convolution(chain), {}
        chosen = next(option for option in options if not option.why_not(chain, x))
    if not torch.compiler.is_compiling() and (tell := listener.get()) is not None:
        reasons = {option.name: option.why_not(chain, x) for option in options if option is not chosen}
        slower = {name: "measured slower" if times else "not measured" for name, why in reasons.items() if not why}
        tell(modules, Decision(chosen.name, reasons | slower, times))
    return chosen


# --- convolutions, with what follows them


def _after(chain: Chain, y: torch.Tensor) -> torch.Tensor:
    """The norm and the activation after the convolution, which gave y."""
    if chain.norm is None:
        return chain.activation(y)
    return next(option for option in NORMS if not option.why_not(chain, y)).run(chain, y)


def _plane_why_not(chain: Chain, x: torch.Tensor) -> str:
    """Why nothing but PyTorch's convolution comes into question."""
    conv = chain.conv
    if torch.compiler.is_compiling():
        return "torch.compile chooses layouts itself"
    if conv.weight.dim() != 4 or x.dim() != 4:
        return "it is for two-dimensional convolutions of batches"
    if x.numel() == 0 or x.size(1) != conv.channels[0] or x.device != conv.weight.device:
        return "the input is empty or does not match"
    if not tensors_are_plain(conv.weight, conv.bias):
        return "a parameter is of a tensor subclass"
    if any(t is not None and t.dtype is not x.dtype for t in (conv.weight, conv.bias)) and not autocast_dtype(
        x.device.type
    ):
        return "input and weight differ in dtype"
    return thresholds.convolution(x, conv.multiplications(x))


def _torch_why_not(chain: Chain, x: torch.Tensor) -> str:
    return "" if _folded_why_not(chain, x) else "the norm folds into the convolution"


def _torch(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    return _after(chain, chain.conv(x))


def _relayout_why_not(chain: Chain, x: torch.Tensor) -> str:
    conv = chain.conv
    if reason := _plane_why_not(chain, x):
        return reason
    if suggests_channels_last(x):
        return "the input is in channels_last"
    if x.is_cpu and miscounted(conv.channels[conv.transposed], conv.kernel, conv.stride):
        return "oneDNN computes this geometry wrong in channels_last"
    return ""


def _folded_why_not(chain: Chain, x: torch.Tensor) -> str:
    if torch.compiler.is_compiling():
        return "torch.compile"
    if chain.conv.weight.dim() == 4 and (reason := _plane_why_not(chain, x)):
        return reason
    return conv_bn_folding.why_not(chain, x)


def _gemm_why_not(chain: Chain, x: torch.Tensor) -> str:
    """One matrix product is the convolution if all of a 1 x 1 input or output meets all of the weight."""
    conv = chain.conv
    if reason := _plane_why_not(chain, x):
        return reason
    if not conv.is_default or conv.padding != (0, 0) or conv.output_padding != (0, 0):
        return "groups, dilation or padding"
    if tuple(x.shape[2:]) != ((1, 1) if conv.transposed else conv.kernel):
        return "neither input nor output is 1 x 1"
    return ""


def _gemm(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    _, _, weight, bias, *_ = conv = chain.conv
    if conv.transposed:
        y = torch.mm(x.flatten(1), weight.flatten(1)).unflatten(1, weight.shape[1:])
        y = y if bias is None else y + bias.view(-1, 1, 1)
    else:
        y = F.linear(x.flatten(1), weight.flatten(1), bias).unflatten(1, (-1, 1, 1))
    return _after(chain, y)


def kernel_why_not(conv: Convolution) -> str:
    """What keeps a convolution from our kernels, whatever its input; "" if nothing does."""
    if not conv.is_default:
        return "groups, dilation or padding other than numbers of zeros"
    if max(conv.stride) > LARGEST_STRIDE:
        return f"stride {conv.stride}"
    if max(conv.kernel) > LARGEST_KERNEL:
        return f"kernel {conv.kernel}"
    if not conv.transposed and conv.channels[0] > FEW_CHANNELS:
        return f"{conv.channels[0]} channels are more than an image's {FEW_CHANNELS}"
    return ""


def _kernel_why_not(chain: Chain, x: torch.Tensor) -> str:
    """A kernel of ours computes the transposed convolution, or that of a convolution's backward to an image."""
    conv = chain.conv
    if reason := _plane_why_not(chain, x) or kernel_why_not(conv):
        return reason
    if conv.transposed:
        if any(more >= step for more, step in zip(conv.output_padding, conv.stride, strict=True)):
            return "the output padding is not below the stride"
        if min(conv.output_plane(x)) < 1:
            return "the result has no pixels"
        if chain.norm is not None and (reason := chain.norm.why_refused(x)):
            return reason
        if chain.norm is not None and chain.norm.of_batch and len(x) * math.prod(conv.output_plane(x)) == 1:
            return "one value per channel"
        return conv_transpose_why_not(x, conv.weight, conv.stride, conv.padding, conv.output_padding)
    if not needs_gradient(x):
        return "the input needs no gradient"
    if min(conv.output_plane(x)) < 1:
        return "the result has no pixels"
    return conv2d_why_not(x, conv.weight, conv.stride, conv.padding)


def _kernel(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    conv, norm, act = chain.conv, chain.norm, chain.activation
    x, settings = guarded(x), (conv.stride, conv.padding)
    if not conv.transposed:
        return _after(chain, ops.conv2d(x, conv.weight, conv.bias, *settings))
    settings = (*settings, conv.output_padding)
    if norm is None:
        if not act.keeps_result and needs_gradient(x, conv.weight, conv.bias):
            return act(ops.conv_transpose2d(x, conv.weight, conv.bias, *settings))
        return ops.conv_transpose2d(x, conv.weight, conv.bias, *settings, act.name, act.slope)
    if norm.group is None and norm.of_batch and act.weight is None:
        if norm.module is not None:
            norm.module._check_input_dim(x)
        momentum = norm.counted()
        return ops.conv_transpose2d_batch_norm_act(
            x, conv.weight, conv.bias, *norm.tensors, momentum, norm.eps, *settings, act.name, act.slope
        )
    if norm.group is None and act.weight is None and not needs_gradient(x, *chain.leaves):
        if norm.module is not None:
            norm.module._check_input_dim(x)
        return ops.conv_transpose2d(x, *conv_bn_folding.folded(conv, norm), *settings, act.name, act.slope)
    return _after(chain, ops.conv_transpose2d(x, conv.weight, conv.bias, *settings))


TORCH = Implementation("torch", _torch_why_not, _torch)
CONVOLUTIONS = (
    Implementation("folded", _folded_why_not, conv_bn_folding.run),
    TORCH,
    Implementation(
        "folded_channels_last", lambda chain, x: _relayout_why_not(chain, x) or _folded_why_not(chain, x),
        lambda chain, x: conv_bn_folding.run(chain, relaid(x, torch.channels_last)),
    ),
    Implementation(
        "channels_last", lambda chain, x: _relayout_why_not(chain, x) or _torch_why_not(chain, x),
        lambda chain, x: _torch(chain, relaid(x, torch.channels_last)),
    ),
    Implementation("gemm", _gemm_why_not, _gemm),
    Implementation(
        "im2col", lambda chain, x: _plane_why_not(chain, x) or im2col.why_not(chain.conv, x),
        lambda chain, x: _after(chain, im2col.convolved(chain.conv, guarded(x))),
    ),
    Implementation("kernel", _kernel_why_not, _kernel),
)  # fmt: skip


def _upsampled_why_not(chain: Chain, x: torch.Tensor) -> str:
    """Why upsampling and convolution are not one convolution of the smaller image."""
    conv = chain.conv
    if reason := _plane_why_not(chain, x):
        return reason
    size = chain.upsample.size
    if size is not None:
        given = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        if given != (2 * x.size(2), 2 * x.size(3)):
            return "it does not double the size"
    if conv.transposed or not conv.is_default or (conv.kernel, conv.stride, conv.padding) != ((3, 3), (1, 1), (1, 1)):
        return "the convolution is not 3 x 3 with padding 1"
    return ""


def _upsampled(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    return _after(chain, ops.upsample_conv2d(guarded(x), chain.conv.weight, chain.conv.bias))


def _apart(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    larger, rest = chain.upsample(x), chain._replace(upsample=None)
    return _fastest(rest, larger)[0].run(rest, larger)


APART = Implementation("upsampled first", lambda chain, x: "", _apart)
UPSAMPLED = (APART, Implementation("upsample_conv2d", _upsampled_why_not, _upsampled))
_BY_NAME = {option.name: option for option in (*CONVOLUTIONS, *UPSAMPLED)}


def _options(chain: Chain) -> tuple[Implementation, ...]:
    return CONVOLUTIONS if chain.upsample is None else UPSAMPLED


def _fastest(chain: Chain, x: torch.Tensor) -> tuple[Implementation, dict[str, float]]:
    if chain.upsample is not None and _upsampled_why_not(chain, x):
        return APART, {}
    if _plane_why_not(chain, x):
        folded = CONVOLUTIONS[0]
        return (TORCH if folded.why_not(chain, x) else folded), {}
    shape = (_measured_rows(chain.conv, x), *x.shape[2:])

    def candidates() -> tuple[dict[str, autotune.Maker], str]:
        serving = [option for option in _options(chain) if not option.why_not(chain, x)]
        if chain.upsample is not None:
            serving[0] = _known_apart(chain, x, shape[0])
        names = [option.name for option in serving]
        # Unmeasured, ours is taken where it has always won: for an image on a CPU.
        default = "kernel" if "kernel" in names and x.is_cpu and chain.norm is None else names[0]
        return dict(zip(names, _makers(serving, chain, x, shape[0]), strict=True)), default

    choice = autotune.choose(_family(chain, x), shape, x.device, candidates)
    return _BY_NAME[choice.name], choice.microseconds


def _known_apart(chain: Chain, x: torch.Tensor, rows: int) -> Implementation:
    """Upsampling, then what is fastest after it: found now, as nothing is measured within a measurement."""
    size = (rows, x.size(1), 2 * x.size(2), 2 * x.size(3))
    larger = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    chosen, _ = _fastest(chain._replace(upsample=None), larger.requires_grad_(x.requires_grad))
    return APART._replace(run=lambda made, x: chosen.run(made._replace(upsample=None), made.upsample(x)))


def _measured_rows(conv: Convolution, x: torch.Tensor) -> int:
    """The part of the batch that is measured, a power of two: no more time and memory than a small call takes."""
    each = max(conv.multiplications(x) // len(x), 1)
    patches = not im2col.why_not(conv, x)
    most = max((_MEASURED_WITH_PATCHES if patches else _MEASURED.get(x.device.type, 1 << 27)) // each, 1)
    return 1 << (min(len(x), most).bit_length() - 1)


def _makers(serving: Sequence[Implementation], chain: Chain, x: torch.Tensor, rows: int) -> list[autotune.Maker]:
    """For each, what gives the call to time: forward, and backward if it will come, on tensors made up once."""
    gradients, narrow, prepared = torch.is_grad_enabled(), autocast_dtype(x.device.type), []

    def prepare() -> tuple[Chain, torch.Tensor]:
        if not prepared:
            generator = torch.Generator(x.device).manual_seed(0)  # not the user's: measuring must not move it
            part = x.detach()[:rows].requires_grad_(x.requires_grad)
            prepared.append((chain.made_up(generator), like(part, generator)))
        return prepared[0]

    def maker(option: Implementation) -> autotune.Maker:
        def make() -> Callable[[], Any]:
            made, given = prepare()
            leaves = [t for t in (given, *made.leaves) if t.requires_grad] if gradients else []
            wanted = of_result(made.conv, memory_format(given))
            upstream: list[torch.Tensor] = []

            def call() -> None:
                autocast = torch.autocast(x.device.type, narrow, enabled=narrow is not None)
                with torch.set_grad_enabled(gradients), autocast:
                    y = relaid(option.run(made, given), wanted)
                if leaves:
                    upstream[:] = upstream or [torch.ones_like(y)]
                    torch.autograd.grad(y, leaves, upstream[0])

            return call

        return make

    return [maker(option) for option in serving]


def _layout(x: torch.Tensor) -> str:
    if x.is_contiguous():
        return "contiguous"
    return "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else "strided"


def _family(chain: Chain, x: torch.Tensor) -> autotune.Key:
    """All that the time of a call depends on, but for batch and plane."""
    conv, norm, act = chain.conv, chain.norm, chain.activation
    narrow, forced = autocast_dtype(x.device.type), forced_backend()
    precision = (str(narrow),) if narrow else _multiplied(x)
    after = () if norm is None else ("norm", norm.training, norm.of_batch, norm.weight is not None)
    return (
        *(() if chain.upsample is None else ("upsample",)), "conv_transpose" if conv.transposed else "conv",
        conv.channels, "kernel", conv.kernel, "stride", conv.stride,
        "padding", conv.padding, conv.output_padding, conv.padding_mode, "dilation", conv.dilation, "groups",
        conv.groups, *("bias" for _ in range(conv.bias is not None)), *after, act.name, str(x.dtype), *precision,
        _layout(x), "weight", _layout(conv.weight), "gradients", needs_gradient(x), needs_gradient(*chain.leaves),
        "im2col", not im2col.why_not(conv, x), *((forced,) if forced else ()),
        *(() if torch.backends.mkldnn.enabled else ("no oneDNN",)),
    )  # fmt: skip


def _multiplied(x: torch.Tensor) -> tuple[str, ...]:
    """How a GPU multiplies float32 in convolutions."""
    return (torch.backends.cudnn.conv.fp32_precision,) if x.is_cuda and x.dtype is torch.float32 else ()
