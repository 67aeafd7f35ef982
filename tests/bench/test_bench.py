"""The benchmarks' machinery: collection, clocks, gating of figures on numerics, records."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import memory, points, recording, roofs
from bench.gpu_gate import training
from bench.report import files
from genai_fast import ops
from genai_fast.kernels.common.spec import Tensors
from genai_fast.profiling.systems import SYSTEMS
from genai_fast.registry import OPS

ROOT = Path(__file__).resolve().parents[2]
VAE_LOSS, REPARAMETERIZE = OPS["vae_loss"], OPS["reparameterize"]


# Collection


def collected(*arguments):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()


def test_plain_pytest_does_not_collect_the_benchmarks():
    lines = collected("--ignore-glob=tests/*/test_[!b]*")
    assert any(line.startswith("tests/bench/test_bench.py::") for line in lines)
    assert not any(line.startswith("bench/") for line in lines)


def test_benchmarks_cover_every_op_and_case():
    lines = collected("bench/")
    found = [line for line in lines if line.startswith("bench/bench_ops.py::")]
    expected = [f"[{p}]" for p in points.points(points.DEVICE)]
    assert len(found) == len(expected) == len(set(found))
    assert all(any(line.endswith(suffix) for line in found) for suffix in expected)
    assert any(line.startswith("bench/bench_training.py::") for line in lines)


# Clocks


def test_share_is_of_the_nearer_roof(monkeypatch):
    monkeypatch.setattr(roofs, "roofs", lambda device: {"bytes_per_second": 100.0, "float32": 1000.0})
    assert roofs.share("cpu", 4.0, nbytes=200, flops=1000) == 0.5  # memory asks for 2 s, arithmetic for 1 s
    assert roofs.share("cpu", 4.0, nbytes=100, flops=3000) == 0.75


# What is measured


def point_of(op, case=0):
    return points.Point(op, op.bench_cases[case], torch.float32, "cpu")


def smallest(op):
    """The op's bench case of the fewest elements; the others are for the benchmarks."""
    found = [point_of(op, case) for case in range(len(op.bench_cases))]
    return min(found, key=lambda p: sum(x.numel() for x in p.inputs().values() if isinstance(x, torch.Tensor)))


