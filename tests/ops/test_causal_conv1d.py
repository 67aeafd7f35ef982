"""Causal convolutions beyond the registry's cases: causality, layouts, the layer, raw calls that do not fit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import ops
from genai_fast.layers import CausalConv1d


def _normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dilation", [1, 3, 40])
def test_what_comes_later_leaves_earlier_results_bitwise_equal(dilation):
    x, weight, one = _normal(2, 8, 100), _normal(12, 8, 3), _normal(8, 1, 4)
    later = torch.cat([x[..., :60], 1e3 * x[..., 60:]], 2)
    for function, w in ((ops.causal_conv1d, weight), (ops.depthwise_causal_conv1d, one)):
        y, changed = (function(v, w, dilation=dilation) for v in (x, later))
        assert torch.equal(y[..., :60], changed[..., :60]) and not torch.equal(y[..., 60:], changed[..., 60:])


def test_layouts_give_the_same_numbers():
    x, weight = _normal(3, 20, 130), _normal(20, 1, 4)
    last = x.mT.contiguous().mT
    gaps = torch.cat([last, last], 1)[:, :20]
    for inputs in (last, gaps, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for w, function in ((weight, ops.depthwise_causal_conv1d), (_normal(6, 20, 2), ops.causal_conv1d)):
            torch.testing.assert_close(function(inputs, w), function(x, w), rtol=1e-5, atol=1e-5)
    y = ops.depthwise_causal_conv1d(x, weight)
    assert y.shape == x.shape and y.mT.is_contiguous()


@pytest.mark.parametrize(("groups", "activation"), [(1, "none"), (1, "silu"), (6, "silu")])
def test_the_layer_is_the_convolution_after_its_padding(groups, activation):
    torch.manual_seed(0)
    ours = CausalConv1d(6, 6, 3, dilation=4, groups=groups, activation=activation)
    torch.manual_seed(0)
    plain = nn.Conv1d(6, 6, 3, dilation=4, groups=groups)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = _normal(2, 6, 30)
    expected = plain(F.pad(x, (8, 0)))
    torch.testing.assert_close(ours(x), F.silu(expected) if activation == "silu" else expected, rtol=1e-5, atol=1e-5)
    assert f"activation={activation}" in repr(ours)


def test_the_layer_refuses_what_it_does_not_serve():
    with pytest.raises(ValueError, match="CausalConv1d: groups: expected 1, or 6"):
        CausalConv1d(6, 6, 2, groups=3)
    with pytest.raises(ValueError, match="CausalConv1d: activation: expected one of 'none', 'silu', got 'gated_tanh'"):
        CausalConv1d(6, 6, 2, groups=6, activation="gated_tanh")
    with pytest.raises(ValueError, match="CausalConv1d: condition: expected none with groups"):
        CausalConv1d(6, 6, 2, groups=6)(_normal(2, 6, 9), _normal(2, 6))
    gate = CausalConv1d(6, 8, 2, activation="gated_tanh")
    assert gate(_normal(2, 6, 9), _normal(2, 8)).shape == (2, 4, 9)


def test_raw_operators_refuse_what_would_read_foreign_memory():
    library, x = torch.ops.genai_fast, _normal(2, 9, 4)
    weight, one = _normal(6, 4, 2), _normal(4, 3)
    for call in (
        lambda: library.causal_conv1d(x, _normal(6, 5, 2), None, None, 1, "none", False, "cpu"),
        lambda: library.causal_conv1d(x, weight, None, None, -3, "none", False, "cpu"),
        lambda: library.causal_conv1d(x, weight, _normal(5), None, 1, "none", False, "cpu"),
        lambda: library.causal_conv1d(x, weight, None, _normal(2, 5), 1, "none", False, "cpu"),
        lambda: library.causal_conv1d_grad_input(x, weight, 1, "cpu"),
        lambda: library.causal_conv1d_grad_weight(_normal(2, 8, 6), x, 2, 1, "cpu"),
        lambda: library.causal_conv1d_grad_weight(_normal(2, 9, 6), x, 0, 1, "cpu"),
        lambda: library.causal_conv1d_gate_backward(x, _normal(2, 9, 7), True, "cpu"),
        lambda: library.depthwise_causal_conv1d(x, _normal(5, 2), None, 1, "none", "cpu"),
        lambda: library.depthwise_causal_conv1d(x, one, None, 0, "none", "cpu"),
        lambda: library.depthwise_causal_conv1d_backward(_normal(2, 8, 4), x, one, None, 1, "none", "cpu"),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()
