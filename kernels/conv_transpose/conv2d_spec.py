"""conv2d: a convolution of an image, whose input's gradient is the transposed convolution to few channels."""

import torch
import torch.nn.functional as F

from genai_fast.kernels.common.spec import Case, Cost, ErrorCase, Limits, OpSpec
from genai_fast.kernels.conv_transpose.spec import CONV_TRANSPOSE2D


def _eager(x, weight, bias=None, stride=1, padding=0):
    """What people write."""
    return F.conv2d(x, weight, bias, stride, padding)


def _cost(x, weight, bias=None, stride=1, padding=0):
    # Three matrix products; forward reads x and the weight and writes y, backward reads them and dy and writes dx, dw.
    y = F.conv2d(x.to("meta"), weight.to("meta"), None, stride, padding).numel()
    numbers = 3 * (x.numel() + weight.numel()) + 2 * y
    return Cost(flops=3 * 2 * y * weight[0].numel(), bytes=numbers * x.element_size())


def _inputs(*shape, to, kernel, layout="contiguous", bias=True, **more):
    """x [shape], weight [to, C, kernel, kernel]."""

    def make(t):
        x = t.laid_out(layout, *shape)
        weight = t.normal(to, shape[1], kernel, kernel, scale=(shape[1] * kernel * kernel) ** -0.5)
        return dict(x=x, weight=weight, bias=t.normal(to, scale=0.3) if bias else None, **more)

    return make


_GOOD = _inputs(2, 3, 8, 8, to=6, kernel=4, stride=2, padding=1)

CONV2D = OpSpec(
    name="conv2d",
    folder="conv_transpose",
    formula="conv2d(x, weight) + bias by PyTorch; x's gradient is a transposed convolution to few channels",
    source="Dumoulin & Visin 2016, arXiv:1603.07285",
    library=(CONV_TRANSPOSE2D.library[0],),
    reference=_eager,
    cases=(
        Case("discriminator", _GOOD),
        Case("second_order", _inputs(2, 2, 4, 5, to=3, kernel=3, stride=2, padding=1)),
        Case("channels_last", _inputs(2, 3, 9, 7, to=16, kernel=4, stride=2, padding=1, layout="channels_last")),
        Case("rest_of_a_stride", _inputs(2, 3, 8, 9, to=5, kernel=3, stride=(2, 1), padding=(0, 2), bias=False)),
        Case("grey", _inputs(3, 1, 11, 5, to=7, kernel=5, stride=2, padding=2)),
        Case("one_pixel", _inputs(1, 1, 1, 1, to=1, kernel=1)),
        Case("strided", _inputs(2, 4, 6, 6, to=6, kernel=2, layout="strided")),
        Case("empty_batch", _inputs(0, 3, 8, 8, to=6, kernel=4, stride=2, padding=1)),
    ),
    error_cases=(
        ErrorCase("channels", lambda t: {**_GOOD(t), "weight": t.normal(6, 4, 4, 4)}, ValueError,
                  r"weight \[C_out, C, KH, KW\], got shapes \(2, 3, 8, 8\) and \(6, 4, 4, 4\)"),
        ErrorCase("dimensions", lambda t: {**_GOOD(t), "x": t.normal(3, 8, 8)}, ValueError, r"x \[N, C, H, W\]"),
        ErrorCase("kernel", lambda t: {**_GOOD(t), "x": t.normal(2, 3, 1, 8)}, ValueError,
                  r"weight.*at most 1 \+ 2 x 1 lines.*got 4"),
        ErrorCase("dtype", lambda t: {**_GOOD(t), "weight": t.normal(6, 3, 4, 4).double()}, TypeError,
                  r"weight.*expected torch\.float32.*got torch\.float64"),
        ErrorCase("bias", lambda t: {**_GOOD(t), "bias": t.normal(5)}, ValueError, r"bias.*expected shape \(6,\)"),
        ErrorCase("stride", lambda t: {**_GOOD(t), "stride": 0}, ValueError, r"stride.*at least 1, got 0"),
        ErrorCase("integers", lambda t: {**_GOOD(t), "x": torch.ones(2, 3, 8, 8, dtype=torch.int32)}, TypeError,
                  r"x.*floating.*got torch\.int32"),
    ),
    bench_cases=(
        Case("dcgan_64-64x3x64x64-64", _inputs(64, 3, 64, 64, to=64, kernel=4, stride=2, padding=1, bias=False)),
        Case("dcgan_64-64x3x64x64-64-channels_last",
             _inputs(64, 3, 64, 64, to=64, kernel=4, stride=2, padding=1, bias=False, layout="channels_last")),
    ),
    peers={"eager": _eager},
    cost=_cost,
    limits=Limits(_inputs(8, 3, 64, 64, to=64, kernel=4, stride=2, padding=1, bias=False), (287,), 1.25, 1.05),
)  # fmt: skip
