"""upfirdn2d in plain PyTorch: the definition, and the fallback.

It adds up shifted images, so that no setting of convolutions changes a digit.
"""

import torch.nn.functional as F

from genai_fast.kernels.common.channels import dense_channels, wide
from genai_fast.kernels.upfirdn2d.layout import empty_result, output_size, taps_of


def _along(z, dim, weight, down, count):
    """Sum over the taps k of weight[k] z[down o + k] for `count` positions o of a dimension."""
    reach = down * (count - 1) + 1
    shifted = (z.narrow(dim, k, reach) for k in range(weight.size(0)))
    index = (slice(None),) * dim + (slice(None, None, down),)
    return sum(part[index] * w for part, w in zip(shifted, weight, strict=True))


def upfirdn2d(x, filter, up, down, padding, gain, flip):
    """Insert zeros, pad or crop, convolve, keep every down-th pixel, times gain."""
    batch, channels, height, width = x.shape
    out_height, out_width = output_size((height, width), taps_of(filter), up, down, padding)
    z = wide(x).reshape(batch, channels, height, 1, width, 1)
    z = F.pad(z, (0, up[1] - 1, 0, 0, 0, up[0] - 1)).reshape(batch, channels, height * up[0], width * up[1])
    z = F.pad(z, tuple(padding))
    weight = filter if flip else filter.flip(tuple(range(filter.dim())))
    if filter.dim() == 1:
        z = _along(_along(z, 3, weight, down[1], out_width), 2, weight, down[0], out_height)
    else:
        lines = (z.narrow(2, k, down[0] * (out_height - 1) + 1)[:, :, :: down[0]] for k in range(weight.size(0)))
        z = sum(_along(line, 3, w, down[1], out_width) for line, w in zip(lines, weight, strict=True))
    y, dense = (z * gain).to(x.dtype), dense_channels(x)
    return y.contiguous() if dense.is_contiguous() else empty_result(dense, y.shape[2:]).copy_(y)
