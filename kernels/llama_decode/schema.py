"""The library ops of llama_decode: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.schema import LibraryOp

LIBRARY = (
    LibraryOp(
        "llama_decode(Tensor(a!) cache, Tensor ids, SymInt length, Tensor[] weights, Tensor[] scales, Tensor cos,"
        " Tensor sin, SymInt heads, int[] windows, float softcap, float eps, bool every, str backend) -> Tensor",
        lambda cache, ids, length, weights, scales, cos, sin, heads, windows, softcap, eps, every: cos.new_empty(
            *(ids.shape if every else ids.shape[:1]), weights[-1].size(0)
        ),
        ("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
    ),
)
