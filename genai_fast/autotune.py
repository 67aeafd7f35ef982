"""Which of several ways to compute the same is the fastest here: measured once, remembered in a file.

The file is `paths.json` in $GENAI_FAST_CACHE, else in the user's cache folder. It holds, for each machine and set of
versions, the choice for each shape and the times that it rests on; a file that cannot be read or belongs to another
version is measured anew. `GENAI_FAST_DETERMINISTIC=1`, or torch.use_deterministic_algorithms, pins every choice to a
fixed one: two paths differ in rounding, and what was faster yesterday need not be today.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from genai_fast.kernels.common.extension import cpu_kernels, extension
from genai_fast.versions import version

VERSION = 1  # of the file's form and of what the names of paths mean
MARGIN = 0.95  # a path must take less than this share of the fixed one's time to be chosen over it
_ROUNDS, _SECONDS = 7, 0.5  # of interleaved measurement of one choice: this many, or three if that takes so long

Key = tuple[Any, ...]
Maker = Callable[[], Callable[[], Any]]


class PathsWarning(UserWarning):
    """The file of choices cannot be read or written, so they hold for this process alone; or `take` asked in vain."""


class Choice(NamedTuple):
    path: str
    microseconds: dict[str, float]  # of each path that was measured; empty if none was


_PINNED = "pinned"
_chosen: dict[str, dict[Key, Choice]] = {}  # by machine, or pinned
_taken: dict[str, dict[str, str]] = {}  # by machine: text of the key -> path, from another process
_only_remembered = False


def choose(key: Key, device: torch.device, open_paths: Callable[[], tuple[Mapping[str, Maker], str]]) -> Choice:
    """The fastest path for what `key` describes, measured on the first call for it on this machine.

    Args:
        key: what the time depends on (op, shapes, dtype, layout, ...); its text is the key of the file.
        open_paths: asked on the first call, gives the paths that there are: name -> a function that prepares inputs of
            its own and gives the call to clock; and the name of the fixed one, which is taken where nothing may be
            measured or remembered: deterministic runs, and the capture of a CUDA graph if it comes before all else.
    """
    fixed_alone = pinned()
    here = _PINNED if fixed_alone else machine(device)
    known = _chosen.setdefault(here, {})
    found = known.get(key)
    if found is None:
        paths, fixed = open_paths()
        unmeasured = Choice(fixed, {})
        alone = fixed_alone or len(paths) == 1
        wanted = _taken.get(here, {}).get(_text(key))
        if wanted in paths:
            found = Choice(wanted, {})
        else:
            if wanted is not None:
                _warn_once(f"{_text(key)}: went by {wanted} in the run that goes on; here it cannot: not bit for bit")
            found = unmeasured if alone else remembered(here).get(here, {}).get(_text(key))
        if found is None or found.path not in paths:
            if _only_remembered or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                return unmeasured
            with _unseen():
                found = _measure(device, paths, fixed)
            _write(here, _text(key), found)
        known[key] = found
    return found


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Inside it, hooks on saved tensors do not see them: checkpointing counts what a first call saves."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def pinned() -> bool:
    """Whether every choice is the fixed one."""
    return os.environ.get("GENAI_FAST_DETERMINISTIC", "") == "1" or torch.are_deterministic_algorithms_enabled()


@contextlib.contextmanager
def only_remembered() -> Iterator[None]:
    """Inside the block nothing is measured: what is not known yet takes its fixed path."""
    global _only_remembered
    before, _only_remembered = _only_remembered, True
    try:
        yield
    finally:
        _only_remembered = before


def chosen(device: torch.device) -> dict[str, Choice]:
    """What this process has chosen or read for such a device, by the text of the key, in order."""
    return {_text(key): choice for key, choice in _chosen.get(machine(device), {}).items()}


def routes(device: torch.device) -> dict[str, str]:
    """The path that each key's text takes in this process, for another one that is to compute the same bits."""
    return _taken.get(machine(device), {}) | {text: choice.path for text, choice in chosen(device).items()}


