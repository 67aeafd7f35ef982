"""What is looked at while a model trains: grids of samples, figures on held-out images, and warnings from them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genai_fast.config import ImageConfig
from genai_fast.contract import InTurns, image_traits, offers
from genai_fast.data.images import Images
from genai_fast.evaluation import SampleQuality, bits_per_dim, psnr, ssim, warnings_of
from genai_fast.models.common import latents
from genai_fast.models.common.protocol import Draws, Encodes, FitsDensity, Reconstructs, Upscales
from genai_fast.runs import pictures
from genai_fast.training import distributed
from genai_fast.training.batches import ImageFeed, batch_for
from genai_fast.training.loop import Look, evaluate
from genai_fast.training.tensorboard import Board

_SAMPLES = 64  # in a grid
_MOST = 1000  # images that figures compare
_AT_ONCE = 100  # images generated or encoded at a time
_FITTED = 5000  # images to whose codes a density is fitted


def generate(
    model: nn.Module, shape: tuple[int, ...], count: int, seed: int, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Samples [count, *shape] in [0, 1], on the CPU, for z ~ N(0, I); see `decode`."""
    return decode(model, shape, latents.normal(count, model.latent, seed), labels)


@torch.no_grad()
def decode(
    model: nn.Module, shape: tuple[int, ...], z: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Latents [N, latent] -> images [N, *shape] in [0, 1], on the CPU, some at a time.

    Of a conditional model labels [N] say the classes; None: each in turn.
    """
    traits, device = image_traits(model), next(model.parameters()).device
    if traits.classes and labels is None:
        labels = torch.arange(len(z)) % traits.classes
    inputs = (z,) if labels is None else (z, labels)
    parts = []
    with latents.evaluating(model):
        for part in zip(*(x.split(_AT_ONCE) for x in inputs), strict=True):
            x = model.decode(*(x.to(device) for x in part))
            x = x.sigmoid() if traits.likelihood == "bernoulli" else x
            parts.append(shown(model, x).view(-1, *shape).cpu())
    return torch.cat(parts)


def shown(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A model's images in [0, 1]."""
    x = x.float()
    return (x * 0.5 + 0.5 if image_traits(model).signed else x).clamp(0, 1)


def draw(model: nn.Module, train: Images, validation: Images, folder: Path) -> None:
    """samples.png, reconstructions.png (above, the originals) and latent.png, as far as the model has them."""
    if offers(model, Draws):
        pictures.grid(generate(model, train.shape, _SAMPLES, seed=1), folder / "samples.png")
    if offers(model, Reconstructs):
        _reconstructions(model, validation, folder / "reconstructions.png")
    if offers(model, Upscales):
        _enlargements(model, validation, folder / "samples.png")
    latent_plane(model, train, folder / "latent.png")


def latent_plane(model: nn.Module, train: Images, path: Path) -> None:
    """Write where a model with two latent dimensions has labelled images; nothing for others."""
    if image_traits(model).latent != 2 or not offers(model, Encodes) or train.labels is None:
        return
    with torch.no_grad(), latents.evaluating(model):
        codes = [model.encode(*batch_for(model, train, part)) for part in _parts(len(train))]
    plain = isinstance(codes[0], torch.Tensor)
    mu = torch.cat([code if plain else code[0] for code in codes])  # of VAEs (mu, logvar)
    title = f"{'Code of x' if plain else 'Mean of q(z | x)'}, {train.name}"
    pictures.plane(mu, train.labels, train.classes, path, title)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE))


def _reconstructions(model: nn.Module, images: Images, path: Path) -> torch.Tensor:
    """Images above, what the model makes of them below."""
    batch = batch_for(model, images, slice(0, 12))
    with latents.evaluating(model):
        pair = torch.cat([batch[0], model.reconstruct(*batch)])
    return pictures.grid(shown(model, pair), path, columns=len(batch[0]))


