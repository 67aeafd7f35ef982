"""The library ops of cross_entropy and linear_cross_entropy: schemas, fakes, and which backends serve them."""

from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _fake(
    logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, predict
):  # fmt: skip
    dtype = wide_dtype(logits)
    return (
        logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype),
        logits.new_empty((2, target.numel()), dtype=dtype),
        logits.new_empty(2 if reduction == "mean" else 0, dtype=dtype),
        target.new_empty(target.shape if predict else 0),
    )


ROWS_LIBRARY = (
    LibraryOp(
        "cross_entropy(Tensor logits, Tensor target, Tensor? class_weight, int ignore_index, float label_smoothing,"
        " float z_loss, float softcap, str reduction, bool predict, str backend)"
        " -> (Tensor loss, Tensor lse, Tensor count, Tensor predicted)",
        _fake,
    ),
    LibraryOp(
        "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor lse, Tensor count,"
        " Tensor? class_weight, int ignore_index, float label_smoothing, float z_loss, float softcap, str reduction,"
        " str backend) -> Tensor",
        lambda grad_loss, logits, *rest: logits.new_empty(logits.shape),
    ),
)


def _fake_linear(
    x, weight, bias, target, grad_rows, class_weight, ignore_index, label_smoothing, z_loss, softcap, scaled, reduction,
    predict, chunk, of_x, of_weight, of_bias,
):  # fmt: skip
    dtype = wide_dtype(x)
    return (
        x.new_empty(target.shape if reduction == "none" else (), dtype=dtype),
        x.new_empty(x.shape if of_x else 0),
        weight.new_empty(weight.shape if of_weight else 0, dtype=dtype),
        weight.new_empty(weight.shape[:1] if of_bias else 0, dtype=dtype),
        x.new_empty(target.shape if z_loss else 0, dtype=dtype),
        target.new_empty(target.shape if predict else 0),
    )


LINEAR_LIBRARY = (
    LibraryOp(
        "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? grad_rows,"
        " Tensor? class_weight, int ignore_index, float label_smoothing, float z_loss, float softcap, bool scaled,"
        " str reduction, bool predict, SymInt chunk, bool of_x, bool of_weight, bool of_bias, str backend)"
        " -> (Tensor loss, Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor penalty, Tensor predicted)",
        _fake_linear,
    ),
)
LIBRARY = (*ROWS_LIBRARY, *LINEAR_LIBRARY)
