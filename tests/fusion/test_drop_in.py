"""A model that ran in plain PyTorch runs fused: whatever was done to its modules, with measurement on."""

import copy
import io
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from alike import assert_alike, assert_close, assert_gradients, step, strides
from torch import nn
from torch.nn.utils import parametrizations

from genai_fast import autotune, explain, fuse, unfuse
from genai_fast.fusion import implementations
from genai_fast.fusion.implementations import CONVOLUTIONS


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GENAI_FAST_CACHE", str(tmp_path))
    autotune.forget()
    torch.manual_seed(0)
    yield
    autotune.forget()


def pair(make):
    model = make()
    return fuse(copy.deepcopy(model)), model


class View(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, x):
        return x.view(len(x), *self.sizes)


@pytest.fixture(params=[option.name for option in CONVOLUTIONS])
def forced(request, monkeypatch):
    """One implementation for every convolution that it serves."""

    def choose(family, shape, device, candidates):
        makers, default = candidates()
        return autotune.Choice(request.param if request.param in makers else default, {})

    monkeypatch.setattr(autotune, "choose", choose)
    return request.param


# --- measuring never touches the model


def block():
    return nn.Sequential(nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU())


def test_parameters_that_are_no_leaves():
    fused, plain = pair(block)
    weight = torch.randn(32, 16, 3, 3, requires_grad=True)
    x = torch.randn(4, 16, 31, 33)
    found, expected = (torch.func.functional_call(m, {"0.weight": weight * 2}, (x,)) for m in (fused, plain))
    assert_close(found, expected, 1e-4)
    assert autotune.chosen(x.device)


def test_modules_that_cannot_be_copied():
    fused, plain = pair(block)
    fused[0].lock = threading.Lock()
    x = torch.randn(4, 16, 32, 33)
    assert_close(fused(x), plain(x), 1e-4)
    assert autotune.chosen(x.device)


def test_a_norm_with_a_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain = block()
        model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain), dist.new_group([0])).eval()
        x = torch.randn(4, 16, 32, 32)
        assert_close(fuse(model)(x), plain.eval()(x), 1e-4)
        assert_close(model.train()(x), plain.train()(x), 1e-4)
    finally:
        dist.destroy_process_group()


def test_measuring_leaves_random_state_buffers_and_gradients_alone():
    fused, plain = pair(block)
    x = torch.randn(4, 16, 32, 32)
    state = torch.get_rng_state()
    y = fused(x)
    assert torch.equal(torch.get_rng_state(), state) and autotune.chosen(x.device)
    assert all(p.grad is None for p in fused.parameters())
    plain(x)
    assert fused[1].num_batches_tracked == 1
    assert_close(fused[1].running_mean, plain[1].running_mean, 1e-4)
    assert y.requires_grad


def test_measuring_is_bounded_in_batch_and_shapes(monkeypatch):
    measured = []

    def measure(device, makers, default):
        rows = implementations._MEASURED["cpu"]
        for make in makers.values():
            make()()
        measured.append(rows)
        return autotune.Choice(default, dict.fromkeys(makers, 1.0))

    made, like = [], implementations.like
    monkeypatch.setattr(autotune, "_measure", measure)
    monkeypatch.setattr(implementations, "like", lambda x, g: made.append(x.shape) or like(x, g))
    monkeypatch.setitem(implementations._MEASURED, "cpu", 1 << 22)
    fused = fuse(block())
    for k in range(2 * autotune.MOST_SHAPES):
        fused(torch.randn(9, 16, 32 + k, 32))
    assert len(measured) == autotune.MOST_SHAPES
    assert {shape[0] for shape in made} == {1}
    fused(torch.randn(5, 16, 32, 32))
    assert len(measured) == autotune.MOST_SHAPES


def test_an_implementation_that_fails_is_left_out_with_a_warning():
    def makers():
        def broken():
            raise RuntimeError("broken")

        return {"torch": lambda: lambda: None, "broken": lambda: broken}, "torch"

    autotune._warn_once.cache_clear()
    with pytest.warns(autotune.AutotuneWarning, match="broken fails and is skipped"):
        assert autotune.choose(("op",), (1,), torch.device("cpu"), makers).name == "torch"


class _Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


