"""Textbook models under fuse: with PyTorch's random numbers, losses and weights of every step are those without it."""

import copy

import pytest
import torch
from alike import assert_close

from bench.listings import LISTINGS
from genai_fast import explain, fuse

STEPS = 5
BECOMES = {
    "MLP GAN": "act_dropout", "MLP VAE": "reparameterize", "LSTM language model": "CrossEntropyLoss",
    "GPT": "causal_attention",
}  # fmt: skip


@pytest.mark.parametrize("name", LISTINGS)
def test_steps_are_those_without_it(name):
    make, step_of = LISTINGS[name]
    torch.manual_seed(0)
    plain = make()
    fused = copy.deepcopy(plain)
    for model in fused:
        fuse(model, random=False)
    results = []
    for models in (plain, fused):
        torch.manual_seed(1)
        step = step_of(models)
        results.append([step() for _ in range(STEPS)])
    assert_close(torch.tensor(results[1]), torch.tensor(results[0]), 1e-4)
    for a, b in zip(plain, fused, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert_close(q.detach(), p.detach(), 1e-3)


@pytest.mark.parametrize("name", LISTINGS)
def test_what_fuse_does_to_it_is_said_and_trains(name):
    make, step_of = LISTINGS[name]
    torch.manual_seed(0)
    models = make()
    rows = [row for model in models for row in explain(model)]
    assert any(BECOMES[name] in row.becomes for row in rows)
    step = step_of([fuse(model) for model in models])
    losses = [step() for _ in range(STEPS)]
    assert all(torch.isfinite(torch.tensor(losses))) and (name == "MLP GAN" or losses[-1] < losses[0])
