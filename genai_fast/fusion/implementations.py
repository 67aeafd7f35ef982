"""The ways to run a convolution, with the norm and activation behind it, and which of them serves a call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import autotune, ops
from genai_fast.backends import forced_backend
from genai_fast.fusion import im2col, thresholds
from genai_fast.fusion.chains import CONVS, TRANSPOSED
from genai_fast.kernels.conv_transpose.shapes import FEW_CHANNELS, LARGEST_KERNEL, LARGEST_STRIDE, miscounted
from genai_fast.ops.conv2d import serves as conv2d_serves
from genai_fast.ops.conv_transpose import serves as conv_transpose_serves

TORCH, CHANNELS_LAST, GEMM, PATCHES, KERNEL = "torch", "channels_last", "gemm", "patches", "kernel"
SMALL = "small"  # torch's too: nothing else would pay
_PLAIN = (torch.Tensor, nn.Parameter)

# As run: letters, modules, input, path -> output.
Unit = Callable[[str, Sequence[nn.Module], torch.Tensor, str], torch.Tensor]


def path_of(letters: str, modules: Sequence[nn.Module], x: torch.Tensor, run: Unit) -> str:
    """How to run a convolution and what follows it on x."""
    conv = modules[0]
    if torch.compiler.is_compiling() or type(conv) not in (nn.Conv2d, nn.ConvTranspose2d):
        return TORCH  # the compiler lays tensors out by itself
    if x.dim() != 4 or x.numel() == 0 or type(conv.weight) not in _PLAIN:
        return TORCH
    if not thresholds.path(conv, x):
        return SMALL
    key = _key(letters, modules, x)

    def open_paths() -> tuple[dict[str, autotune.Maker], str]:
        names = [TORCH]
        if _layout(x) != CHANNELS_LAST and not (x.is_cpu and _miscounted(conv)):
            names.append(CHANNELS_LAST)
        if _is_gemm(conv, x):
            names.append(GEMM)
        elif im2col.serves(conv, x):
            names.append(PATCHES)
        if _has_kernel(conv, x):
            names.append(KERNEL)
        # Unmeasured, ours is taken where it has always won: for an image on a CPU.
        fixed = KERNEL if KERNEL in names and x.is_cpu and "N" not in letters else TORCH
        return {name: _maker(letters, modules, x, name, run) for name in names}, fixed

    return autotune.choose(key, x.device, open_paths).path


def convolution(module: nn.Module) -> str:
    """In words, the paths among which measurement chooses; "" for what is no convolution."""
    if type(module) in (nn.Conv2d, nn.ConvTranspose2d):
        ways = "torch, channels_last, gemm (of 1 x 1), patches (of few pixels, CPU)"
        return f"convolution by the fastest of {ways}{_kernel_words(module)}"
    return "convolution by torch" if type(module) in CONVS + TRANSPOSED else ""


def _kernel_words(conv: nn.Module) -> str:
    if reason := _unlike(conv):
        return f"; no kernel of ours: {reason}"
    if type(conv) is nn.Conv2d:
        return ", kernel (the input's gradient)" if conv.in_channels <= FEW_CHANNELS else ""
    return ", kernel" if conv.out_channels <= FEW_CHANNELS else ", kernel (CUDA)"


def _unlike(conv: nn.Module) -> str:
    """What keeps a convolution from the kernels, whatever its input; "" if nothing does."""
    if conv.groups != 1:
        return f"groups={conv.groups}"
    if tuple(conv.dilation) != (1, 1):
        return f"dilation={conv.dilation}"
    if max(conv.stride) > LARGEST_STRIDE:
        return f"stride={conv.stride}"
    if max(conv.kernel_size) > LARGEST_KERNEL:
        return f"kernel_size={conv.kernel_size}"
    return f"padding={conv.padding!r}" if conv.padding_mode != "zeros" or isinstance(conv.padding, str) else ""


def _has_kernel(conv: nn.Module, x: torch.Tensor) -> bool:
    """Whether a kernel of ours computes the transposed convolution, or that of a convolution's backward to an image."""
    if _unlike(conv) or x.size(1) != conv.in_channels:
        return False
    if type(conv) is nn.ConvTranspose2d:
        return not conv_transpose_serves(x, conv.weight, conv.stride, conv.padding, conv.output_padding)
    if conv.in_channels > FEW_CHANNELS or not _needs_gradient(x):
        return False
    return not conv2d_serves(x, conv.weight, conv.stride, conv.padding)


def _miscounted(conv: nn.Module) -> bool:
    larger = conv.out_channels if type(conv) is nn.ConvTranspose2d else conv.in_channels
    return miscounted(larger, conv.kernel_size, conv.stride)


