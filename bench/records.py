"""The records of the GPU gate as a reader finds them: what may be believed of each, and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.points import FUSED
from genai_fast.errors import UsageError

STAGES = ("runs", "large", "parity", "tuning", "training", "decoding")  # each maps tasks to results
CHECKS = ("barrier_check", "memory_check")
FIGURE = {"op", "case", "dtype", "device", "variants", "ratio"}  # what a figure of an op must have
_TRAINING = {"system", "variants", "ratio"}
_REQUIRED = {
    "date": str, "commit": str, "green": bool, "through": bool, "environment": dict, "figures": list, "refused": list,
    "runs": dict,
}  # fmt: skip
# What a task says that failed for lack of memory or time: beside less work it may be right.
_LACKING = re.compile(
    r"out of memory|OutOfMemory|bad_alloc|annot allocate memory|ALLOC_FAILED"
    r"|^no end after|^the process ended with -9:"
)
OTHERS = 0.1  # processors that other programs kept busy: above it a note says so


class ReportError(UsageError):
    """The file is not one that this report reads."""


@dataclass(frozen=True)
class Record:
    """One record of `bench.gpu_gate`, of the right form."""

    path: Path
    content: dict[str, Any]

    @property
    def device(self) -> str:
        return self.content["environment"]["device"]

    @property
    def sample(self) -> bool:
        """Made up, to show the report."""
        return bool(self.content.get("sample"))

    @property
    def through(self) -> bool:
        return self.content["through"]

    @property
    def green(self) -> bool:
        """What the record says of itself is not enough: nothing in it may be wrong."""
        return self.through and self.content["green"] and not self.wrong()

    @property
    def verdict(self) -> str:
        if self.green:
            return "green"
        red = self.through or bool(self.wrong())
        return ", ".join(["red"] * red + ["not through"] * (not self.through))

    @property
    def commit(self) -> str:
        return self.content["commit"] + (" with uncommitted changes" if self.content.get("dirty") else "")

    @property
    def day(self) -> str:
        return self.content["date"][:10]

    @property
    def training(self) -> list[dict[str, Any]]:
        """Figures of training steps; a task that failed has none."""
        return [f for f in self.content.get("training", {}).values() if "variants" in f]

    @property
    def decoding(self) -> list[dict[str, Any]]:
        """Figures of GPTs that write; a task that failed has none."""
        return [f for f in self.content.get("decoding", {}).values() if "variants" in f]

    @property
    def all_figures(self) -> list[dict[str, Any]]:
        return [*self.content["figures"], *self.training, *self.decoding]

    def wrong(self) -> list[tuple[str, str]]:
        """(task, what is wrong with it: a line); refused figures last, as they mostly follow from the rest."""
        found = [
            (task, f"{kind}: {first_line(message)}")
            for stage in STAGES
            for task, result in self.content.get(stage, {}).items()
            for kind, message in failures(result).items()
        ]
        checks = {name: self.content.get(name, {}) for name in CHECKS}
        return [
            *found,
            *((f"stage {stage}", first_line(why)) for stage, why in self.content.get("errors", {}).items()),
            *((name, first_line(c.get("output", ""))) for name, c in checks.items() if not c.get("passed", True)),
            *((r["point"], f"no figure: {first_line(r['reason'])}") for r in self.content["refused"]),
        ]

    def not_reached(self) -> list[str]:
        """What the gate had to do and has not done; a line a stage."""
        return [f"{stage}: {listed(names)}" for stage, names in self.content.get("left", {}).items()]


def failures(result: dict[str, Any]) -> dict[str, str]:
    """What is wrong with a task, by kind."""
    found = dict(result.get("failures", {}))
    return found | ({"died": result["died"]} if "died" in result else {})


def lacking(result: dict[str, Any]) -> bool:
    """Whether a task failed, and for lack of memory or time alone."""
    found = failures(result)
    return bool(found) and all(_LACKING.search(message) for message in found.values())


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "it does not say why")[:200]


def listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def title(figure: dict[str, Any]) -> str:
    """What a figure is of."""
    name = figure["op"] if "op" in figure else f"training step of {figure['system']}"
    case = figure.get("case") if figure.get("case") != figure.get("system") else None
    return " ".join(filter(None, (name, case, figure.get("dtype"))))


def notes(figures: Iterable[dict[str, Any]]) -> list[str]:
    """Skipped variants, and what was measured beside other work."""
    found = []
    for figure in figures:
        name = title(figure)
        for variant, values in figure["variants"].items():
            if "skipped" in values:
                found.append(f"{name}: {variant} was skipped: {values['skipped']}")
        if (figure.get("foreign_load") or 0.0) > OTHERS:
            found.append(f"{name}: other programs kept {figure['foreign_load']:.1f} processors busy meanwhile")
    return found


def read_json(path: Path) -> Any:
    """Raises ReportError where there is no whole JSON file."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: is not JSON, or was cut off ({error}); measure again") from error


