"""causal_conv1d and depthwise_causal_conv1d: what the ops are, their cases and their cost."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.causal_conv1d.layout import GATED, out_channels
from genai_fast.kernels.causal_conv1d.reference import activated
from genai_fast.kernels.causal_conv1d.schema import DENSE, DEPTHWISE
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


def _convolved(x, weight, bias, condition, dilation, groups=1):
    bias = bias if bias is None else bias.to(x.dtype)
    before = F.pad(x, ((weight.size(2) - 1) * dilation, 0))
    z = F.conv1d(before, weight, bias, dilation=dilation, groups=groups)
    if condition is None:
        return z
    return z + (condition if condition.dim() == 3 else condition.unsqueeze(2))


def _eager(x, weight, bias=None, condition=None, dilation=1, activation="none"):
    """What people write: pad, Conv1d, the condition, tanh and sigmoid of the halves."""
    z = _convolved(x, weight, bias, condition, dilation)
    if activation == GATED:
        a, b = z.chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)
    return F.silu(z) if activation == "silu" else z


def _reference(x, weight, bias=None, condition=None, dilation=1, activation="none"):
    """The same with the convolution in float32 or wider, rounded once."""
    z = _convolved(wide(x), wide(weight), wide(bias), wide(condition), dilation).to(x.dtype)
    return activated(z.mT, activation).mT.to(x.dtype)


def _eager_depthwise(x, weight, bias=None, dilation=1, activation="none"):
    """Pad, Conv1d of one filter a channel, SiLU."""
    z = _convolved(x, weight, bias, None, dilation, x.size(1))
    return F.silu(z) if activation == "silu" else z


def _reference_depthwise(x, weight, bias=None, dilation=1, activation="none"):
    """The same in float32 or wider: PyTorch's own depthwise convolution in a narrow type rounds at each tap."""
    z = _convolved(wide(x), wide(weight), wide(bias), None, dilation, x.size(1))
    return activated(z, activation).to(x.dtype)


def _cost(x, weight, bias=None, condition=None, dilation=1, activation="none"):
    # Three matrix products. Forward reads x and the weight and writes y, and z if there is an activation; backward
    # reads z, dy, x and the weight and writes dz, which is read twice, dx and dw.
    positions = x.size(0) * x.size(2)
    y, z = out_channels(weight.size(0), activation), weight.size(0)
    numbers = positions * (3 * x.size(1) + 2 * y + (4 if activation == "none" else 5) * z) + 3 * weight.numel()
    return Cost(flops=3 * 2 * positions * weight.numel(), bytes=numbers * x.element_size())


def _cost_depthwise(x, weight, bias=None, dilation=1, activation="none"):
    # Forward reads x and writes y; backward reads x and dy and writes dx.
    return Cost(flops=(6 * weight.size(2) + 60) * x.numel(), bytes=5 * x.numel() * x.element_size())


def _inputs(batch, channels, length, *, to, kernel, layout="channels_last", bias=True, condition="", **more):
    """x [batch, channels, length], weight [to, channels, kernel]; a condition "sample" or "position"."""

    def make(t):
        found = dict(
            x=t.laid_out(layout, batch, channels, length), weight=t.normal(to, channels, kernel, scale=channels**-0.5)
        )
        if bias:
            found.update(bias=t.normal(to, scale=0.3))
        if condition:
            found.update(condition=t.normal(batch, to, *([length] if condition == "position" else []), scale=0.5))
        return dict(**found, **more)

    return make


def _mixed(make):
    """Activations of a narrow dtype beside a float32 bias, as under autocast."""

    def mixed(t):
        wide_t = type(t)(torch.promote_types(t.dtype, torch.float32), t.device, t.generator)
        found = make(t)
        return {**found, "bias": wide_t.normal(found["weight"].size(0))}

    return mixed


