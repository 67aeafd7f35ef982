"""The library ops of vector_quantize and segment_sum: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _segment_sum(x, indices, segments):
    wide = wide_dtype(x)
    return x.new_empty((segments, x.size(-1)), dtype=wide), x.new_empty(segments, dtype=wide)


VECTOR_QUANTIZE = LibraryOp(
    "vector_quantize(Tensor x, Tensor codebook, str backend) -> (Tensor quantized, Tensor indices)",
    lambda x, codebook: (codebook.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64)),
)
SEGMENT_SUM = LibraryOp(
    "segment_sum(Tensor x, Tensor indices, SymInt segments, str backend) -> (Tensor sums, Tensor counts)", _segment_sum
)
LIBRARY = (VECTOR_QUANTIZE, SEGMENT_SUM)