def is_record(content: Any) -> bool:
    return isinstance(content, dict) and "figures" in content and "environment" in content


def read(path: Path) -> Record:
    """A record of the gate.

    Raises:
        ReportError: the file is missing, cut off, foreign or damaged.
    """
    content = read_json(path)
    if not is_record(content):
        raise ReportError(
            f"{path}: expected a record of bench.gpu_gate, got a file without 'figures' and 'environment'"
        )
    for name, kind in _REQUIRED.items():
        _expect(path, name, content.get(name), kind)
    _expect(path, "environment: device", content["environment"].get("device"), str)
    for name in (*STAGES, *CHECKS, "errors"):
        for task, result in _expect(path, name, content.get(name, {}), dict).items():
            if name in STAGES:
                _expect(path, f"{name}: {task}", result, dict)
    for refusal in content["refused"]:
        _keys(path, "refused", refusal, {"point", "reason"})
    for k, figure in enumerate(content["figures"]):
        _figure(path, f"figures: {k}", figure, FIGURE)
    for stage, required in (("training", _TRAINING), ("decoding", FIGURE)):
        for task, figure in content.get(stage, {}).items():
            if not failures(figure) and "skipped" not in figure:
                _figure(path, f"{stage}: {task}", figure, required)
    return Record(path, content)


def read_all(paths: Iterable[Path]) -> list[Record]:
    """The records of one GPU, newest first, from files and folders of them."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise ReportError(f"expected records of bench.gpu_gate, got no .json in {listed(map(str, paths))}")
    found = sorted(map(read, files), key=lambda r: (r.content["date"], r.path.name), reverse=True)
    if len({(r.device, r.sample) for r in found}) > 1:
        devices = listed(sorted({f"{r.device} ({r.path})" for r in found}))
        raise ReportError(f"expected records of one GPU, got {devices}; remedy: one call for each")
    return found


def _figure(path: Path, where: str, figure: Any, required: set[str]) -> None:
    _keys(path, where, figure, required)
    for peer, ratio in _expect(path, f"{where}: ratio", figure["ratio"], dict).items():
        _expect(path, f"{where}: ratio: {peer}", ratio, (int, float))
    for name, variant in {FUSED: None, **_expect(path, f"{where}: variants", figure["variants"], dict)}.items():
        if "skipped" not in _expect(path, f"{where}: variants: {name}", variant, dict):
            _expect(path, f"{where}: variants: {name}: wall_us", variant.get("wall_us"), (int, float))


def _keys(path: Path, where: str, value: Any, required: set[str]) -> None:
    missing = sorted(required - _expect(path, where, value, dict).keys())
    if missing:
        raise ReportError(f"{path}: {where}: expected {', '.join(sorted(required))}, {', '.join(missing)} missing")


def _expect(path: Path, where: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ReportError(f"{path}: {where}: expected {names}, got {str(value)[:60]!r}; it is damaged: measure again")
    return value