def _special(make):
    """Infinities and NaN, in sequences of their own so that few results are NaN."""

    def special(t):
        found = make(t)
        x = found["x"].detach().clone()
        x[0, 0, 2], x[1, 1, 0], x[2, 0, -1] = float("inf"), -float("inf"), float("nan")
        return {**found, "x": x.requires_grad_()}

    return special


CASES = (
    Case("odd", _inputs(3, 5, 13, to=6, kernel=2, activation=GATED, condition="position")),
    Case("second_order", _inputs(2, 2, 5, to=4, kernel=2, dilation=2, activation=GATED, condition="sample")),
    Case("plain", _inputs(2, 7, 20, to=9, kernel=3, bias=False)),
    Case("second_order_alone", _inputs(1, 3, 4, to=2, kernel=3, activation="silu")),
    Case("wavenet", _inputs(2, 32, 150, to=64, kernel=2, dilation=64, activation=GATED)),
    Case("beyond_the_start", _inputs(2, 4, 6, to=6, kernel=3, dilation=4, activation="silu")),
    Case("parallel", _inputs(3, 40, 300, to=70, kernel=3, dilation=5, activation=GATED, condition="position")),
    Case("contiguous", _inputs(2, 6, 11, to=8, kernel=4, layout="contiguous", activation=GATED)),
    Case("strided", _inputs(2, 6, 11, to=4, kernel=2, layout="strided", condition="sample")),
    Case("mixed_dtypes", _mixed(_inputs(2, 5, 9, to=8, kernel=2, activation=GATED))),
    Case("one_element", _inputs(1, 1, 1, to=2, kernel=1, activation=GATED)),
    Case("pointwise", _inputs(2, 18, 33, to=130, kernel=1, activation=GATED)),
    Case("long_kernel", _inputs(2, 3, 30, to=5, kernel=9, dilation=2)),
    Case("empty_batch", _inputs(0, 3, 8, to=4, kernel=2, activation=GATED, condition="sample")),
    Case("special_values", _special(_inputs(4, 3, 7, to=4, kernel=2, activation="none"))),
    Case("many_rows", _inputs(2, 16, 1100, to=32, kernel=2, dilation=16, activation=GATED)),
)


def _wrong(name, message, error=ValueError, *, good, **change):
    """The good arguments with some changed, which may be functions of Tensors."""

    def make(t):
        return {**good(t), **{k: v(t) if callable(v) else v for k, v in change.items()}}

    return ErrorCase(name, make, error, message)


_GOOD = _inputs(2, 6, 8, to=4, kernel=2)
ERROR_CASES = tuple(
    _wrong(name, message, error, good=_GOOD, **change)
    for name, message, error, change in (
        ("dimensions", r"x: expected \[N, C, L\].*got shape \(6, 8\)", ValueError, {"x": lambda t: t.normal(6, 8)}),
        ("weight_dimensions", r"weight.*three dimensions.*got shape \(4, 6\)", ValueError,
         {"weight": lambda t: t.normal(4, 6)}),
        ("channels", r"weight.*expected 6 as second size.*\(4, 5, 2\)", ValueError,
         {"weight": lambda t: t.normal(4, 5, 2)}),
        ("groups", r"weight.*expected 6 as second size.*depthwise_causal_conv1d", ValueError,
         {"weight": lambda t: t.normal(6, 1, 2)}),
        ("no_positions", r"at least 1 except for the batch.*\(2, 6, 0\)", ValueError,
         {"x": lambda t: t.normal(2, 6, 0)}),
        ("dtype", r"weight.*expected torch\.float32.*got torch\.float64", TypeError,
         {"weight": lambda t: t.normal(4, 6, 2).double()}),
        ("device", r"weight.*expected device.*got meta", ValueError,
         {"weight": lambda t: t.normal(4, 6, 2).to("meta")}),
        ("integers", r"x.*floating.*got torch\.int32", TypeError,
         {"x": lambda t: torch.ones(2, 6, 8, dtype=torch.int32)}),
        ("bias", r"bias.*expected shape \(4,\) as weight gives 4 channels, got \(6,\)", ValueError,
         {"bias": lambda t: t.normal(6)}),
        ("condition", r"condition.*expected shape \(2, 4\) or \(2, 4, 8\), got \(2, 6\)", ValueError,
         {"condition": lambda t: t.normal(2, 6)}),
        ("condition_dtype", r"condition.*expected torch\.float32.*got torch\.float64", TypeError,
         {"condition": lambda t: t.normal(2, 4).double()}),
        ("dilation", r"dilation.*at least 1, got 0", ValueError, {"dilation": 0}),
        ("dilation_kind", r"dilation.*an int, got float", TypeError, {"dilation": 1.5}),
        ("activation", r"activation.*'gated_tanh'.*got 'glu'", ValueError, {"activation": "glu"}),
        ("halves", r"weight.*even number of channels.*got 5", ValueError,
         {"weight": lambda t: t.normal(5, 6, 2), "bias": None, "activation": GATED}),
    )
)  # fmt: skip

