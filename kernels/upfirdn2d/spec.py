"""upfirdn2d: what the op is, its cases and its cost."""

import torch
import torch.nn.functional as F

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
)
from genai_fast.kernels.upfirdn2d.layout import Axis, output_size
from genai_fast.kernels.upfirdn2d.schema import LIBRARY


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _around(padding):
    return tuple(padding) if isinstance(padding, (tuple, list)) else (padding,) * 4


def _eager(x, filter, up=1, down=1, padding=0, gain=1.0, flip=False):
    """What people write: zeros between pixels, F.pad, a grouped convolution, every down-th pixel."""
    (up_y, up_x), (down_y, down_x) = _pair(up), _pair(down)
    n, c, h, w = x.shape
    z = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up_x - 1, 0, 0, 0, up_y - 1)).reshape(n, c, h * up_y, w * up_x)
    z = F.pad(z, _around(padding))
    filter = torch.outer(filter, filter) if filter.dim() == 1 else filter
    filter = (filter * gain).to(x.dtype)
    weight = (filter if flip else filter.flip(0, 1)).expand(c, 1, *filter.shape)
    return F.conv2d(z, weight, groups=c)[:, :, ::down_y, ::down_x]


def _reference(x, filter, *settings, **more):
    """The same in float32 or wider, rounded once."""
    return _eager(wide(x), wide(filter), *settings, **more).to(x.dtype)


def _cost(x, filter, up=1, down=1, padding=0, gain=1.0, flip=False):
    # Forward reads x and writes y, backward reads dy and writes dx; taps that meet no inserted zero are multiplied.
    taps = (filter.size(0), filter.size(-1))
    out = output_size(x.shape[2:], taps, _pair(up), _pair(down), _around(padding))
    vertical, horizontal = map(Axis, x.shape[2:], out, _pair(up), _pair(down), (0, 0), taps)
    together = vertical.most + horizontal.most if filter.dim() == 1 else vertical.most * horizontal.most
    y = x.size(0) * x.size(1) * out[0] * out[1]
    return Cost(flops=2 * 2 * together * y, bytes=2 * (x.numel() + y) * x.element_size())


def _filter(t, *taps):
    """Positive, of sum 1, and of no symmetry."""
    f = t.uniform(*taps, low=0.2, high=1.0)
    return (f / f.sum()).detach().float() if t.dtype is not torch.float64 else (f / f.sum()).detach()


def _inputs(*shape, taps=(4,), layout="contiguous", **more):
    def make(t):
        return dict(x=t.laid_out(layout, *shape), filter=_filter(t, *taps), **more)

    return make


def _special(t):
    x = t.normal(4, 2, 6, 6, grad=False)
    x[0, 0, 2, 3], x[1, 1, 0, 0], x[2, 0, 5, 5] = float("inf"), -float("inf"), float("nan")
    return dict(x=x.requires_grad_(), filter=_filter(t, 3, 3), up=2, padding=(1, 2, 2, 1))


_UP = {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}
_DOWN = {"down": 2, "padding": 1}
CASES = (
    Case("blur", _inputs(2, 5, 9, 11, padding=(2, 1, 2, 1))),
    Case("up", _inputs(2, 5, 9, 11, **_UP)),
    Case("down", _inputs(2, 5, 12, 10, **_DOWN)),
    Case("second_order", _inputs(1, 2, 4, 5, taps=(3, 4), up=(2, 1), down=(1, 2), padding=(1, 2, -1, 3), gain=1.5)),
    Case("second_order_alone", _inputs(1, 2, 3, 4, up=2, padding=(2, 1, 2, 1), layout="channels_last")),
    Case("channels_last", _inputs(2, 18, 9, 7, layout="channels_last", **_UP)),
    Case("channels_last_down", _inputs(2, 18, 9, 7, layout="channels_last", **_DOWN)),
    Case("channels_last_blur", _inputs(2, 19, 6, 7, layout="channels_last", padding=(2, 1, 1, 2))),
    Case("image_channels_last", _inputs(2, 3, 8, 10, taps=(4, 4), layout="channels_last", **_UP)),
    Case("odd", _inputs(3, 2, 7, 5, taps=(5, 3), up=(3, 2), down=(2, 3), padding=(4, 1, 3, 2), flip=True)),
    Case("plane", _inputs(2, 4, 9, 8, taps=(4, 4), padding=(2, 1, 2, 1), flip=True)),
    Case("plane_up", _inputs(2, 4, 9, 8, taps=(6, 4), **_UP)),
    Case("plane_down", _inputs(2, 4, 9, 8, taps=(2, 7), down=2, padding=3)),
    Case("crop", _inputs(2, 4, 9, 10, taps=(3,), padding=(-2, -1, -3, 0))),
    Case("crop_upsampled", _inputs(2, 4, 9, 10, up=2, padding=(-3, 2, 1, -5))),
    Case("beyond_the_image", _inputs(2, 3, 2, 3, taps=(3,), down=2, padding=(9, 7, 6, 8))),
    Case("more_zeros_than_taps", _inputs(2, 3, 5, 4, taps=(2,), up=4, padding=3)),
    Case("more_steps_than_taps", _inputs(2, 12, 17, 14, taps=(2, 1), down=5, layout="channels_last")),
    Case("long", _inputs(2, 3, 20, 24, taps=(12,), up=2, padding=(6, 5, 6, 5), gain=4.0)),
    Case("long_down", _inputs(2, 9, 20, 24, taps=(12,), down=2, padding=5, layout="channels_last")),
    Case("one_element", _inputs(1, 1, 1, 1, taps=(1,))),
    Case("strided", _inputs(2, 4, 6, 6, layout="strided", padding=(1, 2, 1, 2))),
    Case("transposed", _inputs(2, 4, 6, 5, layout="transposed", **_UP)),
    Case("empty_batch", _inputs(0, 3, 8, 8, **_UP)),
    Case("special_values", _special),
    Case("large_plane", _inputs(2, 3, 100, 130, **_DOWN)),
    Case("small_planes", _inputs(9, 30, 4, 4, **_UP)),
)

