"""What the kernels of rotary ask of their tensors: they read by address."""

import torch

from genai_fast.kernels.rotary.reference import with_unit_stride

MOST_AXES = 4


def tables_fit(cos, x, full, sections):
    """Whether cos is [T_max, C] or [B or 1, T_max, C], of as many axes as sections (of the pairs) in front of these."""
    last = cos.size(-1) if cos.dim() else 0
    pairs = last // 2 if full else last
    shape = tuple(cos.shape)
    if sections:
        if not 1 < len(sections) <= MOST_AXES or sum(sections) != pairs or min(sections) < 0:
            return False
        axes, *shape = shape
        if axes != len(sections):
            return False
    samples = shape[0] if len(shape) == 3 else 1
    return len(shape) in (2, 3) and samples in (1, x.size(0)) and not (full and last % 2) and 0 < 2 * pairs <= x.size(3)


def strides_of(table, sections):
    """Between axes, samples, rows and columns; 0 where all share one."""
    *before, row, step = table.stride()
    step = step if table.size(-1) > 1 else 1
    axis = before.pop(0) if sections else 0
    sample = before.pop() if before and table.size(-3) > 1 else 0
    return axis, sample, row, step


def ends_of(sections, rotated):
    """The pair after the last one of each axis but the last."""
    ends = [sum(sections[: k + 1]) for k in range(len(sections) - 1)]
    return (*ends, *[rotated // 2] * (MOST_AXES - 1 - len(ends)))


def operands(x, cos, sin, positions, full, sections):
    """(x, cos, sin, positions, channels that turn) with rows side by side; raises on what would read foreign memory."""
    place = x.device
    if x.dim() != 4 or not tables_fit(cos, x, full, sections):
        tables = "[T_max, D_rot]" if full else "[T_max, D_rot / 2]"
        raise ValueError(
            f"genai_fast: expected [B, H, T, D] and tables {tables}, got {tuple(x.shape)} and {tuple(cos.shape)}"
        )
    rotated = cos.size(-1) if full else 2 * cos.size(-1)
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
    # Columns side by side, or parts of complex numbers.
    cos, sin = (t if t.size(-1) < 2 or t.stride(-1) in (1, 2) else t.contiguous() for t in (cos, sin))
    return with_unit_stride(x), cos, sin, positions, rotated


def between_samples(positions: torch.Tensor | None) -> int:
    """The stride from one sample's positions to the next one's; 0 if all share them."""
    return 0 if positions is None or positions.dim() == 1 else positions.stride(0)