# A layer of a WaveNet, and of a temporal convolutional network.
BENCH_CASES = (
    Case("wavenet-8x64x2048-128", _inputs(8, 64, 2048, to=128, kernel=2, dilation=16, activation=GATED)),
    Case("wavenet-8x32x2048-64", _inputs(8, 32, 2048, to=64, kernel=2, dilation=512, activation=GATED)),
    Case("wavenet_classes-8x64x2048-128",
         _inputs(8, 64, 2048, to=128, kernel=3, dilation=4, activation=GATED, condition="sample")),
    Case("tcn-16x128x512-128", _inputs(16, 128, 512, to=128, kernel=3, dilation=8)),
)  # fmt: skip


def _depthwise(batch, channels, length, kernel, layout="channels_last", bias=True, **more):
    def make(t):
        found = dict(x=t.laid_out(layout, batch, channels, length), weight=t.normal(channels, 1, kernel, scale=0.5))
        if bias:
            found.update(bias=t.normal(channels, scale=0.3))
        return dict(**found, **more)

    return make


def _half_of_rows(t):
    """One half of what a projection makes, as in Mamba: rows with gaps."""
    wide_rows = t.normal(2, 9, 48, grad=False)
    return dict(
        x=wide_rows[..., :24].transpose(1, 2).requires_grad_(), weight=t.normal(24, 1, 4), bias=t.normal(24),
        activation="silu",
    )  # fmt: skip


CASES_DEPTHWISE = (
    Case("odd", _depthwise(3, 5, 13, 4, activation="silu")),
    Case("second_order", _depthwise(2, 3, 5, 3, dilation=2, activation="silu")),
    Case("plain", _depthwise(2, 20, 17, 2, bias=False)),
    Case("half_of_rows", _half_of_rows),
    Case("many_rows", _depthwise(2, 24, 700, 4, activation="silu")),
    Case("many_channels", _depthwise(2, 600, 9, 3, activation="silu")),
    Case("contiguous", _depthwise(2, 18, 40, 4, layout="contiguous", activation="silu")),
    Case("beyond_the_start", _depthwise(2, 6, 7, 4, dilation=5)),
    Case("mixed_dtypes", _mixed(_depthwise(2, 6, 10, 2, activation="silu"))),
    Case("one_element", _depthwise(1, 1, 1, 1, activation="silu")),
    Case("empty_batch", _depthwise(0, 4, 6, 4, activation="silu")),
    Case("special_values", _special(_depthwise(4, 3, 9, 4))),
)
_GOOD_DEPTHWISE = _depthwise(2, 6, 8, 4, activation="silu")
ERROR_CASES_DEPTHWISE = tuple(
    _wrong(name, message, good=_GOOD_DEPTHWISE, **change)
    for name, message, change in (
        ("dimensions", r"x: expected \[N, C, L\].*got shape \(6, 8\)", {"x": lambda t: t.normal(6, 8)}),
        ("weight", r"weight.*expected \[6, 1, K\].*\(6, 6, 4\).*causal_conv1d",
         {"weight": lambda t: t.normal(6, 6, 4)}),
        ("bias", r"bias.*expected shape \(6,\) as x has 6 channels, got \(4,\)", {"bias": lambda t: t.normal(4)}),
        ("activation", r"activation.*'none', 'silu'.*got 'gated_tanh'", {"activation": GATED}),
    )
)  # fmt: skip
BENCH_CASES_DEPTHWISE = (
    Case("mamba_130m-4x1536x1024-4", _depthwise(4, 1536, 1024, 4, activation="silu")),
    Case("mamba_130m_contiguous-4x1536x1024-4", _depthwise(4, 1536, 1024, 4, layout="contiguous", activation="silu")),
)

