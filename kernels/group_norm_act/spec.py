"""group_norm_act and instance_norm_act: what the ops are, their cases and their cost."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.activations import ACTIVATIONS, activate
from genai_fast.kernels.common.channels import wide
from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec, choices_of
from genai_fast.kernels.group_norm_act.schema import LIBRARY


def _composed(x, num_groups, weight, bias, eps, activation, negative_slope, residual, scale, shift, residual_after):
    """PyTorch's calls one after the other."""
    z = F.group_norm(x, num_groups, weight, bias, eps)
    spread = (*x.shape[:2], *[1] * (x.dim() - 2))
    z = z if scale is None else z * (1.0 + scale.view(spread))
    z = z if shift is None else z + shift.view(spread)
    if residual_after and residual is not None:
        return activate(z, activation, negative_slope) + residual
    return activate(z if residual is None else z + residual, activation, negative_slope)


def _group_reference(
    x, num_groups, weight=None, bias=None, eps=1e-5, activation="none", negative_slope=None, residual=None, scale=None,
    shift=None, *, residual_after=False,
):  # fmt: skip
    """In float32 or wider, and around each group's mean, which F.group_norm squares."""
    given = (wide(p) for p in (weight, bias))
    more = (wide(p) for p in (residual, scale, shift))
    groups = wide(x).reshape(len(x), num_groups, -1) if x.numel() else wide(x)
    around = (groups - groups.detach().mean(-1, keepdim=True)).view(x.shape)
    return _composed(around, num_groups, *given, eps, activation, negative_slope, *more, residual_after).to(x.dtype)


def _instance_reference(
    x, weight=None, bias=None, eps=1e-5, activation="none", negative_slope=None, residual=None, scale=None, shift=None,
    *, residual_after=False,
):  # fmt: skip
    given = (weight, bias, eps, activation, negative_slope, residual, scale, shift)
    return _group_reference(x, x.size(1), *given, residual_after=residual_after)


def _eager_group(
    x, num_groups, weight=None, bias=None, eps=1e-5, activation="none", negative_slope=None, residual=None, scale=None,
    shift=None, *, residual_after=False,
):  # fmt: skip
    """What people write: the norm, the sum, the activation."""
    given = (weight, bias, eps, activation, negative_slope, residual, scale, shift)
    return _composed(x, num_groups, *given, residual_after)


def _eager_instance(
    x, weight=None, bias=None, eps=1e-5, activation="none", negative_slope=None, residual=None, scale=None, shift=None,
    *, residual_after=False,
):  # fmt: skip
    z = F.instance_norm(x, None, None, weight, bias, eps=eps)
    spread = (*x.shape[:2], *[1] * (x.dim() - 2))
    z = z if scale is None else z * (1.0 + scale.view(spread))
    z = z if shift is None else z + shift.view(spread)
    if residual_after and residual is not None:
        return activate(z, activation, negative_slope) + residual
    return activate(z if residual is None else z + residual, activation, negative_slope)


def _cost(x, *rest, residual=None, **settings):
    # Forward reads x and writes y; backward reads dy and x and writes dx. A residual is read twice, dz written.
    passes = 5 if residual is None else 8
    return Cost(flops=30 * x.numel(), bytes=passes * x.numel() * x.element_size())


def _inputs(*shape, groups=None, layout="contiguous", mean=0.5, affine=True, residual=False, modulated=False, **more):
    def make(t):
        channels = shape[1]
        found = dict(x=t.laid_out(layout, *shape, scale=2.0, mean=mean))
        if groups is not None:
            found["num_groups"] = groups
        if affine:
            found.update(weight=t.uniform(channels, low=0.5, high=1.5, grad=True), bias=t.normal(channels, scale=0.3))
        if residual:
            found["residual"] = t.laid_out(layout, *shape)
        if modulated:
            found.update(scale=t.normal(*shape[:2], scale=0.3), shift=t.normal(*shape[:2], scale=0.3))
        return {**found, **more}

    return make


def _mixed(named):
    """Activations of a narrow dtype beside float32 parameters, as under autocast."""

    def make(t):
        wide_t = type(t)(torch.promote_types(t.dtype, torch.float32), t.device, t.generator)
        parameters = {"weight": wide_t.uniform(6, low=0.5, grad=True), "scale": wide_t.normal(3, 6, scale=0.3)}
        return {"x": t.normal(3, 6, 4, 4), **named, **parameters, "activation": "silu"}

    return make


def _special(named):
    """Samples with an infinity, with a NaN, with one value everywhere, with zeros, and an ordinary one."""

    def make(t):
        x = torch.randn(5, 4, 3, generator=t.generator)
        x[0, 0, 0], x[1, 1, 1], x[2], x[3] = float("inf"), float("nan"), 1.5, 0.0
        return {"x": t.values(x.tolist()), **named, "activation": "relu"}

    return make


