"""The record of one run of `pytest bench/`: written after each point, so that an interruption loses nothing.

It has the form of the GPU gate's records (bench/report/records.py), and `python -m bench.report` draws its page. A run
at the same commit continues it: what was measured while other programs kept the machine busy is measured again.
"""

import datetime
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import roofs
from bench.report import files, records
from genai_fast.profiling.machine import environment

RESULTS = files.ROOT / "bench" / "results"
QUIET = 0.2  # processors that other programs may keep busy while a point of the record is measured

Figures = list[dict[str, Any]]
Clock = Callable[[], Figures]


def default_path(device: str, commit: str, dirty: bool | None, day: datetime.date) -> Path:
    """bench/results/<device>/<date>-<commit>[-dirty].json"""
    folder = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RESULTS / folder / f"{day.isoformat()}-{commit}{'-dirty' if dirty else ''}.json"


def begin(device: str, commit: str | None = None) -> dict[str, Any]:
    """The head of a new record: day, commit and machine with its roofs."""
    head, dirty = (commit, None) if commit else files.commit()
    described = environment(device)
    if device == "cpu":  # processors of one name differ in this
        described["device"] += f" ({described['instruction_set'] or 'no C++ kernels'})"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": dirty,
        "environment": {**described, "roofs": roofs.roofs(device)},
    }


def is_quiet(figure: Mapping[str, Any]) -> bool:
    return (figure.get("foreign_load") or 0.0) <= QUIET


def path_for(content: Mapping[str, Any]) -> Path:
    """Where a record belongs: an earlier one of the same commit and device, or a new one."""
    day = datetime.date.fromisoformat(content["date"][:10])
    new = default_path(content["environment"]["device"], content["commit"], content["dirty"], day)
    return max(new.parent.glob(f"*{new.name[10:]}"), default=new)


class Recording:
    """Figures by stage and name, in memory and, with a path, on disk.

    Args:
        path: the record, which is continued if it exists; None: nothing is written.
        content: the head of a new one.
        expected: the names of each stage's points, for what is left.
    """

    def __init__(self, path: Path | None, content: dict[str, Any], expected: Mapping[str, list[str]]) -> None:
        self.path, self.expected = path, expected
        self.content = records.read(path).content if path and path.exists() else content
        for stage in expected:
            self.content.setdefault(stage, {})

    def known(self, stage: str, name: str) -> bool:
        """Whether a point was measured on a quiet machine."""
        found = [f for key, f in self.content[stage].items() if key.partition(", ")[0] == name]
        return bool(found) and all("variants" in f and is_quiet(f) for f in found)

    def measure(self, stage: str, name: str, red: Callable[[], str], clock: Clock) -> Figures:
        """The figures of a point, recorded; AssertionError, recorded too, if it computes something wrong."""
        if why := red():
            self._add(stage, {name: {"failures": {"gate": why}}})
            raise AssertionError(f"no clock on a red gate: {why}")
        found = clock()
        names = [name] if len(found) == 1 else [f"{name}, {f['setting']}" for f in found]
        self.content[stage].pop(name, None)
        self._add(stage, dict(zip(names, found, strict=True)))
        return found

    def _add(self, stage: str, found: dict[str, Any]) -> None:
        self.content[stage] |= found
        if self.path is None:
            return
        content = self.content
        done = {s: {key.partition(", ")[0] for key in content[s]} for s in self.expected}
        left = {s: [name for name in names if name not in done[s]] for s, names in self.expected.items()}
        left = {s: names for s, names in left.items() if names}
        red = any(records.failures(f) for s in self.expected for f in content[s].values())
        content.update(runs={}, left=left, through=not left, green=not left and not red)
        files.write_json(self.path, content)


def behind(now: Mapping[str, Any], former: Mapping[str, Any]) -> list[str]:
    """Points that are slower against eager than in a former record, by more than either's noise."""
    found = []
    for stage in ("figures", "training"):
        for name, new in now.get(stage, {}).items():
            old = former.get(stage, {}).get(name, {})
            for peer, (_, high) in new.get("spread", {}).items():
                low = old.get("spread", {}).get(peer, (0.0, 0.0))[0]
                if high < low * 0.95:
                    found.append(f"{name}: {new['ratio'][peer]:.2f} against {peer}, {old['ratio'][peer]:.2f} before")
    return found