_CHOICES = choices_of(
    BLOCK_M=(64, 128, 128, 128), BLOCK_N=(64, 64, 32, 64), BLOCK_K=(64, 32, 64, 64), num_warps=(4, 4, 4, 8),
    num_stages=(4, 4, 3, 3),
)  # fmt: skip
_TILES = Expected(tensor_cores=True)
_EXPECTED = {
    "_causal_conv1d": _TILES,
    "_causal_conv1d_grad_weight": _TILES,
    "_causal_conv1d_gate_backward": Expected(("half",), lambda c: c["STEPS"] * c["ROWS"] * c["BLOCK"], 110),
    "_depthwise_causal_conv1d": Expected((), lambda c: c["ROWS"] * c["BLOCK"], 80),
    "_depthwise_causal_conv1d_backward": Expected((), lambda c: c["ROWS"] * c["BLOCK"], 110),
}
_NARROW = ("bf16", "fp16")
_COMPILE_CASES = (
    CompileCase("wavenet-8x64x2048-128", BENCH_CASES[0].inputs, ("fp32", "tf32", "fp16")),
    CompileCase("silu-4x40x512-72", _inputs(4, 40, 512, to=72, kernel=3, activation="silu"), _NARROW),
    CompileCase("one_channel", _inputs(1, 1, 1, to=2, kernel=1, activation=GATED), ("fp16",)),
)
CAUSAL_CONV1D = OpSpec(
    name="causal_conv1d",
    folder="causal_conv1d",
    formula="activation(conv1d(pad(x), weight, dilation) + bias + condition), also tanh(a) sigmoid(b) of the halves",
    source="van den Oord et al. 2016 (WaveNet), arXiv:1609.03499",
    library=DENSE,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    peers={"eager": _eager},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    expected=_EXPECTED,
    limits=Limits(_inputs(2, 64, 512, to=128, kernel=2, dilation=8, activation=GATED), (92, 88, 28.5, 29), 1.05, 4.95),
    choices={
        **{f"causal_conv1d/{kernel}": _CHOICES for kernel in ("gated", "forward", "grad_input", "grad_weight")},
        "causal_conv1d/gate_backward": ELEMENTWISE_CHOICES,
    },
)
DEPTHWISE_CAUSAL_CONV1D = OpSpec(
    name="depthwise_causal_conv1d",
    folder="causal_conv1d",
    formula="activation(conv1d(pad(x), weight, dilation, groups=C) + bias), kernels up to 4",
    source="Gu & Dao 2023 (Mamba), arXiv:2312.00752",
    library=DEPTHWISE,
    reference=_reference_depthwise,
    cases=CASES_DEPTHWISE,
    error_cases=ERROR_CASES_DEPTHWISE,
    bench_cases=BENCH_CASES_DEPTHWISE,
    peers={"eager": _eager_depthwise},
    cost=_cost_depthwise,
    compile_cases=(CompileCase("two_taps", _depthwise(4, 1536, 1024, 2), ("bf16",)),),
    expected=_EXPECTED,
    limits=Limits(_depthwise(2, 256, 256, 4, activation="silu"), (51, 112, 32), 1.05, 11.9),
    choices={f"causal_conv1d/{kernel}": ELEMENTWISE_CHOICES for kernel in ("depthwise", "depthwise_backward")},
)
