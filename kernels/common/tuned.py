"""How GPU kernels are launched: as was found fastest on this GPU, else as their launchers say.

`bench.gpu_gate` searches and writes kernels/<op>/tuned/<gpu>.json; a launcher asks `launch`. A GPU without a file takes
that of one of the same compute capability, and a shape that of the nearest shape; what is too far from all of them is
launched by default.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genai_fast.kernels.common import plans
from genai_fast.kernels.common.launch import capability

KERNELS = Path(__file__).parents[1]
FARTHEST = 2.0  # doublings that a dimension may be away from that of a tuned shape

Settings = dict[str, int]


@dataclass(frozen=True)
class Launch:
    """One launch as its launcher asked for it: `name` is <folder>/<kernel>."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    default: tuple[tuple[str, int], ...]


_tried: dict[str, Settings] = {}  # by name, whatever the shape: a tuner's
_asked: list[Launch] | None = None


def launch(name: str, x: torch.Tensor, shape: tuple[int, ...], **default: int) -> Settings:
    """Block sizes, warps and stages of a launch.

    Args:
        name: <folder>/<kernel>; what may be tried of it stands in the spec's `choices`.
        x: the tensor whose device and dtype count.
        shape: the sizes that the choice depends on.
        default: where nothing better is known.
    """
    if _asked is not None:
        _asked.append(Launch(name, _precision(x), shape, tuple(default.items())))
    if name in _tried:
        return default | _tried[name]
    found = _nearest(name, _precision(x), shape, x.device) if x.is_cuda else None
    return default if found is None else default | found


def _precision(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@contextlib.contextmanager
def tried(name: str, settings: Settings) -> Iterator[None]:
    """Launch the kernel of that name with these settings."""
    _tried[name] = settings
    plans.forget()
    try:
        yield
    finally:
        del _tried[name]
        plans.forget()


@contextlib.contextmanager
def asked() -> Iterator[list[Launch]]:
    """The launches that are asked for meanwhile."""
    global _asked
    _asked = []
    try:
        with plans.unused():
            yield _asked
    finally:
        _asked = None


def file_of(name: str, device_name: str) -> Path:
    """kernels/<op>/tuned/<gpu>.json"""
    return KERNELS / name.split("/")[0] / "tuned" / f"{slug(device_name)}.json"


def slug(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def read(path: Path) -> dict[str, Any]:
    """A file's content: {"device", "capability", "launches": {name: [{"dtype", "shape", "settings", ...}]}}."""
    return json.loads(path.read_text()) if path.exists() else {}


def nearest(entries: list[dict[str, Any]], dtype: str, shape: tuple[int, ...]) -> Settings | None:
    """The settings of the entry whose shape is nearest; None where all are of other dtypes or too far."""
    best: tuple[float, Settings | None] = (math.inf, None)
    for entry in entries:
        if entry["dtype"] != dtype or len(entry["shape"]) != len(shape):
            continue
        apart = [abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(entry["shape"], shape, strict=True)]
        if max(apart, default=0.0) <= FARTHEST and sum(apart) < best[0]:
            best = sum(apart), entry["settings"]
    return best[1]


@functools.lru_cache(4096)
def _nearest(name: str, dtype: str, shape: tuple[int, ...], device: torch.device) -> Settings | None:
    return nearest(_entries(name, device), dtype, shape)


@functools.cache
def _entries(name: str, device: torch.device) -> list[dict[str, Any]]:
    own = file_of(name, torch.cuda.get_device_name(device))
    alike = [own, *sorted(p for p in own.parent.glob("*.json") if p != own)]
    contents = (read(path) for path in alike if path.exists())
    for content in contents:
        if content["capability"] == capability(device):
            return content["launches"].get(name, [])
    return []


def reload() -> None:
    """Read the files again."""
    _nearest.cache_clear()
    _entries.cache_clear()
    plans.forget()
