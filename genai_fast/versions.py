"""Versions of what is installed, and of genai_fast, which may be a checkout that is not installed."""

import importlib.metadata

__version__ = "0.2.0"  # the one place: pyproject.toml reads this line


def version(package: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    if package == "genai_fast":
        return __version__
    if package == "torch":
        import torch  # here, so that reading genai_fast's own version does not wait for it

        return torch.__version__  # with the build, which the distribution may leave out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
