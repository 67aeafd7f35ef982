"""The comparison of callables: who takes turns with whom, what a sample is, what else the machine did."""

import itertools
import sys

import pytest

from genai_fast.profiling import ForeignLoad, compare

MODULE = sys.modules["genai_fast.profiling.compare"]


class FakeTime:
    """A clock that moves only when told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def fake_time(monkeypatch):
    time = FakeTime()
    monkeypatch.setattr(MODULE, "time", time)
    return time


def test_interleaved_medians_of_calls_that_take_turns(fake_time):
    order = []

    def call(name, durations):
        def run():
            order.append(name)
            fake_time.now += durations[order.count(name) % len(durations)]

        return run

    calls = {"slow": call("slow", [4e-3, 4e-3, 9.0]), "quick": call("quick", [2e-3])}
    result = compare(calls, rounds=11, calls=1)
    # One wild sample in three moves no median.
    assert {name: t.median for name, t in result.timings.items()} == pytest.approx({"slow": 4e-3, "quick": 2e-3})
    turns = order[-22:]
    assert turns.count("slow") == turns.count("quick") == 11
    assert turns[:4] in (["slow", "quick", "quick", "slow"], ["quick", "slow", "slow", "quick"])
    assert result.speedup("quick", over="slow") == pytest.approx(2.0)
    assert "slow: 4.000 ms" in str(result)


def test_short_calls_are_timed_several_at_once(fake_time):
    def call():
        fake_time.now += 1e-5

    blocks = []
    perf_counter = fake_time.perf_counter
    fake_time.perf_counter = lambda: blocks.append(fake_time.now) or perf_counter()
    assert compare({"call": call}, rounds=5).timings["call"].median == pytest.approx(1e-5)
    assert max(b - a for a, b in itertools.pairwise(blocks)) == pytest.approx(1e-3, rel=0.02)


def test_seconds_make_more_rounds(fake_time):
    def call():
        fake_time.now += 0.01
        calls.append(1)

    calls = []
    compare({"call": call}, rounds=2, seconds=1.0, calls=1)
    assert len(calls) >= 100


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="expected functions and rounds >= 2"):
        compare({})


def test_foreign_load_is_what_is_not_ours(monkeypatch):
    readings = iter([(10.0, 100.0, 50.0), (20.0, 118.0, 53.0)])
    monkeypatch.setattr(ForeignLoad, "_read", staticmethod(lambda: next(readings)))
    assert ForeignLoad().cores() == 1.5  # 18 s of work in 10 s, 3 s of it ours
