"""Errors that are the user's to mend, and packages that come with an extra."""

from __future__ import annotations

import importlib
from types import ModuleType


class UsageError(ValueError):
    """A mistake outside the program (a file, a flag, a package); the command line prints it as one line."""


def require(module: str, extra: str) -> ModuleType:
    """Import a package that only an extra installs.

    Raises:
        UsageError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(f'{package} does not import ({error}); remedy: pip install "genai-fast[{extra}]"') from error
