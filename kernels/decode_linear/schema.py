"""The library ops of decode_linear: schemas, fakes, and which backends serve them."""

from genai_fast.kernels.common.schema import LibraryOp
from genai_fast.kernels.decode_linear.layout import refusal

LIBRARY = (
    LibraryOp(
        "decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps,"
        " str activation, Tensor? residual, str backend) -> Tensor",
        lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.size(0))),
        ("triton",),
        refusal,
    ),
)
