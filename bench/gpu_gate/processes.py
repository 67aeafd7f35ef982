"""Tasks in other processes, several at a time, each of which may hang or die without affecting the others."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.gpu_gate.worker import MARK
from bench.report.files import ROOT

SILENT = 180.0  # seconds without output after which a process is killed
_POLL = 0.5  # seconds between two checks that a process is alive

Done = Callable[[str, dict[str, Any]], None]


def run(
    command: Sequence[str], batches: Sequence[Sequence[str]], done: Done, *, jobs: int, deadline: float,
    silent: float = SILENT, environment: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Give each batch of tasks to a process of `command`, `jobs` at a time.

    A process that prints nothing for `silent` seconds is killed, with all that it started. The task at which a process
    ended has failed, and a new process continues after it. At `deadline` all are killed; unfinished tasks stay undone.

    Args:
        done: called with each task and its result, one call at a time; {"died": why} for a task at which a process
            ended.
        deadline: in time.monotonic() seconds.
        environment: of the processes; None: this one's.
    """
    lock, stop = threading.Lock(), threading.Event()

    def report(task: str, result: dict[str, Any]) -> None:
        with lock:
            done(task, result)

    def over() -> bool:
        return stop.is_set() or time.monotonic() >= deadline

    def work(tasks: list[str]) -> None:
        while tasks and not over():
            with contextlib.closing(_Process(command, environment, json.dumps(tasks))) as process:
                at, why, worked = _watch(process, tasks, report, over, silent)
            if why is None:
                return
            # A process that reached no task would reach none the next time either.
            lost = [at] if at is not None else [] if worked else list(tasks)
            for task in lost:
                report(task, {"died": why})
                tasks.remove(task)

    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        going = [pool.submit(work, list(batch)) for batch in batches]
        try:
            for batch in going:
                batch.exception()  # waits
        except BaseException:  # interrupted
            stop.set()
            raise
    for batch in going:
        batch.result()


def _watch(
    process: _Process, tasks: list[str], report: Done, over: Callable[[], bool], silent: float
) -> tuple[str | None, str | None, bool]:
    """Take finished tasks off the list until a process ends.

    Returns: The task at which it ended, why (None: all done, or time is up), and whether it finished any task.
    """
    at, worked, printed, heard = None, False, [], time.monotonic()
    while tasks:
        line = process.line()
        if over():
            return at, None, worked
        if line is None:
            return at, f"the process ended with {process.code()}: {''.join(printed)[-600:]}", worked
        if line:
            heard = time.monotonic()
        elif time.monotonic() - heard >= silent:
            return at, f"no end after {silent:g} s", worked
        message = parsed(line)
        if message is None:
            printed = [*printed[-20:], line]
        elif message.get("begin") in tasks:
            at = message["begin"]
        elif message.get("run") in tasks:
            tasks.remove(task := message.pop("run"))
            at, worked = None, True
            report(task, message)
    process.code()  # it may have files to close
    return None, None, worked


def call(command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """The exit code of one process, None if it was killed after `limit` seconds, and what it printed."""
    end, printed = time.monotonic() + limit, []
    with contextlib.closing(_Process(command, environment)) as process:
        while (line := process.line()) is not None:
            printed.append(line)
            if time.monotonic() >= end:
                return None, "".join(printed)
        return process.code(), "".join(printed)


def parsed(line: str) -> dict[str, Any] | None:
    """A worker's message; None for other output, and for a message torn by another thread's output."""
    _, mark, text = line.partition(MARK)
    with contextlib.suppress(ValueError):
        found = json.loads(text) if mark else None
        return found if isinstance(found, dict) else None
    return None


class _Process:
    """A process in a session of its own, so that whatever it starts ends with it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None, given: str = "") -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):  # it has ended: its output says why
            self._process.stdin.write(given)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def line(self) -> str | None:
        """The next line that it prints; "": none yet; None: none will come."""
        gone = self._process.poll() is not None  # then all its output is in the pipe, which children may keep open
        try:
            return self._lines.get(timeout=_POLL)
        except queue.Empty:
            return None if gone else ""

    def code(self, patience: float = 10.0) -> int | None:
        """Its exit code; None if it has closed its output and does not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(patience)
        return None

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)
        if not self._reader.is_alive():  # else a child outside the session holds the pipe: closing would wait for it
            self._process.stdout.close()
