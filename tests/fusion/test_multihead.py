"""nn.MultiheadAttention by our attention; its weights are not computed where they are not used, and only there."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from alike import assert_alike, assert_close, calls_of, step
from torch import nn

from genai_fast import explain, fuse, layers, unfuse, use_backend

pytestmark = pytest.mark.usefixtures("small_is_fused")
B, T, E, H = 2, 9, 16, 4


class _Base(nn.Module):
    def __init__(self, batch_first=True, **more):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(E), nn.MultiheadAttention(E, H, batch_first=batch_first, **more)
        self.register_buffer("later", torch.ones(T, T, dtype=torch.bool).triu(1))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(T))


class _First(_Base):
    def forward(self, x):
        h = self.norm(x)
        return x + self.attn(h, h, h)[0]


class _Unpacked(_Base):
    def forward(self, x):
        y, _ = self.attn(x, x, x, attn_mask=self.later)
        return self.norm(x + y)


class _Named(_Base):
    def forward(self, x):
        out, _weights = self.attn(query=x, key=x, value=x, attn_mask=self.mask, average_attn_weights=False)
        return self.norm(out)


class _Hinted(_Base):
    def __init__(self):
        super().__init__(batch_first=False, bias=False)

    def forward(self, x):
        x = x.transpose(0, 1)
        x = x + self.attn(x, x, x, need_weights=False, attn_mask=self.mask, is_causal=True)[0]
        return x.transpose(0, 1)


class _Crossed(_Base):
    def __init__(self):
        super().__init__(kdim=8, vdim=8)

    def forward(self, x):
        memory = x[:, :5, :8]
        if self.training:
            out, _ = self.attn(x, memory, memory, None)
        else:
            out = self.attn(x, memory, memory)[0]
        return out


class _Shared(_Base):
    def forward(self, x):
        return self.attn(x, x.flip(1), x.flip(1)[:, :T])[0]


class _Memory(_Base):
    def forward(self, x):
        memory = x.flip(1)
        return self.attn(x, memory, memory)[0]


SPELLINGS = (_First, _Unpacked, _Named, _Hinted, _Crossed, _Shared, _Memory)


class _Read(_Base):
    def forward(self, x):
        y, weights = self.attn(x, x, x)
        return y + weights.sum()


class _Second(_Base):
    def forward(self, x):
        return self.attn(x, x, x)[1]


class _Asked(_Base):
    def forward(self, x):
        return self.attn(x, x, x, need_weights=True)[0]


class _Kept(_Base):
    def forward(self, x):
        found = self.attn(x, x, x)
        return found[0]


class _Seen(_Base):
    def forward(self, x):
        y, _ = self.attn(x, x, x)
        return y * len(locals())


class _Padded(_Base):
    def forward(self, x):
        return self.attn(x, x, x, key_padding_mask=self.later[:B, :T])[0]


class _Windowed(_Base):
    def forward(self, x):
        return self.attn(x, x, x, attn_mask=self.later | self.later.t().roll(2, 0).tril(-3))[0]


class _More(_Base):
    def __init__(self):
        super().__init__(add_bias_kv=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


NEAR_MISSES = (_Read, _Second, _Asked, _Kept, _Seen, _Padded, _Windowed, _More)


def _pair(cls, **settings):
    torch.manual_seed(0)
    plain = cls(**settings)
    for parameter in plain.attn.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases begin with 0
    return fuse(copy.deepcopy(plain)), plain


@pytest.mark.parametrize("cls", SPELLINGS, ids=lambda cls: cls.__name__)
def test_results_and_training_steps_are_pytorchs(cls):
    fused, plain = _pair(cls)
    with calls_of("causal_attention") as made:
        assert_alike(fused, plain, torch.randn(B, T, E))
    assert len(made) == 5
    assert "layers.MultiheadAttention" in [row.becomes for row in explain(fused)]
    assert type(pickle.loads(pickle.dumps(fused)).attn) is nn.MultiheadAttention
    assert type(unfuse(fused).attn) is nn.MultiheadAttention


@pytest.mark.parametrize("cls", NEAR_MISSES, ids=lambda cls: cls.__name__)
def test_a_near_miss_is_pytorchs(cls):
    fused, plain = _pair(cls)
    x = torch.randn(B, T, E)
    with calls_of("causal_attention") as made:
        (found,), gradients = step(fused, x)
    (expected,), of_plain = step(plain, x)
    assert not made and torch.equal(found, expected)
    assert all(torch.equal(gradients[name], g) for name, g in of_plain.items())


def test_hooks_see_the_weights():
    fused, plain = _pair(_First)
    for model in (fused, plain):
        model.seen = []
        model.attn.register_forward_hook(lambda m, given, result, seen=model.seen: seen.append(result[1]))
        model(torch.ones(B, T, E))
    assert torch.equal(fused.seen[0], plain.seen[0])


def test_functions_replaced_are_called(monkeypatch):
    fused, plain = _pair(_Unpacked)
    x = torch.randn(B, T, E)
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda self, q, k, v, **named: (2 * q, None))
    assert torch.equal(fused(x), plain(x))


def test_dropout_drops_its_share_and_a_seed_repeats_it():
    fused, _ = _pair(_First, dropout=0.5)
    x = torch.randn(B, T, E)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(fused(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    with torch.no_grad():
        mean = torch.stack([fused(x) - x for _ in range(3000)]).mean(0)
        assert_close(mean, fused.eval()(x) - x, 0.1)
    kept = fuse(_First(dropout=0.5), random=False)
    assert type(kept.attn) is nn.MultiheadAttention


def test_second_derivatives():
    fused, plain = _pair(_Hinted)
    found = []
    for model in (fused, plain):
        x = torch.linspace(-1, 1, B * T * E).view(B, T, E).requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # PyTorch's others have none
            (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            g.norm().backward()
        found.append(x.grad)
    assert_close(*found)


@pytest.mark.parametrize("norm_first", (False, True))
def test_an_encoder_of_pytorchs(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    fused = fuse(copy.deepcopy(plain))
    with calls_of("causal_attention") as made:
        assert_alike(fused, plain, torch.randn(B, T, E), steps=2)
    assert made


def test_without_a_batch_and_with_a_wrong_size_it_is_pytorchs():
    attn = layers.MultiheadAttention(E, H)
    x = torch.randn(T, E)
    plain = nn.MultiheadAttention(E, H)
    plain.load_state_dict(attn.state_dict())
    assert torch.equal(attn(x, x, x, need_weights=False)[0], plain(x, x, x, need_weights=False)[0])
    with pytest.raises(AssertionError, match="embedding"):
        attn(x[:, :3], x, x, need_weights=False)
    with pytest.raises(RuntimeError, match="is_causal"):
        attn(x, x, x, need_weights=False, is_causal=True)


@pytest.mark.parametrize("settings", (dict(), dict(num_layers=2, bidirectional=True, batch_first=True, bias=False)))
def test_lstm_is_pytorchs_and_ours_within_use_backend(settings):
    torch.manual_seed(0)
    plain = nn.LSTM(6, 8, **settings)
    own = layers.LSTM(6, 8, **settings)
    own.load_state_dict(plain.state_dict())
    x = torch.randn(3, 4, 6)
    count = settings.get("num_layers", 1) * (1 + settings.get("bidirectional", False))
    states = tuple(torch.randn(count, 3 if settings else 4, 8) for _ in range(2))
    expected = plain(x, states)
    with calls_of("lstm") as made:
        y, (h, c) = own(x, states)
        assert not made and torch.equal(y, expected[0])
        with use_backend("reference"):
            y, (h, c) = own(x.requires_grad_(), states)
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            assert torch.autograd.grad(g.sum(), x)[0].abs().sum() > 0
    assert len(made) == count
    for found, value in zip((y, h, c), (expected[0], *expected[1]), strict=True):
        assert_close(found, value)
    with use_backend("reference"):
        assert_close(own(x)[0], plain(x)[0])
        assert_close(own(x[:, 0])[0], plain(x[:, 0])[0])
    with pytest.raises((IndexError, RuntimeError)), use_backend("reference"):
        own(x, states[0])


@pytest.mark.parametrize("settings", (dict(), dict(num_layers=2, bidirectional=True, batch_first=True, bias=False)))
def test_an_lstm_that_generates_runs_cells(settings, monkeypatch):
    torch.manual_seed(0)
    plain, made, cell = nn.LSTM(6, 8, **settings), [], torch.lstm_cell
    fused = fuse(copy.deepcopy(plain))
    monkeypatch.setattr(torch, "lstm_cell", lambda *given: made.append(given) or cell(*given))
    count = settings.get("num_layers", 1) * (1 + settings.get("bidirectional", False))
    for shape, steps in (((1, 1, 6), 1), ((1, 6), 1), ((3, 6), 3), ((9, 9, 6), 0)):
        x, states = torch.randn(shape), None
        for _ in range(2):
            made.clear()
            with torch.no_grad():
                y, after = fused(x, states)
                expected, other = plain(x, states)
            assert len(made) == steps * count
            for found, value in zip((y, *after), (expected, *other), strict=True):
                assert_close(found, value)
            states = after
    made.clear()
    fused(torch.randn(1, 1, 6))
    assert not made  # with gradients it is PyTorch's
    assert type(unfuse(fused)) is nn.LSTM


def test_functional_attention_replaced_is_called(monkeypatch):
    fused, plain = _pair(_Hinted)
    x = torch.randn(B, T, E)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *args, **named: 2 * v)
    assert torch.equal(fused(x), plain(x))
