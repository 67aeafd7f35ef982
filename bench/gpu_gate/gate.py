"""What a GPU gate has to do, what it has done, and what of that counts: its record as it grows."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu_gate import processes, training, tuning
from bench.points import COMPILED
from bench.report import files
from bench.report.records import CHECKS, MEASURING, STAGES, failures, lacking
from genai_fast.kernels.common import tuned

WORKER = "bench.gpu_gate.worker"
PARALLEL = ("runs", "parity")  # stages whose processes may run side by side: nothing is timed in them
COMPILING = ("training", "decoding", "compiled", "tuning")  # in which one task may compile for minutes without output
AGAIN = "measured before tuning"  # in the record's `left`
_SAVED = 15.0  # seconds between two writes of the record
_WAITS = "waits for its runs"

Tasks = dict[str, list[list[str]]]  # by stage, in batches


class Gate:
    """The record of a gate, in memory and on disk.

    `tasks`: what must be done, stage -> batches of tasks, each batch in one process. The record maps each stage to
    {task: result}. "compiled" has tasks of its own (points that torch.compile can serve) and adds to "figures".

    `tuned` in the record lists the launches whose settings tuning changed, in order; a figure's `tuned` is how many of
    them it was measured with. A figure whose launches were tuned later is measured again.
    """

    def __init__(self, path: Path, content: dict[str, Any], tasks: Tasks, device: str) -> None:
        self.path, self.content, self.tasks, self.device = path, content, tasks, device
        for name in (*STAGES, "errors"):
            content.setdefault(name, {})
        for name in ("tuned", "retried"):
            content.setdefault(name, [])
        self.written = {path}
        self._saved = time.monotonic()

    def _tasks(self, stage: str) -> list[str]:
        return [task for batch in self.tasks.get(stage, ()) for task in batch]

    def run_stage(self, stage: str, deadline: float, jobs: int = 1) -> None:
        """Do what is left of a stage, until the deadline."""
        known = self.content["figures" if stage == "compiled" else stage]
        waiting = self._refuse(stage, known)

        def done(task: str, result: dict[str, Any]) -> None:
            wrong = failures(result)
            if stage == "compiled" and wrong and "variants" in known.get(task, {}):
                # It was right without torch.compile: how both end together says nothing about the op.
                known[task]["variants"][COMPILED] = {"skipped": "; ".join(map(": ".join, wrong.items()))[:1000]}
            else:
                known[task] = {**result, "tuned": len(self.content["tuned"])} if "variants" in result else result
                for kind, message in wrong.items():
                    print(f"RED {task}: {kind}: {message}", flush=True)
            self.save()

        todo = self.tasks.get(stage, ())
        batches = [[t for t in batch if t not in waiting and self._wanted(stage, t)] for batch in todo]
        batches = sorted(filter(None, batches), key=len, reverse=True)
        module, options = ("figures", {"compiled": True}) if stage == "compiled" else (stage, {})
        command = [sys.executable, "-m", WORKER, module, self.device, json.dumps(options)]
        jobs = jobs if stage in PARALLEL else 1
        silent = training.SILENT if stage in COMPILING else processes.SILENT
        with tempfile.TemporaryDirectory(prefix="gpu_gate", ignore_cleanup_errors=True) as folder:
            # Processes side by side measure which implementation is fastest on a busy machine: the choice is not kept.
            own = {**os.environ, "GENAI_FAST_CACHE": folder} if jobs > 1 else None
            processes.run(command, batches, done, jobs=jobs, deadline=deadline, silent=silent, environment=own)
        found = [known[task] for task in self._tasks(stage) if task in known]
        red = sum(bool(failures(result)) for result in found)
        counts = f"{len(found)} of {len(self._tasks(stage))} done, {red} red"
        print(f"{stage}: {counts}" + (f", {len(waiting)} wait for their op's runs" if waiting else ""), flush=True)

    def _wanted(self, stage: str, task: str) -> bool:
        known = self.content["figures" if stage == "compiled" else stage].get(task)
        if known is None or failures(known):
            return known is None
        has_compiled = COMPILED in known.get("variants", {})
        if stage == "compiled":
            return not has_compiled or self._stale(known)
        # A figure with torch.compile's time in it is measured again with that.
        return stage in MEASURING and self._stale(known) and not (stage == "figures" and has_compiled)

    def _refuse(self, stage: str, known: dict[str, Any]) -> set[str]:
        """Fail what a red check forbids to measure, and forget such failures of what may be right now.

        Returns: The tasks that wait for their op's runs.
        """
        waiting = set()
        for task in self._tasks(stage):
            why = self._forbidden(stage, task)
            if set(failures(known.get(task, {}))) == {"gate"}:
                del known[task]
            if why == _WAITS:
                waiting.add(task)
            elif why:
                known[task] = {"failures": {"gate": why}}
        return waiting

    def _forbidden(self, stage: str, task: str) -> str:
        """Why no figure may be measured (now); "" if it may."""
        if stage == "training":
            curve = training.parity_of(task)
            return f"parity of {curve} is red" if failures(self.content["parity"].get(curve, {})) else ""
        if stage not in ("figures", "compiled"):
            return ""
        op, known = task.partition("-")[0], self.content["runs"]
        runs = [run for run in self._tasks("runs") if run.startswith(f"{op}-")]
        if any(failures(known.get(run, {})) for run in runs):
            return f"the gate of {op} is red"
        return "" if runs and all(run in known for run in runs) else _WAITS

    # Tuning

    def write_tuned(self) -> None:
        """Write the tuned files from all settings that were found, and note which launches change by that."""
        found = [result for result in self.content["tuning"].values() if "settings" in result]
        new = [result for result in found if "changed" not in result]
        if not found:
            return
        before = [in_force(result, self.device) for result in new]
        names = tuning.write(found, torch.device(self.device), self.content["commit"])
        self.written |= {files.ROOT / name for name in names}
        for result, former in zip(new, before, strict=True):
            result["changed"] = in_force(result, self.device) != former
        self.content["tuned"] += sorted({result["kernel"] for result in new if result["changed"]})

    def _stale(self, figure: dict[str, Any]) -> bool:
        """Whether launches were tuned after a figure was measured; a whole step may use any of them."""
        since = self.content["tuned"][figure.get("tuned", 0) :]
        return "variants" in figure and bool(set(since) & set(figure.get("launches", since)))

    # The whole gate

    def check(self, name: str, work: Callable[[float], dict[str, Any] | None], deadline: float) -> None:
        """Do a check unless it was done: `work` gets the seconds left and returns None if they did not suffice."""
        left = deadline - time.monotonic()
        if name not in self.content and left > 0:
            found = work(left) if self.device == "cuda" else {"skipped": "no GPU"}
            if found is not None:
                self.content[name] = found
        print(f"{name}: {self.content.get(name, 'no time for it')}", flush=True)

    def guarded(self, stage: str, work: Callable[[], Any]) -> None:
        """Do a stage; its own errors are recorded and end no other stage."""
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

        for stage in STAGES:
            content[stage] = {t: r for t, r in content[stage].items() if not again(f"{stage}: {t}", lacking(r))}
        if again("memory_check", content.get("memory_check", {}).get("again", False)):
            del content["memory_check"]

    def left(self) -> dict[str, list[str]]:
        """What was not done yet, by stage. Nothing waits for torch.compile's times, for which there may be no time."""
        content = self.content
        found = {stage: [task for task in self._tasks(stage) if task not in content[stage]] for stage in STAGES}
        found["checks"] = [name for name in CHECKS if name not in content]
        found[AGAIN] = [task for stage in MEASURING for task, f in content[stage].items() if self._stale(f)]
        return {stage: names for stage, names in found.items() if names}

    def through(self) -> bool:
        """Whether all was done that the verdict needs: launches that were not searched keep their defaults."""
        return not self.left().keys() - {"tuning"}

    def green(self) -> bool:
        """Whether everything is done and right."""
        content = self.content
        red = any(failures(result) for stage in STAGES for result in content[stage].values())
        checks = all(content.get(name, {}).get("passed", True) for name in CHECKS)
        return self.through() and not red and not content["errors"] and checks

    def save(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._saved > _SAVED:
            self.content.update(green=self.green(), through=self.through(), left=self.left())
            files.write_json(self.path, self.content)
            self._saved = time.monotonic()


def in_force(result: dict[str, Any], device: str) -> dict[str, int]:
    """The settings that a tuned launch uses now."""
    x = torch.empty(0, dtype=getattr(torch, result["dtype"]), device=device)
    return tuned.launch(result["kernel"], x, tuple(result["shape"]), **result["default"])
