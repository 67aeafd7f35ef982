"""The process that does tasks of one stage.

    python -m bench.gpu_gate.worker STAGE DEVICE ['{"option": value}'] < a JSON list of tasks

calls bench/gpu_gate/STAGE.py's work(task, device, **options) for each and prints {"begin": task} before it and
{"run": task, **result} after it, on lines that begin with `MARK`: compilers print lines of braces too.
"""

import functools
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

MARK = "@bench.gpu_gate "
_BROKEN = 3  # exit code of a process whose device is unusable
_HELD = 1 << 30  # bytes that a process may keep from earlier tasks: releasing them takes a tenth of a second


def serve(work: Callable[[str], dict[str, Any]]) -> int:
    """Do the tasks on stdin in turn; returns the exit code.

    {"failures": {kind: message}} in a result says what is wrong. A kernel that breaks the device's context breaks it
    for the whole process, which therefore ends after that task.
    """
    for task in json.load(sys.stdin):
        _say({"begin": task})
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
        _say({"run": task, **found})
        if broken:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_BROKEN)  # an orderly exit frees device memory, and aborts doing so
    return 0


def _say(message: dict[str, Any]) -> None:
    print(MARK + json.dumps(message), flush=True)


def free(held: int = 0) -> None:
    """Return unused device memory if the allocator holds more than `held` bytes."""
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > held:
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    stage, device, *options = sys.argv[1:]
    work = importlib.import_module(f"bench.gpu_gate.{stage}").work
    return serve(functools.partial(work, device=device, **json.loads(options[0] if options else "{}")))


if __name__ == "__main__":
    sys.exit(main())
