"""Textbook models under fuse: with PyTorch's random numbers, losses and weights of every step are those without it."""

import copy

import listings
import pytest
import torch
from alike import assert_close
from torch import nn

from genai_fast import explain, fuse

STEPS = 5


def _gan(generator, discriminator):
    criterion = nn.BCELoss()
    for_g, for_d = (torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in (generator, discriminator))
    losses = []
    for _ in range(STEPS):
        real, z = torch.rand(64, 1, 28, 28) * 2 - 1, torch.randn(64, 100)
        fake = generator(z)
        d_loss = criterion(discriminator(real), torch.ones(64, 1))
        d_loss = d_loss + criterion(discriminator(fake.detach()), torch.zeros(64, 1))
        for_d.zero_grad()
        d_loss.backward()
        for_d.step()
        g_loss = criterion(discriminator(fake), torch.ones(64, 1))
        for_g.zero_grad()
        g_loss.backward()
        for_g.step()
        losses += [d_loss.item(), g_loss.item()]
    return losses


def _steps(model, loss_of_a_batch):
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(STEPS):
        loss = loss_of_a_batch(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _vae(model):
    x = torch.rand(128, 1, 28, 28)
    return listings.vae_loss(*_with(model(x), x))


def _with(results, x):
    recon, mu, logvar = results
    return recon, x, mu, logvar


def _language(model):
    tokens = torch.randint(0, 8, (32, 65))
    found = model(tokens[:, :-1], tokens[:, 1:].contiguous())
    return found[1] if isinstance(found, tuple) else found


MODELS = {
    "gan": (lambda: (listings.Generator(), listings.Discriminator()), lambda models: _gan(*models)),
    "vae": (lambda: (listings.VAE(),), lambda models: _steps(*models, _vae)),
    "lstm": (lambda: (listings.LanguageModel(),), lambda models: _steps(*models, _language)),
    "gpt": (lambda: (listings.GPT(),), lambda models: _steps(*models, _language)),
}
BECOMES = {"gan": "act_dropout", "vae": "reparameterize", "lstm": "CrossEntropyLoss", "gpt": "cross_entropy"}


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_without_it(name):
    make, train = MODELS[name]
    torch.manual_seed(0)
    plain = make()
    fused = copy.deepcopy(plain)
    for model in fused:
        fuse(model, random=False)
    results = []
    for models in (plain, fused):
        torch.manual_seed(1)
        results.append(train(models))
    assert_close(torch.tensor(results[1]), torch.tensor(results[0]), 1e-4)
    for a, b in zip(plain, fused, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert_close(q.detach(), p.detach(), 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_what_fuse_does_to_it_is_said_and_trains(name):
    make, train = MODELS[name]
    torch.manual_seed(0)
    models = make()
    rows = [row for model in models for row in explain(model)]
    assert any(BECOMES[name] in row.becomes for row in rows)
    losses = train([fuse(model) for model in models])
    assert all(torch.isfinite(torch.tensor(losses))) and (name == "gan" or losses[-1] < losses[0])
