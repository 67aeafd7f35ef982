"""Writing result files, and the commit that they are results of."""

import contextlib
import json
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genai_fast import atomic_files

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
    with contextlib.ExitStack() as stack:
        for path, content in reversed(files.items()):  # the last to be entered is renamed first
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(atomic_files.whole(path)).write_bytes(content)


def commit() -> tuple[str, bool | None]:
    """The commit's abbreviated hash and whether tracked files differ from it; tuned files, a gate's output, may."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD").strip()
        return head, bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!kernels/*/tuned").strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
