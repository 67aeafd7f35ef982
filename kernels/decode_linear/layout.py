"""What the kernel of decode_linear takes, and what it asks of its tensors: it reads by address."""

MOST_ROWS = 16  # beyond, a library's matrix product reads the weight as seldom, and multiplies on tensor cores
LONGEST = 32768  # bytes of a row of the weight: a program of 16 warps holds them in registers, of float32 one of 8


def refusal(backend, x, weight, *rest) -> str:
    """Why the reference serves a call; "" if the kernel does."""
    rows, columns = x.numel() // max(x.size(-1), 1), weight.size(1)
    if rows > MOST_ROWS:
        return f"its kernel takes at most {MOST_ROWS} rows, got {rows}"
    if columns * weight.element_size() > LONGEST:
        return f"its kernel takes rows of at most {LONGEST} bytes, got {columns} columns of {weight.dtype}"
    if columns > 1 and weight.stride(1) != 1:
        return f"its kernel reads a weight whose rows have no gaps, got strides {weight.stride()}"
    return ""


def require_operands(x, weight, bias, norm_weight, norm_bias, residual) -> None:
    """Raise on what would read foreign memory."""
    columns, outputs = x.size(-1), weight.size(0)
    expected = (
        (weight, (outputs, columns)),
        (bias, (outputs,)),
        (norm_weight, (columns,)),
        (norm_bias, (columns,)),
        (residual, (*x.shape[:-1], outputs)),
    )
    for tensor, shape in expected:
        if tensor is not None and (
            tuple(tensor.shape) != shape or tensor.dtype is not x.dtype or tensor.device != x.device
        ):
            raise ValueError(
                f"genai_fast: expected {x.dtype} {shape} on {x.device}, got {tensor.dtype} {tuple(tensor.shape)} on"
                f" {tensor.device}"
            )
