"""The library ops of gated_act: schemas, fakes, and which backends serve them."""

from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _fake(x, up, bias, *settings):
    return x.new_empty((x.size(0), x.size(1) // (2 if up is None else 1)))


def _fake_backward(grad_y, x, up, bias, with_bias, *settings):
    dtype = wide_dtype(x)
    columns = x.size(1) * (1 if up is None else 2)
    grad_bias = x.new_empty(columns if with_bias else 0, dtype=dtype)
    return x.new_empty(x.shape), x.new_empty(0 if up is None else up.shape), grad_bias


LIBRARY = (
    LibraryOp(
        "gated_act(Tensor x, Tensor? up, Tensor? bias, str activation, float gate_multiplier, float down_multiplier,"
        " str backend) -> Tensor",
        _fake,
    ),
    LibraryOp(
        "gated_act_backward(Tensor grad_y, Tensor x, Tensor? up, Tensor? bias, bool with_bias, str activation,"
        " float gate_multiplier, float down_multiplier, str backend)"
        " -> (Tensor grad_x, Tensor grad_up, Tensor grad_bias)",
        _fake_backward,
    ),
)
