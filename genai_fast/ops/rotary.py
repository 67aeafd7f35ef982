"""Rotary position embedding in one pass, and the tables that it reads."""

import math
from typing import Any

import torch

from genai_fast.backends import forced_backend
from genai_fast.kernels.rotary import reference
from genai_fast.kernels.rotary.layout import MOST_AXES, tables_fit
from genai_fast.ops import checks
from genai_fast.ops.dispatch import KernelFunction, differentiated_again, library_call, readable
from genai_fast.ops.planned import planned

_OP = "rotary"


class _Rotary(KernelFunction):
    @staticmethod
    def forward(x, cos, sin, positions, offset, interleaved, inverse, full, sections, backend):
        return library_call("rotary", x, cos, sin, positions, offset, interleaved, inverse, full, sections, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin, positions, ctx.offset, ctx.interleaved, ctx.inverse, *ctx.rest = inputs
        ctx.backend = ctx.rest.pop()
        ctx.save_for_backward(cos, sin, positions)

    @staticmethod
    def backward(ctx, grad_y):
        """The rotation by the opposite angle, which has derivatives of its own."""
        settings = (ctx.offset, ctx.interleaved, not ctx.inverse, *ctx.rest, ctx.backend)
        arguments = (grad_y, *ctx.saved_tensors, *settings)
        grad_x = _Rotary.call(*arguments) if differentiated_again() else library_call("rotary", *arguments)
        return dict(x=grad_x)


def rotary_tables(
    positions_max: int,
    dim: int,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * base ** (-2 i / dim), for `rotary`.

    Args:
        positions_max: positions 0 .. positions_max - 1 are in the tables.
        dim: channels of a head that are rotated, even: D, or less to leave the last ones as they are.
        base: of the frequencies: 10000, Llama 3's 500000, ...
        device, dtype: of the tables; both are computed in float64 on the CPU and rounded once.

    Returns: (cos, sin), each [positions_max, dim / 2].
    Raises: TypeError, ValueError on arguments that do not fit.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    op = "rotary_tables"
    positions_max, dim = checks.integer(op, "positions_max", positions_max, 0), checks.integer(op, "dim", dim, 2)
    if dim % 2:
        raise ValueError(f"{op}: dim: expected an even number of channels, got {dim}; a pair turns together")
    base = checks.real(op, "base", base, "a number above 0, and finite", math.ulp(0.0))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype: expected a floating-point dtype, got {dtype}")
    return reference.tables(positions_max, dim, base, torch.get_default_device() if device is None else device, dtype)


def _check_tables(x: torch.Tensor, cos: Any, sin: Any, full: bool, sections: tuple[int, ...]) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        if isinstance(table, torch.Tensor) and table.is_complex():
            raise TypeError(
                f"{_OP}: {name}: expected real numbers, got {table.dtype}; pass both parts of a complex table,"
                f" its .real and its .imag, and interleaved=True"
            )
        checks.is_floating(_OP, name, table)
        checks.same_device(_OP, name, table, "x", x)
        if table.requires_grad:
            raise ValueError(
                f"{_OP}: {name}: expected a table without a gradient, got requires_grad=True; pass {name}.detach()"
            )
        if table.dtype is not x.dtype and table.dtype is not torch.float32:
            raise TypeError(f"{_OP}: {name}: expected {x.dtype} as x has, or torch.float32, got {table.dtype}")
    if not tables_fit(cos, x, full, sections):
        if sections:
            raise ValueError(
                f"{_OP}: sections: expected 2 to {MOST_AXES} numbers of pairs, together those of cos, whose first"
                f" dimension has an axis for each, got {sections} and shape {tuple(cos.shape)}"
            )
        expected = "[T_max, D_rot] with an even D_rot" if full else "[T_max, D_rot / 2] with D_rot"
        raise ValueError(
            f"{_OP}: cos: expected {expected} <= D = {x.size(3)}, got shape {tuple(cos.shape)};"
            f" {'full=False takes' if full else 'rotary_tables makes'} it; of each sample of x, [B, T_max, ...]"
        )
    if sin.shape != cos.shape or sin.dtype is not cos.dtype:
        raise ValueError(
            f"{_OP}: sin: expected {cos.dtype} {tuple(cos.shape)} as cos is, got {sin.dtype} {tuple(sin.shape)}"
        )


def _check_positions(x: torch.Tensor, positions: Any, known: int) -> None:
    batch, tokens = x.size(0), x.size(2)
    if not isinstance(positions, torch.Tensor) or positions.dtype is not torch.int64:
        got = positions.dtype if isinstance(positions, torch.Tensor) else type(positions).__name__
        raise TypeError(f"{_OP}: positions: expected None or a tensor of torch.int64, got {got}")
    checks.same_device(_OP, "positions", positions, "x", x)
    if positions.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"{_OP}: positions: expected shape ({tokens},) or ({batch}, {tokens}), one for each token of x, got"
            f" {tuple(positions.shape)}"
        )
    if readable(positions):
        least, most = (int(p) for p in torch.aminmax(positions))
        if least < 0 or most >= known:
            raise ValueError(
                f"{_OP}: positions: expected 0 .. {known - 1}, the rows of cos and sin, got {least} .. {most}; make"
                f" longer tables"
            )


@planned
def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    positions: torch.Tensor | None = None,
    offset: int = 0,
    full: bool = False,
    sections: tuple[int, ...] = (),
) -> torch.Tensor:
    """y = (a cos[p] - b sin[p], b cos[p] + a sin[p]) for each pair (a, b) of a token's channels, p its position.

    Args:
        x: [B, H, T, D], float32, bfloat16, float16 or float64. Strides are any: queries or keys are read where they lie
            in a packed projection, qkv.view(B, T, 3, H, D)[:, :, 0].transpose(1, 2); only channels with gaps between
            them are copied first.
        cos, sin: [T_max, D_rot / 2], D_rot <= D, of `rotary_tables`; float32 or x's dtype, any strides. Channels from
            D_rot on stay as they are. [B, T_max, D_rot / 2] are tables of each sample, [1, T_max, D_rot / 2] of all.
        interleaved: pair i is channels (2 i, 2 i + 1), as in RoFormer and GPT-J; else (i, D_rot / 2 + i), as in
            GPT-NeoX and Hugging Face's Llama.
        positions: int64 [T] or [B, T], or None for offset .. offset + T - 1.
        offset: the first token's position (those in a cache before it); 0 if positions are given.
        full: cos and sin are [T_max, D_rot], a column for each channel, as models of Hugging Face have them: a is
            multiplied by its own columns, and so is b. Those of a pair need not be equal.
        sections: pairs that turn by each of 2 to 4 axes, as mrope_section of Qwen2-VL: the first sections[0] pairs have
            the angles of cos[0] and sin[0], the next ones of cos[1] and sin[1]; the tables have the axes in front of
            the dimensions above.

    A complex table, as Llama 4 has, is given by its parts, which are not copied: rotary(x, freqs.real, freqs.imag,
    interleaved=True). Of x [B, T, H, D], pass x.transpose(1, 2). Queries and keys take a call each.

    Returns: y, shape and dtype of x, without holes: [B, T, H, D] in memory where x's heads lie inside its tokens, else
        contiguous. Computed in float32 and rounded once.
    Gradients: x, to any order: the rotation by the opposite angle (the transpose), by the same kernel. None for
        cos and sin.
    Backends: C++ (CPU), Triton (CUDA), reference (elsewhere, and float64).
    Raises: TypeError, ValueError on arguments that do not fit, before anything is allocated. Positions in a CPU tensor
        that the tables lack are refused. On CUDA, where looking at them would wait for the device, and in a compiled
        region, their tokens come out as NaN.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    checks.is_floating(_OP, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{_OP}: x: expected [B, H, T, D], got shape {tuple(x.shape)}; heads come second")
    full = checks.flag(_OP, "full", full)
    if not isinstance(sections, (tuple, list)):
        raise TypeError(f"{_OP}: sections: expected a tuple of ints, got {type(sections).__name__}")
    sections = tuple(checks.integer(_OP, "sections", s, 0) for s in sections)
    _check_tables(x, cos, sin, full, sections)
    offset = checks.integer(_OP, "offset", offset, None, "an int, the first token's position")
    interleaved = checks.flag(_OP, "interleaved", interleaved)
    if positions is not None:
        if offset != 0:
            raise ValueError(f"{_OP}: offset: expected 0 if positions are given, got {offset}; add it to them")
        _check_positions(x, positions, cos.size(-2))
    elif offset < 0 or offset + x.size(2) > cos.size(-2):
        raise ValueError(
            f"{_OP}: offset: expected positions in 0 .. {cos.size(-2) - 1}, the rows of cos and sin, got {offset} and"
            f" {x.size(2)} tokens; make longer tables"
        )
    return _Rotary.call(x, cos, sin, positions, offset, interleaved, False, full, sections, forced_backend())
