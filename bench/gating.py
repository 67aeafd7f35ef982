"""What a GPU gate has to do, what it has done, and what of that counts: its record as it grows."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import isolated, record, training_figures, tuning
from bench.points import COMPILED, Point
from bench.records import failures, lacking
from genai_fast.kernels.common import tuned

# A stage asks which of its tasks were done, and gives a process that does the others.
MODULES = {
    "runs": "bench.checks", "large": "bench.large", "parity": "bench.parity", "figures": "bench.op_figures",
    "training": "bench.training_figures", "decoding": "bench.decoding", "compiled": "bench.op_figures",
    "tuning": "bench.tuning",
}  # fmt: skip
COMPILING = ("training", "decoding", "compiled", "tuning")  # in which one task may compile for minutes without a word
FIGURES = ("training", "decoding")  # stages whose results are figures, beside those of ops
AGAIN = "measured before tuning"  # in the record's `left`
_SAVED = 15.0  # seconds from one writing of the record to the next
_RED_OP = "the gate of "

Tasks = dict[str, list[list[str]]]  # by stage, in batches


class Gate:
    """The record of a gate as it grows, on disk and here.

    `tasks` are what must be done: stage -> batches of tasks, the tasks of a batch in one process; `todo` the points
    whose figures are wanted.

    `tuned` in the record are the launches whose settings tuning has changed, in the order in which it did; a figure's
    `tuned` is how many of them it was measured with. If one that it uses came later it is measured again.
    """

    def __init__(self, path: Path, content: dict[str, Any], tasks: Tasks, todo: list[Point]) -> None:
        self.path, self.content, self.tasks, self.todo = path, content, tasks, todo
        for stage in (*tasks, "errors"):
            content.setdefault(stage, {})
        for name in ("figures", "refused", "tuned", "retried"):
            content.setdefault(name, [])
        self.written = {path}
        self._saved = time.monotonic()

    # Tasks

    def run_stage(self, stage: str, device: str, deadline: float, jobs: int = 1) -> None:
        """Do what is not done yet of a stage, until the deadline."""
        known = self.content[stage]
        if stage == "training":
            self._refuse_training()

        def done(task: str, result: dict[str, Any]) -> None:
            known[task] = self._stamped(result) if stage in FIGURES else result
            for kind, message in failures(result).items():
                print(f"RED {task}: {kind}: {message}", flush=True)
            self.save()

        left = [[task for task in batch if self._wanted(stage, task)] for batch in self.tasks[stage]]
        self._isolated(stage, device, sorted(filter(None, left), key=len, reverse=True), done, deadline, jobs)
        wanted = [task for batch in self.tasks[stage] for task in batch]
        found = [known[task] for task in wanted if task in known]
        bad = sum(bool(failures(result)) for result in found)
        print(f"{stage}: {len(found)} of {len(wanted)} done, {bad} red", flush=True)

    def _wanted(self, stage: str, task: str) -> bool:
        known = self.content[stage]
        return task not in known or (stage in FIGURES and self._stale(known[task]))

    def _isolated(
        self, stage: str, device: str, batches: Sequence[Sequence[str]], done: isolated.Done, deadline: float, jobs: int
    ) -> None:
        """Several at once have a cache of their own: which path is fastest they measure on a machine that is busy."""
        command = [sys.executable, "-m", MODULES[stage], device, *(["--compile"] if stage == "compiled" else [])]
        silent = training_figures.SILENT if stage in COMPILING else isolated.SILENT
        limits = {"jobs": jobs, "deadline": deadline, "silent": silent}
        with tempfile.TemporaryDirectory(prefix="gpu_gate", ignore_cleanup_errors=True) as folder:
            own = {**os.environ, "GENAI_FAST_CACHE": folder} if jobs > 1 else None
            isolated.run(command, batches, done, **limits, environment=own)

    def _refuse_training(self) -> None:
        """No figures of a training step whose curve is wrong."""
        known, curves = self.content["training"], self.content.get("parity", {})
        for task in (task for batch in self.tasks["training"] for task in batch):
            curve = training_figures.parity_of(task)
            red = {"failures": {"parity": f"that of {curve} is red"}}
            if failures(curves.get(curve, {})):
                known.setdefault(task, red)
            elif known.get(task) == red:
                del known[task]  # the curve was right when it was tried again

    # Figures of ops

    def measure(self, device: str, deadline: float, *, compiled: bool) -> None:
        """Figures of the points whose op is green, until the deadline."""
        content, stage = self.content, "compiled" if compiled else "figures"
        self._refuse_points()
        left = [str(point) for point in self.todo if self._open(point, compiled)]

        def done(name: str, result: dict[str, Any]) -> None:
            failed = "; ".join(f"{kind}: {message}" for kind, message in failures(result).items())
            mine = self._figure(name)
            others = [f for f in content["figures"] if f is not mine]
            if failed and compiled and mine is not None:
                # Without torch.compile it went well: how the two end together says nothing of the op.
                mine["variants"][COMPILED] = {"skipped": failed[:1000]}
            elif failed or "refused" in result:
                content["figures"] = others
                self._refuse(name, failed or result["refused"], lacking(result))
            else:
                content["figures"] = [*others, {"point": name, **self._stamped(result)}]
            self.save()

        # One process for all, and another behind a point that ends it: to start one takes longer than to measure.
        self._isolated(stage, device, [left] if left else [], done, deadline, 1)
        waiting = sum(not self._op_red(op) and not self.op_green(op) for op in {point.op.name for point in self.todo})
        print(
            f"{stage}: {len(content['figures'])} figures of {len(self.todo)} points, {len(content['refused'])} refused"
            + (f"; those of {waiting} ops wait for its runs" if waiting else ""),
            flush=True,
        )

    def _open(self, point: Point, compiled: bool) -> bool:
        """Whether a point's figure is to be measured now."""
        if any(r["point"] == str(point) for r in self.content["refused"]) or not self.op_green(point.op.name):
            return False
        mine = self._figure(str(point))
        if compiled:
            return point.op.compiled and (mine is None or COMPILED not in mine["variants"] or self._stale(mine))
        # With torch.compile's time in it, it is measured again with that too.
        return mine is None or (self._stale(mine) and COMPILED not in mine["variants"])

    def _figure(self, name: str) -> dict[str, Any] | None:
        return next((f for f in self.content["figures"] if f["point"] == name), None)

    def _refuse_points(self) -> None:
        """No figure without a green gate; what was red may have been right when it was tried again."""
        kept = [r for r in self.content["refused"] if not r["reason"].startswith(_RED_OP)]
        self.content["refused"] = kept
        for point in self.todo:
            if self._op_red(point.op.name):
                self._refuse(str(point), f"{_RED_OP}{point.op} is red")

    def _refuse(self, name: str, reason: str, again: bool = False) -> None:
        others = [r for r in self.content["refused"] if r["point"] != name]
        self.content["refused"] = [*others, {"point": name, "reason": reason[:1000], "again": again}]

    def _op_runs(self, op: str) -> list[str]:
        return [task for batch in self.tasks["runs"] for task in batch if task.startswith(f"{op}-")]

    def _op_red(self, op: str) -> bool:
        return any(failures(self.content["runs"].get(task, {})) for task in self._op_runs(op))

    def op_green(self, op: str) -> bool:
        """Whether an op passed everything, and anything was checked at all."""
        names, known = self._op_runs(op), self.content["runs"]
        return bool(names) and all(name in known and not failures(known[name]) for name in names)

    # Tuning

    def write_tuned(self, device: str) -> None:
        """The tuned files, of all settings that were found; which launches go another way since is noted."""
        found = [result for result in self.content["tuning"].values() if "settings" in result]
        new = [result for result in found if "changed" not in result]
        if not found:
            return
        before = [in_force(result, device) for result in new]
        self.written |= {
            record.ROOT / name for name in tuning.write(found, torch.device(device), self.content["commit"])
        }
        for result, former in zip(new, before, strict=True):
            result["changed"] = in_force(result, device) != former
        self.content["tuned"] += sorted({result["kernel"] for result in new if result["changed"]})

    def _stamped(self, result: dict[str, Any]) -> dict[str, Any]:
        return {**result, "tuned": len(self.content["tuned"])} if "variants" in result else result

    def _stale(self, figure: dict[str, Any]) -> bool:
        """Whether launches were tuned behind a figure's back; of a whole step nobody knows which it has."""
        since = self.content["tuned"][figure.get("tuned", 0) :]
        return "variants" in figure and bool(set(since) & set(figure.get("launches", since)))

    # The whole

    def guarded(self, stage: str, work: Callable[[], Any]) -> None:
        """Do a stage; whatever is wrong with the stage itself is noted, and ends no other."""
        self.content["errors"].pop(stage, None)
        try:
            work()
        except Exception as error:
            self.content["errors"][stage] = f"{type(error).__name__}: {error}"[:1000]
            print(f"RED stage {stage}: {self.content['errors'][stage]}", flush=True)
        self.save(now=True)

    def retry(self) -> None:
        """Forget, once each, what failed for lack of memory or time."""
        content = self.content

        def again(name: str, lacked: bool) -> bool:
            first = lacked and name not in content["retried"]
            content["retried"] += [name] * first
            return first

        for stage in self.tasks:
            known = content[stage]
            content[stage] = {t: r for t, r in known.items() if not again(f"{stage}: {t}", lacking(r))}
        content["refused"] = [
            r for r in content["refused"] if not again(f"figures: {r['point']}", r.get("again", False))
        ]
        if again("memory_check", content.get("memory_check", {}).get("again", False)):
            del content["memory_check"]

    def left(self) -> dict[str, list[str]]:
        """What was not done yet, by stage; figures are without torch.compile, for which there may be no time."""
        content, found = self.content, {}
        for stage, batches in self.tasks.items():
            found[stage] = [task for batch in batches for task in batch if task not in content[stage]]
        done = {f["point"] for f in content["figures"]} | {r["point"] for r in content["refused"]}
        found["figures"] = [str(point) for point in self.todo if str(point) not in done]
        found["checks"] = [name for name in ("barrier_check", "memory_check") if name not in content]
        found[AGAIN] = [f["point"] for f in content["figures"] if self._stale(f)]
        for stage in FIGURES:
            found[AGAIN] += [task for task, figure in content.get(stage, {}).items() if self._stale(figure)]
        return {stage: names for stage, names in found.items() if names}

    def through(self) -> bool:
        """Whether all was done that a verdict hangs on: launches that nobody searched go by their defaults."""
        return not self.left().keys() - {"tuning"}

    def green(self) -> bool:
        """Whether what was to be done is right."""
        content = self.content
        bad = any(failures(result) for stage in self.tasks for result in content[stage].values())
        checks = (content.get(name, {}).get("passed", True) for name in ("memory_check", "barrier_check"))
        return self.through() and not bad and not content["refused"] and not content["errors"] and all(checks)

    def save(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._saved > _SAVED:
            self.content.update(green=self.green(), through=self.through(), left=self.left())
            record.write_json(self.path, self.content)
            self._saved = time.monotonic()


def in_force(result: dict[str, Any], device: str) -> dict[str, int]:
    """The settings with which a launch that was tuned goes now."""
    x = torch.empty(0, dtype=getattr(torch, result["dtype"]), device=device)
    return tuned.launch(result["kernel"], x, tuple(result["shape"]), **result["default"])
