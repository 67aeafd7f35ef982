"""Imports by name: of what the user's own files define (`FILE.py:NAME`), and of a package's parts on demand."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genai_fast.errors import UsageError


def on_demand(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """__getattr__ and __dir__ of a package whose names are imported when they are first asked for.

    Args:
        homes: submodule, relative to the package -> the names that it defines, separated by spaces.
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f".{home_of[name]}", package), name)
        setattr(sys.modules[package], name, found)
        return found

    return get, lambda: [*vars(sys.modules[package]), *home_of]


def load(name: str, arguments: Sequence[str] = ()) -> Any:
    """The class or function of that name; from here on sys.argv is the file's or module's name and `arguments`.

    Raises UsageError: no such file or module, or no such function in it.
    """
    source, _, function = name.rpartition(":")
    sys.argv = [source, *arguments]  # of this process's own arguments it could make nothing
    found = getattr(_module(source), function, None)
    if not callable(found):
        raise UsageError(f"MODEL: expected {function!r} in {source} to be a class or function")
    return found


def _module(source: str) -> Any:
    try:
        if not source.endswith(".py"):
            sys.path.insert(0, "")
            return importlib.import_module(source)
        if not Path(source).is_file():
            raise UsageError(f"MODEL: {source}: no such file")
        # As `python FILE.py` does it: the file finds its neighbours, and a loader's workers find what it defines.
        sys.path.insert(0, str(Path(source).resolve().parent))
        name = Path(source).stem
        while name in sys.modules:
            name += "_"
        spec: Any = importlib.util.spec_from_file_location(name, source)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise UsageError(f"MODEL: {source} cannot be imported: {error}") from error
