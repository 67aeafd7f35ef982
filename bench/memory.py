"""Peak memory of one call, beyond what was there before it."""

import os
from collections.abc import Callable
from typing import Any

import torch

# The profiler announces its start and end on stderr otherwise; it reads this once.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Most bytes of tensors that `call` holds at a time; caches are filled by a first call."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
