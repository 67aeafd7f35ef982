"""enable_sdpa: other people's models on our attention, and everything back in its place afterwards."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import attention

import genai_fast
from genai_fast import sdpa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}[DEVICE]


@pytest.fixture
def served(monkeypatch):
    """How often each library op of ours was called."""
    calls, call = [], sdpa.library_call

    def counted(name, *arguments):
        calls.append(name)
        return call(name, *arguments)

    monkeypatch.setattr(sdpa, "library_call", counted)
    return calls


class Block(nn.Module):
    """A decoder layer as tutorials write it."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, symbols=96, channels=64, heads=4, layers=2, context=48):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(symbols, channels), nn.Embedding(context, channels)
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, symbols, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


def _losses(steps=50):
    torch.manual_seed(0)
    model = GPT().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list((sdpa.__doc__ + (enable := sdpa.enable_sdpa.__doc__) + enable).encode())).clamp(max=95)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text) - 49, (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([text[s : s + 49] for s in starts]).to(DEVICE)
        with torch.autocast(DEVICE, DTYPE, enabled=DTYPE is not torch.float32):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def test_somebody_elses_gpt_learns_the_same(served):
    plain = _losses()
    assert not served
    with genai_fast.enable_sdpa():
        ours = _losses()
    assert len(served) == 50 * 2 * 2  # steps, layers, forward and backward
    tolerance = dict(rtol=1e-3, atol=1e-3) if DTYPE is torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours, plain, **tolerance)
    assert plain[-1] < 0.75 * plain[0]


def _inputs(tokens=20, keys=None, heads=4):
    shapes = (heads, tokens), (heads, keys or tokens), (heads, keys or tokens)
    return [torch.randn(2, h, n, 16, device=DEVICE, dtype=DTYPE, requires_grad=True) for h, n in shapes]


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=(q[0, 0] @ k[0, 0].mT).abs() >= 0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], dropout_p=0.5, enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(q[..., ::2], k[..., ::2], v[..., ::2], dropout_p=0.5),
        lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()),
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :5], k, v, is_causal=True),
    ],
    ids=["mask", "dropout of grouped queries", "dropout of strided channels", "float64", "unequal"],
)
def test_other_calls_go_where_they_went(served, call):
    inputs = _inputs()

    def run():
        torch.manual_seed(3)
        out = call(*inputs)
        return [out, *torch.autograd.grad(out.sum(), inputs)]

    expected = run()
    with genai_fast.enable_sdpa():
        got = run()
    assert not served
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


on_a_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA PyTorch's own kernel has dropout")


@pytest.fixture
def dropped(monkeypatch):
    """The share of each call with dropout that is ours."""
    calls, call = [], sdpa.causal_attention

    def counted(*arguments, **settings):
        calls.append(settings["dropout"])
        return call(*arguments, **settings)

    monkeypatch.setattr(sdpa, "causal_attention", counted)
    return calls


@on_a_cpu
@pytest.mark.parametrize("causal", [False, True])
def test_dropout(dropped, causal):
    """Drawn from the default generator alone, unbiased, repeated by its seed; gradients are those of what it drew."""
    q, k, v = _inputs()
    weights = torch.eye(20).expand(2, 4, 20, 20)[..., :16]  # each output is a probability
    with genai_fast.enable_sdpa():
        expected = F.scaled_dot_product_attention(q, k, weights, is_causal=causal)
        other = torch.Generator().manual_seed(1)
        state, mean = other.get_state(), 0.0
        torch.manual_seed(3)
        for _ in range(300):
            out = F.scaled_dot_product_attention(q, k, weights, dropout_p=0.4, is_causal=causal)
            mean = mean + out.detach() / 300
        kept = out[expected > 1e-6]
        assert 0.35 < (kept == 0).float().mean() < 0.45
        torch.testing.assert_close(kept[kept != 0], expected[(expected > 1e-6) & (out != 0)] / 0.6)
        assert (mean - expected).abs().max() < 0.25 and (mean - expected).mean().abs() < 2e-3
        found = []
        for _ in range(2):
            torch.manual_seed(5)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=causal)
            found.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    assert all(map(torch.equal, *found)) and dropped == [0.4] * 302
    assert torch.equal(other.get_state(), state)
    along = torch.randn_like(v)
    torch.testing.assert_close((found[0][3] * along).sum(), (_dropped(q, k, along, causal)).sum(), rtol=1e-4, atol=1e-3)


