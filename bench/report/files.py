"""Writing result files, and the commit that they are results of."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def write_json(path: Path, value: Any) -> None:
    """Write a whole file or nothing; NaN and infinities, which JSON lacks, become null."""
    write_all({path: (json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write whole files, creating their folders; if one cannot be written, none is."""
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
    """The commit's abbreviated hash and whether tracked files differ from it; tuned files, a gate's output, may."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD").strip()
        return head, bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!kernels/*/tuned").strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
