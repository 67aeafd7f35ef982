"""batch_norm_act: what the op is, its cases and its cost."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.batch_norm_act.schema import LIBRARY
from genai_fast.kernels.common.activations import ACTIVATIONS, activate, slope_of
from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.common.spec import (
    ELEMENTWISE_CHOICES,
    Case,
    CompileCase,
    Cost,
    ErrorCase,
    Expected,
    Limits,
    OpSpec,
    choices_of,
)


def _reference(
    x, weight=None, bias=None, running_mean=None, running_var=None, training=True, momentum=0.1, eps=1e-5,
    activation="leaky_relu", negative_slope=None, residual=None, *, residual_after=False, act_weight=None,
):  # fmt: skip
    """F.batch_norm, the sum and the activation, in float32 or wider."""
    running = [None if r is None else wide(r).clone() for r in (running_mean, running_var)]
    weight, bias = (None if p is None else wide(p) for p in (weight, bias))
    z = F.batch_norm(wide(x), *running, weight, bias, training, momentum, eps)
    if running_mean is not None:
        running_mean.copy_(running[0])
        running_var.copy_(running[1])
    z = z if residual is None or residual_after else z + wide(residual)
    y = activate(z, activation, negative_slope) if act_weight is None else F.prelu(z, act_weight.to(z.dtype))
    return (y + wide(residual) if residual is not None and residual_after else y).to(x.dtype)


def _eager(inplace):
    def run(
        x, weight=None, bias=None, running_mean=None, running_var=None, training=True, momentum=0.1, eps=1e-5,
        activation="leaky_relu", negative_slope=None, residual=None, *, residual_after=False, act_weight=None,
    ):  # fmt: skip
        """What people write: BatchNorm, the sum, then the activation module."""
        z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        if act_weight is not None:
            return F.prelu(z, act_weight)
        if residual_after:
            return activate(z, activation, negative_slope) + residual
        if residual is not None:
            z += residual
        if activation == "leaky_relu":
            return F.leaky_relu(z, slope_of(activation, negative_slope), inplace=inplace)
        return activate(z, activation, negative_slope)

    return run


def _contiguous(inputs):
    """The same inputs in PyTorch's default layout, N C H W."""
    x = inputs["x"].detach().contiguous().requires_grad_()
    return {**inputs, "x": x}


_eager_contiguous = _eager(False)
_eager_contiguous.prepare = _contiguous


def _cost(x, weight=None, residual=None, **settings):
    # Forward reads x twice and writes y; backward reads x and dy twice and writes dx. A residual is read, y read again,
    # dz written.
    passes = 8 if residual is None else 11
    return Cost(flops=30 * x.numel(), bytes=passes * x.numel() * x.element_size())


def _parameters(t, channels, running=True):
    found = dict(weight=t.uniform(channels, low=0.5, high=1.5, grad=True), bias=t.normal(channels, scale=0.3))
    if running:
        found.update(running_mean=t.normal(channels, grad=False), running_var=t.uniform(channels, low=0.5, high=2.0))
    return found


def _inputs(*shape, layout="contiguous", mean=0.5, running=True, residual=False, **more):
    def make(t):
        found = dict(x=t.laid_out(layout, *shape, scale=2.0, mean=mean), **_parameters(t, shape[1], running), **more)
        return found | dict(residual=t.laid_out(layout, *shape)) if residual else found

    return make


def _prelu(*shape, slopes=None, **more):
    """With a weight for each channel, or of that many slopes."""

    def make(t):
        weight = t.uniform(slopes or shape[1], low=-0.5, high=0.8, grad=True)
        return _inputs(*shape, **more)(t) | dict(activation="prelu", act_weight=weight)

    return make


def _mixed(t):
    """Activations of a narrow dtype beside float32 parameters, as under autocast."""
    wide_t = type(t)(torch.promote_types(t.dtype, torch.float32), t.device, t.generator)
    return dict(x=t.normal(6, 5, 4, 4), **_parameters(wide_t, 5))


def _no_affine(t):
    return dict(x=t.normal(6, 5, 4, 4), running_mean=t.normal(5, grad=False), running_var=t.uniform(5, low=0.5))