def _is_gemm(conv: nn.Module, x: torch.Tensor) -> bool:
    """Whether one matrix product is the convolution: all of a 1 x 1 input or output meets all of the weight."""
    if (
        conv.groups != 1
        or conv.padding_mode != "zeros"
        or tuple(conv.padding) != (0, 0)
        or tuple(conv.dilation) != (1, 1)
    ):
        return False
    if type(conv) is nn.ConvTranspose2d:
        return tuple(x.shape[1:]) == (conv.in_channels, 1, 1) and tuple(conv.output_padding) == (0, 0)
    return tuple(x.shape[1:]) == (conv.in_channels, *conv.kernel_size)


def convolved(
    conv: nn.Module, x: torch.Tensor, path: str, activation: str = "none", slope: float = 0.0
) -> torch.Tensor:
    """conv(x), and on a transposed convolution's own path its activation too."""
    if path not in (GEMM, PATCHES, KERNEL):
        return conv(x)
    if path == PATCHES:
        return im2col.convolved(conv, x)
    weight, bias = conv.weight, conv.bias
    if path == KERNEL:
        if type(conv) is nn.Conv2d:
            return ops.conv2d(x, weight, bias, conv.stride, conv.padding)
        return ops.conv_transpose2d(x, weight, bias, conv.stride, conv.padding, conv.output_padding, activation, slope)
    if type(conv) is nn.Conv2d:
        return F.linear(x.flatten(1), weight.flatten(1), bias).unflatten(1, (-1, 1, 1))
    y = torch.mm(x.flatten(1), weight.flatten(1)).unflatten(1, weight.shape[1:])
    return y if bias is None else y + bias.view(-1, 1, 1)


def _layout(x: torch.Tensor) -> str:
    if x.is_contiguous():
        return "contiguous"
    return CHANNELS_LAST if x.is_contiguous(memory_format=torch.channels_last) else "strided"


def _autocast(x: torch.Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _key(letters: str, modules: Sequence[nn.Module], x: torch.Tensor) -> autotune.Key:
    """All that the time of a call depends on."""
    conv = modules[0]
    narrow, forced = _autocast(x), forced_backend()
    return (
        type(conv).__name__, tuple(x.shape), "to", conv.out_channels, "kernel", conv.kernel_size, "stride", conv.stride,
        "padding", conv.padding, conv.output_padding, "dilation", conv.dilation, "groups", conv.groups,
        *("bias" for _ in range(conv.bias is not None)), *(type(m).__name__ for m in modules[1:]),
        str(x.dtype).removeprefix("torch."), *((str(narrow).removeprefix("torch."),) if narrow else _multiplied(x)),
        _layout(x), "weight", _layout(conv.weight), "training" if modules[len(letters) > 1].training else "evaluation",
        "gradients", _needs_gradient(x), _needs_gradient(*conv.parameters()), *((forced,) if forced else ()),
    )  # fmt: skip


def _multiplied(x: torch.Tensor) -> tuple[str, ...]:
    """How a GPU multiplies float32 in convolutions."""
    return (torch.backends.cudnn.conv.fp32_precision,) if x.is_cuda and x.dtype is torch.float32 else ()


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _maker(letters: str, modules: Sequence[nn.Module], x: torch.Tensor, path: str, run: Unit) -> autotune.Maker:
    """Gives the call to clock: the same modules and a tensor like x, copied; forward, and backward if it will come."""
    gradients, narrow = torch.is_grad_enabled(), _autocast(x)

    def make() -> Callable[[], Any]:
        copies = [copy.deepcopy(module) for module in modules]
        generator = torch.Generator(x.device).manual_seed(0)  # not the user's: measuring must not move it
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).normal_(generator=generator)
        like.requires_grad_(x.requires_grad)
        parameters = [p for module in copies for p in module.parameters()]
        leaves = [t for t in (like, *parameters) if t.requires_grad] if gradients else []
        upstream: list[torch.Tensor] = []

        def call() -> None:
            with torch.set_grad_enabled(gradients), torch.autocast(x.device.type, narrow, enabled=narrow is not None):
                y = restored(run(letters, copies, laid_out(like, path), path), like)
            if leaves:
                upstream[:] = upstream or [torch.ones_like(y)]
                torch.autograd.grad(y, leaves, upstream[0])

        return call

    return make


def laid_out(x: torch.Tensor, path: str) -> torch.Tensor:
    """x as the path wants it in memory."""
    return x.contiguous(memory_format=torch.channels_last) if path == CHANNELS_LAST else x


def restored(y: Any, given: torch.Tensor) -> Any:
    """y in the memory layout that torch gives it for an input such as `given`."""
    if isinstance(y, torch.Tensor) and y.dim() == 4 and _layout(given) != CHANNELS_LAST:
        return y.contiguous()
    return y
