"""conv_transpose: what the ops are, their cases and their cost."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.activations import activate
from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec, choices_of
from genai_fast.kernels.conv_transpose.schema import CONVOLUTION, STATISTICS
from genai_fast.kernels.conv_transpose.shapes import output_size


def _narrow(bias, x):
    return bias if bias is None else bias.to(x.dtype)


def _eager2d(x, weight, bias=None, stride=1, padding=0, output_padding=0, activation="none", negative_slope=None):
    """What people write: ConvTranspose2d, then the activation module."""
    z = F.conv_transpose2d(x, weight, _narrow(bias, x), stride, padding, output_padding)
    return activate(z, activation, negative_slope)


def _eager1d(x, weight, bias=None, stride=1, padding=0, output_padding=0, activation="none", negative_slope=None):
    """ConvTranspose1d, then the activation module."""
    z = F.conv_transpose1d(x, weight, _narrow(bias, x), stride, padding, output_padding)
    return activate(z, activation, negative_slope)


def _eager_upsample(x, weight, bias=None, activation="none", negative_slope=None):
    """Upsample(scale_factor=2), Conv2d(..., 3, padding=1), then the activation module."""
    z = F.conv2d(F.interpolate(x, scale_factor=2), weight, _narrow(bias, x), padding=1)
    return activate(z, activation, negative_slope)


def _eager_block(
    x, weight, bias=None, bn_weight=None, bn_bias=None, running_mean=None, running_var=None, momentum=0.1, eps=1e-5,
    stride=1, padding=0, output_padding=0, activation="leaky_relu", negative_slope=None,
):  # fmt: skip
    """ConvTranspose2d, BatchNorm2d in training, then the activation module."""
    z = F.conv_transpose2d(x, weight, _narrow(bias, x), stride, padding, output_padding)
    z = F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, True, momentum, eps)
    return activate(z, activation, negative_slope)


def _reference_block(
    x, weight, bias=None, bn_weight=None, bn_bias=None, running_mean=None, running_var=None, momentum=0.1, eps=1e-5,
    stride=1, padding=0, output_padding=0, activation="leaky_relu", negative_slope=None,
):  # fmt: skip
    """The same with the normalization in float32 or wider, as batch_norm_act does it."""
    z = wide(F.conv_transpose2d(x, weight, _narrow(bias, x), stride, padding, output_padding))
    running = [None if r is None else wide(r).clone() for r in (running_mean, running_var)]
    bn_weight, bn_bias = (None if p is None else wide(p) for p in (bn_weight, bn_bias))
    z = F.batch_norm(z, *running, bn_weight, bn_bias, True, momentum, eps)
    if running_mean is not None:
        running_mean.copy_(running[0])
        running_var.copy_(running[1])
    return activate(z, activation, negative_slope).to(x.dtype)


def _channels_last(eager):
    def run(**inputs):
        return eager(**inputs)

    def prepare(inputs):
        """The same numbers, x and weight in channels_last memory."""
        last = {
            name: inputs[name].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            for name in ("x", "weight")
        }
        return {**inputs, **last}

    run.prepare = prepare
    return run


def _output_elements(x, weight, stride, padding, output_padding):
    pairs = ((v, v) if isinstance(v, int) else v for v in (stride, padding, output_padding))
    out = output_size(x.shape[2:], weight.shape[2:], *pairs)
    return x.size(0) * weight.size(1) * out[0] * out[1]


def _cost(x, weight, bias=None, stride=1, padding=0, output_padding=0, passes=2, **settings):
    # Three matrix products, in which each pixel of x meets every tap. Forward reads x and the weight and writes y;
    # backward reads x, y, dy and the weight and writes dx and dw.
    y = _output_elements(x, weight, stride, padding, output_padding)
    flops = 3 * 2 * x.numel() * weight[0].numel()
    numbers = 3 * x.numel() + 3 * weight.numel() + (3 + passes) * y
    return Cost(flops=flops, bytes=numbers * x.element_size())


def _cost1d(x, weight, bias=None, stride=1, padding=0, output_padding=0, **settings):
    return _cost(x.unsqueeze(2), weight.unsqueeze(2), bias, (1, stride), (0, padding), (0, output_padding))


def _cost_upsample(x, weight, bias=None, **settings):
    spread = weight.new_empty(weight.size(1), weight.size(0), 4, 4, device="meta")
    return _cost(x, spread, bias, 2, 1)


def _cost_block(x, weight, **settings):
    # Batch norm and activation: one reading and one writing forward, four readings and one writing backward.
    return _cost(x, weight, passes=5, **{k: v for k, v in settings.items() if k.endswith(("stride", "padding"))})


def _inputs(*shape, to, kernel, layout="contiguous", bias=True, grad=True, **more):
    """x [shape], weight [C, to, *kernel]."""
    kernel = (kernel,) * (len(shape) - 2) if isinstance(kernel, int) else kernel

    def make(t):
        x = t.laid_out(layout, *shape)
        fan = shape[1] * kernel[0]
        weight = t.laid_out(
            "channels_last" if layout == "channels_last" else "contiguous", shape[1], to, *kernel, scale=fan**-0.5
        )
        found = dict(x=x, weight=weight, bias=t.normal(to, scale=0.3) if bias else None, **more)
        if not grad:
            found = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in found.items()}
        return found

    return make


def _mixed(t):
    """Activations and weight of a narrow dtype beside a float32 bias."""
    wide_t = type(t)(torch.promote_types(t.dtype, torch.float32), t.device, t.generator)
    return {**_inputs(2, 6, 3, 3, to=9, kernel=4, stride=2, padding=1)(t), "bias": wide_t.normal(9)}


CASES = (
    Case("odd", _inputs(2, 5, 3, 4, to=9, kernel=4, stride=2, padding=1, activation="leaky_relu")),
    Case("second_order", _inputs(2, 3, 2, 2, to=2, kernel=3, stride=2, padding=1, activation="tanh")),
    Case("dcgan_first", _inputs(5, 20, 1, 1, to=24, kernel=4, bias=False, activation="relu")),
    Case("channels_last", _inputs(2, 16, 4, 3, to=32, kernel=4, stride=2, padding=1, layout="channels_last")),
    Case("many_rows", _inputs(9, 20, 5, 5, to=18, kernel=4, stride=2, padding=1, bias=False, layout="channels_last")),
    Case("image", _inputs(2, 16, 6, 5, to=3, kernel=4, stride=2, padding=1, activation="tanh")),
    Case("dense_to_image_1", _inputs(2, 8, 7, 7, to=12, kernel=5, padding=2, bias=False)),
    Case("dense_to_image_2", _inputs(2, 8, 7, 7, to=1, kernel=5, stride=2, padding=2, output_padding=1)),
    Case("stride_1_2", _inputs(2, 6, 4, 5, to=10, kernel=(3, 4), stride=(1, 2), padding=(1, 0), output_padding=(0, 1))),
    Case("one_pixel", _inputs(1, 1, 1, 1, to=1, kernel=1)),
    Case("transposed", _inputs(2, 6, 3, 5, to=9, kernel=3, stride=2, layout="transposed", activation="silu")),
    Case("strided", _inputs(2, 6, 3, 3, to=9, kernel=2, stride=2, layout="strided", activation="sigmoid")),
    Case("empty_batch", _inputs(0, 6, 3, 3, to=9, kernel=4, stride=2, padding=1)),
    Case("mixed_dtypes", _mixed),
    Case("negative_slope_0", _inputs(2, 6, 3, 3, to=9, kernel=3, activation="leaky_relu", negative_slope=0.0)),
    Case("no_gradient", _inputs(2, 6, 3, 3, to=3, kernel=4, stride=2, padding=1, activation="silu", grad=False)),
)

_GOOD = _inputs(2, 6, 4, 4, to=9, kernel=4, stride=2, padding=1)


def _wrong(name, message, error=ValueError, good=_GOOD, **change):
    """An error case: the good arguments with these changes, which may be functions of Tensors."""

    def make(t):
        return {**good(t), **{k: v(t) if callable(v) else v for k, v in change.items()}}

    return ErrorCase(name, make, error, message)


ERROR_CASES = (
    _wrong("dimensions", r"x.*\[N, C, H, W\].*got shape \(6, 4, 4\)", x=lambda t: t.normal(6, 4, 4)),
    _wrong("weight_dimensions", r"weight.*got shape \(6, 9, 4\)", weight=lambda t: t.normal(6, 9, 4)),
    _wrong("channels", r"weight.*expected 6 as first size.*\(9, 6, 4, 4\)", weight=lambda t: t.normal(9, 6, 4, 4)),
    _wrong("empty_plane", r"at least 1 except for the batch.*\(2, 6, 0, 4\)", x=lambda t: t.normal(2, 6, 0, 4)),
    _wrong("dtype", r"weight.*expected torch\.float32.*got torch\.float64", TypeError,
           weight=lambda t: t.normal(6, 9, 4, 4).double()),
    _wrong("device", r"weight.*expected device.*got meta", weight=lambda t: t.normal(6, 9, 4, 4).to("meta")),
    _wrong("integers", r"x.*floating.*got torch\.int32", TypeError,
           x=lambda t: torch.ones(2, 6, 4, 4, dtype=torch.int32)),
    _wrong("bias", r"bias.*expected shape \(9,\) as weight gives 9 channels, got \(6,\)", bias=lambda t: t.normal(6)),
    _wrong("stride", r"stride.*at least 1, got 0", stride=0),
    _wrong("padding", r"padding.*at least 0, got \(1, -1\)", padding=(1, -1)),
    _wrong("three_ints", r"padding.*an int or 2 ints, got \(1, 1, 1\)", TypeError, padding=(1, 1, 1)),
    _wrong("output_padding", r"output_padding.*less than stride 2, got 2", output_padding=2),
    _wrong("too_much_padding", r"padding.*at least 1 pixel, got \(-2, -2\).*use less padding", padding=6),
    _wrong("activation", r"activation.*'leaky_relu'.*got 'leaky'", activation="leaky"),
    _wrong("slope", r"negative_slope.*got nan", negative_slope=float("nan")),
)  # fmt: skip

_PLANE = _inputs(2, 6, 10, to=9, kernel=4, stride=2, padding=1)
CASES_1D = (
    Case("odd", _PLANE),
    Case("second_order", _inputs(2, 3, 3, to=2, kernel=3, stride=2, padding=1, activation="sigmoid")),
    Case("sound", _inputs(2, 12, 9, to=5, kernel=6, stride=2, padding=2, output_padding=1, activation="tanh")),
    Case("channels_last", _inputs(2, 16, 5, to=16, kernel=3, layout="channels_last", activation="relu")),
)
ERROR_CASES_1D = (
    _wrong("dimensions", r"x.*\[N, C, L\].*got shape \(2, 6, 1, 4\)", good=_PLANE, x=lambda t: t.normal(2, 6, 1, 4)),
    _wrong("stride", r"stride.*an int, got \(1, 2\)", TypeError, good=_PLANE, stride=(1, 2)),
)


def _upsample(*shape, to, **more):
    """As `_inputs`, with the weight of a Conv2d."""
    make = _inputs(*shape, to=to, kernel=3, **more)

    def turned(t):
        found = make(t)
        weight = found["weight"].detach().transpose(0, 1).contiguous()
        return {**found, "weight": weight.requires_grad_(found["weight"].requires_grad)}

    return turned


CASES_UPSAMPLE = (
    Case("odd", _upsample(2, 5, 3, 4, to=9, activation="sigmoid")),  # a kink would turn on sums of weights, rounded
    Case("second_order", _upsample(1, 2, 2, 3, to=3, bias=False)),
    Case("image", _upsample(2, 16, 4, 5, to=3, layout="channels_last", activation="tanh")),
    Case("one_pixel", _upsample(2, 3, 1, 1, to=17)),
)
ERROR_CASES_UPSAMPLE = (
    _wrong("kernel", r"weight.*\[C_out, C, 3, 3\].*got shape \(9, 6, 4, 4\)", good=_upsample(2, 6, 4, 4, to=9),
           weight=lambda t: t.normal(9, 6, 4, 4)),
    _wrong("channels", r"weight.*expected 6 as first size", good=_upsample(2, 6, 4, 4, to=9),
           weight=lambda t: t.normal(9, 5, 3, 3)),
)  # fmt: skip


def _block(*shape, to, running=True, affine=True, activation="leaky_relu", **more):
    """A block's arguments; the convolution's bias, whose gradient is nothing but rounding, asks for none."""
    make = _inputs(*shape, to=to, activation=activation, **more)

    def block(t):
        found = make(t)
        if found["bias"] is not None:
            found["bias"] = found["bias"].detach()
        if affine:
            found |= dict(bn_weight=t.uniform(to, low=0.5, high=1.5, grad=True), bn_bias=t.normal(to, scale=0.3))
        if running:
            found |= dict(running_mean=t.normal(to, grad=False), running_var=t.uniform(to, low=0.5, high=2.0))
        return found

    return block


_GOOD_BLOCK = _block(2, 6, 4, 4, to=9, kernel=4, stride=2, padding=1)
CASES_BLOCK = (
    Case("odd", _block(3, 5, 3, 5, to=9, kernel=4, stride=2, padding=1, activation="silu")),
    Case("second_order", _block(2, 2, 2, 2, to=2, kernel=3, stride=2, padding=1, activation="tanh", bias=False)),
    Case("channels_last", _block(3, 16, 4, 4, to=70, kernel=4, stride=2, padding=1, layout="channels_last")),
    Case("odd_output", _block(2, 6, 3, 4, to=18, kernel=3, stride=2, padding=1, momentum=0.3, eps=0.8, bias=False)),
    Case("few_channels", _block(3, 6, 4, 3, to=3, kernel=5, padding=2, activation="silu", running=False)),
    Case("dcgan_first", _block(7, 10, 1, 1, to=24, kernel=4, activation="relu", affine=False)),
)
ERROR_CASES_BLOCK = (
    _wrong(
        "channels", r"bn_weight.*expected shape \(9,\).*got \(6,\)", good=_GOOD_BLOCK, bn_weight=lambda t: t.normal(6)
    ),
    _wrong("running_alone", r"running_var.*both or", good=_GOOD_BLOCK, running_mean=None),
    _wrong("one_value", r"x.*more than one value per channel", good=_block(1, 6, 1, 1, to=9, kernel=1)),
    _wrong("eps", r"eps >= 0.*got eps -1", good=_GOOD_BLOCK, eps=-1.0),
)

_S2 = dict(kernel=4, stride=2, padding=1)
BENCH_CASES = (
    Case("dcgan_64-64x1024x4x4-512", _inputs(64, 1024, 4, 4, to=512, bias=False, layout="channels_last", **_S2)),
    Case("dcgan_64-64x128x16x16-64", _inputs(64, 128, 16, 16, to=64, bias=False, layout="channels_last", **_S2)),
    Case("dcgan_64-64x64x32x32-3", _inputs(64, 64, 32, 32, to=3, activation="tanh", layout="channels_last", **_S2)),
    Case("dense_to_image-128x256x7x7-128", _inputs(128, 256, 7, 7, to=128, kernel=5, padding=2, bias=False)),
)
BENCH_CASES_1D = (Case("audio_vae-32x64x128-32", _inputs(32, 64, 128, to=32, activation="leaky_relu", **_S2)),)
BENCH_CASES_UPSAMPLE = (Case("resize-64x128x16x16-64", _upsample(64, 128, 16, 16, to=64, layout="channels_last")),)
BENCH_CASES_BLOCK = (
    Case("dcgan_64-64x128x16x16-64", _block(64, 128, 16, 16, to=64, bias=False, layout="channels_last", **_S2)),
    Case("dcgan_64-64x512x8x8-256", _block(64, 512, 8, 8, to=256, bias=False, layout="channels_last", **_S2)),
)
GPU_CASES_BLOCK = tuple(
    Case(
        f"{model}-128x{c}x{n}x{n}-{to}",
        _block(128, c, n, n, to=to, activation="relu", bias=False, layout="channels_last", **_S2),
    )
    for model, c, n, to in (
        ("dcgan_64", 512, 4, 256),
        ("dcgan_64", 256, 8, 128),
        ("dcgan_64", 128, 16, 64),
        ("dcgan_128", 128, 32, 64),
    )
)

_CHOICES = choices_of(
    BLOCK_M=(64, 128, 128, 128, 256),
    BLOCK_N=(64, 64, 128, 128, 64),
    BLOCK_K=(64, 32, 32, 64, 32),
    num_warps=(4, 4, 4, 8, 8),
    num_stages=(4, 4, 3, 3, 3),
)
# Layers of a DCGAN, the first of which has one pixel and 100 channels, in the third dtype.
_HALF = ("fp16",)
_COMPILE_CASES = (
    CompileCase("dcgan_64-64x128x16x16-64", _inputs(64, 128, 16, 16, to=64, layout="channels_last", **_S2), _HALF),
    CompileCase("dcgan_64-64x64x32x32-3", BENCH_CASES[2].inputs, ("fp32", "tf32", "fp16")),
    CompileCase("dcgan_64-64x100x1x1-1024", _inputs(64, 100, 1, 1, to=1024, kernel=4, layout="channels_last"), _HALF),
    CompileCase("one_channel", _inputs(1, 1, 1, 1, to=1, kernel=1), _HALF),
)
_TILES = Expected(tensor_cores=True)
_EXPECTED = {
    "_conv_transpose_forward": Expected(("channels",), tensor_cores=True),
    "_conv_transpose_grad_input": Expected(("channels", "out_channels"), tensor_cores=True),
    **dict.fromkeys(("_conv_transpose_grad_weight", "_few_grad_input", "_few_grad_weight"), _TILES),
    "_sum_splits": Expected(("count",)),
}
_PHASES = "phases: Shi et al. 2016, arXiv:1609.07009"


def _op(name: str, formula: str, source: str, eager: Callable[..., Any], cost: Any, **more: Any) -> OpSpec:
    """What the four ops have in common."""
    peers = {"eager": eager} | ({} if name.endswith("1d") else {"eager (channels_last)": _channels_last(eager)})
    choices = {f"conv_transpose/{kernel}": _CHOICES for kernel in ("forward", "grad_input", "grad_weight")}
    shared = {"library": CONVOLUTION, "reference": eager, "backends": ("reference", "triton"), "choices": choices}
    about = {"formula": formula, "source": source, "peers": peers, "cost": cost, "expected": _EXPECTED}
    return OpSpec(name=name, folder="conv_transpose", **about, **shared | more)


CONV_TRANSPOSE2D = _op(
    "conv_transpose2d", "activation(conv_transpose2d(x, weight) + bias)",
    f"Dumoulin & Visin 2016, arXiv:1603.07285; {_PHASES}", _eager2d, _cost,
    cases=CASES, error_cases=ERROR_CASES, bench_cases=BENCH_CASES, compile_cases=_COMPILE_CASES,
    limits=Limits(_inputs(8, 64, 8, 8, to=64, bias=False, layout="channels_last", **_S2), (62, 39.4, 84.9), 1.05, 1.05),
)  # fmt: skip
CONV_TRANSPOSE1D = _op(
    "conv_transpose1d", "activation(conv_transpose1d(x, weight) + bias)",
    "Dumoulin & Visin 2016, arXiv:1603.07285", _eager1d, _cost1d,
    cases=CASES_1D, error_cases=ERROR_CASES_1D, bench_cases=BENCH_CASES_1D,
    limits=Limits(_inputs(4, 64, 64, to=32, activation="leaky_relu", **_S2), (42.2, 25.4, 21.3, 34), 1.05, 4.95),
)  # fmt: skip
UPSAMPLE_CONV2D = _op(
    "upsample_conv2d",
    "activation(conv2d(upsample(x), weight, padding=1) + bias), nearest, twice the size, 3 x 3",
    f"Odena, Dumoulin & Olah 2016; {_PHASES}", _eager_upsample, _cost_upsample,
    cases=CASES_UPSAMPLE, error_cases=ERROR_CASES_UPSAMPLE, bench_cases=BENCH_CASES_UPSAMPLE,
    limits=Limits(_upsample(4, 64, 8, 8, to=32, layout="channels_last"), (105, 50.1, 132), 1.05, 1.05),
)  # fmt: skip
CONV_TRANSPOSE2D_BATCH_NORM_ACT = _op(
    "conv_transpose2d_batch_norm_act",
    "activation(batch_norm(conv_transpose2d(x, weight) + bias)) in training, statistics from the convolution",
    "Radford, Metz & Chintala 2016, arXiv:1511.06434; Ioffe & Szegedy 2015, arXiv:1502.03167",
    _eager_block, _cost_block,
    library=(STATISTICS, *CONVOLUTION[1:]),  # and batch_norm_act's; where no kernel serves, the two ops in turn
    reference=_reference_block, mutates=("running_mean", "running_var"),
    cases=CASES_BLOCK, error_cases=ERROR_CASES_BLOCK, bench_cases=BENCH_CASES_BLOCK, gpu_cases=GPU_CASES_BLOCK,
    limits=Limits(_block(8, 64, 8, 8, to=32, bias=False, layout="channels_last", **_S2),
                  (171, 3.37, 38.4, 116, 1.85, 66.7, 56.4, 120), 1.05, 1.65),
    compile_cases=(CompileCase("dcgan_64-64x128x16x16-64", BENCH_CASES_BLOCK[0].inputs, _HALF),),
)  # fmt: skip