def _special(t):
    """Channels with an infinity, with a NaN, with one value everywhere, with zeros, and an ordinary one."""
    x = torch.randn(4, 5, 3, generator=t.generator)
    x[0, 0, 0], x[1, 1, 1], x[:, 2], x[:, 3] = float("inf"), float("nan"), 1.5, 0.0
    return dict(x=t.values(x.tolist()), **_parameters(t, 5))


CASES = (
    Case("dcgan_block", _inputs(8, 16, 8, 8)),
    Case("channels_last", _inputs(8, 24, 9, 7, layout="channels_last")),
    Case("odd", _inputs(3, 5, 7, 7, activation="none")),
    Case("two_values", _inputs(2, 3, 1, 1, eps=0.5)),
    Case("linear", _inputs(33, 130, activation="relu")),
    Case("one_channel", _inputs(5, 1, 11)),
    Case("sound", _inputs(4, 6, 300, activation="silu")),
    Case("sound_channels_last", _inputs(4, 6, 50, layout="channels_last", activation="tanh")),
    Case("volume", _inputs(2, 4, 3, 4, 5, activation="sigmoid")),
    Case("volume_channels_last", _inputs(2, 70, 3, 2, 2, layout="channels_last", activation="relu")),
    Case("large_plane", _inputs(2, 3, 96, 128)),
    Case("many_rows", _inputs(8, 66, 9, 9, layout="channels_last")),
    Case("wide_rows", _inputs(3, 1100, activation="relu")),
    Case("small_planes", _inputs(20, 34, 4, 4)),
    Case("second_order", _inputs(3, 2, 3, 2, activation="tanh")),
    Case("second_order_eval", _inputs(3, 2, 4, activation="silu", training=False)),
    Case("strided", _inputs(4, 6, 5, 5, layout="strided", activation="relu")),
    Case("transposed", _inputs(4, 6, 5, 3, layout="transposed")),
    Case("far_mean", _inputs(64, 4, 8, 8, mean=200.0)),
    Case("far_mean_channels_last", _inputs(64, 4, 8, 8, mean=200.0, layout="channels_last")),
    Case("eps_0.8", _inputs(4, 6, 5, 5, eps=0.8, momentum=0.2)),
    Case("momentum_1", _inputs(4, 6, 5, 5, momentum=1.0, negative_slope=-0.5)),
    Case("momentum_0", _inputs(4, 6, 5, 5, momentum=0.0)),
    Case("no_running", _inputs(4, 6, 5, 5, running=False)),
    Case("no_affine", _no_affine),
    Case("weight_only", lambda t: {"x": t.normal(6, 5, 9), "weight": t.uniform(5, low=0.5, grad=True)}),
    Case("mixed_dtypes", _mixed),
    Case("eval", _inputs(4, 6, 5, 5, training=False)),
    Case("eval_channels_last", _inputs(1, 6, 5, 5, training=False, layout="channels_last", activation="silu")),
    Case("eval_empty", _inputs(0, 6, 5, 5, training=False)),
    Case("special_values", _special),
    *(
        Case(f"residual_{name}_{layout}", _inputs(4, 24, 9, 7, layout=layout, activation=name, residual=True))
        for name, layout in (
            ("relu", "channels_last"),
            ("relu", "strided"),
            ("none", "contiguous"),
            ("sigmoid", "contiguous"),
            ("silu", "channels_last"),
            ("mish", "contiguous"),
        )
    ),
    *(
        Case(
            f"after_{name}_{layout}",
            _inputs(4, 24, 9, 7, layout=layout, activation=name, residual=True, residual_after=True),
        )
        for name, layout in (("relu", "channels_last"), ("silu", "contiguous"), ("mish", "strided"))
    ),
    Case("prelu", _prelu(4, 24, 9, 7)),
    Case("prelu_channels_last", _prelu(4, 24, 9, 7, layout="channels_last", slopes=1)),
    Case("prelu_small_planes", _prelu(20, 34, 4, 4, slopes=1)),
    Case("prelu_large_plane", _prelu(2, 3, 96, 128)),
    Case("prelu_eval", _prelu(4, 6, 5, 5, training=False)),
    Case("prelu_residual", _prelu(4, 24, 9, 7, residual=True)),
    Case("prelu_residual_channels_last", _prelu(4, 24, 9, 7, layout="channels_last", residual=True)),
    Case("prelu_after", _prelu(4, 24, 9, 7, residual=True, residual_after=True)),
    Case("second_order_prelu", _prelu(3, 2, 3, 2, residual=True)),
    Case("residual_small_planes", _inputs(20, 34, 4, 4, activation="relu", residual=True)),
    Case("residual_linear", _inputs(33, 130, activation="leaky_relu", negative_slope=-0.5, residual=True)),
    Case("residual_large_plane", _inputs(2, 3, 96, 128, activation="tanh", residual=True)),
    Case("residual_eval", _inputs(4, 6, 5, 5, activation="relu", residual=True, training=False)),
    Case("residual_eval_none", _inputs(4, 6, 5, 5, activation="none", residual=True, training=False)),
    Case("second_order_residual", _inputs(3, 2, 3, 2, activation="tanh", residual=True)),
    Case("second_order_residual_softplus", _inputs(3, 2, 4, activation="softplus", residual=True)),
    *(Case(f"all_{name}", _inputs(5, 4, 6, 6, activation=name)) for name in ACTIVATIONS),
)