def enlarged(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What images [N, C, H, W] in [0, 1] are as small ones, these enlarged bicubically, and by the model; in [0, 1], on
    the CPU, some at a time."""
    device, parts = next(model.parameters()).device, []
    for part in images.split(_AT_ONCE):
        small = model.lower((part * 2 - 1).to(device))
        large = F.interpolate(small, part.shape[2:], mode="bicubic", align_corners=False)
        parts.append([shown(model, x).cpu() for x in (small, large, model.upscale(small))])
    small, large, made = (torch.cat(x) for x in zip(*parts, strict=True))
    return small, large, made


def upscaled(model: nn.Module, x: torch.Tensor, tile: int = 256) -> torch.Tensor:
    """Enlarge an image [C, H, W] in [0, 1], on the CPU, with the model: in tiles of this many pixels a side.

    Each tile is computed with as much around it as it depends on, so seams do not show.
    """
    device, scale, around = next(model.parameters()).device, model.scale, model.reach
    channels, height, width = x.shape
    made = torch.empty(channels, scale * height, scale * width)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            above, before = min(top, around), min(left, around)
            rows, columns = slice(top - above, top + tile + around), slice(left - before, left + tile + around)
            part = shown(model, model.upscale((x[None, :, rows, columns] * 2 - 1).to(device)))[0].cpu()
            part = part[:, scale * above :, scale * before :][:, : scale * tile, : scale * tile]
            made[:, scale * top :, scale * left :][:, : part.shape[1], : part.shape[2]] = part
    return made


def _enlargements(model: nn.Module, images: Images, path: Path) -> torch.Tensor:
    """Small images with visible pixels; enlarged bicubically; by the model; the originals."""
    x = images.batch(slice(0, 12))
    small, large, made = enlarged(model, x)
    small = small.repeat_interleave(model.scale, 2).repeat_interleave(model.scale, 3)
    return pictures.grid(torch.cat([small, large, made, x]), path, columns=len(x))


class Watch:
    """Called at the end of an epoch: writes grids/epoch-<n>.png, to a board too; gives figures on held-out images."""

    def __init__(
        self, model: nn.Module, train: Images, validation: Images, config: ImageConfig, folder: Path,
        board: Board | None = None,
    ) -> None:  # fmt: skip
        self._model, self._train, self._validation = model, train, validation
        self._config, self._folder, self._board = config, folder, board
        self._quality: SampleQuality | None = None

    def __call__(self, epoch: int, train: dict[str, float]) -> Look:
        """Figures and warnings of epoch `epoch`, whose mean losses in training were `train`."""
        model, config, draws = self._model, self._config, distributed.first()
        warnings: list[str] = []
        if offers(model, FitsDensity):  # in all processes, whose checkpoints have it
            parts = _parts(min(len(self._train), _FITTED))
            try:
                model.fit_density(batch_for(model, self._train, part)[0] for part in parts)
            except ValueError as error:
                warnings.append(f"samples are of an earlier density: {error}")
        if draws and config.grid_every and epoch % config.grid_every == 0:
            self._grid(self._folder / "grids" / f"epoch-{epoch:04d}.png")
        figures = {} if offers(model, InTurns) else self._likelihood()
        if draws and config.quality_every and epoch % config.quality_every == 0 and offers(model, Upscales):
            figures |= self._fidelity()
        said: dict[str, Any] = {"latent": image_traits(model).latent or None, "kl": figures.get("kl")}
        if draws and config.quality_every and epoch % config.quality_every == 0 and offers(model, Draws):
            try:
                quality, samples, real = self._compare()
            except ValueError as error:  # too few images, too small or too large ones, or all alike
                warnings.append(f"no comparison of samples with held-out images: {error}")
            else:
                figures |= quality
                said |= {"samples": samples, "real": real}
                said |= {name: quality[name] for name in ("diversity", "coverage")}
        if image_traits(model).logits:  # a critic's outputs have no unit
            said["discriminator_accuracy"] = train["accuracy"]
            said["generator_loss"] = train["generator"] if image_traits(model).nats else None
        return Look(figures, warnings + warnings_of(figures, **said))

    def _likelihood(self) -> dict[str, float]:
        """Losses on held-out images, and bits per dimension of a Bernoulli likelihood.

        A squared error has an arbitrary variance, so its bits per dimension are not comparable.
        """
        model = self._model
        figures = evaluate(model, ImageFeed(model, self._validation, self._config), self._config)
        if {"reconstruction", "kl"} <= figures.keys() and image_traits(model).likelihood == "bernoulli":
            elbo = figures["reconstruction"] + figures["kl"]  # whatever beta weighs
            figures["bits_per_dim"] = bits_per_dim(elbo, math.prod(self._train.shape), "bernoulli")
        return figures

    def _fidelity(self) -> dict[str, float]:
        """PSNR and SSIM of held-out images that were lowered and enlarged, by the model and bicubically."""
        x = self._validation.batch(slice(0, _MOST))
        _, large, made = enlarged(self._model, x)
        figures = {"psnr": psnr(made, x), "psnr_bicubic": psnr(large, x)}
        return {**figures, "ssim": ssim(made, x), "ssim_bicubic": ssim(large, x)}

    def _compare(self) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        """Figures of samples beside held-out images, the samples, the images."""
        count = min(len(self._validation), _MOST)
        real = self._validation.batch(slice(0, count))
        if self._quality is None:
            self._quality = SampleQuality(real)
        samples = generate(self._model, self._train.shape, count, seed=self._config.seed + 1)
        if not samples.isfinite().all():
            names = ("frechet_distance", "precision", "recall", "density", "coverage", "diversity")
            return dict.fromkeys(names, math.nan), samples, real
        return self._quality.quality(samples), samples, real

    def _grid(self, path: Path) -> None:
        """Samples, or enlarged or reconstructed images of a model that has no samples."""
        path.parent.mkdir(exist_ok=True)
        if offers(self._model, Draws):
            name, sheet = "samples", pictures.grid(generate(self._model, self._train.shape, _SAMPLES, seed=1), path)
        elif offers(self._model, Upscales):
            name, sheet = "samples", _enlargements(self._model, self._validation, path)
        else:
            name, sheet = "reconstructions", _reconstructions(self._model, self._validation, path)
        if self._board is not None:
            self._board.picture(name, sheet)
