"""Errors that the user can fix, and packages that an extra installs."""

import importlib
from types import ModuleType


class UsageError(ValueError):
    """A mistake outside the program (a file, a flag, a package); the command line prints it as one line."""


_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # module -> distribution, if their names differ


def missing(module: str, extra: str, error: str) -> UsageError:
    """The error for a package that does not import, with the commands that install it."""
    package = module.partition(".")[0]
    package = _DISTRIBUTIONS.get(package, package)
    return UsageError(
        f'{package} does not import ({error}); remedy: pip install {package}, or pip install ".[{extra}]" in the'
        f" checkout of genai_fast"
    )


def require(module: str, extra: str) -> ModuleType:
    """Import a package that only an extra installs.

    Raises UsageError: it does not import; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(module, extra, str(error)) from error
