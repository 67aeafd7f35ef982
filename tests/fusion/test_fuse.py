"""fuse on models as people write them: the same numbers, keys and classes, and a reason for what is left alone."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from alike import assert_alike, assert_buffers_alike, assert_close, assert_gradients, step, with_statistics
from fuse_models import MODELS, HandWritten, OneNorm, ResBlock, UNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from genai_fast import autotune, explain, fuse, ops, unfuse, use_backend
from genai_fast.layers import ConvBNAct, FusedSequential

pytestmark = pytest.mark.usefixtures("small_is_fused")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _pair(make):
    model = make()
    return fuse(copy.deepcopy(model)), model


EXPECTED = {
    "dcgan_generator": ["relu"] * 2, "dcgan_discriminator": ["leaky_relu"], "vae": ["leaky_relu"] * 4,
    "patchgan": ["leaky_relu"] * 2, "unet": ["relu"] * 6, "skip_block": ["relu", "none"],
    "hand_written": ["relu", "leaky_relu", "leaky_relu"], "resnet_block": ["relu", "relu"],
    "shared": ["silu", "sigmoid"], "branches": ["relu"], "spectral": ["leaky_relu"],
    "upsampler": ["none", "leaky_relu", "silu", "relu", "tanh"],
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_is_the_model(name, fused_calls, pinned, monkeypatch):
    make, data = MODELS[name]
    fused, plain = _pair(make)
    x = data()
    fused(x)
    plain(x)
    assert fused_calls[-len(EXPECTED[name]) :] == EXPECTED[name]
    if name == "branches":
        assert len(fused_calls) == 1 + 1  # its first norm has two uses: fused by itself
    monkeypatch.delenv("GENAI_FAST_DETERMINISTIC")
    assert_alike(fused, plain, x)  # by whatever is measured to be the fastest
    assert_buffers_alike(fused, plain)
    assert isinstance(fused, make) and type(fused).__name__ == make.__name__
    assert repr(fused) == repr(plain)


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_gives_every_class_back(name, fused_calls):
    make, data = MODELS[name]
    model = make()
    classes, optimizer = [type(m) for m in model.modules()], torch.optim.Adam(model.parameters())
    assert fuse(model) is model and fuse(model) is model
    fused_classes = [type(m) for m in model.modules()]
    assert any(f is not c for f, c in zip(fused_classes, classes, strict=True))
    assert all(issubclass(f, c) for f, c in zip(fused_classes, classes, strict=True))
    assert optimizer.param_groups[0]["params"] == [*model.parameters()]
    assert unfuse(model) is model and all(type(m) is c for m, c in zip(model.modules(), classes, strict=True))
    model(data())
    assert not fused_calls
    assert [type(m) for m in fuse(model).modules()] == fused_classes


@pytest.mark.parametrize("name", [name for name in MODELS if name != "spectral"])  # torch refuses to pickle that
def test_copies_stay_fused_and_pickles_are_of_the_original(name):
    make, data = MODELS[name]
    fused = with_statistics(fuse(make())).eval()
    x = data()
    y = fused(x)
    twin = copy.deepcopy(fused)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    assert not {*map(id, twin.parameters())} & {*map(id, fused.parameters())}
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    plain = [torch.load(stream, weights_only=False)]
    plain += [pickle.loads(pickle.dumps(fused, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for model in (twin, *plain):
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    for model in plain:
        assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]


def test_a_pickle_loads_without_this_package(tmp_path):
    torch.save(fuse(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))), tmp_path / "m.pt")
    code = (
        "import sys, torch; sys.modules['genai_fast'] = None\n"
        f"m = torch.load({str(tmp_path / 'm.pt')!r}, weights_only=False); print(type(m[0]).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.nn.modules.container", done.stderr


def test_training_goes_on_after_fuse_and_unfuse():
    fused, plain = HandWritten(), HandWritten()
    plain.load_state_dict(fused.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), eps=1e-2) for m in (fused, plain)]
    x = torch.randn(7, 6)
    for change in (lambda m: None, fuse, unfuse, fuse):
        change(fused)
        for model, optimizer in zip((fused, plain), optimizers, strict=True):
            _, gradients = step(model, x)
            optimizer.step()
        assert gradients
    for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_close(a, b, 1e-4, what=name)


# --- what stays right later


def test_hooks_that_come_late(fused_calls, pinned):
    model, seen = fuse(HandWritten()), []
    z = torch.randn(7, 6)
    model.bn1.register_forward_hook(lambda module, args, y: seen.append(y))
    model.register_forward_hook(lambda module, args, y: seen.append(y))
    model(z)
    assert [y.shape[1] for y in seen] == [6, 3] and fused_calls == ["relu", "leaky_relu"]


def test_children_of_another_class(fused_calls, pinned):
    fused, plain = _pair(HandWritten)
    for model in (fused, plain):
        torch.manual_seed(2)
        model.bn1 = nn.InstanceNorm2d(6)
        nn.utils.parametrizations.weight_norm(model.conv2)
        nn.utils.spectral_norm(model.conv1)
    assert_alike(fused, plain, torch.randn(7, 6), steps=1)
    assert set(fused_calls) == {"relu", "leaky_relu"}
    assert len(fused(torch.randn(7, 6))) == 7


def test_instances_of_one_class_are_decided_one_by_one(fused_calls, pinned):
    x = torch.randn(4, 3, 8, 8)
    with_norm, without = OneNorm(nn.BatchNorm2d(4)), OneNorm(nn.Identity())
    both = fuse(nn.ModuleList([with_norm, without]))
    assert type(without) is OneNorm and type(with_norm) is not OneNorm
    assert type(fuse(OneNorm(nn.BatchNorm2d(4)))) is type(with_norm)  # one class for one decision
    for model in both:
        assert_close(model(x), F.relu(model.norm(model.conv(x))), 1e-4)
    assert fused_calls == ["relu"]


class _Aliased(nn.Module):
    """x is changed in place between the convolution and its norm, and `y` is the same tensor as `x`."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = x + 0.0
        h = self.conv(x)
        x.mul_(2.0)
        y = x
        x -= 1.0
        return self.bn(h) + y + F.relu(self.bn2(y), True)


