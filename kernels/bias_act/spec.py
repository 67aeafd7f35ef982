"""bias_act: what the op is, its cases and its cost."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.bias_act.schema import LIBRARY
from genai_fast.kernels.common.activations import ACTIVATIONS, activate, slope_of
from genai_fast.kernels.common.channels import per_channel, wide
from genai_fast.kernels.common.spec import (
    ELEMENTWISE_CHOICES,
    Case,
    CompileCase,
    Cost,
    ErrorCase,
    Expected,
    Limits,
    OpSpec,
)


def _reference(x, bias=None, activation="leaky_relu", negative_slope=None, *, save_output=False, act_weight=None):
    """A layer's bias, rounded as its result is, then the activation in x's dtype."""
    z = x if bias is None else (wide(x) + per_channel(wide(bias), x)).to(x.dtype)
    return activate(z, activation, negative_slope) if act_weight is None else F.prelu(z, act_weight.to(z.dtype))


def _eager(inplace):
    def run(x, bias=None, activation="leaky_relu", negative_slope=None, *, save_output=False, act_weight=None):
        """What people write: a bias, then the activation module."""
        z = x if bias is None else x + per_channel(bias, x)
        if act_weight is not None:
            return F.prelu(z, act_weight)
        if activation == "leaky_relu":
            return F.leaky_relu(z, slope_of(activation, negative_slope), inplace=inplace and bias is not None)
        return activate(z, activation, negative_slope)

    return run


def _cost(x, bias=None, activation="leaky_relu", negative_slope=None, **settings):
    # Forward reads x and writes y; backward reads dy and x or y and writes dx.
    return Cost(flops=6 * x.numel(), bytes=5 * x.numel() * x.element_size())


def _inputs(*shape, layout="contiguous", bias=True, **more):
    def make(t):
        x = t.laid_out(layout, *shape, scale=2.0)
        return dict(x=x, bias=t.normal(shape[1], scale=0.5) if bias else None, **more)

    return make


def _prelu(*shape, slopes=None, **more):
    """With a weight for each channel, or of that many slopes."""

    def make(t):
        weight = t.uniform(slopes or shape[1], low=-0.5, high=0.8, grad=True)
        return _inputs(*shape, **more)(t) | dict(activation="prelu", act_weight=weight)

    return make


def _mixed(t):
    """Activations of a narrow dtype beside a float32 bias, as under autocast."""
    wide_t = type(t)(torch.promote_types(t.dtype, torch.float32), t.device, t.generator)
    return dict(x=t.normal(6, 5, 4, 4), bias=wide_t.normal(5))


def _special(t):
    values = [0.0, -0.0, 80.0, -80.0, float("inf"), -float("inf"), float("nan"), 1e-30]
    x, bias = [[v] * 8 for v in values], [0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 1e-30, 0.5]
    return dict(x=t.values(x), bias=t.values(bias))


def _edges(activation):
    """Where formulas change, and far beyond, without a bias."""

    def make(t):
        values = [0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 3.25, -3.25, 6.0, 5.75, 20.0, 20.25, 80.0, -80.0, 1e4, -1e4]
        infinite = [float("inf"), -float("inf"), float("nan")]
        small = torch.linspace(-0.6, 0.6, 29).tolist()
        return dict(x=t.values([[v] * 16 for v in (*values, *infinite, *small)]), activation=activation)

    return make


CASES = (
    Case("discriminator", _inputs(8, 16, 8, 8)),
    Case("channels_last", _inputs(8, 24, 9, 7, layout="channels_last")),
    Case("odd", _inputs(3, 5, 7, 7)),
    Case("second_order", _inputs(3, 5, 3, 3, activation="silu")),
    Case("small_planes", _inputs(24, 7, 5, 5)),
    Case("linear", _inputs(33, 130, activation="relu")),
    Case("one_element", _inputs(1, 1)),
    Case("one_channel", _inputs(5, 1, 11)),
    Case("image", _inputs(4, 3, 8, 8, layout="channels_last", activation="tanh")),
    Case("image_of_primes", _inputs(7, 3, 11, 13, layout="channels_last")),
    Case("sound", _inputs(4, 6, 300, activation="silu")),
    Case("volume_channels_last", _inputs(2, 70, 3, 2, 2, layout="channels_last", activation="sigmoid")),
    Case("large_plane", _inputs(2, 3, 96, 128)),
    Case("many_rows", _inputs(40, 66, 9, 9, layout="channels_last")),
    Case("wide_rows", _inputs(3, 9000, activation="relu")),
    Case("strided", _inputs(4, 6, 5, 5, layout="strided")),
    Case("transposed", _inputs(4, 6, 5, 3, layout="transposed")),
    Case("no_bias", _inputs(4, 6, 5, 5, bias=False)),
    Case("no_bias_channels_last", _inputs(4, 6, 25, 45, bias=False, layout="channels_last")),
    Case("mixed_dtypes", _mixed),
    *(
        Case(f"{name}_of_{v}", _inputs(4, 6, 5, 5, activation=name, negative_slope=v))
        for name in ("elu", "softplus")
        for v in (0.3, -1.5)
    ),
    Case("prelu", _prelu(4, 24, 9, 7, bias=False)),
    Case("prelu_channels_last", _prelu(4, 24, 9, 7, layout="channels_last", bias=False)),
    Case("prelu_one", _prelu(4, 24, 9, 7, slopes=1, bias=False)),
    Case("prelu_bias", _prelu(20, 6, 5, 5, slopes=1)),
    Case("prelu_linear", _prelu(33, 130, bias=False)),
    Case("prelu_image", _prelu(4, 3, 8, 8, layout="channels_last")),
    Case("prelu_large_plane", _prelu(2, 3, 96, 128, bias=False)),
    Case("prelu_strided", _prelu(4, 6, 5, 5, layout="strided", bias=False)),
    Case("prelu_empty", _prelu(0, 6, 5, 5)),
    Case("second_order_prelu", _prelu(3, 5, 3, 3)),
    Case("negative_slope_below_0", _inputs(4, 6, 5, 5, negative_slope=-0.5)),
    Case("saved_output", _inputs(4, 6, 5, 5, save_output=True)),
    Case("saved_output_channels_last", _inputs(4, 6, 5, 5, layout="channels_last", save_output=True)),
    Case("empty_batch", _inputs(0, 6, 5, 5)),
    Case("empty_plane", _inputs(4, 6, 0)),
    Case("special_values", _special),
    *(Case(f"edges_{name}", _edges(name)) for name in ("elu", "relu6", "selu", "hardswish", "softplus", "mish")),
    *(Case(f"all_{name}", _inputs(5, 4, 6, 6, activation=name)) for name in ACTIVATIONS),
)

_GOOD = _inputs(4, 6, 5, 5)
ERROR_CASES = (
    ErrorCase("channels", lambda t: {**_GOOD(t), "bias": t.normal(5)}, ValueError,
              r"bias.*expected shape \(6,\).*got \(5,\)"),
    ErrorCase("bias_dtype", lambda t: {**_GOOD(t), "bias": t.normal(6).double()}, TypeError,
              r"bias.*expected torch\.float32.*got torch\.float64"),
    ErrorCase("device", lambda t: {**_GOOD(t), "bias": t.normal(6).to("meta")}, ValueError,
              r"bias.*expected device.*got meta"),
    ErrorCase("vector", lambda t: dict(x=t.normal(6)), ValueError, r"x.*\[N, C.*got shape \(6,\)"),
    ErrorCase("integers", lambda t: dict(x=torch.ones(4, 6, dtype=torch.int32)), TypeError,
              r"x.*floating.*got torch\.int32"),
    ErrorCase("activation", lambda t: {**_GOOD(t), "activation": "leaky"}, ValueError,
              r"activation.*'leaky_relu'.*got 'leaky'"),
    ErrorCase("slope", lambda t: {**_GOOD(t), "negative_slope": float("nan")}, ValueError, r"negative_slope.*got nan"),
    ErrorCase("weight_of_relu", lambda t: {**_GOOD(t), "activation": "relu", "act_weight": t.normal(6)}, ValueError,
              r"act_weight.*expected None.*'relu'"),
    ErrorCase("prelu_without_weight", lambda t: {**_GOOD(t), "activation": "prelu"}, TypeError,
              r"act_weight.*expected a tensor.*NoneType"),
    ErrorCase("prelu_channels", lambda t: {**_GOOD(t), "activation": "prelu", "act_weight": t.normal(5)}, ValueError,
              r"act_weight.*expected shape \(6,\).*got \(5,\)"),
    ErrorCase("saved_output_slope", lambda t: {**_GOOD(t), "negative_slope": 0.0, "save_output": True}, ValueError,
              r"save_output.*expected False.*leaky_relu.*negative_slope 0\.0.*got True"),
    ErrorCase("saved_output_silu", lambda t: {**_GOOD(t), "activation": "silu", "save_output": True}, ValueError,
              r"save_output.*expected False.*silu.*got True"),
)  # fmt: skip

BENCH_CASES = (
    Case("dcgan_64-64x64x32x32-channels_last", _inputs(64, 64, 32, 32, layout="channels_last")),
    Case("dcgan_64-64x64x32x32", _inputs(64, 64, 32, 32)),
    Case("gpt_nano-16384x1536-gelu", _inputs(16384, 1536, activation="gelu")),
    Case("gpt_nano-16384x1536-gelu-no_bias", _inputs(16384, 1536, activation="gelu", bias=False)),
    Case("gpt_nano-16384x1536-gelu_tanh", _inputs(16384, 1536, activation="gelu_tanh")),
)

_COMPILE_CASES = (
    *(
        CompileCase(
            f"saved_output-{layout}", _inputs(64, 64, 32, 32, layout=layout, save_output=True), ("fp32", "bf16")
        )
        for layout in ("contiguous", "channels_last")
    ),
    *(
        CompileCase(name, _inputs(64, 64, 32, 32, layout="channels_last", activation=name), ("fp32",))
        for name in ("elu", "relu6", "selu", "hardswish", "softplus", "mish")
    ),
    CompileCase("small_planes", _inputs(128, 128, 14, 14), ("fp32",)),
    *(
        CompileCase(f"prelu-{layout}", _prelu(64, 64, 32, 32, layout=layout, bias=False), ("fp32", "bf16"))
        for layout in ("contiguous", "channels_last")
    ),
)
_MOST = {"gelu": 60, "gelu_tanh": 50, "elu": 35, "selu": 35, "softplus": 40, "mish": 45}  # instructions per element
_EXPECTED = {
    "_bias_act_forward": Expected((), lambda c: c["ROWS"] * c["BLOCK"], lambda c: _MOST.get(c["ACTIVATION"], 22)),
    "_bias_act_backward": Expected(
        (), lambda c: c["ROWS"] * c["BLOCK"] * c["STEPS"], lambda c: _MOST.get(c["ACTIVATION"], 35)
    ),
}

BIAS_ACT = OpSpec(
    name="bias_act",
    folder="bias_act",
    formula="activation(x + bias[c]); for GELU along rows also as bias_gelu",
    source="Maas, Hannun & Ng 2013 (leaky ReLU); Hendrycks & Gimpel 2016 (GELU)",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(_inputs(8, 64, 32, 32, layout="channels_last"), (11.8, 30.3), 0.85, 4.95),
    peers={"eager": _eager(False), "eager (inplace)": _eager(True)},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
    choices={"bias_act/forward": ELEMENTWISE_CHOICES, "bias_act/backward": ELEMENTWISE_CHOICES},
)