def test_under_a_mode_nothing_is_measured():
    fused, plain = pair(block)
    x = torch.randn(4, 16, 32, 32)
    with _Mode() as mode:
        y = fused(x)
    assert sum("convolution" in name for name in mode.seen) == 1 and not autotune.chosen(x.device)
    assert_close(y, plain(x), 1e-4)


# --- what comes after may change a result in place


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_an_activation_in_place_after_any_convolution(forced, kind, bias):
    fused, plain = pair(lambda: nn.Sequential(kind(64, 32, 4, 2, 1, bias=bias), nn.LeakyReLU(0.2, inplace=True)))
    assert_alike(fused, plain, torch.randn(16, 64, 8, 8), steps=1)


CHANGED = {
    "norm": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
    "leaky_relu": lambda: nn.Sequential(nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.LeakyReLU(0.2)),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 16, 3)),
}


@pytest.mark.parametrize("name", [*CHANGED])
def test_a_result_may_be_changed_in_place(name, forced, small_is_fused):
    fused, plain = pair(CHANGED[name])
    x = torch.randn(4, 16 if name == "leaky_relu" else 3, 12, 12)
    gradients = []
    for model in (fused, plain):
        y = model(x)
        if name == "norm" and model is plain:  # PyTorch's ReLU keeps its result
            y = y.clone()
        y += 1.0
        y.square().sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    assert_gradients(*gradients)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.LeakyReLU], ids=lambda a: a.__name__)
def test_the_result_of_dropout_after_an_activation(act, inplace):
    model = fuse(nn.Sequential(nn.Linear(256, 256), act(inplace=inplace), nn.Dropout(0.1)))
    y = model(torch.randn(64, 256))
    y += 1.0
    y.sum().backward()
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_states_may_be_changed_in_place(options):
    fused, plain = pair(lambda: nn.GRU(16, 16, **options))
    x = torch.randn(20, 20, 16)
    gradients = []
    for model in (fused, plain):
        y, h = model(x)
        y *= 2.0
        h += 1.0
        (y.square().sum() + h.sum()).backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    assert_gradients(*gradients)


# --- numbers are read as a plain call reads them


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(
    "settings", [{"stride": 1}, {"padding": 2}, {"dilation": 2}, {"stride": [2, 2], "padding": np.int64(1)}], ids=str
)
def test_settings_changed_later(kind, settings, forced):
    if kind is nn.ConvTranspose2d and not isinstance(settings.get("padding", (0, 0)), tuple):
        pytest.skip("PyTorch's takes no int here either")
    fused, plain = pair(lambda: nn.Sequential(kind(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.Tanh()))
    for model in (fused, plain):
        for name, value in settings.items():
            setattr(model[0], name, value)
    if isinstance(settings.get("padding"), np.int64):
        plain[0].padding = 1  # F takes no NumPy integer
    assert_alike(fused, plain, torch.randn(4, 32, 24, 24), steps=1)


def test_numbers_of_numpy():
    slope, p = np.float32(0.25), np.float64(0.0)
    fused, plain = pair(lambda: nn.Sequential(nn.Linear(256, 64), nn.LeakyReLU(slope), nn.Dropout(p)))
    x = torch.randn(512, 256)
    assert_close(fused(x), plain(x))
    model = fuse(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(np.float32(0.5))))
    assert (model(torch.randn(128, 256)) == 0).any()


def test_sizes_that_attributes_no_longer_tell():
    """A pruned convolution: its weight has other sizes than its attributes say."""
    fused, plain = pair(lambda: nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()))
    for model in (fused, plain):
        model[0].weight = nn.Parameter(model[0].weight[:24, :12].detach().clone())
        model[0].bias = nn.Parameter(model[0].bias[:24].detach().clone())
    plain.load_state_dict(fused.state_dict())
    assert_alike(fused, plain, torch.randn(4, 12, 32, 32), steps=1)


# --- memory layouts are those of the place


def textbook():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 32 * 32, 32 * 16 * 16), View(32, 16, 16), nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Sigmoid(), View(-1),
    )  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_views_between_layers(forced, layout):
    fused, plain = pair(textbook)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=layout)
    assert_close(fused(x), plain(x), 1e-4)
    assert fused(x).shape == (4, 3072)


