"""Parts of generative models as modules: gated MLPs, sampling of latents, dropout, upsampling, causal convolution."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.kernels.causal_conv1d.layout import ACTIVATIONS
from genai_fast.kernels.common.activations import activate
from genai_fast.ops import checks
from genai_fast.ops.dispatch import left_to_torch


class _GatedMLP(nn.Module):
    """w3(act(gate) * up), gate and up being the halves of w12(x)."""

    activation = ""

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int | None = None, bias: bool = True,
        device: Any = None, dtype: Any = None, *, gate_multiplier: float = 1.0, down_multiplier: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        self.gate_multiplier = checks.real(name, "gate_multiplier", gate_multiplier, "a finite float")
        self.down_multiplier = checks.real(name, "down_multiplier", down_multiplier, "a finite float")
        place = {"device": device, "dtype": dtype}
        out_features = in_features if out_features is None else out_features
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias, **place)
        self.w3 = nn.Linear(hidden_features, out_features, bias, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        multipliers = (self.gate_multiplier, self.down_multiplier)
        return self.w3(ops.gated_act(self.w12(x), None, None, self.activation, *multipliers))


class SwiGLU(_GatedMLP):
    """Llama's MLP: w3(silu(gate) * up) with gate, up = w12(x).chunk(2, -1), the gate in one call.

    Args:
        in_features, hidden_features, out_features (None: in_features), bias, device, dtype: as of two nn.Linear.
        gate_multiplier, down_multiplier: m and d in w3(d silu(m gate) up), as of `ops.gated_act`.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    activation = "silu"


class GEGLU(_GatedMLP):
    """w3(gelu(gate) * up): `SwiGLU` with the exact GELU."""

    activation = "gelu"


class Reparameterize(nn.Module):
    """z ~ N(mu, exp(logvar)) that gradients pass through: `ops.reparameterize` as a module.

    Args:
        kl: return (z, kl), kl [B] of N(mu, exp(logvar)) against N(0, I): `ops.reparameterize_kl`.
    """

    def __init__(self, kl: bool = False) -> None:
        super().__init__()
        self.kl = checks.flag("Reparameterize", "kl", kl)

    def forward(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """mu and logvar [B, ...], of one shape and dtype."""
        return ops.reparameterize_kl(mu, logvar) if self.kl else ops.reparameterize(mu, logvar)

    def extra_repr(self) -> str:
        return "kl=True" if self.kl else ""


class Dropout(nn.Dropout):
    """dropout(activation(x)) in one call, without a mask in memory: nn.Dropout's constructor, and an activation.

    The elements dropped are drawn by other random numbers than PyTorch's; torch.manual_seed reproduces them.

    Args:
        p, inplace: as for nn.Dropout; in place PyTorch's own runs, and without an activation.
        activation, negative_slope: as of `ops.act_dropout`.

    Raises ValueError: unknown activation, or one that would work in place.
    """

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, activation: str = "none", negative_slope: float = 0.2
    ) -> None:
        super().__init__(p, inplace)
        self.negative_slope = checks.activation("Dropout", activation, negative_slope)
        if inplace and activation != "none":
            raise ValueError(f"Dropout: inplace: expected False with an activation, got {inplace!r} and {activation!r}")
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if left_to_torch() or self.inplace:
            return super().forward(activate(input, self.activation, self.negative_slope))
        return ops.act_dropout(input, self.p, self.training, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class UpsampleConv2d(nn.Conv2d):
    """conv2d(upsample(x)): nearest neighbour, twice the size, then 3 x 3 with padding 1, as one convolution.

    Keys and initial values as of nn.Conv2d(in_channels, out_channels, 3, padding=1).

    Args:
        in_channels, out_channels, bias, device, dtype: as for nn.Conv2d.
        activation, negative_slope: as of `ops.upsample_conv2d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, bias: bool = True, *, activation: str = "none",
        negative_slope: float = 0.2, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        self.negative_slope = checks.activation("UpsampleConv2d", activation, negative_slope)
        self.activation = activation
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C_out, 2 H, 2 W]."""
        if left_to_torch():
            y = super().forward(F.interpolate(input, scale_factor=2.0))
            return activate(y, self.activation, self.negative_slope)
        return ops.upsample_conv2d(input, self.weight, self.bias, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class CausalConv1d(nn.Conv1d):
    """nn.Conv1d that sees no position after its own: zeros before the first one, bias and activation in one call.

    Keys and initial values as of nn.Conv1d(in_channels, out_channels, kernel_size, dilation=dilation, groups=groups).

    Args:
        in_channels, out_channels, kernel_size, dilation, bias, device, dtype: as for nn.Conv1d.
        groups: 1, or as many as both have channels.
        activation: as of `ops.causal_conv1d`; with groups "none" or "silu". "gated_tanh" halves the channels.

    Raises ValueError: other groups, or an activation that there is not.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1, groups: int = 1,
        bias: bool = True, *, activation: str = "none", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        if groups not in (1, in_channels) or (groups > 1 and out_channels != in_channels):
            raise ValueError(
                f"CausalConv1d: groups: expected 1, or {in_channels} for as many channels in and out, got {groups}"
            )
        checks.one_of("CausalConv1d", "activation", activation, ACTIVATIONS[: -1 if groups > 1 else None])
        place = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation, groups=groups, bias=bias, **place)
        self.activation = activation

    def forward(self, input: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """[N, C, L] to [N, C_out, L]; a condition as of `ops.causal_conv1d` (without groups)."""
        (dilation,) = self.dilation
        if self.groups == 1:
            return ops.causal_conv1d(input, self.weight, self.bias, condition, dilation, self.activation)
        if condition is not None:
            raise ValueError("CausalConv1d: condition: expected none with groups, got one; add it to the result")
        return ops.depthwise_causal_conv1d(input, self.weight, self.bias, dilation, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