@on_a_cpu
def test_dropout_of_a_backend_that_is_asked_for(dropped):
    """And a probability that is none is refused in PyTorch's words."""
    q, k, v = _inputs()
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        torch.manual_seed(5)
        expected = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        with genai_fast.enable_sdpa():
            torch.manual_seed(5)
            assert torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=0.4), expected)
    with genai_fast.enable_sdpa(), pytest.raises(RuntimeError, match="dropout probability has to be between 0 and 1"):
        F.scaled_dot_product_attention(q, k, v, dropout_p=2.0)
    assert not dropped


@on_a_cpu
@pytest.mark.parametrize("causal", [False, True])
def test_results_of_dropout_lie_as_pytorchs(dropped, causal):
    q, k, v = (torch.randn(2, 16, 4, 8).transpose(1, 2) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=causal)
    with genai_fast.enable_sdpa():
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=causal)
    assert dropped and found.stride() == expected.stride()


def _dropped(q, k, v, causal):
    """Linear in v: the output for the same draw."""
    torch.manual_seed(5)
    with genai_fast.enable_sdpa():
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=causal)


@on_a_cpu
def test_a_transformer_in_training_is_served(dropped):
    torch.manual_seed(0)
    model, source, target = nn.Transformer(32, 4, 1, 1, 64), torch.randn(9, 2, 32), torch.randn(7, 2, 32)
    with genai_fast.enable_sdpa():
        model(source, target).sum().backward()
        assert dropped == [0.1] * 3 and all(p.grad.isfinite().all() for p in model.parameters())
        model.eval()(source, target)
    model.train()(source, target)
    assert len(dropped) == 3


@on_a_cpu
def test_dropout_under_transforms_and_compilers_is_pytorchs(dropped):
    q = _inputs()[0].detach()

    def loss(q):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3).square().sum()

    with genai_fast.enable_sdpa():
        torch._dynamo.reset()
        assert torch.func.grad(loss)(q).shape == q.shape
        assert torch.compile(loss, fullgraph=True, backend="aot_eager")(q).isfinite()
        assert torch.vmap(loss, randomness="different")(torch.stack([q, q])).shape == (2,)
        assert F.scaled_dot_product_attention(*[q.to("meta")] * 3, dropout_p=0.3).shape == q.shape
        assert not dropped
        x = q.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        first.sum().backward()
    assert dropped == [0.3] and x.grad.isfinite().all()


def test_without_causal_mask(served):
    inputs = _inputs(keys=31)
    expected = F.scaled_dot_product_attention(*inputs)
    with genai_fast.enable_sdpa():
        got = F.scaled_dot_product_attention(*inputs)
        gradients = torch.autograd.grad(got.sum(), inputs)
    assert served == ["causal_attention", "causal_attention_backward"]
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_switching_off_restores_everything(served):
    inputs = [x.detach() for x in _inputs()]
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    order = torch._C._get_sdp_priority_order()
    switch = genai_fast.enable_sdpa()
    assert genai_fast.enable_sdpa() is switch  # once is enough
    assert attention.current_flash_attention_impl() == "genai_fast"
    F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert len(served) == 1
    attention.restore_flash_attention_impl()  # PyTorch's own way
    switch.remove()
    assert attention.current_flash_attention_impl() is None
    assert torch._C._get_sdp_priority_order() == order
    assert torch.equal(F.scaled_dot_product_attention(*inputs, is_causal=True), expected)
    assert len(served) == 1
    with genai_fast.enable_sdpa():
        F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert len(served) == 2


def test_under_compile(served):
    inputs = _inputs()

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    expected = function(*inputs)
    with genai_fast.enable_sdpa():
        torch._dynamo.reset()
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        gradients = torch.autograd.grad(got.sum(), inputs)
    assert "causal_attention_backward" in served
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::genai_fast.FallbackWarning")
def test_without_a_kernel(monkeypatch):
    monkeypatch.setattr(sdpa, "choose", lambda *arguments: ("reference", "it was not built"))
    with pytest.raises(RuntimeError, match=r"enable_sdpa: .*it was not built"):
        genai_fast.enable_sdpa()
