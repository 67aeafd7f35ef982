"""The demonstrations: VAEs and a GAN on real handwritten digits, their pictures, and the speed measured here."""

import copy
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genai_fast.data import Images
from genai_fast.models import MLPVAE
from genai_fast.models.common.plain_loop import loss_step
from genai_fast.models.gan.plain import gan_step
from genai_fast.models.gan.settings import DCGANConfig
from genai_fast.models.gpt.plain import PlainGPT
from genai_fast.models.gpt.settings import GPTConfig
from genai_fast.models.vae.plain import PlainMLPVAE
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.profiling import Comparison, compare
from genai_fast.runs import text_generation
from genai_fast.runs.run import new_folder, train
from genai_fast.terminal import command
from genai_fast.training import Step, make_optimizer
from genai_fast.training.environment import environment

EPOCHS, GAN_EPOCHS, TEXT_EPOCHS = 40, 25, 8
ROUNDS, GAN_ROUNDS, TEXT_ROUNDS = 100, 20, 10  # of the comparison with eager PyTorch

_BEGINNING = "If the class has"


def run(out: Path, epochs: int | None = None) -> Path:
    """Train with 20 latent dimensions, then with 2; measure the speed; returns the run's folder."""
    settings = VAEConfig(epochs=epochs or EPOCHS)
    folder = new_folder(out, "demo")
    print(f"A VAE with 20 latent dimensions on 5,000 of MNIST's 70,000 handwritten digits, in {folder}")
    first = train("vae", settings, folder)
    flat = folder / "latent-2"
    print(f"The same with 2 latent dimensions, in {flat}")
    train("vae", VAEConfig(epochs=settings.epochs, latent=2), flat)
    shutil.copy(flat / "latent.png", folder / "latent.png")

    device = next(first.model.parameters()).device
    comparison = training_speed(first.task.train, settings, device)
    where = environment(device)
    served = where["backends"]["vae_loss"]
    validation = first.record["validation"]
    _say(
        f"\nvalidation: negative ELBO {validation['loss']:.1f} nats a digit"
        f" (reconstruction {validation['reconstruction']:.1f}, KL {validation['kl']:.1f})\n"
        f"pictures:   {folder}/samples.png, reconstructions.png, latent.png, curves.png\n"
        f"backend:    {served} (instruction set {where['isa']}, {where['threads']} threads, {where['device']})",
        comparison,
        f"{settings.batch_size}",
        ("sample", folder, *["--count", "100", "--seed", "2", "--out", "grid.png"]),
        ["train", "vae", "--data", "digits", "--likelihood", "gaussian"],
        ["train", "vae", "--data", "YOUR_FOLDER", "--size", "64", "--latent", "64"],
        ["doctor"],
    )
    return folder


def _say(figures: str, comparison: Comparison, step: str, *commands: Iterable[object]) -> None:
    """Figures, the speed of a training step, and what to try next."""
    speed = f"{comparison.speedup('fused', over='eager'):.2f} x eager PyTorch, a training step of {step}"
    lines = [f"{speed}; measured just now:", *str(comparison).splitlines()]
    print("\n".join([figures, _titled("speed:", lines), _next(*commands)]))


def _next(*commands: Iterable[object]) -> str:
    """Commands to go on with, one per line."""
    return _titled("next:", [command(*words) for words in commands])


def _titled(title: str, lines: Iterable[str]) -> str:
    return "\n".join(f"{'' if k else title:12}{line}" for k, line in enumerate(lines))


def _measured(eager: Callable[[], Any], fused: Callable[[], Any], rounds: int) -> Comparison:
    # Five samples of warm-up: on CUDA, the graph is captured by then.
    return compare({"eager": eager, "fused": fused}, rounds=rounds, warm_up=5)


