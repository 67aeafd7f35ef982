"""The library ops of wavenet_decode: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.schema import LibraryOp


def _fake(cache, codes, given, start, uniforms, condition, weights, dilations, temperature, keep):
    return cache.new_empty((codes.size(0), codes.size(1) - 1, weights[0].size(0)) if keep else (0,))


LIBRARY = (
    LibraryOp(
        "wavenet_decode(Tensor(a!) cache, Tensor(b!) codes, int given, SymInt start, Tensor uniforms, Tensor condition,"
        " Tensor[] weights, int[] dilations, float temperature, bool keep, str backend) -> Tensor",
        _fake,
        ("cpu",),
        dtypes=(torch.float32,),
    ),
)
