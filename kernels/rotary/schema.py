"""The library ops of rotary: schemas, fakes, and which backends serve them."""

from genai_fast.kernels.common.schema import LibraryOp
from genai_fast.kernels.rotary import reference

LIBRARY = (
    LibraryOp(
        "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, SymInt offset, bool interleaved, bool inverse,"
        " bool full, int[] sections, str backend) -> Tensor",
        lambda x, *rest: reference.in_order_of(reference.with_unit_stride(x)),
    ),
)
