"""A VAE in plain PyTorch, sped up by one line: python examples/fuse_your_model.py [--epochs N]"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

import genai_fast


class VAE(nn.Module):
    """Convolutional encoder and decoder of 28 x 28 pictures; nothing here knows of genai_fast."""

    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.LeakyReLU(0.2), nn.Flatten(),
        )  # fmt: skip
        self.to_mu, self.to_logvar = nn.Linear(64 * 49, latent), nn.Linear(64 * 49, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, 64 * 49), nn.Unflatten(1, (64, 7, 7)),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),
        )  # fmt: skip

    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = self.encoder(x)
        mu, logvar = self.to_mu(h), self.to_logvar(h)
        return self.decoder(self.reparameterize(mu, logvar)), mu, logvar


def loss_of(model: VAE, x: torch.Tensor) -> torch.Tensor:
    logits, mu, logvar = model(x)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (reconstruction + kl) / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    images = genai_fast.data.load("mnist")
    model = VAE()

    (example,) = next(genai_fast.data.batches(images, 128, seed=0, epoch=0))
    done = genai_fast.accelerate(model, example)  # the one line
    print(done, end="\n\n")
    print(genai_fast.explain(model), end="\n\n")

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(epochs):
        start, total, seen = time.perf_counter(), 0.0, 0
        for (x,) in genai_fast.data.batches(images, 128, seed=0, epoch=epoch):
            loss = loss_of(model, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, seen = total + float(loss.detach()) * len(x), seen + len(x)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: {total / seen:.1f} nats a picture, {seen / seconds:.0f} pictures a second")
    done.remove()


if __name__ == "__main__":
    main()
