"""What models ask of their arguments; each error names class, argument, expected, got and remedy."""

import math
from collections.abc import Sequence

import torch


def positive(owner: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{owner}: {name}: expected at least 1, got {value}")


def image_shape(owner: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W), each at least 1."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{owner}: shape: expected (channels, height, width), each at least 1, got {tuple(shape)}")
    return tuple(shape)


def images(owner: str, x: torch.Tensor, shape: Sequence[int]) -> None:
    """x is [B, *shape]."""
    if x.shape[1:] != tuple(shape):
        raise ValueError(
            f"{owner}: expected images [B, {', '.join(map(str, shape))}], got {tuple(x.shape)}; resize them"
        )


def pixels(owner: str, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """x [B, ...] as [B, pixels of the shape]."""
    if x.dim() < 2 or math.prod(x.shape[1:]) != math.prod(shape):
        raise ValueError(
            f"{owner}: expected images [B, {', '.join(map(str, shape))}], got {tuple(x.shape)}; remedy: another shape="
        )
    return x.flatten(1)


def mask(owner: str, x: torch.Tensor, mask: torch.Tensor) -> None:
    """x is [B, C, H, W], mask a bool [B, 1, H, W]."""
    if x.dim() != 4:
        raise ValueError(f"{owner}: x: expected images [B, C, H, W], got {tuple(x.shape)}; reshape them")
    shape = (len(x), 1, *x.shape[2:])
    if mask.dtype is not torch.bool or mask.shape != shape:
        raise ValueError(
            f"{owner}: mask: expected bool {shape}, True where x is missing, got {mask.dtype} {tuple(mask.shape)};"
            f" convert or expand it"
        )


def token_ids(owner: str, name: str, x: torch.Tensor, vocabulary: int) -> None:
    """x is [B, T] of int64 or int32, T >= 1; on a CPU its values are looked at too: in [0, vocabulary)."""
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{owner}: {name}: expected token ids of torch.int64, got {got}; convert them with .long()")
    if x.dim() != 2 or not x.size(1):
        raise ValueError(
            f"{owner}: {name}: expected token ids [B, T], T >= 1, got shape {tuple(x.shape)}; reshape them"
        )
    if x.is_cpu and x.numel() and not torch.compiler.is_compiling():
        least, most = (int(value) for value in torch.aminmax(x))
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"{owner}: {name}: expected token ids from 0 to {vocabulary - 1}, got"
                f" {least if least < 0 else most}; encode the text with the model's own tokenizer"
            )


def text(owner: str, x: torch.Tensor, vocabulary: int, block: int) -> None:
    """x is `token_ids`, T <= block."""
    token_ids(owner, "x", x, vocabulary)
    if x.size(1) > block:
        raise ValueError(
            f"{owner}: x: expected at most block={block} tokens, got {x.size(1)}; cut them, or make it with"
            f" block={x.size(1)}"
        )
