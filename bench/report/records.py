"""The GPU gate's records: read and checked, what is wrong in each, and whether it is green."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from bench.points import FUSED
from genai_fast.errors import UsageError

# A record maps each stage's tasks to their results; "figures" last, as its failures mostly follow from the others.
STAGES = ("runs", "large", "parity", "tuning", "training", "decoding", "figures")
CHECKS = ("barrier_check", "memory_check")
MEASURING = ("figures", "training", "decoding")  # stages whose results are figures
# Messages of a task that failed for lack of memory or time: with less running alongside it may pass.
_LACKING = re.compile(
    r"out of memory|OutOfMemory|bad_alloc|annot allocate memory|ALLOC_FAILED"
    r"|^no end after|^the process ended with -9:"
)


class ReportError(UsageError):
    """The file is not one that this report reads."""


def failures(result: dict[str, Any]) -> dict[str, str]:
    """What is wrong with a task, by kind."""
    return {**result.get("failures", {}), **({"died": result["died"]} if "died" in result else {})}


def lacking(result: dict[str, Any]) -> bool:
    """Whether a task failed, and only for lack of memory or time."""
    found = failures(result)
    return bool(found) and all(_LACKING.search(message) for message in found.values())


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")[:200]


def listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class Record:
    """One record of `bench.gpu_gate`, its form checked."""

    path: Path
    content: dict[str, Any]

    @property
    def device(self) -> str:
        return self.content["environment"]["device"]

    @property
    def sample(self) -> bool:
        """Whether it is made up, to demonstrate the report."""
        return bool(self.content.get("sample"))

    @property
    def on_cpu(self) -> bool:
        return any(f.get("device") == "cpu" for f in self.figures())

    @property
    def through(self) -> bool:
        return self.content["through"]

    @property
    def green(self) -> bool:
        """Passed everything; the record's own verdict does not suffice."""
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

    def figures(self, *stages: str) -> list[dict[str, Any]]:
        """The figures of these stages (default: all); a failed task has none."""
        return [f for stage in stages or MEASURING for f in self.content[stage].values() if "variants" in f]

    def wrong(self) -> list[tuple[str, str]]:
        """(task, what is wrong with it in one line)."""
        content = self.content
        results = [pair for stage in STAGES for pair in content[stage].items()]
        found = [(task, f"{kind}: {message}") for task, r in results for kind, message in failures(r).items()]
        found += [(f"stage {stage}", why) for stage, why in content["errors"].items()]
        found += [(name, content[name].get("output", "")) for name in CHECKS if not content[name].get("passed", True)]
        return [(task, first_line(why)) for task, why in found]

    def not_reached(self) -> list[str]:
        """What the gate has not done yet, one line per stage."""
        return [f"{stage}: {listed(names)}" for stage, names in self.content["left"].items()]


# The form of a record: a type; the forms of a dict's required keys, "*" those of all others; or a function of the value
# that gives its form.

_NUMBER = int | float


def _variant(value: dict[str, Any]) -> Any:
    return {} if "skipped" in value else {"wall_us": _NUMBER}


def _training(value: dict[str, Any]) -> Any:
    return _CASE if "op" in value else {"system": str, **_STEP}


_STEP = {"variants": {FUSED: _variant, "*": _variant}, "ratio": {"*": _NUMBER}}
_CASE = _STEP | dict.fromkeys(("op", "case", "dtype", "device"), str)


def _measured(form: Any) -> Any:
    return {"*": lambda result: {} if failures(result) else form(result) if callable(form) else form}


_FORM = {
    "date": str, "commit": str, "green": bool, "through": bool, "environment": {"device": str}, "errors": {"*": str},
    **{stage: {"*": dict} for stage in STAGES}, **dict.fromkeys(CHECKS, dict), "left": {"*": list},
    "figures": _measured(_CASE), "training": _measured(_training), "decoding": _measured(_CASE),
}  # fmt: skip
_OPTIONAL = ("errors", "left", *CHECKS, *(stage for stage in STAGES if stage not in ("runs", "figures")))


def _check(path: Path, where: str, value: Any, form: Any) -> None:
    leaf = isinstance(form, type | UnionType)
    if not isinstance(value, form if leaf else dict):
        kind = getattr(form, "__name__", str(form)) if leaf else "dict"
        raise ReportError(f"{path}: {where}: expected {kind}, got {str(value)[:60]!r}; it is damaged: measure again")
    if leaf:
        return
    form = form(value) if callable(form) else form
    if missing := sorted(form.keys() - value.keys() - {"*"}):
        raise ReportError(f"{path}: {where}: {', '.join(missing)} missing; it is damaged: measure again")
    for name, item in value.items():
        if (inner := form.get(name, form.get("*"))) is not None:
            _check(path, f"{where}: {name}", item, inner)


def is_figure(value: dict[str, Any]) -> bool:
    """Whether a benchmark's extra information holds a point's figures."""
    return value.keys() >= _CASE.keys()


def read_json(path: Path) -> Any:
    """Raises ReportError if there is no whole JSON file."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: is not JSON, or was cut off ({error}); measure again") from error


def is_record(content: Any) -> bool:
    return isinstance(content, dict) and "figures" in content and "environment" in content


def read(path: Path) -> Record:
    """Read a record. Raises ReportError: the file is missing, cut off, foreign or damaged."""
    content = read_json(path)
    if not is_record(content):
        raise ReportError(
            f"{path}: expected a record of `pytest bench --record` or bench.gpu_gate, got a file without 'figures' and"
            f" 'environment'"
        )
    content = {name: {} for name in _OPTIONAL} | content
    _check(path, "record", content, _FORM)
    return Record(path, content)


def read_all(paths: Iterable[Path]) -> list[Record]:
    """The records of one GPU, newest first, from files and folders of them."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise ReportError(f"expected records, got no .json in {listed(map(str, paths))}")
    found = sorted(map(read, files), key=lambda r: (r.content["date"], r.path.name), reverse=True)
    if len({(r.device, r.sample) for r in found}) > 1:
        devices = listed(sorted({f"{r.device} ({r.path})" for r in found}))
        raise ReportError(f"expected records of one GPU, got {devices}; remedy: one call for each")
    return found
