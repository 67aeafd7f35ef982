"""The library ops of act_dropout: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.act_dropout import reference
from genai_fast.kernels.common.schema import LibraryOp

LIBRARY = (
    LibraryOp(
        "act_dropout(Tensor x, Tensor? seed, float p, SymInt offset, str activation, float slope, str backend)"
        " -> Tensor",
        lambda x, *rest: torch.empty_like(reference.dense(x)),
    ),
    LibraryOp(
        "act_dropout_backward(Tensor grad_y, Tensor saved, Tensor? seed, float p, SymInt offset, bool from_output,"
        " str activation, float slope, str backend) -> Tensor",
        lambda grad_y, saved, *rest: torch.empty_like(reference.dense(saved)),
    ),
)
