"""Speculative decoding: the same tokens as without at temperature 0, else the same distribution."""

import copy

import pytest
import torch

from genai_fast import use_backend
from genai_fast.models import GPT, Llama, LSTMLanguageModel, Sampler, decoder_for, generate, speculate
from genai_fast.models.common import speculation

V = 13
pytestmark = pytest.mark.usefixtures("one_thread")


def model(kind, block=24, seed=0, spread=0.2, vocabulary=V, layers=2):
    torch.manual_seed(seed)
    found = kind(vocabulary, block, layers, 2, 16)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(torch.randn_like(p), alpha=spread)
    return found.eval()


def near(found, amount):
    """A draft that is like the model."""
    draft = copy.deepcopy(found)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(torch.randn_like(p), alpha=amount)
    return draft


@pytest.mark.parametrize(("backend", "kind", "ahead"), [("cpu", GPT, 4), ("cpu", Llama, 3), ("reference", Llama, 4)])
def test_greedy_tokens_are_those_of_the_model_alone(backend, kind, ahead):
    target, sampler, count = model(kind), Sampler(temperature=0), 40 if backend == "cpu" else 15
    drafts = near(target, 0.02), model(GPT, 7, seed=5), near(target, 0.0)
    pairs = list(zip((list(range(12)), [3], [*range(12)] * 2), drafts, strict=True))
    with use_backend(backend):
        for prompt, draft in pairs if backend == "cpu" else pairs[:1]:
            expected = list(generate(target, prompt, max_tokens=count, temperature=0))  # passes the block
            assert list(speculate(target, draft, prompt, max_tokens=count, sampler=sampler, ahead=ahead)) == expected
    stop = expected[10]
    found = list(speculate(target, draft, prompt, max_tokens=count, sampler=sampler, ahead=ahead, stop_id=stop))
    assert found == expected[: expected.index(stop)]


def test_drawn_tokens_have_the_distribution_of_the_model_alone():
    target, count = model(Llama, spread=0.4, vocabulary=5, layers=1), 1500
    draft, settings = near(target, 0.3), dict(temperature=1.2, top_k=4, min_p=0.02)
    sampler, found = Sampler(**settings, seed=0), torch.zeros(5, 5, 5)
    with torch.no_grad():
        first = sampler.probabilities(target(torch.tensor([[1, 2]]))[0, -1])
        second = sampler.probabilities(target(torch.tensor([[1, 2, a] for a in range(5)]))[:, -1])
        after = torch.tensor([[1, 2, a, b] for a in range(5) for b in range(5)])
        third = sampler.probabilities(target(after)[:, -1]).view(5, 5, 5)
    expected = first[:, None, None] * second[:, :, None] * third
    decoders = [decoder_for(one, 1) for one in (target, draft)]
    for _ in range(count):  # as `speculate` does it
        decoders[0].reset()
        proposer = speculation._Draft(decoders[1], draft.block, sampler)
        found[tuple(speculation._tokens(decoders[0], proposer, sampler, [1, 2], 24, 3, 2, None))] += 1
    assert not found[expected == 0].any() and (expected == 0).any()
    z = (found - count * expected) / (count * expected * (1 - expected)).sqrt().clamp(min=1.0)
    assert z.abs().max() < 4
    assert (found.sum(2) / count - expected.sum(2)).abs().sum() < 0.15
    with torch.no_grad():  # the draft alone would not do
        other = sampler.probabilities(draft(torch.tensor([[1, 2]]))[0, -1])
    assert (other - first).abs().sum() > 0.15


def test_calls_are_fewer(monkeypatch):
    target = model(Llama)
    calls = []
    from genai_fast import ops

    for name in ("step", "extend"):
        before = getattr(ops.LlamaDecoder, name)
        monkeypatch.setattr(
            ops.LlamaDecoder, name, lambda self, ids, name=name, call=before: calls.append(name) or call(self, ids)
        )
    list(speculate(target, near(target, 0.0), [1], max_tokens=21, sampler=Sampler(seed=0), ahead=4))
    assert calls.count("extend") <= 2 * 5  # of the model and of the draft, five tokens each time


def test_misuse_is_named():
    target, sampler = model(GPT), Sampler()
    with pytest.raises(ValueError, match="draft: expected a vocabulary of 13 as the model has, got 14"):
        speculate(target, GPT(14, 8, 1, 1, 8), [1], max_tokens=1, sampler=sampler)
    with pytest.raises(TypeError, match="draft: expected a GPT or a Llama"):
        speculate(target, LSTMLanguageModel(V, 8, 8), [1], max_tokens=1, sampler=sampler)
    with pytest.raises(ValueError, match="ahead: expected at least 1, got 0"):
        speculate(target, target, [1], max_tokens=1, sampler=sampler, ahead=0)
