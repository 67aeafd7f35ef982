"""The library ops of gru and lstm: schemas, fakes, and which backends serve them."""

from genai_fast.kernels.common.schema import LibraryOp, wide_dtype


def _saved(like, keep, *shape):
    dtype = wide_dtype(like)
    return like.new_empty(shape if keep else (0,), dtype=dtype)


def _states(gates, h0, count):
    """y, and states of the last step."""
    return gates.new_empty(gates.size(0), *h0.shape), *(gates.new_empty(h0.shape) for _ in range(count))


GRU_LIBRARY = (
    LibraryOp(
        "gru(Tensor gates, Tensor h0, Tensor weight_hh, Tensor? bias_n, bool keep, str backend)"
        " -> (Tensor y, Tensor h_n, Tensor saved)",
        lambda gates, h0, weight_hh, bias_n, keep: (
            *_states(gates, h0, 1),
            _saved(gates, keep, gates.size(0), h0.size(0), 4 * h0.size(1)),
        ),
    ),
    LibraryOp(
        "gru_backward(Tensor? grad_y, Tensor? grad_last, Tensor saved, Tensor y, Tensor h0, Tensor weight_hh,"
        " str backend) -> (Tensor grad_gates, Tensor grad_n, Tensor grad_h0)",
        lambda grad_y, grad_last, saved, y, h0, weight_hh: (
            y.new_empty(*y.shape[:2], 3 * y.size(2)),
            y.new_empty(y.shape),
            y.new_empty(h0.shape),
        ),
    ),
)
# On the CPU PyTorch's own (oneDNN) is the fast one.
LSTM_LIBRARY = (
    LibraryOp(
        "lstm(Tensor gates, Tensor h0, Tensor c0, Tensor weight_hh, bool keep, str backend)"
        " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)",
        lambda gates, h0, c0, weight_hh, keep: (
            *_states(gates, h0, 2),
            _saved(gates, keep, gates.size(0), h0.size(0), 5 * h0.size(1)),
        ),
        ("triton",),
    ),
    LibraryOp(
        "lstm_backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor saved, Tensor c0, Tensor weight_hh,"
        " str backend) -> (Tensor grad_gates, Tensor grad_h0, Tensor grad_c0)",
        lambda grad_y, grad_h, grad_c, saved, c0, weight_hh: (
            weight_hh.new_empty(*saved.shape[:2], weight_hh.size(0)),
            weight_hh.new_empty(c0.shape),
            weight_hh.new_empty(c0.shape),
        ),
        ("triton",),
    ),
)
LIBRARY = (*GRU_LIBRARY, *LSTM_LIBRARY)
