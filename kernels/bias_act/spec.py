"""bias_act: what the op is, its cases and its cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.activations import ACTIVATIONS, activate
from genai_fast.kernels.common.channels import dense_channels, per_channel, wide
from genai_fast.kernels.common.spec import ELEMENTWISE_CHOICES, Case, CompileCase, Cost, ErrorCase, LibraryOp, OpSpec


def _fake_backward(grad_y, saved, bias, from_output, with_bias, activation, slope):
    dtype = torch.float64 if saved.dtype == torch.float64 else torch.float32
    return torch.empty_like(dense_channels(saved)), saved.new_empty(saved.size(1) if with_bias else 0, dtype=dtype)


LIBRARY = (
    LibraryOp(
        "bias_act(Tensor x, Tensor? bias, str activation, float slope, str backend) -> Tensor",
        lambda x, *rest: torch.empty_like(dense_channels(x)),
    ),
    LibraryOp(
        "bias_act_backward(Tensor grad_y, Tensor saved, Tensor? bias, bool from_output, bool with_bias, str activation,"
        " float slope, str backend) -> (Tensor grad_x, Tensor grad_bias)",
        _fake_backward,
    ),
)


def _reference(x, bias=None, activation="leaky_relu", negative_slope=0.2, *, save_output=False):
    """A layer's bias, rounded as its result is, then the activation in x's dtype."""
    z = x if bias is None else (wide(x) + per_channel(wide(bias), x)).to(x.dtype)
    return activate(z, activation, negative_slope)


def _eager(inplace):
    def run(x, bias=None, activation="leaky_relu", negative_slope=0.2, *, save_output=False):
        """What people write: a bias, then the activation module."""
        z = x if bias is None else x + per_channel(bias, x)
        if activation == "leaky_relu":
            return F.leaky_relu(z, negative_slope, inplace=inplace and bias is not None)
        return activate(z, activation, negative_slope)

    return run


def _cost(x, bias=None, activation="leaky_relu", negative_slope=0.2, *, save_output=False):
    # Forward reads x and writes y; backward reads dy and x or y and writes dx.
    return Cost(flops=6 * x.numel(), bytes=5 * x.numel() * x.element_size())


def _inputs(*shape, layout="contiguous", bias=True, **more):
    def make(t):
        x = t.laid_out(layout, *shape, scale=2.0)
        return dict(x=x, bias=t.normal(shape[1], scale=0.5) if bias else None, **more)

    return make


def _mixed(t):
    """Activations of a narrow dtype beside a float32 bias, as under autocast."""
    wide_t = type(t)(torch.promote_types(t.dtype, torch.float32), t.device, t.generator)
    return dict(x=t.normal(6, 5, 4, 4), bias=wide_t.normal(5))


def _special(t):
    values = [0.0, -0.0, 80.0, -80.0, float("inf"), -float("inf"), float("nan"), 1e-30]
    x, bias = [[v] * 8 for v in values], [0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 1e-30, 0.5]
    return dict(x=t.values(x), bias=t.values(bias))


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
    Case("negative_slope_below_0", _inputs(4, 6, 5, 5, negative_slope=-0.5)),
    Case("saved_output", _inputs(4, 6, 5, 5, save_output=True)),
    Case("saved_output_channels_last", _inputs(4, 6, 5, 5, layout="channels_last", save_output=True)),
    Case("empty_batch", _inputs(0, 6, 5, 5)),
    Case("empty_plane", _inputs(4, 6, 0)),
    Case("special_values", _special),
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

# The launches of BENCH_CASES: 1024 elements of a plane, or 16 rows of 64 channels. And planes of 14 x 14.
_SIZES = dict(rows="i32", units="i32", channels="i32", splits="i32", slope="fp32", UNIT=8, JOINED=False)
_PLANE, _ROWS = dict(LAST=False, ROWS=1, BLOCK=1024), dict(LAST=True, ROWS=16, BLOCK=64)
_WIDE = dict(LAST=True, ROWS=1, BLOCK=1024)
_SMALL = dict(LAST=False, ROWS=4, BLOCK=256, UNIT=4)
_MOST = {"gelu": 60, "gelu_tanh": 50}  # instructions an element


def _compile_case(name, tile, dtype, backward=None, activation="leaky_relu"):
    """`backward`: from x, or from the output."""
    pointers = dict(bias_ptr="*fp32", **{p: dtype for p in ("grad_y_ptr", "saved_ptr", "grad_x_ptr")})
    constants = {**_SIZES, **tile, "ACTIVATION": activation}
    if backward is None:
        kernel, pointers = "_bias_act_forward", dict(x_ptr=dtype, bias_ptr="*fp32", y_ptr=dtype)
    else:
        kernel = "_bias_act_backward"
        pointers["bias_ptr"] = None if backward == "output" else "*fp32"
        constants.update(partial_ptr="*fp32", FROM_OUTPUT=backward == "output", STEPS=4 if tile["LAST"] else 1)
    return CompileCase(
        f"{activation}-{name}{'_backward_from_' + backward if backward else ''}-{dtype[1:]}",
        kernel,
        {**pointers, **constants},
        wide_loads=True,
        elements=1024 * constants.get("STEPS", 1),
        max_instructions_per_element=_MOST.get(activation, 35 if backward else 22),
    )


_COMPILE_CASES = (
    *(
        _compile_case(name, tile, dtype, backward)
        for name, tile in (("planes", _PLANE), ("rows", _ROWS))
        for dtype in ("*fp32", "*bf16")
        for backward in (None, "x", "output")
    ),
    _compile_case("small_planes", _SMALL, "*fp32"),
    _compile_case("small_planes", _SMALL, "*fp32", "x"),
    *(
        _compile_case("wide_rows", _WIDE, "*bf16", backward, activation)
        for activation in ("gelu", "gelu_tanh")
        for backward in (None, "x")
    ),
)

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
    peers={"eager": _eager(False), "eager (inplace)": _eager(True)},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    choices={"bias_act/forward": ELEMENTWISE_CHOICES, "bias_act/backward": ELEMENTWISE_CHOICES},
)
