"""vector_quantize and segment_sum: what the ops are, their cases and their cost."""

import torch

from genai_fast.kernels.common.spec import Case, CompileCase, Cost, ErrorCase, Expected, Limits, OpSpec, choices_of
from genai_fast.kernels.vector_quantize import reference
from genai_fast.kernels.vector_quantize.schema import SEGMENT_SUM as _SUM
from genai_fast.kernels.vector_quantize.schema import VECTOR_QUANTIZE as _QUANTIZE


def _eager(x, codebook):
    """As most people write it."""
    indices = torch.cdist(x.detach().reshape(-1, x.size(-1)), codebook.detach()).argmin(1).view(x.shape[:-1])
    return torch.nn.functional.embedding(indices, codebook), indices


def _eager_sum(x, indices, segments):
    """Each row's code as a row of zeros and a one, as in most implementations of the moving averages."""
    hits = torch.nn.functional.one_hot(indices.flatten(), segments).to(x.dtype)
    return hits.T @ x.flatten(0, -2), hits.sum(0)


def _cost(x, codebook):
    rows = x.numel() // x.size(-1)
    moved = 2 * x.numel() * x.element_size() + 8 * rows + 2 * codebook.numel() * codebook.element_size()
    return Cost(flops=2 * rows * codebook.numel() + x.numel(), bytes=moved)


def _cost_of_sum(x, indices, segments):
    return Cost(
        flops=x.numel(),
        bytes=2 * x.numel() * x.element_size() + 2 * 8 * indices.numel() + 4 * segments * (x.size(-1) + 1),
    )


def _inputs(*shape, codes, scale=1.0, narrow=False):
    """Codes that a row of x is not about as near to as to its nearest; narrow: of x alone, beside float32."""

    def make(t):
        codebook = t.normal(codes, shape[-1], scale=scale)
        return dict(
            x=t.normal(*shape, scale=scale, grad=False),
            codebook=codebook.detach().float().requires_grad_() if narrow and t.dtype.itemsize == 2 else codebook,
        )

    return make


def _strided(t):
    """Channels first, as an encoder gives them, and a part of a wider codebook."""
    return dict(x=t.normal(2, 24, 3, 5, grad=False).movedim(1, -1), codebook=t.normal(37, 40)[:, 8:32])


