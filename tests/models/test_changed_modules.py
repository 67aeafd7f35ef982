"""Models whose modules were changed compute what plain PyTorch's do: adapters, hooks, quantization."""

import pytest
import torch
from alike import assert_close, assert_gradients_close, gradients
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from genai_fast import ops
from genai_fast.layers import LayerNorm, RMSNorm
from genai_fast.models import GPT, VRNN, LSTMLanguageModel, Seq2Seq, TextVAE, decoder_for, generate
from genai_fast.models.common import language
from genai_fast.models.gpt.decoding import CachedGPT
from genai_fast.models.gpt.plain import PlainGPT
from genai_fast.models.lstm.plain import PlainLSTMLanguageModel
from genai_fast.models.seq2seq.plain import PlainSeq2Seq
from genai_fast.models.text_vae.plain import PlainTextVAE
from genai_fast.models.vrnn.plain import PlainVRNN

V, END = 20, 0


class Adapter(nn.Module):
    """Beside the module that it holds, a matrix; with weight and bias of that module, as PEFT's have."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.delta = nn.Parameter(0.1 * torch.ones(base.weight.shape))

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        embeds = isinstance(self.base_layer, nn.Embedding)
        return self.base_layer(x) + (self.delta[x] if embeds else x @ self.delta.t())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Opaque(nn.Module):
    """Without a weight of its own."""

    def __init__(self, base):
        super().__init__()
        self.inner = base

    def forward(self, *x, **more):
        return self.inner(*x, **more)


def put(model, path, make):
    owner, _, name = path.rpartition(".")
    owner = model.get_submodule(owner)
    child = model.get_submodule(path)
    new = make(child)
    if new is not None:
        owner.add_module(name, new)


def hook(child):
    child.register_forward_hook(lambda module, given, found: found + 1)


def parametrized(child):
    parametrize.register_parametrization(child, "weight", Doubled())


CHANGES = {
    "adapter": Adapter,
    "opaque": Opaque,
    "hook": hook,
    "parametrized": parametrized,
    "quantized": lambda child: torch.ao.quantization.quantize_dynamic(nn.Sequential(child), {nn.Linear})[0],
}


def spread(model):
    """Weights as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def gpts():
    torch.manual_seed(0)
    sizes = dict(vocabulary=V, block=12, layers=2, heads=2, width=16)
    model, peer = spread(GPT(**sizes)), PlainGPT(**sizes)
    peer.load_state_dict(model.state_dict())
    return model, peer


def tokens(rows=2, length=8, seed=2):
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(seed))


GPT_PLACES = (
    "transformer.wte", "transformer.wpe", "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "lm_head",
)  # fmt: skip


def cases(*places):
    """Each place with each change; those that no linear layer is at have no quantized form."""
    for place in places:
        for change in CHANGES:
            if change != "quantized" or not place.endswith(("wte", "wpe", "positions", "embed", "ln_f")):
                yield pytest.param(place, change, id=f"{place}-{change}")


def assert_alike(model, peer, found, expected):
    assert_close(found, expected, 1e-4)
    assert_gradients_close(gradients(model, found), gradients(peer, expected), 1e-3)


@pytest.mark.parametrize("many_logits", [False, True])
@pytest.mark.parametrize("place, change", cases(*GPT_PLACES))
def test_a_changed_gpt(place, change, many_logits, monkeypatch):
    if many_logits:
        monkeypatch.setattr(language, "MOST_LOGITS", 1)
    (model, peer), x = gpts(), tokens()
    for m in (model, peer):
        put(m, place, CHANGES[change])
    assert_close(model(x), peer(x), 1e-4)
    y = tokens(seed=3)
    found, expected = model.training_step(x, y).loss, nn.functional.cross_entropy(peer(x).flatten(0, 1), y.flatten())
    assert_alike(model, peer, found, expected)


@pytest.mark.parametrize("place, change", cases(*GPT_PLACES, "transformer.ln_f"))
def test_a_changed_gpt_generates(place, change):
    model, _ = gpts()
    if place == "transformer.ln_f" and change in ("adapter", "opaque"):
        put(model, place, lambda _: nn.LayerNorm(16, eps=0.1) if change == "opaque" else RMSNorm(16))
    else:
        put(model, place, CHANGES[change])
    model.eval()
    x = tokens(1, 3)[0].tolist()
    found = list(generate(model, x, max_tokens=6, temperature=0))
    for _ in range(6):
        x.append(int(model(torch.tensor([x]))[0, -1].argmax()))
    assert found == x[3:]


def test_a_gpts_decoder_serves_what_it_reads():
    def cut(m):
        m.block = 8

    def other_norms(m):
        for module in m.modules():
            if isinstance(module, LayerNorm):
                module.eps = 0.1

    for change in (lambda m: None, cut, other_norms):
        model = gpts()[0].eval()
        change(model)
        decoder, x = decoder_for(model, 2), tokens()
        assert isinstance(decoder, ops.GPTDecoder)
        assert_close(decoder.prefill(x), model(x)[:, -1], 1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "lm_head", nn.Linear(16, V)),
        lambda m: setattr(m, "lm_head", nn.Linear(16, 5, bias=False)),
        lambda m: setattr(m.transformer.h[0].ln_1, "eps", 0.1),
        lambda m: setattr(m.transformer.wte, "max_norm", 0.1),
        lambda m: m.register_buffer("more", torch.zeros(1)),
        lambda m: setattr(m.transformer.h[1], "mlp", Opaque(m.transformer.h[1].mlp)),
        lambda m: setattr(m.transformer.h[0], "ln_2", LayerNorm(16, elementwise_affine=False)),
    ],
)
def test_a_gpt_that_only_modules_decode(change):
    model, x = gpts()[0].eval(), tokens()
    change(model)
    with torch.no_grad():
        expected = model(x)[:, -1]
    decoder = decoder_for(model, 2)
    assert isinstance(decoder, CachedGPT)
    decoder.prefill(x[:, :5])
    for t in range(5, 8):
        found = decoder.step(x[:, t])
    assert_close(found, expected, 1e-4)


