"""Clocking on a GPU, with stand-ins for its graphs, streams and events."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bench import clock
from genai_fast import capture as recording
from genai_fast.registry import OPS


class Device:
    """A GPU on which work takes the seconds that it says; a graph's replay may have work of its own before it."""

    def __init__(self, monkeypatch):
        self.now, self.stream, self.draws, self.log = 0.0, "default", 0, []
        self.capturing, self.ends = None, True  # the graph that is captured; whether a capture's end does not raise
        self.pools = set()  # in which the allocator still captures
        self.external = True
        device = self

        class Graph:
            def __init__(self):
                self.work, self.random = [], False

            def replay(self):
                device.now += 0.5 * self.random  # fills in the generator's state
                for work in self.work:
                    work()

            def reset(self):
                device.log.append("reset")

        class Event:
            def __init__(self, enable_timing, **more):
                assert enable_timing
                if more and not device.external:
                    raise TypeError("unexpected keyword argument 'external'")
                self.external = more.get("external", False)

            def record(self):
                assert self.external == (device.capturing is not None)
                device.run(lambda: setattr(self, "at", device.now))

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        @contextlib.contextmanager
        def capture(graph, pool, stream, capture_error_mode):
            assert capture_error_mode == "relaxed"
            before, device.stream, device.capturing = device.stream, "capture", graph
            device.pools.add(pool)
            try:
                yield
            finally:
                device.capturing = None
                if not device.ends:
                    raise RuntimeError("operation failed due to a previous error during capture")
                device.stream = before
                device.pools.discard(pool)

        @contextlib.contextmanager
        def on(stream):
            before, device.stream = device.stream, stream
            yield
            device.stream = before

        def stream(name):
            return SimpleNamespace(name=name, wait_stream=lambda other: None)

        def end_in_pool(index, pool):
            if pool not in device.pools:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            device.pools.discard(pool)

        stand_ins = {
            "CUDAGraph": Graph, "Event": Event, "graph": capture, "device": contextlib.nullcontext, "stream": on,
            "current_stream": lambda *a: stream(device.stream), "current_device": lambda: 0,
            "set_stream": lambda s: setattr(device, "stream", s.name), "synchronize": lambda: None,
            "graph_pool_handle": lambda: (0, len(device.log)), "get_rng_state": lambda: torch.tensor(device.draws),
            "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: device.log.append(mode),
        }  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(clock, "_flush_of_the_cache", lambda: lambda: self.run(self.flush))
        monkeypatch.setattr(recording, "side_stream", lambda device: stream("side"))
        monkeypatch.setattr(recording, "_repair_generator", lambda device: self.log.append(f"generator of {device}"))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_in_pool, raising=False)
        release = lambda index, pool: self.log.append(f"release {pool}")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)

    def flush(self):
        self.now += 7.0

    def run(self, work):
        if self.capturing is not None:
            self.capturing.work.append(work)
        else:
            work()

    def call(self, seconds, draws=False):
        def call():
            if draws:
                self.draws += 1
                if self.capturing is not None:
                    self.capturing.random = True
            self.run(lambda: setattr(self, "now", self.now + seconds))

        return call

    def refused(self, seconds):
        """Runs, but not in a capture."""
        run = self.call(seconds)

        def call():
            if self.capturing is not None:
                raise RuntimeError("called a synchronizing CUDA operation")
            run()

        return call


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_replays_are_clocked_and_what_cannot_be_captured_is_called(device):
    calls = {"a": [device.call(0.25), device.call(0.25)], "b": [device.refused(1.5)]}
    assert clock.device_times(calls, rounds=5) == {"a": (0.25, "graph"), "b": (1.5, "events")}
    assert device.stream == "default"


@pytest.mark.parametrize("external", [True, False])
def test_what_fills_in_the_generator_is_not_clocked(device, external):
    """Nor does it flatter the variant that draws nothing: all of a point are clocked alike."""
    device.external = external
    calls = {"draws": [device.call(0.25, draws=True)] * 2, "plain": [device.call(1.0)], "host": [device.refused(2.0)]}
    found = clock.device_times(calls, rounds=4)
    assert found["plain"] == (1.0, "graph") and found["host"] == (2.0, "events")
    assert found["draws"] == (0.25 if external else 0.75, "graph")  # PyTorch without such events: as it was


def test_no_capture_is_tried_of_what_says_that_it_cannot_be(device):
    tried = []

    def waits():
        tried.append(device.capturing)
        device.call(3.0)()

    assert clock.device_times({"waits": [waits]}, rounds=3, uncaptured=["waits"]) == {"waits": (3.0, "events")}
    assert tried == [None] * 3


def test_peers_that_read_the_host_say_so():
    assert OPS["decode_attention"].peers["eager"].capturable is False


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_fails_leaves_nothing_behind(device, ends):
    device.ends = ends  # a broken one's end raises too, and torch then stays on the capture's stream
    with pytest.raises(RuntimeError):
        clock.capture(device.refused(1.0))
    assert device.stream == "default" and device.pools == set() and device.capturing is None
    assert device.log[:2] == ["error", 0]  # what would wait raised at once; then the mode as it was
    assert device.log[2:] == ["reset", *(["release (0, 0)"] if not ends else []), "generator of cuda:0"]


def test_a_captured_call_is_replayed_into_its_outputs(device):
    made = []

    def call():
        made.append(device.capturing is not None)
        device.call(1.0)()
        return "outputs"

    replay, outputs = clock.capture(call)
    before = device.now
    replay()
    assert outputs == "outputs" and made == [False] * 3 + [True] and device.now == before + 1.0


# On a GPU itself


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("breaks", [lambda x: x.sum().item(), lambda x: torch.cuda.current_stream().synchronize()])
def test_a_broken_capture_leaves_the_process_whole(breaks):
    x = torch.ones(8, device="cuda")

    def call():
        torch.rand(8, device="cuda")
        breaks(x)

    with pytest.raises(RuntimeError):
        clock.capture(call)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device="cuda").unique().numel() == 3
    held = torch.cuda.memory_reserved()
    large = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    del large
    torch.cuda.empty_cache()  # which gives nothing back while the allocator believes in a capture
    assert torch.cuda.memory_reserved() <= held
    replay, y = clock.capture(lambda: x + 1)
    replay()
    assert y.tolist() == [2.0] * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_take_their_own_time():
    x = torch.empty(1 << 24, device="cuda")
    found = clock.device_times({"draws": [lambda: x.normal_()], "plain": [lambda: x.mul_(2.0)]}, rounds=20)
    assert {how for _, how in found.values()} == {"graph"}
    assert all(5e-6 < seconds < 5e-3 for seconds, _ in found.values())  # 64 MiB are written
