"""Models as textbooks print them (MLP GAN, MLP VAE, LSTM language model, a small GPT with attention written out), and
what `fuse` makes of a training step of each: python -m bench.listings.
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast import explain, fuse
from genai_fast.profiling import compare


class Generator(nn.Module):
    def __init__(self, latent=100, pixels=784):
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(latent, 256),
            nn.ReLU(),
            nn.Linear(256, 512),
            nn.ReLU(),
            nn.Linear(512, 1024),
            nn.ReLU(),
            nn.Linear(1024, pixels),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self, pixels=784):
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(pixels, 1024),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(1024, 512),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(512, 256),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(256, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.main(x.view(x.size(0), -1))


class VAE(nn.Module):
    def __init__(self, pixels=784, hidden=400, latent=20):
        super().__init__()
        self.fc1 = nn.Linear(pixels, hidden)
        self.fc_mu = nn.Linear(hidden, latent)
        self.fc_logvar = nn.Linear(hidden, latent)
        self.fc3 = nn.Linear(latent, hidden)
        self.fc4 = nn.Linear(hidden, pixels)

    def encode(self, x):
        h = F.relu(self.fc1(x))
        return self.fc_mu(h), self.fc_logvar(h)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z):
        h = F.relu(self.fc3(z))
        return torch.sigmoid(self.fc4(h))

    def forward(self, x):
        mu, logvar = self.encode(x.view(x.size(0), -1))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


def vae_loss(recon, x, mu, logvar):
    bce = F.binary_cross_entropy(recon, x.view(x.size(0), -1), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kld


class LanguageModel(nn.Module):
    def __init__(self, vocabulary=65, width=128, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=0.2)
        self.fc = nn.Linear(width, vocabulary)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, tokens, targets):
        y, _ = self.lstm(self.embed(tokens))
        logits = self.fc(y)
        return self.criterion(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))


class CausalSelfAttention(nn.Module):
    def __init__(self, width, heads, block):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout, self.heads = nn.Dropout(0.1), nn.Dropout(0.1), heads
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.attn_dropout(att)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class Block(nn.Module):
    def __init__(self, width, heads, block):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, block)
        self.c_fc, self.gelu, self.c_proj = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.dropout(self.c_proj(self.gelu(self.c_fc(self.ln_2(x)))))


class GPT(nn.Module):
    def __init__(self, vocabulary=65, block=64, width=128, heads=4, layers=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(block, width)
        self.h = nn.ModuleList([Block(width, heads, block) for _ in range(layers)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens, targets=None):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def gan_step(models: list[nn.Module]) -> Callable[[], float]:
    generator, discriminator = models
    criterion = nn.BCELoss()
    for_g, for_d = (torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in models)

    def step() -> float:
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
        return d_loss.item() + g_loss.item()

    return step


def _supervised(
    loss_of_a_batch: Callable[[nn.Module], torch.Tensor],
) -> Callable[[list[nn.Module]], Callable[[], float]]:
    def make(models: list[nn.Module]) -> Callable[[], float]:
        (model,) = models
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)

        def step() -> float:
            loss = loss_of_a_batch(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    return make


def _vae_batch(model: nn.Module) -> torch.Tensor:
    x = torch.rand(128, 1, 28, 28)
    recon, mu, logvar = model(x)
    return vae_loss(recon, x, mu, logvar)


def _language_batch(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 8, (32, 65))
    found = model(tokens[:, :-1], tokens[:, 1:].contiguous())
    return found[1] if isinstance(found, tuple) else found


# Name -> its networks, and what makes a training step of them.
LISTINGS: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[list[nn.Module]], Callable[[], float]]]] = {
    "MLP GAN": (lambda: [Generator(), Discriminator()], gan_step),
    "MLP VAE": (lambda: [VAE()], _supervised(_vae_batch)),
    "LSTM language model": (lambda: [LanguageModel()], _supervised(_language_batch)),
    "GPT": (lambda: [GPT()], _supervised(_language_batch)),
}


def rows() -> Iterator[str]:
    """A line for each: how many times as fast a step is fused, with the process settings of this process."""
    for name, (make, step) in LISTINGS.items():
        torch.manual_seed(0)
        plain = make()
        fused = [fuse(copy.deepcopy(model)) for model in plain]
        served = {row.becomes for model in fused for row in explain(model) if row.becomes}
        found = compare({"eager": step(plain), "fused": step(fused)}, rounds=21, seconds=4.0)
        times = {k: 1e3 * t.median for k, t in found.timings.items()}
        ratio = times["eager"] / times["fused"]
        yield f"{name:20} {times['eager']:8.2f} ms {times['fused']:8.2f} ms {ratio:6.2f} x  {', '.join(sorted(served))}"


if __name__ == "__main__":
    print(f"{'training step':20} {'eager':>11} {'fused':>11} {'ratio':>8}  served by", flush=True)
    for row in rows():
        print(row, flush=True)
