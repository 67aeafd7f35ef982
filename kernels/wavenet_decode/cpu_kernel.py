"""wavenet_decode on the CPU: one call of cpu_kernel.cpp for all samples."""

from array import array

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import address
from genai_fast.kernels.wavenet_decode.layout import require


def wavenet_decode(cache, codes, given, start, uniforms, condition, weights, dilations, temperature, keep):
    size = require(codes, cache, given, start, uniforms, condition, weights, dilations)
    (batch, steps), tensors = uniforms.shape, array("q", [address(w) for w in weights])
    spans = array("q", dilations)  # alive until the call has read it
    logits = cache.new_empty((batch, steps, size.levels) if keep else (0,))
    cpp.wavenet_decode(
        tensors.buffer_info()[0], spans.buffer_info()[0], address(codes), address(cache),
        address(uniforms), address(condition), address(logits) if keep else 0, batch, steps, given, start, size.layers,
        size.levels, size.width, size.skip, size.kernel, size.room, float(temperature),
    )  # fmt: skip
    return logits
