"""layer_norm and rms_norm: what the ops are, their cases and their cost. One folder, since the kernels are the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.common.rows import dense_like
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, LibraryOp, OpSpec, choices_of


def _wide_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(x, residual, weight, bias, rms, eps):
    of_rows = x.new_empty(x.shape[:-1], dtype=_wide_dtype(x))
    return (
        dense_like(x),
        x.new_empty(0) if residual is None else dense_like(x),
        of_rows.new_empty(0) if rms else of_rows,
        torch.empty_like(of_rows),
    )


def _fake_backward(grad_y, grad_h, h, weight, mean, rstd, with_weight, with_bias, rms):
    sums = (h.new_empty(h.size(-1) if wanted else 0, dtype=_wide_dtype(h)) for wanted in (with_weight, with_bias))
    return dense_like(h), *sums


LIBRARY = (
    LibraryOp(
        "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool rms, float eps, str backend)"
        " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
        _fake,
    ),
    LibraryOp(
        "layer_norm_backward(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor? weight, Tensor mean, Tensor rstd,"
        " bool with_weight, bool with_bias, bool rms, str backend)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        _fake_backward,
    ),
)


def _wide(*parameters):
    return (p if p is None else wide(p) for p in parameters)


def _layer_norm_reference(x, weight=None, bias=None, eps=1e-5, residual=None):
    """F.layer_norm in float32 or wider, of the sum in x's dtype."""
    h = x if residual is None else x + residual
    y = F.layer_norm(wide(h), h.shape[-1:], *_wide(weight, bias), eps).to(x.dtype)
    return y if residual is None else (y, h)


def _rms_norm_reference(x, weight=None, eps=None, residual=None):
    """F.rms_norm in float32 or wider, of the sum in x's dtype."""
    h = x if residual is None else x + residual
    y = F.rms_norm(wide(h), h.shape[-1:], *_wide(weight), eps).to(x.dtype)
    return y if residual is None else (y, h)


def _eager_layer_norm(x, weight=None, bias=None, eps=1e-5, residual=None):
    """What people write: the sum, then its norm."""
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, h)


def _eager_rms_norm(x, weight=None, eps=None, residual=None):
    h = x if residual is None else x + residual
    y = F.rms_norm(h, h.shape[-1:], weight, eps)
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


# The launches of the bench cases: rows of 384, 768 and 4096, and of 65536 in blocks.
_STRIDES = dict(columns="i32", x_stride="i32", residual_stride="i32")
_GRADIENT_STRIDES = dict(columns="i32", grad_y_stride="i32", grad_h_stride="i32", h_stride="i32")


def _compile_cases(dtype, rms):
    name = f"{'rms' if rms else 'layer'}-{dtype[1:]}"
    of_rows = dict(mean_ptr=None if rms else "*fp32", rstd_ptr="*fp32")
    parameters = dict(weight_ptr="*fp32", bias_ptr=None if rms else "*fp32")
    pointers = dict(x_ptr=dtype, residual_ptr=dtype, y_ptr=dtype, h_ptr=dtype, **parameters, **of_rows)
    gradients = dict(grad_y_ptr=dtype, grad_h_ptr=dtype, h_ptr=dtype, grad_x_ptr=dtype, weight_ptr="*fp32", **of_rows)
    sums = dict(weight_sums_ptr="*fp32", bias_sums_ptr=None if rms else "*fp32")
    # columns, BLOCK, then ROWS and warps of forward and of backward
    for columns, block, (rows, warps), back in (
        (384, 512, (4, 4), (2, 4)),
        (768, 1024, (2, 4), (1, 4)),
        (4096, 4096, (1, 8), (1, 16 if rms or dtype != "*fp32" else 8)),
        (8192, 8192, (1, 16), (1, 16) if rms else None),
    ):
        yield CompileCase(
            f"forward-{columns}-{name}",
            "_layer_norm_forward",
            dict(**pointers, rows="i32", **_STRIDES, eps="fp32", ROWS=rows, BLOCK=block),
            num_warps=warps,
            elements=rows * block,
            wide_loads=True,
        )
        if back is not None:
            yield CompileCase(
                f"backward-{columns}-{name}",
                "_layer_norm_backward",
                dict(**gradients, **sums, rows="i32", **_GRADIENT_STRIDES, tiles="i32", ROWS=back[0], BLOCK=block),
                num_warps=back[1],
                wide_loads=True,
            )
    yield CompileCase(
        f"forward-long-{name}",
        "_layer_norm_forward_long",
        dict(**pointers, **_STRIDES, eps="fp32", BLOCK=2048),
        num_warps=8,
        wide_loads=True,
    )
    yield CompileCase(
        f"backward-long-{name}",
        "_layer_norm_backward_long",
        dict(**gradients, **_GRADIENT_STRIDES, BLOCK=2048),
        num_warps=8,
        wide_loads=True,
    )
    yield CompileCase(
        f"sums-long-{name}", "_layer_norm_sums_long",
        dict(grad_y_ptr=dtype, h_ptr=dtype, **of_rows, **sums, rows="i32", columns="i32", grad_y_stride="i32",
             h_stride="i32", tiles="i32", ROWS=16, BLOCK=128), wide_loads=True,
    )  # fmt: skip


_COMPILE_CASES = (
    *(case for dtype in ("*fp32", "*bf16") for rms in (False, True) for case in _compile_cases(dtype, rms)),
    CompileCase(
        "add",
        "_layer_norm_add",
        dict(sums_ptr="*fp32", total_ptr="*fp32", programs="i32", columns="i32", ROWS=64, BLOCK=16),
    ),
)

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
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    choices=dict.fromkeys(("layer_norm/forward", "layer_norm/backward"), _CHOICES),
)

RMS_NORM = OpSpec(
    name="rms_norm",
    folder="layer_norm",
    formula="h / sqrt(mean(h^2) + eps) weight and h = x + residual, by row of the last dimension",
    source="Zhang & Sennrich 2019, arXiv:1910.07467",
    library=LIBRARY,
    reference=_rms_norm_reference,
    cases=tuple(_cases(False)),
    error_cases=tuple(_error_cases(False)),
    bench_cases=_bench_cases(("llama", 2, 1024, 4096), bias=False),
    peers={"eager": _eager_rms_norm},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    choices=dict.fromkeys(("layer_norm/rms_forward", "layer_norm/rms_backward"), _CHOICES),
)
