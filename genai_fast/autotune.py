"""The fastest of several implementations of a computation on this machine: measured once, remembered in a file.

The file is `autotune.json` in $GENAI_FAST_CACHE, else in the user's cache folder. It holds, per machine and set of
versions, the choice for each shape and the measured times; a file that is damaged or of another format version is
replaced. `GENAI_FAST_DETERMINISTIC=1`, or torch.use_deterministic_algorithms, pins every choice to the
default: implementations differ in rounding, and two measurements need not agree on the fastest.
"""

import contextlib
import functools
import json
import math
import os
import platform
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from genai_fast import atomic_files
from genai_fast.kernels.common.extension import cpu_kernels, extension
from genai_fast.versions import version

VERSION = 2  # of the file's form and of what the names of implementations mean
MARGIN = 0.95  # of the default's time: an implementation must take less to be chosen over it
MOST_SHAPES = 8  # of one family that are measured; others take the choice of the nearest
_ROUNDS, _SECONDS = 7, 0.5  # of interleaved measurement of one choice; three rounds if that takes longer
_HOPELESS = 1.5  # times the shortest so far: such an implementation is not timed again
_WAIT = 30.0  # seconds for another process that measures
_BUSY = 1 << 23  # cycles for which a GPU spins while the host queues what is timed
_LARGEST_FILE = 1 << 24

Key = tuple[Any, ...]
Shape = tuple[int, ...]
Maker = Callable[[], Callable[[], Any]]


class AutotuneWarning(UserWarning):
    """The file of choices is unusable, an implementation fails, or a resumed run's choice is not available."""


class Choice(NamedTuple):
    name: str
    microseconds: dict[str, float]  # of each implementation that was measured; empty if none was


_PINNED = "pinned"
_chosen: dict[str, dict[tuple[Key, Shape], Choice]] = {}  # by machine, or pinned
_taken: dict[str, dict[str, str]] = {}  # by machine: text of the key -> name, from another process
_only_remembered = False
_changes = 0  # of what was chosen, other than by one more choice


def choose(
    family: Key, shape: Shape, device: torch.device, candidates: Callable[[], tuple[Mapping[str, Maker], str]]
) -> Choice:
    """The fastest implementation for a family and shape, measured on the first call on this machine.

    Args:
        family: what the time depends on besides the shape (op, settings, dtype, layout, ...).
        shape: sizes. Once MOST_SHAPES of a family are measured, the nearest of them serves all others.
        candidates: called on the first call; returns what can serve it (name -> a function that prepares a call on
            made-up tensors and returns it, to be timed) and the name of the default, which is used if nothing may be
            measured: in deterministic runs, under a dispatch mode, and during the capture of a CUDA graph.
    """
    here = _PINNED if pinned() else machine(device)
    known = _chosen.setdefault(here, {})
    found = known.get((family, shape))
    if found is None:
        makers, default = candidates()
        found = _looked_up(here, family, shape, makers)
        if found is None and (here == _PINNED or len(makers) == 1):
            found = Choice(default, {})
        if found is None:
            if not _may_measure(device):
                return Choice(default, {})
            found = _measured(here, family, shape, device, makers, default)
        known[family, shape] = found
    return found


def _looked_up(here: str, family: Key, shape: Shape, makers: Mapping[str, Maker]) -> Choice | None:
    """From a resumed run, another rank of this job, or the file; the nearest if there are enough."""
    text = _text(family, shape)
    wanted = _taken.get(here, {}).get(text)
    if wanted in makers:
        return Choice(wanted, {})
    if wanted is not None:
        _warn_once(
            f"{text}: the resumed run used {wanted}, which is not available here: the run is no longer bit-exact"
        )
    if here == _PINNED or len(makers) == 1:
        return None
    agreed = _agreed(text)
    if agreed in makers:
        return Choice(agreed, {})
    family_text, found = _text(family), None
    known = {s: c for (f, s), c in _chosen[here].items() if f == family and c.microseconds}
    known = {**remembered(here).get(here, {}).get(family_text, {}), **known}
    if shape in known:
        found = known[shape]
    elif len(known) >= MOST_SHAPES:
        found = known[min(known, key=lambda other: _distance(shape, other))]
    if found is None or found.name not in makers:
        return None
    _agreed(text, found.name)
    return found