_GOOD = _inputs(2, 3, 8, 8)
ERROR_CASES = tuple(
    ErrorCase(name, lambda t, change=change: {**_GOOD(t), **{k: v(t) if callable(v) else v for k, v in change.items()}},
              error, message)
    for name, message, error, change in (
        ("dimensions", r"x: expected \[N, C, H, W\], got shape \(3, 8, 8\)", ValueError,
         {"x": lambda t: t.normal(3, 8, 8)}),
        ("integers", r"x.*floating.*got torch\.int32", TypeError,
         {"x": lambda t: torch.ones(2, 3, 8, 8, dtype=torch.int32)}),
        ("filter", r"filter: expected \[FH, FW\] or \[F\] with numbers, got shape \(1, 4, 4\)", ValueError,
         {"filter": lambda t: torch.ones(1, 4, 4)}),
        ("empty_filter", r"filter: expected.*numbers, got shape \(0,\)", ValueError,
         {"filter": lambda t: torch.ones(0)}),
        ("filter_dtype", r"filter: expected torch\.float32 or torch\.float32.*got torch\.float64", TypeError,
         {"filter": lambda t: torch.ones(4).double()}),
        ("filter_gradient", r"filter: expected a constant.*detach", ValueError, {"filter": lambda t: t.normal(4)}),
        ("device", r"filter: expected device cpu.*got meta", ValueError,
         {"filter": lambda t: torch.ones(4, device="meta")}),
        ("up", r"up: expected at least 1, got 0", ValueError, {"up": 0}),
        ("down", r"down: expected an int or 2 ints, got \(1, 2, 3\)", TypeError, {"down": (1, 2, 3)}),
        ("padding", r"padding: expected an int or 4 ints, got \(1, 2\)", TypeError, {"padding": (1, 2)}),
        ("no_pixel", r"padding: expected a result of at least 1 pixel, got \(1, 0\)", ValueError,
         {"padding": (-3, -2, -3, -1)}),
        ("gain", r"gain: expected a finite float, got nan", ValueError, {"gain": float("nan")}),
        ("flip", r"flip: expected a bool, got 'yes'", TypeError, {"flip": "yes"}),
    )
)  # fmt: skip

# What StyleGAN2 does to 64 and 32 pixels: after a transposed convolution, before one with stride 2, to its image.
BENCH_CASES = (
    Case("stylegan2-16x64x65x65-blur", _inputs(16, 64, 65, 65, padding=1, gain=4.0)),
    Case("stylegan2-16x64x65x65-blur-channels_last",
         _inputs(16, 64, 65, 65, padding=1, gain=4.0, layout="channels_last")),
    Case("stylegan2-16x64x64x64-down", _inputs(16, 64, 64, 64, **_DOWN)),
    Case("stylegan2-16x64x32x32-up-channels_last", _inputs(16, 64, 32, 32, layout="channels_last", **_UP)),
    Case("stylegan2-16x3x32x32-up", _inputs(16, 3, 32, 32, **_UP)),
    Case("stylegan3-8x64x48x48-up-12", _inputs(8, 64, 48, 48, taps=(12,), up=2, padding=(6, 5, 6, 5), gain=4.0)),
)  # fmt: skip
_COMPILE_CASES = (
    CompileCase("plane-up", _inputs(16, 64, 32, 32, taps=(4, 4), **_UP), ("fp32", "bf16")),
    CompileCase("plane-down", _inputs(16, 64, 32, 32, taps=(4, 4), layout="channels_last", **_DOWN), ("fp16",)),
    CompileCase("up-channels_last", _inputs(16, 64, 32, 32, layout="channels_last", **_UP), ("fp16", "bf16")),
)
UPFIRDN2D = OpSpec(
    name="upfirdn2d",
    folder="upfirdn2d",
    formula="zeros between pixels, padding or crop, a convolution of each channel, every down-th pixel",
    source="Karras et al. 2020 (StyleGAN2), arXiv:1912.04958",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    peers={"eager": _eager},
    cost=_cost,
    compile_cases=_COMPILE_CASES,
    expected={"_upfirdn2d": Expected(None, lambda c: c["ROWS"] * c["BLOCK"], None)},
    limits=Limits(_inputs(4, 32, 32, 32, layout="channels_last", **_UP), (148, 88.5)),
    choices={"upfirdn2d/forward": ELEMENTWISE_CHOICES},
)
