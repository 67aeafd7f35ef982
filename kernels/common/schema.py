"""What run time needs of an op folder; cases, peers and costs are in its spec, which tests and benchmarks load."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """Of statistics and sums of x: float32 or wider."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class LibraryOp:
    """One operator of torch.ops.genai_fast: its schema (the last argument is always `str backend`) and its fake.

    `reference.py`, `cpu_kernel.py` and `triton_kernel.py` of the folder each define a function of the same name
    that takes the same arguments without `backend`.
    """

    schema: str
    fake: Callable[..., Any]
    # Backends with a kernel of it, where the folder has them; on the others the reference is what is meant to serve.
    kernels: tuple[str, ...] = ("cpu", "triton")
    # (backend, *arguments) -> why its kernel leaves such arguments to the reference, or "".
    refuses: Callable[..., str] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES  # that the kernels take

    @property
    def name(self) -> str:
        return self.schema.split("(", 1)[0]
