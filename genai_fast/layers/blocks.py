"""Convolution, batch norm and activation as one module with the keys of nn.Sequential(conv, bn, act)."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from genai_fast.fusion.chains import ACTIVATIONS, CONVS, NORMS, TRANSPOSED
from genai_fast.kernels.common.activations import DEFAULT_SLOPE
from genai_fast.layers.sequential import FusedSequential
from genai_fast.ops import checks

_MODULES: dict[str, Callable[..., nn.Module]] = {name: module for module, name in ACTIVATIONS.items()}
_MODULES["gelu_tanh"] = functools.partial(nn.GELU, approximate="tanh")
_Size = int | tuple[int, ...]


def _activation(block: str, activation: str | nn.Module | None, negative_slope: float | None) -> list[nn.Module]:
    if isinstance(activation, nn.Module):
        return [activation]
    if activation is None:
        return []
    slope = checks.activation(block, activation, negative_slope)
    if activation == "none":
        return []
    return [_MODULES[activation](*((slope,) if activation in DEFAULT_SLOPE else ()))]


class _Block(FusedSequential):
    def __init__(
        self, convs: tuple[type[nn.Module], ...], sizes: tuple[Any, ...], options: dict[str, Any], dims: int,
        norm: dict[str, Any], activation: str | nn.Module | None, negative_slope: float | None, device: Any, dtype: Any,
    ) -> None:  # fmt: skip
        block = type(self).__name__
        if dims not in (1, 2, 3):
            raise ValueError(f"{block}: dims: expected 1, 2 or 3, got {dims!r}; pass the number of spatial dimensions")
        place = {"device": device, "dtype": dtype}
        tail = _activation(block, activation, negative_slope)
        conv: Any = convs[dims - 1](*sizes, **options, **place)
        super().__init__(conv, NORMS[dims - 1](conv.out_channels, **norm, **place), *tail)

    def __getitem__(self, idx: slice | int) -> nn.Module:
        # nn.Sequential slices into its own class, whose constructor takes modules.
        if isinstance(idx, slice):
            return FusedSequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


class ConvBNAct(_Block):
    """activation(batch_norm(conv(x))): nn.Sequential(conv, norm, activation) with its keys, run fused.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as for
            nn.Conv1d, 2d or 3d; no bias by default, since the norm has one.
        dims: number of spatial dimensions, 1 to 3.
        eps, momentum, affine, track_running_stats: as for nn.BatchNorm1d, 2d or 3d.
        activation: a module, None, or a name as for `ops.bias_act`, with negative_slope.

    Raises ValueError: unknown activation or number of dimensions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: _Size, stride: _Size = 1, padding: _Size | str = 0, *,
        dilation: _Size = 1, groups: int = 1, bias: bool = False, padding_mode: str = "zeros", dims: int = 2,
        eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, track_running_stats: bool = True,
        activation: str | nn.Module | None = "leaky_relu", negative_slope: float | None = None, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            CONVS, (in_channels, out_channels, kernel_size, stride, padding),
            dict(dilation=dilation, groups=groups, bias=bias, padding_mode=padding_mode), dims,
            dict(eps=eps, momentum=momentum, affine=affine, track_running_stats=track_running_stats),
            activation, negative_slope, device, dtype,
        )  # fmt: skip


class ConvTransposeBNAct(_Block):
    """activation(batch_norm(conv_transpose(x))): `ConvBNAct` with nn.ConvTranspose1d, 2d or 3d."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: _Size, stride: _Size = 1, padding: _Size = 0,
        output_padding: _Size = 0, *, dilation: _Size = 1, groups: int = 1, bias: bool = False, dims: int = 2,
        eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, track_running_stats: bool = True,
        activation: str | nn.Module | None = "leaky_relu", negative_slope: float | None = None, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            TRANSPOSED, (in_channels, out_channels, kernel_size, stride, padding, output_padding),
            dict(dilation=dilation, groups=groups, bias=bias), dims,
            dict(eps=eps, momentum=momentum, affine=affine, track_running_stats=track_running_stats),
            activation, negative_slope, device, dtype,
        )  # fmt: skip
