"""Llama against its plain twin and against transformers, and Hugging Face's folders that are honoured or refused."""

import json

import pytest
import torch
from alike import assert_close, assert_gradients, gradients

from genai_fast import ops, use_backend
from genai_fast.errors import UsageError
from genai_fast.models import Llama, decoder_for, generate
from genai_fast.models.common import language
from genai_fast.models.llama.decoding import CachedLlama
from genai_fast.models.llama.plain import PlainLlama

SIZES = dict(vocabulary=41, block=24, layers=2, heads=4, width=32)
VARIANTS = {
    "as many heads": {},
    "everything": dict(
        kv_heads=2, head_dim=6, window=5, full_layers=1, softcap=3.0, bias="all", qk_norm=True, tied=False,
        rope_scaling="llama3:8,1,4,16", hidden=50,
    ),
    "qkv biases": dict(kv_heads=1, bias="qkv", rope_scaling="linear:2", rope_theta=500.0, window=7),
}  # fmt: skip


def small(**options):
    """Weights as after some training: biases and norms are not 0 and 1, so that a wrong one shows."""
    torch.manual_seed(0)
    model = Llama(**SIZES, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


@pytest.fixture(params=VARIANTS)
def pair(request):
    model, peer = small(**VARIANTS[request.param]), PlainLlama(**SIZES, **VARIANTS[request.param])
    peer.load_state_dict(model.state_dict())
    return model, peer


def batch(rows=3, tokens=24, seed=1):
    found = torch.randint(41, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed))
    return found[:, :-1].clone(), found[:, 1:].clone()


def test_logits_and_gradients_are_the_peers(pair, monkeypatch):
    model, peer = pair
    x, y = batch()
    y[0, 0] = -100  # does not count
    assert {*model.state_dict()} == {*peer.state_dict()}
    assert_close(model(x), peer(x))
    expected = peer.loss(x, y)
    theirs = gradients(peer, expected)
    for most in (1 << 29, 1):  # by chunks, too
        monkeypatch.setattr(language, "MOST_LOGITS", most)
        found = model.training_step(x, y).loss
        assert_close(found, expected)
        assert_gradients(gradients(model, found), theirs)


def test_no_token_sees_a_later_one_nor_one_before_its_window():
    model, (x, _) = small(window=3, kv_heads=2), batch()
    with torch.no_grad():
        before = model(x)
        x[:, 10] = (x[:, 10] + 1) % 41
        after = model(x)
    assert torch.equal(after[:, :10], before[:, :10]) and torch.equal(after[:, 15:], before[:, 15:])
    assert not torch.equal(after[:, 14], before[:, 14])  # two layers of 3 reach 4 tokens back


@pytest.mark.parametrize("options", VARIANTS.values(), ids=[*VARIANTS])
def test_step_by_step_is_the_whole_forward(options):
    model, (x, _) = small(**options), batch()
    expected = model(x).detach()
    made = [decoder_for(model, 3), CachedLlama(model, 3)]
    assert isinstance(made[0], ops.LlamaDecoder)
    for decoder in made:
        found = [decoder.prefill(x[:, :5])] + [decoder.step(x[:, t]) for t in range(5, 24)]
        torch.testing.assert_close(torch.stack(found, 1), expected[:, 4:], rtol=1e-4, atol=1e-4)
    with use_backend("reference"):
        assert isinstance(decoder_for(model, 3), CachedLlama)
    for weights, tolerance in (("bfloat16", 0.05), ("int8", 0.1)):
        found = decoder_for(model, 3, weights).prefill(x)
        assert 0 < (found - expected[:, -1]).norm() < tolerance * expected[:, -1].norm()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.model.layers[0].register_forward_hook(lambda *_: None),
        lambda m: setattr(m.model.layers[1].mlp, "act", torch.nn.Identity()),
        lambda m: setattr(m.model.layers[1].input_layernorm, "eps", 0.1),
        lambda m: setattr(m, "lm_head", torch.nn.Linear(32, 41)),
    ],
)
def test_changed_modules_are_called(change):
    model, (x, _) = small(kv_heads=2), batch()
    change(model)
    decoder = decoder_for(model, 3)
    assert isinstance(decoder, CachedLlama)
    assert_close(decoder.prefill(x), model(x)[:, -1], 1e-4)
    with pytest.raises(ValueError, match="weights: expected 'float32' for a Llama"):
        decoder_for(model, 1, "int8")


