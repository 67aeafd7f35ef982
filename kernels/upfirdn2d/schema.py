"""The library op of upfirdn2d: its schema, fake, and which calls the kernels serve."""

from genai_fast.kernels.common.channels import dense_channels
from genai_fast.kernels.common.schema import LibraryOp
from genai_fast.kernels.upfirdn2d.layout import MOST_TAPS, axes, empty_result, output_size, taps_of


def _fake(x, filter, up, down, padding, gain, flip):
    return empty_result(dense_channels(x), output_size(x.shape[2:], taps_of(filter), up, down, padding))


def _refuses(backend, x, filter, up, down, padding, gain, flip):
    if backend != "triton" or min(*up, *down) < 1:  # what does not fit is the launcher's to say
        return ""
    vertical, horizontal = axes(x, filter, up, down, padding)
    taps = max(vertical.most, horizontal.most) if filter.dim() == 1 else vertical.most * horizontal.most
    if taps > MOST_TAPS:
        return f"{taps} taps meet a pixel, more than {MOST_TAPS}"
    rows = x.size(0) * x.size(1) * max(vertical.size, vertical.out)
    if rows >= 2**31 or x.size(1) * max(horizontal.size, horizontal.out) >= 2**31 or max(map(abs, padding)) >= 2**24:
        return "there are 2**31 lines, a line has as many numbers, or the padding has 2**24 pixels, or more"
    return ""


LIBRARY = (
    LibraryOp(
        "upfirdn2d(Tensor x, Tensor filter, int[] up, int[] down, SymInt[] padding, float gain, bool flip, str backend)"
        " -> Tensor",
        _fake, refuses=_refuses,
    ),
)  # fmt: skip