def test_what_works_in_place_keeps_its_order(fused_calls, pinned):
    fused, plain = _pair(_Aliased)
    assert type(fused) is not _Aliased
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        assert_close(fused(x), plain(x), 1e-5)
    assert fused_calls == ["none", "relu"]


def test_layers_stay_layers():
    model = nn.Sequential(ConvBNAct(3, 4, 3), FusedSequential(nn.ReLU()))
    for change in (fuse, unfuse):
        assert [type(m) for m in change(model)] == [ConvBNAct, FusedSequential]
    assert type(model) is nn.Sequential
    assert isinstance(fuse(model), FusedSequential) and type(model[:1]) is type(model)


class _Block(nn.Sequential):
    def __init__(self, a, b):
        super().__init__(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU6())


class Recurrent(nn.Module):
    """A model whose forward fuse does not write: the modules in it become ours all the same."""

    def __init__(self):
        super().__init__()
        self.gru, self.norm = nn.GRU(6, 8, 2), nn.RMSNorm(8)

    def forward(self, x):
        y, _ = self.gru(x)
        return self.norm(y) if x.size(0) > 2 else y


@pytest.mark.parametrize("backend", ["", "reference"])
def test_gru_and_rms_norm_become_ours(monkeypatch, backend):
    calls = []
    for name in ("gru", "rms_norm"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, name=name: calls.append(name) or op(*args))
    fused, plain = _pair(Recurrent)
    x = torch.randn(9, 4, 6)
    with use_backend(backend) if backend else contextlib.nullcontext():
        fused(x)
        assert calls == ["gru", "gru", "rms_norm"]
        assert_alike(fused, plain, x)
    assert [row.becomes for row in explain(fused) if row.path in ("gru", "norm")] == ["layers.GRU", "layers.RMSNorm"]
    assert type(pickle.loads(pickle.dumps(fused)).gru) is nn.GRU and copy.deepcopy(fused).norm.weight.grad is None
    calls.clear()
    unfuse(fused)(x)
    assert calls == [] and type(fused.gru) is nn.GRU and type(fused.norm) is nn.RMSNorm
    fused.gru.forward = fused.gru.forward
    assert [row.reason for row in explain(fuse(fused)) if row.path == "gru"] == ["its forward is replaced"]


