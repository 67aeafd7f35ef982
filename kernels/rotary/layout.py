"""What the kernels of rotary ask of their tensors: they read by address."""

import torch

from genai_fast.kernels.rotary.reference import with_unit_stride


def operands(x, cos, sin, positions, full):
    """(x, cos, sin, positions, channels that turn) with rows side by side; raises on what would read foreign memory."""
    place = x.device
    rotated = 0 if cos.dim() != 2 else cos.size(1) if full else 2 * cos.size(1)
    if x.dim() != 4 or rotated % 2 or not 0 < rotated <= x.size(3):
        tables = "[T_max, D_rot]" if full else "[T_max, D_rot / 2]"
        raise ValueError(
            f"genai_fast: expected [B, H, T, D] and tables {tables}, got {tuple(x.shape)} and {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape or sin.dtype is not cos.dtype or sin.device != place or cos.device != place:
        raise ValueError(
            f"genai_fast: expected two tables of one shape and dtype on {place}, got {cos.dtype} {tuple(cos.shape)} on"
            f" {cos.device} and {sin.dtype} {tuple(sin.shape)} on {sin.device}"
        )
    if cos.dtype is not torch.float32 and cos.dtype is not x.dtype:
        raise ValueError(f"genai_fast: expected tables of torch.float32 or {x.dtype}, got {cos.dtype}")
    if positions is not None:
        tokens = x.size(2)
        shapes = ((tokens,), (x.size(0), tokens))
        if positions.shape not in shapes or positions.dtype is not torch.int64 or positions.device != place:
            raise ValueError(
                f"genai_fast: expected positions of torch.int64 {shapes[0]} or {shapes[1]} on {place}, got"
                f" {positions.dtype} {tuple(positions.shape)} on {positions.device}"
            )
        if tokens > 1 and positions.stride(-1) != 1:
            positions = positions.contiguous()
    cos, sin = (t if t.size(1) < 2 or t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    return with_unit_stride(x), cos, sin, positions, rotated


def between_samples(positions: torch.Tensor | None) -> int:
    """The stride from one sample's positions to the next one's; 0 if all share them."""
    return 0 if positions is None or positions.dim() == 1 else positions.stride(0)
