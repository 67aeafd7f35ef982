"""Figures of whole training steps, on the CPU: what is measured, what refused; what only a GPU does, by stand-ins."""

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.gpu_gate import __main__ as gpu_gate
from bench.gpu_gate import parity, processes, training, worker
from bench.report import records
from genai_fast import ops
from genai_fast.models.gpt.settings import GPTConfig
from genai_fast.profiling.loops import COMPILE, EAGER, FUSED
from genai_fast.profiling.systems import System

MEASURED, REDUCED = training.MEASURED, training.REDUCED
LAST = "eager channels_last autocast"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(training, "SECONDS", 0.0)
    monkeypatch.setattr(training, "roof", lambda device, count: {"precision": "x", "flops_per_second": 1e9})


def test_a_process_measures_what_it_is_asked_for(monkeypatch, capsys, seconds):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(["nobody's", "mlp_vae"])))
    monkeypatch.setattr(sys, "argv", ["worker", "training", "cpu", '{"rounds": 2, "batch": 2, "compiled": false}'])
    assert worker.main() == 0
    messages = filter(None, map(processes.parsed, capsys.readouterr().out.splitlines()))
    found = {message["run"]: message for message in messages if "run" in message}
    assert list(found) == ["nobody's", "mlp_vae"]
    assert records.failures(found["nobody's"])["raised"].startswith("UsageError: nobody's: expected one of mlp_vae")
    figure = found["mlp_vae"]
    assert not records.failures(figure), figure
    assert (figure["system"], figure["case"], figure["batch"]) == ("mlp_vae", "2x1x28x28", 2)
    assert list(figure["variants"]) == [EAGER, LAST, FUSED]
    for variant, f in figure["variants"].items():
        assert f["wall_us"] == round(seconds[variant] * 1e6, 2)
    fused = seconds[FUSED]
    assert figure["ratio"] == {variant: round(seconds[variant] / fused, 3) for variant in (EAGER, LAST)}
    assert figure["mfu_precision"] == "x" and figure["mfu"] == round(figure["model_flops"] / fused / 1e9, 4)
    assert figure["samples_per_second"] == round(2 / fused, 1)


def test_variants_are_the_system_s_own():
    names = {name: list(training.variants(system, "cpu")) for name, system in MEASURED.items()}
    assert names["dcgan_64_batch128"] == [FUSED, EAGER, LAST, COMPILE, REDUCED]
    assert names["gpt2_bfloat16"] == [FUSED, EAGER, "eager autocast", COMPILE, REDUCED]
    assert names["lstm"] == names["text_vae"] == names["vrnn"] == [FUSED, EAGER, "eager autocast"]
    assert list(MEASURED)[:3] == ["mlp_vae", "mlp_gan", "dcgan_64_batch128"]
    with torch.device("meta"):
        large = MEASURED["gpt2_bfloat16"].model()
    assert sum(p.numel() for p in large.parameters()) == 124_439_808


def test_autocast_has_channels_last_weights_and_images(monkeypatch):
    seen = []

    def plain(system, device, prepare):
        net = prepare(nn.Conv2d(3, 4, 3))
        seen.append(net.weight.is_contiguous(memory_format=torch.channels_last))
        return lambda x: seen.append((x.is_contiguous(memory_format=torch.channels_last), net(x).dtype))

    monkeypatch.setattr(System, "plain", plain)
    makers = training.variants(replace(MEASURED["dcgan_64"], batch=2), "cpu")
    makers[LAST]()()
    makers[EAGER]()()
    assert seen == [True, (True, torch.float32), False, (False, torch.float32)]


@pytest.fixture
def tiny_gpt(monkeypatch):
    """The real one of one block."""
    config = GPTConfig(dropout=0.0, layers=1, heads=2, width=16, block=8, clip=0.0, weight_decay=0.0, beta2=0.999)
    small = replace(MEASURED["gpt_nano"], config=config, shape=(8,), batch=2, vocabulary=300)
    monkeypatch.setitem(MEASURED, "gpt_nano", small)


def test_text_and_a_compiler_that_fails(tiny_gpt, quick, seconds):
    figure = training.figures("gpt_nano", "cpu", rounds=2)
    assert list(figure["variants"]) == [EAGER, "eager autocast", COMPILE, REDUCED, FUSED]
    for variant in (COMPILE, REDUCED):
        assert figure["variants"][variant] == {"skipped": "RuntimeError: no compiler and more lines"}
    assert set(figure["ratio"]) == {EAGER, "eager autocast"}
    fused = seconds[FUSED]
    assert (figure["samples_per_second"], figure["tokens_per_second"]) == (round(2 / fused, 1), round(16 / fused, 1))
    # Three products of each matrix for each of 16 tokens, and attention's.
    matrices, attention = 12 * 16 * 16 + 300 * 16, 2 * (2 * 2 * 2 * 8 * 8 * 8)
    assert figure["model_flops"] >= 3 * 2 * 16 * matrices + attention
    assert figure["mfu"] == round(figure["model_flops"] / fused / 1e9, 4)


