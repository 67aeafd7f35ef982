"""rotary: what the op is, its cases and its cost."""

import torch

from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec
from genai_fast.kernels.rotary import reference
from genai_fast.kernels.rotary.schema import LIBRARY


def _reference(x, cos, sin, *, interleaved=False, positions=None, offset=0, full=False, sections=()):
    if full and not interleaved:  # Hugging Face's words
        if sections:
            cos, sin = (
                torch.cat([t[k % len(sections)] for k, t in enumerate(table.split(list(sections) * 2, -1))], -1)
                for table in (cos, sin)
            )
        cos, sin = (
            table.narrow(-2, offset, x.size(2)) if positions is None else table[positions] for table in (cos, sin)
        )
        cos, sin = (table.unsqueeze(1) if table.dim() == 3 else table for table in (wide(cos), wide(sin)))
        turned, kept = wide(x).split((cos.size(-1), x.size(-1) - cos.size(-1)), -1)
        a, b = turned.chunk(2, -1)
        return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, kept), -1).to(x.dtype)
    return reference.rotated(x, cos, sin, positions, offset, interleaved, False, full, sections)


def _eager(x, cos, sin, *, interleaved=False, positions=None, offset=0):
    """What people write: Hugging Face's rotate_half over tables for all channels, or complex products of the pairs."""
    if positions is None:
        cos, sin = (table[offset : offset + x.size(2)] for table in (cos, sin))
    else:
        cos, sin = (table[positions].unsqueeze(1) if positions.dim() == 2 else table[positions] for table in (cos, sin))
    if interleaved:
        rotary, kept = x.split((2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)), -1)
        pairs = torch.view_as_complex(rotary.float().reshape(*rotary.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * torch.complex(cos.float(), sin.float())).flatten(-2).type_as(x)
    else:
        rotary, kept = x.split((cos.size(-1), x.size(-1) - cos.size(-1)), -1)
        a, b = rotary.chunk(2, -1)
        turned = rotary * cos + torch.cat((-b, a), -1) * sin
    return torch.cat((turned, kept), -1) if kept.size(-1) else turned


def _prepared(inputs):
    """Tables for all channels, in x's dtype, are made once for a model."""
    if inputs.get("interleaved"):
        return dict(inputs)
    whole = {name: torch.cat((inputs[name],) * 2, -1).to(inputs["x"].dtype) for name in ("cos", "sin")}
    return {**inputs, **whole}


_eager.prepare = _prepared


def _cost(x, cos, sin, **more):
    # Forward reads x and writes y; backward reads dy and writes dx.
    return Cost(flops=6 * x[..., : 2 * cos.size(1)].numel(), bytes=4 * x.numel() * x.element_size())


def _x(t, layout, batch, heads, tokens, columns):
    if layout == "packed":  # queries of a joint projection
        x = t.normal(batch, tokens, 3, heads, columns, grad=False)[:, :, 0].transpose(1, 2)
    elif layout == "by_token":
        x = t.normal(batch, tokens, heads, columns, grad=False).transpose(1, 2)
    elif layout == "gaps":  # between heads and between tokens
        x = t.normal(batch, 2 * heads, 2 * tokens, columns + 3, grad=False)[:, ::2, 1::2, :columns]
    else:
        return t.laid_out(layout, batch, heads, tokens, columns)
    return x.requires_grad_()


def _tables(t, known, rotary, narrow=False):
    dtype = t.dtype if narrow or t.dtype is torch.float64 else torch.float32
    cos, sin = reference.tables(known, rotary, 10000.0, t.device, dtype)
    return dict(cos=cos, sin=sin)


def _inputs(*shape, layout="contiguous", rotary=None, more=0, narrow=False, at=None, **options):
    """`more` rows in the tables than tokens; positions of shape "T" or "BT" drawn from them."""

    def make(t):
        batch, _, tokens, columns = shape
        known = tokens + more + options.get("offset", 0)
        given = dict(x=_x(t, layout, *shape), **_tables(t, known, rotary or columns, narrow), **options)
        if at is not None:
            size = (tokens,) if at == "T" else (batch, tokens)
            given["positions"] = torch.randint(known, size, generator=t.generator).to(t.device)
        return given

    return make


def _full(*shape, rotary=None, **settings):
    """A column for each channel, those of a pair not alike."""
    make = _inputs(*shape, **{**settings, "rotary": 2 * (rotary or shape[-1])})

    def with_tables(t):
        tables = _tables(t, shape[2] + settings.get("more", 0) + settings.get("offset", 0), 2 * (rotary or shape[-1]))
        return {**make(t), **tables, "full": True}

    return with_tables


def _of_samples(
    *shape, rotary=None, samples=None, axes=0, full=False, more=0, step=1, at=None, layout="contiguous", **options
):
    """Angles of each sample, and of each axis: tables [axes, samples, T, columns], `step` apart."""

    def make(t):
        batch, _, tokens, columns = shape
        pairs = (rotary or columns) // 2
        before = ((axes,) if axes else ()) + ((samples or batch,) if samples != 0 else ())
        angles = torch.randn(*before, tokens + more, pairs, generator=t.generator) * 3.0
        angles = torch.cat((angles, angles), -1) if full else angles
        dtype = t.dtype if t.dtype is torch.float64 else torch.float32
        both = torch.stack((angles.cos(), angles.sin()), -1).to(t.device, dtype)
        cos, sin = both.unbind(-1) if step == 2 else (both[..., 0].contiguous(), both[..., 1].contiguous())
        given = dict(x=_x(t, layout, *shape), cos=cos, sin=sin, **options)
        if at is not None:
            size = (tokens,) if at == "T" else (batch, tokens)
            given["positions"] = torch.randint(tokens + more, size, generator=t.generator).to(t.device)
        return given | (dict(full=True) if full else {})

    return make


def _shared_positions(t):
    """Of a batch, by expansion; tables with rows apart, as every second one of longer tables."""
    tables = {name: table[::2] for name, table in _tables(t, 40, 16).items()}
    positions = torch.arange(5, 12, device=t.device).expand(3, 7)
    return dict(x=_x(t, "packed", 3, 2, 7, 16), **tables, positions=positions)


def _special(interleaved):
    def make(t):
        values = [0.0, -0.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan"), 1e-30]
        return dict(x=t.values([[[[v] * 8 for v in values]]]), **_tables(t, 8, 6), interleaved=interleaved)

    return make


CASES = (
    Case("gpt_nano", _inputs(2, 6, 9, 64, layout="packed")),
    Case("contiguous", _inputs(2, 3, 7, 32)),
    Case("by_token", _inputs(2, 3, 7, 32, layout="by_token", interleaved=True)),
    Case("second_order", _inputs(1, 2, 3, 6, rotary=4, more=2, at="T")),
    Case("gpt_j", _inputs(2, 4, 5, 64, rotary=32, interleaved=True)),
    Case("gpt_neox", _inputs(2, 4, 5, 64, rotary=16, layout="packed")),
    Case("odd", _inputs(3, 5, 7, 13, rotary=10, layout="packed", more=3)),
    Case("odd_interleaved", _inputs(3, 5, 7, 13, rotary=10, interleaved=True)),
    Case("two_channels", _inputs(2, 3, 5, 2, interleaved=True)),
    Case("one_element_pair", _inputs(1, 1, 1, 2)),
    Case("one_head", _inputs(3, 1, 40, 24, layout="by_token")),
    Case("one_token_of_a_cache", _inputs(4, 3, 1, 32, layout="packed", offset=19)),
    Case("offset", _inputs(2, 3, 5, 16, offset=7, more=1, interleaved=True)),
    Case("positions", _inputs(2, 3, 7, 32, at="T", more=30)),
    Case("positions_of_samples", _inputs(3, 2, 7, 32, at="BT", more=30, layout="packed")),
    Case("positions_interleaved", _inputs(3, 2, 7, 32, at="BT", more=30, interleaved=True)),
    Case("shared_positions", _shared_positions),
    Case("narrow_tables", _inputs(2, 3, 7, 32, narrow=True)),
    Case("narrow_tables_packed", _inputs(2, 3, 7, 32, narrow=True, layout="packed", interleaved=True)),
    Case("gaps", _inputs(2, 3, 7, 16, layout="gaps")),
    Case("channels_apart", _inputs(2, 3, 7, 16, layout="transposed")),
    Case("strided", _inputs(2, 3, 7, 16, layout="strided", interleaved=True)),
    Case("many_rows", _inputs(3, 5, 70, 64, layout="packed", more=1)),
    Case("wide_head", _inputs(1, 2, 3, 2600, rotary=2400)),
    Case("full", _full(2, 3, 7, 32, layout="packed")),
    Case("full_partial", _full(2, 3, 5, 24, rotary=10, offset=3)),
    Case("full_interleaved", _full(2, 3, 5, 16, interleaved=True, layout="by_token")),
    Case("full_positions", _full(3, 2, 7, 16, at="BT", more=9)),
    Case("full_narrow", _full(2, 3, 7, 32, narrow=True)),
    Case("full_second_order", _full(1, 2, 3, 6, rotary=4)),
    Case("of_samples", _of_samples(3, 2, 7, 32)),
    Case("complex", _of_samples(3, 2, 7, 16, samples=0, step=2, interleaved=True)),
    Case("full_of_samples", _of_samples(3, 2, 7, 32, full=True)),
    Case("full_of_one_sample", _of_samples(3, 2, 7, 32, full=True, samples=1, rotary=20)),
    Case("full_sections", _of_samples(2, 3, 5, 32, full=True, axes=3, sections=(4, 6, 6))),
    Case("sections", _of_samples(2, 3, 5, 24, axes=2, sections=(3, 5), samples=0, rotary=16)),
    Case("sections_interleaved", _of_samples(2, 3, 5, 16, full=True, axes=4, sections=(1, 0, 4, 3), interleaved=True)),
    Case("complex_of_samples", _of_samples(2, 3, 5, 16, axes=3, sections=(2, 3, 3), step=2, more=4, at="BT")),
    Case("of_samples_at", _of_samples(3, 2, 7, 16, more=5, at="BT", interleaved=True)),
    Case("of_samples_at_shared", _of_samples(3, 2, 7, 16, more=5, at="T", full=False)),
    Case("target_gradient", _of_samples(1, 2, 3, 6, full=True, axes=2, sections=(1, 2))),
    Case("empty_batch", _inputs(0, 2, 3, 8)),
    Case("no_tokens", _inputs(2, 2, 0, 8, at="T", more=3)),
    Case("special_values", _special(False)),
    Case("special_values_interleaved", _special(True)),
)

_GOOD = _inputs(2, 3, 5, 8)


def _with(**changes):
    """The good arguments with some changed, each a function of (Tensors, the old one)."""

    def make(t):
        given = _GOOD(t)
        return {**given, **{name: change(t, given.get(name)) for name, change in changes.items()}}

    return make


def _at(*values):
    return _with(positions=lambda t, _: torch.tensor(values))


ERROR_CASES = (
    ErrorCase("dimensions", _with(x=lambda t, x: x[0]), ValueError, r"x: expected \[B, H, T, D\], got.*\(3, 5, 8\)"),
    ErrorCase("integers", _with(x=lambda t, x: torch.ones(2, 3, 5, 8, dtype=torch.int32)), TypeError,
              r"x.*floating.*got torch\.int32"),
    ErrorCase("too_many_channels", _with(x=lambda t, x: x[..., :6]), ValueError,
              r"cos: expected \[T_max, D_rot / 2\] with D_rot <= D = 6, got shape \(5, 4\)"),
    ErrorCase("table_dimensions", _with(cos=lambda t, cos: cos[None, None]), ValueError,
              r"cos: expected \[T_max, D_rot / 2\].*got shape \(1, 1, 5, 4\)"),
    ErrorCase("table_samples", _with(cos=lambda t, cos: cos.expand(3, 5, 4), sin=lambda t, sin: sin.expand(3, 5, 4)),
              ValueError, r"cos: expected \[T_max, D_rot / 2\].*got shape \(3, 5, 4\)"),
    ErrorCase("complex", _with(cos=lambda t, cos: torch.complex(cos, cos)), TypeError, r"cos: expected real.*\.imag"),
    ErrorCase("sections", _with(cos=lambda t, cos: cos.expand(2, 5, 4), sin=lambda t, sin: sin.expand(2, 5, 4),
                                sections=lambda t, _: (1, 2)), ValueError, r"sections: .*got \(1, 2\).*\(2, 5, 4\)"),
    ErrorCase("sections_type", _with(sections=lambda t, _: 3), TypeError, r"sections: expected a tuple.*got int"),
    ErrorCase("full_odd", lambda t: {**_GOOD(t), **{n: torch.ones(5, 7) for n in ("cos", "sin")}, "full": True},
              ValueError, r"cos: expected \[T_max, D_rot\] with an even D_rot <= D = 8, got shape \(5, 7\)"),
    ErrorCase("full_flag", _with(full=lambda t, _: "yes"), TypeError, r"full"),
    ErrorCase("tables_differ", _with(sin=lambda t, sin: sin[:4]), ValueError,
              r"sin: expected torch\.float32 \(5, 4\) as cos is, got torch\.float32 \(4, 4\)"),
    ErrorCase("table_dtype", _with(cos=lambda t, cos: cos.half()), TypeError,
              r"cos: expected torch\.float32 as x has.*got torch\.float16"),
    ErrorCase("table_device", _with(cos=lambda t, cos: cos.to("meta")), ValueError,
              r"cos: expected device cpu as x has, got meta"),
    ErrorCase("table_gradient", _with(sin=lambda t, sin: sin.clone().requires_grad_()), ValueError,
              r"sin: expected a table without a gradient.*pass sin\.detach"),
    ErrorCase("short_table", _with(cos=lambda t, cos: cos[:4], sin=lambda t, sin: sin[:4]), ValueError,
              r"offset: expected positions in 0 \.\. 3.*got 0 and 5 tokens; make longer tables"),
    ErrorCase("offset_beyond", _with(offset=lambda t, _: 1), ValueError, r"offset.*got 1 and 5 tokens"),
    ErrorCase("offset_negative", _with(offset=lambda t, _: -1), ValueError, r"offset.*got -1 and 5 tokens"),
    ErrorCase("offset_type", _with(offset=lambda t, _: 1.0), TypeError, r"offset: expected an int.*got float"),
    ErrorCase("offset_and_positions", _with(positions=lambda t, _: torch.zeros(5, dtype=torch.int64),
                                            offset=lambda t, _: 1), ValueError, r"offset: expected 0 if positions"),
    ErrorCase("position_beyond", _at(0, 1, 2, 3, 5), ValueError, r"positions: expected 0 \.\. 4.*got 0 \.\. 5"),
    ErrorCase("position_negative", _at(0, -1, 2, 3, 4), ValueError, r"positions: expected 0 \.\. 4.*got -1 \.\. 4"),
    ErrorCase("positions_shape", _at(0, 1, 2), ValueError,
              r"positions: expected shape \(5,\) or \(2, 5\).*got \(3,\)"),
    ErrorCase("positions_dtype", _with(positions=lambda t, _: torch.zeros(5, dtype=torch.int32)), TypeError,
              r"positions: expected None or a tensor of torch\.int64, got torch\.int32"),
    ErrorCase("positions_list", _with(positions=lambda t, _: [0, 1, 2, 3, 4]), TypeError, r"positions.*got list"),
)  # fmt: skip

BENCH_CASES = (
    Case("gpt_nano-64x6x256x64-packed", _inputs(64, 6, 256, 64, layout="packed")),
    Case("llama_like-1x32x2048x64", _inputs(1, 32, 2048, 64, layout="by_token")),
    Case("gpt_j-1x16x1024x256-64_rotated", _inputs(1, 16, 1024, 256, layout="by_token", rotary=64, interleaved=True)),
)


_COMPILE_CASES = (
    CompileCase("pairs", _inputs(1, 32, 2048, 64, layout="by_token", interleaved=True), ("fp32", "bf16")),
    CompileCase("full", _full(1, 32, 2048, 64, layout="by_token"), ("fp32", "bf16")),
    CompileCase("sections", _of_samples(2, 32, 1024, 64, layout="by_token", full=True, axes=3, sections=(8, 12, 12))),
    CompileCase("complex", _of_samples(2, 32, 1024, 64, layout="by_token", step=2, samples=0, interleaved=True)),
    CompileCase("at_positions", _inputs(1, 32, 2048, 64, layout="by_token", at="BT", narrow=True)),
)
_EXPECTED = {"_rotary": Expected((), lambda c: c["ROWS"] * (2 * c["BLOCK"] + c["COLUMNS"] - 2 * c["HALF"]), 40)}

ROTARY = OpSpec(
    name="rotary",
    folder="rotary",
    formula="(a cos p - b sin p, b cos p + a sin p) for pairs of channels, halves or neighbours, of one or more axes",
    source="Su et al. 2021, arXiv:2104.09864",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(_inputs(1, 8, 128, 64, layout="by_token"), (11.8, 11.8), 0.65, 1.05),
    peers={"eager": _eager},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
)
