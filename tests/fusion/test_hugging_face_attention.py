"""Attention of transformers' models by our kernel: what their own eager attention gives."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="pip install .[huggingface]")

from alike import assert_close, assert_gradients_close, calls_of
from hugging_face_models import LANGUAGE_MODELS, TOKENS, language_model, tokens

from genai_fast import fuse, register_attention

every = pytest.mark.parametrize("name", LANGUAGE_MODELS)


def _pair(name, **settings):
    plain = language_model(name, attn_implementation="eager", **settings)
    ours = language_model(name, **settings)
    ours.set_attn_implementation(register_attention())
    return plain, ours


def _step(model, **given):
    out = model(**given)
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@every
def test_logits_and_gradients(name):
    plain, ours = _pair(name)
    given = dict(input_ids=tokens(), labels=tokens())
    expected, expected_gradients = _step(plain, **given)
    with calls_of("causal_attention") as made:
        found, gradients = _step(ours, **given)
    assert len(made) == 2  # one for each layer: windows and soft caps too
    assert_close(found.logits, expected.logits, 1e-4)
    assert_gradients_close(gradients, expected_gradients)


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2", "gemma3"))
def test_padding_is_masked(name):
    plain, ours = _pair(name)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :7] = 0
    with calls_of("causal_attention") as made:
        found = ours(tokens(), attention_mask=mask).logits
    assert not made
    assert_close(found[mask.bool()], plain(tokens(), attention_mask=mask).logits[mask.bool()], 1e-4)


@every
@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_generation_beyond_the_window(name, cache):
    plain, ours = _pair(name)
    settings = dict(max_new_tokens=14, do_sample=False, cache_implementation=cache, disable_compile=True)
    expected = plain.eval().generate(tokens()[:, :5], **settings)
    assert torch.equal(fuse(ours.eval()).generate(tokens()[:, :5], **settings), expected)


@pytest.mark.parametrize("name", ("mistral", "gemma2"))
def test_bfloat16_and_float64(name):
    for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float64, 1e-6)):
        plain, ours = (model.to(dtype) for model in _pair(name))
        found = ours(tokens()).logits
        assert found.dtype is dtype
        assert_close(found, plain(tokens()).logits, tolerance)


def test_packed_sequences_are_masked():
    """Positions that begin again are sequences of their own."""
    plain, ours = _pair("llama")
    at = torch.cat((torch.arange(10), torch.arange(TOKENS - 10)))[None].expand(2, -1)
    with calls_of("causal_attention") as made:
        found = ours(tokens(), position_ids=at, use_cache=False).logits
    assert not made
    assert_close(found, plain(tokens(), position_ids=at, use_cache=False).logits, 1e-4)


def test_dropout_keeps_its_share():
    _, ours = _pair("llama", attention_dropout=0.5)
    torch.manual_seed(1)
    first = ours(tokens()).logits
    assert not torch.equal(ours(tokens()).logits, first)
    torch.manual_seed(1)
    assert torch.equal(ours(tokens()).logits, first)
    assert torch.equal(ours.eval()(tokens()).logits, ours(tokens()).logits)