def test_steps_of_all_variants_give_the_same_gradients():
    point = point_of(VAE_LOSS)
    torch.manual_seed(0)
    eager = point.step("eager")()
    torch.manual_seed(0)
    fused = point.step(points.FUSED)()
    assert len(eager) == len(fused) == 3
    for a, b in zip(eager, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_tensors_are_drawn_where_they_are_wanted():
    def drawn(seed):
        t = points.OnDevice(torch.bfloat16, "cpu", torch.Generator().manual_seed(seed))
        return t.normal(300, 100, scale=2.0, mean=5.0), t.uniform(70, 90, low=-1.0, high=3.0), t.seed(7)

    normal, uniform, seed = drawn(1)
    assert normal.dtype is uniform.dtype is torch.bfloat16 and seed == 7
    assert normal.requires_grad and normal.is_leaf and not uniform.requires_grad
    assert normal.float().mean().item() == pytest.approx(5.0, abs=0.05)
    assert normal.float().std().item() == pytest.approx(2.0, abs=0.05)
    assert uniform.min() >= -1 and uniform.max() <= 3 and uniform.float().mean().item() == pytest.approx(1.0, abs=0.1)
    for other, same in ((1, True), (2, False)):
        assert torch.equal(drawn(other)[0], normal) == same == torch.equal(drawn(other)[1], uniform)
    assert type(points.drawing(torch.float32, "cpu", torch.Generator())) is Tensors


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_each_op_s_inputs_can_be_drawn_so(op):
    """In the same shapes and layouts; some draw numbers of their own."""
    point, described = smallest(op), []
    for kind in (Tensors, points.OnDevice):
        inputs = point.case.inputs(kind(torch.float32, "cpu", torch.Generator().manual_seed(0)))
        values = [x for value in inputs.values() for x in (value if isinstance(value, list) else [value])]
        described.append([(x.shape, x.stride(), x.dtype) for x in values if isinstance(x, torch.Tensor)])
    assert described[0] == described[1]


def test_inputs_on_a_gpu_are_drawn_once(monkeypatch):
    drawn = []

    def drawing(dtype, device, generator):
        drawn.append((device, generator.initial_seed()))
        return Tensors(dtype, "cpu", generator)

    monkeypatch.setattr(points, "drawing", drawing)
    points._kept.clear()
    first, other = (points.Point(VAE_LOSS, VAE_LOSS.bench_cases[0], torch.float32, "cuda") for _ in range(2))
    assert first.input_sets == points.INPUT_SETS
    for variant in (points.FUSED, "eager"):
        for seed in range(2):
            first.step(variant, seed)
    assert drawn == [("cuda", 0), ("cuda", 1)]
    assert first.inputs(1) is not first.inputs(1) and first.inputs(1)["mu"] is first.inputs(1)["mu"]
    other.inputs()
    assert {point for point, _ in points._kept} == {other}  # the first one's memory is free again
    before = point_of(VAE_LOSS)
    assert before.inputs()["mu"] is not before.inputs()["mu"]


def test_no_capture_is_tried_of_a_peer_that_reads_the_host(monkeypatch, quick):
    told = {}

    def device_times(sets, uncaptured):
        told.update(sets=list(sets), uncaptured=uncaptured)
        return dict.fromkeys(sets, (1e-3, "graph"))

    monkeypatch.setattr(points, "drawing", lambda dtype, device, generator: Tensors(dtype, "cpu", generator))
    monkeypatch.setattr(points.clock, "device_times", device_times)
    monkeypatch.setattr(points.memory, "peak_bytes", lambda call, device: 0)
    monkeypatch.setattr(points.roofs, "share", lambda *a: 0.5)
    monkeypatch.setattr(points, "fused_backend", lambda op, device: "triton")
    monkeypatch.setitem(points.SECONDS, "cuda", 0.0)
    op = OPS["decode_attention"]
    figure = points.figures(points.Point(op, op.bench_cases[0], torch.float32, "cuda"), compiled=False)
    assert told == {"sets": ["eager", points.FUSED], "uncaptured": ["eager"]}
    assert figure["ratio"] == {"eager": 1.0}


@pytest.mark.parametrize(
    ("op", "variant"), [(op, v) for op in OPS.values() for v in (*op.peers, points.FUSED)], ids=str
)
def test_every_variant_but_the_compiled_runs(op, variant):
    """torch.compile's is left to the benchmarks: it takes a minute, and may fail there."""
    assert smallest(op).step(variant)() is not None


def test_figures_name_everything_and_say_what_was_skipped(quick, seconds):
    point = point_of(VAE_LOSS)
    figure = points.figures(point, seconds=0.0)
    assert set(figure["variants"]) == {*VAE_LOSS.peers, points.COMPILED, points.FUSED}
    assert figure["variants"][points.COMPILED] == {"skipped": "RuntimeError: no compiler and more lines"}
    assert set(figure["ratio"]) == set(VAE_LOSS.peers)
    fused = seconds[points.FUSED]
    assert figure["ratio"]["eager"] == round(seconds["eager"] / fused, 3)
    cost = VAE_LOSS.cost(**point.inputs())
    assert figure["gigabytes_per_second"] == round(cost.bytes / fused / 1e9, 2)
    json.dumps(figure)


def test_a_variant_may_fail_without_a_word(quick, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError

    monkeypatch.setattr(torch, "compile", fail)
    figure = points.figures(point_of(VAE_LOSS), seconds=0.0)
    assert figure["variants"][points.COMPILED] == {"skipped": "RuntimeError: "}


def test_peak_memory_counts_what_is_held_at_a_time():
    def call():
        first = torch.empty(1 << 20)
        del first
        second, third = torch.empty(1 << 20), torch.empty(1 << 20)
        return second, third

    assert memory.peak_bytes(call, "cpu") == 2 * 4 << 20


def test_batch_norm_act_holds_less_than_eager(quick):
    """The result and the gradient; eager also holds the normalised tensor and its gradient."""
    op = OPS["batch_norm_act"]
    point = point_of(op, next(k for k, case in enumerate(op.bench_cases) if "32x128x16x16" in case.name))
    peak = {v: memory.peak_bytes(point.step(v), "cpu") for v in (*op.peers, points.FUSED)}
    tensor = point.inputs()["x"].nbytes
    assert peak[points.FUSED] <= peak["eager (inplace)"]
    assert peak[points.FUSED] <= peak["eager"] - tensor


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_gate_is_green_on_what_is_right(op):
    assert points.red(smallest(op)) == ""


def test_gate_is_red_on_what_is_wrong(monkeypatch):
    right = ops.reparameterize
    monkeypatch.setattr(ops, "reparameterize", lambda *a, **k: 1.001 * right(*a, **k))
    assert "output 0: error" in points.red(point_of(REPARAMETERIZE))


def test_training_gate(monkeypatch):
    assert training.red(SYSTEMS["mlp_vae"], "cpu") == "" == training.red(SYSTEMS["mlp_gan"], "cpu")
    right = ops.vae_loss
    monkeypatch.setattr(ops, "vae_loss", lambda *a, **k: right(*a, **{**k, "beta": 50.0}))
    assert training.red(SYSTEMS["mlp_vae"], "cpu").startswith("losses of step 1: expected about")


@pytest.mark.parametrize("system", ["mlp_vae", "mlp_gan", "dcgan_64", "dense_dcgan", "conv_vae_64"])
def test_plain_and_fused_steps_begin_with_the_same_weights(system):
    chosen, plain = SYSTEMS[system], []
    torch.manual_seed(0)
    chosen.plain("cpu", lambda network, method="forward": (plain.append(network), network)[1])
    torch.manual_seed(0)
    fused = [p for p in chosen.model().parameters() if p.requires_grad]
    plain = [p for network in plain for p in network.parameters()]
    assert len(plain) == len(fused) and all(map(torch.equal, plain, fused))


# Records


def test_record_is_whole_or_absent(tmp_path):
    path = tmp_path / "folder" / "record.json"
    files.write_json(path, {"figures": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"figures": 2, "not": object()})
    assert json.loads(path.read_text()) == {"figures": 1}
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    path = tmp_path / "record.json"
    files.write_json(path, {"losses": [1.5, float("nan")], "a": {"b": (float("inf"), 2, None, "NaN", True)}})
    assert "Infinity" not in path.read_text()
    assert json.loads(path.read_text()) == {"losses": [1.5, None], "a": {"b": [None, 2, None, "NaN", True]}}


def test_several_files_are_written_all_or_none(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("")
    for impossible in ("file/b", "taken"):  # no folder, no file
        with pytest.raises(OSError):
            files.write_all({tmp_path / impossible: b"b", tmp_path / "a": b"a"})
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "file"}


def test_record_path():
    import datetime

    path = recording.default_path("NVIDIA H100 80GB HBM3", "abc123", True, datetime.date(2026, 3, 4))
    assert path == ROOT / "bench" / "results" / "nvidia-h100-80gb-hbm3" / "2026-03-04-abc123-dirty.json"