def test_a_subclass_of_sequential(fused_calls, pinned):
    fused, plain = _pair(lambda: _Block(3, 4))
    assert isinstance(fused, _Block)
    assert_alike(fused, plain, torch.randn(4, 3, 8, 8), steps=1)
    assert fused_calls and set(fused_calls) == {"relu6"}


# --- PyTorch around it


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [HandWritten, UNet])
def test_compile(make, training):
    fused, plain = _pair(make)
    data = MODELS["hand_written" if make is HandWritten else "unet"][1]()
    fused.train(training)
    plain.train(training)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    (y,), found = step(compiled, data)
    (expected,), gradients = step(plain, data)
    assert_close(y, expected, 1e-4)
    assert_gradients({k.removeprefix("_orig_mod."): g for k, g in found.items()}, gradients)
    assert_buffers_alike(fused, plain)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    fused, plain = _pair(HandWritten)
    x = torch.randn(7, 6)
    program = torch.export.export(fused.eval(), (x,), strict=strict)
    assert not any("genai_fast" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(x), plain.eval()(x), 1e-4)


@pytest.mark.parametrize("name", ["hand_written", "unet", "resnet_block"])
def test_autocast(name):
    make, data = MODELS[name]
    fused, plain = _pair(make)
    x = data()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), plain(x)
    assert y.dtype is expected.dtype
    assert_close(y, expected, 6e-2)


@pytest.mark.parametrize("pinned", ["1", "0"])
def test_checkpointing(pinned, monkeypatch, tmp_path):
    """What chooses and measures paths in the first call is not counted among what it saves."""
    monkeypatch.setenv("GENAI_FAST_DETERMINISTIC", pinned)
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "_chosen", {})
    fused, plain = _pair(UNet)
    x = torch.randn(4, 3, 8, 8)
    for model in (fused, plain):
        down = model.down1.forward
        model.down1.forward = lambda x, down=down: checkpoint(down, x, use_reentrant=False)
    assert_alike(fused, plain, x, steps=1)
    fused, plain = _pair(ResBlock)
    loss = checkpoint(fused, x, use_reentrant=False)
    loss.square().sum().backward()
    plain(x).square().sum().backward()
    assert_close(fused.conv1.weight.grad, plain.conv1.weight.grad, 1e-3)


def test_gradient_penalty(fused_calls):
    fused, plain = _pair(MODELS["patchgan"][0])
    x = torch.randn(4, 3, 32, 32)
    results = []
    for model in (fused, plain):
        images = x.clone().requires_grad_()
        scores = model(images)
        (slope,) = torch.autograd.grad(scores.sum() + scores.square().sum(), images, create_graph=True)
        ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert fused_calls
    assert_gradients(*results, tolerance=5e-3)


def test_channels_last_stays(fused_calls):
    fused, plain = _pair(UNet)
    fused.to(memory_format=torch.channels_last)
    plain.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    assert_alike(fused, plain, x, steps=1)
    seen = []
    fused.down1.register_forward_hook(lambda module, args, y: seen.append(y))
    for model in (fused, fused.eval()):
        with torch.set_grad_enabled(model.training):
            model(x)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen) and len(seen) == 2


def test_sync_conversion_and_slices_of_a_fused_model():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(HandWritten()))
    assert type(model.bn1) is nn.SyncBatchNorm
    plain = unfuse(copy.deepcopy(model))
    assert_alike(model, plain, torch.randn(7, 6), steps=1)


def test_importing_brings_neither_the_tracer_nor_the_compiler():
    code = (
        "import sys, torch; before = set(sys.modules); import genai_fast\n"
        "new = set(sys.modules) - before\n"
        "print([m for m in new if m.startswith(('torch.fx', 'torch._dynamo')) or m.endswith('_written')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
