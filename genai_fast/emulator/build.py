"""Compiles the engine (engine/*.cpp) when it is first needed; as a script at once (CMake's target `emulator`).

Users' wheels hold its sources and no binary. The library lies in build/emulator of a checkout, else in the user's
cache, under a name that changes with the sources, the flags and the compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from genai_fast.errors import UsageError

SOURCES = Path(__file__).parent / "engine"
# No contraction: PTX says where a multiplication and an addition are one.
FLAGS = ("-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC")


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++.

    Raises:
        UsageError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise UsageError("emulated GPU: expected a C++ compiler, found none; remedy: install g++, or set CXX")


def folder() -> Path:
    """Where the library lies."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "CMakeLists.txt").exists():
        return checkout / "build" / "emulator"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genai_fast" / "emulator"


def library() -> Path:
    """The engine's library, compiled if it is not there yet (half a minute of one core).

    Raises:
        UsageError: there is no compiler, or it fails; the message ends with what it says.
    """
    command = compiler()
    digest = hashlib.sha256(" ".join((command, *FLAGS, platform.machine(), _processor())).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    target = folder() / f"engine-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            made = _compile(command, Path(temporary))
            os.replace(made, target)  # whole, even if another process compiles at the same time
    return target


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(command: str, temporary: Path) -> Path:
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [temporary / f"{source.stem}.o" for source in sources]
    compilations = [(*FLAGS, "-c", str(s), "-o", str(o)) for s, o in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda arguments: _run(command, *arguments), compilations))
    made = temporary / "engine.so"
    _run(command, "-shared", *map(str, objects), "-o", str(made))
    return made


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"emulated GPU: {shlex.join(command)} failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    print(library())
