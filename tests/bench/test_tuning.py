"""Settings of kernel launches: what a tuner may try is right, what it keeps is faster, and launchers find it again."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from bench import points
from bench.gpu_gate import tuning
from genai_fast import ops
from genai_fast.backends import unavailable, use_backend
from genai_fast.kernels.common import tuned
from genai_fast.kernels.common.spec import Case, Tensors
from genai_fast.registry import OPS
from genai_fast.testing import Run, assert_matches_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOICES = {name: op for op in reversed([*OPS.values()]) for name in op.choices}
pytestmark = pytest.mark.skipif(bool(unavailable("triton", DEVICE)), reason=unavailable("triton", DEVICE))


def elements(case):
    tensors = [x for x in case.inputs(Tensors()).values() if isinstance(x, torch.Tensor)]
    usual = all(x.numel() for x in tensors) and any(x.requires_grad for x in tensors)
    return max(x.numel() for x in tensors) if usual else math.inf


def launching(op, name):
    """The smallest case of an op in which a kernel is launched, in a dtype in which it is."""
    for case in sorted(op.cases, key=elements):
        for dtype in (torch.float32, torch.float16):
            with use_backend("triton"), tuned.asked() as launches:
                inputs = case.inputs(Tensors(dtype, DEVICE))
                outputs = getattr(ops, op.name)(**inputs)
                outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
                total = torch.stack([y.float().sum() for y in outputs]).sum()
                if total.requires_grad:
                    total.backward()
            if any(x.name == name for x in launches):
                return Run(op, case, dtype, "triton", DEVICE)
    raise AssertionError(f"no case of {op} launches {name}")


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_right(name):
    op = CHOICES[name]
    run = launching(op, name)
    for choice in op.choices[name]:
        with tuned.tried(name, choice):
            assert_matches_reference(run)


@pytest.fixture
def point(monkeypatch):
    """The smallest point of act_dropout, as kernels of the GPU are run here."""
    for module in (points, tuning):
        monkeypatch.setattr(module, "fused_backend", lambda op, device: "triton")
    op = OPS["act_dropout"]
    case = min(op.bench_cases, key=lambda case: case.inputs(Tensors())["x"].numel())
    small = Case(case.name, lambda t: {**case.inputs(t), "x": t.normal(9, 70)})
    with use_backend("triton"):
        yield points.Point(op, small, torch.float32, DEVICE)


def by_warps(best):
    """A clock by which the fewer warps are the faster, but those of `best` the fastest."""
    return lambda ready: {label: 1.0 if best in label else 2.0 for label in ready}


def test_the_fastest_is_kept(point):
    found = tuning.tune(point, "act_dropout/backward", by_warps("BLOCK 512, num_warps 2"))
    assert found["kept"] and found["settings"] == {"BLOCK": 512, "num_warps": 2} and found["reason"] == ""
    assert (found["default_us"], found["best_us"]) == (2e6, 1e6)
    assert found["default"] == {"BLOCK": 1024, "num_warps": 4} and found["shape"] == [630]
    assert len(found["tried"]) == 1 + len(point.op.choices["act_dropout/backward"])


def test_the_default_stays_where_nothing_is_faster_or_right(point, monkeypatch):
    found = tuning.tune(point, "act_dropout/forward", lambda ready: dict.fromkeys(ready, 1.0))
    assert not found["kept"] and found["settings"] == found["default"] and "as fast" in found["reason"]
    monkeypatch.setattr(tuning, "numerics", lambda run: "output 0: error 1")
    found = tuning.tune(point, "act_dropout/forward", by_warps("num_warps 2"))
    assert not found["kept"] and found["settings"] == found["default"] and found["reason"] == "output 0: error 1"
    assert found["refused"] == {"BLOCK 512, num_warps 2": "output 0: error 1"}
    found = tuning.tune(point, "batch_norm_act/apply", by_warps("num_warps 2"))
    assert found == {"kernel": "batch_norm_act/apply", "case": str(point), "kept": False, "reason": "not launched here"}


def test_the_next_best_is_kept_where_the_best_is_wrong(point, monkeypatch):
    def times(ready):
        return {label: 3.0 - 0.1 * number for number, label in enumerate(ready)}  # the last is the fastest

    asked = []

    def wrong(point, mine, settings):
        asked.append(settings)
        return "too large" if len(asked) < 3 else ""

    monkeypatch.setattr(tuning, "wrong", wrong)
    found = tuning.tune(point, "act_dropout/forward", times)
    *_, third, second, first = found["tried"]
    assert asked == [dict(choice) for choice in point.op.choices["act_dropout/forward"][:-4:-1]]
    assert found["kept"] and found["reason"] == "" and found["settings"] == asked[-1]
    assert found["refused"] == {first: "too large", second: "too large"}
    assert found["best_us"] == found["tried"][third]


def test_settings_are_checked_where_they_would_be_taken(point, monkeypatch):
    """And nowhere else: 630 elements here, so from a quarter to four times as many."""
    seen = []
    monkeypatch.setattr(tuning, "numerics", lambda run: seen.append(run) or "")
    monkeypatch.setattr(tuning, "check", lambda run, capture: seen.append(run) or {})
    with tuned.asked() as launches:
        point.step(points.FUSED)()
    mine = next(x for x in launches if x.name == "act_dropout/forward")
    assert mine.shape == (630,) and tuning.wrong(point, mine, {"BLOCK": 512, "num_warps": 2}) == ""
    own, *cases = seen
    assert own.case.name == point.case.name and {run.dtype for run in seen} == {torch.float32}
    interpreted = point.op.cases[::2]
    sizes = {case.name: case.inputs(Tensors())["x"].numel() for case in interpreted}
    near = {name for name, size in sizes.items() if 630 / 4 <= size <= 630 * 4}
    assert {run.case.name for run in cases} == near and 0 < len(near) < len(sizes)
    assert not tuned._tried


def test_what_is_wrong_in_a_near_case_is_told(point, monkeypatch):
    monkeypatch.setattr(tuning, "check", lambda run, capture: {"graph": f"{run}: wrong"} if tuned._tried else {})
    with tuned.asked() as launches:
        point.step(points.FUSED)()
    mine = next(x for x in launches if x.name == "act_dropout/forward")
    assert tuning.wrong(point, mine, {"BLOCK": 512, "num_warps": 2}).endswith(": wrong")
    far = tuned.Launch(mine.name, mine.dtype, (1 << 20,), mine.default)
    assert tuning.wrong(point, far, {"BLOCK": 512, "num_warps": 2}).endswith("it is not launched")


def test_convolutions_are_tuned_and_checked_in_tf32():
    """Which has launches of its own, and is what PyTorch takes by default on a GPU."""
    run = Run(OPS["conv_transpose2d"], OPS["conv_transpose2d"].cases[0], torch.float32, "triton", "cuda")
    assert [x.tf32 for x in tuning._precisions(run)] == [False, True]
    narrow = Run(run.op, run.case, torch.bfloat16, "triton", "cuda")
    other = Run(OPS["layer_norm"], OPS["layer_norm"].cases[0], torch.float32, "triton", "cuda")
    assert list(tuning._precisions(narrow, other)) == [narrow, other]


def test_settings_that_cannot_be_launched_are_named(point, monkeypatch):
    sets = tuning._sets

    def failing(point, name, settings):
        if settings["num_warps"] == 8:
            return [lambda: 1 / 0]
        return sets(point, name, settings)

    monkeypatch.setattr(tuning, "_sets", failing)
    found = tuning.tune(point, "act_dropout/forward", by_warps("num_warps 2"))
    assert found["kept"]
    assert sum("ZeroDivisionError" in str(value) for value in found["tried"].values()) == 2


def entry(dtype, *shape, **settings):
    return {"dtype": dtype, "shape": list(shape), "settings": settings}


def test_the_nearest_shape_counts():
    entries = [entry("float32", 64, 1024, n=1), entry("float32", 256, 1024, n=2), entry("bfloat16", 64, 1024, n=3)]
    assert tuned.nearest(entries, "float32", (64, 1024)) == {"n": 1}
    assert tuned.nearest(entries, "float32", (200, 900)) == {"n": 2}
    assert tuned.nearest(entries, "bfloat16", (256, 1024)) == {"n": 3}
    assert tuned.nearest(entries, "float32", (64, 1024 * 5)) is None  # more than two doublings away
    assert tuned.nearest(entries, "float16", (64, 1024)) is None and tuned.nearest(entries, "float32", (64,)) is None


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU in name, and a folder for its files."""
    monkeypatch.setattr(tuned, "KERNELS", tmp_path)
    monkeypatch.setattr(tuning.files, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tuning, "device_name", lambda device: torch.cuda.get_device_name())
    for module in (tuned, tuning):
        monkeypatch.setattr(module, "capability", lambda device: 90)
    tuned.reload()
    yield SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda"))
    tuned.reload()


