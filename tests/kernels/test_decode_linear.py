"""decode_linear beside what every op is tested for: rows are on their own, and many of them are left to PyTorch."""

import pytest
import torch

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable
from genai_fast.kernels.common.spec import Tensors
from genai_fast.kernels.decode_linear.layout import LONGEST, MOST_ROWS, refusal
from genai_fast.registry import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.mark.skipif(bool(unavailable("triton", DEVICE)), reason=unavailable("triton", DEVICE))
CASES = {case.name: case for case in OPS["decode_linear"].cases}


def inputs(case, dtype=torch.float32):
    return CASES[case].inputs(Tensors(dtype, DEVICE))


@TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype):
    given = inputs("sixteen_rows", dtype)
    with use_backend("triton"):
        together = ops.decode_linear(**given)
        for rows in (slice(0, 1), slice(7, 8), slice(3, 12)):
            some = {**given, "x": given["x"][rows], "residual": given["residual"][rows]}
            assert torch.equal(ops.decode_linear(**some), together[rows])


@TRITON
def test_more_rows_and_other_weights_are_left_to_pytorch():
    x, weight = torch.randn(MOST_ROWS + 1, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    by_column = weight.t().contiguous().t()
    for a, b in ((x, weight), (x[:2], by_column)):
        torch.testing.assert_close(ops.decode_linear(a, b), a @ b.t())
        with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for, but its kernel"):
            ops.decode_linear(a, b)
    longest = LONGEST // 4
    assert refusal("triton", torch.empty(1, longest), torch.empty(1, longest)) == ""
    assert "at most 32768 bytes, got 8193 columns" in refusal("triton", x[:1], torch.empty(1, longest + 1))


@TRITON
def test_the_raw_operator_refuses_what_would_read_foreign_memory():
    x, weight = torch.zeros(2, 8, device=DEVICE), torch.zeros(6, 8, device=DEVICE)
    settings = (1e-5, "none")
    for call in (
        (x[:, :7], weight, None, None, None, *settings, None),
        (x, weight, weight[:5, 0], None, None, *settings, None),
        (x, weight, None, weight[0], weight[:, 0], *settings, None),
        (x, weight.half(), None, None, None, *settings, None),
        (x, weight, None, None, None, *settings, x[:, :6][:1]),
    ):
        with pytest.raises(ValueError, match="genai_fast: expected"):
            torch.ops.genai_fast.decode_linear(*call, "triton")


@pytest.mark.parametrize("case", ["gpt2_like", "strided", "vector"])
def test_it_is_an_operator_to_pytorch(case):
    given = inputs(case)
    names = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")
    x, weight, bias, norm_weight, norm_bias, residual = (given.get(name) for name in names)
    arguments = (x, weight, bias, norm_weight, norm_bias, 1e-5, "gelu_tanh", residual, "")
    torch.library.opcheck(torch.ops.genai_fast.decode_linear.default, arguments)
    given["activation"] = "gelu_tanh"
    compiled = torch.compile(ops.decode_linear, fullgraph=True, backend="aot_eager")
    expected = ops.decode_linear(**given)
    assert torch.equal(compiled(**given), expected)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(ops.decode_linear(**given), expected)
    nowhere = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    assert ops.decode_linear(**nowhere).shape == expected.shape
