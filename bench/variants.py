"""What every benchmark does with its variants: make them, time them in turn, compare them with the fused one."""

import statistics
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from genai_fast.profiling import Comparison

FUSED, COMPILED = "fused", "compile"  # the other variants have the names of the peers

T = TypeVar("T")


def ready(makers: Mapping[str, Callable[[], T]], may_fail: Collection[str]) -> tuple[dict[str, T], dict[str, Any]]:
    """What each maker returns, and {"skipped": why} for variants that may fail and did."""
    made, skipped = {}, {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Exception as error:  # whatever a compiler raises, or a lack of memory
            if name not in may_fail:
                raise
            skipped[name] = {"skipped": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    return made, skipped


def warm(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step after a first call."""
    step()
    return step


def in_turn(clock: Callable[[T], float], subjects: Mapping[str, T], rounds: int) -> dict[str, float]:
    """Each subject's median of `clock`, interleaved (A B B A ...)."""
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(rounds):
        for name, subject in list(subjects.items())[:: -1 if turn % 2 else 1]:
            taken[name].append(clock(subject))
    return {name: statistics.median(values) for name, values in taken.items()}


def walls(seconds: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    return {name: {"wall_us": round(t * 1e6, 2)} for name, t in seconds.items()}


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each peer's time over the fused one's."""
    return {name: round(t / seconds[FUSED], 3) for name, t in seconds.items() if name != FUSED}


def spreads(found: Comparison) -> dict[str, tuple[float, float]]:
    """Quartiles of each peer's time over the fused one's, round by round."""
    pairs = {name: found.spread(FUSED, name) for name in found.timings if name != FUSED}
    return {name: (round(low, 3), round(high, 3)) for name, (low, high) in pairs.items()}
