"""Class labels as a model's input."""

import torch

from genai_fast.ops.dispatch import transformed


def check(owner: str, labels: torch.Tensor, count: int, classes: int) -> None:
    """Labels are int64 [count]; their range is looked at on the CPU only, as elsewhere it would cost a wait."""
    if labels.dtype is not torch.int64:
        raise ValueError(f"{owner}: labels: expected int64, got {labels.dtype}; convert them with .long()")
    if labels.shape != (count,):
        raise ValueError(
            f"{owner}: labels: expected shape ({count},), one for each sample, got {tuple(labels.shape)};"
            f" one-hot ones become such by .argmax(1)"
        )
    if count and labels.is_cpu and not transformed():
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(f"{owner}: labels: expected 0 to {classes - 1}, got {wrong}; remedy: another classes=")


def with_plane(x: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
    """x [B, C, H, W] and a label's plane [B, H W] -> [B, C + 1, H, W]."""
    return torch.cat([x, plane.view(-1, 1, *x.shape[2:]).to(x.dtype)], 1)