_GOOD = _inputs(4, 6, 5, 5)
ERROR_CASES = (
    ErrorCase("channels", lambda t: {**_GOOD(t), "weight": t.normal(5)}, ValueError,
              r"weight.*expected shape \(6,\).*got \(5,\)"),
    ErrorCase("running_channels", lambda t: {**_GOOD(t), "running_var": t.uniform(7)}, ValueError,
              r"running_var.*expected shape \(6,\).*got \(7,\)"),
    ErrorCase("running_dtype", lambda t: {**_GOOD(t), "running_mean": t.uniform(6).double()}, TypeError,
              r"running_mean.*expected torch\.float32.*got torch\.float64"),
    ErrorCase("running_device", lambda t: {**_GOOD(t), "running_mean": t.uniform(6).to("meta")}, ValueError,
              r"running_mean.*expected device.*got meta"),
    ErrorCase("running_alone", lambda t: {**_GOOD(t), "running_mean": None}, ValueError, r"running_var.*both or"),
    ErrorCase("eval_without_running", lambda t: {**_GOOD(t), "running_mean": None, "running_var": None,
              "training": False}, ValueError, r"running_mean.*got None"),
    ErrorCase("one_value", lambda t: {**_GOOD(t), "x": t.normal(1, 6, 1, 1)}, ValueError,
              r"x.*more than one value per channel.*\(1, 6, 1, 1\)"),
    ErrorCase("empty_batch", lambda t: {**_GOOD(t), "x": t.normal(0, 6, 5, 5)}, ValueError,
              r"x.*more than one value per channel.*\(0, 6, 5, 5\)"),
    ErrorCase("vector", lambda t: {**_GOOD(t), "x": t.normal(6)}, ValueError, r"x.*\[N, C.*got shape \(6,\)"),
    ErrorCase("integers", lambda t: {**_GOOD(t), "x": torch.ones(4, 6, dtype=torch.int32)}, TypeError,
              r"x.*floating.*got torch\.int32"),
    ErrorCase("activation", lambda t: {**_GOOD(t), "activation": "leaky"}, ValueError,
              r"activation.*'leaky_relu'.*got 'leaky'"),
    ErrorCase("slope", lambda t: {**_GOOD(t), "negative_slope": "0.2"}, ValueError, r"negative_slope.*got '0.2'"),
    ErrorCase("prelu_without_weight", lambda t: {**_GOOD(t), "activation": "prelu"}, TypeError,
              r"act_weight.*expected a tensor.*NoneType"),
    ErrorCase("residual_shape", lambda t: {**_GOOD(t), "residual": t.normal(4, 6, 5)}, ValueError,
              r"residual.*expected shape \(4, 6, 5, 5\).*got \(4, 6, 5\)"),
    ErrorCase("residual_dtype", lambda t: {**_GOOD(t), "residual": t.normal(4, 6, 5, 5).half()}, TypeError,
              r"residual.*expected torch\.float32.*got torch\.float16"),
    ErrorCase("residual_after", lambda t: {**_GOOD(t), "residual_after": 2}, TypeError,
              r"residual_after.*expected a bool.*got 2"),
    ErrorCase("eps", lambda t: {**_GOOD(t), "eps": -1e-5}, ValueError, r"eps > 0.*got eps -1e-05"),
    ErrorCase("eps_0", lambda t: {**_GOOD(t), "eps": 0.0}, ValueError, r"eps > 0.*got eps 0\.0"),
    ErrorCase("mixed_parameters", lambda t: dict(x=t.normal(4, 6).bfloat16(), weight=t.normal(6),
              bias=t.normal(6).bfloat16()), TypeError, r"one dtype.*weight torch\.float32"),
)  # fmt: skip

