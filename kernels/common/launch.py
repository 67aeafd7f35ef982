"""Grids and block sizes of the Triton launchers."""

import functools
from typing import Any

import torch


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def row_tile(columns: int, elements: int, least: int = 4) -> tuple[int, int, int]:
    """(ROWS, BLOCK, splits): a program handles ROWS x BLOCK elements of [batch, columns], a row takes `splits`."""
    block = min(max(next_power_of_2(columns), least), elements)
    return elements // block, block, max(ceil_div(columns, block), 1)


emulated: Any = None  # inside genai_fast.testing.emulated_gpu: its properties, for launches on CPU tensors


def properties(device: torch.device) -> Any:
    """What CUDA says of a device, or the emulated GPU of itself; None where kernels are interpreted."""
    return _cuda_properties(device) if device.type == "cuda" else emulated


_cuda_properties = functools.cache(torch.cuda.get_device_properties)


def compiled(x: torch.Tensor) -> bool:
    """Whether kernels on such tensors are compiled, for a GPU or an emulated one, and not interpreted."""
    return x.is_cuda or emulated is not None


def capability(device: torch.device) -> int:
    """Ten times the compute capability: 90 for an H100, and for what has none (interpreted kernels)."""
    found = properties(device)
    return 90 if found is None else 10 * found.major + found.minor
