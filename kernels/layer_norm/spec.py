"""layer_norm and rms_norm: what the ops are, their cases and their cost. One folder, since the kernels are the same."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec, choices_of
from genai_fast.kernels.layer_norm.schema import LIBRARY


def _wide(*parameters):
    return (p if p is None else wide(p) for p in parameters)


def _layer_norm_reference(x, weight=None, bias=None, eps=1e-5, residual=None):
    """F.layer_norm in float32 or wider, of the sum in x's dtype."""
    h = x if residual is None else x + residual
    y = F.layer_norm(wide(h), h.shape[-1:], *_wide(weight, bias), eps).to(x.dtype)
    return y if residual is None else (y, h)


def _rms_norm_reference(x, weight=None, eps=None, residual=None, offset=0.0, casting_mode="gemma"):
    """F.rms_norm in float32 or wider, of the sum in x's dtype; other casting as models of Hugging Face write it."""
    h = x if residual is None else x + residual
    weight = weight if weight is None else wide(weight) + offset
    if casting_mode == "gemma":
        y = F.rms_norm(wide(h), h.shape[-1:], weight, eps).to(x.dtype)
    else:
        of = h if casting_mode == "none" else wide(h)
        y = (of * torch.rsqrt(of.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        y = y if weight is None else (wide(y) * weight).to(x.dtype)
    return y if residual is None else (y, h)


def _eager_layer_norm(x, weight=None, bias=None, eps=1e-5, residual=None):
    """What people write: the sum, then its norm."""
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, h)


def _eager_rms_norm(x, weight=None, eps=None, residual=None, offset=0.0):
    h = x if residual is None else x + residual
    y = F.rms_norm(h, h.shape[-1:], weight + offset if offset else weight, eps)
    return y if residual is None else (y, h)


def _cost(x, weight=None, *, residual=None, **settings):
    # Forward reads x and writes y; backward reads dy and h and writes dx. A residual is read, h written, dh read.
    passes = 5 if residual is None else 8
    return Cost(flops=20 * x.numel(), bytes=passes * x.numel() * x.element_size())


def _inputs(*shape, bias=True, weight=True, residual=True, mean=0.5, scale=2.0, **more):
    def make(t):
        columns = shape[-1]
        found = dict(x=t.normal(*shape, scale=scale, mean=mean))
        if residual:
            found["residual"] = t.normal(*shape)
        if weight:
            # Of one column, x-hat and with it the weight's gradient are 0 but for rounding.
            found["weight"] = t.uniform(columns, low=0.5, high=1.5, grad=columns > 1)
        if bias:
            found["bias"] = t.normal(columns, scale=0.3)
        return {**found, **more}

    return make


def _of_heads(t):
    """Rows with gaps, as a part of a fused projection has; their gradients too."""
    heads = t.normal(2, 7, 3 * 40, grad=False)
    x, residual = heads[..., 40:80].requires_grad_(), heads[..., 80:].detach().requires_grad_()
    return dict(x=x, residual=residual, weight=t.normal(40))


def _transposed(t):
    """The normalized dimension lies first in memory, as in an image's channels."""
    x = t.normal(6, 19, 5, grad=False).transpose(1, 2).requires_grad_()
    return dict(x=x, residual=t.normal(6, 5, 19), weight=t.normal(19))


def _mixed(t):
    """Activations of a narrow dtype beside float32 parameters."""
    wide_t = type(t)(torch.promote_types(t.dtype, torch.float32), t.device, t.generator)
    return dict(x=t.normal(6, 5, 48), residual=t.normal(6, 5, 48), weight=wide_t.normal(48))


def _casting_cases():
    for mode in ("llama", "none"):
        more = dict(bias=False, eps=1e-6, casting_mode=mode)
        yield Case(f"casting_{mode}", _inputs(3, 7, 48, **more))
        yield Case(f"casting_{mode}_offset", _inputs(5, 130, residual=False, offset=1.0, **more))
        yield Case(f"casting_{mode}_no_weight", _inputs(4, 33, residual=False, weight=False, **more))
        yield Case(f"casting_{mode}_long_row", _inputs(2, 9001, **more))
    yield Case("target_gradient", _inputs(3, 4, bias=False, residual=False, eps=1e-6, casting_mode="llama"))


def _special(t):
    """Rows with an infinity, with a NaN, of one value, of zeros, and an ordinary one."""
    x = torch.randn(5, 21, generator=t.generator)
    x[0, 3], x[1, 4], x[2], x[3] = float("inf"), float("nan"), 1.5, 0.0
    return dict(x=t.values(x.tolist()), weight=t.uniform(21, low=0.5, grad=True))


def _special_sums(t):
    """Sums of infinities, of opposite ones (NaN), of what passes the dtype's largest, and an ordinary row."""
    x, residual = torch.randn(2, 4, 21, generator=t.generator)
    x[0, 3], residual[0, 7] = float("inf"), float("-inf")
    x[1, 4], residual[1, 4] = float("inf"), float("-inf")
    x[2, 5] = residual[2, 5] = 0.9 * min(torch.finfo(d).max for d in (t.dtype, torch.float32))
    return dict(x=t.values(x.tolist()), residual=t.values(residual.tolist()), weight=t.uniform(21, low=0.5, grad=True))


def _cases(bias, **more):
    """Those of both ops; `bias` says whether the op has one."""
    yield from (
        Case("gpt", _inputs(2, 24, 384, bias=bias, **more)),
        Case("odd", _inputs(3, 5, 37, bias=bias, **more)),
        Case("second_order", _inputs(2, 2, 5, bias=bias, **more)),
        Case("second_order_alone", _inputs(3, 4, bias=bias, residual=False, **more)),
        Case("one_element", _inputs(1, 1, bias=bias, **more)),
        Case("one_column", _inputs(9, 1, bias=bias, **more)),
        Case("one_row", _inputs(768, bias=bias, **more)),
        Case("no_residual", _inputs(4, 9, 130, bias=bias, residual=False, **more)),
        Case("no_affine", _inputs(4, 9, 130, bias=False, weight=False, **more)),
        Case("weight_only", _inputs(4, 9, 130, bias=False, residual=False, **more)),
        Case("gpt2_xl", _inputs(3, 1600, bias=bias, **more)),
        Case("llama", _inputs(2, 4096, bias=bias, **more)),
        Case("wide", _inputs(3, 8192, bias=bias, **more)),
        Case("long_row", _inputs(2, 2, 9001, bias=bias, **more)),
        Case("long_row_alone", _inputs(3, 8200, bias=False, weight=False, residual=False, **more)),
        Case("many_rows", _inputs(600, 520, bias=bias, **more)),
        Case("very_many_rows", _inputs(2, 1100, 16, bias=bias, **more)),
        Case("far_mean", _inputs(32, 384, bias=bias, residual=False, mean=100.0, scale=1.0, **more)),
        Case("far_mean_long_row", _inputs(2, 9001, bias=bias, residual=False, mean=100.0, scale=1.0, **more)),
        Case("eps", _inputs(4, 33, bias=bias, **{**more, "eps": 0.1})),
        Case("empty", _inputs(0, 33, bias=bias, **more)),
        Case("empty_rows", _inputs(4, 0, 33, bias=bias, **more)),
        Case("heads", _of_heads),
        Case("transposed", _transposed),
        Case("mixed_dtypes", _mixed),
        Case("special_values", _special),
        Case("special_sums", _special_sums),
    )


def _error_cases(bias):
    good = _inputs(4, 6, bias=bias)
    yield from (
        ErrorCase("columns", lambda t: {**good(t), "weight": t.normal(4)}, ValueError,
                  r"weight.*expected shape \(6,\).*got \(4,\)"),
        ErrorCase("weight_shape", lambda t: {**good(t), "weight": t.normal(1, 6)}, ValueError,
                  r"weight.*expected shape \(6,\).*got \(1, 6\)"),
        ErrorCase("weight_dtype", lambda t: {**good(t), "weight": t.normal(6).double()}, TypeError,
                  r"weight.*expected torch\.float32.*got torch\.float64"),
        ErrorCase("weight_device", lambda t: {**good(t), "weight": t.normal(6).to("meta")}, ValueError,
                  r"weight.*expected device.*got meta"),
        ErrorCase("residual_shape", lambda t: {**good(t), "residual": t.normal(6)}, ValueError,
                  r"residual.*expected shape \(4, 6\).*got \(6,\)"),
        ErrorCase("residual_dtype", lambda t: {**good(t), "residual": t.normal(4, 6).bfloat16()}, TypeError,
                  r"residual.*expected torch\.float32.*got torch\.bfloat16"),
        ErrorCase("scalar", lambda t: dict(x=t.values(1.0)), ValueError, r"x.*\[\.\.\., D\].*got shape \(\)"),
        ErrorCase("no_columns", lambda t: dict(x=t.normal(4, 0)), ValueError, r"x.*D > 0.*got shape \(4, 0\)"),
        ErrorCase("integers", lambda t: dict(x=torch.ones(4, 6, dtype=torch.int32)), TypeError,
                  r"x.*floating.*got torch\.int32"),
        ErrorCase("eps", lambda t: {**good(t), "eps": -1e-5}, ValueError, r"eps.*>= 0.*got -1e-05"),
        ErrorCase("eps_nan", lambda t: {**good(t), "eps": float("nan")}, ValueError, r"eps.*>= 0.*got nan"),
        ErrorCase("eps_type", lambda t: {**good(t), "eps": "1e-5"}, ValueError, r"eps.*>= 0.*got '1e-5'"),
    )  # fmt: skip


def _bench_cases(*shapes, bias):
    return tuple(Case(f"{name}-{'x'.join(map(str, shape))}", _inputs(*shape, bias=bias)) for name, *shape in shapes)


_BIAS_DTYPE = ErrorCase(
    "bias_dtype",
    lambda t: {**_inputs(4, 6)(t), "bias": t.normal(6).half()},
    TypeError,
    r"bias.*expected torch\.float32.*got torch\.float16",
)


_OFFSETS = (
    ErrorCase("offset_alone", lambda t: dict(x=t.normal(4, 6), offset=1.0), ValueError, r"offset.*without a weight"),
    ErrorCase("offset", lambda t: {**_inputs(4, 6, bias=False)(t), "offset": float("nan")}, ValueError,
              r"offset.*finite.*got nan"),
    ErrorCase("casting_mode", lambda t: {**_inputs(4, 6, bias=False)(t), "casting_mode": "bert"}, ValueError,
              r"casting_mode: expected one of 'gemma', 'llama', 'none', got 'bert'"),
    ErrorCase("offset_type", lambda t: {**_inputs(4, 6, bias=False)(t), "offset": "1"}, ValueError,
              r"offset.*finite.*got '1'"),
)  # fmt: skip


def _compile_cases(bias):
    """Rows that need more warps than those of the bench cases, and rows in blocks."""
    for columns in (4096, 8192, 65536) if bias else (8192, 65536):
        yield CompileCase(f"columns_{columns}", _inputs(256, columns, bias=bias), ("fp32", "bf16"))
    for mode in () if bias else ("llama", "none"):
        yield CompileCase(f"casting_{mode}", _inputs(256, 4096, bias=False, eps=1e-6, casting_mode=mode))


_EXPECTED = {
    "_layer_norm_forward": Expected((), lambda c: c["ROWS"] * c["BLOCK"]),
    **dict.fromkeys(
        ("_layer_norm_backward", "_layer_norm_forward_long", "_layer_norm_backward_long", "_layer_norm_sums_long"),
        Expected(()),
    ),
}

_CHOICES = choices_of(elements=(1024, 1024, 2048, 4096), num_warps=(4, 8, 8, 8))

LAYER_NORM = OpSpec(
    name="layer_norm",
    folder="layer_norm",
    formula="(h - mean) / sqrt(var + eps) weight + bias and h = x + residual, by row of the last dimension",
    source="Ba, Kiros & Hinton 2016, arXiv:1607.06450",
    library=LIBRARY,
    reference=_layer_norm_reference,
    cases=(*_cases(True), Case("bias_only", _inputs(4, 9, 130, weight=False, residual=False))),
    error_cases=(*_error_cases(True), _BIAS_DTYPE),
    bench_cases=_bench_cases(("gpt_nano", 64, 256, 384), ("gpt2", 8, 1024, 768), bias=True),
    peers={"eager": _eager_layer_norm},
    limits=Limits(_inputs(256, 768), (35.4, 77, 11.8), 1.05, 3.9),
    cost=_cost,
    compile_cases=tuple(_compile_cases(True)),
    expected=_EXPECTED,
    choices=dict.fromkeys(("layer_norm/forward", "layer_norm/backward"), _CHOICES),
)

RMS_NORM = OpSpec(
    name="rms_norm",
    folder="layer_norm",
    formula="h / sqrt(mean(h^2) + eps) (offset + weight) and h = x + residual, by row of the last dimension",
    source="Zhang & Sennrich 2019, arXiv:1910.07467",
    library=LIBRARY,
    reference=_rms_norm_reference,
    cases=(
        *_cases(False),
        Case("gemma", _inputs(3, 7, 48, bias=False, residual=False, eps=1e-6, offset=1.0)),
        *_casting_cases(),
    ),
    error_cases=(*_error_cases(False), *_OFFSETS),
    bench_cases=_bench_cases(("llama", 2, 1024, 4096), bias=False),
    peers={"eager": _eager_rms_norm},
    limits=Limits(_inputs(64, 4096, bias=False), (16.7, 35.3, 18.1), 1.05, 1.6),
    cost=_cost,
    compile_cases=tuple(_compile_cases(False)),
    expected=_EXPECTED,
    choices=dict.fromkeys(("layer_norm/rms_forward", "layer_norm/rms_backward"), _CHOICES),
)
