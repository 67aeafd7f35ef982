"""Versions of what is installed, and of genai_fast, which may be a checkout that nobody installed."""

from __future__ import annotations

import importlib.metadata

import torch

__version__ = "0.1.0"


def version(package: str) -> str | None:
    """Of a distribution; None where it is not installed."""
    if package == "genai_fast":
        return __version__
    if package == "torch":
        return torch.__version__  # with the build, which the distribution may leave out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
