"""Tensors as [batch, columns] for the kernels of rows.h: unit column stride, any row stride."""

import torch

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def require_alike(*tensors: torch.Tensor | None, dtype: bool = True) -> None:
    """Raise unless all have the first one's shape and device (and dtype): kernels read and write by address.

    The public ops have checked already, with better words; this is for calls of torch.ops.genai_fast itself.
    """
    first = tensors[0]
    shape, place, on_cpu = first.shape, first.get_device(), first.is_cpu  # not .device, which costs more than the rest
    for x in tensors[1:]:
        if x is None:
            continue
        if x.shape != shape or x.is_cpu != on_cpu or x.get_device() != place or (dtype and x.dtype is not first.dtype):
            raise ValueError(
                f"genai_fast: expected {first.dtype} {tuple(first.shape)} on {first.device} as its partner is,"
                f" got {x.dtype} {tuple(x.shape)} on {x.device}"
            )


def require_per_sample(like: torch.Tensor, *tensors: torch.Tensor | None, one: bool = False) -> None:
    """Raise unless each begins with like's batch (or, with `one`, is a single value) and lies on its device."""
    for x in tensors:
        if x is None:
            continue
        if x.device != like.device or (x.dim() != 0 if one else x.size(0) != like.size(0)):
            expected = "one value" if one else f"a batch of {like.size(0)}"
            raise ValueError(f"genai_fast: expected {expected} on {like.device}, got {tuple(x.shape)} on {x.device}")


def require_seed(seed: torch.Tensor, like: torch.Tensor) -> None:
    """Raise unless the seed is one int64 on like's device."""
    if seed.dtype is not torch.int64 or seed.numel() != 1 or seed.device != like.device:
        raise ValueError(f"genai_fast: expected a seed of one int64 on {like.device}, got {seed.dtype} {seed.shape}")


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x as [B, ...] with dense row-major rows, and the stride between rows; copies only other layouts.

    Keep the tensor alive while its data_ptr is in use.
    """
    if not x.is_contiguous():
        x = x.unsqueeze(1) if x.dim() == 1 else x.flatten(1)
        if x.size(1) > 1 and x.stride(1) != 1:
            x = x.contiguous()
    return x, x.stride(0)


def as_matrix(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [..., D] as [rows, D] with unit column stride, and the stride between rows; copies only where it must.

    Keep the tensor alive while its data_ptr is in use.
    """
    x = x.reshape(-1, x.size(-1))
    if x.size(1) > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def require_rows(x: torch.Tensor, *statistics: torch.Tensor | None) -> None:
    """Raise unless each is None or float32 with one value for each row of x [..., D], on its device."""
    rows, place, on_cpu = x.shape[:-1], x.get_device(), x.is_cpu
    for s in statistics:
        if s is not None and (
            s.shape != rows or s.dtype is not torch.float32 or s.is_cpu != on_cpu or s.get_device() != place
        ):
            raise ValueError(
                f"genai_fast: expected torch.float32 {tuple(rows)} on {x.device}, one for each row, got {s.dtype}"
                f" {tuple(s.shape)} on {s.device}"
            )


def per_sample_gradient(g: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """A gradient [B] or 0-d as float32: the tensor, its address (0 for None) and its stride (0 for one value)."""
    if g is None:
        return None, 0, 0
    if g.dtype is not torch.float32:
        g = g.float()
    return g, address(g), g.stride(0) if g.dim() else 0


def address(x: torch.Tensor | None) -> int:
    """Where x's data lie; 0 for None, which kernels take for what is absent.

    Raises ValueError: x has elements but no memory, as a zero tensor of autograd or a parameter that is sharded away.
    """
    if x is None:
        return 0
    found = x.data_ptr()
    if not found and x.numel():
        raise ValueError(
            f"genai_fast: expected a tensor with memory of its own, got {x.dtype} {tuple(x.shape)} without any;"
            " remedy: .clone() it"
        )
    return found


def is_dense(x: torch.Tensor) -> bool:
    """Whether x fills its memory without holes: contiguous or channels_last."""
    if x.layout is not torch.strided:
        return False
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))


def columns_of(x: torch.Tensor) -> int:
    """Elements a sample."""
    batch = x.size(0)
    return x.numel() // batch if batch else 0


def dense_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised row-major memory of x's shape, dtype and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
