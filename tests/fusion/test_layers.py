"""Layers against the stock modules that they hold, in the words of torch's own semantics."""

import copy
import io
import pickle

import pytest
import torch
from alike import assert_alike, assert_buffers_alike, assert_close, assert_gradients, plain_of, step, with_statistics
from torch import nn

import genai_fast
from genai_fast import ops
from genai_fast.layers import ConvBNAct, ConvTransposeBNAct, FusedSequential

pytestmark = pytest.mark.usefixtures("small_is_fused")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _pair(*children):
    fused = FusedSequential(*children)
    return fused, plain_of(fused)


ACTS = [
    nn.ReLU(),
    nn.LeakyReLU(0.2),
    nn.LeakyReLU(0.1, inplace=True),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Identity(),
]
RUNS = {
    "conv1d": lambda: (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU()),
    "conv3d": lambda: (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.LeakyReLU(0.2)),
    "transpose": lambda: (nn.ConvTranspose2d(3, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(True)),
    "linear": lambda: (nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU()),
    "lone": lambda: (nn.BatchNorm2d(3),),
    "first": lambda: (nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 3)),
    "twice": lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()),
    "eps": lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, 0.8), nn.LeakyReLU(0.2)),
    "cumulative": lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU()),
    "no_affine": lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
    "no_tracking": lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
    "sync": lambda: (nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU()),
}
SHAPES = {"conv1d": (5, 3, 12), "conv3d": (4, 3, 6, 6, 6), "linear": (9, 3)}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_its_modules(name, fused_calls):
    fused, plain = _pair(*RUNS[name]())
    assert_alike(fused, plain, torch.randn(SHAPES.get(name, (4, 3, 8, 8))))
    assert_buffers_alike(fused, plain)
    assert fused_calls


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_each_activation(act, fused_calls):
    fused, plain = _pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), copy.deepcopy(act))
    assert_alike(fused, plain, torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last))
    names = {"Identity()": "none", "LeakyReLU": "leaky_relu", "GELU(approximate='tanh')": "gelu_tanh"}
    assert fused_calls[0] == names.get(repr(act), names.get(type(act).__name__, type(act).__name__.lower()))


def test_statistics_switched_off_later():
    fused, plain = _pair(nn.BatchNorm2d(3), nn.ReLU())
    x = torch.randn(4, 3, 5, 5)
    for model in (fused, plain):
        model(x)
        model[0].track_running_stats = False
    assert_alike(fused, plain, x)
    assert_buffers_alike(fused, plain)
    assert fused[0].num_batches_tracked == 1


def test_errors_are_torchs():
    fused = FusedSequential(nn.BatchNorm2d(3), nn.ReLU())
    with pytest.raises(ValueError, match="expected 4D input"):
        fused(torch.randn(4, 3, 5))
    with pytest.raises(ValueError, match=r"more than 1 value per channel"):
        fused(torch.randn(1, 3, 1, 1))
    with pytest.raises(RuntimeError):
        FusedSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()(torch.randn(2, 5, 8, 8))


def test_an_empty_batch_is_left_to_torch():
    fused, plain = _pair(nn.BatchNorm2d(3), nn.ReLU())
    x = torch.randn(0, 3, 4, 4)
    assert fused(x).shape == plain(x).shape == x.shape


class _MyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1.0


def _hooked():
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, args, y: y + 1.0)
    return norm


def _patched():
    norm = nn.BatchNorm2d(4)
    stock = norm.forward
    norm.forward = lambda x: stock(x) + 1.0
    return norm


@pytest.mark.parametrize("make", [lambda: _MyNorm(4), _hooked, _patched], ids=["subclass", "hook", "patched"])
def test_what_is_not_stock_is_called(make, fused_calls):
    fused = FusedSequential(nn.Conv2d(3, 4, 3), make(), nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(nn.BatchNorm2d(4))(fused[0](x)) + 1.0
    assert_close(fused(x), expected.relu())
    assert not fused_calls


@pytest.mark.parametrize("register", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_a_hook_that_comes_late_is_called(register, fused_calls):
    fused = FusedSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x, seen = torch.randn(4, 3, 8, 8), []
    fused(x)
    assert len(fused_calls) == 1
    handle = getattr(fused[1], f"register_{register}_hook")(lambda *args: seen.append(args) and None)
    fused(x).sum().backward()
    assert len(seen) == 1 and len(fused_calls) == 1
    handle.remove()
    fused(x)
    assert len(seen) == 1 and len(fused_calls) == 2


def test_a_hook_on_every_module_is_called(fused_calls):
    fused, seen = FusedSequential(nn.BatchNorm2d(3), nn.ReLU()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)) and None)
    try:
        fused(torch.randn(4, 3, 5, 5))
    finally:
        handle.remove()
    assert seen == [nn.BatchNorm2d, nn.ReLU, FusedSequential] and not fused_calls