def _ties(t):
    """Whole numbers: a row in the middle of two codes, and a code that is there twice."""
    return dict(
        x=t.values([[0.0, 0.0], [2.0, 1.0], [1.0, 1.0], [5.0, 5.0]], grad=False),
        codebook=t.values([[2.0, 2.0], [2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]),
    )


def _late_ties(t):
    """The same code in places far apart, in panels and blocks of their own."""
    codebook = t.normal(200, 8).detach()
    codebook[70] = codebook[3]
    codebook[199] = codebook[131]
    return dict(x=codebook[[70, 3, 199, 131, 50]].clone(), codebook=codebook.requires_grad_())


def _special(t):
    """Rows with an infinity, with a NaN, and ordinary ones; codes with both."""
    x, codebook = t.normal(4, 6, grad=False), t.normal(9, 6).detach()
    x[0, 3], x[1, 4] = float("inf"), float("nan")
    codebook[2, 1], codebook[4, 0] = float("nan"), float("-inf")
    return dict(x=x, codebook=codebook.requires_grad_())


CASES = (
    Case("latents", _inputs(6, 7, 7, 16, codes=50)),
    Case("odd", _inputs(97, 13, codes=131)),
    Case("more_codes", _inputs(70, 64, codes=600)),
    Case("long_vectors", _inputs(33, 150, codes=20)),
    Case("one_code", _inputs(5, 4, codes=1)),
    Case("one_channel", _inputs(40, 1, codes=3, scale=4.0)),
    Case("vector", _inputs(12, codes=5)),
    Case("float32_codebook", _inputs(50, 32, codes=64, narrow=True)),
    Case("small", _inputs(20, 8, codes=30, scale=1e-4)),
    Case("strided", _strided),
    Case("ties", _ties),
    Case("late_ties", _late_ties),
    Case("empty", _inputs(0, 8, codes=5)),
    Case("no_channels", _inputs(3, 0, codes=4)),
    Case("special_values", _special),
)


def _summed(*shape, segments, low=0, high=None, **values):
    def make(t):
        indices = torch.randint(low, segments if high is None else high, shape[:-1], generator=t.generator)
        return dict(x=t.normal(*shape, **values), indices=indices.to(t.device), segments=segments)

    return make


def _poisoned(t):
    given = _summed(6, 5, segments=4)(t)
    x = given["x"].detach()
    x[0, 1], x[3, 2] = float("nan"), float("inf")
    given["indices"][:] = torch.tensor([1, 0, 0, 2, 2, 0])
    return {**given, "x": x.requires_grad_()}


SUM_CASES = (
    Case("latents", _summed(4, 7, 7, 16, segments=50)),
    Case("odd", _summed(301, 13, segments=17)),
    Case("one_segment", _summed(500, 3, segments=1)),
    Case("wide", _summed(40, 300, segments=6)),
    Case("mean", _summed(200, 32, segments=5, mean=3.0)),
    Case("outside", _summed(60, 8, segments=6, low=-3, high=9)),
    Case("transposed", lambda t: {**_summed(30, 9, segments=4)(t), "x": t.laid_out("transposed", 30, 9)}),
    Case("vector", lambda t: dict(x=t.normal(7), indices=torch.tensor(2, device=t.device), segments=3)),
    Case("special_values", _poisoned),
    Case("empty", _summed(0, 8, segments=3)),
    Case("no_segments", lambda t: {**_summed(4, 3, segments=2)(t), "segments": 0}),
    Case("no_channels", _summed(5, 0, segments=2)),
)


def _with(good, **changes):
    return lambda t: (lambda given: {**given, **{n: f(given[n]) for n, f in changes.items()}})(good(t))


_GOOD, _GOOD_SUM = _inputs(6, 8, codes=5), _summed(6, 8, segments=5)

ERROR_CASES = (
    ErrorCase("integers", _with(_GOOD, x=lambda x: x.int()), TypeError, r"x: .*floating.*got torch\.int32"),
    ErrorCase("no_dimension", _with(_GOOD, x=lambda x: x[0, 0]), ValueError,
              r"x: expected \[\.\.\., D\], got shape \(\)"),
    ErrorCase("columns", _with(_GOOD, codebook=lambda c: c[:, :7]), ValueError,
              r"codebook: expected \[K, 8\].*got \(5, 7\).*movedim"),
    ErrorCase("no_codes", _with(_GOOD, codebook=lambda c: c[:0]), ValueError, r"codebook: .*K > 0.*got \(0, 8\)"),
    ErrorCase("dtype", _with(_GOOD, codebook=lambda c: c.bfloat16()), TypeError,
              r"codebook: expected torch\.float32 as x has, got torch\.bfloat16"),
    ErrorCase("device", _with(_GOOD, codebook=lambda c: c.to("meta")), ValueError, r"codebook: expected device cpu"),
)  # fmt: skip
SUM_ERROR_CASES = (
    ErrorCase("indices_dtype", _with(_GOOD_SUM, indices=lambda i: i.int()), TypeError,
              r"indices: expected a tensor of torch\.int64, got torch\.int32"),
    ErrorCase("indices_shape", _with(_GOOD_SUM, indices=lambda i: i[:5]), ValueError,
              r"indices: expected shape \(6,\).*got \(5,\)"),
    ErrorCase("device", _with(_GOOD_SUM, indices=lambda i: i.to("meta")), ValueError, r"indices: expected device cpu"),
    ErrorCase("segments", _with(_GOOD_SUM, segments=lambda _: -1), ValueError,
              r"segments: expected at least 0, got -1"),
    ErrorCase("integers", _with(_GOOD_SUM, x=lambda x: x.int()), TypeError, r"x: .*floating.*got torch\.int32"),
)  # fmt: skip

# The latents of images of 28 and 32 pixels at a quarter of their size, and of 128 pixels.
BENCH_CASES = (
    Case("vq_vae-128x7x7x64-512", _inputs(128, 7, 7, 64, codes=512)),
    Case("vq_vae-128x8x8x64-1024", _inputs(128, 8, 8, 64, codes=1024)),
    Case("vq_vae-16x32x32x64-512", _inputs(16, 32, 32, 64, codes=512)),
)
SUM_BENCH_CASES = (
    Case("vq_vae-128x7x7x64-512", _summed(128, 7, 7, 64, segments=512)),
    Case("vq_vae-16x32x32x64-512", _summed(16, 32, 32, 64, segments=512)),
)

VECTOR_QUANTIZE = OpSpec(
    name="vector_quantize",
    folder="vector_quantize",
    formula="argmin over k of |x - codebook[k]|^2, and codebook[k] of it, without a matrix of distances",
    source="van den Oord et al. 2017 (VQ-VAE), arXiv:1711.00937",
    library=(_QUANTIZE,),
    reference=reference.vector_quantize,
    cases=CASES,
    error_cases=ERROR_CASES,
    bench_cases=BENCH_CASES,
    limits=Limits(_inputs(2, 7, 7, 64, codes=128), (226, 75.6), 1.0, 5.1),
    peers={"eager": _eager},
    cost=_cost,
    compile_cases=(CompileCase("narrow", _inputs(128, 7, 7, 64, codes=512, narrow=True)),),
    expected={"_vector_quantize": Expected((), lambda c: c["BLOCK_N"] * c["BLOCK_K"] * c["BLOCK_D"])},
    choices={
        "vector_quantize/forward": choices_of(
            BLOCK_N=(32, 32, 64, 64, 128), BLOCK_K=(64, 128, 64, 128, 64), num_warps=(4, 4, 8, 8, 8)
        )
    },
)
SEGMENT_SUM = OpSpec(
    name="segment_sum",
    folder="vector_quantize",
    formula="sums[k] = sum of the rows x[n] with indices[n] = k, and how many they are",
    source="van den Oord et al. 2017 (VQ-VAE), arXiv:1711.00937, appendix A.1",
    library=(_SUM,),
    reference=reference.segment_sum,
    cases=SUM_CASES,
    error_cases=SUM_ERROR_CASES,
    bench_cases=SUM_BENCH_CASES,
    limits=Limits(_summed(8, 7, 7, 64, segments=32), (12.4,), 0.7),
    peers={"eager": _eager_sum},
    cost=_cost_of_sum,
)
