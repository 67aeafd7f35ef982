"""Names that have two spellings. Without torch, for which the command line's messages do not wait."""

from __future__ import annotations

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def spelled(precision: str) -> str:
    """The full name of a precision; "bf16" is "bfloat16"."""
    return _SHORT.get(precision, precision)