def test_children_may_be_replaced_at_any_time(fused_calls):
    fused = FusedSequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    fused(x)
    fused[1] = nn.InstanceNorm2d(4)
    assert_close(fused(x), plain_of(fused)(x))
    fused[1] = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=0)
    assert_close(fused(x), plain_of(fused)(x))
    assert len(fused_calls) == 1
    fused.append(nn.BatchNorm2d(4))
    fused(x)
    assert len(fused_calls) == 2


def test_a_lazy_norm_runs_once_it_is_made(fused_calls):
    fused = FusedSequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    fused(x)
    assert not fused_calls
    plain = plain_of(fused)
    assert_close(fused(x), plain(x))
    assert fused_calls == ["relu"]


# --- dropout


def test_dropout_draws_again_in_backward_and_is_none_in_evaluation():
    fused = FusedSequential(nn.Linear(40, 300), nn.BatchNorm1d(300), nn.LeakyReLU(0.2), nn.Dropout(0.4))
    plain = plain_of(fused)[:3]
    x = torch.randn(64, 40)
    y, dense = fused(x), plain(x)
    kept = y != 0
    assert_close(y, torch.where(kept, dense / 0.6, 0.0))
    assert 0.57 < kept.float().mean() < 0.63
    torch.manual_seed(3)
    first = fused(x)
    torch.manual_seed(3)
    assert torch.equal(first, fused(x))
    fused.eval()
    plain.load_state_dict({k: v for k, v in fused.state_dict().items()})
    assert_close(fused(x), plain.eval()(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_activation_and_dropout(inplace, monkeypatch):
    made, op = [], ops.act_dropout
    monkeypatch.setattr(ops, "act_dropout", lambda *a: made.append(a[3]) or op(*a))
    fused = FusedSequential(nn.Linear(8, 50), nn.LeakyReLU(0.3, inplace), nn.Dropout(0.5, inplace))
    plain = plain_of(fused)[:2]
    x = torch.randn(6, 8)
    torch.manual_seed(1)
    y, found = step(fused, x)
    assert made == ["leaky_relu"]
    kept = y[0] != 0
    _, expected = step(nn.Sequential(plain, _Times(kept * 2.0)), x)
    assert_gradients(found, {name.removeprefix("0."): g for name, g in expected.items()}, 1e-5)


class _Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_what_works_in_place_on_the_input_does_so():
    x = torch.randn(6, 8)
    y = x.clone()
    FusedSequential(nn.ReLU(True), nn.Dropout(0.5))(y)
    assert torch.equal(y, x.relu())


# --- containers


BLOCKS = {
    "conv": (lambda **k: ConvBNAct(3, 6, 4, 2, 1, **k), lambda **k: nn.Conv2d(3, 6, 4, 2, 1, **k)),
    "transpose": (
        lambda **k: ConvTransposeBNAct(3, 6, 3, 2, 1, 1, **k),
        lambda **k: nn.ConvTranspose2d(3, 6, 3, 2, 1, 1, **k),
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_its_three_modules(kind, fused_calls):
    block, conv = BLOCKS[kind]
    fused = block(eps=0.8, momentum=0.3, groups=3, dilation=2)
    plain = nn.Sequential(conv(bias=False, groups=3, dilation=2), nn.BatchNorm2d(6, 0.8, 0.3), nn.LeakyReLU(0.2))
    assert [repr(m) for m in fused] == [repr(m) for m in plain]
    plain.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert_alike(fused, plain, torch.randn(4, 3, 9, 9))
    assert fused_calls


def test_block_options():
    block = ConvBNAct(3, 6, 3, dims=1, bias=True, padding_mode="circular", activation=nn.GELU(), dtype=torch.float64,
                      track_running_stats=False, affine=False)  # fmt: skip
    assert repr(block[0]) == repr(nn.Conv1d(3, 6, 3, padding_mode="circular"))
    assert type(block[1]) is nn.BatchNorm1d and block[1].weight is block[1].running_mean is None
    assert type(block[2]) is nn.GELU and block[0].weight.dtype is torch.float64
    assert len(ConvTransposeBNAct(3, 6, 3, dims=3, activation=None)) == 2
    assert ConvBNAct(3, 6, 3, device="meta")[1].weight.is_meta
    assert ConvBNAct(3, 6, 3, activation="leaky_relu", negative_slope=0.01)[2].negative_slope == 0.01
    assert ConvBNAct(3, 6, 3, activation="elu")[2].alpha == 1.0
    assert ConvBNAct(3, 6, 3, activation="softplus", negative_slope=2.0)[2].beta == 2.0
    for name, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        act = ConvBNAct(3, 6, 3, activation=name)[2]
        assert type(act) is nn.GELU and act.approximate == approximate
    for bad, message in ((dict(dims=4), "dims.*got 4"), (dict(activation="swish"), "activation.*got 'swish'")):
        with pytest.raises(ValueError, match=f"ConvBNAct: {message}"):
            ConvBNAct(3, 6, 3, **bad)


def test_containers_are_sequentials():
    block = ConvBNAct(3, 6, 3)
    assert type(block[:2]) is FusedSequential and block[:2][1] is block[1] and type(block[1]) is nn.BatchNorm2d
    assert type(copy.deepcopy(block)) is ConvBNAct
    loaded = pickle.loads(pickle.dumps(block))
    x = torch.randn(4, 3, 9, 9)
    assert_close(loaded(x), block(x))
    stream = io.BytesIO()
    torch.save(block, stream)
    stream.seek(0)
    assert type(torch.load(stream, weights_only=False)) is ConvBNAct
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(block)[1]) is nn.SyncBatchNorm
    nn.utils.parametrizations.spectral_norm(block[0])
    assert_close(block.eval()(x), plain_of(block).eval()(x))


# --- what traces the modules


@pytest.mark.parametrize("training", [True, False])
def test_compile(training, fused_calls):
    fused, plain = _pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.2, True), nn.Flatten())
    fused.train(training)
    plain.train(training)
    x = torch.randn(4, 3, 8, 8)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    (y,), found = step(compiled, x)
    (expected,), gradients = step(plain, x)
    assert_close(y, expected)
    assert_gradients({k.removeprefix("_orig_mod."): g for k, g in found.items()}, gradients)
    assert_buffers_alike(fused, plain)


@pytest.mark.parametrize("trace", ["export", "strict", "jit", "script", "fx", "vmap"])
def test_a_trace_holds_torchs_own_operators(trace):
    fused, plain = _pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    with_statistics(fused)
    plain.load_state_dict(fused.state_dict())
    fused.eval()
    x = torch.randn(4, 3, 8, 8)
    if trace in ("export", "strict"):
        program = torch.export.export(fused, (x,), strict=trace == "strict")
        assert not any("genai_fast" in str(node.target) for node in program.graph.nodes)
        y = program.module()(x)
    elif trace == "jit":
        y = torch.jit.trace(fused, x)(x)
    elif trace == "script":
        y = torch.jit.script(fused)(x)
    elif trace == "fx":
        y = torch.fx.symbolic_trace(fused)(x)
    else:
        y = torch.vmap(fused)(x[None])[0]
    assert_close(y, plain.eval()(x))


def test_autocast(pinned):
    fused, plain = _pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.LeakyReLU(0.2), nn.Conv2d(6, 2, 3))
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), plain(x)
    assert_close(y, expected, 3e-2)
    y.float().sum().backward()
    expected.float().sum().backward()
    assert_close(fused[1].weight.grad, plain[1].weight.grad, 3e-2, scale=fused[0].weight.grad.norm().item())
    assert_buffers_alike(fused.float(), plain.float())


def test_no_kernel_no_fusion(fused_calls):
    with genai_fast.use_backend(None):
        fused = FusedSequential(nn.BatchNorm2d(3), nn.ReLU()).double()
        with pytest.warns(genai_fast.FallbackWarning, match="one by one"):
            from genai_fast.fusion import run

            run._served.cache_clear()
            fused(torch.randn(4, 3, 5, 5).double())
    assert not fused_calls
