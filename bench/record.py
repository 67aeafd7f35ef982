"""What a measurement says of where it was made, and the file that keeps it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from genai_fast.profiling.machine import device_name, environment, processor

__all__ = ["ROOT", "commit", "device_name", "environment", "processor", "write_json"]

ROOT = Path(__file__).resolve().parents[1]


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all."""
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