def _distance(a: Shape, b: Shape) -> float:
    if len(a) != len(b):
        return math.inf
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))


def _agreed(text: str, mine: str = "") -> str:
    """What the first rank of this job chose; `mine` if this is the first. No collective: ranks meet keys in any order.

    Ranks that compute alike stay alike, and those that share a machine do not measure at the same time.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return mine
    try:
        store, key = dist.distributed_c10d._get_default_store(), f"genai_fast/{text}"
        if mine:
            return store.compare_set(key, "", mine).decode()
        return store.get(key).decode() if store.check([key]) else ""
    except (RuntimeError, NotImplementedError, ValueError):  # a store that cannot do this, or is gone
        return mine


def _may_measure(device: torch.device) -> bool:
    if _only_remembered or torch._C._len_torch_dispatch_stack():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _measured(
    here: str, family: Key, shape: Shape, device: torch.device, makers: Mapping[str, Maker], default: str
) -> Choice:
    """Measured here and remembered, unless another process has done so in the meantime."""
    text = _text(family, shape)
    with _locked():
        found = remembered(here).get(here, {}).get(_text(family), {}).get(shape)
        if found is None or found.name not in makers:
            _announce()
            with _unseen(), torch._C.DisableTorchFunction():
                found = _measure(device, makers, default)
            if found.microseconds:
                _write(here, _text(family), shape, found)
    agreed = _agreed(text, found.name)
    return found if agreed not in makers else found._replace(name=agreed)


@functools.cache
def _announce() -> None:
    """Once, and on a terminal only: a model's first call may take minutes."""
    if sys.stderr is not None and sys.stderr.isatty():
        what = "convolutions and attention"
        print(f"genai_fast: measuring {what}, once for this machine; kept in {file()}", file=sys.stderr)


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Inside it, hooks on saved tensors do not see them: checkpointing counts what a first call saves."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def pinned() -> bool:
    """Whether deterministic runs pin every choice to the default."""
    return os.environ.get("GENAI_FAST_DETERMINISTIC", "") == "1" or torch.are_deterministic_algorithms_enabled()


def standing() -> tuple[bool, bool, int]:
    """What a choice that was made once depends on: while this is the same, so is the choice."""
    return pinned(), _only_remembered, _changes


@contextlib.contextmanager
def only_remembered() -> Iterator[None]:
    """Inside the block nothing is measured: unknown choices take their default."""
    global _only_remembered
    before, _only_remembered = _only_remembered, True
    try:
        yield
    finally:
        _only_remembered = before


def chosen(device: torch.device) -> dict[str, Choice]:
    """This process's choices for a device, made or read, by the text of family and shape, in order."""
    return {_text(*key): choice for key, choice in _chosen.get(machine(device), {}).items()}


def routes(device: torch.device) -> dict[str, str]:
    """What each key's text takes in this process, for another one that is to compute the same bits."""
    return _taken.get(machine(device), {}) | {text: choice.name for text, choice in chosen(device).items()}


def take(device: torch.device, routes: Mapping[str, str]) -> None:
    """Take these from now on, whatever has been measured; warns when one is needed that is not available."""
    global _changes
    here, _changes = machine(device), _changes + 1
    _taken[here] = dict(routes)
    _chosen.pop(here, None)


def forget() -> None:
    """Forget this process's choices, made, read or taken over; the file is unchanged."""
    global _changes
    _changes += 1
    _chosen.clear()
    _taken.clear()


def clear() -> int:
    """Forget all choices, those of the file too; returns how many were in it.

    Raises: OSError: the file cannot be removed.
    """
    with _locked():
        count = sum(len(shapes) for families in remembered().values() for shapes in families.values())
        file().unlink(missing_ok=True)
    forget()
    return count


def folder() -> Path:
    """The cache folder: $GENAI_FAST_CACHE, else genai_fast in the user's cache folder."""
    given = os.environ.get("GENAI_FAST_CACHE")
    if given:
        return Path(given)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home: nothing can be written below a file, and its users say so
        cache = Path(os.devnull)
    return cache / "genai_fast"


