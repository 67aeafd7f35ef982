"""Norms in one call: layer and RMS norm of a sum; group and instance norm with what stands before an activation."""

from typing import Any

import torch
from torch import nn

from genai_fast import ops
from genai_fast.backends import choose, forced_backend, is_plain
from genai_fast.fusion import thresholds
from genai_fast.fusion.classes import replaced_forward
from genai_fast.kernels.common.activations import activate
from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.layer_norm.reference import layer_norm as rms_by_torch
from genai_fast.ops import checks
from genai_fast.ops.dispatch import left_to_torch
from genai_fast.ops.layer_norm import CASTING_MODES
from genai_fast.precision import autocast_dtype


def _is_ours(norm: nn.LayerNorm | nn.RMSNorm, x: Any, residual: Any) -> bool:
    """Whether the op takes these and is worth its call; else PyTorch's own serves, or says what is wrong."""
    if not is_plain(x) or len(norm.normalized_shape) != 1 or x.shape[-1:] != norm.normalized_shape or left_to_torch():
        return False
    kind, weight = x.device.type, norm.weight
    mixed = autocast_dtype(kind) is not None
    if weight is not None and (weight.device != x.device or (weight.dtype is not x.dtype and not mixed)):
        return False
    if residual is not None and (not is_plain(residual) or residual.shape != x.shape):
        return False
    if torch.compiler.is_compiling():
        return x.dtype is not torch.float64
    # One library op serves both norms.
    if choose("layer_norm", forced_backend(), kind, x.dtype)[1]:
        return False
    if residual is not None or forced_backend():
        return True
    # PyTorch's layer norm is one call too, and no slower. Of channels_last, its RMS norm keeps the layout.
    return isinstance(norm, nn.RMSNorm) and (x.dim() < 4 or x.is_contiguous()) and not thresholds.rms_norm(x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, its constructor and keys. `y = norm(x)`, or `y, h = norm(x, residual)` with h = x + residual."""

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if _is_ours(self, input, residual):
            return ops.layer_norm(input, self.weight, self.bias, self.eps, residual)
        if residual is None:
            return super().forward(input)
        h = input + residual
        return super().forward(h), h


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, its constructor and keys. `y = norm(x)`, or `y, h = norm(x, residual)` with h = x + residual.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as for nn.RMSNorm.
        offset, casting_mode: as of `ops.rms_norm`, over the last dimension alone; None: nn.RMSNorm's own arithmetic.
            With an offset the weight is 1 - offset at first: zeros in Gemma.

    Raises ValueError: an offset without a weight, unknown modes, or more than one dimension with one of these.
    """

    offset: float = 0.0
    casting_mode: str | None = None

    def __init__(
        self, normalized_shape: int | list[int] | torch.Size, eps: float | None = None,
        elementwise_affine: bool = True, device: Any = None, dtype: Any = None, *, offset: float = 0.0,
        casting_mode: str | None = None,
    ) -> None:  # fmt: skip
        self.offset = checks.real("RMSNorm", "offset", offset, "a finite float")
        if casting_mode is not None:
            checks.one_of("RMSNorm", "casting_mode", casting_mode, CASTING_MODES)
        self.casting_mode = casting_mode
        if offset and not elementwise_affine:
            raise ValueError(f"RMSNorm: offset: expected 0 without a weight, got {offset!r}; it is added to the weight")
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        if (offset or casting_mode) and len(self.normalized_shape) != 1:
            raise ValueError(
                f"RMSNorm: normalized_shape: expected one dimension with an offset or a casting_mode, got"
                f" {self.normalized_shape}"
            )

    def reset_parameters(self) -> None:
        """The weight such that its sum with the offset is 1."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def extra_repr(self) -> str:
        more = f", offset={self.offset}" if self.offset else ""
        return super().extra_repr() + more + (f", casting_mode={self.casting_mode}" if self.casting_mode else "")

    def _with_settings(self, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        """By the op, or in plain PyTorch by its definition."""
        mode = self.casting_mode or "gemma"
        if not left_to_torch():
            return ops.rms_norm(x, self.weight, self.eps, residual, self.offset, mode)
        eps = self.eps if self.eps is not None else torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        weight = None if self.weight is None else wide(self.weight) + self.offset
        y, h, _, _ = rms_by_torch(x, residual, weight, None, True, eps, mode)
        return y if residual is None else (y, h)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if (now := replaced_forward(self)) is not None:
            return now(self, x)
        if self.offset or self.casting_mode:
            return self._with_settings(x, residual)
        if _is_ours(self, x, residual):
            return ops.rms_norm(x, self.weight, self.eps, residual)
        if residual is None:
            return super().forward(x)
        h = x + residual
        return super().forward(h), h


class GroupNormAct(nn.GroupNorm):
    """activation(group_norm(x)) in one call: nn.GroupNorm's constructor and keys, and an activation.

    `y = norm(x, residual, scale, shift)` is activation(n (1 + scale) + shift + residual), n = group_norm(x): residual
    as x, scale and shift [N, C], each may be None; see `ops.group_norm_act`.

    Args:
        num_groups, num_channels, eps, affine: as for nn.GroupNorm.
        activation, negative_slope: as for `ops.group_norm_act`.

    Raises ValueError: unknown activation, or groups that do not divide the channels.
    """

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, *,
        activation: str = "none", negative_slope: float | None = None, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"{name}: num_groups: expected a divisor of {num_channels} channels, got {num_groups}")
        self.negative_slope = checks.activation(name, activation, negative_slope)
        self.activation = activation
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if x.dim() < 2 or x.size(1) != self.num_channels:
            raise ValueError(
                f"{type(self).__name__}: x: expected {self.num_channels} channels, which come second, got shape"
                f" {tuple(x.shape)}"
            )
        if left_to_torch():
            return self._by_torch(x, residual, scale, shift)
        return ops.group_norm_act(
            x, self.num_groups, self.weight, self.bias, self.eps, self.activation, self.negative_slope, residual, scale,
            shift,
        )  # fmt: skip

    def _by_torch(self, x, residual, scale, shift):
        z, spread = super().forward(x), (*x.shape[:2], *[1] * (x.dim() - 2))
        z = z if scale is None else z * (1.0 + scale.view(spread))
        z = z if shift is None else z + shift.view(spread)
        return activate(z if residual is None else z + residual, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class InstanceNormAct(GroupNormAct):
    """activation(instance_norm(x)) in one call: `GroupNormAct` with a group for each channel, in any number of
    dimensions. As nn.InstanceNorm1d, 2d and 3d it has no weight and bias by default; running statistics it has never.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = False, *, activation: str = "none",
        negative_slope: float | None = None, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        more = dict(activation=activation, negative_slope=negative_slope, device=device, dtype=dtype)
        super().__init__(num_features, num_features, eps, affine, **more)
