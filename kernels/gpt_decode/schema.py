"""The library ops of gpt_decode: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.schema import LibraryOp

LIBRARY = (
    LibraryOp(
        "gpt_decode(Tensor(a!) cache, Tensor ids, SymInt length, Tensor[] weights, Tensor[] scales, float eps,"
        " bool every, str backend) -> Tensor",
        lambda cache, ids, length, weights, scales, eps, every: cache.new_empty(
            *(ids.shape if every else ids.shape[:1]), weights[-1].size(0)
        ),
        ("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
    ),
)