def test_hooks_on_all_modules_are_called_while_a_gpt_decodes():
    model, seen = gpts()[0].eval(), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        list(generate(model, [1], max_tokens=1))
    assert model.lm_head in seen and model.transformer.h[1].mlp.c_fc in seen


@pytest.mark.parametrize(
    "place, change",
    cases("encoder_blocks.0.feed.up", "decoder_blocks.0.feed.up", "source_positions", "target_positions"),
)
def test_a_changed_seq2seq(place, change):
    sizes = (V, END, 10, 1, 2, 16)
    torch.manual_seed(0)
    model, peer = spread(Seq2Seq(*sizes, dropout=0.0)), PlainSeq2Seq(*sizes, dropout=0.0)
    peer.load_state_dict(model.state_dict())
    for m in (model, peer):
        put(m, place, CHANGES[change])
    source, lengths, target = tokens(), torch.tensor([8, 5]), tokens(seed=3)
    found, expected = (m(source, lengths, target) for m in (model, peer))
    rounds = change == "quantized"  # int8: an ulp before it may be a step behind
    if rounds:
        assert_close(found, expected, 2e-2)
    else:
        assert_alike(model, peer, found.square().sum(), expected.square().sum())
    model.eval()
    decoder = model.decoder(model.encode(source, lengths))
    for t in range(8):
        last = decoder.step(target[:, t])
    assert_close(last, expected[:, -1], 2e-2 if rounds else 1e-4)


def shift(attention):
    attention.register_forward_hook(lambda module, given, found: found + 1)


@pytest.mark.parametrize("place", ["attention", "cross"])
@pytest.mark.parametrize("change", [shift, Opaque])
def test_a_seq2seq_with_changed_attentions_writes(place, change):
    model = spread(Seq2Seq(V, END, 10, 1, 2, 16, dropout=0.5)).eval()
    put(model, f"decoder_blocks.0.{place}", change)
    source, lengths, target = tokens(), torch.tensor([8, 5]), tokens(seed=3)
    with torch.no_grad():
        expected = model(source, lengths, target)
        memory = model.encode(source, lengths)
    model.train()  # a decoder has no dropout whatever the mode
    decoder = model.decoder(memory)
    assert_close(torch.stack([decoder.step(target[:, t]) for t in range(8)], 1), expected, 1e-4)
    assert model.training and not decoder.step(target[:, 0]).requires_grad


VRNN_PLACES = ("encoder.0", "encoder.2", "phi_z.0", "cell")


@pytest.mark.parametrize(
    "place, change",
    [case for case in cases(*VRNN_PLACES) if case.id not in ("cell-adapter", "cell-parametrized", "cell-hook")],
)
def test_a_changed_vrnn(place, change, monkeypatch):
    torch.manual_seed(0)
    model, peer = spread(VRNN(V, 6, 10, 4)), PlainVRNN(V, 6, 10, 4)
    peer.load_state_dict(model.state_dict())
    for m in (model, peer):
        put(m, place, CHANGES[change])
    x = tokens(length=4)
    noise = iter(ops.reparameterize(torch.zeros(4, 2, 4), torch.zeros(4, 2, 4), seed=3))
    monkeypatch.setattr(peer, "reparameterize", lambda mu, logvar: mu + torch.exp(0.5 * logvar) * next(noise))
    assert_alike(model, peer, model.training_step(x, seed=3).loss, peer.loss(x))


@pytest.mark.parametrize("change", ["hook", "weight_norm", "quantized", "without_dropout"])
def test_a_changed_lstm(change):
    def put_in(m):
        if change == "hook":
            m.lstm.register_forward_hook(lambda module, given, found: (found[0] + 1, found[1]))
        elif change == "weight_norm":
            parametrizations.weight_norm(m.lstm, "weight_hh_l1")
        elif change == "without_dropout":
            m.lstm.dropout = 0.0
        else:
            torch.ao.quantization.quantize_dynamic(m, {nn.LSTM, nn.Linear}, inplace=True)

    torch.manual_seed(0)
    drop = 0.5 if change == "without_dropout" else 0.0
    model, peer = spread(LSTMLanguageModel(V, 8, 8, 2, drop)), PlainLSTMLanguageModel(V, 8, 8, 2, drop)
    peer.load_state_dict(model.state_dict())
    for m in (model, peer):
        put_in(m)
    model.dropout = peer.drop.p = 0.0
    x, y, carry = tokens(), tokens(seed=3), torch.ones(2)
    assert_alike(model, peer, model.training_step(x, y, carry).loss, peer.loss(x, y, carry))
    model.eval()
    with torch.no_grad():
        expected = model(x)[0][:, -1]
        assert_close(decoder_for(model, 2).prefill(x), expected, 1e-5)


def test_a_text_vae_with_quantized_layers_writes():
    torch.manual_seed(0)
    model = TextVAE(V, END, 8, 16, 4).eval()
    plain = PlainTextVAE(V, END, 8, 16, 4).eval()
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True)
    prompt = tokens(1, 5)[0]
    found = list(model.generate_ids(prompt, longest=6))
    pick = plain.generate(prompt[:-1].tolist(), lambda logits: int(logits.argmax()), int(prompt[-1]))
    expected = []
    for token, _ in zip(pick, range(6), strict=False):
        if token == END:
            break
        expected.append(token)
    assert found == expected
    assert len(list(model.generate_ids(longest=3, seed=1))) <= 3
