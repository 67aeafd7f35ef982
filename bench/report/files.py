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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a whole file or nothing, a line for each task; NaN and infinities, which JSON lacks, as null."""
    write_all({path: (_lines(_finite(value), 2) + "\n").encode()})


def _lines(value: Any, depth: int) -> str:
    if not depth or not isinstance(value, dict) or not value:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    parts = (f"{json.dumps(name)}: {_lines(x, depth - 1)}" for name, x in sorted(value.items()))
    return "{\n" + ",\n".join(parts) + "\n}"


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
