"""What a measurement says of where it was made, and the file that keeps it."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genai_fast.profiling.machine import device_name, environment, processor

__all__ = ["ROOT", "commit", "device_name", "environment", "processor", "write_all", "write_json"]

ROOT = Path(__file__).resolve().parents[1]


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all; a number that is not finite, for which JSON has no word, as null."""
    write_all({path: (json.dumps(_plain(value), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_all(files: Mapping[Path, bytes]) -> None:
    """Each file whole, and none where one of them cannot be written; their folders are made."""
    hidden = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, temporary in hidden.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(files[path])
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in hidden.items():
            os.replace(temporary, path)
    finally:
        for temporary in hidden.values():
            temporary.unlink(missing_ok=True)


def commit() -> tuple[str, bool | None]:
    """Abbreviated hash of the checkout's commit, and whether tracked files differ from it; a gate's tuned ones may."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!kernels/*/tuned")
        return head, bool(changed.strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
