"""Attention: what holds for any kernel, and agreement with PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from genai_fast import ops, use_backend
from genai_fast.backends import unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [b for b in ("reference", "cpu", "triton") if not unavailable(b, DEVICE)]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


def _heads(batch, heads, queries, channels, keys=None, key_heads=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, key_heads = keys or queries, key_heads or heads
    shapes = (heads, queries), (key_heads, keys), (key_heads, keys)
    return [torch.randn(batch, h, n, channels, generator=generator).to(DEVICE).requires_grad_() for h, n in shapes]


def _gradients(out, inputs):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return torch.autograd.grad(out, inputs, upstream)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_equals_scaled_dot_product_attention(causal, key_heads):
    inputs = _heads(2, 4, 70, 32, key_heads=key_heads)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=key_heads != 4)
    got = ops.causal_attention(*inputs, causal=causal)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(_gradients(got, inputs), _gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fewer_queries_than_keys_are_the_last_ones():
    inputs = _heads(1, 2, 30, 16, keys=100)
    ones = torch.ones(30, 100, dtype=torch.bool, device=DEVICE)
    for window in (None, 8, 1):
        seen = ones.tril(70) if window is None else ones.tril(70) & ~ones.tril(70 - window)
        expected = F.scaled_dot_product_attention(*inputs, attn_mask=seen)
        got = ops.causal_attention(*inputs, window=window)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_future_changes_nothing():
    q, k, v = _heads(1, 2, 150, 16)
    before = ops.causal_attention(q, k, v)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, 100:] += 5.0
    after = ops.causal_attention(q, k, v)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


def test_grouped_heads_equal_repeated_ones():
    q, k, v = _heads(1, 6, 70, 16, key_heads=2)
    out = ops.causal_attention(q, k, v)
    repeated = ops.causal_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(out, repeated, rtol=1e-6, atol=1e-6)
    for a, b in zip(_gradients(out, (q, k, v)), _gradients(repeated, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_parts_of_the_keys_combine_to_the_whole():
    q, k, v = _heads(1, 2, 5, 16, keys=130)
    whole, whole_lse = ops.causal_attention(q, k, v, causal=False, return_lse=True)
    parts = [
        ops.causal_attention(q, k[:, :, at], v[:, :, at], causal=False, return_lse=True)
        for at in (slice(0, 37), slice(37, 130))
    ]
    lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    combined = sum(out * torch.exp(part - lse).unsqueeze(-1) for out, part in parts)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(combined, whole, rtol=1e-5, atol=1e-5)
    # and so do their gradients, through the lse of each part
    for a, b in zip(_gradients(combined, (q, k, v)), _gradients(whole, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_permuted_batch_and_heads():
    q, k, v = _heads(3, 2, 70, 16)
    samples, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    moved = ops.causal_attention(*(x[samples][:, heads] for x in (q, k, v)))
    assert torch.equal(moved, ops.causal_attention(q, k, v)[samples][:, heads])


def test_a_window_of_the_whole_is_none():
    inputs = _heads(1, 2, 90, 16)
    whole, windowed = ops.causal_attention(*inputs), ops.causal_attention(*inputs, window=90)
    assert torch.equal(whole, windowed)
    for a, b in zip(_gradients(whole, inputs), _gradients(windowed, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [{}, {"window": 20}, {"causal": False}, {"softcap": 2.0}], ids=str)
def test_packed_sequences_equal_separate_ones(settings):
    lengths = (40, 1, 0, 80)
    starts = torch.tensor([0, 40, 41, 41, 121], dtype=torch.int32, device=DEVICE)
    q, k, v = _heads(1, 2, 121, 16, key_heads=1)
    packed = ops.causal_attention(q, k, v, cu_seqlens_q=starts, max_seqlen_q=80, max_seqlen_k=80, **settings)
    parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    apart = torch.cat([ops.causal_attention(*part, **settings) for part in parts], 2)
    torch.testing.assert_close(packed, apart, rtol=1e-6, atol=1e-6)
    for a, b in zip(_gradients(packed, (q, k, v)), _gradients(apart, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_step_by_step_equals_at_once():
    q, k, v = _heads(1, 2, 70, 16, key_heads=1)
    times = [0, 1, 15, 16, 17, 63, 64, 69]
    with torch.no_grad():
        at_once = ops.causal_attention(q, k, v)
        steps = [ops.causal_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]) for t in times]
    torch.testing.assert_close(torch.cat(steps, 2), at_once[:, :, times], rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_give_zero():
    q, k, v = _heads(1, 1, 8, 16, keys=5)
    starts_q = torch.tensor([0, 8], dtype=torch.int32, device=DEVICE)
    starts_k = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    out, lse = ops.causal_attention(q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, return_lse=True)
    grad_q, grad_k, grad_v = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert (out[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == -torch.inf).all()
    assert (grad_q[:, :, :3] == 0).all()
    assert grad_k.isfinite().all()
    assert grad_v.isfinite().all()


def test_dropout_drops_a_share_and_keeps_the_mean():
    q, k = torch.zeros(1, 2, 64, 16, device=DEVICE), torch.zeros(1, 2, 200, 16, device=DEVICE)
    v = torch.eye(200, 200, device=DEVICE).expand(1, 2, 200, 200)[..., :16]  # shows the first 16 probabilities
    out = ops.causal_attention(q, k, v, causal=False, dropout=0.25, seed=3)
    shown = out * 200
    kept = shown != 0
    torch.testing.assert_close(shown[kept], torch.full_like(shown[kept], 4 / 3))
    dropped = 1 - kept.float().mean().item()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / shown.numel()) ** 0.5


def test_dropout_follows_the_default_generator():
    inputs = _heads(1, 1, 20, 16)
    torch.manual_seed(5)
    first, second = (ops.causal_attention(*inputs, dropout=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, ops.causal_attention(*inputs, dropout=0.5))
    assert not torch.equal(first, second)


def test_views_of_a_projection_come_back_without_a_copy():
    packed = torch.randn(2, 40, 3, 4, 16, device=DEVICE, requires_grad=True)
    out = ops.causal_attention(*packed.permute(2, 0, 3, 1, 4).unbind(0))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    (gradient,) = torch.autograd.grad(out.sum(), packed)
    assert gradient.shape == packed.shape
    rows = [x.detach().contiguous() for x in packed.permute(2, 0, 3, 1, 4).unbind(0)]
    assert ops.causal_attention(*rows).is_contiguous()
    torch.testing.assert_close(ops.causal_attention(*rows), out.detach(), rtol=1e-6, atol=1e-6)


def test_autocast():
    inputs = _heads(1, 2, 20, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ops.causal_attention(*inputs)
    assert out.dtype is torch.bfloat16
    assert all(g.dtype is torch.float32 for g in torch.autograd.grad(out.sum(), inputs))


def test_library_calls_check_too():
    q, k, v = (x.detach() for x in _heads(1, 4, 6, 8, key_heads=2))
    settings = (None, None, 6, 6, None, 1.0, 0, 0.0, True, 0.0, 0, "cpu" if DEVICE == "cpu" else "triton")
    with pytest.raises(ValueError, match="genai_fast: expected q"):
        torch.ops.genai_fast.causal_attention(q, k, v[:, :1], *settings)
