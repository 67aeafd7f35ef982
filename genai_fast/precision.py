"""In which precision products are computed: autocast's dtype, and how CUDA multiplies float32.

That is in full ("ieee"), or with factors rounded to TF32's 10 bits ("tf32").
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on this type of device; None if it is off, or if the device (such as meta) has none."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast is off on this type of device inside the block."""
    return contextlib.nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


@contextlib.contextmanager
def float32_products(matrices: str = "ieee", convolutions: str = "ieee") -> Iterator[None]:
    """The precision of matrix products, and of convolutions and cuDNN's recurrent layers, inside the block.

    Not by allow_tf32: reading that raises once fp32_precision has been set.
    """
    cudnn: Any = torch.backends.cudnn
    wanted = {torch.backends.cuda.matmul: matrices, cudnn.conv: convolutions, cudnn.rnn: convolutions}
    before = {switch: switch.fp32_precision for switch in wanted}
    try:
        for switch, precision in wanted.items():
            switch.fp32_precision = precision
        yield
    finally:
        for switch, precision in before.items():
            switch.fp32_precision = precision