def run_gan(out: Path, epochs: int | None = None) -> Path:
    """Train a DCGAN; measure its step beside the same networks in plain PyTorch; returns the run's folder."""
    settings = DCGANConfig(epochs=epochs or GAN_EPOCHS, ema=0.99)
    folder = new_folder(out, "demo-gan")
    print(f"A DCGAN on 5,000 of MNIST's 70,000 handwritten digits, in {folder}; grids/ shows how it learns")
    trained = train("dcgan", settings, folder)
    model, size = trained.model, settings.batch_size
    device = next(model.parameters()).device
    x = trained.task.train.batch(slice(0, size), signed=True).to(device)
    generator = nn.Sequential(nn.Unflatten(1, (model.latent, 1, 1)), *copy.deepcopy(model.generator.main))
    discriminator = nn.Sequential(*copy.deepcopy(model.discriminator.main), nn.Flatten(0), nn.Sigmoid())
    plain = gan_step(generator.train(), discriminator.train(), model.latent, device.type)
    step = Step(model.train(), make_optimizer(model, settings))
    comparison = _measured(lambda: plain(x), lambda: step(x), GAN_ROUNDS)
    validation = trained.record["validation"]
    _say(
        f"\nsamples:    Fréchet distance {validation['frechet_distance']:.1f} to held-out digits (own features),"
        f" diversity {validation['diversity']:.2f} of the data's\n"
        f"pictures:   {folder}/samples.png, grids/, curves.png (all of MNIST gives better ones: --data FOLDER of IDX)",
        comparison,
        f"{size}",
        ("sample", folder, *["--count", "1000", "--out", "digits"]),
        ("interpolate", folder, *["--out", "interpolation.png"]),
        ("export", folder, *["--out", "generator.safetensors"]),
        ["train", "dcgan", "--data", "YOUR_FOLDER", "--size", "64"],
    )
    return folder


def run_text(out: Path, epochs: int | None = None) -> Path:
    """Train a small GPT on Python's documentation; measure its step and its writing; returns the run's folder."""
    small = {"layers": 4, "heads": 4, "width": 256, "block": 128, "dropout": 0.0, "warmup": 50}
    settings = GPTConfig(**small, epochs=epochs or TEXT_EPOCHS, lr=2e-3, sample_every=2)
    folder = new_folder(out, "demo-text")
    print(f"A GPT of {settings.layers} layers on Python's own documentation, in {folder}; samples/ tells how it learns")
    trained = train("gpt", settings, folder)
    model, task = trained.model, trained.task
    device = next(model.parameters()).device
    batch = tuple(x.to(device) for x in next(task.feeds(model)[0].epoch(0)))
    peer = PlainGPT(task.tokenizer.size, settings.block, settings.layers, settings.heads, settings.width).to(device)
    plain = loss_step(peer, device.type)
    again = task.model().to(device)
    step = Step(again, make_optimizer(again, settings))
    comparison = _measured(lambda: plain(*batch), lambda: step(*batch), TEXT_ROUNDS)
    figures = trained.record["validation"]
    style = text_generation.Style(max_tokens=150, temperature=0.5, top_k=20, repeats=False)
    text = _BEGINNING + "".join(text_generation.write(model, task.tokenizer, _BEGINNING, style))
    _say(
        f"\n{text.strip()}\n\n"
        f"held out:   perplexity {figures['perplexity']:.1f} a token of {task.tokenizer.size},"
        f" {figures['bits_per_byte']:.2f} bits a byte (in metrics.jsonl)",
        comparison,
        f"{settings.batch_size} x {settings.block} tokens",
        ("generate", folder, "--prompt", "If the", *["--max-tokens", "200", "--seed", "2"]),
        ("export", folder, *["--out", "gpt.safetensors"]),
        ["train", "gpt", "--data", "YOUR_FILE.txt"],
        ["train", "seq2seq", "--data", "YOUR_CATALOGUE.po"],
    )
    return folder


def training_speed(images: Images, settings: VAEConfig, device: torch.device) -> Comparison:
    """The whole training step as `Step` runs it, against the same VAE in plain PyTorch and default Adam."""
    x = images.batch(slice(0, settings.batch_size)).to(device)
    size = x[0].numel()
    model = MLPVAE(size, settings.hidden, settings.latent).to(device)
    step = Step(model, make_optimizer(model, settings))
    peer = PlainMLPVAE(size, settings.hidden, settings.latent).to(device)
    plain = loss_step(peer, device.type, settings.lr)
    return _measured(lambda: plain(x), lambda: step(x), ROUNDS)