def _cases(groups_of):
    """Those of both ops; groups_of[C] are the groups of C channels."""

    def inputs(*shape, **more):
        return _inputs(*shape, groups=groups_of.get(shape[1]), **more)

    def named(channels):
        return {"num_groups": groups_of[channels]} if groups_of else {}

    yield from (
        Case("unet", inputs(4, 16, 8, 8, activation="silu")),
        Case("unet_channels_last", inputs(4, 24, 9, 7, layout="channels_last", activation="silu")),
        Case("residual", inputs(3, 6, 5, 5, residual=True, activation="relu")),
        Case("residual_channels_last", inputs(3, 6, 5, 5, residual=True, layout="channels_last", activation="relu")),
        Case("modulated", inputs(3, 6, 5, 5, modulated=True, activation="silu")),
        Case("modulated_no_affine", inputs(2, 8, 4, 4, modulated=True, affine=False, layout="channels_last")),
        Case("everything", inputs(3, 12, 6, 6, modulated=True, residual=True, activation="gelu")),
        Case("residual_tanh", inputs(3, 6, 5, 5, residual=True, activation="tanh")),
        Case("residual_alone", inputs(3, 6, 5, 5, residual=True, layout="channels_last")),
        Case("after", inputs(3, 6, 5, 5, residual=True, activation="silu", residual_after=True)),
        Case("after_large", inputs(2, 4, 96, 128, residual=True, activation="elu", residual_after=True)),
        Case("residual_large", inputs(2, 4, 96, 128, residual=True, activation="relu")),
        Case("residual_mish", inputs(2, 4, 40, 41, residual=True, activation="mish")),
        Case("odd", inputs(3, 6, 7, 7, activation="leaky_relu", negative_slope=-0.5)),
        Case("sound", inputs(4, 6, 300, activation="tanh")),
        Case("sound_channels_last", inputs(4, 6, 50, layout="channels_last", activation="sigmoid")),
        Case("volume", inputs(2, 4, 3, 4, 5, activation="gelu_tanh")),
        Case("volume_channels_last", inputs(2, 70, 3, 2, 2, layout="channels_last")),
        Case("large_plane", inputs(2, 4, 96, 128, activation="relu")),
        Case("large_plane_channels_last", inputs(2, 4, 96, 128, layout="channels_last", activation="relu")),
        Case("many_channels", inputs(2, 1100, 6, 5, activation="relu")),
        Case("many_channels_last", inputs(2, 1100, 6, 5, layout="channels_last", activation="relu")),
        Case("second_order", inputs(2, 4, 3, 2, activation="tanh")),
        Case("second_order_all", inputs(2, 4, 3, activation="silu", residual=True, modulated=True)),
        Case("strided", inputs(4, 6, 5, 5, layout="strided", activation="relu")),
        Case("transposed", inputs(4, 6, 5, 3, layout="transposed")),
        Case("far_mean", inputs(4, 4, 32, 32, mean=200.0)),
        Case("far_mean_channels_last", inputs(4, 4, 32, 32, mean=200.0, layout="channels_last")),
        Case("eps_0.8", inputs(4, 6, 5, 5, eps=0.8)),
        Case("no_affine", inputs(4, 6, 5, 5, affine=False, activation="relu")),
        Case("empty", inputs(0, 6, 5, 5)),
        Case("mixed_dtypes", _mixed(named(6))),
        Case("special_values", _special(named(4))),
        *(Case(f"all_{name}", inputs(3, 4, 6, 6, activation=name)) for name in ACTIVATIONS),
    )


_GROUPS_OF = {6: 2, 4: 2, 16: 4, 24: 8, 8: 4, 12: 3, 70: 7, 1100: 11}
_GROUP_CASES = (
    *_cases(_GROUPS_OF),
    Case("one_group", _inputs(3, 10, 6, 6, groups=1, activation="silu")),
    Case("one_group_channels_last", _inputs(2, 130, 9, 9, groups=1, layout="channels_last", activation="silu")),
    Case("one_large_group", _inputs(2, 40, 32, 32, groups=1, activation="silu", modulated=True)),
    Case("as_many_groups", _inputs(3, 6, 5, 5, groups=6, activation="silu")),
    Case("vectors", _inputs(33, 130, groups=13, activation="silu")),
    Case("groups_of_3", _inputs(3, 96, 8, 8, groups=32, layout="channels_last", activation="silu")),
)


