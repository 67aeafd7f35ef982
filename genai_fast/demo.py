"""The demonstration: two VAEs on real handwritten digits, their pictures, and the speed measured here."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from genai_fast.cli import new_folder
from genai_fast.data import Images
from genai_fast.models import MLPVAE
from genai_fast.models.peers import EagerMLPVAE
from genai_fast.profiling import Comparison, compare
from genai_fast.training.checkpoint import environment
from genai_fast.training.config import VAEConfig
from genai_fast.training.recipes import train
from genai_fast.training.step import Step, make_optimizer

EPOCHS = 40
ROUNDS = 100  # of the comparison with eager PyTorch


def run(out: Path, epochs: int | None = None) -> Path:
    """Train with 20 latent dimensions, then with 2; measure the speed; returns the run's folder."""
    settings = VAEConfig(epochs=epochs or EPOCHS)
    folder = new_folder(out, "demo")
    print(f"A VAE with 20 latent dimensions on 5,000 handwritten digits, in {folder}")
    first = train("vae", settings, folder)
    flat = folder / "latent-2"
    print(f"The same with 2 latent dimensions, in {flat}")
    train("vae", VAEConfig(epochs=settings.epochs, latent=2), flat)
    shutil.copy(flat / "latent.png", folder / "latent.png")

    device = next(first.model.parameters()).device
    comparison = training_speed(first.train, settings, device)
    where = environment(device)
    served = where["backends"]["vae_loss"]
    validation = first.record["validation"]
    print(
        f"\nvalidation: negative ELBO {validation['loss']:.1f} nats a digit"
        f" (reconstruction {validation['reconstruction']:.1f}, KL {validation['kl']:.1f})\n"
        f"pictures:   {folder}/samples.png, reconstructions.png, latent.png\n"
        f"backend:    {served} (instruction set {where['isa']}, {where['threads']} threads,"
        f" {where['device']})\n"
        f"speed:      {comparison.speedup('fused', over='eager'):.2f} x eager PyTorch, a training step of"
        f" {settings.batch_size}; measured just now:\n"
        + "".join(f"            {line}\n" for line in str(comparison).splitlines())
        + f"next:       genai-fast sample {folder} --count 100 --seed 2 --out grid.png\n"
        f"            genai-fast train vae --data digits --likelihood gaussian\n"
        f"            genai-fast train vae --data YOUR_FOLDER --size 64 --latent 64\n"
        f"            genai-fast doctor"
    )
    return folder


def training_speed(images: Images, settings: VAEConfig, device: torch.device) -> Comparison:
    """The whole training step as `Step` runs it, against the same VAE in plain PyTorch and default Adam."""
    x = images.batch(slice(0, settings.batch_size)).to(device)
    size = x[0].numel()
    model = MLPVAE(size, settings.hidden, settings.latent).to(device)
    step = Step(model, make_optimizer(model, settings))
    peer = EagerMLPVAE(size, settings.hidden, settings.latent).to(device)
    adam = torch.optim.Adam(peer.parameters(), lr=settings.lr)

    def eager() -> None:
        adam.zero_grad()
        peer.loss(x).backward()
        adam.step()

    # Five samples of warm-up: on CUDA, the graph is captured by then.
    return compare({"eager": eager, "fused": lambda: step(x)}, rounds=ROUNDS, warm_up=5)
