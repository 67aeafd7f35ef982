"""What the kernels of group_norm_act ask of their arguments: dense tensors, and parameters of fitting sizes."""

import torch

from genai_fast.kernels.common.channels import dense_channels, require_channels

Parameters = tuple[torch.Tensor | None, ...]


def prepared(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, Parameters]:
    """x, dense, and the contiguous parameters: weight and bias [C], scale and shift [N, C], float32 on x's device."""
    if groups < 1 or x.size(1) % groups:
        raise ValueError(f"genai_fast: expected groups that divide {x.size(1)} channels, got {groups}")
    of_samples = _contiguous(x, tuple(x.shape[:2]), scale, shift)
    return dense_channels(x), (*require_channels(x, weight, bias), *of_samples)


def require_statistics(x: torch.Tensor, groups: int, *statistics: torch.Tensor) -> Parameters:
    """Contiguous. Raises unless each is float32 [N, groups] on x's device."""
    return _contiguous(x, (x.size(0), groups), *statistics)


def _contiguous(x: torch.Tensor, shape: tuple[int, ...], *tensors: torch.Tensor | None) -> Parameters:
    for t in tensors:
        if t is not None and (tuple(t.shape) != shape or t.dtype is not torch.float32 or t.device != x.device):
            raise ValueError(
                f"genai_fast: expected torch.float32 {shape} on {x.device}, got {t.dtype} {tuple(t.shape)} on"
                f" {t.device}"
            )
    return tuple(t if t is None else t.contiguous() for t in tensors)


def sizes(x: torch.Tensor) -> tuple[int, int, int, bool]:
    """(samples, channels, positions, whether the channels lie last) of a dense x."""
    samples, channels = x.shape[:2]
    return samples, channels, x.numel() // max(samples * channels, 1), not x.is_contiguous()