def file() -> Path:
    """The file of choices."""
    return folder() / "autotune.json"


def machine(device: torch.device) -> str:
    """What a time depends on besides the key, as text: device, versions, threads."""
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


def _text(family: Key, shape: Shape = ()) -> str:
    parts = (*family, shape) if shape else family
    return " ".join("x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in parts)


def _measure(device: torch.device, makers: Mapping[str, Maker], default: str) -> Choice:
    """Shortest time of each, interleaved: what disturbs a measurement makes it longer."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        calls = {}
        for name, make in makers.items():
            try:
                call = make()
                call()  # compiles, warms up
            except Exception as error:
                if name == default:  # then the call itself says what is wrong
                    return Choice(default, {})
                if not isinstance(error, torch.OutOfMemoryError):
                    _warn_once(f"{name} fails and is skipped: {type(error).__name__}: {error}")
            else:
                calls[name] = call
        shortest = dict.fromkeys(calls, math.inf)
        start, turn = time.perf_counter(), 0
        while turn < _ROUNDS and (turn < 3 or time.perf_counter() - start < _SECONDS):
            best = min(shortest.values())
            for name, call in list(calls.items())[:: -1 if turn % 2 else 1]:
                if name == default or shortest[name] <= _HOPELESS * best or not turn:
                    shortest[name] = min(shortest[name], _clock(device, call))
            turn += 1
    best = min(shortest, key=shortest.__getitem__)
    if shortest[best] >= MARGIN * shortest[default]:
        best = default
    return Choice(best, {name: round(t * 1e6, 1) for name, t in shortest.items()})


def _clock(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of one call: on the device, if it has a clock of its own."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_BUSY)  # while it spins the host queues the whole call: host time does not count
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def remembered(only: str | None = None) -> dict[str, dict[str, dict[Shape, Choice]]]:
    """machine -> family -> shape -> choice, as the file has them."""
    try:
        content = json.loads(_read(file()))
        if content.get("version") != VERSION:
            return {}
        machines = {name: found for name, found in content["machines"].items() if only is None or name == only}
        return {
            name: {family: dict(map(_entry, shapes.items())) for family, shapes in families.items()}
            for name, families in machines.items()
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn_once(f"{file()}: cannot be read: {error.strerror or error}; choices are kept in this process only")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _warn_once(f"{file()}: is damaged; choices are measured again and the file is replaced")
    return {}


def _entry(pair: tuple[str, dict[str, Any]]) -> tuple[Shape, Choice]:
    shape, choice = pair
    sizes = tuple(map(int, filter(None, shape.split("x"))))
    return sizes, Choice(str(choice["name"]), dict(choice["microseconds"]))


def _read(path: Path) -> str:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"expected a regular file at {path}")
    if found.st_size > _LARGEST_FILE:
        raise ValueError("too large")
    return path.read_text(encoding="utf-8")


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Alone with the file, among processes; continues without the lock if its holder does not release it."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # said when the choice is written
                file().parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(file().with_suffix(".lock"), "w"))
                end = time.monotonic() + _WAIT
                while True:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > end:
                            _warn_once(f"{lock.name}: held by another process for {_WAIT:g} s; measuring without it")
                            break
                        time.sleep(0.02)
        yield


def _write(here: str, family: str, shape: Shape, choice: Choice) -> None:
    """Add one choice; whole files only, so that a reader never sees half of one."""
    target = file()
    try:
        machines = remembered()
        machines.setdefault(here, {}).setdefault(family, {})[shape] = choice
        content = {
            name: {f: {"x".join(map(str, s)): c._asdict() for s, c in shapes.items()} for f, shapes in families.items()}
            for name, families in machines.items()
        }
        atomic_files.write_text(target, json.dumps({"version": VERSION, "machines": content}, indent=1))
    except OSError as error:
        _warn_once(f"{target}: cannot be written: {error.strerror}; choices are kept in this process only")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, AutotuneWarning, stacklevel=2)