BENCH_CASES = (
    Case("dcgan_64-64x64x32x32-channels_last", _inputs(64, 64, 32, 32, layout="channels_last")),
    Case("dcgan_64-64x64x32x32", _inputs(64, 64, 32, 32)),
    Case("dcgan_64-32x128x16x16-channels_last", _inputs(32, 128, 16, 16, layout="channels_last")),
    Case("dcgan_64-32x128x16x16", _inputs(32, 128, 16, 16)),
    Case("dense_to_image-128x6272", _inputs(128, 6272, activation="relu")),
    Case("srresnet-16x64x24x24-prelu", _prelu(16, 64, 24, 24, slopes=1)),
    Case("resnet-32x128x28x28-residual", _inputs(32, 128, 28, 28, activation="relu", residual=True)),
)
GPU_CASES = tuple(
    Case(f"dcgan_64-256x{c}x{n}x{n}-channels_last", _inputs(256, c, n, n, layout="channels_last"))
    for c, n in ((64, 32), (128, 16), (256, 8), (512, 4))
)

_COMPILE_CASES = (
    CompileCase("silu", _inputs(64, 64, 32, 32, layout="channels_last", activation="silu")),
    CompileCase(
        "after", _inputs(64, 64, 32, 32, layout="channels_last", activation="relu", residual=True, residual_after=True)
    ),
    CompileCase("prelu", _prelu(64, 64, 32, 32, layout="channels_last")),
    CompileCase("residual", _inputs(64, 64, 32, 32, layout="channels_last", activation="silu", residual=True)),
)
_SUMS, _EACH = Expected(()), Expected((), lambda c: c["ROWS"] * c["BLOCK"])
_EXPECTED = {
    "_batch_norm_moments": _SUMS,
    "_batch_norm_act_apply": _EACH,
    "_batch_norm_act_sums": _SUMS,
    "_batch_norm_act_grad": _EACH,
}

_SUM_CHOICES = choices_of(
    elements=(1024, 2048, 2048, 4096, 4096),
    channels=(64, 32, 128, 64, 128),
    groups=(512, 256, 512, 256, 128),
    num_warps=(4, 8, 8, 8, 16),
)

BATCH_NORM_ACT = OpSpec(
    name="batch_norm_act",
    folder="batch_norm_act",
    formula="activation((x - mean) / sqrt(var + eps) weight + bias + residual), of the batch or by running statistics",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167; combination of tiles: Chan, Golub & LeVeque 1983",
    library=LIBRARY,
    reference=_reference,
    mutates=("running_mean", "running_var"),
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(_inputs(8, 128, 16, 16, layout="channels_last"), (66.5, 1.71, 17.6, 57.2, 0.932, 32.8), 1.05, 1.6),
    gpu_cases=GPU_CASES,
    peers={"eager": _eager(False), "eager (inplace)": _eager(True), "eager (NCHW)": _eager_contiguous},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
    choices={
        **dict.fromkeys(("batch_norm_act/apply", "batch_norm_act/grad"), ELEMENTWISE_CHOICES),
        **dict.fromkeys(("batch_norm_act/moments", "batch_norm_act/sums"), _SUM_CHOICES),
    },
)
