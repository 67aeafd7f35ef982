"""decode_linear: what the op is, its cases and its cost."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.activations import ACTIVATIONS, DEFAULT_SLOPE
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec, choices_of
from genai_fast.kernels.decode_linear import reference
from genai_fast.kernels.decode_linear.schema import LIBRARY


def _reference(x, weight, bias=None, *, norm_weight=None, norm_bias=None, eps=1e-5, activation="none", residual=None):
    return reference.decode_linear(x, weight, bias, norm_weight, norm_bias, eps, activation, residual)


def _eager(x, weight, bias=None, *, norm_weight=None, norm_bias=None, activation="none", residual=None):
    """A part of GPT-2's block as people write it."""
    if norm_weight is not None:
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias)
    y = F.linear(x, weight, bias)
    y = F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y
    return y if residual is None else residual + y


def _cost(x, weight, bias=None, **more):
    rows = x.numel() // x.size(-1)
    written = rows * weight.size(0) * (2 if more.get("residual") is not None else 1)
    return Cost(flops=2 * rows * weight.numel(), bytes=(weight.numel() + x.numel() + written) * x.element_size())


def _inputs(*shape, outputs, bias=True, norm=True, norm_bias=True, residual=False, **more):
    def make(t):
        columns = shape[-1]
        found = dict(
            x=t.normal(*shape, scale=2.0, mean=0.5, grad=False),
            weight=t.normal(outputs, columns, scale=columns**-0.5, grad=False),
        )
        if bias:
            found["bias"] = t.normal(outputs, grad=False)
        if norm:
            found["norm_weight"] = t.uniform(columns, low=0.5, high=1.5)
        if norm and norm_bias:
            found["norm_bias"] = t.normal(columns, scale=0.3, grad=False)
        if residual:
            found["residual"] = t.normal(*shape[:-1], outputs, grad=False)
        return {**found, **more}

    return make


def _strided(t):
    """Rows of x, the residual and the weight with gaps: x as one of a packed projection's parts."""
    given = _inputs(3, 2, 40, outputs=24, residual=True)(t)
    given["x"] = t.normal(3, 2, 3 * 40, grad=False)[..., 40:80]
    given["residual"] = t.normal(3, 4, 24, grad=False)[:, ::2]
    given["weight"] = t.normal(24, 50, scale=0.2, grad=False)[:, :40]
    return given


def _apart(t):
    """Columns that do not lie side by side."""
    given = _inputs(5, 33, outputs=9, residual=True)(t)
    given["x"], given["residual"] = (t.normal(*x.t().shape, grad=False).t() for x in (given["x"], given["residual"]))
    given["bias"], given["norm_weight"] = (t.normal(n, 2, grad=False)[:, 0] for n in (9, 33))
    return given


def _special(t):
    """Rows with an infinity, with a NaN, and an ordinary one; without a norm, which would make NaN of both."""
    x = torch.randn(3, 21, generator=t.generator)
    x[0, 3], x[1, 4] = float("inf"), float("nan")
    return {**_inputs(3, 21, outputs=6, norm=False)(t), "x": t.values(x.tolist(), grad=False)}


CASES = (
    Case("gpt2_like", _inputs(1, 96, outputs=40)),
    Case("no_norm", _inputs(1, 96, outputs=40, norm=False, residual=True)),
    Case("alone", _inputs(1, 64, outputs=20, norm=False, bias=False)),
    Case("no_biases", _inputs(2, 64, outputs=20, bias=False, norm_bias=False, residual=True)),
    Case("vector", _inputs(48, outputs=7, residual=True)),
    Case("odd", _inputs(3, 77, outputs=13, residual=True)),
    Case("one_of_all", _inputs(1, 1, outputs=1, norm=False)),
    Case("one_output", _inputs(2, 3, 50, outputs=1)),
    Case("sixteen_rows", _inputs(16, 40, outputs=24, activation="gelu_tanh", residual=True)),
    Case("more_dimensions", _inputs(2, 1, 3, 40, outputs=6, residual=True, activation="gelu_tanh")),
    *(
        Case(name, _inputs(2, 32, outputs=20, activation=name, residual=name == "relu"))
        for name in ACTIVATIONS
        if name not in ("none", *DEFAULT_SLOPE)
    ),
    Case("strided", _strided),
    Case("columns_apart", _apart),
    Case("many_outputs", _inputs(1, 12, outputs=3000)),
    Case("wide", _inputs(2, 4200, outputs=5, residual=True)),
    Case("large_eps", _inputs(2, 24, outputs=8, eps=0.7)),
    Case("no_rows", _inputs(0, 16, outputs=8, residual=True)),
    Case("no_outputs", _inputs(2, 16, outputs=0)),
    Case("special_values", _special),
)