def take(device: torch.device, routes: Mapping[str, str]) -> None:
    """Take these paths from now on, whatever has been measured; warns of one that is not open, once it is needed."""
    here = machine(device)
    _taken[here] = dict(routes)
    _chosen.pop(here, None)


def forget() -> None:
    """Forget the choices that this process has made, read or taken over; those in the file stay."""
    _chosen.clear()
    _taken.clear()


def folder() -> Path:
    """Where this library remembers things: $GENAI_FAST_CACHE, else in the user's cache folder."""
    given = os.environ.get("GENAI_FAST_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genai_fast"


def file() -> Path:
    """Where choices are remembered."""
    return folder() / "paths.json"


def machine(device: torch.device) -> str:
    """What a time depends on beside the key, in words: device, versions, threads."""
    return _machine(device.type, device.index or 0, torch.get_num_threads())


@functools.cache
def _machine(device: str, index: int, threads: int) -> str:
    parts = [f"{name} {version(name)}" for name in ("genai_fast", "torch")]
    if device == "cuda":
        return ", ".join([torch.cuda.get_device_name(index), *parts, f"triton {version('triton')}"])
    isa = cpu_kernels()[1] if extension()[0] else "no C++ kernels"
    return ", ".join([processor(), *parts, isa, f"{threads} threads"])


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _text(key: Key) -> str:
    return " ".join("x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in key)


def _measure(device: torch.device, paths: Mapping[str, Maker], fixed: str) -> Choice:
    """Shortest time of each path, interleaved: what disturbs a measurement makes it longer."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        calls = {}
        for name, make in paths.items():
            try:
                call = make()
                call()  # compiles, warms up
            except torch.OutOfMemoryError:
                if name == fixed:
                    raise
            else:
                calls[name] = call
        shortest = dict.fromkeys(calls, float("inf"))
        start, turn = time.perf_counter(), 0
        while turn < _ROUNDS and (turn < 3 or time.perf_counter() - start < _SECONDS):
            for name, call in list(calls.items())[:: -1 if turn % 2 else 1]:
                shortest[name] = min(shortest[name], _clock(device, call))
            turn += 1
    best = min(shortest, key=shortest.__getitem__)
    if shortest[best] >= MARGIN * shortest[fixed]:
        best = fixed
    return Choice(best, {name: round(t * 1e6, 1) for name, t in shortest.items()})


def _clock(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of one call: on the device where it has a clock of its own."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def remembered(only: str | None = None) -> dict[str, dict[str, Choice]]:
    """machine -> key -> choice, as the file has them."""
    try:
        content = json.loads(file().read_text())
        if content.get("version") != VERSION:
            return {}
        return {
            name: {key: Choice(str(c["path"]), dict(c["microseconds"])) for key, c in choices.items()}
            for name, choices in content["machines"].items()
            if only is None or name == only
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn_once(f"{file()}: cannot be read: {error.strerror}; choices hold for this process alone")
    except (ValueError, KeyError, TypeError, AttributeError):
        _warn_once(f"{file()}: is damaged; choices are measured anew and the file is replaced")
    return {}


def _write(here: str, key: str, choice: Choice) -> None:
    """Add one choice; whole files only, so that a reader never sees half of one."""
    target = file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            if fcntl is not None:  # other processes add theirs
                fcntl.flock(lock, fcntl.LOCK_EX)
            machines = remembered()
            machines.setdefault(here, {})[key] = choice
            content = {name: {k: c._asdict() for k, c in choices.items()} for name, choices in machines.items()}
            written = target.with_suffix(".new")
            written.write_text(json.dumps({"version": VERSION, "machines": content}, indent=1))
            os.replace(written, target)
    except OSError as error:
        _warn_once(f"{target}: cannot be written: {error.strerror}; choices hold for this process alone")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, PathsWarning, stacklevel=2)
