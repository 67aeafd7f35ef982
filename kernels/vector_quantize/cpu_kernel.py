"""vector_quantize and segment_sum on the CPU: allocate the results and call cpu_kernel.cpp."""

import torch

from genai_fast.kernels.common.extension import cpp
from genai_fast.kernels.common.rows import DTYPE_CODE, address
from genai_fast.kernels.vector_quantize.layout import matrix, require_codes, require_indices


def vector_quantize(x, codebook):
    require_codes(x, codebook)
    quantized = codebook.new_empty(x.shape)
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device="cpu")
    if not indices.numel():
        return quantized, indices
    (rows, x_row), (codes, code_row) = matrix(x), matrix(codebook)
    cpp.vector_quantize(
        address(rows), x_row, DTYPE_CODE[x.dtype], address(codes), code_row, DTYPE_CODE[codebook.dtype],
        address(quantized), address(indices), rows.size(0), *codes.shape,
    )  # fmt: skip
    return quantized, indices


def segment_sum(x, indices, segments):
    require_indices(x, indices, segments)
    sums = torch.empty((segments, x.size(-1)), dtype=torch.float32, device="cpu")
    counts = torch.empty(segments, dtype=torch.float32, device="cpu")
    (rows, x_row), indices = matrix(x), indices.contiguous()
    cpp.segment_sum(
        address(rows),
        x_row,
        DTYPE_CODE[x.dtype],
        address(indices),
        address(sums),
        address(counts),
        *rows.shape,
        segments,
    )
    return sums, counts
