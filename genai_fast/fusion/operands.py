"""What a chain of modules computes with: tensors and plain numbers, read from the modules or made up to be timed.

Settings are read as a plain call reads them: an int serves all dimensions, sizes come from the weight, and any number
that converts is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from genai_fast.backends import is_plain
from genai_fast.fusion.chains import ACTIVATIONS, TRANSPOSED
from genai_fast.precision import autocast_dtype

_LARGEST = torch.finfo(torch.float32).max


def tensors_are_plain(*tensors: torch.Tensor | None) -> bool:
    return all(t is None or is_plain(t) for t in tensors)


def fit(x: torch.Tensor, *given: torch.Tensor | None) -> bool:
    """Whether PyTorch's norms take x with these parameters: on its device, in its dtype, or float32 with a narrow x."""
    parameters = [t for t in given if t is not None]
    narrow = x.dtype in (torch.bfloat16, torch.float16) and all(t.dtype is torch.float32 for t in parameters)
    return all(t.device == x.device and (narrow or t.dtype is x.dtype) for t in parameters)


def like(x: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor | None:
    """A leaf of random numbers with x's sizes, strides, dtype and requires_grad."""
    if x is None:
        return None
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return made.normal_(generator=generator).requires_grad_(x.requires_grad)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def suggests_channels_last(x: torch.Tensor) -> bool:
    """Whether torch's convolutions take x [N, C, H, W] for channels_last, by its strides; in doubt they do not."""
    (n, c, h, w), (sn, sc, sh, sw) = x.shape, x.stride()
    if sc == 0 or 0 in (n, c, h, w):
        return False
    least = 0
    for size, stride in ((c, sc), (w, sw), (h, sh)):
        if stride < least:
            return False
        least = stride * size if size > 1 else stride
    return sn >= least and least != sc


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Of a four-dimensional tensor."""
    return torch.channels_last if suggests_channels_last(x) else torch.contiguous_format


def _whole(value: Any) -> int:
    """A size, of the types that torch's convolutions take for one. Raises: TypeError on others."""
    if isinstance(value, (bool, float, str)):
        raise TypeError(f"expected a whole number, got {value!r}")
    return int(value)


def _real(value: Any) -> float:
    """A number, of the types that torch's functions take for one. Raises: TypeError or ValueError on others."""
    if isinstance(value, str) or (isinstance(value, torch.Tensor) and (value.dim() or value.requires_grad)):
        raise TypeError(f"expected a number, got {value!r}")
    number = float(value)
    if not abs(number) <= _LARGEST:
        raise ValueError(f"expected a finite number, got {value!r}")
    return number


class Convolution(NamedTuple):
    """A convolution or transposed convolution: [N, C, ...] to [N, C_out, ...]."""

    module: nn.Module | None  # None of one made up
    transposed: bool
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @staticmethod
    def of(conv: nn.Module) -> Convolution:
        weight, dims = conv._parameters["weight"], len(conv._parameters["weight"].shape) - 2

        def sizes(value: Any) -> tuple[int, ...]:
            given = tuple(value) if isinstance(value, Sequence) else (value,)
            if len(given) not in (1, dims):
                raise ValueError(f"expected 1 or {dims} sizes, got {given}")
            return tuple(map(_whole, given * dims if len(given) == 1 else given))

        transposed = type(conv) in TRANSPOSED
        if transposed and not isinstance(conv.padding, tuple):
            raise TypeError(f"padding: expected a tuple, got {conv.padding!r}")
        padding = conv.padding if isinstance(conv.padding, str) else sizes(conv.padding)
        stride, dilation, groups = sizes(conv.stride), sizes(conv.dilation), _whole(conv.groups)
        if min(*stride, *dilation, groups) < 1:
            raise ValueError("stride, dilation and groups: expected positive numbers")
        return Convolution(
            conv, transposed, weight, conv._parameters["bias"], stride, padding, sizes(conv.output_padding), dilation,
            groups, conv.padding_mode,
        )  # fmt: skip

    @property
    def channels(self) -> tuple[int, int]:
        """Of input and output."""
        first, second = self.weight.shape[:2]
        return (first, second * self.groups) if self.transposed else (second * self.groups, first)

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def is_default(self) -> bool:
        """Whether groups and dilation are 1, and the padding numbers of zeros."""
        zeros = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        return self.groups == 1 and zeros and all(d == 1 for d in self.dilation)

    def multiplications(self, x: torch.Tensor) -> int:
        """About how many the convolution of x takes."""
        inner = self.weight.numel() // max(self.weight.size(0 if self.transposed else 1) * self.groups, 1)
        return x.numel() * inner // (1 if self.transposed else math.prod(self.stride))

    def output_plane(self, x: torch.Tensor) -> tuple[int, ...]:
        """Sizes of the result's plane; 0 where there is none."""
        if isinstance(self.padding, str):
            return tuple(x.shape[2:])
        sizes = []
        for k, size in enumerate(x.shape[2:]):
            reach = self.dilation[k] * (self.kernel[k] - 1)
            if self.transposed:
                sizes.append((size - 1) * self.stride[k] - 2 * self.padding[k] + reach + self.output_padding[k] + 1)
            else:
                sizes.append((size + 2 * self.padding[k] - reach - 1) // self.stride[k] + 1)
        return tuple(max(size, 0) for size in sizes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the module gives."""
        if self.module is not None:
            return self.module(x)
        function = getattr(F, f"conv{'_transpose' if self.transposed else ''}{self.weight.dim() - 2}d")
        stride, padding, dilation = self.stride, self.padding, self.dilation
        if self.transposed:
            return function(x, self.weight, self.bias, stride, padding, self.output_padding, self.groups, dilation)
        if self.padding_mode != "zeros":  # the cost of another border is about that of this one
            padding = "same" if isinstance(padding, str) else padding
        return function(x, self.weight, self.bias, stride, padding, dilation, self.groups)

    def made_up(self, generator: torch.Generator) -> Convolution:
        weight, bias = like(self.weight, generator), like(self.bias, generator)
        return self._replace(module=None, weight=weight, bias=bias)


class Norm(NamedTuple):
    """Batch norm, of this process's batch or of a group's."""

    module: nn.Module | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor | None
    var: torch.Tensor | None
    training: bool
    momentum: float | None
    eps: float
    group: Any  # the processes that share their statistics; None: this one alone

    @staticmethod
    def of(norm: nn.Module) -> Norm:
        parameters, buffers = norm._parameters, norm._buffers  # norm.weight looks in three places
        mean, var, training = buffers["running_mean"], buffers["running_var"], bool(norm.training)
        if (mean is None) is not (var is None):
            raise ValueError("running_mean and running_var: expected both or neither")
        if training and norm.track_running_stats:
            if buffers["num_batches_tracked"] is None and type(norm) is nn.SyncBatchNorm:
                raise ValueError("num_batches_tracked: expected a tensor")
        elif training:
            mean = var = None
        weight, bias = parameters["weight"], parameters["bias"]
        momentum = None if norm.momentum is None else _real(norm.momentum)
        group = _process_group(norm) if type(norm) is nn.SyncBatchNorm and training else None
        return Norm(norm, weight, bias, mean, var, training, momentum, _real(norm.eps), group)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.weight, self.bias, self.mean, self.var

    @property
    def of_batch(self) -> bool:
        """Whether it takes the batch's statistics."""
        return self.training or (self.mean is None and self.var is None)

    def why_refused(self, x: torch.Tensor) -> str:
        """Why PyTorch does not normalize x with these; "" if it does."""
        if self.eps < 0 or (self.eps == 0 and self.of_batch):
            return "eps is not positive"
        return "" if fit(x, *self.tensors) else "input and norm differ in dtype or device"

    def counted(self) -> float:
        """Count the batch as the module does; the share of its statistics in the running ones."""
        if self.module is None:
            return 0.1
        seen = self.module._buffers["num_batches_tracked"] if self.training else None
        if self.module.track_running_stats and seen is not None:
            seen.add_(1)
            if self.momentum is None:
                return 1.0 / float(seen)
        return 0.0 if self.momentum is None else self.momentum

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.module is not None:
            return self.module(x)
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.of_batch, 0.1, self.eps)

    def made_up(self, generator: torch.Generator) -> Norm:
        weight, bias, mean, var = (like(t, generator) for t in self.tensors)
        var = None if var is None else var.abs_().add_(0.5)
        return Norm(None, weight, bias, mean, var, self.training, self.momentum, self.eps, None)


class GroupNorm(NamedTuple):
    """Group norm, or instance norm: a group for each channel. Both take the batch's statistics in evaluation too."""

    module: nn.Module
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    groups: int | None  # None: as many as x has channels
    eps: float

    @staticmethod
    def of(norm: nn.Module) -> GroupNorm:
        parameters = norm._parameters
        groups = _whole(norm.num_groups) if type(norm) is nn.GroupNorm else None
        return GroupNorm(norm, parameters["weight"], parameters["bias"], groups, _real(norm.eps))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def _process_group(norm: nn.Module) -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


_SLOPES = {"leaky_relu": "negative_slope", "elu": "alpha", "softplus": "beta"}  # by what torch calls them
# What the ops have no argument for.
_FIXED: dict[str, dict[str, float]] = {"softplus": {"threshold": 20.0}, "relu6": {"min_val": 0.0, "max_val": 6.0}}


class Activation(NamedTuple):
    """An activation by the name that ops know it by."""

    module: nn.Module | None
    name: str
    slope: float
    inplace: bool
    weight: torch.Tensor | None = None  # of PReLU

    @staticmethod
    def of(module: nn.Module) -> Activation:
        name = ACTIVATIONS[type(module)]
        if name == "gelu":
            name = {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
        slope = _real(getattr(module, _SLOPES[name])) if name in _SLOPES else 0.0
        for setting, value in _FIXED.get(name, {}).items():
            if _real(getattr(module, setting)) != value:
                raise ValueError(f"{setting}: expected {value}")
        weight = module._parameters["weight"] if name == "prelu" else None
        return Activation(module, name, slope, bool(module.__dict__.get("inplace")), weight)

    @property
    def keeps_result(self) -> bool:
        """Whether PyTorch keeps the result for backward too, so that a program does not change it."""
        return self.inplace or self.name in ("none", "relu", "tanh", "sigmoid")

    def why_refused(self, x: torch.Tensor) -> str:
        """Why PyTorch's PReLU does not take x, or not as it is; "" if it does, and of other activations."""
        weight, narrow = self.weight, autocast_dtype(x.device.type)
        if weight is None:
            return ""
        if not is_plain(weight) or weight.shape not in ((1,), (x.size(1),)) or weight.device != x.device:
            return "PReLU's weight does not match"
        if narrow is not None:
            return "" if x.dtype is narrow else "autocast casts PReLU's input"
        return "" if weight.dtype is x.dtype else "PReLU's weight has another dtype"

    def act_weight(self, x: torch.Tensor) -> torch.Tensor | None:
        """PReLU's weight, rounded as autocast rounds it."""
        weight, narrow = self.weight, autocast_dtype(x.device.type)
        return weight if weight is None or narrow is None else weight.to(narrow)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.prelu(x, self.weight) if self.module is None else self.module(x)

    def made_up(self, generator: torch.Generator) -> Activation:
        return self if self.weight is None else self._replace(module=None, weight=like(self.weight, generator))


NO_ACTIVATION = Activation(nn.Identity(), "none", 0.0, False)


class Residual(NamedTuple):
    """What is added to a norm's result, before or after the activation, and how the program adds it."""

    tensor: Any
    add: Callable[[Any, Any], Any]  # of the result and the tensor
    after: bool


class Chain(NamedTuple):
    """Upsampling, convolution, norm, residual's sum, activation and dropout in a row, some of them missing."""

    letters: str
    conv: Convolution | None
    norm: Norm | GroupNorm | None  # the latter never after a convolution
    activation: Activation
    dropout: nn.Module | None
    residual: Residual | None = None  # never after a convolution
    upsample: nn.Module | None = None  # before a convolution alone

    @staticmethod
    def of(letters: str, modules: Sequence[nn.Module]) -> Chain:
        """Raises: ValueError, TypeError or KeyError on settings that are none: a plain call says what is wrong."""
        conv = norm = dropout = upsample = None
        activation = NO_ACTIVATION
        for kind, module in zip(letters.upper(), modules, strict=True):
            if kind == "C":
                conv = Convolution.of(module)
            elif kind == "N":
                norm = Norm.of(module)
            elif kind == "G":
                norm = GroupNorm.of(module)
            elif kind == "D":
                dropout = module
            elif kind == "U":
                upsample = module
            elif kind != "R":
                activation = Activation.of(module)
        return Chain(letters, conv, norm, activation, dropout, None, upsample)

    def by_modules(self, x: torch.Tensor) -> torch.Tensor:
        """Norm, sum and activation one by one."""
        y = self.norm(x)
        if self.residual is None:
            return self.activation(y)
        tensor, add, after = self.residual
        return add(self.activation(y), tensor) if after else self.activation(add(y, tensor))

    def made_up(self, generator: torch.Generator) -> Chain:
        """The same on tensors that belong to no module: with no hooks, no buffers of the user's and no collectives."""
        conv = self.conv and self.conv.made_up(generator)
        norm = self.norm and self.norm.made_up(generator)
        upsample = self.upsample and nn.Upsample(scale_factor=2)
        return self._replace(conv=conv, norm=norm, activation=self.activation.made_up(generator), upsample=upsample)

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Parameters that ask for gradients."""
        conv, norm = self.conv, self.norm
        found = [*((conv.weight, conv.bias) if conv else ()), *((norm.weight, norm.bias) if norm else ())]
        found.append(self.activation.weight)
        return [t for t in found if t is not None and t.requires_grad]
