"""Tasks in other processes, several at a time, each of which may hang or die without taking the rest along.

Such a process calls `serve`: it reads a JSON list of tasks from stdin and says {"begin": task} and {"run": task, ...}
of each, on lines of its stdout that begin with `MARK`. All else that it prints is chatter, of which the end is kept.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench import record

SILENT = 180.0  # seconds without a word behind which a process is given up
MARK = "@bench.isolated "  # compilers print lines of braces too
_BROKEN = 3  # exit code of a process whose device is of no more use
_POLL = 0.5  # seconds between two looks at whether a process is still there
_HELD = 1 << 30  # bytes that a process may keep of its former tasks: to give them back takes a tenth of a second

Work = Callable[[str], dict[str, Any]]
Done = Callable[[str, dict[str, Any]], None]


# In the process that does the tasks


def serve(work: Work) -> int:
    """Do the tasks on stdin, one after the other; work(task) is what is said of each. Returns the exit code.

    {"failures": {kind: message}} in it says what is wrong. A kernel that breaks the device's context breaks it for the
    whole process: then it ends behind that task.
    """
    for task in json.load(sys.stdin):
        say({"begin": task})
        try:
            found = work(task)
        except Exception as error:
            found = {"failures": {"raised": f"{type(error).__name__}: {error}"[:1000]}}
        broken = ""
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                free(_HELD)
        except RuntimeError as error:
            broken = f"the device's context is lost: {error}"[:1000]
            found = {**found, "failures": {**found.get("failures", {}), "device": broken}}
        say({"run": task, **found})
        if broken:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_BROKEN)  # an orderly end frees what lies on the device, and aborts at it
    return 0


def say(message: dict[str, Any]) -> None:
    print(MARK + json.dumps(message), flush=True)


def free(held: int = 0) -> None:
    """Give back what nothing on the device uses, where that allocator holds more than so many bytes."""
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > held:
        gc.collect()
        torch.cuda.empty_cache()


# In the process that gives them out


@dataclass(frozen=True)
class _Limits:
    deadline: float
    silent: float
    environment: Mapping[str, str] | None
    stop: threading.Event

    def over(self) -> bool:
        return self.stop.is_set() or time.monotonic() >= self.deadline


class _End(NamedTuple):
    """How a process ended: at which task, why (None: all was done, or time is up), and whether it did any task."""

    at: str | None
    why: str | None
    worked: bool


def run(
    command: Sequence[str], batches: Sequence[Sequence[str]], done: Done, *, jobs: int, deadline: float,
    silent: float = SILENT, environment: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Give each batch of tasks to a process of `command`, `jobs` at a time.

    One that says nothing for `silent` seconds is killed; the task at which a process ended is failed, and another goes
    on behind it. At `deadline` all are killed, and what is not done stays undone. What a process started is killed
    with it.

    Args:
        done: called with each task and what was said of it; {"died": why} for a task at which a process ended.
        deadline: by time.monotonic().
        environment: of the processes; None: this one's.
    """
    lock, limits = threading.Lock(), _Limits(deadline, silent, environment, threading.Event())

    def report(task: str, result: dict[str, Any]) -> None:
        with lock:
            done(task, result)

    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        going = [pool.submit(_batch, command, list(batch), report, limits) for batch in batches]
        try:
            for batch in going:
                batch.exception()  # waits
        except BaseException:  # somebody wants an end now
            limits.stop.set()
            raise
    for batch in going:
        batch.result()


def call(command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """The exit code of one process, None if it was killed after `limit` seconds, and what it printed."""
    end, said = time.monotonic() + limit, []
    with contextlib.closing(_Process(command, environment)) as process:
        while (line := process.line()) is not None:
            said.append(line)
            if time.monotonic() >= end:
                return None, "".join(said)
        return process.code(), "".join(said)


def _batch(command: Sequence[str], tasks: list[str], done: Done, limits: _Limits) -> None:
    while tasks and not limits.over():
        end = _process(command, tasks, done, limits)
        if end.why is None:
            return
        if end.at is not None:
            done(end.at, {"died": end.why})
            tasks.remove(end.at)
        elif not end.worked:  # it never came to a task: the next one would not either
            for task in tasks:
                done(task, {"died": end.why})
            return


def _process(command: Sequence[str], tasks: list[str], done: Done, limits: _Limits) -> _End:
    """One process, for as many of the tasks as it does, which are taken off the list."""
    at, worked, said, heard = None, False, [], time.monotonic()
    with contextlib.closing(_Process(command, limits.environment, json.dumps(tasks))) as process:
        while tasks:
            line = process.line()
            if limits.over():
                return _End(at, None, worked)
            if line is None:
                return _End(at, f"the process ended with {process.code()}: {''.join(said)[-600:]}", worked)
            if line:
                heard = time.monotonic()
            elif time.monotonic() - heard >= limits.silent:
                return _End(at, f"no end after {limits.silent:g} s", worked)
            message = _message(line)
            if message is None:
                said = [*said[-20:], line]
            elif message.get("begin") in tasks:
                at = message["begin"]
            elif message.get("run") in tasks:
                tasks.remove(task := message.pop("run"))
                at, worked = None, True
                done(task, message)
        process.code()  # it may have files to close
    return _End(None, None, worked)


def _message(line: str) -> dict[str, Any] | None:
    """What a process says of a task; None for chatter, and for what chatter of another thread fell into."""
    _, mark, text = line.partition(MARK)
    with contextlib.suppress(ValueError):
        found = json.loads(text) if mark else None
        return found if isinstance(found, dict) else None
    return None


class _Process:
    """A process in a session of its own, so that whatever it starts ends with it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None, given: str = "") -> None:
        self._process = subprocess.Popen(
            command, cwd=record.ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it printed says why
            self._process.stdin.write(given)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def line(self) -> str | None:
        """The next line that it prints; "": none yet; None: none will come."""
        gone = self._process.poll() is not None  # then all that it printed is in the pipe, which others may keep open
        try:
            return self._lines.get(timeout=_POLL)
        except queue.Empty:
            return None if gone else ""

    def code(self, patience: float = 10.0) -> int | None:
        """Its exit code; None where it does not end though it has nothing more to say."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(patience)
        return None

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)
        if not self._reader.is_alive():  # else one that left the session keeps the pipe open: closing it would wait too
            self._process.stdout.close()