def test_positions_are_exact_whatever_becomes_of_the_model():
    model = small(rope_scaling="linear:4")
    with torch.device("meta"):
        empty = Llama(**SIZES, rope_scaling="linear:4")
    moved = empty.to_empty(device="cpu")
    moved.load_state_dict(model.state_dict())
    assert torch.equal(moved(batch()[0]), model(batch()[0])) and moved.lm_head.weight is moved.model.embed_tokens.weight
    narrow = small().bfloat16()
    assert narrow.cos.dtype is torch.float32 and narrow(batch()[0]).dtype is torch.bfloat16
    wide = small().double()
    assert wide.cos.dtype is torch.float64 and wide.float().cos.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(batch()[0]).float(), model.eval()(batch()[0]).float(), 1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_heads=3), "kv_heads: expected a divisor of heads=4, got 3"),
        (dict(heads=5), "heads: expected a divisor of width=32, got 5"),
        (dict(head_dim=7), "head_dim: expected an even number"),
        (dict(bias="some"), "bias: expected none, qkv, attention, all, got 'some'"),
        (dict(rope_scaling="yarn:2"), "rope_scaling: expected linear:FACTOR or llama3"),
        (dict(rope_scaling="llama3:2,4,1,8"), "rope_scaling: expected"),
        (dict(softcap=-1.0), "softcap: expected a finite number"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=f"^Llama: {message}"):
        Llama(**{**SIZES, **options})
    with pytest.raises(ValueError, match="expected at most block=24 tokens, got 25"):
        small()(torch.zeros(1, 25, dtype=torch.long))


def theirs(name, **settings):
    pytest.importorskip("transformers")
    from hugging_face_models import language_model

    return language_model(name, **settings).eval()


_LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
FOLDERS = [
    ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    ("llama", dict(rope_parameters=_LLAMA3, rms_norm_eps=1e-3)),
    ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    ("mistral", {}),
    ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    ("qwen3", dict(tie_word_embeddings=True, head_dim=32)),
]


@pytest.mark.parametrize(("name", "settings"), FOLDERS, ids=[f"{name}-{k}" for k, (name, _) in enumerate(FOLDERS)])
@torch.no_grad()
def test_a_folder_computes_and_writes_what_transformers_does(tmp_path, name, settings):
    peer = theirs(name, **settings)
    peer.save_pretrained(tmp_path, max_shard_size="60KB" if name == "mistral" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (name == "mistral")
    model, x = Llama.from_pretrained(tmp_path), batch(2)[0] + 3
    assert isinstance(decoder_for(model, 1), ops.LlamaDecoder)
    torch.testing.assert_close(model(x), peer(x).logits, rtol=1e-4, atol=1e-4)
    expected = peer.generate(x[:1, :6], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(generate(model, x[0, :6], max_tokens=30, temperature=0)) == expected[0, 6:].tolist()


def test_settings_as_earlier_versions_wrote_them(tmp_path):
    theirs("llama", rope_parameters=_LLAMA3).save_pretrained(tmp_path)
    before = Llama.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    after = Llama.from_pretrained(tmp_path, block=20)
    assert torch.equal(after(batch(2, 20)[0]), before(batch(2, 20)[0])) and after.block == 20


REFUSED = [
    ("hidden_act", "gelu", "hidden_act: expected silu"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "rope_type: expected default, linear or llama3, got"),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("quantization_config", {"bits": 4}, "quantization_config: expected None"),
    ("attention_dropout", 0.1, "attention_dropout: expected 0.0"),
    ("residual_multiplier", 0.2, "residual_multiplier: expected settings that models.Llama knows"),
    ("sliding_window", 8, "sliding_window: expected none in a llama"),
    ("mlp_bias", True, "mlp_bias: expected false, or attention_bias too"),
    ("num_hidden_layers", None, "num_hidden_layers: expected at least 1"),
    ("num_hidden_layers", 3, r"layers\.2\..*: expected a tensor .*, got none"),
    ("intermediate_size", 95, r"expected shape \[.*95.*\], got"),
    ("model_type", "gemma2", "model_type: expected llama or mistral or qwen2 or qwen3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "message"), REFUSED, ids=[f"{key}-{k}" for k, (key, *_) in enumerate(REFUSED)]
)
def test_settings_of_another_network_are_refused(tmp_path, key, value, message):
    theirs("llama").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
    with pytest.raises(UsageError, match=message):
        Llama.from_pretrained(tmp_path)