_GOOD = _inputs(2, 8, outputs=6, residual=True)


def _with(**changes):
    return lambda t: (lambda good: {**good, **{n: f(good.get(n)) for n, f in changes.items()}})(_GOOD(t))


ERROR_CASES = (
    ErrorCase("integers", _with(x=lambda x: x.int()), TypeError, r"x: .*floating.*got torch\.int32"),
    ErrorCase("no_columns", _with(x=lambda x: x[:, :0]), ValueError, r"x: expected .* with K > 0, .*\(2, 0\)"),
    ErrorCase("transposed", _with(weight=lambda x: x.t()), ValueError,
              r"weight: expected \[N, 8\].*got shape \(8, 6\).*\.t\(\)"),
    ErrorCase("weight_dtype", _with(weight=lambda x: x.bfloat16()), TypeError,
              r"weight: expected torch\.float32 as x has, got torch\.bfloat16"),
    ErrorCase("device", _with(weight=lambda x: x.to("meta")), ValueError, r"weight: expected device cpu.*got meta"),
    ErrorCase("bias", _with(bias=lambda x: x[:5]), ValueError, r"bias: expected shape \(6,\), got \(5,\)"),
    ErrorCase("norm", _with(norm_weight=lambda x: x[:6]), ValueError, r"norm_weight: expected shape \(8,\), got \(6,"),
    ErrorCase("norm_dtype", _with(norm_bias=lambda x: x.double()), TypeError, r"norm_bias: .*got torch\.float64"),
    ErrorCase("half_a_norm", _with(norm_weight=lambda x: None), ValueError, r"norm_bias: expected None without"),
    ErrorCase("residual", _with(residual=lambda x: x[:1]), ValueError, r"residual: expected shape \(2, 6\), got \(1,"),
    ErrorCase("activation", _with(activation=lambda _: "leaky_relu"), ValueError, r"activation: .*got 'leaky_relu'"),
    ErrorCase("eps", _with(eps=lambda _: -1e-5), ValueError, r"eps: expected a finite float >= 0, got -1e-05"),
    ErrorCase("gradient", _with(weight=lambda x: x.requires_grad_()), ValueError, r"x: .*no gradient.*no_grad"),
)  # fmt: skip

# The parts of a token's step. Settings are kept by the weight's shape, so none comes with two numbers of rows.
BENCH_CASES = (
    Case("gpt2-1x768-2304-norm", _inputs(1, 768, outputs=2304)),
    Case("gpt2-1x768-768-residual", _inputs(1, 768, outputs=768, norm=False, residual=True)),
    Case("gpt2-1x768-3072-norm-gelu", _inputs(1, 768, outputs=3072, activation="gelu_tanh")),
    Case("gpt2-1x3072-768-residual", _inputs(1, 3072, outputs=768, norm=False, residual=True)),
    Case("gpt2-1x768-50257-norm", _inputs(1, 768, outputs=50257, bias=False)),
    Case("gpt2_medium-8x1024-4096-norm-gelu", _inputs(8, 1024, outputs=4096, activation="gelu_tanh")),
)


_CHOICES = choices_of(BLOCK_N=(1, 2, 2, 4, 4, 8, 8, 16), num_warps=(1, 1, 2, 2, 4, 4, 8, 8))

_COMPILE_CASES = (
    CompileCase("widest", _inputs(1, 8192, outputs=1024, residual=True), ("fp32", "bf16")),
    CompileCase("widest-16384", _inputs(1, 16384, outputs=1024, residual=True)),
    CompileCase("16_rows", _inputs(16, 768, outputs=3072, residual=True), ("fp32", "bf16")),
)
_EXPECTED = {"_decode_linear": Expected((), lambda c: c["BLOCK_N"] * c["BLOCK_K"])}

DECODE_LINEAR = OpSpec(
    name="decode_linear",
    folder="decode_linear",
    formula="activation(layer_norm(x) weight^T + bias) + residual, for a few rows of x",
    source="Vaswani et al. 2017, arXiv:1706.03762",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(BENCH_CASES[1].inputs, (14.3,), 0.9, 1.05),
    peers={"eager": _eager},
    cost=_cost,
    double_backward=False,
    backends=("reference", "triton"),
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
    choices={"decode_linear/forward": _CHOICES},
)
