"""rotary in plain PyTorch: the definition and the fallback; and the tables of cosines and sines."""

from collections.abc import Sequence

import torch

from genai_fast.kernels.common.channels import wide


def tables(positions_max, dim, base, device, dtype):
    """cos and sin [positions_max, dim / 2] of position * base ** (-2 i / dim), computed in float64 and rounded once."""
    frequencies = float(base) ** (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / -dim)
    angles = torch.outer(torch.arange(positions_max, dtype=torch.float64, device="cpu"), frequencies)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def heads_inside(x: torch.Tensor) -> bool:
    """Whether the heads of a token of x [B, H, T, D] lie together, as a projection leaves them."""
    return x.size(1) > 1 and x.size(2) > 1 and x.stride(1) < x.stride(2)


def in_order_of(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory for a result, without holes: [B, T, H, D] where x's heads lie inside its tokens."""
    batch, heads, tokens, columns = x.shape
    if heads_inside(x):
        return x.new_empty((batch, tokens, heads, columns)).transpose(1, 2)
    return x.new_empty(x.shape)


def with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself if its channels lie side by side, else a contiguous copy."""
    return x if x.size(3) < 2 or x.stride(3) == 1 else x.contiguous()


def _of_axes(table: torch.Tensor, full: bool, interleaved: bool, sections: Sequence[int]) -> torch.Tensor:
    """The table of one axis, each pair's columns from that of its section."""
    parts = [s * 2 for s in sections] if full and interleaved else [*sections, *sections] if full else [*sections]
    return torch.cat([t[k % len(sections)] for k, t in enumerate(table.split(parts, -1))], -1)


def _looked_up(table: torch.Tensor, positions: torch.Tensor | None, offset: int, tokens: int) -> torch.Tensor:
    """[T, D_rot / 2] or [B, 1, T, D_rot / 2]; NaN at positions that the table lacks."""
    table = wide(table)
    if positions is None:
        rows = table.narrow(-2, offset, tokens)
        return rows.unsqueeze(1) if rows.dim() == 3 else rows
    known = (positions >= 0) & (positions < table.size(-2))
    at = torch.where(known, positions, 0)
    if table.dim() == 3:
        at = at.expand(max(table.size(0), at.size(0) if at.dim() == 2 else 1), at.size(-1))
        rows = table.expand(at.size(0), -1, -1).gather(1, at.unsqueeze(-1).expand(-1, -1, table.size(-1)))
    else:
        rows = table[at]
    rows = torch.where(known.unsqueeze(-1), rows, torch.nan)
    return rows.unsqueeze(1) if rows.dim() == 3 else rows


def rotated(x, cos, sin, positions, offset, interleaved, inverse, full=False, sections=()):
    """y = (a cos - b sin, b cos + a sin) for each pair (a, b) of channels; the others as they are.

    full: a and b have a cosine and a sine each; the inverse is then the transpose.
    """
    if sections:
        cos, sin = (_of_axes(table, full, interleaved, sections) for table in (cos, sin))
    rotary = cos.size(-1) if full else 2 * cos.size(-1)
    first = wide(x[..., :rotary])

    def halves(t):
        return (t[..., ::2], t[..., 1::2]) if interleaved else t.chunk(2, -1)

    a, b = halves(first)
    c, s = (_looked_up(table, positions, offset, x.size(2)).to(first.dtype) for table in (cos, sin))
    (c, c_b), (s, s_b) = (halves(c), halves(s)) if full else ((c, c), (s, s))
    s, s_b = (-s_b, -s) if inverse else (s, s_b)
    pairs = a * c - b * s, b * c_b + a * s_b
    y = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((y.to(x.dtype), x[..., rotary:]), -1)


def rotary(x, cos, sin, positions, offset, interleaved, inverse, full=False, sections=()):
    x = with_unit_stride(x)
    return in_order_of(x).copy_(rotated(x, cos, sin, positions, offset, interleaved, inverse, full, sections))
