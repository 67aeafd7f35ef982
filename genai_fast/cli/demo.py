"""The demonstrations: VAEs and a GAN on real handwritten digits, their pictures, and the speed measured here."""

import shutil
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from genai_fast.models.gan.settings import DCGANConfig
from genai_fast.models.gpt.settings import GPTConfig
from genai_fast.models.vae.settings import VAEConfig
from genai_fast.profiling import ForeignLoad
from genai_fast.profiling.stock import measured
from genai_fast.profiling.systems import PLAIN, System
from genai_fast.runs import text_generation
from genai_fast.runs.run import Trained, new_folder, train
from genai_fast.terminal import command
from genai_fast.training.environment import environment

EPOCHS, GAN_EPOCHS, TEXT_EPOCHS = 40, 25, 8
TURNS = 3  # of the comparison with eager PyTorch
ROUNDS, GAN_ROUNDS, TEXT_ROUNDS = 60, 10, 4  # in each

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
    where = environment(device)
    served = where["backends"]["vae_loss"]
    validation = first.record["validation"]
    _say(
        f"\nvalidation: negative ELBO {validation['loss']:.1f} nats a digit"
        f" (reconstruction {validation['reconstruction']:.1f}, KL {validation['kl']:.1f})\n"
        f"pictures:   {folder}/samples.png, reconstructions.png, latent.png, curves.png\n"
        f"backend:    {served} (instruction set {where['isa']}, {where['threads']} threads, {where['device']})",
        _speed(System("vae", settings, settings.batch_size, _shape(first)), ROUNDS, device.type),
        ("sample", folder, *["--count", "100", "--seed", "2", "--out", "grid.png"]),
        ["train", "vae", "--data", "digits", "--likelihood", "gaussian"],
        ["train", "vae", "--data", "YOUR_FOLDER", "--size", "64", "--latent", "64"],
        ["doctor"],
    )
    return folder


def _say(figures: str, speed: list[str], *commands: Iterable[object]) -> None:
    """Figures, the speed of a training step, and what to try next."""
    print("\n".join([figures, _titled("speed:", speed), _next(*commands)]))


def _speed(system: System, rounds: int, device: str) -> list[str]:
    """The step as `Step` runs it, beside the plain one with the same settings of the process and with PyTorch's own."""
    settings = {name: value for name, value in PLAIN.items() if hasattr(system.config, name)}
    system = replace(system, config=replace(system.config, **settings))
    load = ForeignLoad()
    # Processes differ by a fifth, and a minute later all are slower: in turn, and the median of each.
    turns = [(measured(system, device, rounds, tuned) for tuned in (False, True)) for _ in range(TURNS)]
    taken = [(plain["eager"], tuned["eager"], tuned["fused"]) for plain, tuned in turns]
    stock, eager, fused = map(statistics.median, zip(*taken, strict=True))
    size = f"{system.batch} x {system.shape[0]} tokens" if system.is_text else str(system.batch)
    others = load.cores()
    return [
        f"{stock / fused:.2f} x PyTorch as it comes, a training step of {size}; measured just now:",
        f"{eager / fused:.2f} x by kernels, {stock / eager:.2f} x by settings of the process (tune_cpu)",
        f"PyTorch {1e3 * stock:.3f} ms, with the settings {1e3 * eager:.3f} ms, fused {1e3 * fused:.3f} ms"
        + ("" if others is None else f"; others kept {others:.1f} cores busy"),
    ]


def _shape(trained: Trained) -> tuple[int, ...]:
    """Of one picture."""
    return tuple(trained.task.train.batch(slice(0, 1)).shape[1:])


def _next(*commands: Iterable[object]) -> str:
    """Commands to go on with, one per line."""
    return _titled("next:", [command(*words) for words in commands])


def _titled(title: str, lines: Iterable[str]) -> str:
    return "\n".join(f"{'' if k else title:12}{line}" for k, line in enumerate(lines))


def run_gan(out: Path, epochs: int | None = None) -> Path:
    """Train a DCGAN; measure its step beside the same networks in plain PyTorch; returns the run's folder."""
    settings = DCGANConfig(epochs=epochs or GAN_EPOCHS, ema=0.99)
    folder = new_folder(out, "demo-gan")
    print(f"A DCGAN on 5,000 of MNIST's 70,000 handwritten digits, in {folder}; grids/ shows how it learns")
    trained = train("dcgan", settings, folder)
    device = next(trained.model.parameters()).device
    validation = trained.record["validation"]
    _say(
        f"\nsamples:    Fréchet distance {validation['frechet_distance']:.1f} to held-out digits (own features),"
        f" diversity {validation['diversity']:.2f} of the data's\n"
        f"pictures:   {folder}/samples.png, grids/, curves.png (all of MNIST gives better ones: --data FOLDER of IDX)",
        _speed(System("dcgan", settings, settings.batch_size, _shape(trained)), GAN_ROUNDS, device.type),
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
    figures = trained.record["validation"]
    style = text_generation.Style(max_tokens=150, temperature=0.5, top_k=20, repeats=False)
    text = _BEGINNING + "".join(text_generation.write(model, task.tokenizer, _BEGINNING, style))
    _say(
        f"\n{text.strip()}\n\n"
        f"held out:   perplexity {figures['perplexity']:.1f} a token of {task.tokenizer.size},"
        f" {figures['bits_per_byte']:.2f} bits a byte (in metrics.jsonl)",
        _speed(
            System("gpt", settings, settings.batch_size, (settings.block,), task.tokenizer.size),
            TEXT_ROUNDS,
            device.type,
        ),
        ("generate", folder, "--prompt", "If the", *["--max-tokens", "200", "--seed", "2"]),
        ("export", folder, *["--out", "gpt.safetensors"]),
        ["train", "gpt", "--data", "YOUR_FILE.txt"],
        ["train", "seq2seq", "--data", "YOUR_CATALOGUE.po"],
    )
    return folder