def measured(kernel, shape, n, *, dtype="float32"):
    return {
        "kernel": kernel, "dtype": dtype, "shape": shape, "settings": {"n": n}, "default_us": 2.0, "best_us": 1.0,
        "kept": True, "reason": "",
    }  # fmt: skip


def test_what_is_written_is_launched(gpu, tmp_path, monkeypatch):
    assert tuned.launch("a/x", gpu, (64,), n=0, m=7) == {"n": 0, "m": 7}
    first = [measured("a/x", [64], 1), measured("a/y", [64], 2), {"kernel": "b/x", "reason": "not launched here"}]
    assert tuning.write(first, gpu.device, "abc") == ["a/tuned/nvidia-h100-80gb-hbm3.json"]
    assert tuned.launch("a/x", gpu, (64,), n=0, m=7) == {"n": 1, "m": 7}
    assert tuned.launch("a/x", gpu, (1024,), n=0) == {"n": 0}
    tuning.write([measured("a/x", [64], 3), measured("a/x", [1024], 4)], gpu.device, "def")
    assert [tuned.launch("a/x", gpu, (s,), n=0)["n"] for s in (64, 1024)] == [3, 4]
    assert tuned.launch("a/y", gpu, (64,), n=0) == {"n": 2}
    content = json.loads((tmp_path / "a" / "tuned" / "nvidia-h100-80gb-hbm3.json").read_text())
    assert (content["device"], content["capability"], content["commit"]) == ("NVIDIA H100 80GB HBM3", 90, "def")
    assert [e["shape"] for e in content["launches"]["a/x"]] == [[64], [1024]]


def test_another_gpu_of_the_same_kind_takes_them_and_others_do_not(gpu, monkeypatch):
    tuning.write([measured("a/x", [64], 1)], gpu.device, "abc")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H200")
    tuned.reload()
    assert tuned.launch("a/x", gpu, (64,), n=0) == {"n": 1}
    monkeypatch.setattr(tuned, "capability", lambda device: 80)
    tuned.reload()
    assert tuned.launch("a/x", gpu, (64,), n=0) == {"n": 0}


def test_tasks_are_points_and_their_launches():
    found = list(tuning.tasks(DEVICE))
    assert len({task for task, _, _ in found}) == len(found)
    assert all(name in point.op.choices and task == f"{point} {name}" for task, point, name in found)
    assert {name.split("/")[0] for _, _, name in found} <= {op.folder for op in OPS.values()}
