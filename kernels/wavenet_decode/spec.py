"""wavenet_decode: what the op is, its cases and its cost."""

import torch

from genai_fast.kernels.common.spec import Case, Cost, ErrorCase, OpSpec
from genai_fast.kernels.wavenet_decode import reference
from genai_fast.kernels.wavenet_decode.layout import Sizes, expected, padded
from genai_fast.kernels.wavenet_decode.schema import LIBRARY


def _reference(codes, cache, given, start, uniforms, condition, weights, dilations, *, temperature=1.0, keep=False):
    return reference.wavenet_decode(
        cache, codes, given, start, uniforms, condition, weights, dilations, temperature, keep
    )


def _cost(codes, cache, given, start, uniforms, condition, weights, dilations, **settings):
    """Each matrix meets each sequence at each step; memory gives the weights once, where caches hold them."""
    steps, products = uniforms.numel(), sum(w.numel() for w in weights[1:] if w.dim() > 1)
    return Cost(flops=2 * steps * products, bytes=sum(w.nbytes for w in weights) + 2 * cache.nbytes)


def _inputs(width, skip, dilations, *, kernel=2, levels=256, batch=1, steps=5, start=0, given=None, keep=True):
    """All codes are known, so that rounding draws no other ones; `start` positions were seen before."""

    def make(t):
        size = Sizes(levels, width, skip, len(dilations), kernel, (kernel - 1) * sum(dilations))

        def draw(shape):
            fan = shape[-2] if len(shape) > 1 else 4
            return t.normal(*shape, scale=fan**-0.5, grad=False)

        shapes = expected(size)
        weights = [draw(shapes[0]), *map(draw, shapes[1:])]
        for k, columns in ((1, 2 * width), (2, skip), (3, width), (4, width)):  # zeros where columns pad
            for at in range(k, len(weights) - 5, 4):
                if weights[at].numel():
                    weights[at] = padded(weights[at][..., :columns])
        for k, columns in ((-5, skip), (-4, skip), (-3, skip), (-2, levels), (-1, levels)):
            weights[k] = padded(weights[k][..., :columns])
        cache = t.normal(batch, size.room, width, scale=1.0 if start else 0.0, grad=False)
        codes = torch.randint(levels, (batch, steps + 1), generator=t.generator).to(t.device)
        return dict(
            codes=codes, cache=cache, given=steps + 1 if given is None else given, start=start,
            uniforms=t.uniform(batch, steps), condition=t.normal(len(dilations), batch, 2 * width, grad=False),
            weights=weights, dilations=list(dilations), keep=keep,
        )  # fmt: skip

    return make


CASES = (
    Case("odd", _inputs(5, 7, (1, 2, 4), levels=11, batch=2, steps=9)),
    Case("later", _inputs(16, 32, (1, 2, 4, 1), batch=3, steps=7, start=50)),
    Case("three_taps", _inputs(8, 8, (1, 3), kernel=3, steps=12)),
    Case("one_tap", _inputs(4, 6, (1, 1), kernel=1)),
    Case("many_sequences", _inputs(6, 10, (1, 2), batch=17, steps=4)),
    Case("one_layer", _inputs(3, 2, (4,), levels=2, steps=6)),
    Case("no_sequences", _inputs(4, 4, (1, 2), batch=0)),
)

_GOOD = _inputs(4, 4, (1, 2), levels=8, steps=3)


def _with(**changes):
    return lambda t: (lambda found: {**found, **{n: f(found[n]) for n, f in changes.items()}})(_GOOD(t))


ERROR_CASES = (
    ErrorCase("few", _with(weights=lambda w: w[:-1]), ValueError, r"weights: expected 14 tensors for 2.*got 13"),
    ErrorCase("shape", _with(weights=lambda w: [*w[:-1], w[-1][:-1]]), ValueError,
              r"weights: number 13: expected contiguous torch\.float32 \(16,\).*\(15,\)"),
    ErrorCase("cache", _with(cache=lambda x: x[:, 1:]), ValueError, r"cache: expected contiguous.*\(1, 3, 4\)"),
    ErrorCase("cache_dtype", _with(cache=lambda x: x.half()), ValueError, r"cache: expected .*got torch\.float16"),
    ErrorCase("uniforms", _with(uniforms=lambda x: x[:, 1:]), ValueError, r"uniforms: expected.*\(1, 3\).*\(1, 2\)"),
    ErrorCase("codes_dtype", _with(codes=lambda x: x.int()), ValueError, r"codes: expected.*int64.*got torch\.int32"),
    ErrorCase("code", _with(codes=lambda x: x * 0 + 8), ValueError, r"codes: expected 0 to 7, got 8"),
    ErrorCase("given", _with(given=lambda n: 5), ValueError, r"given, start: expected 1 to 4.*got 5"),
    ErrorCase("start", _with(start=lambda n: -1), ValueError, r"start: expected at least 0, got -1"),
    ErrorCase("dilation", _with(dilations=lambda d: [1, 0]), ValueError, r"dilations: expected at least 1, got 0"),
    ErrorCase("gradient", _with(cache=lambda x: x.requires_grad_()), ValueError, r"weights: .*no gradient.*no_grad"),
)  # fmt: skip

_DILATIONS = tuple(1 << k for k in range(10))
BENCH_CASES = (
    Case("wavenet-20x64-100", _inputs(64, 128, 2 * _DILATIONS, steps=100, given=1, keep=False)),
    Case("wavenet-20x64-100-batch_12", _inputs(64, 128, 2 * _DILATIONS, steps=100, given=1, batch=12, keep=False)),
)

WAVENET_DECODE = OpSpec(
    name="wavenet_decode",
    folder="wavenet_decode",
    formula="new samples of a sound through all layers of a WaveNet that remembers what it looks back to, in one call",
    source="van den Oord et al. 2016 (WaveNet); caches: Le Paine et al. 2016, arXiv:1611.09482",
    library=LIBRARY,
    reference=_reference,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    peers={"eager": _reference},
    compiled=False,
    cost=_cost,
    backends=("reference", "cpu"),
    double_backward=False,
    mutates=("cache",),
)
