"""The library ops of cross_entropy and linear_cross_entropy: schemas, fakes, and which backends serve them."""

from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _fake(logits, target, ignore_index, label_smoothing, z_loss, reduction):
    dtype = wide_dtype(logits)
    return (
        logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype),
        logits.new_empty((2, target.numel()), dtype=dtype),
        logits.new_empty(() if reduction == "mean" else 0, dtype=dtype),
    )


ROWS_LIBRARY = (
    LibraryOp(
        "cross_entropy(Tensor logits, Tensor target, int ignore_index, float label_smoothing, float z_loss,"
        " str reduction, str backend) -> (Tensor loss, Tensor lse, Tensor count)",
        _fake,
    ),
    LibraryOp(
        "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor lse, Tensor count,"
        " int ignore_index, float label_smoothing, float z_loss, str reduction, str backend) -> Tensor",
        lambda grad_loss, logits, *rest: logits.new_empty(logits.shape),
    ),
)


def _fake_linear(
    x, weight, bias, target, grad_rows, ignore_index, label_smoothing, z_loss, reduction, chunk, of_x, of_weight,
    of_bias,
):  # fmt: skip
    dtype = wide_dtype(x)
    return (
        x.new_empty(target.shape if reduction == "none" else (), dtype=dtype),
        x.new_empty(x.shape if of_x else 0),
        weight.new_empty(weight.shape if of_weight else 0, dtype=dtype),
        weight.new_empty(weight.shape[:1] if of_bias else 0, dtype=dtype),
    )


LINEAR_LIBRARY = (
    LibraryOp(
        "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? grad_rows,"
        " int ignore_index, float label_smoothing, float z_loss, str reduction, SymInt chunk, bool of_x,"
        " bool of_weight, bool of_bias, str backend)"
        " -> (Tensor loss, Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        _fake_linear,
    ),
)
LIBRARY = (*ROWS_LIBRARY, *LINEAR_LIBRARY)
