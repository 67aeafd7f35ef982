"""fuse on models as people write them: the same numbers, keys and classes, and a reason for what is left alone."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from alike import assert_alike, assert_buffers_alike, close, gradients_close, step, with_statistics
from fuse_models import MODELS, Branches, Generator, HandWritten, ResBlock, Spectral, UNet
from torch import nn
from torch.utils.checkpoint import checkpoint

import genai_fast
from genai_fast import explain, fuse, ops, unfuse
from genai_fast.layers import ConvBNAct, FusedSequential


@pytest.fixture(autouse=True)
def _reference():
    with genai_fast.use_backend("reference"):
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """The activations that the fused op ran with."""
    made, op = [], ops.batch_norm_act

    def counted(*args, **kwargs):
        made.append(args[8])
        return op(*args, **kwargs)

    monkeypatch.setattr(ops, "batch_norm_act", counted)
    return made


def _pair(make):
    model = make()
    return fuse(copy.deepcopy(model)), model


EXPECTED = {
    "dcgan_generator": ["relu"] * 2, "dcgan_discriminator": ["leaky_relu"], "vae": ["leaky_relu"] * 4,
    "patchgan": ["leaky_relu"] * 2, "unet": ["relu"] * 6, "skip_block": ["relu", "none"],
    "hand_written": ["relu", "leaky_relu", "leaky_relu"], "resnet_block": ["relu", "none"],
    "shared": ["silu", "sigmoid"], "branches": ["relu"], "spectral": ["leaky_relu"],
    "upsampler": ["none", "leaky_relu", "silu", "relu", "tanh"],
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_is_the_model(name, calls):
    make, data = MODELS[name]
    fused, plain = _pair(make)
    x = data()
    fused(x)
    plain(x)
    assert calls[-len(EXPECTED[name]) :] == EXPECTED[name]
    if name == "branches":
        assert len(calls) == 1 + 1  # its first norm has two uses: fused by itself
    assert_alike(fused, plain, x)
    assert_buffers_alike(fused, plain)
    assert isinstance(fused, make) and type(fused).__name__ == make.__name__
    assert repr(fused) == repr(plain)


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_gives_every_class_back(name, calls):
    make, data = MODELS[name]
    model = make()
    classes, optimizer = [type(m) for m in model.modules()], torch.optim.Adam(model.parameters())
    assert fuse(model) is model and fuse(model) is model
    fused_classes = [type(m) for m in model.modules()]
    assert fused_classes != classes and all(issubclass(f, c) for f, c in zip(fused_classes, classes, strict=True))
    assert optimizer.param_groups[0]["params"] == [*model.parameters()]
    assert unfuse(model) is model and [type(m) for m in model.modules()] == classes
    model(data())
    assert not calls
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
        close(a, b, 1e-4, what=name)


# --- what stays right later


def test_hooks_that_come_late(calls):
    model, seen = fuse(HandWritten()), []
    z = torch.randn(7, 6)
    model.bn1.register_forward_hook(lambda module, args, y: seen.append(y))
    model.register_forward_hook(lambda module, args, y: seen.append(y))
    model(z)
    assert [y.shape[1] for y in seen] == [6, 3] and calls == ["relu", "leaky_relu"]


def test_children_of_another_class(calls):
    fused, plain = _pair(HandWritten)
    for model in (fused, plain):
        torch.manual_seed(2)
        model.bn1 = nn.InstanceNorm2d(6)
        nn.utils.parametrizations.weight_norm(model.conv2)
        nn.utils.spectral_norm(model.conv1)
    assert_alike(fused, plain, torch.randn(7, 6), steps=1)
    assert set(calls) == {"relu", "leaky_relu"}
    assert len(fused(torch.randn(7, 6))) == 7


class _Optional(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), norm, nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def test_instances_of_one_class_are_decided_one_by_one(calls):
    x = torch.randn(4, 3, 8, 8)
    with_norm, without = _Optional(nn.BatchNorm2d(4)), _Optional(nn.Identity())
    both = fuse(nn.ModuleList([with_norm, without]))
    assert type(without) is _Optional and type(with_norm) is not _Optional
    assert type(fuse(_Optional(nn.BatchNorm2d(4)))) is type(with_norm)  # one class for one decision
    for model in both:
        close(model(x), F.relu(model.norm(model.conv(x))), 1e-4)
    assert calls == ["relu"]


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


def test_what_works_in_place_keeps_its_order(calls):
    fused, plain = _pair(_Aliased)
    assert type(fused) is not _Aliased
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        close(fused(x), plain(x), 1e-5)
    assert calls == ["none", "relu"]


# --- what is left alone, and why


class _Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.scale = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 2.0
        self.gain = nn.Parameter(torch.ones(()))


FACTOR = 2.0


class _Flag(_Base):
    def forward(self, x):
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)


class _Parameter(_Base):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) * self.gain


class _ChildsParameter(_Base):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) + self.conv.bias.sum()


class _Global(_Base):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) * FACTOR


class _If(_Base):
    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return F.relu(self.bn(self.conv(x)))


class _Ternary(_Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if self.training else y


class _Loop(_Base):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class _Comprehension(_Base):
    def forward(self, x):
        return sum([F.relu(self.bn(self.conv(x))) for _ in "ab"])


class _With(_Base):
    def forward(self, x):
        with torch.no_grad():
            return F.relu(self.bn(self.conv(x)))


class _Assigns(_Base):
    def forward(self, x):
        self.last = F.relu(self.bn(self.conv(x)))
        return self.last


class _Star(_Base):
    def forward(self, *xs):
        return F.relu(self.bn(self.conv(xs[0])))


class _Draws(_Base):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) + torch.randn(4, 1, 1)


class _Builtin(_Base):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) / len(x)


class _Helper(_Base):
    def norm(self, x):
        return self.bn(x)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class _Compares(_Base):
    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        return y * (y > 1)


class _Lambda(_Base):
    def forward(self, x):
        act = lambda t: t.relu()  # noqa: E731
        return act(self.bn(self.conv(x)))


class _Decorated(_Base):
    @torch.no_grad()
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class _Super(_Parameter):
    def forward(self, x):
        return super().forward(x)


class _Mode(_Base):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) + torch.is_grad_enabled()


REFUSED = {
    _Flag: "reads self.training, which is not a child", _Parameter: "reads self.gain, which is not a child",
    _ChildsParameter: "calls self.conv.bias.sum, which is not a child", _Global: "reads FACTOR", _If: "an if",
    _Ternary: "a conditional expression", _Loop: "a for loop", _Comprehension: "a comprehension", _With: "a with",
    _Assigns: "assigns to self.last", _Star: "arguments are not plain", _Draws: "torch.randn", _Builtin: "calls len",
    _Helper: "calls self.norm, which is not a child", _Compares: "a comparison", _Lambda: "a lambda",
    _Decorated: "decorated", _Super: "calls super", _Mode: "calls torch.is_grad_enabled",
}  # fmt: skip


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_a_forward_that_a_trace_would_freeze_is_refused(cls, calls):
    model = cls()
    (row,) = explain(model)
    assert REFUSED[cls] in row.reason and row.path == "" and row.found == cls.__name__ and not row.becomes
    assert type(fuse(model)) is cls
    model(torch.randn(4, 3, 8, 8))
    assert not calls


def test_a_forward_without_source_is_refused():
    namespace = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return self.bn(x)", namespace)
    model = namespace["Made"]()
    model.bn = nn.BatchNorm2d(3)
    assert "source" in explain(model).rows[0].reason and type(fuse(model)) is namespace["Made"]


def test_a_forward_replaced_on_the_instance_stays(calls):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    hand = _Optional(nn.BatchNorm2d(4))
    for m in (model, hand):
        m.forward = lambda x: x + 1.0
        assert type(fuse(m)) in (nn.Sequential, _Optional)
        assert "replaced" in explain(m).rows[0].reason
        assert torch.equal(m(torch.zeros(2)), torch.ones(2))
    assert not calls


def test_scripted_and_traced_models_stay():
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    for model in (torch.jit.script(plain), torch.fx.symbolic_trace(plain)):
        assert type(fuse(model)) is type(model)
        assert "generated already" in explain(model).rows[0].reason


class _MyNorm(nn.BatchNorm2d):
    pass


def test_explain_says_what_happens():
    late = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
    late[1].register_forward_hook(lambda *_: None)
    model = nn.Sequential(Generator(), Spectral(), late, nn.Sequential(_MyNorm(3), nn.LazyBatchNorm2d()), ResBlock())
    classes = [type(m) for m in model.modules()]
    rows = list(explain(model))
    assert [type(m) for m in model.modules()] == classes
    found = {row.path: row for row in rows}
    assert found["0.main.0+1+2"].becomes == "batch_norm_act (ReLU)"
    assert found["0.main.0+1+2"].found == "ConvTranspose2d + BatchNorm2d + ReLU"
    assert "nothing to gain" in found["0.main.6"].reason
    assert "hooks" in found["1.old.0"].reason and found["1.old.1+2"].becomes == "batch_norm_act (LeakyReLU)"
    assert "parametrized" in found["1.new.0"].reason
    assert "hooks" in found["2.1"].reason
    assert "subclass of BatchNorm2d" in found["3.0"].reason and "first call" in found["3.1"].reason
    assert found["4.conv1+bn1+relu"].becomes == "batch_norm_act (ReLU)" and found["4.conv2+bn2"].becomes
    table = str(explain(model)).splitlines()
    assert len(table) == len(rows) + 1 == len(explain(model)) + 1
    assert len({line.index("batch_norm_act") for line in table if "batch_norm_act" in line}) == 1
    assert list(explain(fuse(model))) == rows
    assert "no batch norm" in explain(nn.Sequential(_Optional(nn.Identity()))).rows[0].reason


def test_branches_are_not_joined():
    rows = {row.path for row in explain(Branches())}
    assert rows == {"bn1", "bn2+ReLU()"}


# --- wrappers


def _data_parallel(m):
    return nn.DataParallel(m)


def _compiled(m):
    return torch.compile(m, backend="eager")


def _compiled_in_place(m):
    m.compile(backend="eager")
    return m


WRAPPERS = {_data_parallel: "DataParallel", _compiled: "OptimizedModule", _compiled_in_place: "a compiled module"}


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda w: w.__name__)
def test_a_wrapped_model_is_refused(wrap):
    wrapped = wrap(Generator())
    for name, function in (("fuse", fuse), ("unfuse", unfuse)):
        with pytest.raises(TypeError, match=rf"{name}: model: .*got {WRAPPERS[wrap]}; {name} the model first"):
            function(wrapped)
        with pytest.raises(TypeError, match=rf"{name}: 0\.1: .*got {WRAPPERS[wrap]}"):
            function(nn.Sequential(nn.Sequential(nn.ReLU(), wrapped)))
    assert type(wrap(fuse(Generator()))(torch.randn(2, 6, 1, 1))) is torch.Tensor
    assert any("fuse comes first" in row.reason for row in explain(wrapped))


def test_what_is_no_module_is_refused():
    for function in (fuse, unfuse, explain):
        with pytest.raises(TypeError, match=r"expected an nn\.Module, got list"):
            function([nn.ReLU()])


def test_layers_stay_layers():
    model = nn.Sequential(ConvBNAct(3, 4, 3), FusedSequential(nn.ReLU()))
    for change in (fuse, unfuse):
        assert [type(m) for m in change(model)] == [ConvBNAct, FusedSequential]
    assert type(model) is nn.Sequential
    assert isinstance(fuse(model), FusedSequential) and type(model[:1]) is type(model)


class _Block(nn.Sequential):
    def __init__(self, a, b):
        super().__init__(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU6())


def test_a_subclass_of_sequential(calls):
    fused, plain = _pair(lambda: _Block(3, 4))
    assert isinstance(fused, _Block)
    assert_alike(fused, plain, torch.randn(4, 3, 8, 8), steps=1)
    assert calls and set(calls) == {"none"}


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
    close(y, expected, 1e-4)
    gradients_close({k.removeprefix("_orig_mod."): g for k, g in found.items()}, gradients)
    assert_buffers_alike(fused, plain)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    fused, plain = _pair(HandWritten)
    x = torch.randn(7, 6)
    program = torch.export.export(fused.eval(), (x,), strict=strict)
    assert not any("genai_fast" in str(node.target) for node in program.graph.nodes)
    close(program.module()(x), plain.eval()(x), 1e-4)


@pytest.mark.parametrize("name", ["hand_written", "unet", "resnet_block"])
def test_autocast(name):
    make, data = MODELS[name]
    fused, plain = _pair(make)
    x = data()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), plain(x)
    assert y.dtype is expected.dtype
    close(y, expected, 6e-2)


def test_checkpointing():
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
    close(fused.conv1.weight.grad, plain.conv1.weight.grad, 1e-3)


def test_gradient_penalty(calls):
    fused, plain = _pair(MODELS["patchgan"][0])
    x = torch.randn(4, 3, 32, 32)
    results = []
    for model in (fused, plain):
        images = x.clone().requires_grad_()
        scores = model(images)
        (slope,) = torch.autograd.grad(scores.sum() + scores.square().sum(), images, create_graph=True)
        ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls
    gradients_close(*results, tolerance=5e-3)


def test_channels_last_stays(calls):
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


def test_importing_does_not_trace():
    code = "import sys, genai_fast; print('genai_fast.fuse._written' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