def _error_cases(groups):
    good = _inputs(4, 6, 5, 5, residual=True, modulated=True, **groups)
    yield from (
        ErrorCase("channels", lambda t: {**good(t), "weight": t.normal(5)}, ValueError,
                  r"weight.*expected shape \(6,\).*got \(5,\)"),
        ErrorCase("bias_dtype", lambda t: {**good(t), "bias": t.uniform(6).double()}, TypeError,
                  r"bias.*expected torch\.float32.*got torch\.float64"),
        ErrorCase("scale_shape", lambda t: {**good(t), "scale": t.normal(6)}, ValueError,
                  r"scale.*expected shape \(4, 6\).*got \(6,\)"),
        ErrorCase("shift_device", lambda t: {**good(t), "shift": t.normal(4, 6).to("meta")}, ValueError,
                  r"shift.*expected device.*got meta"),
        ErrorCase("residual_shape", lambda t: {**good(t), "residual": t.normal(4, 6, 5)}, ValueError,
                  r"residual.*expected shape \(4, 6, 5, 5\).*got \(4, 6, 5\)"),
        ErrorCase("residual_dtype", lambda t: {**good(t), "residual": t.normal(4, 6, 5, 5).half()}, TypeError,
                  r"residual.*expected torch\.float32.*got torch\.float16"),
        ErrorCase("vector", lambda t: {**good(t), "x": t.normal(6)}, ValueError, r"x.*\[N, C.*got shape \(6,\)"),
        ErrorCase("integers", lambda t: {**good(t), "x": torch.ones(4, 6, dtype=torch.int32)}, TypeError,
                  r"x.*floating.*got torch\.int32"),
        ErrorCase("activation", lambda t: {**good(t), "activation": "swish"}, ValueError,
                  r"activation.*'silu'.*got 'swish'"),
        ErrorCase("slope", lambda t: {**good(t), "negative_slope": "0.2"}, ValueError, r"negative_slope.*got '0.2'"),
        ErrorCase("eps", lambda t: {**good(t), "eps": -1e-5}, ValueError, r"eps >= 0.*got eps -1e-05"),
    )  # fmt: skip


_GROUP_ERRORS = (
    ErrorCase("groups", lambda t: dict(x=t.normal(4, 6, 5), num_groups=4), ValueError,
              r"num_groups.*divisor of x's 6 channels.*got 4"),
    ErrorCase("no_groups", lambda t: dict(x=t.normal(4, 6, 5), num_groups=0), ValueError,
              r"num_groups.*at least 1.*got 0"),
    ErrorCase("half_a_group", lambda t: dict(x=t.normal(4, 6, 5), num_groups=1.5), TypeError,
              r"num_groups.*an int.*got float"),
)  # fmt: skip


def _bench_cases(*shapes, **more):
    return tuple(
        Case(f"{name}-{'x'.join(map(str, shape))}{suffix}", _inputs(*shape, layout=layout, **more))
        for name, *shape in shapes
        for layout, suffix in (("channels_last", "-channels_last"), ("contiguous", ""))
    )


_COMPILE_CASES = (
    CompileCase("everything", _inputs(2, 64, 64, 64, groups=8, activation="silu", residual=True, modulated=True)),
    CompileCase("after", _inputs(2, 64, 64, 64, groups=8, activation="silu", residual=True, residual_after=True)),
    CompileCase("residual", _inputs(2, 64, 64, 64, groups=8, activation="relu", residual=True)),
    CompileCase("one_group", _inputs(2, 320, 32, 32, groups=1, layout="channels_last", activation="silu")),
)
_EXPECTED = dict.fromkeys(("_group_norm_act_forward", "_group_norm_act_backward"), Expected(()))
_CHOICES = choices_of(elements=(2048, 4096, 8192, 8192), num_warps=(4, 4, 8, 16))


def _spec(name, formula, source, reference, peer, **more):
    return OpSpec(
        name=name,
        folder="group_norm_act",
        formula=formula,
        source=source,
        library=LIBRARY,
        reference=reference,
        peers={"eager": peer},
        cost=_cost,
        compile_cases=_COMPILE_CASES if name == "group_norm_act" else (),
        expected=_EXPECTED,
        choices=dict.fromkeys(("group_norm_act/forward", "group_norm_act/backward"), _CHOICES),
        **more,
    )


GROUP_NORM_ACT = _spec(
    "group_norm_act",
    "activation(((x - mean) / sqrt(var + eps) weight + bias) (1 + scale) + shift + residual), by sample and group",
    "Wu & He 2018, arXiv:1803.08494",
    _group_reference,
    _eager_group,
    cases=_GROUP_CASES,
    error_cases=(*_error_cases(dict(groups=3)), *_GROUP_ERRORS),
    limits=Limits(_inputs(2, 256, 16, 16, groups=32, activation="silu"), (47.0, 55.0)),
    bench_cases=_bench_cases(("diffusion", 8, 256, 32, 32), ("diffusion", 8, 512, 8, 8), groups=32, activation="silu"),
)
INSTANCE_NORM_ACT = _spec(
    "instance_norm_act",
    "the same by sample and channel",
    "Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022",
    _instance_reference,
    _eager_instance,
    cases=tuple(_cases({})),
    error_cases=tuple(_error_cases({})),
    limits=Limits(_inputs(2, 32, 32, 32, activation="relu"), (28.0, 35.0)),
    bench_cases=_bench_cases(("cyclegan", 4, 128, 64, 64), ("cyclegan", 1, 256, 64, 64), activation="relu"),
)
