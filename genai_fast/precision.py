"""How CUDA multiplies float32: in full ("ieee"), or with factors rounded to TF32's 10 bits ("tf32")."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def spelled(precision: str) -> str:
    """The full name of a precision; "bf16" is "bfloat16"."""
    return _SHORT.get(precision, precision)


@contextlib.contextmanager
def float32_products(matrices: str = "ieee", convolutions: str = "ieee") -> Iterator[None]:
    """Matrix products so meanwhile, and the products in convolutions and cuDNN's recurrent layers.

    Not by allow_tf32: reading that raises once somebody has set fp32_precision.
    """
    cudnn = torch.backends.cudnn
    wanted = {torch.backends.cuda.matmul: matrices, cudnn.conv: convolutions, cudnn.rnn: convolutions}
    before = {switch: switch.fp32_precision for switch in wanted}
    try:
        for switch, precision in wanted.items():
            switch.fp32_precision = precision
        yield
    finally:
        for switch, precision in before.items():
            switch.fp32_precision = precision
