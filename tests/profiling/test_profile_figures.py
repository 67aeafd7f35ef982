"""What a profile counts, clocks and says, part by part; what only a GPU does, by stand-ins."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.utils.data import DataLoader

from genai_fast.models.gan import plain
from genai_fast.profiling import counters, figures, loops, machine, measure, trace
from genai_fast.profiling.diagnosis import diagnose
from genai_fast.profiling.figures import roof
from genai_fast.profiling.flops import FlopCount
from genai_fast.profiling.report import as_text
from genai_fast.profiling.systems import of_recipe
from genai_fast.profiling.waiting import Waiting


def test_flops_of_products_attention_and_recurrence():
    layer, x = nn.Linear(16, 4), torch.randn(8, 16, requires_grad=True)
    with FlopCount() as count:
        layer(x).sum().backward()
    assert count.by_dtype == {torch.float32: 3 * 2 * 8 * 16 * 4} and not count.unknown
    q = torch.randn(2, 3, 8, 16, requires_grad=True)
    with FlopCount() as count:
        y = nn.functional.scaled_dot_product_attention(q, q, q)
    assert count.total == 2 * (2 * 2 * 3 * 8 * 8 * 16)
    assert y.shape == q.shape
    with FlopCount() as count:
        nn.LSTM(3, 5)(torch.randn(7, 2, 3))
    assert count.total == 2 * 7 * 2 * (4 * 5 * 3 + 4 * 5 * 5)


@pytest.mark.parametrize("name", ["vae", "conv-vae"])
def test_fused_ops_count_as_what_they_replace(name):
    system, totals = of_recipe(name, 2), []
    for make in (system.plain, system.fused):
        torch.manual_seed(0)
        step = make("cpu")
        with FlopCount() as count:
            step(*system.inputs("cpu"))
        assert not count.unknown
        totals.append(count.total)
    assert totals[0] == totals[1] > 0
    with FlopCount(references=False) as count:
        system.fused("cpu")(*system.inputs("cpu"))
    assert any(name.startswith("genai_fast::") for name in count.unknown)


def test_ops_without_a_formula_are_named():
    with FlopCount() as count:
        torch.mv(torch.ones(3, 4), torch.ones(4))
    assert count.unknown == {"aten::mv"} and count.total == 0


def test_autocast_gives_float32_back_and_copies_run_their_own_weights():
    model = loops.preparing("eager", bf16=True)(nn.Sequential(nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    with FlopCount() as count:
        assert model(x).dtype is torch.float32
    assert set(count.by_dtype) == {torch.bfloat16}
    other = copy.deepcopy(model)
    nn.init.zeros_(other[0].weight)
    nn.init.zeros_(other[0].bias)
    assert not other(x).any() and model(x).any()


def test_every_network_that_is_fused_is_reported():
    """Both are roots: their paths alone do not tell them apart."""
    left_alone = []
    for variant in ("eager", "fused"):
        prepare = loops.preparing(variant, False, left_alone)
        for network in (nn.Sequential(nn.RNN(2, 2)), nn.RNN(2, 2), nn.Sequential(nn.Softmax(1))):
            prepare(network)
    subject = SimpleNamespace(left_alone=left_alone)
    assert [row[:2] for row in figures._left_alone(subject)] == [
        ["Sequential.0", "RNN"], ["RNN", "RNN"], ["Sequential 2.0", "Softmax"],
    ]  # fmt: skip
    subject.left_alone = left_alone[:1]
    assert [row[:2] for row in figures._left_alone(subject)] == [["0", "RNN"]]
    subject.left_alone = left_alone[1:2]
    assert [row[:2] for row in figures._left_alone(subject)] == [[".", "RNN"]]


def test_compile_compiles_what_pytorch_would_leave_alone(monkeypatch):
    torch.compiler.reset()  # other tests may have compiled nn.Sequential.forward as often as it may be
    counters_ = torch._dynamo.utils.counters
    counters_.clear()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: compiler(function, mode=mode, backend="eager"))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    wanted = model(torch.ones(2, 4))
    torch.testing.assert_close(loops.preparing("compile", False)(model)(torch.ones(2, 4)), wanted)
    assert counters_["stats"]["unique_graphs"] == 1


def test_only_the_step_itself_waits(monkeypatch):
    waiting = Waiting()
    now = [0.0]
    monkeypatch.setattr("genai_fast.profiling.waiting.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Data:
        def __len__(self):
            return 2

        def __getitem__(self, k):
            now[0] += 1.0
            return next(iter(DataLoader([k]))).item()  # a loader inside a loader

    with waiting.on_loaders():
        for _ in DataLoader(Data(), batch_size=1):
            now[0] += 5.0
        thread = threading.Thread(target=lambda: list(DataLoader(Data())))
        thread.start()
        thread.join()
    assert waiting.seconds == 2.0 and waiting.batches == 3  # the third finds the end
    list(DataLoader(Data()))
    assert waiting.seconds == 2.0
    list(waiting.timed(iter([1, 2])))
    assert waiting.batches == 6


@pytest.fixture
def switches():
    """How float32 is multiplied on a GPU: in products, in convolutions."""
    found = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in found]
    yield found
    for switch, precision in zip(found, before, strict=True):
        switch.fp32_precision = precision


@pytest.mark.parametrize(
    ("matmul", "conv", "convolves", "precision"),
    [("ieee", "tf32", 0, "float32"), ("ieee", "tf32", 1, "tf32"), ("ieee", "ieee", 1, "float32"),
     ("tf32", "ieee", 0, "tf32"), ("none", "ieee", 1, "float32")],
)  # fmt: skip
def test_the_roof_is_that_of_the_precision_in_use(switches, monkeypatch, matmul, conv, convolves, precision):
    """Asked by fp32_precision: the older allow_tf32 raises where one of them was set."""
    for switch, value in zip(switches, (matmul, conv), strict=True):
        switch.fp32_precision = value
    monkeypatch.setattr("genai_fast.profiling.machine.gemm", lambda device, precision: 1.0)
    count = SimpleNamespace(by_dtype={torch.float32: 1}, convolutions=(convolves, 0))
    assert roof("cuda", count)["precision"] == precision


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_a_roof_is_measured_in_its_precision_and_leaves_the_switch_alone(switches, monkeypatch, before):
    seen = []
    monkeypatch.setitem(machine.GEMM_SIZE, "cpu", 8)
    monkeypatch.setattr(machine, "fastest", lambda call, device: seen.append(switches[0].fp32_precision) or 1.0)
    switches[0].fp32_precision = before
    for precision, wanted in (("tf32", "tf32"), ("float32", "ieee")):
        seen.clear()
        assert machine.gemm("cpu", precision) == 2 * 8**3
        assert set(seen) == {wanted} and switches[0].fp32_precision == before


def test_a_type_that_the_cpu_lacks_is_measured_on_small_matrices(monkeypatch):
    monkeypatch.setattr(machine.onednn, "serves", lambda dtype: dtype is torch.float32)
    monkeypatch.setattr(machine, "fastest", lambda call, device: 1.0)
    assert machine.gemm("cpu", "bfloat16") == machine.gemm("cpu", "float16") == 2 * 512**3
    assert machine.gemm("cpu", "float32") == 2 * 2048**3


def _event(name, start, end, kind=DeviceType.CPU, parent=None):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name, device_type=kind, cpu_parent=parent, time_range=span, is_user_annotation=False, thread=1
    )


def _average(key, device=0.0, kind=DeviceType.CPU):
    return SimpleNamespace(key=key, count=2, self_device_time_total=device, device_time_total=device, device_type=kind)


@pytest.mark.parametrize("graph", [False, True])
def test_reading_a_trace_of_a_gpu(graph):
    window = _event(trace._WINDOW, 0, 100)
    linear = _event("aten::linear", 1, 9, parent=window)
    events = [
        window, linear, _event("aten::addmm", 2, 8, parent=linear), _event("aten::relu", 10, 12, parent=window),
        _event("cudaLaunchKernel", 3, 4), _event("cudaLaunchKernelExC", 11, 12),
        _event("gemm", 20, 40, DeviceType.CUDA), _event("relu", 30, 50, DeviceType.CUDA),
        _event("Memcpy HtoD", 60, 70, DeviceType.CUDA),
    ]  # fmt: skip
    averages = [] if graph else [_average("aten::addmm", 20.0), _average("aten::relu", 20.0)]
    averages += [_average("gemm", 20.0, DeviceType.CUDA)]
    profile = SimpleNamespace(events=lambda: events, key_averages=lambda: averages)
    found = trace._read(profile, 2, cuda=True)
    assert found[:3] == (1.0, 1.0, 1.0)  # operators, kernels and launches of each of two steps
    assert found.device_seconds == pytest.approx(20e-6) and found.whole == pytest.approx(25e-6)
    names = {o.name for o in found.operators}
    assert names == ({"gemm", "relu", "Memcpy HtoD"} if graph else {"aten::addmm", "aten::relu"})


def test_steps_on_a_gpu_last_until_their_last_kernel(monkeypatch):
    clock = iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, later):
            return 1e3 * (later.at - self.at)

    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(next(clock)))
    variant, energy = measure.Measured("loop"), SimpleNamespace(joules=iter([5.0, 9.0]).__next__)
    left = iter([2, 2, 2])

    def step():
        try:
            return next(left)
        except StopIteration:
            raise loops.LoopEnded("over") from None

    with pytest.raises(loops.LoopEnded):
        measure._turn(Waiting(), variant, step, 7, True, energy)
    assert variant.seconds == [1.0, 1.0, 1.0] and len(waits) == 2  # before and after, never between
    assert (variant.steps, variant.samples, variant.joules) == (3, 6, 4.0)


def test_energy_is_read_from_the_management_library(monkeypatch):
    library = SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"handle": 2500}[handle])
    monkeypatch.setattr(counters, "nvml", lambda: (library, "handle"))
    energy = counters.Energy(True)
    assert energy.joules() == 2.5 and energy.reason == ""
    monkeypatch.setattr(counters, "nvml", lambda: exec("raise OSError('no driver')"))
    energy = counters.Energy(True)
    assert energy.joules() is None and "OSError: no driver" in energy.reason


def _report(device="cpu", threads=64, left_alone=(), operators=(), tune_cpu="", **figures):
    found = {
        "data_wait": None, "device_busy": None, "page_faults": 0.0, "operators": [
            {"name": name, "share_with_callees": share} for name, share in operators
        ], "arithmetic": {"float32": 1.0}, "convolutions": 0, "convolutions_not_channels_last": 0,
        "operator_calls": 10.0, "kernels": 250.0, "launches": 240.0, **figures,
    }  # fmt: skip
    head = {"device": device, "environment": {"threads": threads}, "left_alone": left_alone, "tune_cpu": tune_cpu}
    return {**head, "variants": {"eager": found, "fused": found}}


RULES = {
    "waiting": ({"data_wait": 0.3}, "waiting for data takes 30% of the time"),
    "launches": ({"device": "cuda", "device_busy": 0.4}, "the GPU computes 40% of the time; 250 kernels per step"),
    "faults": ({"page_faults": 40000.0}, "40,000 page faults per step"),
    "retries": ({"device": "cuda", "allocator_retries": 3}, "retried 3 times"),
    "norm": ({"operators": [("aten::native_batch_norm_backward", 0.2)]}, "batch norm takes 20% of the step"),
    "dropout": ({"operators": [("aten::bernoulli_", 0.2)]}, "dropout takes 20% of the step: genai_fast.fuse"),
    "attention": ({"operators": [("aten::_scaled_dot_product_flash", 0.1)]}, "genai_fast.ops.causal_attention"),
    "loss": ({"operators": [("aten::_log_softmax", 0.1), ("aten::nll_loss_backward", 0.1)]}, "cross-entropy takes 20%"),
    "adam": ({"operators": [("aten::addcdiv_", 0.1)]}, "genai_fast.optim.Adam"),
    "adam on a GPU": ({"device": "cuda", "operators": [("aten::_foreach_mul_", 0.1)]}, "fused=True, capturable=True"),
    "layout": (
        {"operators": [("aten::mkldnn_convolution", 0.4)], "convolutions": 9, "convolutions_not_channels_last": 8},
        "8 of 9 convolutions of images are not channels_last",
    ),
    "outside": ({"operators": [("(outside PyTorch's operators)", 0.6)]}, "60% of the step passes outside"),
    "threads": ({"threads": 1}, "1 of 16 cores in use: torch.set_num_threads(8)"),
    "left alone": ({"left_alone": [["a.b", "Net", "because"]]}, "fuse leaves alone: a.b (Net): because"),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_the_figures_say(rule, monkeypatch):
    monkeypatch.setattr("genai_fast.profiling.diagnosis.allowed_cores", lambda: 16)
    given, text = RULES[rule]
    (said,) = diagnose(_report(**given), "fused" if rule == "left alone" else "eager")
    assert text in said
    assert diagnose(_report(), "eager") == []


@pytest.mark.parametrize(("tuned", "advised"), [("", 2), ("freed memory kept", 0)])
def test_tune_cpu_is_advised_only_where_it_is_off(tuned, advised):
    report = _report(tune_cpu=tuned, page_faults=40000.0, operators=[("aten::mm", 0.6)])
    assert sum("tune_cpu()" in text for text in diagnose(report, "eager")) == advised


def _variant(p50, per_second):
    return {
        "unit": "samples", "per_second": per_second, "step_seconds": {"p50": p50, "p95": p50, "max": 9.0},
        "data_wait": 0.1, "operator_calls": 5.0, "flops": 10, "flops_per_second": 1e9, "flops_share_of_peak": 0.5,
        "flops_not_counted": [], "peak_resident_growth_bytes": 1, "page_faults": 0.0, "joules": None, "watts": None,
        "first_step_seconds": 1.0, "steps": 9, "operators": [], "device_busy": None, "arithmetic": {},
        "convolutions": 0, "convolutions_not_channels_last": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("load", "busy"), [(0.44, "0.4"), (None, "an unknown number of")])
def test_the_headline_is_a_ratio_of_medians_with_the_load_beside(load, busy):
    """One long step changes a mean, and with it which variant looks faster."""
    report = _report() | {
        "model": "m", "what": "w", "peak": None, "foreign_load": load, "energy": "energy: unknown on a CPU",
        "ended": "", "no_wait": "", "environment": {"device": "CPU", "threads": 2, "torch": "2", "cores": 4},
        "variants": {"eager": _variant(0.03, 30.0), "fused": _variant(0.02, 20.0)},
    }  # fmt: skip
    lines = as_text(report).splitlines()
    assert lines[2] == (
        f"fused 1.50 x eager (medians of alternating steps; other programs kept {busy} of 4 cores busy)"
    )
    assert [line.split() for line in lines if line.startswith("times eager")] == [
        ["times", "eager", "1.00", "x", "1.50", "x"]
    ]
    assert not [line for line in lines if "unknown" in line and line != lines[2]]


@pytest.mark.parametrize("narrow", [False, True])
def test_bfloat16_is_named_where_it_is_fast(narrow, monkeypatch):
    monkeypatch.setattr("genai_fast.profiling.diagnosis._narrow_is_fast", lambda cuda: narrow)
    report = _report(operators=[("aten::addmm", 0.8)])
    assert any("bfloat16" in text for text in diagnose(report, "eager")) == narrow


def test_plain_scripts_serve_the_batch_that_is_asked_for():
    system = of_recipe("mlp-gan", 3)
    prepared = []
    step = system.plain("cpu", lambda model, method: prepared.append((type(model), method)) or model)
    losses = step(*system.inputs("cpu"))
    assert prepared == [(plain.PlainMLPGenerator, "forward"), (plain.PlainMLPDiscriminator, "forward")]
    assert system.inputs("cpu")[0].shape == (3, 1, 28, 28) and all(loss.isfinite() for loss in losses)
    assert of_recipe("wgan-gp", 2).inputs("cpu")[0].shape == (10, 3, 32, 32)
    assert of_recipe("dcgan").shape == (3, 64, 64) and of_recipe("gpt", 2, "bfloat16").config.precision == "bfloat16"


def test_peak_memory_grows_with_what_is_held():
    peak = counters.PeakMemory(cuda=False)
    peak.reset()
    held = torch.ones(1 << 23)
    grown = peak.read()["peak_resident_growth_bytes"]
    if grown is None:
        pytest.skip("the system does not tell the peak of resident memory")
    assert grown > held.nbytes / 2
