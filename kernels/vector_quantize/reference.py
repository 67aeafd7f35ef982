"""vector_quantize and segment_sum in plain PyTorch: the definition, and the fallback."""

import torch

from genai_fast.kernels.common.schema import wide_dtype
from genai_fast.kernels.vector_quantize.layout import matrix


def nearest(x, codebook):
    """Index of the nearest code of each row: |x - e|^2 = |x|^2 - 2 (x e - |e|^2 / 2), and |x|^2 is the same for all."""
    wide = wide_dtype(x)
    codes = codebook.to(wide)
    scores = x.to(wide) @ codes.T - codes.square().sum(1) / 2
    return torch.where(scores.abs() < torch.inf, scores, -torch.inf).argmax(-1)  # the first of the largest


def vector_quantize(x, codebook):
    with torch.no_grad():
        indices = nearest(x, codebook)
    return codebook[indices], indices


def segment_sum(x, indices, segments):
    wide = wide_dtype(x)
    rows, _ = matrix(x.to(wide))
    indices = indices.reshape(-1)
    inside = (indices >= 0) & (indices < segments)
    to = torch.where(inside, indices, segments)  # what belongs to no segment goes to one more
    sums = rows.new_zeros((segments + 1, rows.size(1))).index_add(0, to, rows)
    counts = rows.new_zeros(segments + 1).index_add(0, to, torch.ones_like(to, dtype=wide))
    return sums[:segments], counts[:segments]