@pytest.mark.parametrize("weight", ["contiguous", "channels_last"])
@pytest.mark.parametrize("given", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_results_lie_as_pytorchs(forced, kind, given, weight):
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    fused, plain = pair(lambda: nn.Sequential(kind(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.Tanh()))
    x = torch.randn(4, 32, 24, 26)
    x = x.transpose(2, 3) if given == "strided" else x.contiguous(memory_format=formats[given])
    for model in (fused, plain):
        model.to(memory_format=formats[weight])
    assert_alike(fused, plain, x, steps=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d, nn.BatchNorm2d, lambda c: nn.GroupNorm(8, c)], ids=["instance", "batch", "group"]
)
def test_gradients_reach_a_norm_in_its_layout(forced, batch, norm):
    fused, plain = pair(lambda: nn.Sequential(norm(128), nn.Conv2d(128, 128, 3, padding=1)))
    x = torch.randn(batch, 128, 8, 8)
    (_, found), (_, expected) = step(fused, x), step(plain, x)
    assert_gradients(found, expected)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_the_result_of_one_position_may_be_changed_in_place(kind, forced, small_is_fused):
    """It lies in memory as contiguous and as channels_last, and only its strides tell which."""
    size = 8 if kind is nn.Conv2d else 1
    fused, plain = pair(lambda: nn.Sequential(kind(4, 8, size, bias=False)))
    x = torch.randn(5, 4, size, size, requires_grad=True)
    gradients = []
    for model in (fused, plain):
        y = model(x)
        assert y.add_(1.0).stride() == plain(x).stride()
        y.square().sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    assert_gradients(*gradients)


@pytest.mark.parametrize("weight", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("after", [[], [nn.Identity()], [nn.Tanh(), nn.Dropout(0.0)]], ids=len)
def test_a_linear_layer_after_a_convolution(forced, weight, after, small_is_fused):
    fused, plain = pair(lambda: nn.Sequential(nn.Conv2d(8, 4, 3, 1, 1), *after, nn.Linear(12, 6)))
    for model in (fused, plain):
        model.to(memory_format=weight)
    x = torch.randn(2, 8, 12, 12)
    y, expected = fused(x), plain(x)
    assert strides(y) == strides(expected)
    y += 1.0
    assert_close(y, expected + 1.0, 1e-4)


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
@pytest.mark.parametrize("last", ["input", "weight", "neither"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_folded_norm_leaves_layouts_of_volumes(kind, last, kernel, small_is_fused):
    fused, plain = pair(lambda: nn.Sequential(kind(3, 8, kernel), nn.BatchNorm3d(8)).eval())
    x = torch.randn(2, 3, 4, 5, 6)
    if last == "weight":
        for model in (fused, plain):
            model.to(memory_format=torch.channels_last_3d)
    x = x.contiguous(memory_format=torch.channels_last_3d) if last == "input" else x
    with torch.no_grad():
        found, expected = fused(x), plain(x)
    assert_close(found, expected, 1e-4)
    assert strides(found) == strides(expected)


def _inputs_in_memory():
    yield nn.BatchNorm1d, "sequence", torch.randn(6, 5, 4).transpose(1, 2)
    yield nn.BatchNorm1d, "steps first", torch.randn(5, 6, 4).permute(1, 2, 0)
    for dims, last in ((2, torch.channels_last), (3, torch.channels_last_3d)):
        kind = getattr(nn, f"BatchNorm{dims}d")
        x = torch.randn(6, 8, 5, 3, 2)[..., 0] if dims == 2 else torch.randn(6, 8, 5, 3, 2)
        yield kind, "channels", x.contiguous(memory_format=last)[:, ::2]
        yield kind, "one picture", x.contiguous(memory_format=last)[:1, ::2]
        yield kind, "transposed", x[:, :4].transpose(1, -1).contiguous().transpose(1, -1)
        yield kind, "expanded", x[:1, :4].expand(6, *x[:, :4].shape[1:])


@pytest.mark.parametrize(
    ("kind", "name", "x"), [pytest.param(*i, id=f"{i[0].__name__} {i[1]}") for i in _inputs_in_memory()]
)
@pytest.mark.parametrize("training", [True, False])
def test_results_of_a_norm_lie_as_pytorchs(kind, name, x, training, small_is_fused):
    fused, plain = pair(lambda: nn.Sequential(kind(4), nn.ReLU()).train(training))
    found, expected = fused(x), plain(x)
    assert_close(found, expected, 1e-4)
    assert strides(found) == strides(expected)


@pytest.mark.parametrize("shape", [(3, 1, 6, 2), (3, 4, 1, 1), (2, 1, 3, 4, 5)], ids=str)
def test_a_norm_of_one_channel_or_position(shape, small_is_fused):
    """What follows reads the layout from strides that mean nothing."""
    fused, plain = pair(lambda: nn.Sequential(getattr(nn, f"BatchNorm{len(shape) - 2}d")(shape[1]), nn.ReLU()))
    x = torch.empty(shape, memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d).normal_()
    (found, gradients), (expected, wanted) = step(fused, x), step(plain, x)
    assert found[0].stride() == expected[0].stride()
    assert_gradients(gradients, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_an_rms_norm_keeps_a_layout(dtype, last, small_is_fused):
    fused, plain = pair(lambda: nn.RMSNorm(8, dtype=dtype))
    x = torch.randn(2, 3, 4, 5, 8, dtype=dtype)
    x = (x[:, :, 0] if last is torch.channels_last else x).contiguous(memory_format=last)
    found, expected = fused(x), plain(x)
    assert_close(found, expected, 1e-2)
    assert strides(found) == strides(expected)


# --- what a plain call would run


@pytest.mark.parametrize(
    "settings",
    [{"padding": 1}, {"padding": [1, 1]}, {"stride": True}, {"stride": (2, 2, 2)}, {"dilation": 1.0}, {"groups": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_settings_that_pytorch_refuses(kind, settings, forced, small_is_fused):
    fused, plain = pair(lambda: nn.Sequential(kind(4, 4, 3, 1, 1), nn.BatchNorm2d(4)))
    raised = []
    for model in (fused, plain):
        for name, value in settings.items():
            setattr(model[0], name, value)
        try:
            raised.append(model(torch.randn(2, 4, 8, 8)).shape)
        except Exception as error:
            raised.append((type(error), str(error)))
    assert raised[0] == raised[1]


def test_a_method_replaced_on_the_class(monkeypatch):
    fused, plain = pair(lambda: nn.Sequential(nn.BatchNorm2d(64), nn.ReLU()).eval())
    x = torch.randn(8, 64, 128, 128)

    def of_batch(self, x):
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", of_batch)
    assert_close(fused(x), plain(x))
    monkeypatch.undo()
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: nn.functional.conv2d(x, 2 * w, b))
    fused, plain = pair(lambda: nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU()))
    x = torch.randn(4, 16, 64, 64)
    assert_close(fused(x), plain(x))


@pytest.mark.parametrize("missing", ["running_mean", "running_var", "num_batches_tracked"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_norm_without_one_of_its_buffers(kind, training, missing, small_is_fused):
    fused, plain = pair(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), kind(4), nn.ReLU()).train(training))
    results, x = [], torch.randn(2, 4, 8, 8)
    for model in (fused, plain):
        setattr(model[1], missing, None)
        try:
            results.append(model(x))
        except Exception as error:
            results.append((type(error), str(error)))
    if isinstance(results[1], tuple):
        assert results[0] == results[1]
    else:
        assert_close(*results)


def test_a_nested_tensor():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1))
    x = torch.nested.nested_tensor([torch.randn(200, 64), torch.randn(100, 64)])
    assert fuse(model)(x).is_nested


# --- copies, pickles and scripts find the original class


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 8)

    def forward(self, x):
        return self.gru(x)[0]


def test_a_fused_gru_is_scripted():
    fused, plain = pair(Recurrent)
    assert type(fused.gru) is not nn.GRU
    x = torch.randn(9, 2, 6)
    assert_close(torch.jit.script(fused)(x), plain(x))


def test_a_class_is_saved_as_the_original():
    fused, stream = fuse(block()), io.BytesIO()
    torch.save({"class": type(fused), "state": fused.state_dict()}, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False)["class"] is nn.Sequential


def test_a_parametrized_fused_module_is_copied():
    fused = fuse(nn.GRU(16, 32))
    parametrizations.weight_norm(fused, "weight_hh_l0")
    averaged = torch.optim.swa_utils.AveragedModel(fused)
    x = torch.randn(9, 2, 16)
    assert_close(averaged(x)[0], fused(x)[0])
    twin = copy.deepcopy(fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    assert type(twin[0]) is nn.Conv2d


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.GRU, nn.Linear})


def test_dynamic_quantization_goes_before_fuse():
    """It looks up classes by identity; a model that is fused afterwards keeps the quantized modules."""
    model = nn.Sequential(Recurrent(), nn.Linear(8, 8), nn.BatchNorm1d(9), nn.ReLU()).eval()
    x = torch.randn(2, 9, 6)
    expected = quantized(model)
    assert type(expected[0].gru) is torch.ao.nn.quantized.dynamic.GRU
    for ours in (fuse(quantized(model)), quantized(unfuse(fuse(copy.deepcopy(model))))):
        assert type(ours[0].gru) is torch.ao.nn.quantized.dynamic.GRU
        assert type(ours[1]) is torch.ao.nn.quantized.dynamic.Linear
        with torch.no_grad():
            assert_close(ours(x), expected(x))


# --- explain says what serves a call


def test_explain_with_an_example():
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.GroupNorm(8, 32), nn.Flatten(),
        nn.Linear(32 * 32 * 32, 8), nn.ReLU(), nn.Dropout(0.5),
    )  # fmt: skip
    classes, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    x, random = torch.randn(4, 16, 32, 32), torch.get_rng_state()
    rows = {row.path: row for row in explain(model, x)}
    assert all(type(m) is c for m, c in zip(model.modules(), classes, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    conv = rows["0+1+2"]
    assert conv.becomes.endswith(" us)") and "torch" in conv.becomes + conv.reason
    assert "measured slower (" in conv.reason and "gemm: groups, dilation or padding" in conv.reason
    assert rows["6+7"].becomes == "modules" and "32 elements are fewer than 8192" in rows["6+7"].reason
    assert "PyTorch's group norm is one call too" in rows["3"].reason and "tune_cpu" in rows["5"].reason
    assert "0+1+2" in str(explain(model, torch.randn(4, 16, 32, 32)))


def test_explain_names_every_leaf_that_costs_time():
    model = nn.Sequential(
        nn.RNN(4, 4), nn.PReLU(), nn.Upsample(scale_factor=2), nn.InstanceNorm2d(3), nn.Linear(3, 3), nn.Flatten(),
        nn.Dropout2d(), nn.AlphaDropout(), nn.BCELoss(),
    )  # fmt: skip
    rows = {row.path: row for row in explain(model)}
    assert "one call already" in rows["0"].reason and "3 x 3 convolution" in rows["2"].reason
    assert rows["1"].becomes == "bias_act (PReLU)"
    assert "one pass" in rows["6"].reason and "random numbers" in rows["7"].reason and "logits" in rows["8"].reason
    assert rows["3"].becomes == "group_norm_act" and "5" not in rows


# --- what PyTorch refuses or takes, in the same words


def _conv_block(norm=nn.BatchNorm2d, act=nn.ReLU):
    return nn.Sequential(nn.ConvTranspose2d(4, 4, 3, 2, 1), norm(4), act(), nn.Dropout(0.5))


NUMBERS = {
    "stride": (0, (0, 0), (-1, -1)), "dilation": (0, (0, 0)), "groups": (0, 0),
    "eps": (1, -1e-3, 0.0, float("nan"), "0.1"),
    "momentum": (1, float("nan"), 1.7, torch.tensor([0.1]), torch.tensor(0.1, requires_grad=True), "0.1"),
    "negative_slope": (2, float("nan"), float("inf"), 1e39, torch.tensor([0.2]), "0.2"), "approximate": (2, "x", None),
    "p": (3, 1.5, -1.0, None, "0.5"),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "child", "value"), [(name, given[0], v) for name, given in NUMBERS.items() for v in given[1:]], ids=str
)
def test_numbers_that_are_none(name, child, value, training, small_is_fused):
    act = {"negative_slope": nn.LeakyReLU, "approximate": nn.GELU}.get(name, nn.ReLU)
    results = []
    for model in pair(lambda: _conv_block(act=act)):
        setattr(model[child], name, value)
        results.append(_result(model.train(training), torch.ones(2, 4, 5, 5)))
    _assert_same_result(*results)


def _result(model, x):
    try:
        with torch.no_grad():
            return model(x)
    except Exception as error:
        return type(error), str(error)


def _assert_same_result(found, expected):
    if isinstance(expected, tuple):
        assert found == expected
    elif isinstance(found, tuple):
        raise AssertionError(found)
    else:
        assert found.shape == expected.shape and found.dtype is expected.dtype


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("child", [0, 1])
@pytest.mark.parametrize("cast", [torch.float64, torch.float16, "meta"], ids=str)
def test_a_child_of_another_dtype_or_device(cast, child, kind, training, forced, small_is_fused):
    results = []
    for model in pair(lambda: nn.Sequential(kind(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())):
        model[child].to(cast)
        results.append(_result(model.train(training), torch.ones(2, 4, 5, 5)))
    _assert_same_result(*results)


@pytest.mark.parametrize("child", [0, 1])
def test_a_parameter_that_is_deleted(child, small_is_fused):
    results = []
    for model in pair(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())):
        del model[child].bias
        results.append(_result(model, torch.ones(2, 4, 5, 5)))
    _assert_same_result(*results)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_one_value_per_channel(kind, forced, small_is_fused):
    results = [
        _result(m, torch.ones(1, 4, 1, 1)) for m in pair(lambda: nn.Sequential(kind(4, 4, 1), nn.BatchNorm2d(4)))
    ]
    _assert_same_result(*results)


@pytest.mark.parametrize("changed", ["bias_ih_l0", "weight_hh_l0"])
def test_a_gru_with_a_weight_of_another_kind(changed):
    class Own(torch.Tensor):
        pass

    x = torch.randn(12, 2, 4)
    for change in (lambda p: p.double(), lambda p: p.as_subclass(Own)):
        results = []
        for model in pair(lambda: nn.GRU(4, 4)):
            setattr(model, changed, nn.Parameter(change(getattr(model, changed).detach())))
            results.append(_result(model, x))
        if isinstance(results[1][0], type):
            assert results[0] == results[1]
        else:
            assert_close(results[0][0], results[1][0])


@pytest.mark.parametrize("norm", [[nn.BatchNorm2d(8)], [nn.BatchNorm2d(8), nn.ReLU()], []], ids=len)
@pytest.mark.parametrize("training", [True, False])
def test_a_result_of_one_position_lies_as_pytorchs(forced, training, norm, small_is_fused):
    """PyTorch's batch norm takes it for contiguous, and so does what follows."""
    fused, plain = pair(
        lambda: nn.Sequential(nn.Conv2d(3, 8, (5, 6)), *norm, View(8, 1, 1), nn.ConvTranspose2d(8, 4, 3))
    )
    x = torch.randn(2, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    for ours, theirs in ((fused, plain), (fused[:-2], plain[:-2])):
        with torch.no_grad():
            found, expected = ours.train(training)(x), theirs.train(training)(x)
        assert strides(found) == strides(expected)
        assert found.stride() == expected.stride()


def _dropout_inputs():
    yield "transposed", torch.randn(4, 6, 32).transpose(1, 2)
    yield "steps first", torch.randn(6, 4, 32).transpose(0, 1)
    yield "a matrix", torch.randn(8, 96).t()
    yield "every other", torch.randn(8, 96)[::2].t()
    yield "a plane", torch.randn(3, 8, 6, 5).transpose(2, 3)
    yield "channels last", torch.randn(3, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    yield "a volume", torch.randn(3, 8, 6, 5, 4).contiguous(memory_format=torch.channels_last_3d)
    yield "sliced", torch.randn(8, 6, 64)[..., ::2]
    yield "expanded", torch.randn(1, 8, 6, 4).expand(3, 8, 6, 4)


@pytest.mark.parametrize(("name", "x"), [*_dropout_inputs()], ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("act", [[], [nn.Tanh()], [nn.ReLU()]], ids=["", "Tanh", "ReLU"])
def test_results_of_dropout_lie_as_pytorchs(act, name, x, small_is_fused):
    """A view of them may be taken, as x.transpose(1, 2).view(n, -1) of a transposed x is."""
    fused, plain = pair(lambda: nn.Sequential(*act, nn.Dropout(0.5)))
    for given in (x, x.detach().clone(memory_format=torch.preserve_format).requires_grad_()):
        found, expected = fused(given), plain(given)
        assert found.stride() == expected.stride() and found.shape == expected.shape
