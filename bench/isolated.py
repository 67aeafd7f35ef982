"""Tasks in other processes, several at a time, each of which may hang or die without taking the rest along.

Such a process calls `serve`: it reads a JSON list of tasks from stdin and prints {"begin": task} and {"run": task,
...}, a line each.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from bench import record

SILENT = 180.0  # seconds without a word behind which a process is given up
_BROKEN = 3  # exit code of a process whose device is of no more use


def serve(work: Callable[[str], dict[str, Any]]) -> int:
    """Do the tasks on stdin, one after the other; work(task) is what is said of each. Returns the exit code.

    {"failures": {kind: message}} in it says what is wrong. A kernel that breaks the device's context breaks it for the
    whole process: then it ends behind that task.
    """
    for task in json.load(sys.stdin):
        print(json.dumps({"begin": task}), flush=True)
        try:
            found = work(task)
        except Exception as error:
            found = {"failures": {"raised": f"{type(error).__name__}: {error}"[:1000]}}
        broken = ""
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except RuntimeError as error:
            broken = f"the device's context is lost: {error}"[:1000]
            found = {**found, "failures": {**found.get("failures", {}), "device": broken}}
        print(json.dumps({"run": task, **found}), flush=True)
        if broken:
            return _BROKEN
    return 0


def run(
    command: Sequence[str], batches: Sequence[Sequence[str]], done: Callable[[str, dict[str, Any]], None], *,
    jobs: int, deadline: float, silent: float = SILENT,
) -> None:  # fmt: skip
    """Give each batch of tasks to a process of `command`, `jobs` at a time.

    One that says nothing for `silent` seconds is killed; the task at which a process ended is failed, and another goes
    on behind it. At `deadline` all are killed, and what is not done stays undone.

    Args:
        done: called with each task and what was said of it; {"died": why} for a task at which a process ended.
        deadline: by time.monotonic().
    """
    lock = threading.Lock()

    def report(task: str, result: dict[str, Any]) -> None:
        with lock:
            done(task, result)

    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        list(pool.map(lambda batch: _batch(command, list(batch), report, deadline, silent), batches))


def _batch(
    command: Sequence[str], tasks: list[str], done: Callable[[str, dict[str, Any]], None], deadline: float,
    silent: float,
) -> None:  # fmt: skip
    while tasks and time.monotonic() < deadline:
        at, ended = _process(command, tasks, done, deadline, silent)
        if ended is None:
            return
        if ended == "":  # by itself, behind a task that broke its device
            continue
        if at is None:  # it never came to a task: the next one would not either
            for task in tasks:
                done(task, {"died": ended})
            return
        done(at, {"died": ended})
        del tasks[: tasks.index(at) + 1]


def _process(
    command: Sequence[str], tasks: list[str], done: Callable[[str, dict[str, Any]], None], deadline: float,
    silent: float,
) -> tuple[str | None, str | None]:  # fmt: skip
    """(the task at which it ended, why); done tasks are taken off the list.

    None for why: all was done, or time is up; "": what is left is for another process.
    """
    process = subprocess.Popen(
        command, cwd=record.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    at, said = None, []
    try:
        try:
            process.stdin.write(json.dumps(tasks))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended: what it printed says why
        while True:
            left = deadline - time.monotonic()
            try:
                line = lines.get(timeout=max(min(left, silent), 0.01))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    return at, None
                return at, f"no end after {silent:g} s"
            if line is None:
                break
            if not line.startswith("{"):
                said = [*said[-20:], line]
                continue
            message = json.loads(line)
            if "begin" in message:
                at = message["begin"]
            else:
                task = message.pop("run")
                done(task, message)
                tasks.remove(task)
                at = None
        code = process.wait()
        if not tasks:
            return None, None
        if at is None and code == _BROKEN:
            return None, ""
        return at, f"the process ended with {code}: {''.join(said)[-600:]}"
    finally:
        process.kill()
        process.wait()
        reader.join(5)
        process.stdout.close()