def test_what_nothing_is_compiled_of_is_skipped(tiny_gpt, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    figure = training.figures("gpt_nano", "cpu", rounds=2)
    for variant in (COMPILE, REDUCED):
        assert figure["variants"][variant] == {"skipped": "RuntimeError: torch.compile found nothing to compile"}


def test_no_figures_where_losses_differ(monkeypatch):
    right = ops.vae_loss
    monkeypatch.setattr(ops, "vae_loss", lambda *a, **k: right(*a, **{**k, "beta": 50.0}))
    figure = training.figures("mlp_vae", "cpu", rounds=2, batch=4, compiled=False)
    assert figure["failures"]["numerics"].startswith("losses of step 1: expected about")
    assert not {"variants", "ratio", "samples_per_second"} & set(figure)
    assert records.failures(figure)


@pytest.mark.parametrize(
    ("fused", "wrong"), [([4.0, 3.0, 2.1], ""), ([4.0, 4.0, 4.0], "step 2"), ([4.0, 3.0, float("nan")], "step 3")]
)
def test_losses_of_later_steps_count_too(fused, wrong):
    """Those of a captured graph; the first are plain ones."""

    def serving(values):
        left = iter(values)
        return lambda *batch: torch.tensor(next(left))

    system = SimpleNamespace(
        inputs=lambda device: (),
        plain=lambda device: serving([4.0, 3.0, 2.0]),
        fused=lambda device: serving(fused),
        plain_scale=1,
        tolerance=5e-3,
    )
    message = training.red(system, "cpu", 3)
    assert message.startswith(f"losses of {wrong}: expected") if wrong else message == ""


def test_fused_step_that_raises_is_no_figure(monkeypatch):
    makers = training.variants
    monkeypatch.setattr(
        training, "variants", lambda *a: {**makers(*a), FUSED: lambda: exec("raise RuntimeError('broken')")}
    )
    with pytest.raises(RuntimeError, match="broken"):
        training.figures("mlp_vae", "cpu", rounds=2, batch=2, compiled=False)


class Device:
    """Stands for a GPU on which each step takes the seconds that it says."""

    def __init__(self, monkeypatch):
        self.now, device = 0.0, self
        self.waits = 0

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def wait(self):
        self.waits += 1

    def step(self, seconds):
        def call():
            self.now += seconds

        return call


def test_what_only_a_gpu_tells(monkeypatch):
    device = Device(monkeypatch)
    energy = SimpleNamespace(joules=lambda: 300.0 * device.now)
    step = SimpleNamespace(captured=1)
    steps = {FUSED: device.step(0.25), EAGER: device.step(1.5)}
    steps[FUSED].func = step
    traced = {0.25: SimpleNamespace(kernels=40, launches=2.0), 1.5: SimpleNamespace(kernels=0, launches=0.0)}

    def trace(call, count, cuda, path):
        before = device.now
        call()
        return traced[device.now - before]

    monkeypatch.setattr(training, "trace", trace)
    found = {FUSED: {}, EAGER: {}}
    training._on_device(steps, found, energy)
    assert found == {
        FUSED: {"device_us": 250000.0, "joules_per_step": 75.0, "captured": True, "launches": 2.0},
        EAGER: {"device_us": 1500000.0, "joules_per_step": 450.0},  # no kernel seen: launches are not known
    }
    energy = SimpleNamespace(joules=lambda: None)
    assert training.joules_of(steps[EAGER], 1.5, energy) is None


# The gate's stage


def test_tasks_of_the_gate(monkeypatch):
    assert gpu_gate.tasks_of("cpu", [], [])["training"] == ()
    assert gpu_gate.tasks_of("cuda", [], [])["training"] == [[name] for name in MEASURED]
    found = {name: training.parity_of(name) for name in MEASURED}
    assert found["dcgan_64_bfloat16_batch128"] == found["dense_dcgan"] == "dcgan_64"
    assert found["gpt2_bfloat16"] == "gpt_nano" and found["mlp_gan"] is None
    assert set(found.values()) - {None} == set(parity.TOLERANCE)
