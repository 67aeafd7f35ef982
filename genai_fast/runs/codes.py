"""Images as the codes of an autoencoder, in a file that only the same weights can read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from genai_fast import atomic_files
from genai_fast.errors import UsageError
from genai_fast.training.checkpoint import plain

BITS = {8: torch.uint8, 16: torch.float16, 32: torch.float32}
_LEVELS = 255  # steps between the lowest and the highest value of a dimension, of 8 bits


def digest(model: nn.Module) -> torch.Tensor:
    """SHA-256 of a model's weights, [32] uint8."""
    found = hashlib.sha256()
    for name, x in sorted(plain(model.state_dict()).items()):
        found.update(name.encode())
        found.update(x.contiguous().view(-1).view(torch.uint8).numpy())
    return torch.tensor([*found.digest()], dtype=torch.uint8)


def write(path: Path, codes: torch.Tensor, model: nn.Module, shape: tuple[int, ...], bits: int) -> int:
    """Write codes [N, latent] of images of `shape` (C, H, W), whole or not at all; returns the file's size in bytes.

    A safetensors file: codes [N, latent] uint8, float16 or float32; weights, the model's digest; shape [3] int64; of 8
    bits also low and step [latent]: a code is low + step * the number.

    Raises UsageError: codes are not finite, or beyond float16.
    """
    tensors = {"weights": digest(model), "shape": torch.tensor(shape)}
    if bits == 8:
        low = codes.amin(0) if len(codes) else codes.new_zeros(codes.size(1))
        step = ((codes.amax(0) - low) / _LEVELS if len(codes) else torch.zeros_like(low)).clamp(min=1e-30)
        tensors |= {"low": low, "step": step}
        stored = ((codes - low) / step).round().clamp(0, _LEVELS)
    else:
        stored = codes.to(BITS[bits])
    if not (codes.isfinite().all() and stored.isfinite().all()):
        raise UsageError(f"{path}: expected finite codes that {bits} bits hold, got others; remedy: --bits 32")
    tensors["codes"] = stored.to(BITS[bits])
    with atomic_files.whole(path) as hidden:
        atomic_files.write_tensors(hidden, {name: x.contiguous() for name, x in tensors.items()})
    return path.stat().st_size


def read(path: Path, model: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The codes [N, latent], float32, that `write` has written for this model.

    Raises UsageError: the file is no such file, is damaged, or is of other weights or images.
    """
    expected = "a file that `genai-fast compress` wrote"
    try:
        tensors = atomic_files.read_tensors(path)
    except atomic_files.Damaged as error:
        raise UsageError(f"{path}: expected {expected}, got {error}") from error
    quantised = {"low", "step"} if tensors.get("codes", torch.empty(0)).dtype is torch.uint8 else set()
    wanted = {"codes", "weights", "shape"} | quantised
    if tensors.keys() != wanted:
        raise UsageError(f"{path}: expected {expected}, got one of {', '.join(sorted(tensors)) or 'nothing'}")
    codes, latent = tensors["codes"], model.latent
    sizes = {"low": (latent,), "step": (latent,), "weights": (32,), "shape": (3,)}
    wrong = [name for name in sorted(wanted - {"codes"}) if tensors[name].shape != sizes[name]]
    if codes.dtype not in BITS.values() or codes.dim() != 2 or codes.size(1) != latent or wrong:
        what = wrong[0] if wrong else "codes"
        raise UsageError(
            f"{path}: {what}: expected codes [N, {latent}] as the model has, got {what} of {tensors[what].dtype}"
            f" {tuple(tensors[what].shape)}"
        )
    if tensors["shape"].tolist() != [*shape] or not torch.equal(tensors["weights"], digest(model)):
        raise UsageError(
            f"{path}: expected codes of this run's weights, got those of others; remedy: the run and the checkpoint"
            " (--best or not) that compressed"
        )
    codes = codes.float()
    if quantised:
        codes = tensors["low"] + tensors["step"] * codes
    if not codes.isfinite().all():
        raise UsageError(f"{path}: expected finite codes, got infinite or NaN ones")
    return codes
