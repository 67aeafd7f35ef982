"""How causal_conv1d's tensors lie, and what its library ops take: x and results are [N, L, C], channels last."""

import torch

GATED = "gated_tanh"  # tanh of the first half of the channels times the sigmoid of the second
ACTIVATIONS = ("none", "silu", GATED)
LARGEST_KERNEL = 4  # of the depthwise kernels, which hold a position's taps in registers


def padding(kernel: int, dilation: int) -> int:
    """Positions before the first that a result looks back to."""
    return (kernel - 1) * dilation


def out_channels(channels: int, activation: str) -> int:
    """Of the result, where the convolution has `channels`."""
    return channels // 2 if activation == GATED else channels


def sequences(x: torch.Tensor, turned: bool = False) -> torch.Tensor:
    """x [N, L, C] with unit stride along the channels, or, if it may be `turned`, along the positions.

    Copies only other layouts, such as expanded gradients.
    """
    _, length, channels = x.shape
    _, by_position, by_channel = x.stride()
    last = (by_channel == 1 or channels == 1) and by_position >= channels
    first = turned and (by_position == 1 or length == 1) and by_channel >= length
    if not (last or first):
        return x.contiguous()
    if by_channel != 1 and channels == 1:  # whatever its stride is
        return x.as_strided(x.shape, (x.stride(0), by_position, 1))
    return x


def require(
    x: torch.Tensor, weight: torch.Tensor, dilation: int, *more: tuple[torch.Tensor | None, tuple[int, ...]]
) -> None:
    """Raise unless x is [N, L, C], the weight fits it, and each further tensor has its shape: kernels read by address.

    The public op has checked already, with better words. A depthwise weight is [C, K], a dense one [C_out, C, K].
    """
    channels = weight.size(1) if weight.dim() == 3 else weight.size(0)
    fits = x.dim() == 3 and weight.dim() in (2, 3) and x.size(-1) == channels
    if not fits or weight.dtype is not x.dtype or weight.device != x.device:
        raise ValueError(
            f"causal_conv1d: expected x [N, L, C] and a weight [C_out, C, K] or [C, K] of one dtype and device, got"
            f" {x.dtype} {tuple(x.shape)} on {x.device}, {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )
    if dilation < 1 or min(weight.shape) < 1 or (weight.dim() == 2 and weight.size(1) > LARGEST_KERNEL):
        raise ValueError(
            f"causal_conv1d: expected a dilation of at least 1, a weight with numbers, and depthwise up to"
            f" {LARGEST_KERNEL} taps, got {dilation} and {tuple(weight.shape)}"
        )
    for t, shape in more:
        if t is not None and (t.shape != shape or t.device != x.device):
            raise ValueError(
                f"causal_conv1d: expected shape {shape} on {x.device} beside x {tuple(x.shape)}, got {tuple(t.shape)}"
                f" on {t.device}"
            )


def condition_strides(condition: torch.Tensor | None) -> tuple[int, int]:
    """Of a condition [N, C_out] or [N, L, C_out] with unit stride along the channels: by sample, by position."""
    if condition is None:
        return 0, 0
    return condition.stride(0), condition.stride(1) if condition.dim() == 3 else 0


def dense_condition(condition: torch.Tensor | None) -> torch.Tensor | None:
    """The condition with unit stride along the channels."""
    if condition is None or condition.stride(-1) == 1:
        return condition
    return condition.contiguous()
